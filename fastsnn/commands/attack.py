"""`fastsnn attack`: a trained network under a suite of attacks, on the test images, and under common corruptions of them.

All of it is dealt to the processes of torchrun and resumed batch by batch, corruptions too; the activity of spiking layers is measured by
every process for itself.
"""

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

__all__ = ["add", "eps", "pack", "severity", "unpack"]

#: What a file of before says where it lacks a setting.
DEFAULTS = {"norm": "linf", "predictions": 1, "transfer_from": [], "curve_steps": []}
#: What `--severities` is by default.
SEVERITIES = (1, 2, 3, 4, 5)


def add(commands) -> Parser:
    text = (
        "Attack a trained network: writes RUN/attacks-SUITE.json, and prints accuracies with their 95 % intervals, the worst case per sample, and checks of the "
        "evaluation itself. An interrupted attack goes on where it was. Under torchrun, several processes share the work."
    )
    parser = commands.add_parser("attack", help="attack a trained network", description=text)
    parser.fill = fill
    return parser


def fill(parser: Parser) -> None:
    parser.add_argument("folder", metavar="RUN", help="the folder that `fastsnn train` made")
    parser.add_argument("--suite", type=_suite, default="quick", metavar="NAME", help=f"which attacks [{', '.join(_suites())}] (default: quick)")
    parser.add_argument("--eps", nargs="+", type=eps, default=["2/255", "4/255", "8/255"], metavar="X", help="sizes of perturbation in pixels (default: 2/255 4/255 8/255)")
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf", help="how a perturbation is measured; attacks that cannot keep to it are left out (default: linf)")
    parser.add_argument("--steps", type=positive, metavar="N", help="steps of the iterative attacks (default: the suite's)")
    parser.add_argument("--restarts", type=positive, metavar="N", help="random starts of the attacks that have one (default: 1)")
    parser.add_argument("--curve-steps", nargs="+", type=positive, default=[], metavar="N", help="also PGD at the largest size with each of these numbers of steps, for a curve")
    parser.add_argument("--transfer-from", nargs="+", default=[], metavar="RUN", help="other runs: also PGD crafted on each of them and tried on this one")
    parser.add_argument("--compare", metavar="RUN", help="an undefended twin: the same attacks on it, for comparison")
    text = "also accuracy under common corruptions: CIFAR-10-C's or CIFAR-100-C's folder, or `generated`, from the test images; a file of before gets them beside its attacks"
    parser.add_argument("--corruptions", metavar="FOLDER", help=text)
    text = "how strong the corruptions are, each 1 to 5 (default: all five)"
    parser.add_argument("--severities", nargs="+", type=severity, metavar="N", help=text)
    parser.add_argument("--limit", type=positive, metavar="N", help="so many test images only, each class with its share (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the attacks (default: 0)")
    text = "gradients averaged at each step, each with fresh random numbers of the network (default: 10 where it is random at inference, else 1)"
    parser.add_argument("--eot", type=positive, metavar="N", help=text)
    parser.add_argument("--predictions", type=positive, default=1, metavar="N", help="passes whose mean decides, for networks that are random at inference (default: 1)")
    text = "so many test images for the attacks that the checks run themselves, and for the activity of spiking layers; 0: neither (default: 64)"
    parser.add_argument("--check-images", type=_count, default=64, metavar="N", help=text)
    parser.add_argument("--batch-size", type=positive, default=256, metavar="N", help="images attacked together (default: 256)")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="weights: the best in validation, or the last (default: best)")
    parser.add_argument("--data", metavar="PATH", help="where the data lie now (default: where they were in training)")
    parser.add_argument("--device", default="auto", help="device: cpu, cuda, cuda:1 ...; auto: a GPU where there is one (default: auto)")
    parser.add_argument("--again", action="store_true", help="attack anew, and replace the file of before")
    parser.add_argument("--quiet", action="store_true", help="show neither a bar nor lines")
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


def _count(text: str) -> int:
    return 0 if text.isdecimal() and int(text) == 0 else positive(text)


def eps(text: str) -> str:
    try:
        if not 0 <= parse_fraction(text) <= 1:
            raise ValueError(f"{text}; wanted a size in [0, 1], for example 8/255")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def severity(text: str) -> int:
    if text not in map(str, SEVERITIES):
        raise argparse.ArgumentTypeError(f"{text!r}; wanted a severity from 1 to 5")
    return int(text)


