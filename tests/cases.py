"""Cases of the operator drawn by hypothesis, and what has to hold for each of them on every backend."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import torch
from fastsnn import adjoint, lif, surrogates, tables
from fastsnn.functional import NAMED_CHARGES
from torch import Tensor

FORMATS = ("contiguous", "channels_last", "batch_inner", "sliced", "transposed_time", "expanded_time")
VALUES = ("normal", "grid", "mixed", "wild")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call: everything is small and drawn; tensors come from `data_seed`."""

    steps: int
    batch: int
    channels: int
    space: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    charge: str
    inverse: bool
    fire: str
    reset: str
    v_reset: float
    detach_reset: bool
    decay_form: str
    threshold_form: str
    gain: bool
    v0: bool
    constant: bool
    values: str
    statistics: bool
    power: int | None
    membrane: bool
    surrogate: str
    surrogate_form: str
    relative: bool
    adjoint: str
    data_seed: int
    first_step: int
    use: tuple[str, ...] = field(default=())  # the outputs that get a gradient


FORMS = ("number", "scalar", "channel", "neuron", "neuron_steps", "steps")


@st.composite
def cases(draw, largest: int = 400) -> Case:
    steps = draw(st.sampled_from((1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 32, 33, 34, 48, 50)))
    batch, channels = draw(st.integers(1, 9)), draw(st.sampled_from((1, 2, 3, 4, 5, 8, 16, 33)))
    # What most networks are made of has a short way through the kernels: drawn more often than chance would.
    plain = draw(st.integers(0, 3)) == 0
    space = draw(st.sampled_from(((7, 5), (6, 6), (40,), (17, 16)) if plain else ((), (1,), (2,), (3, 3), (5,), (4, 4), (7, 5), (6, 6), (2, 2, 2), (40,), (1, 1))))
    if space == (17, 16):  # wide enough to be met as a stretch of a run
        channels = min(channels, 3)
    while batch > 1 and batch * channels * torch.Size(space).numel() > largest:
        batch -= 1
    fire = "ge" if plain else draw(st.sampled_from(tables.FIRES))
    charge = draw(st.sampled_from(("leak", "leak_input") if plain else NAMED_CHARGES))
    form = st.sampled_from(("number",) if plain else FORMS)
    use = draw(st.sets(st.sampled_from(("spikes", "v", "membrane", "mean", "var", "rate", "guard")), min_size=1))
    power = draw(st.sampled_from((None, None, None, 2) if plain else (None, 0, 1, 2)))
    return Case(
        steps=steps,
        batch=batch,
        channels=channels,
        space=space,
        layout=draw(st.sampled_from(FORMATS)),
        dtype=draw(st.sampled_from((torch.float32, torch.float32, *DTYPES))),
        charge=charge,
        inverse=charge != "leak" and not plain and draw(st.booleans()),
        fire=fire,
        reset="none" if fire == "none" else draw(st.sampled_from(("hard", "soft") if plain else tables.RESETS)),
        v_reset=draw(st.sampled_from((0.0, 0.0, -0.25, 0.5))),
        detach_reset=draw(st.booleans()),
        decay_form=draw(form),
        threshold_form=draw(form),
        gain=not plain and draw(st.booleans()),
        v0=draw(st.booleans()),
        constant=draw(st.integers(0, 3)) == 0,
        values=draw(st.sampled_from(VALUES)),
        statistics=draw(st.booleans()),
        power=power,
        membrane=not plain and draw(st.booleans()),
        surrogate=draw(st.sampled_from(tables.SURROGATES)),
        surrogate_form="number" if plain else draw(st.sampled_from(("number", "number", "channel", "neuron"))),
        relative=not plain and draw(st.integers(0, 3)) == 0,
        adjoint="bptt" if plain else draw(st.sampled_from(("bptt",) * 5 + tables.ADJOINTS)),
        data_seed=draw(st.integers(0, 2**31)),
        first_step=draw(st.sampled_from((0, 1, 1000))),
        use=tuple(sorted(use)),
    )


@dataclass
class Inputs:
    x: Tensor
    v0: Tensor | None
    decay: float | Tensor
    threshold: float | Tensor
    gain: Tensor | None
    surrogate: surrogates.Surrogate
    seed: int

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "v0": self.v0, "decay": self.decay, "threshold": self.threshold, "gain": self.gain}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def laid_out(dense: Tensor, layout: str) -> Tensor:
    """The same values [T, N, C, *S], in another memory layout."""
    dims = list(range(dense.dim()))
    if layout == "channels_last":
        order = [0, 1, *dims[3:], 2]
    elif layout == "batch_inner":
        order = [0, *dims[2:], 1]
    elif layout == "transposed_time":
        order = [1, 0, *dims[2:]]
    elif layout == "expanded_time":
        return dense[:1].expand_as(dense)
    elif layout == "sliced":
        return torch.stack([dense, torch.full_like(dense, float("nan"))], 1).flatten(0, 1)[::2]
    else:
        return dense
    return dense.permute(order).contiguous().permute([order.index(d) for d in dims])


