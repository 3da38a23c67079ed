"""HIRE: noise on the input, crafted between the periods of one forward pass (HIRE-SNN)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..attacks import parse_eps
from ..encodings import Direct
from ..models import Network
from ..models.dropout import StepDropout
from ..neurons import Neuron, spiking_layers
from ..norm import NORMS
from .base import Defense, Outcome

__all__ = ["HIRE"]

#: A learned threshold and a learned leak stay in these ranges; the paper prints none: a reading.
LEAST_THRESHOLD, LEAKS = 0.03, (0.0, 1.0)


class HIRE(Defense):
    """HIRE-SNN: the T steps in periods, an update after each, the image moved against the network for the next one.

    After a period: backward on its loss, an optimiser's step, `delta <- clip(delta + step_size*sign(grad_x L), -eps, eps)`;
    the next period sees `clip(x + delta, 0, 1)`. The first one sees x. Membranes are carried from period to period, detached,
    and so are the output's (`logits` of a period are the sum of the output currents of all steps so far) and the masks of
    dropout. The gradient is that of the period's own backward pass, so that no time is spent on crafting. All of this is a
    reading.

    periods: how many, at most T; where T is no multiple of them, the first ones are a step longer. 1: plain training.
    eps, step_size: in pixels; step_size by default eps/(periods - 1), so that the last period can reach eps; these sizes
    are a reading too. carry_output: False takes the loss of each period on its own output currents.

    It trains a network of fastsnn.models as in the paper: direct encoding, no norm, no bias, learned threshold and leak, soft
    reset, fire "gt", readout "sum"; else a ValueError names the option. The paper's further options are a reading:
    surrogate "triangle:1.0,0.3,relative", and dropout=0.2 with dropout_everywhere and dropout_over_steps. After a step
    thresholds are kept at 0.03 or above, leaks in [0, 1]. It runs several updates a batch and stands alone in a sum.
    Source: Kundu et al., ICCV 2021 (arXiv 2110.11417).

    >>> model = fastsnn.models.vgg11(steps=6, dropout=0.2, dropout_everywhere=True, dropout_over_steps=True, **HIRE.needs)
    >>> for outcome in HIRE(periods=2).updates(model, images, labels):
    ...     optimiser.zero_grad(); outcome.loss.backward(); optimiser.step()
    """

    name = "hire"
    crafts = True
    #: The options of its network.
    needs = {
        "neuron": "lif",
        "neuron_options": {"reset": "soft", "fire": "gt", "learn": ["threshold", "decay"], "surrogate": "triangle:1.0,0.3,relative"},
        "norm": "none",
        "readout": "sum",
        "bias": False,
    }

    def __init__(self, periods: int = 2, eps: float | str = 8 / 255, step_size: float | str | None = None, carry_output: bool = True) -> None:
        if not isinstance(periods, int) or isinstance(periods, bool) or periods < 1:
            raise ValueError(f"HIRE: periods is {periods!r}; wanted an int >= 1, at most the steps of the network.")
        self.periods, self.carry_output = periods, bool(carry_output)
        try:
            self.eps = parse_eps(eps)
            self.step_size = self.eps / max(periods - 1, 1) if step_size is None else parse_eps(step_size)
        except ValueError as error:
            raise ValueError(f"HIRE: {error}") from None
        for name, value in (("eps", self.eps), ("step_size", self.step_size)):
            if value > 1:
                raise ValueError(f"HIRE: {name} is {value:g}, larger than the range of a pixel; wanted a number in [0, 1]. Divide by 255, for example 8/255.")

    def prepare(self, model: nn.Module) -> None:
        neurons = list(spiking_layers(model).values())
        if not neurons:
            raise ValueError("HIRE: the model has no spiking layer; wanted a network of fastsnn.models with neuron='lif'. An ANN has no steps to part.")
        if not isinstance(model, Network):
            raise ValueError(f"HIRE: the model is a {type(model).__name__}; wanted a network of fastsnn.models, whose steps can run in parts.")
        if model.steps < self.periods:
            raise ValueError(f"HIRE: periods is {self.periods}, and the network has {model.steps} steps; wanted at least a step for each. Set steps={self.periods}.")
        kinds = tuple(kind for kind in NORMS.values() if kind is not nn.Identity)
        norms = [type(module).__name__ for module in model.modules() if isinstance(module, kinds)]
        biased = any(getattr(module, "bias", None) is not None for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
        encoding = type(model.encoding)
        for there, wanted, option in (
            (f"encoding {encoding.__name__}", encoding is Direct, "encoding='direct'"),
            (f"norm {norms[0] if norms else None}", not norms, "norm='none'"),
            ("a bias", not biased, "model option bias=False"),
            (f"readout {model.readout!r}", model.readout == "sum", "readout='sum'"),
            (f"reset {neurons[0].reset!r}", all(layer.reset == "soft" for layer in neurons), "neuron option reset='soft'"),
            (f"fire {neurons[0].fire!r}", all(layer.fire == "gt" for layer in neurons), "neuron option fire='gt'"),
            (
                f"neurons {type(neurons[0]).__name__} that learn {', '.join(neurons[0].learn) or 'nothing'}",
                all({"threshold", "decay"} <= set(layer.learn) for layer in neurons),
                "neuron='lif' and neuron option learn=['threshold', 'decay']",
            ),
        ):
            if not wanted:
                raise ValueError(f"HIRE: the network has {there}; wanted that of the paper: learned threshold and leak, soft reset, no norm, no bias. Set {option}.")

    def updates(self, model: nn.Module, images: Tensor, labels: Tensor, **options) -> Iterator[Outcome]:
        self._check(images, labels, options.get("progress", 0.0), options.get("smoothing", 0.0))
        forward = options.pop("forward", None)
        call, carried = model if forward is None else forward, Carried(model)
        delta, (least, more) = torch.zeros_like(images), divmod(model.steps, self.periods)
        for period in range(self.periods):
            last = period + 1 == self.periods
            x = (images + delta).clamp(0, 1).requires_grad_(not last)

            def run(seen: Tensor, steps: int = least + (period < more)) -> Tensor:
                return carried.run(call, seen, steps, self.carry_output)

            yield self.step(model, x, labels, forward=run, **options)
            if last:
                return
            if x.grad is None:
                raise RuntimeError("HIRE: a period's loss was not differentiated; wanted outcome.loss.backward() before the next outcome is asked for.")
            delta = (delta + self.step_size * x.grad.sign()).clamp(-self.eps, self.eps)

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        for layer in spiking_layers(model).values():
            if "threshold" in layer.learn:
                layer.threshold.clamp_(min=LEAST_THRESHOLD)
            if "decay" in layer.learn:
                layer.decay.clamp_(*LEAKS)


class Carried:
    """What a network carries from one part of a sequence to the next: membranes, masks of dropout, and the output's sum; detached."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[Neuron, Tensor | None] = {module: None for module in model.modules() if isinstance(module, Neuron)}
        self.masks: dict[StepDropout, Tensor | None] = {module: None for module in model.modules() if isinstance(module, StepDropout)}
        self.output: Tensor | None = None

    def run(self, forward: Callable[[Tensor], Tensor], images: Tensor, steps: int, add: bool) -> Tensor:
        """The logits [N, classes] of the next `steps` steps; add: to those of the steps before."""
        with self._part(steps):
            logits = forward(images)
        if add and self.output is not None:
            logits = self.output + logits
        self.output = logits.detach()
        return logits

    @contextmanager
    def _part(self, steps: int) -> Iterator[None]:
        before = [(layer, layer.steps, layer.stateful, layer.v) for layer in self.layers]
        for layer, v in self.layers.items():
            layer.steps, layer.stateful, layer.v = steps, True, v
        for module, mask in self.masks.items():
            module.held, module.mask = True, mask
        try:
            yield
        finally:
            self.layers = {layer: None if layer.v is None else layer.v.detach() for layer in self.layers}
            self.masks = {module: module.mask for module in self.masks}
            for layer, *values in before:
                layer.steps, layer.stateful, layer.v = values
            for module in self.masks:
                module.held, module.mask = False, None
