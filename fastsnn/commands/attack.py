"""`fastsnn attack`: a trained network under a suite of attacks, on the test images."""

from __future__ import annotations

import argparse
import base64
import json
import platform
import sys
import time
from pathlib import Path

from ..recipes import parse_fraction
from . import Parser, guarded, positive

__all__ = ["add", "eps", "pack", "unpack"]


def add(commands) -> Parser:
    text = "Attack a trained network: writes RUN/attacks-SUITE.json, and prints accuracies with their 95 % intervals. An interrupted attack goes on where it was."
    parser = commands.add_parser("attack", help="attack a trained network", description=text)
    parser.fill = fill
    return parser


def fill(parser: Parser) -> None:
    parser.add_argument("folder", metavar="RUN", help="the folder that `fastsnn train` made")
    parser.add_argument("--suite", type=_suite, default="quick", metavar="NAME", help=f"which attacks [{', '.join(_suites())}] (default: quick)")
    parser.add_argument("--eps", nargs="+", type=eps, default=["2/255", "4/255", "8/255"], metavar="X", help="sizes of perturbation in pixels (default: 2/255 4/255 8/255)")
    parser.add_argument("--limit", type=positive, metavar="N", help="so many test images only, each class with its share (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the attacks (default: 0)")
    text = "gradients averaged at each step, each with fresh random numbers of the network (default: 10 where it is random at inference, else 1)"
    parser.add_argument("--eot", type=positive, metavar="N", help=text)
    parser.add_argument("--batch-size", type=positive, default=256, metavar="N", help="images attacked together (default: 256)")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="weights: the best in validation, or the last (default: best)")
    parser.add_argument("--data", metavar="PATH", help="where the data lie now (default: where they were in training)")
    parser.add_argument("--device", default="auto", help="device: cpu, cuda, cuda:1 ...; auto: a GPU where there is one (default: auto)")
    parser.add_argument("--again", action="store_true", help="attack anew, and replace the file of before")
    parser.add_argument("--quiet", action="store_true", help="show no bar")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=guarded(run))


def _suites() -> tuple[str, ...]:
    from ..evaluation import SUITES

    return tuple(SUITES)


def _suite(text: str) -> str:
    from ..adjoints import nearest

    if text not in _suites():
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; wanted one of {', '.join(_suites())}.{nearest(text, _suites())}")
    return text


def eps(text: str) -> str:
    try:
        if not 0 <= parse_fraction(text) <= 1:
            raise ValueError(f"{text}; wanted a size in [0, 1], for example 8/255")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def pack(flags: str) -> str:
    """A text of 0 and 1 as base64 of its bits, the first in the highest bit."""
    return base64.b64encode(int(flags.ljust(-(-len(flags) // 8) * 8, "0"), 2).to_bytes(-(-len(flags) // 8), "big")).decode()


def unpack(text: str, count: int) -> str:
    """The `count` flags that `pack` was given."""
    data = base64.b64decode(text)
    return format(int.from_bytes(data, "big"), f"0{len(data) * 8}b")[:count]


def run(arguments: argparse.Namespace) -> int:
    import torch

    from .. import __version__, checkpoints
    from ..data import load
    from ..evaluation import ResumeError, default_eot, evaluate, make_suite
    from ..recipes import Config
    from ..runs import arithmetic, choose_device

    folder = Path(arguments.folder)
    device = choose_device(Config(device=arguments.device))
    model, trained = checkpoints.load_run(folder, arguments.which, device)
    settings = {
        "suite": arguments.suite,
        "eps": list(arguments.eps),
        "seed": arguments.seed,
        "eot": arguments.eot or default_eot(model),
        "limit": arguments.limit,
        "weights": trained["weights"],
        "data": trained["data"]["fingerprint"],
    }
    path, part = (folder / f"attacks-{arguments.suite}{end}" for end in (".json", ".part"))
    if path.exists() and not arguments.again:
        found = json.loads(path.read_text(encoding="utf-8"))
        differ = [name for name, value in settings.items() if found["settings"].get(name) != value]
        if not differ:
            print(f"{path} holds these results already; --again repeats the attacks.\n\n{table(found)}")
            return 0
        if not part.exists():  # else an interrupted --again, which goes on below
            changes = "; ".join(f"{name} {found['settings'].get(name)} there, {settings[name]} here" for name in differ)
            raise FileExistsError(f"attack: {path} holds results of other settings ({changes}). Add --again to replace them, or move the file away.")

    config = trained["config"]
    data = load(arguments.data or config["data"])
    if data.fingerprint() != trained["data"]["fingerprint"]:
        raise ValueError(f"attack: {arguments.data or config['data']} holds other images than {folder} was trained on. Name the data of the training: --data PATH.")
    if arguments.limit:
        data = data.limited(test=arguments.limit)
    began = time.perf_counter()
    torch.manual_seed(arguments.seed)
    attacks = make_suite(arguments.suite, arguments.eps, arguments.seed, settings["eot"])
    if arguments.again:
        part.unlink(missing_ok=True)  # results of before stay until there are new ones
    bar = not arguments.quiet and sys.stderr.isatty()
    try:
        with arithmetic(config["precision"], device):  # as in training
            found = evaluate(model, data.x_test, data.y_test, attacks, arguments.batch_size, device, progress=bar, resume=part).to_dict()
    except ResumeError:
        raise FileExistsError(f"attack: {part}, left by an interrupted attack, is not of these settings, weights and images. Add --again to begin anew.") from None
    for row in (*found["results"].values(), found["worst"]):
        row["correct"] = pack(row["correct"])
    record = {
        "format": checkpoints.FORMAT,
        "settings": settings,
        "weights": trained["weights"],
        "samples": len(data.y_test),
        "batch_size": arguments.batch_size,
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": config["precision"],
        "versions": {"fastsnn": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "seconds": round(time.perf_counter() - began, 3),
        **found,
    }
    checkpoints.write_json(path, record)
    part.unlink(missing_ok=True)
    print(f"{table(record)}\n\n{path}")
    return 0


def table(record: dict) -> str:
    """Accuracies as text: name, per cent, 95 % interval, share of zero gradients."""
    rows = {**record["results"], "worst of all": record["worst"]}
    width = max(map(len, rows))
    lines = [f"{'':{width}}  accuracy  95 % interval   zero gradients"]
    for name, row in rows.items():
        low, high = row["interval"]
        zero = "" if row.get("zero_gradient") is None else f"{row['zero_gradient']:14.1%}"
        lines.append(f"{name:{width}}  {row['accuracy']:8.2%}  {low:6.2%} - {high:6.2%}  {zero}".rstrip())
    eot = record["settings"].get("eot", 1)
    gradients = f"each gradient the mean of {eot} (EoT)" if eot > 1 else "single gradients (EoT 1)"
    lines.append(f"{record['samples']} test images, seed {record['settings']['seed']}, {gradients}")
    return "\n".join([*lines, *(f"warning: {text}" for text in record["warnings"])])
