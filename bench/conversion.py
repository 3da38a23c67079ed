"""Robust conversion from end to end under one budget: ANNs trained by their recipes, converted, fine-tuned, and attacked by the ensemble.

    python bench/conversion.py --quick                                             # handwritten digits, two minutes
    python bench/conversion.py --data fashion-mnist.npz --train-limit 10000 --epochs 8 --json results.json --plot steps.png
    python bench/conversion.py --recipes cpu-ann-trades --beside runs/vanilla runs/rat

A row is a recipe of an ANN, trained naturally or against attacks. Each goes the same way: training, `fastsnn convert`, also without fine-tuning
and for a large T, `fastsnn train --init` by the recipe of fine-tuning, `fastsnn attack`; then `fastsnn coding` of all of them. These are the
commands that anybody would give, and what they write and say is in OUT.

It may be stopped at any moment: the same command goes on, trainings from their last checkpoint, attacks from their last batch. A folder is for
one budget; another needs another --out. OUT/conversion.md and .json hold the table.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import measure
import torch

if importlib.util.find_spec("fastsnn") is None:  # a checkout that is not installed
    sys.path.insert(0, str(measure.ROOT))

import fastsnn
from fastsnn import checkpoints, recipes
from fastsnn.__main__ import main as command
from fastsnn.adjoints import nearest
from fastsnn.attacks import parse_eps
from fastsnn.coding import pictures
from fastsnn.evaluation import SUITES

from robustness import alone, settle
from robustness_job import die_with

QUICK = {"epochs": 2, "tune_epochs": 1, "limit": 40, "batches": 2, "calibration_steps": 20, "plain_steps": 16, "suite": "quick"}
#: Steps at which accuracy is asked, as far as the plain conversion goes.
CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: The networks of a chain: the ANN, converted, converted for a large T without fine-tuning, fine-tuned.
PARTS = ("ann", "snn", "plain", "robust")
#: What decides a row; the rest of the options say where and how it runs.
BUDGET = ("data", "train_limit", "epochs", "tune", "tune_epochs", "steps", "plain_steps", "calibration_steps", "batches", "suite", "eps", "limit", "seed")


@dataclass(frozen=True)
class Chain:
    """What becomes of one ANN. name: its row; recipe: of the ANN; budget: the options of BUDGET by name; out: the folder of all of them."""

    name: str
    recipe: str
    budget: dict
    out: str
    device: str

    def run(self, part: str) -> Path:
        return Path(self.out) / f"{self.name}-{part}"

    @property
    def attacked(self) -> Path:
        return self.run("robust") / f"attacks-{self.budget['suite']}.json"

    def stages(self) -> list[tuple[str, Path, list[str]]]:
        """What is done, what is there when it is done, and the words of the command."""
        given, device = self.budget, ["--device", self.device]
        ann, snn, plain, robust = map(self.run, PARTS)

        def options(*names: str, **renamed: str) -> list[str]:
            wanted = {name: name for name in names} | renamed
            return [word for name, key in wanted.items() if given[key] is not None for word in (f"--{name.replace('_', '-')}", str(given[key]))]

        def training(folder: Path, words: list[str]) -> list[str]:
            begun = (folder / checkpoints.RUN).exists()
            return ["train", "--out", str(folder), *device, *(["--resume"] if begun else words)]

        calibrated = options("batches", "seed")
        curve = ["--curve-steps", *(str(steps) for steps in CURVE if 4 <= steps <= given["plain_steps"])]
        return [
            ("training the ANN", ann, training(ann, ["--recipe", self.recipe, "--ann", *options("data", "train_limit", "epochs", "seed")])),
            ("converting", snn, ["convert", str(ann), "--out", str(snn), *options("steps", "limit", "calibration_steps"), *calibrated, *device]),
            ("converting for a large T", plain, ["convert", str(ann), "--method", "plain", "--out", str(plain), *options("limit", steps="plain_steps"), *calibrated, *curve, *device]),
            ("fine-tuning", robust, training(robust, ["--recipe", given["tune"], "--init", str(snn), *options("seed", epochs="tune_epochs")])),
            ("attacking", self.attacked, ["attack", str(robust), *options("suite", "eps", "limit", "seed"), "--quiet", *device]),
        ]  # fmt: skip


def is_done(path: Path) -> bool:
    """Whether a stage has left what it makes: results, or a run that is finished."""
    if path.suffix == ".json":
        return path.exists()
    return (path / checkpoints.RUN).exists() and bool(checkpoints.read_run(path).get("finished"))


def follow(chain: Chain, parent: int) -> int:
    """What a worker does: the stages that are left, in this process. The exit status of the first that fails."""
    die_with(parent)
    if chain.device == "cpu":
        torch.set_num_threads(1)
    told = Path(chain.out) / f"{chain.name}.json"
    for what, made, words in chain.stages():
        if is_done(made):
            continue
        checkpoints.write_json(told, {"stage": what})
        print(f"$ fastsnn {' '.join(words)}", flush=True)
        if status := command(words):
            return status
    checkpoints.write_json(told, {"stage": "done"})
    return 0


def chains(options) -> list[Chain]:
    known = recipes.names()
    for name in (*options.recipes, options.tune):
        if name not in known:
            raise ValueError(f"{name!r} is no recipe; `fastsnn recipes` lists them.{nearest(name, known)}")
    budget = {name: getattr(options, name) for name in BUDGET}
    return [Chain(recipe, recipe, budget, str(options.out), options.device) for recipe in dict.fromkeys(options.recipes)]


def same_budget(out: Path, budget: dict) -> None:
    """A ValueError where the folder was begun with another budget."""
    kept = out / "budget.json"
    if not kept.exists():
        checkpoints.write_json(kept, budget)
        return
    before = json.loads(kept.read_text(encoding="utf-8"))
    other = [f"--{name.replace('_', '-')} {before.get(name)}" for name in budget if before.get(name) != budget[name]]
    if other:
        raise ValueError(f"--out {out} was begun with {', '.join(other)}; give the same, or another folder.")


def start(chain: Chain) -> subprocess.Popen:
    threads = {} if chain.device != "cpu" else {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    given = json.dumps({"name": chain.name, "recipe": chain.recipe, "budget": chain.budget, "out": chain.out, "device": chain.device})
    with open(Path(chain.out) / f"{chain.name}.log", "ab") as said:
        words = [sys.executable, str(Path(__file__).resolve()), "--chain", given, str(os.getpid())]
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=os.environ | threads)


def work(options, planned: list[Chain]) -> list[str]:
    """Every chain, --workers processes at a time; why some have failed."""
    waiting, running, stages, failed = list(planned), {}, {}, []
    began = time.monotonic()

    def say(text: str) -> None:
        if not options.quiet:
            print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)

    try:
        while waiting or running:
            while waiting and len(running) < options.workers:
                chain = waiting.pop(0)
                running[start(chain)] = chain
            time.sleep(0.1)
            for process, chain in list(running.items()):
                with contextlib.suppress(OSError, ValueError):
                    stage = json.loads((options.out / f"{chain.name}.json").read_text(encoding="utf-8"))["stage"]
                    if process.poll() is None and stage not in ("done", stages.get(chain.name)):
                        stages[chain.name] = stage
                        say(f"{chain.name}: {stage}")
                if process.poll() is None:
                    continue
                del running[process]
                if process.returncode:
                    failed.append(f"{chain.name}: {stages.get(chain.name, 'starting')} ended with status {process.returncode}; {options.out / f'{chain.name}.log'} says more")
                say(failed[-1] if process.returncode else f"{chain.name}: done")
    finally:
        for process in running:
            process.kill()  # they go on from their checkpoints
        for process in running:
            process.wait()
    return failed


def coded(options, planned: list[Chain]) -> dict[str, dict]:
    """What `fastsnn coding` finds of all networks."""
    folder = options.out / "coding"
    runs = [str(chain.run(part)) for chain in planned for part in PARTS] + [str(path) for path in options.beside]
    steps = [str(steps) for steps in CURVE if steps <= options.plain_steps]
    with open(options.out / "coding.log", "a", encoding="utf-8") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        if status := command(["coding", *runs, "--steps", *steps, "--limit", str(options.limit), "--out", str(folder), "--device", options.device]):
            raise ValueError(f"fastsnn coding ended with status {status}; {options.out / 'coding.log'} says more")
    found = json.loads((folder / "coding.json").read_text(encoding="utf-8"))
    return {name: {key: value for key, value in row.items() if key != "run"} for name, row in found.items()}


def collect(options, planned: list[Chain]) -> dict:
    """Every number, of folders that are there."""
    coding = coded(options, planned)
    rows = []
    for chain in planned:
        converted = checkpoints.read_run(chain.run("snn"))["converted"]["report"]
        attacked = json.loads(chain.attacked.read_text(encoding="utf-8"))
        seconds = {part: checkpoints.read_run(chain.run(part))["seconds"] for part in ("ann", "robust")}
        rows.append({
            "name": chain.name, "accuracy": {part: coding[chain.run(part).name]["accuracy"] for part in PARTS},
            "attacks": {name: {key: row[key] for key in ("accuracy", "interval", "total")} for name, row in attacked["results"].items()},
            "worst": {key: attacked["worst"][key] for key in ("accuracy", "interval", "total")}, "warnings": attacked["warnings"],
            "thresholds": {layer["name"]: layer["threshold"] for layer in converted["layers"]},
            "seconds_per_batch": converted["seconds_per_batch"], "peak_memory": converted["peak_memory"],
            "seconds": seconds | {"attack": attacked["seconds"]},
        })  # fmt: skip
    settings = {name: getattr(options, name) for name in BUDGET} | {"recipes": options.recipes}
    if settings["data"] is not None:
        settings["data"] = Path(settings["data"]).name
    data = checkpoints.read_run(planned[0].run("ann"))["data"]
    return {
        "machine": measure.machine(), "versions": measure.versions() | {"fastsnn": fastsnn.__version__}, "commit": measure.commit(),
        "settings": settings, "data": {key: data[key] for key in ("name", "classes", "train", "validation", "test")}, "rows": rows, "coding": coding,
    }  # fmt: skip


def share(value: float) -> str:
    return f"{100 * value:.1f}"


def attack_of(row: dict, name: str) -> str:
    """Accuracy under the attack of that name alone."""
    for key, found in row["attacks"].items():
        if key.rpartition("-")[0] == name:
            return share(found["accuracy"])
    return "–"


def markdown(data: dict) -> str:
    settings, coding = data["settings"], data["coding"]
    T, large = settings["steps"], settings["plain_steps"]
    tuning = "the recipe's" if settings["tune_epochs"] is None else settings["tune_epochs"]
    training = "the recipe's" if settings["epochs"] is None else settings["epochs"]
    lines = [
        f"Budget: {data['data']['name']}, {data['data']['train']:,} training images and {data['data']['validation']:,} that choose the epoch, {training} epochs of the ANN, {tuning} of fine-tuning, "
        f"{data['rows'][0]['worst']['total']} test images, suite {settings['suite']} at {settings['eps']}, seed {settings['seed']}.",
        "",
        f"| ANN of | ANN | converted, T = {T} | fine-tuned, T = {T} | FGSM | PGD-7 | worst case | no fine-tuning, T = {large} |",
        f"| --- |{' ---: |' * 7}",
    ]
    for row in data["rows"]:
        accuracy, (low, high) = row["accuracy"], row["worst"]["interval"]
        cells = [
            f"`{row['name']}`", *(share(accuracy[part]) for part in ("ann", "snn", "robust")), attack_of(row, "fgsm"), attack_of(row, "pgd7"),
            f"{share(row['worst']['accuracy'])} ({share(low)} to {share(high)})", share(accuracy["plain"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| network | T | accuracy | spikes per image | per neuron | active neurons |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, row in coding.items():
        if (spent := row["coding"]) is not None:
            lines.append(f"| {name} | {row['steps']} | {share(row['accuracy'])} | {spent['spikes']:,.0f} | {spent['per_neuron']:.2f} | {share(spent['active'])} |")
    lines += ["", "Accuracies and active neurons in per cent; worst case: right on the clean image and under every attack of the suite, sample by sample, with 95 % (Wilson) in brackets."]
    doubtful = [f"- {row['name']}: {text}" for row in data["rows"] for text in row["warnings"]]
    if doubtful:
        lines += ["", "Signs that there is less robustness than the figures show:", *doubtful]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--recipes", nargs="+", default=["cpu-ann", "cpu-ann-at"], metavar="NAME", help="of the ANNs, a row each (default cpu-ann cpu-ann-at)")
    add("--tune", default="cpu-convert-tune", metavar="NAME", help="recipe of the fine-tuning (default cpu-convert-tune)")
    add("--data", metavar="PATH", help="as in `fastsnn train` (default: the recipes')")
    add("--train-limit", type=int, metavar="N", help="training images (default: all)")
    add("--epochs", type=int, metavar="N", help="of the ANNs (default: the recipes')")
    add("--tune-epochs", type=int, metavar="N", help="of the fine-tuning (default: its recipe's)")
    add("--steps", type=int, default=8, metavar="T", help="time steps of the fine-tuned networks (default 8)")
    add("--plain-steps", type=int, default=64, metavar="T", help="time steps of those without fine-tuning (default 64)")
    add("--calibration-steps", type=int, default=100, metavar="T", help="steps of the calibration (default 100)")
    add("--batches", type=int, default=10, metavar="N", help="mini-batches of the calibration (default 10)")
    add("--suite", choices=list(SUITES), default="ensemble", help="of attacks, as in `fastsnn attack` (default ensemble)")
    add("--eps", default="8/255", metavar="X", help="size of the attacks in pixels (default 8/255)")
    add("--limit", type=int, default=500, metavar="N", help="test images, each class with its share (default 500)")
    add("--seed", type=int, default=0, metavar="N", help="of everything (default 0)")
    add("--beside", nargs="+", type=Path, default=[], metavar="RUN", help="runs of other networks on the same data, for the second table")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, metavar="N", help="processes, on a CPU of one thread each (default: one for each core)")
    add("--device", default="cpu", help="cpu, cuda (default cpu)")
    add("--out", type=Path, default=Path("runs/conversion"), metavar="FOLDER", help="networks and results (default runs/conversion)")
    add("--json", type=Path, metavar="FILE", help="a copy of every number")
    add("--plot", type=Path, metavar="FILE", help="a copy of the picture of accuracy against T")
    add("--quick", action="store_true", help="two epochs, one of fine-tuning, the quick suite on 40 test images")
    add("--quiet", action="store_true", help="say nothing on the way")
    add("--chain", nargs=2, help=argparse.SUPPRESS)
    return found


def checked(arguments: list[str] | None) -> argparse.Namespace:
    top = parser()
    options = top.parse_args(arguments)
    settle(top, options, QUICK, ("train_limit", "epochs", "tune_epochs", "steps", "plain_steps", "calibration_steps", "batches", "limit", "workers"))
    try:
        parse_eps(options.eps)
    except ValueError as error:
        top.error(f"--eps: {error}")
    names = [path.resolve().name for path in options.beside]
    own = [f"{recipe}-{part}" for recipe in options.recipes for part in PARTS]
    if twice := [name for name in names if (names + own).count(name) > 1]:
        top.error(f"--beside: several networks are called {twice[0]}; wanted folders of other names, since the table goes by them")
    for path in options.beside:
        if not (path / checkpoints.RUN).exists():
            top.error(f"--beside: {path} is not the folder of a run; wanted one that `fastsnn train` made")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = checked(arguments)
    if options.chain:
        return follow(Chain(**json.loads(options.chain[0])), int(options.chain[1]))
    try:
        planned = chains(options)
        with alone(options.out):
            same_budget(options.out, planned[0].budget)
            failed = work(options, planned)
            finished = [chain for chain in planned if is_done(chain.attacked)]
            if finished:
                data = collect(options, finished)
                text = markdown(data)
                checkpoints.write(options.out / "conversion.md", f"{text}\n".encode())
                content = f"{json.dumps(data, indent=1)}\n".encode()
                for path in filter(None, (options.out / "conversion.json", options.json)):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    checkpoints.write(path, content)
                if options.plot:
                    options.plot.parent.mkdir(parents=True, exist_ok=True)
                    own = [chain.run(part).name for chain in finished for part in PARTS]
                    drawn = pictures({name: data["coding"][name] for name in own}, 1 / data["data"]["classes"])
                    checkpoints.write(options.plot, drawn["steps.png"])
                print(text)
    except ValueError as error:
        print(f"conversion: {error}", file=sys.stderr)
        return 2
    for reason in failed:
        print(f"conversion: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
