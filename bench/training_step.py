"""One training step of one network with the neurons of fastsnn, SpikingJelly and snnTorch: images per second, peak memory,
and the neurons' share of the step.

    python bench/training_step.py                       # VGG11, T = 4, batch 16: about five minutes on two cores
    python bench/training_step.py --model small_cnn --quick --json results.json

All rows have the same convolutions, norms, parameters, images and optimiser (SGD with momentum) and differ in the neuron
module alone: integrate-and-fire, hard reset to 0 attached to the gradient, surrogate ATan(2). Each is first checked
against the first, logits and gradients, then all are timed in turn. The rows `mpd-sgr` and `tgo` are fastsnn's with the loss of
MPD-SGR and of TGO, that is, with the statistics of all membranes, and `noisy` is its integrate-and-fire with noise, which TGO
trains with: these compute something else and are timed alone. What a row takes relative to the first is the median over rounds.

Neurons' share: the neuron layers alone, forward and backward, on the currents and gradients of the step itself. Memory:
what a step allocates at its peak, beside parameters, their gradients and momenta; every result a new allocation.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import measure
import peers
import torch
from torch import Tensor, nn

import fastsnn
from fastsnn import defenses, models, surrogates

#: Logits and gradients of a competitor, from fastsnn's in units of their norm: float32 sums in another order, and
#: single neurons exactly at the threshold. Whoever computes another layer is off by 0.1 and more.
TOLERANCE = 2e-2


class SpikingJellyIF(nn.Module):
    """`IFNode` over all steps at once, as its users run it; it forgets its state, as ours starts anew."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        from loguru import logger

        logger.disable("spikingjelly")
        from spikingjelly.activation_based import neuron, surrogate

        self.steps = steps
        self.node = neuron.IFNode(v_threshold=1.0, v_reset=0.0, surrogate_function=surrogate.ATan(alpha=peers.ALPHA), detach_reset=False, step_mode="m")

    def forward(self, x: Tensor) -> Tensor:
        self.node.reset()
        return self.node(x.expand(self.steps, *x.shape[1:]))


class SnnTorchIF(nn.Module):
    """`Leaky` with beta = 1, step by step; it fires at h > 1."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        import snntorch

        self.steps = steps
        spike = snntorch.surrogate.atan(alpha=peers.ALPHA)
        self.layer = snntorch.Leaky(1.0, threshold=1.0, spike_grad=spike, reset_mechanism="zero", reset_delay=False)

    def forward(self, x: Tensor) -> Tensor:
        v, spikes = torch.zeros_like(x[0]), []
        for current in x.expand(self.steps, *x.shape[1:]).unbind(0):
            s, v = self.layer(current, v)
            spikes.append(s)
        self.layer.mem, self.layer.reset = torch.zeros(0, device=x.device), None
        return torch.stack(spikes)


def ours(steps: int) -> nn.Module:
    return fastsnn.IF(surrogate=surrogates.ATan(peers.ALPHA), steps=steps)


def noisy(steps: int) -> nn.Module:
    return fastsnn.NoisyLIF(decay=1.0, steps=steps)


#: name -> (the neuron of T steps, the defense whose loss is taken)
ROWS: dict[str, tuple[Callable[[int], nn.Module], defenses.Defense]] = {
    "fastsnn": (ours, defenses.Vanilla()),
    "fastsnn mpd-sgr": (ours, defenses.MPDSGR()),
    "fastsnn tgo": (ours, defenses.TGO()),
    "fastsnn noisy": (noisy, defenses.Vanilla()),
    "spikingjelly": (SpikingJellyIF, defenses.Vanilla()),
    "snntorch": (SnnTorchIF, defenses.Vanilla()),
}
#: Rows that compute something else than the first: there is nothing to check them against.
OTHERS = ("fastsnn mpd-sgr", "fastsnn tgo", "fastsnn noisy")
KINDS = (fastsnn.Neuron, SpikingJellyIF, SnnTorchIF)


@dataclass
class Step:
    """A network, its optimiser, and one batch."""

    model: nn.Module
    defense: defenses.Defense
    optimiser: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    autocast: bool

    def gradients(self) -> defenses.Outcome:
        self.optimiser.zero_grad(set_to_none=False)
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.autocast):
            outcome = self.defense.step(self.model, self.images, self.labels)
        outcome.loss.backward()
        return outcome

    def __call__(self) -> None:
        self.gradients()
        self.optimiser.step()

    def neurons(self) -> list[tuple[nn.Module, Tensor, Tensor]]:
        """Every neuron layer with the current and the incoming gradient of a step."""
        found: list[list] = []
        hooks = []

        def watch(layer: nn.Module, inputs: tuple, output) -> None:
            spikes = output[0] if isinstance(output, tuple) else output
            entry = [layer, inputs[0].detach(), None]
            found.append(entry)
            spikes.register_hook(lambda grad: entry.__setitem__(2, grad.detach()))

        for layer in self.model.modules():
            if isinstance(layer, KINDS):
                hooks.append(layer.register_forward_hook(watch))
        self.gradients()
        for hook in hooks:
            hook.remove()
        return [tuple(entry) for entry in found]


def restore(model: nn.Module, state: dict) -> None:
    """Parameters and running statistics as in `state`; buffers that only a peer's neuron has stay."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(".neuron." in name for name in missing), (missing, unexpected)


