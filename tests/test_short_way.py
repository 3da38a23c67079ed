"""The short way of the CPU kernels (`kernels/cpu_plain.h`), row by row: what most networks take is not left to chance.

Numbers for parameters, fire `ge`, a hard or soft reset; with mean and variance or without, in the cache or past it.
"""

import itertools

import pytest
import torch
from cases import Case, assert_agrees
from fastsnn import backends, tables

SURROGATES = itertools.cycle(tables.SURROGATES)


def short(**options) -> Case:
    """A call that goes the short way."""
    defaults = dict(
        steps=5, batch=3, channels=4, space=(7, 5), layout="contiguous", dtype=torch.float32, charge="leak", inverse=False, fire="ge",
        reset="hard", v_reset=0.25, detach_reset=False, decay_form="number", threshold_form="number", gain=False, v0=True, constant=False,
        values="mixed", statistics=False, power=None, membrane=False, surrogate="triangle", surrogate_form="number", relative=False,
        adjoint="bptt", data_seed=1, first_step=0, use=("spikes", "v"),
    )  # fmt: skip
    defaults |= options
    if defaults["statistics"]:
        defaults["use"] = ("mean", "spikes", "v", "var")
    return Case(**defaults)


ROWS = [
    short(charge=charge, reset=reset, detach_reset=detach, statistics=statistics, dtype=dtype, space=space, surrogate=next(SURROGATES))
    for charge, reset, detach, statistics, dtype, space in itertools.product(
        ("leak", "leak_input"), ("hard", "soft"), (False, True), (False, True), (torch.float32, torch.bfloat16), ((7, 5), (18, 17))
    )
]
#: Every surrogate with every reset, as the vectors of the short way compute it and as its last few numbers do.
ROWS += [short(surrogate=name, reset=reset, statistics=True, data_seed=2) for name in tables.SURROGATES for reset in ("hard", "soft")]
ROWS += [short(values="wild", statistics=statistics, data_seed=3) for statistics in (False, True)]
ROWS += [short(v0=False, gain=gain, constant=constant, statistics=True, data_seed=4) for gain in (False, True) for constant in (False, True)]
#: Narrow channels: summed by place, in rounds that fill registers, that do not, and that are longer than a run.
ROWS += [
    short(charge=charge, reset=reset, statistics=True, layout=layout, dtype=dtype, batch=batch, channels=channels, space=space, data_seed=6)
    for charge, reset, (layout, batch, channels, space), dtype in itertools.product(
        ("leak", "leak_input"),
        ("hard", "soft"),
        (("channels_last", 3, 16, (9, 9)), ("channels_last", 2, 3, (31, 31)), ("contiguous", 40, 5, (2, 3)), ("contiguous", 3, 900, (2, 2)), ("contiguous", 7, 130, ())),
        (torch.float32, torch.bfloat16),
    )
]
#: Stretches that begin and end anywhere in a cache line, of results larger than the cache.
LARGE = [
    short(steps=6, batch=2, channels=99, space=(31, 31), reset=reset, statistics=statistics, layout=layout, dtype=dtype, v0=False, data_seed=5)
    for reset, statistics, layout, dtype in (
        ("hard", False, "contiguous", torch.float32),
        ("soft", True, "contiguous", torch.float32),
        ("hard", True, "channels_last", torch.float32),
        ("hard", True, "contiguous", torch.bfloat16),
    )
]


def name_of(case: Case) -> str:
    words = [case.charge, case.reset, case.surrogate, str(case.dtype).removeprefix("torch."), "x".join(map(str, case.space)), case.values]
    words += [case.layout] * (case.layout != "contiguous") + [f"{case.batch}x{case.channels}"] * (case.channels != 4)
    words += [name for name in ("detach_reset", "statistics", "gain", "constant") if getattr(case, name)]
    return "-".join(words)


@pytest.mark.parametrize("case", [*ROWS, *LARGE], ids=name_of)
def test_agrees_with_the_reference(case):
    assert_agrees(case, "cpu", "cpu")


@pytest.mark.parametrize("name", ("baseline", "v3", "v4"))
@pytest.mark.parametrize("case", [ROWS[1], ROWS[-3], LARGE[1], LARGE[2]], ids=name_of)
def test_every_instruction_set(case, name):
    """Each has registers of its own width."""
    cpu = backends.BACKENDS["cpu"]
    before = cpu.instruction_set
    if not cpu.use_instruction_set(name):
        assert before != name  # this machine lacks it
        return
    try:
        assert cpu.instruction_set == name
        assert_agrees(case, "cpu", "cpu")
    finally:
        assert cpu.use_instruction_set(before)
