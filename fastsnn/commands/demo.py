"""`fastsnn demo`: networks with and without a defense, trained, attacked and compared in a few minutes on a CPU."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from . import Parser, attack, guarded, positive

__all__ = ["add"]

DESCRIPTION = (
    "Trains a plain network and one with MPD-SGR on handwritten digits for several seeds, attacks all of them with FGSM and PGD, prints one table "
    "and draws the pictures. An interrupted demo goes on where it was."
)
DEFENSES = ("vanilla", "mpd-sgr")


def add(commands) -> Parser:
    parser = commands.add_parser("demo", help="train, attack and compare two networks, in minutes", description=DESCRIPTION)
    parser.fill = fill
    return parser


def fill(parser: Parser) -> None:
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="where the runs and the report go (default: runs/demo)")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="networks of each kind (default: 3)")
    parser.add_argument("--epochs", type=positive, metavar="N", help="epochs of training (default: the recipe's)")
    parser.add_argument("--eps", nargs="+", type=attack.eps, default=["16/255", "32/255"], metavar="X", help="sizes of perturbation in pixels (default: 16/255 32/255)")
    parser.add_argument("--jobs", type=positive, metavar="N", help="networks trained at a time, each in one thread (default: the cores)")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=guarded(run))


Job = tuple[str, int, str, int | None, list[str]]


def config_of(job: Job):
    """The settings of one network's training."""
    from ..recipes import Config, load_recipe

    defense, seed, out, epochs, _ = job
    settings = {**load_recipe("digits"), "defense": defense, "seed": seed, "out": str(Path(out) / f"{defense}-seed{seed}"), "device": "cpu"}
    return Config(**settings | ({"epochs": epochs} if epochs else {}))


def check(job: Job) -> None:
    """ValueError where the folder holds a network of other settings."""
    from ..checkpoints import RUN, read_run
    from ..runs import check_same

    config = config_of(job)
    folder = config.folder()
    if not (folder / RUN).exists():
        return
    saved = read_run(folder)["config"]
    try:
        check_same(saved, config, folder)
    except ValueError as error:
        raise ValueError(f"demo: {folder} holds a network of other settings. Give the options of then, or another --out. ({error})") from None


def one(job: Job) -> str:
    """Train and attack one network in this process; its folder. What was finished before stays."""
    import torch

    from ..__main__ import parser
    from ..checkpoints import RUN
    from ..training import train

    torch.set_num_threads(1)
    config, eps = config_of(job), job[-1]
    folder = config.folder()
    train(config, resume=(folder / RUN).exists(), progress=False)  # nothing is left to do where it is finished
    arguments = parser().parse_args(["attack", str(folder), "--eps", *eps, "--quiet", "--device", "cpu"])
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            attack.run(arguments)
        except FileExistsError:  # results of other sizes
            arguments.again = True
            attack.run(arguments)
    return str(folder)


def run(arguments: argparse.Namespace) -> int:
    from ..extras import need
    from ..report import report, text_table

    bar = need("tqdm", "train").tqdm
    jobs = [(defense, seed, arguments.out, arguments.epochs, list(arguments.eps)) for seed in range(arguments.seeds) for defense in DEFENSES]
    for job in jobs:
        check(job)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(arguments.jobs or cores, len(jobs))
    print(f"demo: {len(jobs)} networks in {arguments.out}, {workers} at a time", file=sys.stderr, flush=True)
    # Workers start anew: a forked process must not share torch's threads.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for folder in bar(pool.map(one, jobs), total=len(jobs), unit="network", desc="train and attack", mininterval=0):
            if not sys.stderr.isatty():
                print(f"demo: {folder} is trained and attacked", file=sys.stderr, flush=True)
    folders = [str(Path(out) / f"{defense}-seed{seed}") for defense, seed, out, *_ in sorted(jobs, key=lambda job: (DEFENSES.index(job[0]), job[1]))]
    page = report(folders, Path(arguments.out) / "report")
    print(f"\n{text_table(json.loads((page.parent / 'table.json').read_text(encoding='utf-8'))['rows'])}\n\n{page}")
    return 0
