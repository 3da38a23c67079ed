"""`fastsnn recipes`: which recipes there are, and what one of them says."""

from __future__ import annotations

import argparse

from ..recipes import about, find, names, option_table
from . import Parser, guarded

__all__ = ["add"]


def add(commands) -> Parser:
    parser = commands.add_parser("recipes", help="list recipes for `fastsnn train`", description="List the recipes, or print one: a start for your own.")
    parser.fill = fill
    return parser


def fill(parser: Parser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="NAME|PATH", help="print this recipe")
    parser.add_argument("--keys", action="store_true", help="print every key that a recipe can have, as a Markdown table")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=guarded(run))


def run(arguments: argparse.Namespace) -> int:
    if arguments.keys:
        print(option_table())
    elif arguments.recipe:
        print(find(arguments.recipe).read_text(encoding="utf-8"), end="")
    else:
        known = names()
        width = max(map(len, known), default=0)
        for name in known:
            print(f"{name:{width}}  {about(name)}")
    return 0
