"""From images to input currents: what the first layer sees at each step.

Every encoding takes images [N, C, H, W], pixels in [0, 1], and returns [T, N, C, H, W], or [1, N, C, H, W] for a constant
current.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adjoints import nearest

__all__ = ["ENCODINGS", "RSC", "Direct", "Encoding", "Frequency", "Latency", "Poisson", "make_encoding", "radii_of"]


class Encoding(nn.Module):
    """The base of all encodings; a subclass writes `encode(images) -> [T or 1, N, C, H, W]`.

    random: whether two calls differ. after_normalisation: whether it takes the normalised image, else pixels.
    normalises: whether its model normalises at all; None: as the model is asked to.
    seed: None draws from torch's generator; an int gives the same random numbers at each call.
    """

    random = False
    after_normalisation = False
    normalises: bool | None = None

    def __init__(self, steps: int) -> None:
        super().__init__()
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"{type(self).__name__}: steps is {steps!r}; wanted an int >= 1.")
        self.steps = steps
        self.seed: int | None = None

    def encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no method encode(images); wanted one that returns [T or 1, N, C, H, W].")

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4:
            raise ValueError(f"{type(self).__name__}: images has shape {list(images.shape)}; wanted [N, C, H, W]. One image is images[None].")
        if not images.is_floating_point():
            raise TypeError(f"{type(self).__name__}: images is {images.dtype}; wanted floats, pixels in [0, 1]. Convert them, for example images.float() / 255.")
        return self.encode(images)

    def _generator(self, device: torch.device) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def extra_repr(self) -> str:
        return f"steps={self.steps}" + ("" if self.seed is None else f", seed={self.seed}")


def _wide(x: Tensor) -> torch.dtype:
    """The dtype for random numbers and transforms: not coarser than float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Direct(Encoding):
    """Direct coding: the image as a constant current, `y[t] = x`. Returns the view [1, N, C, H, W].

    steps: T, for the layers that follow (Rueckauer et al., 2017).
    """

    after_normalisation = True

    def encode(self, images: Tensor) -> Tensor:
        return images[None]


class Poisson(Encoding):
    """Rate coding with fresh uniform random numbers u: `y[t] = 1[x >= u[t]]`, a spike with probability x.

    signed=True, for normalised images: `y[t] = sign(x)*1[2*u[t] <= |x|]` (BNTT: Kim & Panda, 2021). Backward: the
    identity, so that the gradient of x is the sum over t of the gradients of y[t]. With a `seed`, a graph that
    `torch.compile` makes is broken here.
    """

    random = True

    def __init__(self, steps: int, signed: bool = False) -> None:
        super().__init__(steps)
        self.signed = signed
        self.after_normalisation = signed
        self.normalises = signed

    def encode(self, images: Tensor) -> Tensor:
        x = images.detach()
        u = torch.rand((self.steps, *x.shape), dtype=_wide(x), device=x.device, generator=self._generator(x.device))
        spikes = torch.where(2 * u <= x.abs(), x.sign(), 0) if self.signed else (x >= u).to(x.dtype)
        return spikes + (images - x)  # the bracket is zero; it carries the gradient

    def extra_repr(self) -> str:
        return super().extra_repr() + ", signed=True" * self.signed


class RSC(Encoding):
    """Randomised smoothing coding: `y[t] = x + noise[t]`, noise ~ N(0, sigma**2), fresh at each step, before normalisation.

    sigma: in pixels; 0.1 is a reading, since no value is published. Backward: the identity (RSC-SNN, Wu et al., 2024).
    With a `seed`, a graph that `torch.compile` makes is broken here.
    """

    random = True

    def __init__(self, steps: int, sigma: float = 0.1) -> None:
        super().__init__(steps)
        if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not sigma >= 0:
            raise ValueError(f"RSC: sigma is {sigma!r}; wanted a standard deviation in pixels, a number >= 0.")
        self.sigma = float(sigma)

    def encode(self, images: Tensor) -> Tensor:
        noise = torch.randn((self.steps, *images.shape), dtype=_wide(images), device=images.device, generator=self._generator(images.device))
        return images + (self.sigma * noise).to(images.dtype)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", sigma={self.sigma:g}"