def make(name: str, options, state: dict | None) -> Step:
    neuron, defense = ROWS[name]
    torch.manual_seed(0)
    model = models.build(options.model, steps=options.steps, classes=10, normalise="cifar10").to(options.device)
    for path, _ in model.spiking_layers():
        model.set_submodule(path, neuron(options.steps).to(options.device))
    for module in model.modules():
        if isinstance(module, nn.Linear):  # as they are made, linear layers without a norm let nobody fire, and there is nothing to check
            nn.init.normal_(module.weight, std=3 / module.in_features**0.5)
    if state is not None:
        restore(model, state)
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(options.batch, *model.image, generator=draw).to(options.device)
    labels = torch.randint(10, (options.batch,), generator=draw).to(options.device)
    return Step(model, defense, optimiser, images, labels, options.dtype == "bfloat16")


def check(step: Step, want: tuple[Tensor, list[Tensor]]) -> float:
    """How far logits and gradients are from those of fastsnn, in units of their norm: the worst of them."""
    outcome = step.gradients()
    far = [(outcome.logits - want[0]).norm() / want[0].norm()]
    grads = torch.cat([p.grad.flatten() for p in step.model.parameters()])
    wanted = torch.cat([g.flatten() for g in want[1]])
    far.append((grads - wanted).norm() / wanted.norm())
    return max(value.item() for value in far)


def run_neurons(entries: list[tuple[nn.Module, Tensor, Tensor]]) -> None:
    for layer, current, grad in entries:
        current = current.detach().requires_grad_()
        torch.autograd.grad(layer(current), current, grad)