def pack(flags: str) -> str:
    """A text of 0 and 1 as base64 of its bits, the first in the highest bit."""
    return base64.b64encode(int(flags.ljust(-(-len(flags) // 8) * 8, "0"), 2).to_bytes(-(-len(flags) // 8), "big")).decode()


def unpack(text: str, count: int) -> str:
    """The `count` flags that `pack` was given."""
    data = base64.b64decode(text)
    return format(int.from_bytes(data, "big"), f"0{len(data) * 8}b")[:count]


def run(arguments: argparse.Namespace) -> int:
    import torch

    from .. import distributed
    from ..recipes import Config
    from ..runs import choose_device

    if arguments.severities and not arguments.corruptions:
        raise ValueError("attack: --severities is given without --corruptions; wanted what they are severities of: --corruptions FOLDER, or --corruptions generated.")
    device = choose_device(Config(device=arguments.device))
    rank, ranks, local = distributed.start(device)
    try:
        if ranks > 1 and device.type == "cuda":
            device = torch.device("cuda", local)
        twin = Job(arguments.compare, argparse.Namespace(**{**vars(arguments), "compare": None, "corruptions": None}), device) if arguments.compare else None
        job = Job(arguments.folder, arguments, device, twin)
        record = job.record()
        if record is not None and job.lacks_corruptions(record):
            record = job.add_corruptions(record)
            job.write(record)
            said = f"{table(record)}\n\n{job.path}"
        elif record is not None:
            said = f"{job.path} holds these results already; --again repeats the attacks.\n\n{table(record)}"
        else:
            if twin is not None and (theirs := twin.record()) is None:
                theirs = twin.attack()
                twin.write(theirs)
            record = job.attack()
            if twin is not None:
                record |= compared(record, theirs, arguments.compare)
            job.write(record)
            said = f"{table(record)}\n\n{job.path}"
        if rank == 0:
            print(said)
    finally:
        distributed.finish()
    return 0


class Job:
    """The attacks on one run: its network, what was asked for, and its files."""

    def __init__(self, folder: str, arguments: argparse.Namespace, device, twin: Job | None = None) -> None:
        from .. import checkpoints, corruptions
        from ..evaluation import default_eot

        self.folder, self.arguments, self.device = Path(folder), arguments, device
        self.model, self.trained = checkpoints.load_run(self.folder, arguments.which, device)
        self.sources = {name: checkpoints.load_run(path, arguments.which, device) for name, path in _named(arguments.transfer_from).items()}
        self.settings = {
            "suite": arguments.suite,
            "eps": list(arguments.eps),
            "norm": arguments.norm,
            "steps": arguments.steps,
            "restarts": arguments.restarts,
            "curve_steps": list(arguments.curve_steps),
            "seed": arguments.seed,
            "eot": arguments.eot or default_eot(self.model),
            "predictions": arguments.predictions,
            "limit": arguments.limit,
            "check_images": arguments.check_images,
            "weights": self.trained["weights"],
            "data": self.trained["data"]["fingerprint"],
            "transfer_from": [{"run": name, "weights": source["weights"]} for name, (_, source) in self.sources.items()],
            "compare": None if twin is None else {"run": twin.folder.name, "weights": twin.trained["weights"]},
            "corruptions": None,
        }
        if arguments.corruptions:
            generate, severities = arguments.corruptions == corruptions.GENERATE, sorted(set(arguments.severities or SEVERITIES))
            source = arguments.corruptions if generate else Path(arguments.corruptions).resolve().name
            self.settings["corruptions"] = {"source": source, "severities": severities, "fingerprint": corruptions.fingerprint(arguments.corruptions)}
        # What only adds corruptions to a file of before is resumed from a file of its own.
        self.path, self.part, self.added = (self.folder / f"attacks-{arguments.suite}{end}" for end in (".json", ".part", "+corruptions.part"))
        if twin is not None and twin.settings["data"] != self.settings["data"]:
            raise ValueError(f"attack: {twin.folder} was trained on other data than {self.folder}; wanted a twin that is compared on the same images.")

    def record(self) -> dict | None:
        """The results of before, where they are what is asked for, but for corruptions that they lack; None where attacks are to be run."""
        if not self.path.exists() or self.arguments.again:
            return None
        found = json.loads(self.path.read_text(encoding="utf-8"))
        differ = [name for name, value in self.settings.items() if found["settings"].get(name, DEFAULTS.get(name)) != value]
        if self.settings["corruptions"] is None and "corruptions" in differ:
            differ.remove("corruptions")  # there is more than is asked for
        if not differ or (differ == ["corruptions"] and self.lacks_corruptions(found) and not self.part.exists()):
            return found
        if not self.part.exists():  # else an interrupted --again, which goes on
            changes = "; ".join(f"{name} {found['settings'].get(name)} there, {self.settings[name]} here" for name in differ)
            raise FileExistsError(f"attack: {self.path} holds results of other settings ({changes}). Add --again to replace them, or move the file away.")
        return None

    def attack(self) -> dict:
        """Run the attacks, going on where they were interrupted; every process of several gets the record."""
        import torch

        from .. import __version__, checkpoints, distributed
        from ..evaluation import make_suite

        arguments, config, data = self.arguments, self.trained["config"], self.images()
        began = time.perf_counter()
        torch.manual_seed(arguments.seed)
        asked = {name: self.settings[name] for name in ("eps", "seed", "eot", "norm", "steps", "restarts", "curve_steps")}
        sources = {name: model for name, (model, _) in self.sources.items()}
        suite = make_suite(arguments.suite, **asked, classes=self.trained["data"].get("classes"), transfer=sources)
        if distributed.is_main() and arguments.again:
            for part in (self.part, self.added, *(other for one in (self.part, self.added) for other in self.folder.glob(f"{one.name}.*"))):
                part.unlink(missing_ok=True)  # results of before stay until there are new ones
        if distributed.ranks() > 1:
            torch.distributed.barrier()
        found = self.evaluated(data, suite, self.part, arguments.check_images)
        for row in (*found["results"].values(), found["worst"]):
            row["correct"] = pack(row["correct"])
        return {
            "format": checkpoints.FORMAT,
            "settings": self.settings,
            "weights": self.trained["weights"],
            "samples": len(data.y_test),
            "batch_size": arguments.batch_size,
            "device": f"{self.device} ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "processes": distributed.ranks(),
            "precision": config["precision"],
            "versions": {"fastsnn": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "seconds": round(time.perf_counter() - began, 3),
            **found,
        }

    def images(self):
        """The data of the training; so many test images as are asked for."""
        from ..data import load

        where = self.arguments.data or self.trained["config"]["data"]
        data = load(where)
        if data.fingerprint() != self.trained["data"]["fingerprint"]:
            raise ValueError(f"attack: {where} holds other images than {self.folder} was trained on. Name the data of the training: --data PATH.")
        return data.limited(test=self.arguments.limit) if self.arguments.limit else data

    def evaluated(self, data, suite, part: Path, check_images: int) -> dict:
        """What the network makes of the images, of the attacks of a suite, and of the corruptions that are asked for."""
        from ..corruptions import sets
        from ..evaluation import ResumeError, evaluate
        from ..runs import arithmetic

        arguments, changed, x, y = self.arguments, [], data.x_test, data.y_test
        if arguments.corruptions:
            severities, classes = self.settings["corruptions"]["severities"], self.trained["data"].get("classes")
            changed = sets(arguments.corruptions, x, y, severities, arguments.seed, arguments.limit, classes)
        progress = False if arguments.quiet else True if sys.stderr.isatty() else "lines"
        options = {"predictions": arguments.predictions, "check_images": check_images, "seed": arguments.seed, "shard": True, "corruptions": changed}
        try:
            with arithmetic(self.trained["config"]["precision"], self.device):  # as in training
                found = evaluate(self.model, x, y, suite, arguments.batch_size, self.device, progress, part, **options).to_dict()
        except ResumeError:
            raise FileExistsError(f"attack: {part}, left by an interrupted attack, is not of these settings, weights and images. Add --again to begin anew.") from None
        if changed:
            found["corruptions"] = self.settings["corruptions"] | found["corruptions"]
        return found

    def lacks_corruptions(self, record: dict) -> bool:
        """Whether corruptions are asked for, and a file of before has none."""
        return self.settings["corruptions"] is not None and record["settings"].get("corruptions") is None

    def add_corruptions(self, record: dict) -> dict:
        """A record of before with the corruptions, its attacks as they were."""
        found = self.evaluated(self.images(), {}, self.added, 0)["corruptions"]
        settings = record["settings"] | {"corruptions": self.settings["corruptions"]}
        return {**record, "settings": settings, "corruptions": found}

    def write(self, record: dict) -> None:
        from .. import checkpoints, distributed

        if distributed.is_main():
            checkpoints.write_json(self.path, record)
            for part in (self.part, self.added):
                part.unlink(missing_ok=True)


def _named(paths: list[str]) -> dict[str, str]:
    """Runs by the name of their folder; by the whole path where two have the same."""
    names = [Path(path).resolve().name for path in paths]
    return {name if names.count(name) == 1 else str(path): path for name, path in zip(names, paths)}


def compared(record: dict, twin: dict, folder: str) -> dict:
    """What a record says of an undefended twin, and the check that the same attacks do break that one."""
    kept = {name: {"accuracy": row["accuracy"], "interval": row["interval"]} for name, row in twin["results"].items()}
    about = {"run": Path(folder).name, "weights": twin["weights"], "results": kept, "worst_cases": twin["worst_cases"]}
    checks = record["checks"]
    if twin["worst_cases"]:
        size, worst = list(twin["worst_cases"].items())[-1]
        clean = kept["clean"]["accuracy"]
        text = f"the same attacks leave {100 * worst['accuracy']:.1f} % of the twin {about['run']} at {size}, of {100 * clean:.1f} % clean"
        weak = worst["accuracy"] > 0.9 * clean
        verdict = "suspicious" if weak else "ok"
        text += ": too weak, or too small, to tell a defense from none" * weak
        checks = [*checks, {"name": "twin", "verdict": verdict, "text": text, "figures": {"worst": worst["accuracy"], "clean": clean}}]
    return {"compare": about, "checks": checks}


def table(record: dict) -> str:
    """Accuracies as text: name, per cent, 95 % interval, share of zero gradients; then the worst cases, members of ensembles, and checks."""
    twin, skipping = record.get("compare"), any(row.get("skips") for row in record["results"].values())
    worst = {f"worst at {size}": row for size, row in record.get("worst_cases", {}).items()}
    rows = {**record["results"], **(worst if len(worst) > 1 else {}), "worst of all": record["worst"]}
    theirs = {**twin["results"], **{f"worst at {size}": row for size, row in twin["worst_cases"].items()}} if twin else {}
    width = max(map(len, rows))
    lines = [f"{'':{width}}  accuracy  95 % interval   zero gradients" + "     attacked" * skipping + (f"  {twin['run']}" if twin else "")]
    for name, row in rows.items():
        low, high = row["interval"]
        zero = "" if row.get("zero_gradient") is None else f"{row['zero_gradient']:14.1%}"
        line = f"{name:{width}}  {row['accuracy']:8.2%}  {low:6.2%} - {high:6.2%}  {zero:14}"
        if skipping:
            line += f"  {row['tried'] if row.get('skips') else '':>11}"
        lines.append((line + (f"  {theirs[name]['accuracy']:.2%}" if name in theirs else "")).rstrip())
    eot, passes = record["settings"].get("eot", 1), record["settings"].get("predictions", 1)
    gradients = f"each gradient the mean of {eot} (EoT)" if eot > 1 else "single gradients (EoT 1)"
    judged = f", each prediction the mean of {passes} passes" if passes > 1 else ""
    lines.append(f"{record['samples']} test images, seed {record['settings']['seed']}, {gradients}{judged}")
    if skipping:
        lines.append("attacked: where a number stands, only so many samples, which no row above had fooled within that size; the others count as wrong")
    for name, row in record["results"].items():
        if row.get("members"):
            lines += ["", *members(name, row)]
    if record.get("corruptions"):
        lines += ["", *corrupted(record["corruptions"])]
    if record.get("activity"):
        lines += ["", active(record["activity"])]
    checks = record.get("checks", ())
    if checks:
        wide = max(len(check["name"]) for check in checks)
        lines += ["", "checks", *(f"  {check['verdict']:10}  {check['name']:{wide}}  {check['text']}" for check in checks)]
    told = {check["text"] for check in checks}
    return "\n".join([*lines, *(f"warning: {text}" for text in record["warnings"] if text not in told)])


def corrupted(found: dict) -> list[str]:
    """Accuracy under each corruption, by severity."""
    from ..corruptions import CorruptionResult
    from ..corruptions import table as by_severity

    rows = [CorruptionResult.from_dict(row) for row in found["rows"]]
    width = max((row.interval[1] - row.interval[0]) / 2 for row in rows)
    head = f"corruptions, {found['source']}: accuracy on {rows[0].total} images by severity; 95 % intervals are within +-{100 * width:.1f} %"
    return [head, *(f"  {line}" for line in by_severity(rows).splitlines())]


def active(found: dict) -> str:
    """What the spiking layers do, in all, as a line."""
    if "missing" in found:
        return f"activity: not measured: {found['missing']}"

    def told(totals: dict) -> str:
        return f"{totals['per_neuron']:.3f} spikes per neuron and image, firing rate {totals['rate']:.2%}, {totals['active']:.1%} of neurons active, {totals['silent']:.1%} silent"

    line, attacked = f"activity on {found['images']} images: {told(found['clean']['totals'])}", found.get("attacked")
    if attacked:
        last = attacked["distance"][-1]
        line += f"; under {attacked['attack']}: {told(attacked['totals'])}, spikes of the last layer moved by {last['relative']:.1%}"
    return line


def members(name: str, row: dict) -> list[str]:
    """What each member of an attack has found, and what was left after it."""
    width = max(map(len, row["members"]))
    lines = [f"{name}, member by member: samples tried and fooled, accuracy after it and all before, accuracy under it alone"]
    for member, found in row["members"].items():
        if not found["tried"]:
            continue
        alone = "" if found["alone"] is None else f"{found['alone']:8.2%}"
        lines.append(f"  {member:{width}}  {found['tried']:6}  {found['fooled']:6}  {found['accuracy']:8.2%}  {alone}".rstrip())
    return lines
