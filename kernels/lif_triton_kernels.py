"""The Triton kernels: forward, backward, and the second stage of the statistics' sums.

What is not asked for is a null pointer or a zero constant and leaves no trace in the compiled kernel.

x, spikes, g_spikes, g_x: [T, count] of any floating type; all else, and all arithmetic, in `REAL`, the state's type;
statistics, their coefficients and sums in float64. Tiles, columns and folds: `lif_triton_tiles.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lif_triton_rows import (
    FIRE_GAUSSIAN,
    FIRE_NONE,
    LATE,
    REMEMBERS,
    TAKES_X,
    afresh,
    before_charge,
    charge_dp,
    charge_dv,
    charge_dx,
    fired_before,
    guard_slope,
    guard_value,
    membrane,
    membrane_gradient,
    narrow,
    next_state,
    spike,
    spike_gradient,
    surrogate_slope,
    threshold_gradient,
    widen,
)
from .lif_triton_tiles import (
    draw,
    first_state,
    fold,
    load_step,
    of_channel,
    parameter,
    put_partial,
    put_sum,
    tile,
)


@triton.jit
def forward_kernel(
    x, x_stride, v0, v_start: tl.float64, gain, p, p_value: tl.float64, theta, theta_value: tl.float64,
    v_reset: tl.float64, noise: tl.float64, seed, first_step, order, spikes, v_end, h_out, states,
    sum_mean, sum_square, sum_rate, sum_guard, delta: tl.float64,
    count, rows, period, length, segments, tiles, inner, channels,
    REAL: tl.constexpr, CHARGE: tl.constexpr, FIRE: tl.constexpr, RESET: tl.constexpr, T: tl.constexpr,
    CHUNK: tl.constexpr, STATE_EVERY: tl.constexpr, CONSTANT: tl.constexpr,
    P_KIND: tl.constexpr, P_STEPS: tl.constexpr, THETA_KIND: tl.constexpr, THETA_STEPS: tl.constexpr,
    POWER: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """T steps of charge, fire, reset.

    sum_mean float64, sum_square, sum_rate, sum_guard REAL: [blocks, T, period or segments * tiles], of one tile (column)
    each: mean of z, sum of (z - mean)^2, spikes, sum of the guard.
    """
    block, segment, along, offset, mask, channel, column = tile(COLUMNS, R, W, WIDE, rows, period, length, segments, tiles, inner)
    r, sigma, width = tl.full((), v_reset, REAL), tl.full((), noise, REAL), tl.full((), delta, REAL)
    v = first_state(REAL, R, W, v0, v_start, offset, mask)
    decay = parameter(REAL, COLUMNS, p, p_value, P_KIND, 0, channels, period, channel, column)
    threshold = parameter(REAL, COLUMNS, theta, theta_value, THETA_KIND, 0, channels, period, channel, column)
    if CONSTANT:
        x_same = tl.load(x + offset, mask=mask, other=0.0)
    if sum_mean is not None:
        valid = tl.minimum(R, rows - block * R)
        if COLUMNS == 0:
            valid = valid * tl.minimum(W, length - along * W)
        inside = valid.to(tl.float64)
    for chunk in range(0, T // CHUNK):
        # All loads of a chunk go out before its first store, behind which they would have to wait.
        loaded = ()
        for k in tl.static_range(CHUNK):
            if CONSTANT:
                loaded = loaded + (x_same,)
            else:
                loaded = loaded + (tl.load(x + tl.cast(chunk * CHUNK + k, tl.int64) * x_stride + offset, mask=mask, other=0.0),)
        for k in tl.static_range(CHUNK):
            t = chunk * CHUNK + k
            if P_STEPS:
                decay = parameter(REAL, COLUMNS, p, p_value, P_KIND, t, channels, period, channel, column)
            if THETA_STEPS:
                threshold = parameter(REAL, COLUMNS, theta, theta_value, THETA_KIND, t, channels, period, channel, column)
            current = widen(loaded[k], REAL)
            if gain is not None:
                current = tl.load(gain + t) * current
            at = tl.cast(t, tl.int64) * count + offset
            if STATE_EVERY:
                if t % STATE_EVERY == 0:
                    tl.store(states + (tl.cast(t // STATE_EVERY, tl.int64) * count + offset), v, mask=mask)
            fired = fired_before(RESET, v, threshold)
            h = membrane(CHARGE, RESET, v, current, decay, threshold, r, fired)
            z = h - threshold
            s = spike(FIRE, z, draw(FIRE, REAL, RANK, WIDE, seed, order, offset, tl.cast(first_step, tl.int64) + t), sigma)
            v = next_state(FIRE, RESET, h, s, threshold, fired, r)
            if FIRE == FIRE_NONE:
                tl.store(spikes + at, narrow(h, spikes.dtype.element_ty), mask=mask)
            else:
                tl.store(spikes + at, narrow(s, spikes.dtype.element_ty), mask=mask)
            if h_out is not None:
                tl.store(h_out + at, h, mask=mask)
            if sum_mean is not None:
                line = block * T + t
                if COLUMNS == 0:
                    line = line * (segments * tiles)
                # Float64 sums need no pilot: z has 24 bits, so means of 1e3 deviations leave 1e-10 of the variance.
                wide = tl.where(mask, z, tl.full((), 0.0, REAL)).to(tl.float64)
                mean = fold(COLUMNS, wide) / inside
                square = fold(COLUMNS, wide * wide) - inside * mean * mean
                square = tl.where(square < 0, 0.0, square)
                put_partial(COLUMNS, W, sum_mean, line, period, segment, along, tiles, mean)
                put_partial(COLUMNS, W, sum_square, line, period, segment, along, tiles, square.to(REAL))
                if sum_rate is not None:
                    put_partial(COLUMNS, W, sum_rate, line, period, segment, along, tiles, fold(COLUMNS, tl.where(mask, s, tl.full((), 0.0, REAL))))
                if sum_guard is not None:
                    held = tl.where(mask, guard_value(POWER, z, width), tl.full((), 0.0, REAL))
                    put_partial(COLUMNS, W, sum_guard, line, period, segment, along, tiles, fold(COLUMNS, held))
    tl.store(v_end + offset, v, mask=mask)


@triton.jit
def backward_kernel(
    x, x_stride, v0, v_start: tl.float64, gain, p, p_value: tl.float64, theta, theta_value: tl.float64,
    v_reset: tl.float64, noise: tl.float64, seed, first_step, order, states, mean,
    a, a_value: tl.float64, b, b_value: tl.float64,
    g_spikes, g_v, g_h_out, g_mean, g_variance, g_rate, g_guard, delta: tl.float64,
    g_x, g_v0, sum_p, sum_theta, sum_gain,
    count, rows, period, length, segments, tiles, inner, channels,
    REAL: tl.constexpr, CHARGE: tl.constexpr, FIRE: tl.constexpr, RESET: tl.constexpr, DETACH: tl.constexpr,
    SURROGATE: tl.constexpr, RELATIVE: tl.constexpr,
    T: tl.constexpr, LENGTH: tl.constexpr, CONSTANT: tl.constexpr,
    P_KIND: tl.constexpr, P_STEPS: tl.constexpr, THETA_KIND: tl.constexpr, THETA_STEPS: tl.constexpr,
    A_KIND: tl.constexpr, A_STEPS: tl.constexpr, B_KIND: tl.constexpr, B_STEPS: tl.constexpr,
    P_FOLD: tl.constexpr, THETA_FOLD: tl.constexpr,
    AHEAD: tl.constexpr, POWER: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The exact adjoint, in segments of LENGTH steps from the last to the first.

    A segment first recomputes its h forwards, in registers, from v0 (or from `states` where T > LENGTH), then walks
    backwards over them. P_FOLD, THETA_FOLD: 0 for sums over the tile, [steps, programs], 1 over its rows,
    [steps, blocks, period]; sum_gain: [T, programs]. All float64.
    """
    block, segment, along, offset, mask, channel, column = tile(COLUMNS, R, W, WIDE, rows, period, length, segments, tiles, inner)
    # What the walk back needs of the walk forward beside h.
    KEEP_X: tl.constexpr = (sum_gain is not None) or ((sum_p is not None) and ((TAKES_X >> CHARGE) & 1))
    KEEP_S: tl.constexpr = FIRE == FIRE_GAUSSIAN
    KEEP_DUE: tl.constexpr = (REMEMBERS >> RESET) & 1
    NEED_V: tl.constexpr = (sum_p is not None) or ((LATE >> RESET) & 1)
    SEGMENTS: tl.constexpr = (T + LENGTH - 1) // LENGTH
    RAGGED: tl.constexpr = T % LENGTH != 0

    zero, one = tl.full((), 0.0, REAL), tl.full((), 1.0, REAL)
    r, sigma, width = tl.full((), v_reset, REAL), tl.full((), noise, REAL), tl.full((), delta, REAL)
    decay = parameter(REAL, COLUMNS, p, p_value, P_KIND, 0, channels, period, channel, column)
    threshold = parameter(REAL, COLUMNS, theta, theta_value, THETA_KIND, 0, channels, period, channel, column)
    first = parameter(REAL, COLUMNS, a, a_value, A_KIND, 0, channels, period, channel, column)
    second = parameter(REAL, COLUMNS, b, b_value, B_KIND, 0, channels, period, channel, column)
    programs = tl.num_programs(0)
    g_carried = tl.full((R, W), 0.0, REAL)
    if g_v is not None:
        g_carried = tl.load(g_v + offset, mask=mask, other=0.0)
    if CONSTANT:
        x_same = tl.load(x + offset, mask=mask, other=0.0)
        g_x_same = tl.full((R, W), 0.0, REAL)
    if sum_p is not None:
        total_p = tl.full((R, W), 0.0, tl.float64)
    if sum_theta is not None:
        total_theta = tl.full((R, W), 0.0, tl.float64)

    for number in range(0, SEGMENTS):
        index = SEGMENTS - 1 - number
        start = index * LENGTH
        if SEGMENTS > 1:
            v = tl.load(states + (tl.cast(index, tl.int64) * count + offset), mask=mask, other=0.0)
        else:
            v = first_state(REAL, R, W, v0, v_start, offset, mask)
        v_first = v
        hs, xs = (), ()
        if KEEP_S:
            fires_bits = tl.full((R, W), 0, tl.int32)
        if KEEP_DUE:
            due_bits = tl.full((R, W), 0, tl.int32)
        for k in tl.static_range(LENGTH):
            t = start + k
            live = mask
            if RAGGED:
                live = mask & (t < T)
                t = tl.minimum(t, T - 1)
            if P_STEPS:
                decay = parameter(REAL, COLUMNS, p, p_value, P_KIND, t, channels, period, channel, column)
            if THETA_STEPS:
                threshold = parameter(REAL, COLUMNS, theta, theta_value, THETA_KIND, t, channels, period, channel, column)
            if CONSTANT:
                raw = x_same
            else:
                raw = load_step(x, start + k, T, RAGGED, x_stride, offset, mask)
            if KEEP_X:
                xs = xs + (raw,)
            current = widen(raw, REAL)
            if gain is not None:
                current = tl.load(gain + t) * current
            fired = fired_before(RESET, v, threshold)
            h = membrane(CHARGE, RESET, v, current, decay, threshold, r, fired)
            hs = hs + (h,)
            s = spike(FIRE, h - threshold, draw(FIRE, REAL, RANK, WIDE, seed, order, offset, tl.cast(first_step, tl.int64) + t), sigma)
            if KEEP_S:
                fires_bits = fires_bits | (s.to(tl.int32) << k)
            if KEEP_DUE:
                due_bits = due_bits | (fired.to(tl.int32) << k)
            v = next_state(FIRE, RESET, h, s, threshold, fired, r)

        # Loads of g_spikes go out AHEAD steps early, past the stores of g_x that would hold them up.
        arrived = ()
        if g_spikes is not None:
            for k in tl.static_range(LENGTH - 1, LENGTH - 1 - AHEAD, -1):
                arrived = arrived + (load_step(g_spikes, start + k, T, RAGGED, count, offset, mask),)
        for k in tl.static_range(LENGTH - 1, -1, -1):
            t = start + k
            live = mask
            if RAGGED:
                live = mask & (t < T)
                t = tl.minimum(t, T - 1)
            if P_STEPS:
                decay = parameter(REAL, COLUMNS, p, p_value, P_KIND, t, channels, period, channel, column)
            if THETA_STEPS:
                threshold = parameter(REAL, COLUMNS, theta, theta_value, THETA_KIND, t, channels, period, channel, column)
            if A_STEPS:
                first = parameter(REAL, COLUMNS, a, a_value, A_KIND, t, channels, period, channel, column)
            if B_STEPS:
                second = parameter(REAL, COLUMNS, b, b_value, B_KIND, t, channels, period, channel, column)
            at = tl.cast(t, tl.int64) * count + offset
            h = afresh(hs[k])
            z = h - threshold
            if KEEP_S:
                s = ((fires_bits >> k) & 1).to(REAL)
            else:
                s = spike(FIRE, z, zero, sigma)
            fired = zero
            v = v_first
            if NEED_V:
                if k > 0:
                    h_before = afresh(hs[k - 1])
                    before = threshold
                    if THETA_STEPS:
                        before = parameter(REAL, COLUMNS, theta, theta_value, THETA_KIND, tl.maximum(t - 1, 0), channels, period, channel, column)
                    if KEEP_S:
                        s_before = ((fires_bits >> (k - 1)) & 1).to(REAL)
                    else:
                        s_before = spike(FIRE, h_before - before, zero, sigma)
                    due = zero
                    if KEEP_DUE:
                        due = ((due_bits >> (k - 1)) & 1).to(REAL)
                    v = next_state(FIRE, RESET, h_before, s_before, before, due, r)
                fired = fired_before(RESET, v, threshold)

            g_s = tl.full((R, W), 0.0, REAL)
            if g_spikes is not None:
                g_s = widen(arrived[LENGTH - 1 - k], REAL)
                if k >= AHEAD:
                    arrived = arrived + (load_step(g_spikes, start + (k - AHEAD), T, RAGGED, count, offset, mask),)
            if g_rate is not None:
                g_s = g_s + of_channel(COLUMNS, g_rate, t, channels, period, channel, column).to(REAL)
            slope = zero
            if FIRE != FIRE_NONE:
                slope = surrogate_slope(SURROGATE, RELATIVE, z, threshold, first, second)
            g_spike = spike_gradient(RESET, DETACH, g_s, g_carried, h, threshold, r)
            g_h = membrane_gradient(FIRE, RESET, g_spike, g_carried, s, slope)
            through_z = zero
            if g_mean is not None:
                through_z = through_z + of_channel(COLUMNS, g_mean, t, channels, period, channel, column).to(REAL)
            if g_variance is not None:
                centre = of_channel(COLUMNS, mean, t, channels, period, channel, column)
                if REAL == tl.float64:
                    away = z - centre
                else:
                    high = centre.to(REAL)  # z - high is exact near the mean, where the float64 digits matter
                    away = (z - high) - (centre - high.to(tl.float64)).to(REAL)
                through_z = through_z + of_channel(COLUMNS, g_variance, t, channels, period, channel, column).to(REAL) * away
            if g_guard is not None:
                through_z = through_z + of_channel(COLUMNS, g_guard, t, channels, period, channel, column).to(REAL) * guard_slope(POWER, z, width)
            g_h = g_h + through_z
            if g_h_out is not None:
                g_h = g_h + tl.load(g_h_out + at, mask=live, other=0.0)

            raw = zero
            current = zero
            if KEEP_X:
                raw = widen(xs[k], REAL)
                current = raw
                if gain is not None:
                    current = tl.load(gain + t) * current
            if sum_p is not None:
                step_p = g_h * charge_dp(CHARGE, before_charge(RESET, v, fired), current, decay, r)
                step_p = tl.where(live, step_p, zero).to(tl.float64)
                if P_STEPS:
                    if RAGGED:
                        step_p = tl.where(start + k < T, step_p, 0.0)
                    put_sum(P_FOLD, COLUMNS, W, sum_p, t, start + k < T, programs, block, rows, R, period, along, step_p)
                else:
                    total_p = total_p + step_p
            if sum_theta is not None:
                step_theta = threshold_gradient(FIRE, RESET, RELATIVE, g_spike, g_carried, g_h, h, s, slope, threshold, fired, through_z)
                step_theta = tl.where(live, step_theta, zero).to(tl.float64)
                if THETA_STEPS:
                    put_sum(THETA_FOLD, COLUMNS, W, sum_theta, t, start + k < T, programs, block, rows, R, period, along, step_theta)
                else:
                    total_theta = total_theta + step_theta
            g_current = g_h * charge_dx(CHARGE, v, v, decay, r)
            if sum_gain is not None:
                step_gain = tl.where(live, g_current * raw, zero).to(tl.float64)
                put_sum(0, COLUMNS, W, sum_gain, t, start + k < T, programs, block, rows, R, period, along, step_gain)
            if gain is not None:
                g_current = g_current * tl.load(gain + t)
            if CONSTANT:
                if RAGGED:
                    g_current = tl.where(start + k < T, g_current, zero)
                g_x_same = g_x_same + g_current
            elif g_x is not None:
                tl.store(g_x + at, narrow(g_current, g_x.dtype.element_ty), mask=live)
            g_before = g_h * charge_dv(CHARGE, v, v, decay, r) * before_charge(RESET, one, fired)
            if RAGGED:
                g_before = tl.where(start + k < T, g_before, g_carried)
            g_carried = g_before

    if CONSTANT:
        if g_x is not None:
            tl.store(g_x + offset, narrow(g_x_same, g_x.dtype.element_ty), mask=mask)
    if g_v0 is not None:
        tl.store(g_v0 + offset, g_carried, mask=mask)
    if sum_p is not None:
        if not P_STEPS:
            put_sum(P_FOLD, COLUMNS, W, sum_p, 0, True, programs, block, rows, R, period, along, total_p)
    if sum_theta is not None:
        if not THETA_STEPS:
            put_sum(THETA_FOLD, COLUMNS, W, sum_theta, 0, True, programs, block, rows, R, period, along, total_theta)


