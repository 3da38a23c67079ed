"""Every defense under one budget: trained by its recipe, attacked by the ensemble of gradient approximations and by noise, ranked in one table.

    python bench/robustness.py --quick                                                     # handwritten digits, a few minutes
    python bench/robustness.py --data fashion-mnist.npz --train-limit 10000 --epochs 6 --out runs/robustness --json results.json
    python bench/robustness.py --defenses vanilla mpd-sgr tgo --seeds 0 1 2
    python bench/robustness.py --recipes '*-vgg11-cifar10' --data data/cifar-10-python.tar.gz --device cuda --workers 1

A row is a recipe: recipes/cpu-NAME.toml is the row NAME. The budget is the same for all: images, epochs, seeds; all training images are trained
on, and the last weights are attacked, so that nothing is chosen by clean accuracy. Networks that are random at inference are attacked
with the mean of --eot gradients and judged by the mean of --predictions passes.

It may be stopped at any moment, and be killed: the same command goes on, trainings from their last checkpoint, attacks from their last
batch. Other --defenses, --seeds and attacks may be asked of a folder later; other trainings need another --out. OUT/robustness.md, .json and
.png hold what is there after each network, so that an early stop leaves a table.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib.util
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import measure
import torch

if importlib.util.find_spec("fastsnn") is None:  # a checkout that is not installed
    sys.path.insert(0, str(measure.ROOT))

import fastsnn
from fastsnn import checkpoints, recipes
from fastsnn.adjoints import nearest
from fastsnn.attacks import ENSEMBLE, EXTENDED, parse_eps

import robustness_job as jobs
import robustness_table as tables

QUICK = {"defenses": ["vanilla", "at", "mpd-sgr"], "seeds": [0], "epochs": 2, "limit": 40, "eot": 2, "predictions": 2}
#: Gradient approximations of the ensembles, by name: how many.
MEMBERS = {"extended": len(EXTENDED), "ensemble": len(ENSEMBLE)}
#: Errors of a training or an evaluation that are told in the table, while the others go on.
EXPECTED = (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError)


def rows_of(pattern: str) -> dict[str, str]:
    """Recipe by name of the row, which stands at the star of the pattern."""
    before, _, after = pattern.partition("*")
    found = fnmatch.filter(recipes.names(), pattern)
    return {name[len(before) : len(name) - len(after)]: name for name in found}


def stands_alone(recipe: str) -> bool:
    """Whether a recipe trains a spiking network from nothing: others are no row unless asked for."""
    values = tomllib.loads(recipes.find(recipe).read_text(encoding="utf-8"))
    return "model" in values and values.get("neuron") != "relu" and not values.get("init")


def plan(options) -> list[jobs.Job]:
    """All networks, seed by seed: an early stop leaves every defense with one."""
    known = rows_of(options.recipes)
    names = options.defenses or [name for name, recipe in known.items() if stands_alone(recipe)]
    for name in names:
        if name not in known:
            raise ValueError(f"--defenses: {name!r} is unknown; wanted some of {', '.join(known)}.{nearest(name, tuple(known))}")
    shared = {name: getattr(options, name) for name in ("data", "epochs", "train_limit", "batch_size", "train_eps", "device", "eps", "noise", "limit", "members", "eot", "predictions")}
    shared["out"] = str(options.out)
    return [jobs.Job(name, known[name], seed, **shared) for seed in dict.fromkeys(options.seeds) for name in dict.fromkeys(names)]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within this block no other such process works in the folder; a killed one lets go."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # not a POSIX system
            pass
        except OSError:
            raise ValueError(f"--out {folder}: another process works there. Wait for it, or name another folder.") from None
        yield


class Results:
    """What is there: rows as they come, and why others failed; written after each."""

    def __init__(self, options, planned: Sequence[jobs.Job]) -> None:
        self.options, self.planned = options, planned
        self.rows: dict[tuple[str, int], dict] = {}
        self.failed: dict[str, str] = {}

    def budget(self) -> list[str]:
        """What every network was given, as lines of text."""
        options, rows = self.options, list(self.rows.values())
        if not rows:
            return ["Nothing is measured yet."]
        config, data = rows[0]["config"], rows[0]["data"]
        epochs, sizes = sorted({row["config"]["epochs"] for row in rows}), sorted({row["config"]["batch_size"] for row in rows})
        steps = sorted({row["config"]["steps"] for row in rows})

        def some(values: list) -> str:
            return " or ".join(map(str, values))

        spent = [row["training"]["seconds"] for row in rows if row["training"]["seconds"] is not None]
        longest = f"; the dearest training took {max(spent):.0f}" if spent else ""
        random = f"; random networks: EoT {options.eot}, each prediction the mean of {options.predictions} passes" if any(row["random"] for row in rows) else ""
        clock = "CPU seconds" if rows[0]["training"]["clock"] == "CPU" else "seconds"
        return [
            f"Budget: {config['model']} {config['model_options'].get('widths', '')}".rstrip() + f", T = {some(steps)}, {data['name']}, {data['train']:,} training images, "
            f"{some(epochs)} epochs, batches of {some(sizes)}, seeds {', '.join(map(str, sorted({row['seed'] for row in rows})))}; last weights.",
            f"Attacks: FGSM and PGD-7 at {options.eps}, alone and through {MEMBERS[options.members]} gradient approximations, noise of {options.noise:g}, {rows[0]['test_images']} test images{random}.",
            f"{len(rows)} of {len(self.planned)} networks, one thread each: {sum(spent):.0f} {clock} of training{longest}, "
            f"{sum(row['seconds_of_evaluation'] for row in rows):.0f} CPU seconds of evaluation.",
        ]  # fmt: skip

    def text(self) -> str:
        found = tables.summarise(list(self.rows.values()))
        text = tables.markdown(found, self.budget(), self.failed)
        if self.options.paper and (beside := tables.printed(found, self.options.paper, parse_eps(self.options.eps))):
            text += f"\n\n{beside}"
        return text

    def to_dict(self) -> dict:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.options).items() if key not in ("job", "json", "plot", "paper", "out")}
        return {
            "machine": measure.machine(), "versions": measure.versions() | {"fastsnn": fastsnn.__version__}, "commit": measure.commit(), "settings": settings,
            "budget": self.budget(), "summaries": [asdict(one) for one in tables.summarise(list(self.rows.values()))], "failed": self.failed,
            "rows": [{key: value for key, value in row.items() if key != "config"} for row in self.rows.values()],
        }  # fmt: skip

    def write(self, plot: bool = False) -> None:
        out = self.options.out
        checkpoints.write(out / "robustness.md", f"{self.text()}\n".encode())
        content = f"{json.dumps(self.to_dict(), indent=1)}\n".encode()
        for path in filter(None, (out / "robustness.json", self.options.json)):
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoints.write(path, content)
        if plot and self.rows:
            drawn = tables.picture(tables.summarise(list(self.rows.values())), f"Clean accuracy against the worst case at {self.options.eps}")
            for path in filter(None, (out / "robustness.png", self.options.plot)):
                path.parent.mkdir(parents=True, exist_ok=True)
                checkpoints.write(path, drawn)


class Clock:
    """The time left: of networks of a defense that was seen before its own time, of others the mean."""

    def __init__(self, workers: int) -> None:
        self.workers, self.seen = workers, {}

    def add(self, name: str, seconds: float) -> None:
        self.seen.setdefault(name, []).append(seconds)

    def left(self, names: Sequence[str]) -> str:
        if not self.seen:
            return ""
        means = {name: sum(values) / len(values) for name, values in self.seen.items()}
        mean = sum(means.values()) / len(means)
        seconds = sum(means.get(name, mean) for name in names) / self.workers
        return f", about {seconds:.0f} s left" if seconds < 90 else f", about {seconds / 60:.0f} min left"


def start(job: jobs.Job) -> subprocess.Popen:
    """A process of one thread for one network; what it says is in the network's folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [sys.executable, str(Path(__file__).resolve()), "--job", job.to_json(), str(os.getpid())]
    with open(job.folder / "said.txt", "ab") as said:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment)


