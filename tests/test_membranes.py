"""What the report measures of membranes, and the window of a surrogate."""

import fastsnn
import numpy as np
import pytest
import torch
from fastsnn import surrogates
from fastsnn.report import membranes


class Stack(torch.nn.Module):
    """Two layers with tensors for thresholds, one that draws random numbers, and a readout that never fires."""

    def __init__(self) -> None:
        super().__init__()
        self.first = fastsnn.LIF(decay=0.5, threshold=torch.tensor([0.5, 1.0, 1.5]), steps=3)
        self.second = fastsnn.LIF(decay=0.9, threshold=torch.linspace(0.5, 1, 12).view(1, 3, 2, 2), surrogate=surrogates.Rectangle(0.5))
        self.random = fastsnn.NoisyLIF(0.4)
        self.readout = fastsnn.LI(0.5)

    def forward(self, x):
        return self.readout(self.random(3 * self.second(2 * self.first(x[None])))).mean(0).flatten(1)


def test_measured_membranes_are_those_of_the_network():
    images = torch.rand(10, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2
    model = Stack()
    model.first.eval()
    state = torch.get_rng_state()
    found = membranes.measure(model, images, gamma=0.7, batch_size=4)
    assert torch.equal(state, torch.get_rng_state()) and model.training and not model.first.training
    assert [layer.name for layer in found] == ["first", "second", "random"]
    x = images[None]
    for layer, module, threshold in ((found[0], model.first, model.first.threshold.view(3, 1, 1)), (found[1], model.second, model.second.threshold[:, None])):
        out = module.simulate(x, statistics=("mean", "var", "rate"), keep=("membrane",))
        z = (out.membrane - threshold).double()
        counts, _ = np.histogram(z.float().numpy(), layer.edges)
        np.testing.assert_allclose(layer.density * np.diff(layer.edges) * z.numel(), counts, atol=1.01)  # a value on an edge
        assert layer.inside == (z.abs() < 0.7).double().mean().item()
        assert layer.mean == pytest.approx(z.mean().item(), rel=1e-5) and layer.deviation == pytest.approx(z.std(correction=0).item(), rel=1e-5)
        assert layer.rate == pytest.approx(out.spikes.mean().item(), rel=1e-6)
        assert layer.omega == pytest.approx(fastsnn.defenses.omega(out.statistics.mean, out.statistics.var, 0.7).mean().item(), rel=1e-4)
        x = 2 * out.spikes
    assert (found[0].half_width, found[1].half_width) == (1.0, 0.25) and found[2].half_width == pytest.approx(0.4 * (2 * np.log(2)) ** 0.5)
    assert found[2].rate == membranes.measure(model, images, gamma=0.7, batch_size=4)[2].rate


def test_omega_is_the_share_of_the_drawn_gaussians_in_the_window():
    tally = membranes._Tally(low=-1.0, high=1.0, counts=np.ones(membranes.BINS), total=membranes.BINS)
    for _ in range(2):
        tally.moments(torch.tensor([[0.2, -1.0]]), torch.tensor([[0.3, 2.0]]), torch.zeros(1, 2), 5)
    layer = fastsnn.LIF()
    wanted = fastsnn.defenses.omega(torch.tensor([0.2, -1.0]), torch.tensor([0.3, 2.0])).mean().item()
    drawn = membranes._layer("one", layer, tally, 1.0, wanted)
    assert float((drawn.mixture * np.diff(drawn.edges)).sum()) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("name", surrogates.BY_NAME)
def test_window_of_every_surrogate(name):
    layer = fastsnn.LIF(surrogate=surrogates.BY_NAME[name]())
    derivative, half = membranes.surrogate_of(layer)
    peak = float(derivative(np.zeros(1))[0])
    if half == float("inf"):
        assert float(derivative(np.array([1e6]))[0]) > peak / 2
        return
    before, after = (float(derivative(np.array([z]))[0]) for z in (half * (1 - 1e-4), half * (1 + 1e-4)))
    assert (before > 0 and after == 0) or (before > peak / 2 > after)


@pytest.mark.parametrize(
    "layer, wanted",
    [
        (fastsnn.LIF(surrogate=surrogates.Triangle(2.0)), 2.0),
        (fastsnn.LIF(surrogate=surrogates.Triangle(torch.tensor([1.0, 3.0]))), 2.0),
        (fastsnn.LIF(surrogate=surrogates.Triangle(1.0, relative=True), threshold=0.5), 0.5),
        (fastsnn.LIF(surrogate=surrogates.ATan(2.0)), 1 / np.pi),
    ],
)
def test_window_in_units_of_potential(layer, wanted):
    assert membranes.surrogate_of(layer)[1] == pytest.approx(wanted, rel=1e-6)
