"""Attacks on one network: seconds per 1,000 images of each suite, and FGSM through the ensemble of 19 gradient approximations, sharing its
forward pass, against 19 separate attacks.

    python bench/attacks.py                                         # the digits network of the tests, on the test images
    python bench/attacks.py runs/mine --images 100 --suites quick ensemble --json results.json
    python bench/attacks.py --model vgg11 --images 16               # an untrained network on random images: the ensemble alone

The images of all members are first compared with those of the separate attacks, bit for bit; where one differs nothing is timed and the
exit status is 1. Then both are timed in turns, and in the same rounds a forward pass F and the members' backward passes B, b = B/F.

Crafting leaves judging apart (the forward passes without gradient that tell who is fooled) and CBA, whose forward pass is another network's.
The other 18 members need F + 18 B, where separate attacks need 18 (F + B): a ratio of (1 + 18 b) / (18 (1 + b)), of which crafting may
take 1.05 times.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import measure
import torch
from torch import Tensor, nn

if importlib.util.find_spec("fastsnn") is None:  # a checkout that is not installed
    sys.path.insert(0, str(measure.ROOT))

import fastsnn
from fastsnn import attacks, checkpoints, data, evaluation, models
from fastsnn.attacks.approximations import ENSEMBLE, members_of
from fastsnn.attacks.base import crafting
from fastsnn.attacks.losses import LOSSES

NETWORK = measure.ROOT / "tests" / "networks" / "snn"
#: What crafting may take, in units of the passes that it needs.
ALLOWED = 1.05
#: Forward passes of a round, whose mean counts: there are as many backward passes as members.
FORWARDS = 4
#: Members that one forward pass of the network serves.
SHARING = tuple(member.name for member in members_of(ENSEMBLE) if member.shares)


class Judging(nn.Module):
    """The network, with a clock: `seconds` of the forward passes that record no gradient."""

    def __init__(self, model: nn.Module, clock: measure.Clock) -> None:
        super().__init__()
        self.model, self.clock, self.seconds = model, clock, 0.0

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.model(images)
        found: list[Tensor] = []
        self.seconds += self.clock.once(lambda: found.append(self.model(images)))
        return found[0]


@contextlib.contextmanager
def judged(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within this block, the images of every forward pass that records no gradient: what an ensemble's members have made, in order."""
    found: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: None if torch.is_grad_enabled() else found.append(inputs[0].clone()))
    try:
        yield found
    finally:
        handle.remove()


def separate(eps: float, members: tuple[str, ...]) -> list[attacks.Attack]:
    return [attacks.FGSM(eps, adjoint=name) for name in members]


