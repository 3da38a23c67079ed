"""`fastsnn defenses`: which defenses there are, their options and defaults, and what one of them is."""

from __future__ import annotations

import argparse
import inspect
import math

from . import Parser, guarded

__all__ = ["add"]


def add(commands) -> Parser:
    text = "List the defenses with their options and defaults, or say all about one. They join by +: `fastsnn train --defense mpd-sgr+at`."
    parser = commands.add_parser("defenses", help="list defenses and their options", description=text)
    parser.fill = fill
    return parser


def fill(parser: Parser) -> None:
    parser.add_argument("defense", nargs="?", metavar="NAME", help="say all about this one")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=guarded(run))


def run(arguments: argparse.Namespace) -> int:
    from ..defenses import DEFENSES, defense_options

    if arguments.defense:
        defense_options(arguments.defense)  # an unknown name is answered with the nearest
        lines = options(arguments.defense)
        print("\n".join([inspect.getdoc(DEFENSES[arguments.defense]), *(["", "Options:", *lines] if lines else [])]))
        return 0
    width = max(map(len, DEFENSES))
    for name, defense in DEFENSES.items():
        print(f"{name:{width}}  {sentence(inspect.getdoc(defense))}")
        for line in options(name):
            print(f"{'':{width}}  {line}")
    return 0


def sentence(text: str) -> str:
    """The first sentence of a docstring, in one line."""
    first = " ".join(text.split("\n\n")[0].split())
    return first.split(". ")[0].rstrip(".,:")


def options(name: str) -> list[str]:
    """A line for each option: how it is given on the command line, with its default."""
    from ..defenses import DEFENSES, defense_options
    from ..recipes import by_name, describe, option

    own = {owner[1]: item for item in by_name().values() if (owner := item.metadata["defense"]) and owner[0] == name}
    lines = []
    for key in defense_options(name):
        if key in own:
            lines.append(f"  {option(own[key].name)}: {describe(own[key])}")
        else:
            default = inspect.signature(DEFENSES[name].__init__).parameters[key].default
            lines.append(f"  --defense-options {name}.{key}={written(key, default)}")
    return lines


def written(key: str, default: object) -> str:
    """A default as it is typed; sizes in pixels as fractions of 255. What no option can name stands in brackets."""
    if default is None or default is inspect.Parameter.empty:
        return "... (none)" if default is None else "... (needed)"
    if key in ("eps", "step_size") and isinstance(default, float):
        return f"{default * 255:.6g}/255"
    if isinstance(default, (tuple, list)):
        return ",".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)
