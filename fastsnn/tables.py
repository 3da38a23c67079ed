"""The tables of the operator, read from `kernels/lif.def`: names in the order of their ids, and the text of each cell.

`kernels/lif.def` is the one place where compiled code takes its rows from; Python takes the names from the same lines,
so a row added there is known here.
"""

from __future__ import annotations

import re
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
if not (KERNELS / "lif.def").exists():  # installed as fastsnn.kernels
    KERNELS = Path(__file__).resolve().parent / "kernels"

#: The ways to carry a gradient through a layer, in the order of their ids (`lif.h`, `enum Adjoint`).
ADJOINTS = ("bptt", "bptr", "spatial", "hart", "rga")


def _cells(text: str) -> list[str]:
    """The arguments of a macro call, split at the commas outside brackets."""
    cells, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            cells.append(text[start:place].strip())
            start = place + 1
    return [*cells, text[start:].strip()]


def read_rows(table: str, file: str = "lif.def") -> list[list[str]]:
    """The rows of one table of a `.def` file, each a list of its cells' text."""
    row = re.compile(rf"^{table}\((.*)\)\s*(?://.*)?$")
    lines = (KERNELS / file).read_text().splitlines()
    return [_cells(match.group(1)) for match in map(row.match, lines) if match]


CHARGES = tuple(row[0] for row in read_rows("CHARGE"))
FIRES = tuple(row[0] for row in read_rows("FIRE"))
RESETS = tuple(row[0] for row in read_rows("RESET"))
SURROGATES = tuple(row[0] for row in read_rows("SURROGATE"))
DELAYED_RESETS = tuple(row[0] for row in read_rows("RESET") if row[1] == "1")
