"""Batch normalisation for signals with a time dimension, and time merged into the batch and back.

A signal is [T, N, C, *S] (time, batch, channel, space); a leading 1 with `steps` > 1 is a constant current, the same at
every step and computed once.
"""

from __future__ import annotations

import inspect

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .adjoints import nearest
from .distributed import pooled, ranks

__all__ = ["BNTT", "NORMS", "TDBN", "TEBN", "BatchNorm", "Norm", "make_norm", "merge", "split"]


class _Group:
    """A process group that a module can hold: a deep copy shares it, a pickled module leaves it behind."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict) -> _Group:
        return self

    def __reduce__(self) -> tuple:
        return _Group, ()


class Norm(nn.Module):
    """The base of all normalisations: parameters and running statistics named as in `torch.nn.BatchNorm2d`.

    channels: C. steps: T, or None to take it from the input; a constant current needs it. eps: added to the variance.
    momentum: weight of a batch in the running statistics, in [0, 1]. affine: learn weight and bias.
    Input [T, N, C, *S] float, or [1, N, C, *S]; in training each channel needs two values or more.

    `group`: the processes over which batch statistics are taken, set by `fastsnn.distributed.synchronise`; None: this one.
    """

    def __init__(
        self, channels: int, steps: int | None = None, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True, shape: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for what, value in (("channels", channels), ("steps", steps)):
            if (what, value) != ("steps", None) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}: {what} is {value!r}; wanted an int >= 1.")
        if not isinstance(momentum, (int, float)) or not 0 <= momentum <= 1:
            raise ValueError(f"{name}: momentum is {momentum!r}; wanted the weight of a batch in the running statistics, a number in [0, 1].")
        if not eps > 0:
            raise ValueError(f"{name}: eps is {eps!r}; wanted a number > 0, for example 1e-5.")
        self.channels, self.steps, self.eps, self.momentum, self.affine = channels, steps, eps, momentum, affine
        shape = shape or (channels,)
        self.weight = nn.Parameter(torch.empty(shape)) if affine else None
        self.bias = nn.Parameter(torch.empty(shape)) if affine else None
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self._group = _Group()
        self.reset_parameters()

    @property
    def group(self) -> dist.ProcessGroup | None:
        return self._group.group

    @group.setter
    def group(self, group: dist.ProcessGroup | None) -> None:
        self._group = _Group(group)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, running statistics as before the first batch."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def reset_running_stats(self) -> None:
        """Running statistics as before the first batch: mean 0, variance 1."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def _check(self, x: Tensor) -> int:
        """The steps that x stands for, after a look at its shape."""
        name = type(self).__name__
        if x.dim() < 3 or x.shape[0] < 1 or x.shape[2] != self.channels:
            raise ValueError(
                f"{name}: x has shape {list(x.shape)}; wanted [T, N, C, *S] with C = channels = {self.channels}. "
                "Split merged steps with norm.split(x, steps)."
            )
        if self.steps is not None and x.shape[0] not in (1, self.steps):
            raise ValueError(f"{name}: x has {x.shape[0]} steps, shape {list(x.shape)}; wanted {self.steps}, or 1 for a constant current.")
        return x.shape[0] if self.steps is None else self.steps

    def _batch_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, repeats: int = 1
    ) -> Tensor:
        """x [n, C, *S] normalised per channel; the running statistics as if x came `repeats` times."""
        if not self.training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, self.eps)
        count = x.numel() // x.shape[1]
        if self.group is not None and ranks(self.group) > 1:
            return self._over_ranks(x, weight, bias, running_mean, running_var, repeats, count)
        if count == 1:
            raise ValueError(
                f"{type(self).__name__}: x has one value per channel, shape {list(x.shape)} after merging; wanted two or more in training. "
                "Use a larger batch, or model.eval()."
            )
        if repeats == 1:
            return F.batch_norm(x, running_mean, running_var, weight, bias, True, self.momentum, self.eps)
        # With momentum 1 the buffers take the batch's own statistics; the variance then counts all repeats.
        mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
        y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, self.eps)
        running_mean.lerp_(mean, self.momentum)
        running_var.lerp_(var * ((count - 1) * repeats / (count * repeats - 1)), self.momentum)
        return y

    def _over_ranks(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, repeats: int, count: int
    ) -> Tensor:
        """The same with the statistics of all ranks, by differentiable sums."""
        wide = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(wide, dim=[d for d in range(x.dim()) if d != 1], correction=0)
        mean, var, total = pooled(mean, var, self.group, count)
        with torch.no_grad():
            total = total * repeats
            running_mean.lerp_(mean.to(running_mean.dtype), self.momentum)
            running_var.lerp_((var * (total / (total - 1))).to(running_var.dtype), self.momentum)
        scale = torch.rsqrt(var + self.eps)
        if weight is not None:
            scale = scale * weight
        # One fused pass, y = (x - centre)*scale + shift: the centre is a constant, its gradient runs through shift.
        centre = mean.detach()
        shift = (centre - mean) * scale
        if bias is not None:
            shift = shift + bias
        return F.batch_norm(x, centre, torch.ones_like(centre), scale, shift, False, 0.0, 0.0)

    def extra_repr(self) -> str:
        words = [f"{self.channels}"] + [f"steps={self.steps}"] * (self.steps is not None) + [f"eps={self.eps:g}", f"momentum={self.momentum:g}"]
        words += ["affine=False"] * (not self.affine) + [f"ranks={ranks(self.group)}"] * (self.group is not None)
        return ", ".join(words)