def build(case: Case, device: str = "cpu") -> Inputs:
    """The tensors of a case, on `device`; leaves that require gradients."""
    draw = torch.Generator().manual_seed(case.data_seed)
    real = torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw, dtype=torch.float64)

    shape = (case.batch, case.channels, *case.space)
    x = normal(1 if case.constant else case.steps, *shape) * 0.8 + 0.4
    # On a grid of quarters with decay 0.5, membranes meet the threshold exactly.
    if case.values in ("grid", "mixed"):
        on_grid = (x * 4).round() / 4
        x = on_grid if case.values == "grid" else torch.where(uniform(*x.shape) < 0.5, on_grid, x)
    if case.values == "wild":
        odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e30, -1e30, 1e-40, 0.0, -0.0])
        picked = odd[torch.randint(len(odd), x.shape, generator=draw)]
        x = torch.where(uniform(*x.shape) < 0.1, picked.double(), x)

    def parameter(form: str, low: float, high: float, number: float) -> float | Tensor:
        shapes = {
            "scalar": (),
            "channel": (case.channels,),
            "neuron": (1, *shape[1:]),
            "neuron_steps": (case.steps, *shape[1:]),
            "steps": (case.steps, *(1 for _ in shape[1:])),
        }
        if form == "number":
            return number
        value = low + (high - low) * uniform(*shapes[form])
        return value.to(real).to(device).requires_grad_()

    if case.charge == "leak":
        decay = parameter(case.decay_form, 0.3, 1.0, 0.5)
    elif case.inverse:
        decay = parameter(case.decay_form, 0.2, 0.8, 0.5)
    else:
        decay = parameter(case.decay_form, 1.2, 4.0, 2.0)
    threshold = parameter(case.threshold_form, 0.6, 1.3, 1.0)
    numbers = {"height": (0.3, 1.2), "slope": (0.5, 3.0), "mean": (-0.2, 0.2)}
    kind = surrogates.BY_NAME[case.surrogate]
    values = []
    for name in kind.parameters:
        low, high = numbers.get(name, (0.5, 2.0))
        form = case.surrogate_form
        value = parameter(form, low, high, low + (high - low) * float(uniform(1)))
        values.append(value.detach() if isinstance(value, Tensor) else value)
    x = laid_out(x.to(case.dtype), case.layout).to(device)
    return Inputs(
        x=x.requires_grad_(),
        v0=(normal(*shape) * 0.5).to(real).to(device).requires_grad_() if case.v0 else None,
        decay=decay,
        threshold=threshold,
        gain=(0.5 + uniform(case.steps)).to(real).to(device).requires_grad_() if case.gain else None,
        surrogate=kind(*values, relative=case.relative),
        seed=int(torch.randint(2**31, (1,), generator=draw)),
    )


def call(case: Case, inputs: Inputs, backend: str):
    """`fastsnn.lif` for a case."""
    if case.charge == "leak":
        parameter = {"decay": inputs.decay}
    else:
        parameter = {"inverse_tau" if case.inverse else "tau": inputs.decay}
    statistics = ()
    if case.statistics:
        statistics = ("mean", "var")
        if case.power is not None:
            statistics += (("rate", "guard") if case.fire != "none" else ("guard",))
    return lif(
        inputs.x,
        inputs.v0,
        **parameter,
        gain=inputs.gain,
        threshold=inputs.threshold,
        reset=case.reset,
        v_reset=case.v_reset,
        charge=case.charge,
        fire=case.fire,
        noise=0.4 if case.fire == "gaussian" else 0.0,
        seed=inputs.seed if case.fire == "gaussian" else None,
        first_step=case.first_step,
        surrogate=inputs.surrogate,
        detach_reset=case.detach_reset,
        statistics=statistics,
        guard=(0.3, case.power) if "guard" in statistics else None,
        keep=("membrane",) if case.membrane else (),
        steps=case.steps,
        backend=backend,
    )


def outputs(out) -> dict[str, Tensor]:
    named = {"spikes": out.spikes, "v": out.v, "membrane": out.membrane, **vars(out.statistics)}
    return {name: value for name, value in named.items() if value is not None}


def gradients(case: Case, inputs: Inputs, out, draw_seed: int) -> dict[str, Tensor | None]:
    """Gradients of the leaves, for incoming gradients drawn from a seed (the same for every backend)."""
    draw = torch.Generator().manual_seed(draw_seed)
    total = []
    for name, value in sorted(outputs(out).items()):
        weight = torch.randn(value.shape, generator=draw, dtype=torch.float64).to(value.dtype).to(value.device)
        if name in case.use and not (name == "guard" and case.power == 0):
            total.append((value, weight))
    if not total:
        total = [(out.spikes, torch.ones_like(out.spikes))]
    leaves = inputs.leaves()
    with adjoint(case.adjoint):
        found = torch.autograd.grad([v for v, _ in total], list(leaves.values()), [w for _, w in total], allow_unused=True)
    return dict(zip(leaves, found))


