"""The Triton kernel of the backward pass under an approximation: bptr, spatial, hart, rga."""

from __future__ import annotations

import triton
import triton.language as tl

from .lif_triton_rows import (
    charge_dx,
    divide,
    fired_before,
    membrane,
    narrow,
    next_state,
    rga_weight,
    spike,
    surrogate_slope,
    widen,
)
from .lif_triton_tiles import (
    draw,
    first_state,
    parameter,
    tile,
)


@triton.jit
def straight_kernel(
    x, x_stride, v0, v_start: tl.float64, gain, p, p_value: tl.float64, theta, theta_value: tl.float64,
    v_reset: tl.float64, noise: tl.float64, seed, first_step, order,
    a, a_value: tl.float64, b, b_value: tl.float64, g_spikes, g_x, gamma: tl.float64,
    count, rows, period, length, segments, tiles, inner, channels,
    REAL: tl.constexpr, CHARGE: tl.constexpr, FIRE: tl.constexpr, RESET: tl.constexpr,
    SURROGATE: tl.constexpr, RELATIVE: tl.constexpr, ADJOINT: tl.constexpr, LEAK: tl.constexpr,
    T: tl.constexpr, CHUNK: tl.constexpr, CONSTANT: tl.constexpr,
    P_KIND: tl.constexpr, P_STEPS: tl.constexpr, THETA_KIND: tl.constexpr, THETA_STEPS: tl.constexpr,
    A_KIND: tl.constexpr, A_STEPS: tl.constexpr, B_KIND: tl.constexpr, B_STEPS: tl.constexpr,
    RANK: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """g_x under an approximation (ADJOINT 1 bptr, 2 spatial, 3 hart, 4 rga): one pass gathers what a neuron needs over
    time, a second writes; `spatial` gathers nothing. LEAK: how the leak factor follows from the charge parameter p,
    0 p, 1 1 - p, 2 1 - 1/p."""
    block, segment, along, offset, mask, channel, column = tile(COLUMNS, R, W, WIDE, rows, period, length, segments, tiles, inner)
    zero, one, steps = tl.full((), 0.0, REAL), tl.full((), 1.0, REAL), tl.full((), T, REAL)
    r, sigma = tl.full((), v_reset, REAL), tl.full((), noise, REAL)
    v = first_state(REAL, R, W, v0, v_start, offset, mask)
    gathered, g_x_same = tl.full((R, W), 0.0, REAL), tl.full((R, W), 0.0, REAL)
    leak = parameter(REAL, COLUMNS, p, p_value, P_KIND, 0, channels, period, channel, column)
    threshold = parameter(REAL, COLUMNS, theta, theta_value, THETA_KIND, 0, channels, period, channel, column)
    first = parameter(REAL, COLUMNS, a, a_value, A_KIND, 0, channels, period, channel, column)
    second = parameter(REAL, COLUMNS, b, b_value, B_KIND, 0, channels, period, channel, column)
    sum_p, sum_theta = leak * zero, threshold * zero
    for chunk in range(0, T // CHUNK):
        for k in tl.static_range(CHUNK):
            t = chunk * CHUNK + k
            if P_STEPS:
                leak = parameter(REAL, COLUMNS, p, p_value, P_KIND, t, channels, period, channel, column)
            if THETA_STEPS:
                threshold = parameter(REAL, COLUMNS, theta, theta_value, THETA_KIND, t, channels, period, channel, column)
            current = widen(tl.load(x + tl.cast(t, tl.int64) * x_stride + offset, mask=mask, other=0.0), REAL)
            if gain is not None:
                current = tl.load(gain + t) * current
            at = tl.cast(t, tl.int64) * count + offset
            if ADJOINT == 4:
                gathered = gathered + divide(current, threshold)
                sum_p, sum_theta = sum_p + leak, sum_theta + threshold
            else:
                fired = fired_before(RESET, v, threshold)
                h = membrane(CHARGE, RESET, v, current, leak, threshold, r, fired)
                z = h - threshold
                s = spike(FIRE, z, draw(FIRE, REAL, RANK, WIDE, seed, order, offset, tl.cast(first_step, tl.int64) + t), sigma)
                v = next_state(FIRE, RESET, h, s, threshold, fired, r)
                if ADJOINT == 1:
                    gathered = gathered + s
                else:
                    if A_STEPS:
                        first = parameter(REAL, COLUMNS, a, a_value, A_KIND, t, channels, period, channel, column)
                    if B_STEPS:
                        second = parameter(REAL, COLUMNS, b, b_value, B_KIND, t, channels, period, channel, column)
                    g = widen(tl.load(g_spikes + at, mask=mask, other=0.0), REAL)
                    g = g * surrogate_slope(SURROGATE, RELATIVE, z, threshold, first, second) * charge_dx(CHARGE, v, v, leak, r)
                    if ADJOINT == 3:
                        gathered = gathered + g
                    else:
                        if gain is not None:
                            g = g * tl.load(gain + t)
                        if CONSTANT:
                            g_x_same = g_x_same + g
                        else:
                            tl.store(g_x + at, narrow(g, g_x.dtype.element_ty), mask=mask)
    if ADJOINT == 4:
        if P_STEPS:
            leak = divide(sum_p, steps)
        if THETA_STEPS:
            threshold = divide(sum_theta, steps)
        if LEAK == 1:
            leak = one - leak
        elif LEAK == 2:
            leak = one - divide(one, leak)
        weight = rga_weight(divide(gathered, steps), leak, tl.full((), gamma, REAL))
    elif ADJOINT == 1:
        weight = tl.where(gathered > zero, one, zero)
    if ADJOINT != 2:
        for t in range(0, T):
            at = tl.cast(t, tl.int64) * count + offset
            if ADJOINT == 3:
                g = divide(gathered, steps)
            else:
                g = widen(tl.load(g_spikes + at, mask=mask, other=0.0), REAL) * weight
            if ADJOINT == 4:
                g = divide(g, threshold)
            if gain is not None:
                g = g * tl.load(gain + t)
            if CONSTANT:
                g_x_same = g_x_same + g
            else:
                tl.store(g_x + at, narrow(g, g_x.dtype.element_ty), mask=mask)
    if CONSTANT:
        tl.store(g_x + offset, narrow(g_x_same, g_x.dtype.element_ty), mask=mask)