class Latency(Encoding):
    """Time to first spike: each pixel spikes once, brighter ones earlier, `y[t] = 1[t = floor((1 - x)*T)]`, black ones never.

    The step is held within 0 ... T-1: x = 1 spikes at step 0, the darkest grey at T-1, x <= 0 at none. Backward, a reading:
    the gradient of x is that of y at the pixel's own step; a black pixel's is that of step T-1, where it would spike if it
    were brighter.
    """

    normalises = False

    def encode(self, images: Tensor) -> Tensor:
        x = images.detach()
        step = ((1 - x.to(_wide(x))) * self.steps).floor().clamp(0, self.steps - 1)
        steps = torch.arange(self.steps, device=x.device, dtype=step.dtype).view(-1, 1, 1, 1, 1)
        own = (step == steps).to(x.dtype)
        return own * (x > 0) + own * (images - x)  # the bracket is zero; it carries the gradient


def radii_of(size: int, steps: int) -> tuple[int, ...]:
    """FEEL's radii for images of `size` pixels: one for each step, from half the size downward.

    Published: 16, 14, 12 ... 2 for 32 pixels and T = 8, the first four for T = 4; 32, 30, 28, 26 for 64 pixels. These
    sequences are continued while they stay positive. Other sizes and longer T are a reading, in proportion to 32 pixels:
    `r[t] = round(size/2*(1 - t/max(T, 8)))`, at least 1.
    """
    half = (size + 1) // 2
    if size in (32, 64) and half > 2 * (steps - 1):
        return tuple(half - 2 * t for t in range(steps))
    return tuple(max(1, int(half * (1 - t / max(steps, 8)) + 0.5)) for t in range(steps))


class Frequency(Encoding):
    """FEEL's frequency encoding: step t sees the frequencies within its radius, `y[t] = |IFFT2(ifftshift(M[t]*fftshift(FFT2 x)))|`.

    M[t] is 1 on the centred box [H/2 - r[t], H/2 + r[t]) of rows, and the same of columns. radii: r, T ints, for rows and
    columns alike; None: `radii_of` the height and the width. A radius of half the size or more returns |x|. The gradient
    flows through |.|; no input normalisation (FEEL-SNN, Xu et al., NeurIPS 2024).
    """

    normalises = False

    def __init__(self, steps: int, radii: tuple[int, ...] | None = None) -> None:
        super().__init__(steps)
        if radii is not None:
            radii = tuple(radii)
            if len(radii) != steps or not all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in radii):
                raise ValueError(f"Frequency: radii is {radii}; wanted {steps} ints >= 1, one for each step.")
        self.radii = radii

    def encode(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        rows = self.radii or radii_of(height, self.steps)
        columns = self.radii or radii_of(width, self.steps)
        spectrum = torch.fft.fftshift(torch.fft.fft2(images.to(_wide(images))), dim=(-2, -1))
        boxes = torch.stack([_box(spectrum, r, c) for r, c in zip(rows, columns)])
        return torch.fft.ifft2(torch.fft.ifftshift(boxes, dim=(-2, -1))).abs().to(images.dtype)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.radii is None else f", radii={self.radii}")


def _box(spectrum: Tensor, r: int, c: int) -> Tensor:
    """The spectrum within r rows and c columns of its centre, and zero elsewhere."""
    height, width = spectrum.shape[-2:]
    top, bottom = max(0, height // 2 - r), min(height, height // 2 + r)
    left, right = max(0, width // 2 - c), min(width, width // 2 + c)
    return F.pad(spectrum[..., top:bottom, left:right], (left, width - right, top, height - bottom))


#: The encodings by name.
ENCODINGS: dict[str, type[Encoding]] = {"direct": Direct, "poisson": Poisson, "rsc": RSC, "latency": Latency, "frequency": Frequency}


def make_encoding(name: str, steps: int, **options) -> Encoding:
    """The encoding of a name in `ENCODINGS`, with the options of its class.

    >>> make_encoding("poisson", steps=8, signed=True)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([8, 2, 3, 32, 32])
    """
    if name not in ENCODINGS:
        raise ValueError(f"make_encoding: encoding {name!r} is unknown; wanted one of {', '.join(ENCODINGS)}.{nearest(name, tuple(ENCODINGS))}")
    known = tuple(option for option in inspect.signature(ENCODINGS[name]).parameters if option != "steps")
    for option in options:
        if option not in known:
            wanted = f"wanted some of {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"make_encoding: {name} has no option {option!r}; {wanted}.{nearest(option, known)}")
    return ENCODINGS[name](steps, **options)
