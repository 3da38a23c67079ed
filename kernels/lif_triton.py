"""The Triton backend: how a call becomes launches of the kernels in `lif_triton_kernels.py` and `lif_triton_straight.py`.

`forward(call)` and `backward(call)` fill the tensors of a `fastsnn.launch.Call`; nothing is read on the host, so both
can be captured in a CUDA graph. Importing this file does not import Triton.
"""

from __future__ import annotations

import functools
import importlib
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from fastsnn.launch import STEPS_IN_REGISTERS, Call
from fastsnn.tables import ADJOINTS, CHARGES, FIRES, read_rows

#: Above STEPS_IN_REGISTERS steps the backward pass starts each segment from a state that the forward pass kept.
keeps_states = True

WARPS = 4
_ITEM_BYTES = (4, 8, 2, 2)  # of x, by the id of its dtype
#: How the leak factor follows from the charge parameter (`straight_kernel`), by the parameter's name.
_LEAK = {"decay": 0, "q": 1, "tau": 2}
_LEAK_OF_CHARGE = dict(zip(range(len(CHARGES)), (_LEAK[row[1]] for row in read_rows("CHARGE"))))
#: Charges whose derivative by the parameter takes the current.
_CHARGES_WITH_X = {i for i, row in enumerate(read_rows("CHARGE")) if re.search(r"\bx\b", row[5])}
_GAUSSIAN = FIRES.index("gaussian")
_COEFFICIENTS = ("g_mean", "g_variance", "g_rate", "g_guard")


@functools.cache
def _kernel(name: str):
    where = "straight" if name == "straight_kernel" else "kernels"
    return getattr(importlib.import_module(f".lif_triton_{where}", __package__), name)


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return importlib.import_module(".lif_triton_rows", __package__).INTERPRETED


def missing() -> str | None:
    """Why Triton cannot run here, and the cure; None where it can."""
    try:
        if interpreted():
            return None
    except ImportError as error:
        return f"triton cannot be imported ({error}). Install it: pip install triton."
    if not torch.cuda.is_available():
        return "Triton finds no CUDA device. Run on a machine with one, or set TRITON_INTERPRET=1 before Python starts to try the kernels in its slow interpreter."
    return None


def refuses(x: Tensor) -> str | None:
    """Why Triton cannot serve this input; None where it can."""
    if interpreted():
        return None
    if x.device.type != "cuda":
        return f"x is on {x.device}; it serves CUDA tensors. Move it: x.cuda()."
    major, minor = _capability(x.device)
    if major < 8:
        return f"{x.device} has compute capability {major}.{minor}; Triton's kernels want 8.0 or newer."
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True)
class Tiling:
    """How a step is cut into tiles [R, W]; the words of `lif_triton_tiles`."""

    columns: int
    rows: int
    period: int
    length: int
    segments: int
    R: int
    W: int

    @property
    def tiles(self) -> int:
        return -(-self.length // self.W)

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.R)

    @property
    def programs(self) -> int:
        return self.blocks * self.segments * self.tiles


@dataclass(frozen=True)
class Plan:
    """One launch: what the numbers of a call, and which of its tensors there are, decide. Tensors come at the launch."""

    kernel: object
    constants: dict[str, object]
    grid: tuple[int]
    warps: int
    tiling: Tiling
    scratch: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _chunk(steps: int, most: int = 8) -> int:
    """Steps loaded at once: the largest divisor of `steps` up to `most`, or all where that is small and the steps few."""
    best = max(k for k in range(1, most + 1) if steps % k == 0)
    return steps if 2 * best < most and steps <= 16 else best


