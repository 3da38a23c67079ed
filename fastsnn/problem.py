"""`struct Problem` of `kernels/problem.def`, as a ctypes structure: one list of fields for C++, CUDA and Python."""

from __future__ import annotations

import ctypes

from .tables import KERNELS

_TYPES = {"i64": ctypes.c_int64, "f64": ctypes.c_double, "ptr": ctypes.c_void_p}


def _fields() -> list[tuple[str, type]]:
    fields = []
    for line in (KERNELS / "problem.def").read_text().splitlines():
        if line.startswith(("FIELD(", "ARRAY(")):
            kind, name, *length = line[line.index("(") + 1 : line.index(")")].replace(" ", "").split(",")
            fields.append((name, _TYPES[kind] * int(length[0]) if length else _TYPES[kind]))
    return fields


class Problem(ctypes.Structure):
    """One call of a compiled kernel. `bytes(problem)` is the struct as the kernel reads it."""

    _fields_ = _fields()
