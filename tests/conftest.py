"""What all tests share: profiles of hypothesis, poisoned memory, one fixture for each backend."""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:  # before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

from fastsnn import backends
from hypothesis import HealthCheck, settings

slow = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], print_blob=True)
# ci draws the same cases every time; thorough draws new ones.
settings.register_profile("ci", derandomize=True, **slow)
settings.register_profile("thorough", derandomize=False, **slow)
settings.load_profile("ci")

#: Cases of each backend in the property tests, by profile.
EXAMPLES = {
    "ci": {"cpu": 2000, "cuda": 300, "triton": 300},
    "thorough": {"cpu": 10000, "cuda": 10000, "triton": 10000},
}


def device_of(backend: str) -> str:
    return "cuda" if GPU and backend in ("cuda", "triton") else "cpu"


def install_emulation() -> None:
    """Without a GPU the CUDA kernels run on the CPU, under the emulation header."""
    from emulation import EmulatedCUDA

    backends.BACKENDS["cuda"] = EmulatedCUDA()
    backends._ready.cache_clear()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its relatives are filled with NaN: what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def backend(request) -> str:
    """The name of a compiled backend that is ready to run; a test that asks for one that is not, fails."""
    name = request.param
    if name == "cuda" and not GPU:
        install_emulation()
    why = backends.BACKENDS[name].missing()
    if why is not None:
        pytest.fail(f"backend {name} cannot run: {why}")
    return name
