"""Surrogate gradients: what stands in for the derivative of the spike in the backward pass.

Each class names one row of the SURROGATE table and writes it a second time in PyTorch, independently of
`kernels/lif.def`: `derivative(z)` is what the backward pass multiplies by, and `primitive(z)` is the soft step whose
derivative that is, so that the two can be checked against each other and against the kernels.

`z` is the membrane minus the threshold, in units of potential. Parameters are numbers or tensors: a scalar, `[C]`
(one per channel), or `[T or 1, C, *S]` (one per neuron). They get no gradient. With `relative=True` the spike is a step
of `z / threshold`: the surrogate is evaluated there and, by the chain rule, divided by the threshold (BNTT, HIRE).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "ATan",
    "Erf",
    "Exponential",
    "FastSigmoid",
    "Gaussian",
    "Rectangle",
    "Sigmoid",
    "SoftSign",
    "StraightThrough",
    "Surrogate",
    "Triangle",
]


class Surrogate:
    """One row of the SURROGATE table with its parameters.

    To add one: a row in `kernels/lif.def` and a subclass here with `name` (of the row), `parameters` (the arguments of
    `__init__`, in the order a, b), `derivative` and `primitive`.
    """

    name: str
    parameters: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()  # the parameters that must be > 0 where they are numbers

    def __init__(self, *values: float | Tensor, relative: bool = False) -> None:
        self.relative = bool(relative)
        for name, value in zip(self.parameters, values, strict=True):
            if isinstance(value, Tensor):
                if not value.is_floating_point():
                    raise TypeError(
                        f"{type(self).__name__}: {name} is a {value.dtype} tensor; wanted a number or a floating-point "
                        f"tensor. Cast it, for example {name}.float()."
                    )
                value = value.detach()
            else:
                value = float(value)
                if not math.isfinite(value) or (name in self.positive and value <= 0):
                    wanted = "a finite number above 0" if name in self.positive else "a finite number"
                    raise ValueError(f"{type(self).__name__}: {name} is {value}; wanted {wanted}.")
            setattr(self, name, value)

    @property
    def values(self) -> tuple[float | Tensor, float | Tensor]:
        """The parameters a and b of the table's row; 0 where the row has none."""
        values = [getattr(self, name) for name in self.parameters]
        return tuple(values + [0.0] * (2 - len(values)))

    def derivative(self, z: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        """ds/dz at z, with the parameters a and b already shaped to broadcast against z."""
        raise NotImplementedError(f"{type(self).__name__} defines no derivative; write derivative(z, a, b).")

    def primitive(self, z: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        """A soft step: a function of z whose derivative is `derivative`, up to a constant."""
        raise NotImplementedError(f"{type(self).__name__} defines no primitive; write primitive(z, a, b).")

    def __call__(self, z: Tensor) -> Tensor:
        """`derivative` at z [*], with this surrogate's own parameters."""
        return self.derivative(z, *self.values)

    def __repr__(self) -> str:
        def show(value: float | Tensor) -> str:
            return f"tensor{list(value.shape)}" if isinstance(value, Tensor) else f"{value:g}"

        words = [f"{name}={show(getattr(self, name))}" for name in self.parameters]
        return f"{type(self).__name__}({', '.join(words + ['relative=True'] * self.relative)})"

    def _key(self) -> tuple:
        return (type(self), self.relative, *(id(v) if isinstance(v, Tensor) else v for v in self.values))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Surrogate) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


class Triangle(Surrogate):
    """`height * max(0, width - |z|) / width`; height is 1/width unless given: area 1 (SNN-RAT, NeurIPS 2022)."""

    name, parameters, positive = "triangle", ("width", "height"), ("width",)

    def __init__(self, width: float | Tensor = 1.0, height: float | Tensor | None = None, relative: bool = False) -> None:
        if height is None:
            height = 1 / width if isinstance(width, Tensor) or width else 0.0
        super().__init__(width, height, relative=relative)

    def derivative(self, z, a, b):
        return b * torch.clamp(a - z.abs(), min=0) / a

    def primitive(self, z, a, b):
        inside = torch.maximum(torch.minimum(z, torch.as_tensor(a, dtype=z.dtype)), torch.as_tensor(-a, dtype=z.dtype))
        return b * (inside - inside * inside.abs() / (2 * a)) + b * a / 2


class Rectangle(Surrogate):
    """`1[|z| < width/2] / width`."""

    name, parameters, positive = "rectangle", ("width",), ("width",)

    def __init__(self, width: float | Tensor = 1.0, relative: bool = False) -> None:
        super().__init__(width, relative=relative)

    def derivative(self, z, a, b):
        return (z.abs() < 0.5 * a).to(z.dtype) / a

    def primitive(self, z, a, b):
        half = torch.as_tensor(0.5 * a, dtype=z.dtype)
        return torch.maximum(torch.minimum(z, half), -half) / a + 0.5


class Exponential(Surrogate):
    """`height * exp(-slope * |z|)`."""

    name, parameters, positive = "exponential", ("height", "slope"), ("slope",)

    def __init__(self, height: float | Tensor = 1.0, slope: float | Tensor = 1.0, relative: bool = False) -> None:
        super().__init__(height, slope, relative=relative)

    def derivative(self, z, a, b):
        return a * torch.exp(-b * z.abs())

    def primitive(self, z, a, b):
        tail = torch.exp(-b * z.abs())
        return a / b * torch.where(z < 0, tail, 2 - tail)


class Sigmoid(Surrogate):
    """`slope * sigma(slope*z) * (1 - sigma(slope*z))`."""

    name, parameters, positive = "sigmoid", ("slope",), ("slope",)

    def __init__(self, slope: float | Tensor = 4.0, relative: bool = False) -> None:
        super().__init__(slope, relative=relative)

    def derivative(self, z, a, b):
        soft = torch.sigmoid(a * z)
        return a * soft * torch.sigmoid(-a * z)

    def primitive(self, z, a, b):
        return torch.sigmoid(a * z)


class ATan(Surrogate):
    """`(alpha/2) / (1 + (pi/2 * alpha * z)^2)`."""

    name, parameters, positive = "atan", ("alpha",), ("alpha",)

    def __init__(self, alpha: float | Tensor = 2.0, relative: bool = False) -> None:
        super().__init__(alpha, relative=relative)

    def derivative(self, z, a, b):
        return 0.5 * a / (1 + (math.pi / 2 * a * z) ** 2)

    def primitive(self, z, a, b):
        return torch.atan(math.pi / 2 * a * z) / math.pi + 0.5


class FastSigmoid(Surrogate):
    """`height / (1 + slope*|z|)^2`, also called superspike (Zenke and Ganguli 2018)."""

    name, parameters, positive = "fast_sigmoid", ("slope", "height"), ("slope",)

    def __init__(self, slope: float | Tensor = 1.0, height: float | Tensor = 1.0, relative: bool = False) -> None:
        super().__init__(slope, height, relative=relative)

    def derivative(self, z, a, b):
        return b / (1 + a * z.abs()) ** 2

    def primitive(self, z, a, b):
        return b * z / (1 + a * z.abs())


class Gaussian(Surrogate):
    """The normal density of z with the given mean and deviation sigma (NSNN; PDSG, CVPR 2025)."""

    name, parameters, positive = "gaussian", ("sigma", "mean"), ("sigma",)

    def __init__(self, sigma: float | Tensor = 1.0, mean: float | Tensor = 0.0, relative: bool = False) -> None:
        super().__init__(sigma, mean, relative=relative)

    def derivative(self, z, a, b):
        return torch.exp(-0.5 * ((z - b) / a) ** 2) / (a * math.sqrt(2 * math.pi))

    def primitive(self, z, a, b):
        return 0.5 * torch.erfc(-(z - b) / (a * math.sqrt(2)))


class Erf(Surrogate):
    """`(alpha/sqrt(pi)) * exp(-(alpha*z)^2)`."""

    name, parameters, positive = "erf", ("alpha",), ("alpha",)

    def __init__(self, alpha: float | Tensor = 2.0, relative: bool = False) -> None:
        super().__init__(alpha, relative=relative)

    def derivative(self, z, a, b):
        return a / math.sqrt(math.pi) * torch.exp(-((a * z) ** 2))

    def primitive(self, z, a, b):
        return 0.5 * torch.erf(a * z) + 0.5


class SoftSign(Surrogate):
    """`1 / (2*alpha * (1/alpha + |z|)^2)`."""

    name, parameters, positive = "softsign", ("alpha",), ("alpha",)

    def __init__(self, alpha: float | Tensor = 2.0, relative: bool = False) -> None:
        super().__init__(alpha, relative=relative)

    def derivative(self, z, a, b):
        return 0.5 / (a * (1 / a + z.abs()) ** 2)

    def primitive(self, z, a, b):
        return 0.5 * z / (1 / a + z.abs()) + 0.5


class StraightThrough(Surrogate):
    """`1`: the gradient passes the spike unchanged."""

    name = "straight_through"

    def __init__(self, relative: bool = False) -> None:
        super().__init__(relative=relative)

    def derivative(self, z, a, b):
        return torch.ones_like(z)

    def primitive(self, z, a, b):
        return z


#: Every surrogate by the name of its row.
BY_NAME: dict[str, type[Surrogate]] = {
    value.name: value for value in list(globals().values()) if isinstance(value, type) and value is not Surrogate and issubclass(value, Surrogate)
}


def check_row(surrogate: Surrogate, what: str) -> None:
    """Kernels know their own rows: another class, or one that changes a row's derivative, runs on the reference alone."""
    if BY_NAME.get(getattr(surrogate, "name", None)) is not type(surrogate):
        known = ", ".join(kind.__name__ for kind in BY_NAME.values())
        raise TypeError(
            f"{what}: the kernels have no row for the surrogate {type(surrogate).__name__}; they have {known}. Use backend='reference', which runs any, "
            "or add the row (CONTRIBUTING.md)."
        )