def check(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[str]:
    """The members whose images differ from those of their separate attacks in any bit."""
    ensemble = attacks.Ensemble(eps, base="fgsm", members=ENSEMBLE)
    with judged(model) as found:
        ensemble(model, x, y)
    if len(found) != len(ENSEMBLE) or any(images.shape != x.shape for images in found):
        return [f"{len(found)} batches were judged, of {len(ENSEMBLE)} members"]
    return [attack.adjoint for attack, images in zip(separate(eps, ENSEMBLE), found) if not torch.equal(attack(model, x, y), images)]


def passes(model: nn.Module, x: Tensor, y: Tensor, clock: measure.Clock) -> tuple[float, float]:
    """Seconds of a forward pass to the loss, and of a backward pass to the images, the mean over the members that share."""
    found: list[Tensor] = []

    def forward() -> None:
        images = x.detach().requires_grad_()
        found[:] = [images, LOSSES["ce"](model(images), y).sum()]

    ways = members_of(SHARING)
    with crafting(model), torch.enable_grad():
        ahead = sum(clock.once(forward) for _ in range(FORWARDS)) / FORWARDS
        back = 0.0
        for place, way in enumerate(ways, 1):
            with way.backward():
                back += clock.once(lambda: torch.autograd.grad(found[1], found[0], retain_graph=place < len(ways)))
    return ahead, back / len(ways)


def compare(model: nn.Module, x: Tensor, y: Tensor, options, progress: measure.Progress) -> dict:
    """Shared against separate attacks, on one full batch."""
    eps, clock = attacks.parse_eps(options.eps), measure.Clock(options.device)
    row: dict = {"images": len(x), "members": len(ENSEMBLE), "sharing": len(SHARING), "status": "ok", "reason": ""}
    progress("ensemble: checking")
    wrong = check(model, x, y, eps)
    if wrong:
        return row | {"status": "FAILED", "reason": f"images differ from those of separate attacks: {', '.join(wrong)}"}
    timed, sharing = Judging(model, clock), attacks.Ensemble(eps, base="fgsm", members=SHARING)
    whole, alone, each = attacks.Ensemble(eps, base="fgsm", members=ENSEMBLE), separate(eps, SHARING), separate(eps, ENSEMBLE)

    def craft() -> float:
        timed.seconds = 0.0
        return clock.once(lambda: sharing(timed, x, y)) - timed.seconds

    def apart() -> float:
        return clock.once(lambda: [attack(model, x, y) for attack in alone])

    def all_shared() -> float:
        return clock.once(lambda: whole(model, x, y))

    def all_apart() -> float:
        def run() -> None:
            for attack in each:
                found = attack(model, x, y)
                with torch.no_grad():
                    model(found)

        return clock.once(run)

    parts = {"crafting_shared": craft, "crafting_separate": apart, "judged_shared": all_shared, "judged_separate": all_apart}
    samples: dict[str, list[float]] = {name: [] for name in ("forward", "backward", *parts)}
    for function in (lambda: passes(model, x, y, clock), *parts.values()):
        function()  # what is made at the first call
    names = list(parts)
    for turn in range(options.repeat):
        progress("ensemble: timing", f"round {turn + 1} of {options.repeat}")
        ahead, back = passes(model, x, y, clock)
        samples["forward"].append(ahead)
        samples["backward"].append(back)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(parts[name]())
    # Round by round: what slows the machine down for a while slows both sides.
    samples["b"] = [back / ahead for back, ahead in zip(samples["backward"], samples["forward"])]
    for name in ("crafting", "judged"):
        samples[f"{name}_ratio"] = [shared / apart for shared, apart in zip(samples[f"{name}_shared"], samples[f"{name}_separate"])]
    for name, values in samples.items():
        row[f"{name}_p20"], row[name], row[f"{name}_p80"] = measure.spread(values)
    b, count = row["b"], len(SHARING)
    row["bound"] = ALLOWED * (1 + count * b) / (count * (1 + b))
    return row | {"rounds": options.repeat, "within": row["crafting_ratio"] <= row["bound"]}


def suites(model: nn.Module, x: Tensor, y: Tensor, options, progress: measure.Progress) -> list[dict]:
    """Each suite once over all images, as `fastsnn attack` runs it."""
    rows = []
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    for name in options.suites:
        progress(f"suite {name}")
        suite = evaluation.make_suite(name, [options.eps], seed=0, eot=evaluation.default_eot(model), classes=classes)
        began = time.perf_counter()
        found = evaluation.evaluate(model, x, y, suite, batch_size=options.batch_size)
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        rows.append({
            "suite": name, "attacks": len(suite), "images": len(x), "seconds": seconds, "seconds_per_1000": 1000 * seconds / len(x),
            "clean": found.results["clean"].accuracy, "worst": found.worst().accuracy,
        })  # fmt: skip
    return rows


def network(options) -> tuple[nn.Module, Tensor, Tensor, str]:
    """The network in eval mode, images [N, C, H, W] in [0, 1] and labels, on the device, and what to call it."""
    if options.model:
        torch.manual_seed(0)
        model = models.build(options.model, steps=options.steps, classes=10, normalise="cifar10")
        for module in model.modules():
            if isinstance(module, nn.Linear):  # as they are made, linear layers without a norm let nobody fire
                nn.init.normal_(module.weight, std=3 / module.in_features**0.5)
        draw = torch.Generator().manual_seed(1)
        x, y = torch.rand(options.images, *model.image, generator=draw), torch.randint(10, (options.images,), generator=draw)
        name = f"{options.model}, untrained, T = {options.steps}"
    else:
        model, run = checkpoints.load_run(options.run)
        found = data.load(run["config"]["data"]).limited(test=options.images)
        x, y = found.x_test.float() / 255, found.y_test
        name = f"{run['config']['model']} on {found.name}, T = {model.steps}"
    device = torch.device(options.device)
    return model.to(device).eval(), x.to(device), y.to(device), name


def measure_all(options) -> dict:
    progress, others = measure.Progress(), measure.Others()
    model, x, y, name = network(options)
    settings = {key: getattr(options, key) for key in ("images", "batch_size", "eps", "repeat", "device", "suites")} | {"network": name, "images": len(x)}
    result = {"machine": measure.machine(), "versions": measure.versions() | {"fastsnn": fastsnn.__version__}, "commit": measure.commit(), "settings": settings}
    result["ensemble"] = compare(model, x[: options.batch_size], y[: options.batch_size], options, progress)
    result["suites"] = suites(model, x, y, options, progress) if not options.model else []
    progress.clear()
    result["cpu_used_by_others"] = others.share()
    return result


def table(result: dict) -> str:
    settings, row = result["settings"], result["ensemble"]
    lines = [f"{settings['network']}, eps {settings['eps']}, batches of {settings['batch_size']} on {settings['device']}", ""]
    if result["suites"]:
        lines += ["| suite | attacks | seconds per 1,000 images | clean | worst case |", "| --- | ---: | ---: | ---: | ---: |"]
        lines += [f"| {one['suite']} | {one['attacks']} | {one['seconds_per_1000']:.1f} | {one['clean']:.1%} | {one['worst']:.1%} |" for one in result["suites"]]
        lines.append(f"Each suite once, on {settings['images']} images.")
        lines.append("")
    if row["status"] != "ok":
        return "\n".join([*lines, f"ensemble: {row['status']}: {row['reason']}"])
    scale = 1000 / row["images"]
    lines += [f"| FGSM, {row['images']} images | shared | separate | ratio (p20 to p80) |", "| --- | ---: | ---: | ---: |"]
    for text, key in ((f"crafting, {row['sharing']} members", "crafting"), (f"crafting and judging, {row['members']} members", "judged")):
        shared, apart = row[f"{key}_shared"], row[f"{key}_separate"]
        between = f"{row[f'{key}_ratio']:.3f} ({row[f'{key}_ratio_p20']:.3f} to {row[f'{key}_ratio_p80']:.3f})"
        lines.append(f"| {text} | {scale * shared:.2f} s | {scale * apart:.2f} s | {between} |")
    lines.append(
        f"Seconds per 1,000 images, medians of {row['rounds']} rounds; the images are equal bit for bit. b = {row['b']:.2f}: crafting may take "
        f"{row['bound']:.3f} of the separate time and takes {row['crafting_ratio']:.3f}{'' if row['within'] else ', MORE than it may'}."
    )
    if result["cpu_used_by_others"] > 0.05:
        lines.append(f"Other processes took {100 * result['cpu_used_by_others']:.0f} % of the CPU meanwhile: the times are in doubt.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", nargs="?", type=Path, default=NETWORK, metavar="RUN", help="the folder that `fastsnn train` made (default: the digits network of the tests)")
    add("--model", choices=list(models.MODELS), help="an untrained network on random images instead: the ensemble alone")
    add("--steps", type=int, default=4, metavar="T", help="time steps of --model (default 4)")
    add("--images", type=int, default=200, metavar="N", help="images, each class with its share (default 200)")
    add("--batch-size", type=int, default=256, metavar="N", help="images attacked together (default 256)")
    add("--suites", nargs="*", choices=list(evaluation.SUITES), default=list(evaluation.SUITES), metavar="NAME", help="which suites (default: all)")
    add("--eps", default="8/255", metavar="X", help="size of perturbation in pixels (default 8/255)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    add("--repeat", type=int, default=9, metavar="R", help="rounds of the comparison (default 9)")
    add("--quick", action="store_true", help="three rounds, and the suite `quick` alone")
    add("--json", type=Path, metavar="FILE", help="write every number, the machine and the versions")
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeat, options.suites = 3, ["quick"]
    if min(options.images, options.batch_size, options.repeat, options.steps) < 1:
        parser.error("--images, --batch-size, --repeat and --steps must be at least 1")
    try:
        attacks.parse_eps(options.eps)
    except ValueError as error:
        parser.error(f"--eps: {error}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    measure.check_outputs(parser, options.json)
    result = measure_all(options)
    print(table(result))
    if options.json:
        with measure.replacing(options.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["ensemble"]["status"] == "FAILED" else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
