// The short way through the CPU kernels, for what most networks are made of: parameters that are numbers, fire `ge`,
// a hard or soft reset. The same functions of lif.h, fused into one loop forward and one backward.
#pragma once

#include "cpu_sums.h"

namespace {

template <class real> struct Plain {
    real p, theta, r, a, b;
    bool detach;
    int charge;
};

// What a run's statistics need while one step of one stretch of a channel is run.
template <class real> struct PlainMoment {
    real shift, sum, square;
};

// d * d + sum, in one rounding where the machine has it: statistics are sums, the recurrence is not.
template <class real> LIF_INLINE real fused(real d, real sum) {
#if defined(__FMA__)
    return sizeof(real) == 4 ? real(__builtin_fmaf(float(d), float(d), float(sum))) : real(__builtin_fma(d, d, sum));
#else
    return sum + d * d;
#endif
}

// One step of a stretch: `out` gets the membranes where they are wanted, else the spikes.
template <class real, int charge, int reset, bool membranes, bool moments>
void plain_step(const Plain<real>& a, const real* x, real* v, real* out, PlainMoment<real>* moment, i64 length) {
    const real p = a.p, theta = a.theta, r = a.r, shift = moments ? moment->shift : real(0);
    real sum = 0, square = 0;
#pragma omp simd simdlen(64 / sizeof(real)) reduction(+ : sum, square)
    for (i64 i = 0; i < length; ++i) {
        real h = charge_plain(charge, v[i], x[i], p, r), z = h - theta, s = spike(fire_ge, z, real(0), real(0));
        v[i] = next_state(reset, h, s, theta, real(0), r);
        out[i] = membranes ? h : s;
        if (moments) {
            real d = z - shift;
            sum += d;
            square = fused(d, square);
        }
    }
    if (moments) moment->sum = sum, moment->square = square;
}

// The adjoint of one step of a stretch.
template <class real, int charge, int reset, int surrogate, bool moments>
void plain_adjoint(const Plain<real>& a, const MomentTerm<real>& term, const real* h, const real* g_s, real* g_v, real* g_x, i64 length) {
    const real p = a.p, theta = a.theta, r = a.r;
    const bool detach = a.detach;
    const real rise = term.slope, mean = term.mean, flat = moments ? term.flat - rise * term.rest : real(0);
    const real first = a.a, second = a.b;
#pragma GCC ivdep
    for (i64 i = 0; i < length; ++i) {
        real h_i = h[i], z = h_i - theta, g = g_v[i], s = spike(fire_ge, z, real(0), real(0));
        real slope = surrogate_plain(surrogate, z, first, second);
        real through = spike_gradient(reset, false, g_s[i], g, h_i, theta, r), g_spike = detach ? g_s[i] : through;
        real extra = moments ? flat + rise * (z - mean) : real(0);
        real total = membrane_gradient(fire_ge, reset, g_spike, g, s, slope, extra);
        g_x[i] = total * charge_dx(charge, real(0), real(0), p, r);
        g_v[i] = total * charge_dv(charge, real(0), real(0), p, r);
    }
}

template <class real> using PlainStep = void (*)(const Plain<real>&, const real*, real*, real*, PlainMoment<real>*, i64);
template <class real>
using PlainAdjoint = void (*)(const Plain<real>&, const MomentTerm<real>&, const real*, const real*, real*, real*, i64);

// The rows that have a short way; a charge or reset without one takes the long way.
constexpr int plain_charges[] = {charge_leak, charge_leak_input}, plain_resets[] = {reset_hard, reset_soft};

inline int place_of(const int (&rows)[2], i64 row) { return row == rows[0] ? 0 : (row == rows[1] ? 1 : -1); }

template <class real, int... id> PlainStep<real> plain_step_at(int place, std::integer_sequence<int, id...>) {
    static const PlainStep<real> all[] = {
        plain_step<real, plain_charges[id / 8], plain_resets[id / 4 % 2], id / 2 % 2 == 1, id % 2 == 1>...};
    return all[place];
}
template <class real, int... id> PlainAdjoint<real> plain_adjoint_at(int place, std::integer_sequence<int, id...>) {
    static const PlainAdjoint<real> all[] = {
        plain_adjoint<real, plain_charges[id / (4 * surrogates)], plain_resets[id / (2 * surrogates) % 2], id / 2 % surrogates, id % 2 == 1>...};
    return all[place];
}

template <class real> real plain_value(const void* base, double value) {
    return base ? *(const real*)base : real(value);
}

inline bool is_number(i64 steps, i64 columns) { return steps == 1 && columns == 1; }

// Whether a call may go the short way.
inline bool is_plain(const Problem& p, bool statistics) {
    return p.dtype != float64 && p.fire == fire_ge && place_of(plain_charges, p.charge) >= 0 &&
           place_of(plain_resets, p.reset) >= 0 && is_number(p.decay_steps, p.decay_columns) &&
           is_number(p.threshold_steps, p.threshold_columns) && !p.membrane && !p.rate && !p.guard &&
           (!statistics || p.inner >= narrowest_segment);
}
inline bool is_plain_backward(const Problem& p, bool statistics) {
    return is_plain(p, statistics) && p.adjoint == adjoint_bptt && !p.relative && is_number(p.a_steps, p.a_columns) &&
           is_number(p.b_steps, p.b_columns) && !p.g_membrane && !p.g_rate && !p.g_guard && !p.g_decay &&
           !p.g_threshold && !p.g_gain;
}

template <class real> Plain<real> make_plain(const Problem& p) {
    return {plain_value<real>(p.decay, p.decay_value), plain_value<real>(p.threshold, p.threshold_value), real(p.v_reset),
            plain_value<real>(p.a, p.a_value), plain_value<real>(p.b, p.b_value), p.detach_reset != 0, int(p.charge)};
}
template <class real> PlainStep<real> find_plain_step(const Problem& p, bool membranes, bool moments) {
    int place = place_of(plain_charges, p.charge) * 2 + place_of(plain_resets, p.reset);
    return plain_step_at<real>(place * 4 + membranes * 2 + moments, std::make_integer_sequence<int, 16>());
}
template <class real> PlainAdjoint<real> find_plain_adjoint(const Problem& p, bool moments) {
    int place = place_of(plain_charges, p.charge) * 2 + place_of(plain_resets, p.reset);
    return plain_adjoint_at<real>(int((place * surrogates + p.surrogate) * 2 + moments),
                                  std::make_integer_sequence<int, 8 * surrogates>());
}

}  // namespace
