"""Where a Triton program works, and how it reads and sums: the parts that the kernels share.

A program owns a tile [R, W] of neurons and runs all T steps over it. With `COLUMNS` 0 a tile lies inside one channel
(or, where nothing depends on the channel, anywhere) and sums fold it into one number; with `COLUMNS` 1 it spans W of
the `period` columns and R of the rows in which they repeat, and sums fold the rows.
"""

from __future__ import annotations

import triton.language as tl

from .lif_triton_rows import FIRE_GAUSSIAN, device, uniform


@device
def tile(COLUMNS: tl.constexpr, R: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr, rows, period, length, segments, tiles, inner):
    """Where this program works: (block of rows, segment, tile of the segment), then offsets, mask, channel and column."""
    program = tl.program_id(0)
    along = program % tiles
    segment = program // tiles % segments
    block = program // tiles // segments
    lane = along * W + tl.arange(0, W)[None, :]
    row = block * R + tl.arange(0, R)[:, None]
    mask = (row < rows) & (lane < length)
    if WIDE:
        row = row.to(tl.int64)
        column = tl.cast(segment, tl.int64) * length + lane
    else:
        column = segment * length + lane
    if COLUMNS:
        channel = column // inner
    else:
        channel = segment
    return block, segment, along, row * period + column, mask, channel, column


@device
def of_channel(COLUMNS: tl.constexpr, pointer, t, channels, period, channel, column):
    """Row t of a table [T, channels]."""
    if COLUMNS:
        result = tl.load(pointer + (t * channels + channel), mask=column < period, other=1.0)
    else:
        result = tl.load(pointer + (t * channels + channel))
    return result


@device
def parameter(REAL: tl.constexpr, COLUMNS: tl.constexpr, pointer, value, KIND: tl.constexpr, t, channels, period, channel, column):
    """A parameter at step t: a number (KIND 0), or from a tensor with 1 (1), channels (2) or period (3) columns."""
    if KIND == 0:
        result = tl.full((), value, REAL)
    elif KIND == 1:
        result = tl.load(pointer + t)
    elif KIND == 2:
        result = of_channel(COLUMNS, pointer, t, channels, period, channel, column)
    else:
        result = tl.load(pointer + (tl.cast(t, tl.int64) * period + column), mask=column < period, other=1.0)
    return result


@device
def draw(FIRE: tl.constexpr, REAL: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr, seed, order, offset, step):
    """The uniform numbers of one step, by the place of a neuron in N, C, *S order; a zero where firing needs none."""
    if FIRE == FIRE_GAUSSIAN:
        index = offset
        if RANK:
            index = offset * 0
            for k in tl.static_range(RANK):
                index += offset // order[3 * k] % order[3 * k + 1] * order[3 * k + 2]
        high = tl.full((), 0, tl.uint32)
        if WIDE:
            high = (index >> 32).to(tl.uint32)
        u = uniform(REAL, tl.load(seed), index.to(tl.uint32), high, tl.cast(step, tl.uint32))
    else:
        u = tl.full((), 0.0, REAL)
    return u


@device
def first_state(REAL: tl.constexpr, R: tl.constexpr, W: tl.constexpr, v0, v_start, offset, mask):
    if v0 is not None:
        v = tl.load(v0 + offset, mask=mask, other=0.0)
    else:
        v = tl.full((R, W), v_start, REAL)
    return v


@device
def load_step(pointer, t, T: tl.constexpr, RAGGED: tl.constexpr, stride, offset, mask):
    """One step of [T, count]; zeros where RAGGED says that t may lie beyond T."""
    if RAGGED:
        mask = mask & (t < T)
    return tl.load(pointer + (tl.cast(t, tl.int64) * stride + offset), mask=mask, other=0.0)


@device
def fold(COLUMNS: tl.constexpr, value):
    """The sum over a tile, or over its rows."""
    if COLUMNS:
        total = tl.reduce(value, 0, tl.standard._sum_combine)
    else:
        total = tl.reduce(value, None, tl.standard._sum_combine)
    return total


@device
def put_partial(COLUMNS: tl.constexpr, W: tl.constexpr, pointer, at, period, segment, along, tiles, value):
    """One step's sums to their place in a line of partial sums: by column, or by segment and tile."""
    if COLUMNS:
        column = along * W + tl.arange(0, W)
        tl.store(pointer + (at * period + column), value, mask=column < period)
    else:
        tl.store(pointer + (at + segment * tiles + along), value)


@device
def put_sum(FOLD: tl.constexpr, COLUMNS: tl.constexpr, W: tl.constexpr, pointer, t, live, programs, block, rows, R: tl.constexpr, period, along, value):
    """A tile's part of a parameter's gradient at step t: folded over its rows (FOLD 1) or altogether."""
    if FOLD:
        blocks = (rows + R - 1) // R
        column = along * W + tl.arange(0, W)
        tl.store(pointer + (tl.cast(t * blocks + block, tl.int64) * period + column), fold(1, value), mask=(column < period) & live)
    else:
        tl.store(pointer + (tl.cast(t, tl.int64) * programs + tl.program_id(0)), fold(0, value), mask=live)