class BatchNorm(Norm):
    """Batch normalisation over steps, batch and space: `y = weight*(x - mean)/sqrt(var + eps) + bias`.

    A constant current stays constant, [1, N, C, *S], and leaves the running statistics that its T repeats would leave.
    Arguments as in `Norm`. Equivalent to: `torch.nn.BatchNorm2d` on [T*N, C, H, W] (Ioffe & Szegedy, 2015).

    >>> y = BatchNorm(64)(torch.randn(4, 8, 64, 16, 16))
    """

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        return self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        repeats = self._check(x) // x.shape[0]
        if self.training:
            self.num_batches_tracked.add_(1)
        y = self._batch_norm(x.flatten(0, 1), *self._affine(), self.running_mean, self.running_var, repeats)
        return y.unflatten(0, x.shape[:2])


class TDBN(BatchNorm):
    """Threshold-dependent batch norm: `y = weight*alpha*threshold*(x - mean)/sqrt(var + eps) + bias`.

    threshold: of the neurons that follow, a constant, in units of potential. alpha: 1; 1/sqrt(2) on two branches that
    meet in a residual sum. Other arguments as in `Norm`; a constant current stays constant (Zheng et al., AAAI 2021, eqs.
    5 to 8).
    """

    def __init__(
        self, channels: int, threshold: float = 1.0, alpha: float = 1.0, steps: int | None = None, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True
    ) -> None:
        super().__init__(channels, steps, eps, momentum, affine)
        for what, value in (("threshold", threshold), ("alpha", alpha)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"TDBN: {what} is {value!r}; wanted a number > 0. Where thresholds are learned, give the value that they start from.")
        self.threshold, self.alpha = float(threshold), float(alpha)

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        factor = self.alpha * self.threshold
        return (torch.full_like(self.running_var, factor) if self.weight is None else self.weight * factor), self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold:g}, alpha={self.alpha:g}"


class TEBN(BatchNorm):
    """Temporal effective batch norm: `y[t] = p[t]*(weight*(x[t] - mean)/sqrt(var + eps) + bias)`, statistics over steps,
    batch and space.

    `p`: [T], learned, from 1. Arguments as in `Norm`; a constant current comes back as T steps (Duan et al., NeurIPS 2022).
    """

    def __init__(self, channels: int, steps: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        _need_steps("TEBN", steps)
        super().__init__(channels, steps, eps, momentum, affine)
        self.p = nn.Parameter(torch.ones(steps))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "p"):
            nn.init.ones_(self.p)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * self.p.to(y.dtype).view(-1, *[1] * (y.dim() - 1))


class BNTT(Norm):
    """Batch normalisation through time: one batch norm for each step, `y[t] = weight[t]*(x[t] - mean[t])/sqrt(var[t] + eps) + bias[t]`.

    Parameters and running statistics are [T, C]. bias: False leaves it out, as published. Other arguments as in `Norm`; a
    constant current comes back as T steps (Kim & Panda, Frontiers in Neuroscience 2021, eqs. 5 to 7).
    """

    def __init__(self, channels: int, steps: int, eps: float = 1e-4, momentum: float = 0.1, affine: bool = True, bias: bool = True) -> None:
        _need_steps("BNTT", steps)
        super().__init__(channels, steps, eps, momentum, affine, (steps, channels))
        if not bias:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        steps = self._check(x)
        if self.training:
            self.num_batches_tracked.add_(1)
        nothing = (None,) * steps
        weights = nothing if self.weight is None else self.weight.unbind(0)
        biases = nothing if self.bias is None else self.bias.unbind(0)
        return torch.stack([
            self._batch_norm(x[t if x.shape[0] > 1 else 0], weights[t], biases[t], self.running_mean[t], self.running_var[t])
            for t in range(steps)
        ])  # fmt: skip


def _need_steps(name: str, steps: int | None) -> None:
    if steps is None:
        raise ValueError(f"{name}: steps is None; wanted T, since each step has a parameter of its own. Pass steps=T.")


#: The normalisations by name.
NORMS: dict[str, type[nn.Module]] = {"bn": BatchNorm, "tdbn": TDBN, "tebn": TEBN, "bntt": BNTT, "none": nn.Identity}


def make_norm(name: str, channels: int, steps: int | None = None, **options) -> nn.Module:
    """The normalisation of a name in `NORMS`, with the options of its class; `none` takes any and does nothing.

    >>> make_norm("tdbn", 64, steps=4, threshold=1.0)
    """
    if name not in NORMS:
        raise ValueError(f"make_norm: norm {name!r} is unknown; wanted one of {', '.join(NORMS)}.{nearest(name, tuple(NORMS))}")
    kind = NORMS[name]
    if kind is not nn.Identity:
        known = tuple(option for option in inspect.signature(kind).parameters if option not in ("channels", "steps"))
        for option in options:
            if option not in known:
                raise ValueError(f"make_norm: {name} has no option {option!r}; wanted some of {', '.join(known)}.{nearest(option, known)}")
    return kind(channels, steps=steps, **options)


def merge(x: Tensor) -> Tensor:
    """Steps merged into the batch: [T, N, ...] as [T*N, ...], a view where the memory allows it."""
    if x.dim() < 2:
        raise ValueError(f"merge: x has shape {list(x.shape)}; wanted [T, N, ...].")
    return x.flatten(0, 1)


def split(x: Tensor, steps: int) -> Tensor:
    """Steps split off the batch: [T*N, ...] as the view [T, N, ...]; the inverse of `merge`. steps: T."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"split: steps is {steps!r}; wanted an int >= 1.")
    if x.dim() < 1 or x.shape[0] % steps:
        raise ValueError(f"split: x has shape {list(x.shape)}; wanted [T*N, ...] with T = steps = {steps}. Give the number of steps that were merged.")
    return x.unflatten(0, (steps, -1))
