"""What all tests share: profiles of hypothesis, poisoned memory, one fixture for each backend."""

import os

import interpreter
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores; what is about threads sets its own number

from fastsnn import backends
from hypothesis import HealthCheck, Phase, settings

slow = dict(
    deadline=None,
    print_blob=True,
    # A test's fixtures hold for all of its examples: they choose a backend and poison memory.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
# ci draws the same cases every time; thorough draws new ones.
settings.register_profile("ci", derandomize=True, **slow)
settings.register_profile("thorough", derandomize=False, **slow)
# A mutation only has to be seen, not explained.
settings.register_profile("mutations", derandomize=True, phases=(Phase.generate,), **slow)
settings.load_profile("ci")

#: Every backend that is compiled, and so compared with the reference.
COMPILED = ("cpu", "triton", "cuda")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-library", metavar="PATH", help="run the CPU backend from this library (tests/run_sanitized.py, tests/mutations.py)")
    parser.addoption("--cases", type=int, metavar="N", help="cases of each backend in the property tests; default by the profile")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thorough: takes minutes or much memory; runs with --hypothesis-profile=thorough only")
    library = config.getoption("--cpu-library")
    if library:
        backends.BACKENDS["cpu"] = backends.CPU(library)
        backends._ready.cache_clear()


def thorough() -> bool:
    return settings.get_current_profile_name() == "thorough"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not thorough():
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def how_it_runs(name: str) -> str:
    """What stands behind a backend's name on this machine, or why nothing does."""
    if name == "cuda" and not GPU:
        try:
            from emulation import compiler
        except ImportError as error:
            return f"cannot run: {error}"
        return f"emulated on the CPU, built by {compiler()}" if compiler() else "cannot run: no C++ compiler for the emulation"
    backend = backends.BACKENDS[name]
    if (why := backend.missing()) is not None:
        return f"cannot run: {why}"
    if name == "triton" and not GPU:
        return "in Triton's interpreter"
    if name == "cpu":
        return f"real, instruction set {backend.instruction_set}, {torch.get_num_threads()} threads"
    return f"real, on {torch.cuda.get_device_name()}"


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"backend {name}: {how_it_runs(name)}" for name in COMPILED]


def device_of(backend: str) -> str:
    return "cuda" if GPU and backend in ("cuda", "triton") else "cpu"


_emulated: list = []


def emulated_cuda():
    """The CUDA kernels on the CPU, under the emulation header; compiled at the first call."""
    if not _emulated:
        from emulation import EmulatedCUDA

        class Emulated(EmulatedCUDA):
            name = "cuda"

            def missing(self) -> None:
                return None

            def refuses(self, x: torch.Tensor) -> None:
                return None

        _emulated.append(Emulated())
    return _emulated[0]


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
def backend(request, monkeypatch) -> str:
    """The name of a backend that is ready to run; a test that asks for one that is not, fails."""
    name = request.param
    if name == "cuda" and not GPU:
        monkeypatch.setitem(backends.BACKENDS, "cuda", emulated_cuda())
    why = backends.BACKENDS[name].missing()
    if why is not None:
        pytest.fail(f"backend {name} cannot run: {why}")
    if name == "triton" and not GPU:
        interpreter.remember_types()
    return name