class _Case:
    """The numbers of a call as the planner reads them."""

    def __init__(self, numbers: dict[str, object], names: tuple[str, ...]) -> None:
        self.numbers, self.names = numbers, frozenset(names)
        n = numbers
        self.steps, self.count, self.channels, self.inner = n["steps"], n["count"], n["channels"], n["inner"]
        self.item = _ITEM_BYTES[n["dtype"]]
        self.state = torch.float64 if n["dtype"] == 1 else torch.float32
        self.kind = {name: self._kind(name) for name in ("decay", "threshold", "a", "b")}
        self.period = next((n[f"{name}_columns"] for name, kind in self.kind.items() if kind == 3), self.channels * self.inner)

    def _kind(self, name: str) -> int:
        """0 a number, or a tensor with 1 (1), channels (2) or period (3) columns."""
        if name not in self.names:
            return 0
        columns = self.numbers[f"{name}_columns"]
        if columns == 1:
            return 1
        return 2 if columns == self.channels and self.inner > 1 else 3

    def varies(self, name: str) -> bool:
        return name in self.names and self.numbers[f"{name}_steps"] > 1

    def constant(self) -> bool:
        return self.numbers["x_stride"] == 0 and self.steps > 1

    def wide(self) -> bool:
        return self.count > 2**30

    def tiling(self, per_thread: int, statistics: bool, folds: bool, warps: int = WARPS) -> Tiling:
        """Tiles of `per_thread` neurons a thread. folds: sums over the rows of column tiles are wanted."""
        # In the interpreter a few programs are enough to show what many would, and each costs as much as a large one.
        size = max(256, _power_of_2(self.count) // 4) if interpreted() else 32 * warps * per_thread
        by_neuron = 3 in self.kind.values()
        if not by_neuron and (self.channels == 1 or not (statistics or 2 in self.kind.values())):
            return Tiling(0, 1, self.count, self.count, 1, 1, min(size, _power_of_2(self.count)))
        rows = self.count // self.period
        if not by_neuron and self.inner % 16 == 0:
            W = min(size, _power_of_2(self.inner))
            return Tiling(0, rows, self.period, self.inner, self.channels, min(size // W, _power_of_2(rows)), W)
        # Columns: 32 bytes of x side by side keep memory sectors whole, many rows keep partial sums few.
        narrow = 32 // self.item if folds else size // 8
        R = min(size // min(narrow, size), _power_of_2(rows))
        return Tiling(1, rows, self.period, self.period, 1, R, min(size // R, _power_of_2(self.period)))

    def common(self, tiling: Tiling) -> dict[str, object]:
        """The arguments that all kernels of the recurrence take, and no tensor."""
        n = self.numbers
        order = ()
        if n["fire"] == _GAUSSIAN and n["rank"]:
            order = tuple(part for row in zip(n["order_inner"], n["order_size"], n["order_stride"]) for part in row)
        return {
            "x_stride": n["x_stride"], "v_start": float(n["v_start"]),
            "p_value": float(n["decay_value"]), "theta_value": float(n["threshold_value"]),
            "v_reset": float(n["v_reset"]), "noise": float(n["noise"]), "first_step": n["first_step"], "order": order,
            "count": self.count, "rows": tiling.rows, "period": tiling.period, "length": tiling.length,
            "segments": tiling.segments, "tiles": tiling.tiles, "inner": self.inner, "channels": self.channels,
            "REAL": _language().float64 if self.state == torch.float64 else _language().float32,
            "CHARGE": n["charge"], "FIRE": n["fire"], "RESET": n["reset"], "T": self.steps,
            "CONSTANT": int(self.constant()),
            "P_KIND": self.kind["decay"], "P_STEPS": int(self.varies("decay")),
            "THETA_KIND": self.kind["threshold"], "THETA_STEPS": int(self.varies("threshold")),
            "RANK": len(order) // 3, "COLUMNS": tiling.columns, "R": tiling.R, "W": tiling.W, "WIDE": int(self.wide()),
        }  # fmt: skip

    def slope(self) -> dict[str, object]:
        """The arguments about the surrogate."""
        n = self.numbers
        return {
            "a_value": float(n["a_value"]), "b_value": float(n["b_value"]),
            "SURROGATE": n["surrogate"], "RELATIVE": int(n["relative"]),
            "A_KIND": self.kind["a"], "A_STEPS": int(self.varies("a")),
            "B_KIND": self.kind["b"], "B_STEPS": int(self.varies("b")),
        }  # fmt: skip


@functools.cache
def _language() -> ModuleType:
    return importlib.import_module("triton.language")


def plan_forward(case: _Case) -> list[Plan]:
    """The launches of a forward pass: the recurrence, and with statistics the second stage of their sums."""
    names, n = case.names, case.numbers
    statistics = "mean" in names
    vector = 16 // case.item
    per_thread = vector * 2 if statistics and case.item > 2 else vector
    # Column sums of a 2-byte x need 128 rows to stay below 5 % of x.
    warps = 2 * WARPS if statistics and case.item == 2 and case.tiling(per_thread, True, True).columns else WARPS
    tiling = case.tiling(per_thread, statistics, statistics, warps)
    constants = case.common(tiling) | {
        "delta": float(n.get("delta", 0.0)),
        "POWER": int(n.get("power", 0)),
        "CHUNK": _chunk(case.steps, (2 if tiling.columns or (case.item == 2 and case.steps > 8) else 4) if statistics else (4 if n["fire"] == _GAUSSIAN else 8)),
        "STATE_EVERY": n["state_interval"] if "states" in names else 0,
    }
    plan = Plan(_kernel("forward_kernel"), constants, (tiling.programs,), warps, tiling)
    if not statistics:
        return [plan]
    shape = (tiling.blocks, case.steps, tiling.period if tiling.columns else tiling.segments * tiling.tiles)
    plan.scratch.update(sum_mean=(shape, torch.float64), sum_square=(shape, case.state))
    plan.scratch.update({f"sum_{name}": (shape, case.state) for name in ("rate", "guard") if name in names})
    places, across = case.steps * case.channels, shape[2] // case.channels
    second = {
        "places": places, "parts": tiling.blocks * across, "across": across,
        "rows": tiling.rows, "length": tiling.length, "elements": case.count // case.channels,
        "channels": case.channels, "COLUMNS": tiling.columns, "R": tiling.R, "W": tiling.W,
        "PLACES": 64 if interpreted() else 4, "PARTS": 64,
    }  # fmt: skip
    return [plan, Plan(_kernel("statistics_kernel"), second, (-(-places // second["PLACES"]),), WARPS, tiling)]


def plan_backward(case: _Case) -> list[Plan]:
    """The launch of a backward pass."""
    names, n = case.names, case.numbers
    vector = 16 // case.item
    if n["adjoint"] != ADJOINTS.index("bptt"):
        tiling = case.tiling(vector, False, False)
        constants = case.common(tiling) | case.slope() | {
            "gamma": float(n["rga_gamma"]), "ADJOINT": n["adjoint"], "LEAK": _LEAK_OF_CHARGE[n["charge"]], "CHUNK": _chunk(case.steps),
        }  # fmt: skip
        return [Plan(_kernel("straight_kernel"), constants, (tiling.programs,), WARPS, tiling)]
    length = case.steps if case.steps <= STEPS_IN_REGISTERS else n["state_interval"]
    folds, statistics = len(names & {"g_decay", "g_threshold"}), bool(names & set(_COEFFICIENTS))
    # Registers for one neuron: its h of a segment, x where the way back needs it, a float64 sum per parameter; and in
    # a loop over segments its addresses. 140 a thread leaves room for the rest without spills.
    held = (length + 2 * folds) * (2 if case.item == 8 else 1)
    if "g_gain" in names or ("g_decay" in names and n["charge"] in _CHARGES_WITH_X):
        held += length * case.item // 4
    if n["fire"] == _GAUSSIAN:
        held += 20  # a generator at work
    if length < case.steps:
        held += 18 if folds and statistics and case.tiling(1, True, True).columns else 4
    while vector > 1 and vector * held > 140:
        vector //= 2
    tiling = case.tiling(vector, statistics, bool(folds))
    constants = case.common(tiling) | case.slope() | {
        "delta": float(n.get("delta", 0.0)), "POWER": int(n.get("power", 0)),
        "DETACH": int(n["detach_reset"]), "LENGTH": length, "AHEAD": min((length + 1) // 2, 4 if length * vector <= 64 else 1),
    }  # fmt: skip
    plan = Plan(_kernel("backward_kernel"), constants, (tiling.programs,), WARPS, tiling)
    for name, argument in (("decay", "p"), ("threshold", "theta")):
        by_column = int(tiling.columns and case.kind[name] > 1)
        constants[f"{argument.upper()}_FOLD"] = by_column
        if f"g_{name}" in names:
            parts = (tiling.blocks, tiling.period) if by_column else (tiling.programs,)
            plan.scratch[f"sum_{argument}"] = ((n[f"{name}_steps"], *parts), torch.float64)
    if "g_gain" in names:
        plan.scratch["sum_gain"] = ((case.steps, tiling.programs), torch.float64)
    return [plan]


@functools.lru_cache(maxsize=4096)
def _plans(planner, numbers: tuple[tuple[str, object], ...], names: tuple[str, ...]) -> tuple[_Case, list[Plan]]:
    case = _Case(dict(numbers), names)
    return case, planner(case)


def plans(call: Call) -> tuple[_Case, list[Plan]]:
    """The launches of a call, forward where it asks for spikes."""
    return _plans(plan_forward if "spikes" in call.tensors else plan_backward, tuple(call.numbers.items()), tuple(call.tensors))


#: Kernel arguments that are fields of the call under another name.
_NAMES = {"p": "decay", "theta": "threshold", "v_end": "v", "h_out": "membrane", "g_h_out": "g_membrane"}


def arguments(plan: Plan, tensors: dict[str, Tensor], scratch: dict[str, Tensor]) -> dict[str, object]:
    """All arguments of a kernel by name; a tensor that is not there is None."""
    return {
        name: plan.constants[name] if name in plan.constants else scratch.get(name, tensors.get(_NAMES.get(name, name)))
        for name in plan.kernel.arg_names
    }


def _launch(plan: Plan, tensors: dict[str, Tensor], scratch: dict[str, Tensor], device: torch.device) -> None:
    scratch.update((name, torch.empty(shape, dtype=dtype, device=device)) for name, (shape, dtype) in plan.scratch.items())
    plan.kernel[plan.grid](**arguments(plan, tensors, scratch), num_warps=plan.warps, enable_fp_fusion=False)


def _place(device: torch.device):
    """Where the launches go: the device of the tensors; in the interpreter NumPy's warnings about infinities are off."""
    if interpreted():
        import numpy

        return numpy.errstate(all="ignore")
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def forward(call: Call) -> None:
    """Fill spikes, v and whatever else the call asks for."""
    if call.numbers["count"] == 0:
        for name in ("mean", "variance", "rate", "guard"):
            if name in call.tensors:
                call.tensors[name].fill_(float("nan"))
        return
    scratch: dict[str, Tensor] = {}
    device = call.tensors["x"].device
    with _place(device):
        for plan in plans(call)[1]:
            _launch(plan, call.tensors, scratch, device)


def backward(call: Call) -> None:
    """Fill the gradients that the call asks for."""
    tensors = call.tensors
    if call.numbers["count"] == 0:
        for name in ("g_decay", "g_threshold", "g_gain"):
            if name in tensors:
                tensors[name].zero_()
        return
    if call.numbers["adjoint"] != ADJOINTS.index("bptt"):
        if "g_x" not in tensors:
            return
        if "g_spikes" not in tensors:
            tensors["g_x"].zero_()
            return
    scratch: dict[str, Tensor] = {}
    device = tensors["x"].device
    with _place(device):
        case, (plan,) = plans(call)
        _launch(plan, tensors, scratch, device)
        tiling = plan.tiling
        for name, argument in (("decay", "p"), ("threshold", "theta")):
            if f"sum_{argument}" in scratch:
                _sum(scratch[f"sum_{argument}"], tensors[f"g_{name}"], case.channels, tiling)
        if "sum_gain" in scratch:
            torch.sum(scratch["sum_gain"], 1, out=tensors["g_gain"])


def _sum(parts: Tensor, total: Tensor, channels: int, tiling: Tiling) -> None:
    """Second stage of a parameter's gradient: [steps, columns] from its parts, in a fixed order."""
    steps, columns = total.shape
    if columns == 1:
        torch.sum(parts.view(steps, -1), 1, keepdim=True, out=total)
    elif parts.dim() == 3 and columns == tiling.period:
        torch.sum(parts, 1, out=total)
    else:
        torch.sum(parts.view(steps, tiling.blocks, channels, -1), (1, 3), out=total)
