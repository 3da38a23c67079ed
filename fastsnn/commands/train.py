"""`fastsnn train`: options and recipes to a run folder."""

from __future__ import annotations

import argparse
import tomllib
from dataclasses import Field, fields
from pathlib import Path

from ..recipes import GROUPS, Config, by_name, convert, describe, load_recipe, option
from . import Parser, guarded

__all__ = ["add", "settings"]

DESCRIPTION = "Train a network: options, or a recipe and the options that differ from it. Under torchrun, several processes train as one."


def add(commands) -> Parser:
    parser = commands.add_parser("train", help="train a network", description=DESCRIPTION, usage="fastsnn train [--recipe NAME|PATH] [--OPTION VALUE ...] [--resume --out RUN]")
    parser.fill = fill
    return parser


def fill(parser: Parser) -> None:
    parser.add_argument("--recipe", metavar="NAME|PATH", help="read settings from a recipe; `fastsnn recipes` lists the names")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, from its last checkpoint; its settings are read from it")
    parser.add_argument("--quiet", action="store_true", help="show neither a bar nor lines")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    group = parser
    for item in fields(Config):
        if item.name in GROUPS:
            group = parser.add_argument_group(GROUPS[item.name])
        _add_option(group, item)
    parser.set_defaults(run=guarded(run))


def _add_option(group, item: Field) -> None:
    text = describe(item).replace("%", "%%")
    options = dict(dest=item.name, default=argparse.SUPPRESS, help=text)
    if item.type == "bool":
        group.add_argument(option(item.name), action=argparse.BooleanOptionalAction, **options)
    elif item.type == "dict":
        group.add_argument(option(item.name), nargs="+", metavar="NAME=VALUE", type=_pair, **options)
    else:
        metavar = {"int": "N", "float": "X"}.get(item.type, "NAME" if item.metadata["choices"] else "TEXT")
        group.add_argument(option(item.name), metavar="X" if item.metadata["fraction"] else metavar, type=_reader(item), **options)


def _reader(item: Field):
    def read(text: str) -> object:
        try:
            return convert(item, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _pair(text: str) -> tuple[str, object]:
    """`NAME=VALUE`, the value as in TOML, or else text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r}; wanted NAME=VALUE, for example dropout=0.2")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value


def settings(arguments: argparse.Namespace) -> Config:
    """The settings that a command line asks for: a recipe's (a run's, where it is resumed), then the options'."""
    values: dict = load_recipe(arguments.recipe) if arguments.recipe else {}
    for name, item in by_name().items():
        if hasattr(arguments, name):
            given = getattr(arguments, name)
            values[name] = {**values.get(name, {}), **dict(given)} if item.type == "dict" else given
    if arguments.resume:
        from ..checkpoints import read_run

        out = values.get("out") or str(Config(**values).folder())
        values = {**read_run(out)["config"], **values, "out": out}
    return Config(**values)


def run(arguments: argparse.Namespace) -> int:
    config = settings(arguments)
    from ..training import train

    folder = train(config, resume=arguments.resume, progress=not arguments.quiet)
    from ..distributed import is_main

    if is_main():
        print(Path(folder))
    return 0
