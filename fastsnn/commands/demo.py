"""`fastsnn demo`: networks with and without a defense, trained, attacked and compared in a few minutes on a CPU."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
from pathlib import Path

from . import Parser, guarded, positive

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
    parser.add_argument("--eps", nargs="+", default=["16/255", "32/255"], metavar="X", help="sizes of perturbation in pixels (default: 16/255 32/255)")
    parser.add_argument("--jobs", type=positive, metavar="N", help="networks trained at a time, each in one thread (default: the cores)")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=guarded(run))


def one(job: tuple[str, int, str, int | None, list[str]]) -> str:
    """Train and attack one network in this process; its folder. What was finished before stays."""
    defense, seed, out, epochs, eps = job
    import torch

    from ..__main__ import main
    from ..checkpoints import RUN, read_run
    from ..recipes import Config, load_recipe
    from ..training import train

    torch.set_num_threads(1)
    folder = Path(out) / f"{defense}-seed{seed}"
    settings = {**load_recipe("digits"), "defense": defense, "seed": seed, "out": str(folder), "device": "cpu"}
    config = Config(**settings | ({"epochs": epochs} if epochs else {}))
    there = (folder / RUN).exists()
    if not (there and read_run(folder)["finished"]):
        train(config, resume=there, progress=False)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(["attack", str(folder), "--eps", *eps, "--quiet", "--device", "cpu"])
    if status:
        raise RuntimeError(said.getvalue().strip())
    return str(folder)


def run(arguments: argparse.Namespace) -> int:
    from ..extras import need
    from ..report import report, text_table

    bar = need("tqdm", "train").tqdm
    jobs = [(defense, seed, arguments.out, arguments.epochs, list(arguments.eps)) for seed in range(arguments.seeds) for defense in DEFENSES]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(arguments.jobs or cores, len(jobs))
    print(f"demo: {len(jobs)} networks in {arguments.out}, {workers} at a time", file=sys.stderr, flush=True)
    # Workers start anew: a forked process must not share torch's threads.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for folder in bar(pool.imap(one, jobs), total=len(jobs), unit="network", desc="train and attack", mininterval=0):
            if not sys.stderr.isatty():
                print(f"demo: {folder} is trained and attacked", file=sys.stderr, flush=True)
    folders = [str(Path(out) / f"{defense}-seed{seed}") for defense, seed, out, *_ in sorted(jobs, key=lambda job: (DEFENSES.index(job[0]), job[1]))]
    page = report(folders, Path(arguments.out) / "report")
    print(f"\n{text_table(json.loads((page.parent / 'table.json').read_text(encoding='utf-8'))['rows'])}\n\n{page}")
    return 0
