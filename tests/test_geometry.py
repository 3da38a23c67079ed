"""The CUDA kernels' launches: what every device since compute capability 8.0 grants. Nothing is run here."""

import pytest
import torch
from fastsnn import cuda, launch, surrogates
from fastsnn.reference import Dynamics

#: Bytes of shared memory that a block may ask for on the smallest of them (8.6, 8.9, 12.0).
GRANTED = 99 * 1024
SHAPES = [(128, 512), (64, 512, 1, 1), (16, 64, 32, 32), (16, 3, 7, 5), (4, 1000, 2, 2), (2, 1, 5), (100000, 8)]
STATISTICS = [0, launch.MEAN | launch.VARIANCE, launch.MEAN | launch.VARIANCE | launch.RATE, launch.ALL]


class Recorder:
    """A backend that keeps its calls."""

    name, keeps_states = "cuda", True

    def __init__(self) -> None:
        self.calls = []

    def forward(self, call) -> None:
        self.calls.append(call)

    backward = forward


def plans(shape, dtype, steps, statistics, learned, channels_last) -> list[cuda.Plan]:
    """The launches of a forward and a backward pass over tensors without memory."""

    def empty(*sizes, dtype=dtype):
        return torch.empty(*sizes, dtype=dtype, device="meta")

    x = empty(steps, *shape)
    if channels_last and len(shape) > 2:
        x = empty(steps, shape[0], *shape[2:], shape[1]).movedim(-1, 2)
    real = launch.state_dtype(dtype)
    p = empty(1, shape[1], dtype=real) if learned else None
    recorder, dynamics = Recorder(), Dynamics(guard=(0.5, 2))
    found = launch.forward(recorder, x, None, p, p, None, None, steps, dynamics, 0.5, 1.0, statistics=statistics, states=True)
    gradients = launch.Gradients(torch.empty_like(x), None, None, empty(4, steps, shape[1], dtype=torch.float64) if statistics else None)
    launch.backward(
        recorder, gradients, x, None, p, p, None, None, found.states, found.table[0] if statistics else None, steps, dynamics,
        surrogates.Triangle(1.0), "bptt", 0.5, 1.0, (True, False, learned, learned, False), statistics,
    )  # fmt: skip
    forward, backward = recorder.calls
    return [cuda.Planner(forward).forward(), cuda.Planner(backward).backward()]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_launches_ask_for_what_every_device_grants(shape, dtype, channels_last):
    for steps in (1, 4, 16, 32, 50):
        for statistics in STATISTICS:
            for learned in (False, True):
                for plan in plans(shape, dtype, steps, statistics, learned, channels_last):
                    for g in plan.launches:
                        assert g.shared <= GRANTED and g.shared < 2**31, f"{steps} steps, statistics {statistics}: {g.shared} bytes"
                        assert g.threads % 32 == 0 and 32 <= g.threads <= 256 and 1 <= g.blocks < 2**31