def assert_same_bits(name: str, got: Tensor, want: Tensor) -> None:
    """Equal values, NaN equal to NaN; 0 and -0 count as equal."""
    assert got.shape == want.shape and got.dtype == want.dtype, f"{name}: {got.dtype} {list(got.shape)}, wanted {want.dtype} {list(want.shape)}"
    differ = ~((got == want) | (got.isnan() & want.isnan()))
    if differ.any():
        place = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(f"{name}: {int(differ.sum())} of {differ.numel()} values differ; at {place} {got[place]!r}, wanted {want[place]!r}")


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: Tensor | float) -> None:
    """|got - want| within an absolute tolerance; non-finite values in the same places."""
    assert got.shape == want.shape and got.dtype == want.dtype, f"{name}: {got.dtype} {list(got.shape)}, wanted {want.dtype} {list(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    assert torch.equal(got.isfinite(), want.isfinite()), f"{name}: non-finite values in other places"
    error = torch.where(want.isfinite(), (got - want).abs(), torch.zeros_like(want))
    bad = error > tolerance
    if bad.any():
        place = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(f"{name}: {int(bad.sum())} of {bad.numel()} off by up to {float(error.max()):.3g} (tolerance {tolerance:.3g}); at {place} {got[place]}, wanted {want[place]}")


def assert_agrees(case: Case, backend: str, device: str = "cpu") -> None:
    """Forward bits, statistics and gradients of a backend against the reference."""
    inputs = build(case, device)
    want, got = call(case, inputs, "reference"), call(case, inputs, backend)
    for name in ("spikes", "v", "membrane"):
        if getattr(want, name) is not None:
            assert_same_bits(name, getattr(got, name), getattr(want, name))
    finite = bool(inputs.x.isfinite().all()) and case.values != "wild"
    if not finite:
        return  # gradients of infinities are whatever the order of operations makes of them
    eps = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    h = call_membrane(case, inputs)
    for name, value in vars(want.statistics).items():
        if value is not None:
            # Sums are taken from a shift, one of the membranes: their terms are as large as those get.
            scale = float(h.abs().max()) + 2
            assert_close(name, getattr(got.statistics, name), value, 4 * eps * scale * (scale if name == "var" else 1))
    want_grads, got_grads = gradients(case, inputs, want, case.data_seed + 1), gradients(case, inputs, got, case.data_seed + 1)
    slope = largest_slope(inputs)
    found = [g for g in want_grads.values() if g is not None and g.dim() >= 2]
    largest = max([1.0, *(float(g.abs().max()) for g in found if g.shape == inputs.x.shape or g.shape == inputs.x.shape[1:])])
    # The largest term of a sum: a gradient through the spike and the reset, or to a parameter through the membrane.
    term = largest * (1 + slope * (1 + float(h.abs().max()))) * (1 + float(h.abs().max()))
    for name, value in want_grads.items():
        if value is None or got_grads[name] is None:
            missing = [g for g in (value, got_grads[name]) if g is not None and bool(g.any())]
            assert not missing, f"gradient of {name}: one has none, the other {missing[0]}"
            continue
        summed = value.numel() and (case.steps * inputs.x[0].numel() / value.numel()) or 1
        tolerance = 8 * eps * term * max(1.0, summed) ** 0.5
        if name == "x" and case.dtype in (torch.bfloat16, torch.float16):
            tolerance += float(value.abs().max()) * torch.finfo(case.dtype).eps
        assert_close(f"gradient of {name}", got_grads[name], value, tolerance)
    if backend == "cpu" and list(inputs.leaves()) == ["x"] and case.fire != "gaussian":
        assert_repeats(case, inputs, got, got_grads)


def assert_repeats(case: Case, inputs: Inputs, first, first_grads: dict[str, Tensor | None]) -> None:
    """The second call of a kind, by a plan, and the third, whose backward pass has one too, give the bits of the first."""
    for _ in range(2):
        again = call(case, inputs, "cpu")
        for name, value in outputs(first).items():
            assert_same_bits(f"{name}, again", outputs(again)[name], value)
        grads = gradients(case, inputs, again, case.data_seed + 1)
        assert_same_bits("gradient of x, again", grads["x"], first_grads["x"])


def call_membrane(case: Case, inputs: Inputs) -> Tensor:
    """h of a case, whether or not the case keeps it."""
    from dataclasses import replace

    with torch.no_grad():
        return call(replace(case, membrane=True, statistics=False), inputs, "reference").membrane


def largest_slope(inputs: Inputs) -> float:
    """An upper bound of the surrogate, over z."""
    z = torch.linspace(-1, 1, 201, dtype=torch.float64)
    values = [torch.as_tensor(v, dtype=torch.float64).flatten() for v in inputs.surrogate.values]
    return max(
        float(inputs.surrogate.derivative(z, a, b).abs().max()) for a in values[0].unique()[:8] for b in values[1].unique()[:8]
    )
