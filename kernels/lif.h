// The LIF recurrence, its adjoint and its random numbers, once for host and device.
// Functions take the id of a table row; with a constant id the switch folds away.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define LIF_INLINE __host__ __device__ __forceinline__
#else
#define LIF_INLINE inline __attribute__((always_inline))
#endif

namespace lif {

typedef long long i64;
typedef double f64;
typedef void* ptr;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Problem {
#define FIELD(type, name) type name;
#define ARRAY(type, name, length) type name[length];
#include "problem.def"
};

enum Charge : int {
#define CHARGE(name, parameter, h, dh_dx, dh_dv, dh_dp) charge_##name,
#include "lif.def"
    charges
};
enum Fire : int {
#define FIRE(name, spike) fire_##name,
#include "lif.def"
    fires
};
enum Reset : int {
#define RESET(name, delayed, before, after, v_next, keep, jump, threshold_term) reset_##name,
#include "lif.def"
    resets
};
enum Surrogate : int {
#define SURROGATE(name, a, b, derivative) surrogate_##name,
#include "lif.def"
    surrogates
};
enum Adjoint : int { adjoint_bptt, adjoint_bptr, adjoint_spatial, adjoint_hart, adjoint_rga, adjoints };

// ---- the functions that a table may call --------------------------------------------------------------------

#define lit(number) real(number)

template <class real> LIF_INLINE real divide(real a, real b) { return a / b; }
template <class real> LIF_INLINE real maximum(real a, real b) { return b > a ? b : a; }
template <class real> LIF_INLINE real select(bool condition, real yes, real no) { return condition ? yes : no; }

#if defined(__CUDA_ARCH__)
LIF_INLINE float absolute(float y) { return fabsf(y); }
LIF_INLINE double absolute(double y) { return fabs(y); }
LIF_INLINE float exponential(float y) { return expf(y); }
LIF_INLINE double exponential(double y) { return exp(y); }
#else
LIF_INLINE float absolute(float y) { return __builtin_fabsf(y); }
LIF_INLINE double absolute(double y) { return __builtin_fabs(y); }

// e^y that vectorises: y = k ln 2 + f, a Taylor polynomial in f, and k put into the exponent. Below 2 ulp.
// Surrogates only ask for y <= 0; below the smallest normal number the result is 0.
LIF_INLINE float power_of_two(float k) { return __builtin_bit_cast(float, (int(k) + 127) << 23); }
template <class real> LIF_INLINE real exponential_single(real y) {
    real c = select(y < lit(88.0), y, lit(88.0));
    c = select(c > lit(-87.0), c, lit(-87.0));
    real k = (c * lit(1.44269504) + lit(12582912.0)) - lit(12582912.0);
    real f = (c - k * lit(0.693359375)) + k * lit(2.12194440e-4);
    real p = lit(1.0) + f * (lit(1.0) + f * (lit(0.5) + f * (lit(0.166666667) + f * (lit(0.0416666667) + f * (lit(0.00833333333) + f * (lit(0.00138888889) + f * lit(0.000198412698)))))));
    return select(y < lit(-87.0), lit(0.0), select(y != y, y, p * power_of_two(k)));
}
LIF_INLINE float exponential(float y) { return exponential_single(y); }
LIF_INLINE double exponential(double y) {
    double c = y < 709.0 ? y : 709.0;
    c = c > -708.0 ? c : -708.0;
    double k = (c * 1.4426950408889634 + 6755399441055744.0) - 6755399441055744.0;
    double f = (c - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
    double p = 1.0 + f * (1.0 / 13);
    for (int j = 12; j > 0; --j) p = 1.0 + f * p * (1.0 / j);
    i64 bits = (i64(k) + 1023) << 52;
    double scaled = p * __builtin_bit_cast(double, bits);
    return y < -708.0 ? 0.0 : (y != y ? y : scaled);
}
#endif

#define FORMULA(name, y, value) template <class real> LIF_INLINE real name(real y) { return value; }
#include "lif.def"

// ---- charge, fire, reset ---------------------------------------------------------------------------------------

LIF_INLINE bool is_delayed(int reset) {
    switch (reset) {
#define RESET(name, delayed, before, after, v_next, keep, jump, threshold_term) case reset_##name: return delayed;
#include "lif.def"
    }
    return false;
}

// 1 where a delayed reset is due: the carried membrane is above the threshold.
template <class real> LIF_INLINE real fired_before(int reset, real v, real threshold) {
    return is_delayed(reset) && (v - threshold > real(0)) ? real(1) : real(0);
}

template <class real> LIF_INLINE real charge_plain(int charge, real v, real x, real p, real r) {
    switch (charge) {
#define CHARGE(name, parameter, h, dh_dx, dh_dv, dh_dp) case charge_##name: return h;
#include "lif.def"
    }
    return real(__builtin_nanf(""));
}
template <class real> LIF_INLINE real charge_dx(int charge, real v, real x, real p, real r) {
    switch (charge) {
#define CHARGE(name, parameter, h, dh_dx, dh_dv, dh_dp) case charge_##name: return dh_dx;
#include "lif.def"
    }
    return real(__builtin_nanf(""));
}
template <class real> LIF_INLINE real charge_dv(int charge, real v, real x, real p, real r) {
    switch (charge) {
#define CHARGE(name, parameter, h, dh_dx, dh_dv, dh_dp) case charge_##name: return dh_dv;
#include "lif.def"
    }
    return real(__builtin_nanf(""));
}
template <class real> LIF_INLINE real charge_dp(int charge, real v, real x, real p, real r) {
    switch (charge) {
#define CHARGE(name, parameter, h, dh_dx, dh_dv, dh_dp) case charge_##name: return dh_dp;
#include "lif.def"
    }
    return real(__builtin_nanf(""));
}

// What is charged: v, or v as a delayed hard reset leaves it.
template <class real> LIF_INLINE real before_charge(int reset, real v, real fired) {
    switch (reset) {
#define RESET(name, delayed, before, after, v_next, keep, jump, threshold_term) case reset_##name: return before;
#include "lif.def"
    }
    return real(__builtin_nanf(""));
}
// d before_charge / dv.
template <class real> LIF_INLINE real before_charge_dv(int reset, real fired) {
    return before_charge(reset, real(1), fired);
}
template <class real> LIF_INLINE real after_charge(int reset, real h, real threshold, real fired) {
    switch (reset) {
#define RESET(name, delayed, before, after, v_next, keep, jump, threshold_term) case reset_##name: return after;
#include "lif.def"
    }
    return real(__builtin_nanf(""));
}

// The membrane before the spike, h.
template <class real>
LIF_INLINE real membrane(int charge, int reset, real v, real x, real p, real threshold, real r) {
    real fired = fired_before(reset, v, threshold);
    return after_charge(reset, charge_plain(charge, before_charge(reset, v, fired), x, p, r), threshold, fired);
}

template <class real> LIF_INLINE real spike(int fire, real z, real u, real sigma) {
    switch (fire) {
#define FIRE(name, condition) case fire_##name: return select(condition, lit(1.0), lit(0.0));
#include "lif.def"
    }
    return real(__builtin_nanf(""));
}

// The carried state after the spike.
template <class real> LIF_INLINE real next_state(int reset, real h, real s, real threshold, real fired, real r) {
    switch (reset) {
#define RESET(name, delayed, before, after, v_next, keep, jump, threshold_term) case reset_##name: return v_next;
#include "lif.def"
    }
    return real(__builtin_nanf(""));
}

// ---- the adjoint -------------------------------------------------------------------------------------------------

template <class real> LIF_INLINE real surrogate_plain(int surrogate, real z, real a, real b) {
    switch (surrogate) {
#define SURROGATE(name, a_name, b_name, derivative) case surrogate_##name: return derivative;
#include "lif.def"
    }
    return real(__builtin_nanf(""));
}
// ds/dh: the surrogate at z, or, relative, at z / threshold, by the chain rule divided by the threshold.
template <class real>
LIF_INLINE real surrogate_slope(int surrogate, bool relative, real z, real threshold, real a, real b) {
    return relative ? surrogate_plain(surrogate, z / threshold, a, b) / threshold : surrogate_plain(surrogate, z, a, b);
}

template <class real> LIF_INLINE real reset_keep(int reset, real s) {
    switch (reset) {
#define RESET(name, delayed, before, after, v_next, keep, jump, threshold_term) case reset_##name: return keep;
#include "lif.def"
    }
    return real(__builtin_nanf(""));
}
template <class real> LIF_INLINE real reset_jump(int reset, real h, real threshold, real r) {
    switch (reset) {
#define RESET(name, delayed, before, after, v_next, keep, jump, threshold_term) case reset_##name: return jump;
#include "lif.def"
    }
    return real(__builtin_nanf(""));
}
template <class real> LIF_INLINE real reset_threshold_term(int reset, real g_v, real g_h, real s, real fired) {
    switch (reset) {
#define RESET(name, delayed, before, after, v_next, keep, jump, threshold_term) case reset_##name: return threshold_term;
#include "lif.def"
    }
    return real(__builtin_nanf(""));
}

// The gradient of the spike as the recurrence sees it: from outside, and through the reset unless detached.
template <class real>
LIF_INLINE real spike_gradient(int reset, bool detach, real g_s, real g_v, real h, real threshold, real r) {
    return detach || reset == reset_none || reset == reset_delayed_soft || reset == reset_delayed_hard
               ? g_s
               : g_s + g_v * reset_jump(reset, h, threshold, r);
}
// The gradient of h; extra is what the statistics and the kept membrane add.
template <class real>
LIF_INLINE real membrane_gradient(int fire, int reset, real g_spike, real g_v, real s, real slope, real extra) {
    if (fire == fire_none) return g_v + g_spike + extra;  // the output is h itself
    return g_v * reset_keep(reset, s) + g_spike * slope + extra;
}
// What a step adds to the gradient of the charge parameter.
template <class real>
LIF_INLINE real parameter_gradient(int charge, int reset, real g_h, real v, real x, real p, real threshold, real r) {
    real fired = fired_before(reset, v, threshold);
    return g_h * charge_dp(charge, before_charge(reset, v, fired), x, p, r);
}
// What a step adds to the gradient of the threshold; extra_z: the part of extra that is a function of z.
template <class real>
LIF_INLINE real threshold_gradient(int fire, int reset, bool relative, real g_spike, real g_v, real g_h, real h, real s,
                                   real slope, real threshold, real fired, real extra_z) {
    if (fire == fire_none) return -extra_z;
    real path = g_spike * slope;
    if (relative) path = path * (h / threshold);
    return -(path + reset_threshold_term(reset, g_v, g_h, s, fired) + extra_z);
}
// d/dz of max(0, delta - |z|)^power.
template <class real> LIF_INLINE real guard_slope(i64 power, real z, real delta) {
    real room = delta - absolute(z);
    if (!(room > real(0)) || power == 0) return real(0);
    real size = power == 2 ? real(2) * room : real(1);
    return z > real(0) ? -size : (z < real(0) ? size : real(0));
}
template <class real> LIF_INLINE real guard_value(i64 power, real z, real delta) {
    real room = delta - absolute(z);
    if (!(room > real(0))) return z != z ? z : real(0);
    return power == 0 ? real(1) : (power == 1 ? room : room * room);
}
// RGA (Bu et al. 2023): the weight on the mean input in units of the threshold; tau is the leak factor.
template <class real> LIF_INLINE real rga_weight(real mean_input, real tau, real gamma) {
    real low = gamma, high = (real(1) - gamma + gamma * tau) / (real(1) + tau);
    real one = real(1) - tau;
    return mean_input >= real(0) && mean_input <= one ? low : (mean_input > one && mean_input <= real(2) ? high : real(0));
}

// ---- random numbers ------------------------------------------------------------------------------------------------

// Philox 4x32-10 (Salmon et al. 2011), first word: key = the seed, counter = (index, index >> 32, step, 0).
LIF_INLINE u32 philox(u64 seed, u64 index, u32 step) {
    u32 c0 = u32(index), c1 = u32(index >> 32), c2 = step, c3 = 0;
    u32 k0 = u32(seed), k1 = u32(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        u64 p0 = u64(0xD2511F53u) * c0, p1 = u64(0xCD9E8D57u) * c2;
        c0 = u32(p1 >> 32) ^ c1 ^ k0;
        c1 = u32(p1);
        c2 = u32(p0 >> 32) ^ c3 ^ k1;
        c3 = u32(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}
// Uniform in [0, 1): 24 bits, exact in float and double.
template <class real> LIF_INLINE real to_uniform(u32 word) { return real(int(word >> 8)) * real(5.9604644775390625e-8); }
template <class real> LIF_INLINE real uniform(u64 seed, u64 index, u32 step) { return to_uniform<real>(philox(seed, index, step)); }
// Position in [N, C, *S] order of the element that lies at place i of a step.
LIF_INLINE u64 logical_index(const Problem& p, i64 i) {
    if (p.rank == 0) return u64(i);
    i64 index = 0;
    for (int k = 0; k < 8; ++k)
        if (k < p.rank) index += i / p.order_inner[k] % p.order_size[k] * p.order_stride[k];
    return u64(index);
}

}  // namespace lif