def one(job: jobs.Job, parent: int) -> int:
    """What a worker does. The reason of an expected failure is left for the one that reads."""
    torch.set_num_threads(1)
    jobs.die_with(parent)
    reason = job.folder / "failed.json"
    reason.unlink(missing_ok=True)
    try:
        jobs.run(job)
    except EXPECTED as error:
        checkpoints.write_json(reason, {"reason": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def take(results: Results, job: jobs.Job, status: int) -> None:
    """What a worker has left."""
    if status == 0:
        results.rows[job.name, job.seed] = json.loads(job.row.read_text(encoding="utf-8"))
        return
    reason = job.folder / "failed.json"
    told = json.loads(reason.read_text())["reason"] if reason.exists() else f"ended with status {status}; {job.folder / 'said.txt'} says more"
    results.failed[f"{job.name}, seed {job.seed}"] = told


def work(options, planned: list[jobs.Job], results: Results) -> None:
    """Everything that is not there yet, --workers processes at a time."""
    waiting = []
    for job in planned:
        try:
            row = jobs.read_row(job)
        except (OSError, ValueError) as error:
            results.failed[f"{job.name}, seed {job.seed}"] = str(error)
            continue
        if row is None:
            waiting.append(job)
        else:
            results.rows[job.name, job.seed] = row
    clock, running, done = Clock(options.workers), {}, len(results.rows)
    say(options, f"{len(planned)} networks, {done} of them there already, {options.workers} at a time; the table grows in {options.out / 'robustness.md'}")
    try:
        while waiting or running:
            while waiting and len(running) < options.workers:
                job = waiting.pop(0)
                running[start(job)] = job, time.monotonic()
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                job, began = running.pop(process)
                take(results, job, process.returncode)
                clock.add(job.name, time.monotonic() - began)
                done += 1
                left = clock.left([job.name for job in waiting] + [job.name for job, _ in running.values()])
                say(options, f"{done} of {len(planned)}: {told(results, job)}{left}")
                results.write()
    finally:
        for process in running:
            process.kill()  # they go on from their checkpoints
        for process in running:
            process.wait()


def told(results: Results, job: jobs.Job) -> str:
    row = results.rows.get((job.name, job.seed))
    if row is None:
        return f"{job.name}, seed {job.seed}: {results.failed.get(f'{job.name}, seed {job.seed}', 'nothing')}"
    shares = {key: row["correct"][key].count("1") / row["test_images"] for key in ("clean", "pgd7", "worst")}
    return f"{job.name}, seed {job.seed}: clean {shares['clean']:.1%}, PGD-7 {shares['pgd7']:.1%}, worst case {shares['worst']:.1%}"


def say(options, text: str) -> None:
    if not options.quiet:
        print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--defenses", nargs="+", metavar="NAME", help="rows (default: every recipe of the pattern that trains a spiking network from nothing)")
    add("--recipes", default="cpu-*", metavar="PATTERN", help="recipes whose names fit are the rows, named by what stands at the star (default cpu-*)")
    add("--seeds", nargs="+", type=int, default=[0, 1], metavar="N", help="a network for each (default 0 1)")
    add("--data", metavar="PATH", help="as in `fastsnn train` (default: the recipes')")
    add("--epochs", type=int, metavar="N", help="of each training (default: the recipes')")
    add("--train-limit", type=int, metavar="N", help="training images (default: the recipes', all)")
    add("--batch-size", type=int, metavar="N", help="of each training (default: the recipes')")
    add("--train-eps", metavar="X", help="radius of every defense that has one (default: the recipes')")
    add("--eps", default="8/255", metavar="X", help="size of the attacks in pixels (default 8/255)")
    add("--noise", type=float, default=0.1, metavar="X", help="standard deviation of gaussian, half width of uniform noise, in pixels (default 0.1)")
    add("--limit", type=int, default=500, metavar="N", help="test images, each class with its share (default 500)")
    text = "gradient approximations of the ensembles: the 19 of robust conversion, or also those made for spiking networks, whose search takes most of the time (default extended)"
    add("--members", choices=("ensemble", "extended"), default="extended", help=text)
    add("--eot", type=int, default=3, metavar="N", help="gradients averaged for networks that are random at inference (default 3)")
    add("--predictions", type=int, default=3, metavar="N", help="passes whose mean judges random networks (default 3)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, metavar="N", help="processes of one thread (default: one for each core)")
    add("--device", default="cpu", help="cpu, cuda (default cpu)")
    add("--out", type=Path, default=Path("runs/robustness"), metavar="FOLDER", help="networks and results (default runs/robustness)")
    add("--json", type=Path, metavar="FILE", help="a copy of every number")
    add("--plot", type=Path, metavar="FILE", help="a copy of the picture")
    add("--paper", type=Path, metavar="FILE", help="a JSON of figures that papers print, to stand beside")
    add("--table", action="store_true", help="train and attack nothing: print what is there")
    add("--quick", action="store_true", help="three defenses, one seed, two epochs, 40 test images")
    add("--quiet", action="store_true", help="say nothing on the way")
    add("--job", nargs=2, help=argparse.SUPPRESS)
    return found


def settle(top: argparse.ArgumentParser, options: argparse.Namespace, quick: dict, counts: Sequence[str]) -> None:
    """With --quick its values, where nothing else was given; an error where one of `counts` is below 1."""
    if options.quick:
        for name, value in quick.items():
            if getattr(options, name) == top.get_default(name):
                setattr(options, name, value)
    for name in counts:
        if getattr(options, name) is not None and getattr(options, name) < 1:
            top.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; wanted a whole number >= 1")
    measure.check_outputs(top, options.json, options.plot)


def checked(arguments: list[str] | None) -> argparse.Namespace:
    top = parser()
    options = top.parse_args(arguments)
    settle(top, options, QUICK, ("epochs", "train_limit", "batch_size", "limit", "eot", "predictions", "workers"))
    if options.recipes.count("*") != 1:
        top.error(f"--recipes is {options.recipes!r}; wanted a pattern with one star, such as 'cpu-*'")
    if options.paper and not options.paper.is_file():
        top.error(f"--paper: there is no file {options.paper}")
    for name in ("eps", "train_eps"):
        try:
            if getattr(options, name) is not None and parse_eps(getattr(options, name)) > 1:
                raise ValueError(f"{getattr(options, name)} is more than 1, the range of a pixel; wanted a size such as 8/255")
        except ValueError as error:
            top.error(f"--{name.replace('_', '-')}: {error}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = checked(arguments)
    if options.job:
        return one(jobs.Job(**json.loads(options.job[0])), int(options.job[1]))
    try:
        planned = plan(options)
        results = Results(options, planned)
        with alone(options.out):
            if options.table:
                for job in planned:
                    if (row := jobs.read_row(job)) is not None:
                        results.rows[job.name, job.seed] = row
            else:
                work(options, planned, results)
            results.write(plot=True)
    except ValueError as error:
        print(f"robustness: {error}", file=sys.stderr)
        return 2
    print(results.text())
    return 1 if results.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