def measure_all(options) -> dict:
    progress = measure.Progress()
    clock = measure.Clock(options.device)
    settings = {name: getattr(options, name) for name in ("model", "steps", "batch", "dtype", "device", "repeat", "rows")}
    data = {"machine": measure.machine(), "versions": measure.versions() | {"fastsnn": fastsnn.__version__}, "commit": measure.commit(), "settings": settings, "rows": []}
    steps: dict[str, Step] = {}
    rows: dict[str, dict] = {}
    state = want = None
    for name in [name for name in ROWS if name in options.rows]:
        progress(f"{name}: checking")
        row = rows[name] = {"competitor": name, "status": "ok", "reason": "", "off": 0.0}
        try:
            step = make(name, options, state)
        except ImportError as error:
            row |= {"status": "not run", "reason": f"not installed ({error}): pip install --no-deps -r requirements-peers.txt"}
            continue
        if state is None:
            state = {key: value.clone() for key, value in step.model.state_dict().items()}
            outcome = step.gradients()
            want = outcome.logits.clone(), [p.grad.clone() for p in step.model.parameters()]
            restore(step.model, state)
        elif name not in OTHERS:
            row["off"] = check(step, want)
            restore(step.model, state)
            if not row["off"] <= TOLERANCE:
                row |= {"status": "FAILED", "reason": f"logits or gradients are off by {row['off']:.1e} of their norm; allowed are {TOLERANCE:.0e}"}
                continue
        step()  # momenta exist from here on
        progress(f"{name}: memory")
        with peers.fresh_memory():
            _, row["peak_bytes"] = measure.memory(step, options.device)
        steps[name] = step
    others = measure.Others()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    alone: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(options.repeat):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            progress("timing", f"round {turn + 1} of {options.repeat}, {name}")
            gc.collect()
            step = steps[name]
            step()
            samples[name].append(clock.once(step))
            entries = step.neurons()
            clock.once(lambda: run_neurons(entries))
            alone[name].append(clock.once(lambda: run_neurons(entries)))
            del entries
    progress.clear()
    for name, step in steps.items():
        p20, median, p80 = measure.spread(samples[name])
        share = measure.spread(alone[name])[1] / median
        relative = measure.spread([own / first for own, first in zip(samples[name], samples[names[0]])])  # round by round, as load comes and goes
        rows[name] |= {
            "seconds": median, "seconds_p20": p20, "seconds_p80": p80, "images_per_second": options.batch / median,
            "neuron_seconds": measure.spread(alone[name])[1], "neuron_share": share, "samples": options.repeat,
            "relative": relative[1], "relative_p20": relative[0], "relative_p80": relative[2],
        }  # fmt: skip
    data["cpu_used_by_others"] = others.share()
    data["rows"] = list(rows.values())
    return data


def table(data: dict) -> str:
    settings = data["settings"]
    lines = [
        f"{settings['model']}, T = {settings['steps']}, batch {settings['batch']}, {settings['dtype']} on {settings['device']}",
        "| neurons of | images/s | seconds (p20 to p80) | relative (p20 to p80) | neurons' share | peak memory of a step |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in data["rows"]:
        if row["status"] != "ok":
            lines.append(f"| {row['competitor']} | {row['status']}: {row['reason']} | | | | |")
            continue
        between = f"{row['seconds']:.3f} ({row['seconds_p20']:.3f} to {row['seconds_p80']:.3f})"
        relative = f"{row['relative']:.3f} ({row['relative_p20']:.3f} to {row['relative_p80']:.3f})"
        lines.append(f"| {row['competitor']} | {row['images_per_second']:.1f} | {between} | {relative} | {100 * row['neuron_share']:.1f} % | {row['peak_bytes'] / 2**20:.0f} MiB |")
    if data["cpu_used_by_others"] > 0.05:
        lines.append(f"Other processes took {100 * data['cpu_used_by_others']:.0f} % of the CPU meanwhile: the times are in doubt.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(models.MODELS), default="vgg11", help="the network (default vgg11)")
    add("--steps", type=int, default=4, metavar="T", help="time steps (default 4)")
    add("--batch", type=int, default=16, metavar="N", help="images (default 16)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast (default float32)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME", help=f"which of {', '.join(ROWS)}; the first of them is what the others are compared with (default all)")
    add("--repeat", type=int, default=9, metavar="R", help="rounds (default 9)")
    add("--quick", action="store_true", help="three rounds")
    add("--json", type=Path, metavar="FILE", help="write every number, the machine and the versions")
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeat = 3
    if "fastsnn" not in options.rows:
        parser.error("--rows: wanted `fastsnn` among them, which the others are checked against")
    if min(options.steps, options.batch, options.repeat) < 1:
        parser.error("--steps, --batch and --repeat must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    measure.check_outputs(parser, options.json)
    data = measure_all(options)
    print(table(data))
    if options.json:
        with measure.replacing(options.json) as temporary:
            temporary.write_text(json.dumps(data, indent=1) + "\n")
    return 1 if any(row["status"] == "FAILED" for row in data["rows"]) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
