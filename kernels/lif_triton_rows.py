"""The tables and the recurrence of the LIF operator as Triton functions: `lif.h` once more, from the same rows.

At import the text of each row of `lif.def` becomes a branch of a Triton function, so a row added there is known here.
A table's function takes the row's id as `KIND`, a compile-time constant: no branch is left in the compiled kernel.
All values are tensors of one floating type, the state's.
"""

from __future__ import annotations

import linecache
import re

import triton
import triton.language as tl

from fastsnn.tables import DELAYED_RESETS, FIRES, RESETS, read_rows

#: Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported).
INTERPRETED = bool(triton.knobs.runtime.interpret)


def device(function):
    """A function that kernels call. The interpreter patches its language at each call of a jitted function; once is enough."""
    return function if INTERPRETED else triton.jit(function)


FIRE_NONE = tl.constexpr(FIRES.index("none"))
FIRE_GAUSSIAN = tl.constexpr(FIRES.index("gaussian"))
#: Bit i: reset i comes one step late.
LATE = tl.constexpr(sum(1 << RESETS.index(name) for name in DELAYED_RESETS))
#: Bit i: the spike's gradient passes through reset i.
JUMPS = tl.constexpr(sum(1 << i for i, row in enumerate(read_rows("RESET")) if row[6] != "lit(0.0)"))
#: Bit i: the state after reset i depends on whether a delayed reset was due.
REMEMBERS = tl.constexpr(sum(1 << i for i, row in enumerate(read_rows("RESET")) if re.search(r"\bfired\b", row[4])))
#: Bit i: the derivative of charge i by its parameter takes the current.
TAKES_X = tl.constexpr(sum(1 << i for i, row in enumerate(read_rows("CHARGE")) if re.search(r"\bx\b", row[5])))


@device
def divide(a, b):
    # `/` is the quick approximation in float32 and the IEEE quotient in float64.
    if a.dtype == tl.float64:
        quotient = a / b
    else:
        quotient = tl.div_rn(a, b)
    return quotient


IN_NUMPY = tl.constexpr(INTERPRETED)


@device
def widen(value, REAL: tl.constexpr):
    """To the state's type. The interpreter converts bfloat16 by its own rules; its bits are those of a float32."""
    if IN_NUMPY and value.dtype == tl.bfloat16:
        wide = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = value.to(REAL)
    return wide


@device
def narrow(value, TYPE: tl.constexpr):
    """To the type of x, rounded to nearest even, which the interpreter does not do for bfloat16."""
    if IN_NUMPY and TYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value != value, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(TYPE)
    return result


@device
def afresh(value):
    """The same value, but unknown to the compiler: what follows from it is computed again, not kept in registers."""
    if IN_NUMPY:
        same = value
    elif value.dtype == tl.float64:
        same = tl.inline_asm_elementwise("mov.b64 $0, $1;", "=d,d", [value], dtype=tl.float64, is_pure=False, pack=1)
    else:
        same = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=False, pack=1)
    return same


@device
def absolute(y):
    return tl.abs(y)


@device
def maximum(a, b):
    return tl.where(b > a, b, a)


@device
def select(condition, yes, no):
    return tl.where(condition, yes, no)


@device
def exponential(y):
    return tl.exp(y)


def _expression(cell: str) -> str:
    """A cell's text in Triton; literals take the state's type, or they would be float32 in float64 arithmetic."""
    return re.sub(r"\blit\(([^()]*)\)", r"tl.full((), \1, REAL)", cell)


def _formula(name: str, argument: str, value: str) -> str:
    return f"@device\ndef {name}({argument}):\n    REAL: tl.constexpr = {argument}.dtype\n    return {_expression(value)}\n"


def _choice(name: str, arguments: str, table: str, cell: int) -> str:
    """Source of a function that evaluates column `cell` of the row KIND; its type is that of the first argument."""
    lines = ["@device", f"def {name}(KIND: tl.constexpr, {arguments}):", f"    REAL: tl.constexpr = {arguments.split(',')[0]}.dtype"]
    for number, row in enumerate(read_rows(table)):
        lines += [f"    {'el' if number else ''}if KIND == {number}:", f"        result = {_expression(row[cell])}"]
    return "\n".join([*lines, "    else:", f'        tl.static_assert(False, "{table} has no such row")', "    return result", ""])


def _source() -> str:
    charge, surrogate = "v, x, p, r", "z, a, b"
    return "\n".join([
        *(_formula(*row) for row in read_rows("FORMULA")),
        _choice("charge_plain", charge, "CHARGE", 2),
        _choice("charge_dx", charge, "CHARGE", 3),
        _choice("charge_dv", charge, "CHARGE", 4),
        _choice("charge_dp", charge, "CHARGE", 5),
        _choice("fires", "z, u, sigma", "FIRE", 1),
        _choice("before_charge", "v, fired", "RESET", 2),
        _choice("after_charge", "h, threshold, fired", "RESET", 3),
        _choice("reset_state", "h, s, threshold, fired, r", "RESET", 4),
        _choice("reset_keep", "s", "RESET", 5),
        _choice("reset_jump", "h, threshold, r", "RESET", 6),
        _choice("reset_threshold_term", "g_v, g_h, s, fired", "RESET", 7),
        _choice("surrogate_plain", surrogate, "SURROGATE", 3),
    ])


_FILE = "<kernels/lif.def in Triton>"
_text = _source()
linecache.cache[_FILE] = (len(_text), None, _text.splitlines(keepends=True), _FILE)  # where Triton looks for the source
exec(compile(_text, _FILE, "exec"), globals())


