"""The random numbers of attacks: SplitMix64, one stream for each sample."""

import torch
from cases import assert_same_bits
from fastsnn.attacks import Streams
from fastsnn.attacks.streams import GOLDEN, _mix


def split_mix(seed: int, index: int, count: int) -> list[int]:
    """The numbers of a stream in Python's integers."""
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    key = mix(mix(seed & mask) + (index + 1) * golden & mask)
    return [mix(key + k * golden & mask) for k in range(1, count + 1)]


def test_streams_are_splitmix64():
    # The published sequence from the state 1234567: the output function and the constant of the step.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [value % 2**64 for value in _mix(1234567 + torch.arange(1, 6) * GOLDEN).tolist()] == known
    for seed in (0, 7, -1, 2**63 - 1):
        streams = Streams(seed, torch.tensor([0, 3, 10**9]))
        found = torch.cat([streams.bits(2).flatten(1), streams.bits(3, 1).flatten(1)], 1)
        for row, index in zip(found.tolist(), (0, 3, 10**9)):
            assert [value % 2**64 for value in row] == split_mix(seed, index, 5)
    assert_same_bits("a tensor as seed", Streams(torch.tensor([7]), torch.arange(3)).bits(4), Streams(7, torch.arange(3)).bits(4))


def test_streams_of_some_samples_go_on():
    streams = Streams(1, torch.arange(5))
    streams.uniform(3)
    part = streams[torch.tensor([True, False, True, False, True])]
    assert len(part) == 3
    assert_same_bits("numbers", part.bits(2), streams.bits(2)[::2])


def test_distributions():
    streams = Streams(3, torch.arange(200))
    for dtype in (torch.float32, torch.float64):
        uniform, normal, signs = streams.uniform(500, dtype=dtype), streams.normal(500, dtype=dtype), streams.signs(500, dtype=dtype)
        assert uniform.dtype == normal.dtype == signs.dtype == dtype
        assert uniform.min() >= 0 and uniform.max() < 1
        # 1e5 numbers: five standard errors of the mean, of the variance
        assert abs(uniform.mean() - 0.5) < 5 * 12**-0.5 / 316 and abs(uniform.var() - 1 / 12) < 5 * 180**-0.5 / 316
        assert abs(normal.mean()) < 5 / 316 and abs(normal.var() - 1) < 5 * 2**0.5 / 316
        assert abs(signs.mean()) < 5 / 316 and set(signs.unique().tolist()) == {-1, 1}
    counts = streams.integers(7, 500).flatten().bincount(minlength=7)
    assert len(counts) == 7 and ((counts - 1e5 / 7).abs() < 5 * (1e5 / 7) ** 0.5).all()
    neighbours = torch.corrcoef(Streams(3, torch.arange(50)).normal(2000))
    assert (neighbours - torch.eye(50)).abs().max() < 5 / 2000**0.5
