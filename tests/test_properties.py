"""Every backend against the reference, over drawn cases: all rows of all tables, all forms of all arguments."""

import hypothesis
import pytest
import torch
from cases import assert_agrees, assert_close, assert_same_bits, cases
from conftest import GPU, device_of, thorough
from hypothesis import given, settings

import fastsnn

#: Cases of each backend, by profile. On a GPU nearly every case of Triton is some seconds of compilation.
EXAMPLES = {
    False: {"cpu": 2000, "cuda": 300, "triton": 96 if GPU else 300},
    True: {"cpu": 10000, "cuda": 10000, "triton": 10000},
}
#: Parts of equal work, to be run side by side.
PARTS = {"cpu": 8, "cuda": 8 if GPU else 4, "triton": 8}
#: Neuron-steps of the largest case, where the kernels are not compiled but interpreted.
LARGEST = {"cpu": 10**9, "cuda": 10**9, "triton": 10**9 if GPU else 2500}


def neuron_steps(case) -> int:
    return case.steps * case.batch * case.channels * torch.Size(case.space).numel()


@pytest.mark.parametrize(
    ("backend", "part"), [(name, part) for name, parts in PARTS.items() for part in range(parts)], indirect=["backend"]
)
def test_agrees_with_the_reference(backend, part, pytestconfig):
    wanted = pytestconfig.getoption("--cases") or EXAMPLES[thorough()][backend]
    wanted = -(-wanted // PARTS[backend])
    ran = 0

    @settings(max_examples=wanted)
    @given(case=cases().filter(lambda case: neuron_steps(case) <= LARGEST[backend]))
    def agrees(case):
        nonlocal ran
        ran += 1
        assert_agrees(case, backend, device_of(backend))

    if not thorough():
        # Each part draws other cases, and every run the same.
        agrees = hypothesis.seed(part)(agrees)
    agrees()
    assert ran >= wanted, f"hypothesis stopped after {ran} of {wanted} cases"


@pytest.mark.thorough
def test_more_elements_than_an_int32_counts():
    """About 14 GB: x, spikes and the gradient of x, each of more than 2^31 elements in bfloat16."""
    steps, count, edge = 8, (1 << 28) + 1000, 1000
    torch.utils.deterministic.fill_uninitialized_memory = False  # the tensors are filled below; a second pass takes minutes
    x = torch.empty(steps, count, dtype=torch.bfloat16)
    # A prime period: no two of the steps and blocks look alike.
    pattern = (torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) + 0.4).bfloat16()
    flat = x.view(-1)
    for start in range(0, flat.numel(), len(pattern)):
        part = flat[start : start + len(pattern)]
        part.copy_(pattern[: len(part)])
    x.requires_grad_()
    out = fastsnn.lif(x, decay=0.9, backend="cpu")
    # The spikes themselves serve as the gradient that comes in: no fourth tensor of that size.
    (grad,) = torch.autograd.grad(out.spikes, x, out.spikes.detach())
    for place in (slice(0, edge), slice(count - edge, count)):
        ends = x[:, place].detach().clone().requires_grad_()
        want = fastsnn.lif(ends, decay=0.9, backend="reference")
        assert_same_bits("spikes", out.spikes[:, place], want.spikes)
        assert_same_bits("v", out.v[place], want.v)
        (want_grad,) = torch.autograd.grad(want.spikes, ends, want.spikes.detach())
        assert_close("gradient of x", grad[:, place], want_grad, 2 * torch.finfo(torch.bfloat16).eps * float(want_grad.abs().max()))
