"""`fastsnn train`: options and recipes to a run folder."""

from __future__ import annotations

import argparse
import tomllib
from dataclasses import Field, fields
from pathlib import Path

from ..recipes import GROUPS, Config, by_name, convert, describe, inherited, load_recipe, option
from . import Parser, guarded

__all__ = ["add", "settings"]

#: What `--ann` stands for. Statistics of channels alone: what conversion carries over has no factor of a threshold.
ANN: dict = {"neuron": "relu", "neuron_options": {}, "surrogate": "auto", "norm": "bn", "norm_options": {}}

DESCRIPTION = "Train a network: options, or a recipe and the options that differ from it. Under torchrun, several processes train as one."


def add(commands) -> Parser:
    parser = commands.add_parser("train", help="train a network", description=DESCRIPTION, usage="fastsnn train [--recipe NAME|PATH] [--OPTION VALUE ...] [--resume --out RUN]")
    parser.fill = fill
    return parser


def fill(parser: Parser) -> None:
    parser.add_argument("--recipe", metavar="NAME|PATH", help="read settings from a recipe; `fastsnn recipes` lists the names")
    text = "train the network's ANN twin, ReLU in place of neurons and norm bn, for `fastsnn convert`; short for --neuron relu --norm bn over a recipe's neurons"
    parser.add_argument("--ann", action="store_true", help=text)
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
    """The settings that a command line asks for: those of the run that it starts from (network and data), a recipe's (a run's, where it is
    resumed), then the options'."""
    values: dict = load_recipe(arguments.recipe) if arguments.recipe else {}
    start = getattr(arguments, "init", values.get("init"))
    if start and not arguments.resume:
        before = inherited(start)
        model = getattr(arguments, "model", values.get("model", before["model"]))
        if model != before["model"]:
            raise ValueError(f"train: the model is {model}, and init is {start}, a {before['model']}. Leave --model out, or start from another run (the recipe may say which).")
        tables = {name: {**before[name], **value} for name, value in values.items() if isinstance(value, dict) and before.get(name)}
        values = {**before, **values, **tables}
    if arguments.ann:
        values |= _as_ann(arguments, values)
    for name, item in by_name().items():
        if hasattr(arguments, name):
            given = getattr(arguments, name)
            values[name] = {**values.get(name, {}), **dict(given)} if item.type == "dict" else given
    if arguments.resume:
        from ..checkpoints import read_run

        out = values.get("out") or str(Config(**values).folder())
        values = {**read_run(out)["config"], **values, "out": out}
    return Config(**values)


def _as_ann(arguments: argparse.Namespace, values: dict) -> dict:
    """What `--ann` puts in place of a recipe's neurons; its norm stays where it is one of the ANN's own."""
    for name in ("neuron", "neuron_options", "surrogate"):
        if hasattr(arguments, name) and getattr(arguments, name) != ANN[name]:
            raise ValueError(f"train: --ann trains ReLU in place of neurons, and {option(name)} is given too. Drop one of them.")
    kept = ("norm", "norm_options") if values.get("norm") in ("bn", "none") or hasattr(arguments, "norm") else ()
    return {name: value for name, value in ANN.items() if name not in kept}


def run(arguments: argparse.Namespace) -> int:
    config = settings(arguments)
    from ..training import train

    folder = train(config, resume=arguments.resume, progress=not arguments.quiet)
    from ..distributed import is_main

    if is_main():
        print(Path(folder))
    return 0
