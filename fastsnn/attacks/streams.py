"""Random numbers of attacks: a stream for each sample, so that batch boundaries change nothing."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Streams"]


def _signed(value: int) -> int:
    """64 bits as int64 holds them: its sums and products wrap as unsigned ones do."""
    return value - 2**64 if value >= 2**63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
FIRST, SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: int64's own copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function: a bijection of 64 bits."""
    z = (z ^ _shift(z, 30)) * FIRST
    z = (z ^ _shift(z, 27)) * SECOND
    return z ^ _shift(z, 31)


class Streams:
    """One stream of random numbers for each sample, keyed by (seed, index of the sample).

    The stream of a sample is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, figure 17): its k-th number is
    `mix(key + k*golden)`, with `key = mix(mix(seed) + (index + 1)*golden)`. All numbers of a draw are computed at once,
    some ten integer operations each and no state on the device; integers and uniform numbers are the same bits on every
    device, in every batch and in every memory format.

    seed: an int of 64 bits, or an int64 tensor of one element, which is not read on the host.
    indices: [N] int64, the samples' places in the data set.

    >>> streams = Streams(7, torch.arange(128))
    >>> start = streams.uniform(3, 32, 32)  # [128, 3, 32, 32] in [0, 1)
    >>> streams = streams[torch.arange(64)]  # the first 64 go on alone, from where they are
    """

    def __init__(self, seed: int | Tensor, indices: Tensor) -> None:
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
            got = f"{indices.dtype} {list(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"Streams: indices is {got}; wanted int64 [N], the samples' places in the data set.")
        if not isinstance(seed, Tensor):
            if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
                raise TypeError(f"Streams: seed is {seed!r}; wanted an int of 64 bits or an int64 tensor of one element.")
            seed = torch.full((1,), seed, dtype=torch.int64, device=indices.device)
        self._keys = _mix(_mix(seed.reshape(1)) + (indices + 1) * GOLDEN)
        self._position = 0

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, samples: Tensor | slice) -> Streams:
        """The streams of some samples (a mask, indices or a slice), which go on from here; this one does not advance."""
        part = object.__new__(Streams)
        part._keys, part._position = self._keys[samples], self._position
        return part

    def fork(self) -> Streams:
        """Streams of the same samples with numbers of their own, for a part of the work; this one advances by one number."""
        other = object.__new__(Streams)
        other._keys, other._position = _mix(self.bits()), 0
        return other

    def bits(self, *shape: int) -> Tensor:
        """[N, *shape] int64: 64 random bits each."""
        count = torch.Size(shape).numel()
        places = torch.arange(self._position + 1, self._position + count + 1, device=self._keys.device) * GOLDEN
        self._position += count
        return _mix(self._keys[:, None] + places).reshape(len(self), *shape)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, *shape] uniform in [0, 1): multiples of 2^-24, of 2^-53 in float64 (narrower dtypes round, also up to 1)."""
        if dtype == torch.float64:
            return _shift(self.bits(*shape), 11).double() * 2.0**-53
        return (_shift(self.bits(*shape), 40).float() * 2.0**-24).to(dtype)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, *shape] standard normal, by inversion; equal to rounding on different devices."""
        inside = (_shift(self.bits(*shape), 12).double() + 0.5) * 2.0**-52  # neither 0 nor 1
        return torch.special.ndtri(inside).to(dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """[N, *shape] int64 uniform over 0 ... high-1."""
        if high < 1:
            raise ValueError(f"Streams: high is {high}; wanted an int >= 1.")
        return (_shift(self.bits(*shape), 11).double() * 2.0**-53 * high).long()

    def signs(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, *shape] of -1 and 1."""
        return 1 - 2 * _shift(self.bits(*shape), 63).to(dtype)
