"""`fastsnn coding`: what runs of spiking networks get for the steps and spikes that they spend."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import Parser, guarded, positive

__all__ = ["add"]

DESCRIPTION = (
    "Accuracy on test images against the number of steps T, and coding efficiency (spikes per image and neuron, share of active neurons, histogram of spikes), of one "
    "run or several side by side: prints tables, and writes coding.json, steps.png and spikes.png."
)


def add(commands) -> Parser:
    parser = commands.add_parser("coding", help="accuracy against steps, and spikes spent", description=DESCRIPTION)
    parser.fill = fill
    return parser


def fill(parser: Parser) -> None:
    parser.add_argument("folders", nargs="+", metavar="RUN", help="folders that `fastsnn train` or `fastsnn convert` made; ANNs are drawn as levels")
    parser.add_argument("--out", default="coding", metavar="DIR", help="where the tables and pictures go (default: coding)")
    text = "numbers of steps T, tried with the weights and thresholds that are there (default: each network's own only)"
    parser.add_argument("--steps", nargs="+", type=positive, default=[], metavar="N", help=text)
    parser.add_argument("--limit", type=positive, metavar="N", help="so many test images only, each class with its share (default: all)")
    parser.add_argument("--images", type=positive, default=512, metavar="N", help="so many of them for the spikes (default: 512)")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="weights: the best in validation, or the last (default: best)")
    parser.add_argument("--data", metavar="PATH", help="where the data lie now (default: where each run found them)")
    parser.add_argument("--device", default="auto", help="device: cpu, cuda, cuda:1 ...; auto: a GPU where there is one (default: auto)")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=guarded(run))


def run(arguments: argparse.Namespace) -> int:
    from .. import checkpoints, data
    from ..coding import measure, pictures, text_table
    from ..recipes import Config
    from ..runs import arithmetic, choose_device
    from .attack import _named

    device, sets, found = choose_device(Config(device=arguments.device)), {}, {}
    for name, folder in _named(arguments.folders).items():
        model, trained = checkpoints.load_run(folder, arguments.which, device)
        spec = arguments.data or trained["config"]["data"]
        if spec not in sets:
            sets[spec] = data.load(spec)
        if sets[spec].fingerprint() != trained["data"]["fingerprint"]:
            raise ValueError(f"coding: {spec} holds other images than {folder} was trained on. Give those of then: --data PATH.")
        test = sets[spec].limited(test=arguments.limit)
        with arithmetic(trained["config"]["precision"], device):
            found[name] = measure(model, test.x_test, test.y_test, arguments.steps, arguments.images, device=device)
        found[name] |= {"run": str(folder), "weights": trained["weights"], "data": trained["data"]["fingerprint"]}
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures(found, 1 / test.classes).items():
        checkpoints.write(out / name, picture)
    checkpoints.write_json(out / "coding.json", found)
    print(f"{text_table(found)}\n\n{out}")
    return 0