@triton.jit
def statistics_kernel(
    sum_mean, sum_square, sum_rate, sum_guard, mean, variance, rate, guard,
    places, parts, across, rows, length, elements, channels,
    COLUMNS: tl.constexpr, R: tl.constexpr, W: tl.constexpr, PLACES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Second stage: [T, channels] statistics from `parts` tiles each, in a fixed order (Chan et al. 1983).

    places: T * channels; a place's part i is tile i % across of the block of rows i // across.
    """
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)[None, :]
    known = place < places
    total = tl.full((PARTS, PLACES), 0.0, tl.float64)
    total_rate, total_guard = total, total
    start = 0
    while start < parts:  # `range` takes no tensor in the interpreter
        part = start + tl.arange(0, PARTS)[:, None]
        at = (tl.cast(part // across, tl.int64) * places + place) * across + part % across
        live = known & (part < parts)
        size = tl.minimum(R, rows - part // across * R)
        if COLUMNS == 0:
            size = size * tl.minimum(W, length - part % across * W)
        total += tl.where(live, size.to(tl.float64) * tl.load(sum_mean + at, mask=live, other=0.0), 0.0)
        if rate is not None:
            total_rate += tl.load(sum_rate + at, mask=live, other=0.0).to(tl.float64)
        if guard is not None:
            total_guard += tl.load(sum_guard + at, mask=live, other=0.0).to(tl.float64)
        start += PARTS
    one_place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    inside = one_place < places
    n = tl.cast(elements, tl.float64)
    centre = fold(1, total) / n
    tl.store(mean + one_place, centre, mask=inside)
    if rate is not None:
        tl.store(rate + one_place, fold(1, total_rate) / n, mask=inside)
    if guard is not None:
        tl.store(guard + one_place, fold(1, total_guard) / n, mask=inside)
    square = tl.full((PARTS, PLACES), 0.0, tl.float64)
    start = 0
    while start < parts:
        part = start + tl.arange(0, PARTS)[:, None]
        at = (tl.cast(part // across, tl.int64) * places + place) * across + part % across
        live = known & (part < parts)
        size = tl.minimum(R, rows - part // across * R)
        if COLUMNS == 0:
            size = size * tl.minimum(W, length - part % across * W)
        away = tl.load(sum_mean + at, mask=live, other=0.0) - centre[None, :]
        square += tl.where(live, tl.load(sum_square + at, mask=live, other=0.0).to(tl.float64) + size.to(tl.float64) * away * away, 0.0)
        start += PARTS
    tl.store(variance + one_place, fold(1, square) / n, mask=inside)