@device
def fired_before(RESET: tl.constexpr, v, threshold):
    """1 where a delayed reset is due: the carried membrane is above the threshold."""
    zero = tl.full((), 0.0, v.dtype)
    if (LATE >> RESET) & 1:
        fired = tl.where(v - threshold > zero, tl.full((), 1.0, v.dtype), zero)
    else:
        fired = zero
    return fired


@device
def membrane(CHARGE: tl.constexpr, RESET: tl.constexpr, v, x, p, threshold, r, fired):
    """The membrane before the spike, h."""
    return after_charge(RESET, charge_plain(CHARGE, before_charge(RESET, v, fired), x, p, r), threshold, fired)


@device
def spike(FIRE: tl.constexpr, z, u, sigma):
    return tl.where(fires(FIRE, z, u, sigma), tl.full((), 1.0, z.dtype), tl.full((), 0.0, z.dtype))


@device
def next_state(FIRE: tl.constexpr, RESET: tl.constexpr, h, s, threshold, fired, r):
    """The carried state after the spike."""
    if FIRE == FIRE_NONE:
        v = h
    else:
        v = reset_state(RESET, h, s, threshold, fired, r)
    return v


@device
def surrogate_slope(SURROGATE: tl.constexpr, RELATIVE: tl.constexpr, z, threshold, a, b):
    """ds/dh: the surrogate at z, or, relative, at z / threshold, by the chain rule divided by the threshold."""
    if RELATIVE:
        slope = divide(surrogate_plain(SURROGATE, divide(z, threshold), a, b), threshold)
    else:
        slope = surrogate_plain(SURROGATE, z, a, b)
    return slope


@device
def spike_gradient(RESET: tl.constexpr, DETACH: tl.constexpr, g_s, g_v, h, threshold, r):
    """The gradient of the spike as the recurrence sees it: from outside, and through the reset unless detached."""
    if DETACH or not ((JUMPS >> RESET) & 1):
        g_spike = g_s
    else:
        g_spike = g_s + g_v * reset_jump(RESET, h, threshold, r)
    return g_spike


@device
def membrane_gradient(FIRE: tl.constexpr, RESET: tl.constexpr, g_spike, g_v, s, slope):
    """The gradient of h, without what the statistics and the kept membrane add."""
    if FIRE == FIRE_NONE:
        g_h = g_v + g_spike  # the output is h itself
    else:
        g_h = g_v * reset_keep(RESET, s) + g_spike * slope
    return g_h


@device
def threshold_gradient(FIRE: tl.constexpr, RESET: tl.constexpr, RELATIVE: tl.constexpr, g_spike, g_v, g_h, h, s, slope, threshold, fired, extra_z):
    """What a step adds to the gradient of the threshold; extra_z: the part of g_h that is a function of z."""
    if FIRE == FIRE_NONE:
        g = -extra_z
    else:
        path = g_spike * slope
        if RELATIVE:
            path = path * divide(h, threshold)
        g = -(path + reset_threshold_term(RESET, g_v, g_h, s, fired) + extra_z)
    return g


@device
def guard_slope(POWER: tl.constexpr, z, delta):
    """d/dz of max(0, delta - |z|)^POWER."""
    zero = tl.full((), 0.0, z.dtype)
    room = delta - tl.abs(z)
    if POWER == 0:
        size = zero
    elif POWER == 1:
        size = tl.full((), 1.0, z.dtype)
    else:
        size = tl.full((), 2.0, z.dtype) * room
    return tl.where(room > zero, tl.where(z > zero, -size, tl.where(z < zero, size, zero)), zero)


@device
def guard_value(POWER: tl.constexpr, z, delta):
    zero = tl.full((), 0.0, z.dtype)
    room = delta - tl.abs(z)
    if POWER == 0:
        value = tl.full((), 1.0, z.dtype)
    elif POWER == 1:
        value = room
    else:
        value = room * room
    return tl.where(room > zero, value, tl.where(z != z, z, zero))


@device
def rga_weight(mean_input, tau, gamma):
    """RGA (Bu et al. 2023): the weight on the mean input in units of the threshold; tau is the leak factor."""
    one, zero = tl.full((), 1.0, tau.dtype), tl.full((), 0.0, tau.dtype)
    high = divide(one - gamma + gamma * tau, one + tau)
    rest = one - tau
    inner = (mean_input >= zero) & (mean_input <= rest)
    outer = (mean_input > rest) & (mean_input <= tl.full((), 2.0, tau.dtype))
    return tl.where(inner, gamma, tl.where(outer, high, zero))


@device
def uniform(REAL: tl.constexpr, seed, low, high, step):
    """Uniform in [0, 1): the first word of Philox 4x32-10, key = seed, counter = (low, high, step, 0); 24 bits of it."""
    # A loop, though of a fixed length: written out for every step it takes the compiler minutes. What it carries keeps its shape.
    none = low ^ low
    c0, c1, c2, c3 = low, none ^ high, none ^ step, none
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in range(10):
        a, b = c0, c2
        c0 = tl.umulhi(tl.full((), 0xCD9E8D57, tl.uint32), b) ^ c1 ^ k0
        c2 = tl.umulhi(tl.full((), 0xD2511F53, tl.uint32), a) ^ c3 ^ k1
        c1 = tl.full((), 0xCD9E8D57, tl.uint32) * b
        c3 = tl.full((), 0xD2511F53, tl.uint32) * a
        k0 = k0 + tl.full((), 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full((), 0xBB67AE85, tl.uint32)
    return (c0 >> 8).to(REAL) * tl.full((), 5.9604644775390625e-8, REAL)
