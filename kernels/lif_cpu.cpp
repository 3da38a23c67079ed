// The CPU kernels. This file is compiled once per instruction set (LIF_ISA names it), dispatch.cpp picks one.
//
// A unit of work is a run of neurons that fits the cache, all its time steps inside, repeated for every place where the
// same columns come round again. State, membranes and sums of a run never leave the cache; x is read once, results are
// written once, past the cache where they are larger than it. Units, and so all sums, do not depend on the threads.

#include "cpu_parameters.h"
#include "cpu_plain.h"
#include "cpu_random.h"

namespace {

using namespace lif;

// ---- one time step of a run -------------------------------------------------------------------------------------

template <class real> struct StepArrays {
    const real *x, *p, *threshold, *u;
    real *v, *s, *h;
    real r, sigma;
};

template <class real, int charge, int fire, int reset> void step(const StepArrays<real>& a, i64 length) {
    const real *x = a.x, *p = a.p, *threshold = a.threshold, *u = a.u, r = a.r, sigma = a.sigma;
    real *v = a.v, *s = a.s, *h = a.h;
#pragma GCC ivdep
    for (i64 i = 0; i < length; ++i) {
        real theta = threshold[i], v_i = v[i];
        real fired = fired_before(reset, v_i, theta);
        real h_i = after_charge(reset, charge_plain(charge, before_charge(reset, v_i, fired), x[i], p[i], r), theta, fired);
        real s_i = fire == fire_none ? h_i : spike(fire, h_i - theta, fire == fire_gaussian ? u[i] : real(0), sigma);
        v[i] = fire == fire_none ? h_i : next_state(reset, h_i, s_i, theta, fired, r);
        s[i] = s_i;
        h[i] = h_i;
    }
}

template <class real> using Step = void (*)(const StepArrays<real>&, i64);
template <class real, int... id> Step<real> step_at(int place, std::integer_sequence<int, id...>) {
    static const Step<real> all[] = {step<real, id / (fires * resets), id / resets % fires, id % resets>...};
    return all[place];
}
template <class real> Step<real> find_step(const Problem& p) {
    return step_at<real>(int((p.charge * fires + p.fire) * resets + p.reset),
                         std::make_integer_sequence<int, charges * fires * resets>());
}

// ---- the adjoint of one time step of a run ----------------------------------------------------------------------

template <class real> using Slope = void (*)(i64, const real*, const real*, const real*, const real*, real*);
template <class real, int surrogate, bool relative>
void slope(i64 length, const real* h, const real* threshold, const real* a, const real* b, real* out) {
#pragma GCC ivdep
    for (i64 i = 0; i < length; ++i)
        out[i] = surrogate_slope(surrogate, relative, h[i] - threshold[i], threshold[i], a[i], b[i]);
}
template <class real, int... id> Slope<real> slope_at(int place, std::integer_sequence<int, id...>) {
    static const Slope<real> all[] = {slope<real, id / 2, id % 2 == 1>...};
    return all[place];
}
template <class real> Slope<real> find_slope(const Problem& p) {
    return slope_at<real>(int(p.surrogate * 2 + p.relative), std::make_integer_sequence<int, surrogates * 2>());
}

template <class real> struct AdjointArrays {
    const real *g_s, *slope, *s, *h, *v, *p, *threshold, *extra;
    real *g_v, *g_h, *g_x;
    real r;
    bool detach;
};

// reset == resets stands for fire none: the output is h.
template <class real, int charge, int reset> void adjoint(const AdjointArrays<real>& a, i64 length) {
    const real *g_s = a.g_s, *slope = a.slope, *s = a.s, *h = a.h, *v = a.v, *p = a.p, *threshold = a.threshold;
    const real *extra = a.extra, r = a.r;
    real *g_v = a.g_v, *g_h = a.g_h, *g_x = a.g_x;
    const bool detach = a.detach;
    constexpr bool linear = reset == resets, delayed = reset >= reset_delayed_soft && !linear;
#pragma GCC ivdep
    for (i64 i = 0; i < length; ++i) {
        real fired = delayed ? fired_before(reset, v[i], threshold[i]) : real(0);
        real g = g_v[i], total;
        if (linear) {
            total = membrane_gradient(fire_none, reset, g_s[i], g, real(0), real(0), extra[i]);
        } else {
            real through = spike_gradient(reset, false, g_s[i], g, h[i], threshold[i], r);
            real g_spike = detach ? g_s[i] : through;
            total = membrane_gradient(fire_ge, reset, g_spike, g, s[i], slope[i], extra[i]);
        }
        g_h[i] = total;
        g_x[i] = total * charge_dx(charge, real(0), real(0), p[i], r);
        real back = total * charge_dv(charge, real(0), real(0), p[i], r);
        g_v[i] = delayed ? back * before_charge_dv(reset, fired) : back;
    }
}
template <class real> using Adjointed = void (*)(const AdjointArrays<real>&, i64);
template <class real, int... id> Adjointed<real> adjoint_at(int place, std::integer_sequence<int, id...>) {
    static const Adjointed<real> all[] = {adjoint<real, id / (resets + 1), id % (resets + 1)>...};
    return all[place];
}
template <class real> Adjointed<real> find_adjoint(const Problem& p) {
    int reset = p.fire == fire_none ? int(resets) : int(p.reset);
    return adjoint_at<real>(int(p.charge * (resets + 1) + reset),
                            std::make_integer_sequence<int, charges*(resets + 1)>());
}

// ---- forward ----------------------------------------------------------------------------------------------------

// x of a step times the gain, as real.
template <class real> const real* current(const Problem& p, i64 t, i64 offset, i64 length, real* buffer) {
    const real* x = load<real>(p.x, p.dtype, t * p.x_stride + offset, length, buffer);
    if (!p.gain) return x;
    real gain = ((const real*)p.gain)[t];
    for (i64 i = 0; i < length; ++i) buffer[i] = gain * x[i];
    return buffer;
}

template <class real> void start(const Problem& p, i64 offset, i64 length, real* v) {
    if (p.v0)
        memcpy(v, (const real*)p.v0 + offset, length * sizeof(real));
    else
        for (i64 i = 0; i < length; ++i) v[i] = real(p.v_start);
}

template <class real> void forward(const Problem& p) {
    const bool statistics = p.mean != nullptr;
    const Plan plan = make_plan(p, statistics, longest_run);
    const i64 size = size_of(p.dtype);
    const bool past_cache = p.count * p.steps * size > cache_bytes;
    const Step<real> run_step = find_step<real>(p);
    const bool plain = is_plain(p);
    const Plain numbers = make_plain(p);
    const int kind = p.dtype == float32 && past_cache ? spikes_streamed : spikes_kept;
    const PlainStep plain_step = plain ? find_plain_step(p, kind, statistics) : nullptr;
    const PlainStepByPlace plain_by_place = plain ? find_plain_step_by_place(p, kind == spikes_streamed) : nullptr;
    Moments moments(plan, p, statistics);
    parallel(p, plan.units, [&](Arena& arena, i64 unit) {
        const Unit place(plan, unit);
        Columns<real> decay(arena, place, p, p.decay, p.decay_value, p.decay_steps, p.decay_columns);
        Columns<real> threshold(arena, place, p, p.threshold, p.threshold_value, p.threshold_steps, p.threshold_columns);
        const i64 width = plan.run;
        real *x = arena.take<real>(width), *v = arena.take<real>(width), *s = arena.take<real>(width);
        real* h = arena.take<real>(width);
        Uniforms<real> uniforms(arena, p, width);
        MomentSums<real> sums(arena, place, p, statistics, moments, unit);
        for (i64 row = place.first_row; row < place.last_row; ++row) {
            const i64 offset = place.offset(row), length = place.length(row);
            if (statistics) sums.move_to(row);
            uniforms.move_to(offset, length);
            start(p, offset, length, v);
            for (i64 t = 0; t < p.steps; ++t) {
                if constexpr (sizeof(real) == sizeof(float)) {
                    if (plain) {
                        const real* x_t = current(p, t, offset, length, x);
                        if (sums.by_place()) {
                            const PlaceSums<real> to = sums.at_places(t, row, length, [&](i64 i) {
                                return charge_plain(numbers.charge, v[i], x_t[i], numbers.p, numbers.r) - numbers.theta;
                            });
                            real* out = p.dtype == float32 ? (real*)p.spikes + t * p.count + offset : s;
                            plain_by_place(numbers, x_t, v, out, to, length);
                            if (out == s) store(p.spikes, p.dtype, t * p.count + offset, length, s, past_cache);
                            continue;
                        }
                        auto part = [&](i64 at, i64 n, real* out) { plain_step(numbers, &sums, t, x_t, v, out, at, at + n); };
                        if (p.dtype == float32) {
                            part(0, length, (real*)p.spikes + t * p.count + offset);
                            continue;
                        }
                        in_pieces((const char*)p.spikes + (t * p.count + offset) * size, size, length, [&](i64 at, i64 n) {
                            part(at, n, s + at);
                            store(p.spikes, p.dtype, t * p.count + offset + at, n, s + at, past_cache);
                        });
                        continue;
                    }
                }
                StepArrays<real> arrays{current(p, t, offset, length, x), decay.at(t), threshold.at(t), uniforms.at(t), v, s, h,
                                        real(p.v_reset), real(p.noise)};
                run_step(arrays, length);
                store(p.spikes, p.dtype, t * p.count + offset, length, s, past_cache);
                if (p.membrane) store_real(p.membrane, t * p.count + offset, length, h, past_cache);
                if (statistics) sums.add(t, row, length, h, threshold.at(t), s);
            }
            if (p.v) store_real(p.v, offset, length, v, past_cache);
        }
        if (statistics) sums.fold();
    });
    if (statistics) moments.merge();
}

// ---- backward ---------------------------------------------------------------------------------------------------

// One run of the backward pass: its scratch, and how gradients come in and go out.
template <class real> struct Run {
    const Problem& p;
    const Columns<real> &decay, &threshold, &a, &b;
    Slope<real> slope_of;
    i64 width, offset = 0, length = 0;
    real *x, *h, *s, *g_s, *g_v, *g_x, *slopes, *sum;
    bool constant, past_cache;

    const real* membrane(i64 t) const { return h + t * width; }
    const real* spikes(i64 t) const { return s + t * width; }
    const real* incoming(i64 t) const {
        if (p.g_spikes) return load<real>(p.g_spikes, p.dtype, t * p.count + offset, length, g_s);
        fill(g_s, length, real(0));
        return g_s;
    }
    const real* slope(i64 t) const {
        if (p.fire == fire_none)
            fill(slopes, length, real(1));
        else
            slope_of(length, membrane(t), threshold.at(t), a.at(t), b.at(t), slopes);
        return slopes;
    }
    // g is the gradient of the current: through the gain to x, written, or added up where x is constant.
    void outgoing(i64 t, real* g, i64 first, i64 n) const {
        if (!p.g_x) return;
        if (p.gain) {
            real gain = ((const real*)p.gain)[t];
            for (i64 i = first; i < first + n; ++i) g[i] = g[i] * gain;
        }
        if (constant)
            for (i64 i = first; i < first + n; ++i) sum[i] += g[i];
        else
            store(p.g_x, p.dtype, t * p.count + offset + first, n, g + first, past_cache);
    }
    void outgoing(i64 t, real* g) const { outgoing(t, g, 0, length); }
};

// Local gradient of the current, the membrane's history cut.
template <class real> void spatial(const Run<real>& run, i64 t, real* out) {
    const Problem& p = run.p;
    const real *g = run.incoming(t), *slope = run.slope(t), *decay = run.decay.at(t);
    for (i64 i = 0; i < run.length; ++i)
        out[i] = g[i] * slope[i] * charge_dx(int(p.charge), real(0), real(0), decay[i], real(p.v_reset));
}

// The approximations: the gradient of the spikes goes to the current without the recurrence.
template <class real> void straight(const Run<real>& run) {
    const Problem& p = run.p;
    const i64 T = p.steps, length = run.length;
    real *weight = run.g_v, *g_x = run.g_x;
    fill(weight, length, real(0));
    switch (p.adjoint) {
        case adjoint_bptr:
            for (i64 t = 0; t < T; ++t)
                for (i64 i = 0; i < length; ++i) weight[i] += run.spikes(t)[i];
            for (i64 i = 0; i < length; ++i) weight[i] = weight[i] > real(0) ? real(1) : real(0);
            break;
        case adjoint_hart:
            for (i64 t = 0; t < T; ++t) {
                spatial(run, t, g_x);
                for (i64 i = 0; i < length; ++i) weight[i] += g_x[i];
            }
            for (i64 i = 0; i < length; ++i) weight[i] = weight[i] / real(T);
            break;
        case adjoint_rga: {
            real *decay = run.slopes, *theta = run.g_s;  // means over the steps
            fill(decay, length, real(0));
            fill(theta, length, real(0));
            for (i64 t = 0; t < T; ++t) {
                const real* x = current(p, t, run.offset, length, run.x);
                for (i64 i = 0; i < length; ++i) weight[i] += x[i] / run.threshold.at(t)[i];
                for (i64 i = 0; i < length && t < p.decay_steps; ++i) decay[i] += run.decay.at(t)[i];
                for (i64 i = 0; i < length && t < p.threshold_steps; ++i) theta[i] += run.threshold.at(t)[i];
            }
            // The weight jumps, so its arguments are the reference's to the bit: what is the same at all steps is its own mean.
            for (i64 i = 0; i < length; ++i) {
                real q = decay[i] / real(p.decay_steps);
                real leak = p.charge == charge_leak ? q : charge_dv(int(p.charge), real(0), real(0), q, real(0));
                weight[i] = rga_weight(weight[i] / real(T), leak, real(p.rga_gamma)) / (theta[i] / real(p.threshold_steps));
            }
            break;
        }
    }
    for (i64 t = 0; t < T; ++t) {
        if (p.adjoint == adjoint_spatial) {
            spatial(run, t, g_x);
        } else if (p.adjoint == adjoint_hart) {
            memcpy(g_x, weight, size_t(length) * sizeof(real));
        } else {
            const real* g = run.incoming(t);
            for (i64 i = 0; i < length; ++i) g_x[i] = g[i] * weight[i];
        }
        run.outgoing(t, g_x);
    }
}

template <class real> void backward(const Problem& p) {
    const bool statistics = p.g_mean || p.g_variance || p.g_guard || p.g_rate;
    const bool exact = p.adjoint == adjoint_bptt;
    const i64 size = size_of(p.dtype), T = p.steps, target = run_bytes / i64(sizeof(real)) / T / 16 * 16;
    const Plan plan = make_plan(p, statistics, target < 64 ? 64 : (target > longest_run ? longest_run : target));
    const i64 width = plan.run;
    const Step<real> run_step = find_step<real>(p);
    const Adjointed<real> run_adjoint = find_adjoint<real>(p);
    const bool plain = is_plain_backward(p), constant = p.x_stride == 0 && T > 1;
    // Whether the short way stores the gradient of x itself.
    const bool direct = p.dtype == float32 && !p.gain && !constant && p.g_x, past_cache = p.count * T * size > cache_bytes;
    const Plain numbers = make_plain(p);
    const PlainStep plain_step = plain ? find_plain_step(p, membranes_kept, false) : nullptr;
    const int summing = !statistics ? no_moments : (p.inner < narrowest_segment ? by_place : of_a_stretch);
    const PlainAdjoint plain_adjoint = plain ? find_plain_adjoint(p, summing, direct && past_cache) : nullptr;
    ParameterGradients gradients(plan, p);
    parallel(p, plan.units, [&](Arena& arena, i64 unit) {
        const Unit place(plan, unit);
        Columns<real> decay(arena, place, p, p.decay, p.decay_value, p.decay_steps, p.decay_columns);
        Columns<real> threshold(arena, place, p, p.threshold, p.threshold_value, p.threshold_steps, p.threshold_columns);
        Columns<real> a(arena, place, p, p.a, p.a_value, p.a_steps, p.a_columns);
        Columns<real> b(arena, place, p, p.b, p.b_value, p.b_steps, p.b_columns);
        Coefficients<real> coefficients(arena, place, p, statistics);
        ParameterSums<real> sums(arena, place, p, gradients);
        auto row_of = [&] { return arena.take<real>(width); };
        Run<real> run{p, decay, threshold, a, b, find_slope<real>(p), width};
        run.h = arena.take<real>(width * T);
        run.s = arena.take<real>(width * T);
        for (real** each : {&run.x, &run.g_s, &run.g_v, &run.g_x, &run.slopes, &run.sum}) *each = row_of();
        run.constant = constant;
        run.past_cache = past_cache;
        real *v = row_of(), *g_h = row_of(), *extra = row_of();
        Uniforms<real> uniforms(arena, p, width);
        const bool keep_v = is_delayed(int(p.reset)) || sums.wanted();
        real* states = keep_v ? arena.take<real>(width * T) : v;
        fill(extra, width, real(0));
        for (i64 row = place.first_row; row < place.last_row; ++row) {
            const i64 offset = run.offset = place.offset(row), length = run.length = place.length(row);
            if (statistics) coefficients.move_to(row);
            uniforms.move_to(offset, length);
            start(p, offset, length, v);
            for (i64 t = 0; t < T; ++t) {
                if constexpr (sizeof(real) == sizeof(float)) {
                    if (plain) {
                        plain_step(numbers, nullptr, t, current(p, t, offset, length, run.x), v, run.h + t * width, 0, length);
                        continue;
                    }
                }
                if (keep_v) memcpy(states + t * width, v, size_t(length) * sizeof(real));
                run_step({current(p, t, offset, length, run.x), decay.at(t), threshold.at(t), uniforms.at(t), v, run.s + t * width,
                          run.h + t * width, real(p.v_reset), real(p.noise)}, length);
            }
            if (run.constant) fill(run.sum, length, real(0));
            if (exact) {
                if (p.g_v)
                    memcpy(run.g_v, (const real*)p.g_v + offset, size_t(length) * sizeof(real));
                else
                    fill(run.g_v, length, real(0));
            } else {
                straight(run);
            }
            for (i64 t = T - 1; exact && t >= 0; --t) {
                if constexpr (sizeof(real) == sizeof(float)) {
                    if (plain) {
                        const real *h = run.membrane(t), *g_s = run.incoming(t);
                        auto part = [&](i64 first, i64 n, real* out) {
                            plain_adjoint(numbers, coefficients, t, h, g_s, run.g_v, out, first, first + n);
                        };
                        if (direct) {
                            part(0, length, (real*)p.g_x + t * p.count + offset);
                            continue;
                        }
                        if (summing == by_place) {  // pieces would begin within a round
                            part(0, length, run.g_x);
                            run.outgoing(t, run.g_x);
                            continue;
                        }
                        const char* out = constant || !p.g_x ? nullptr : (const char*)p.g_x + (t * p.count + offset) * size;
                        in_pieces(out, size, length, [&](i64 first, i64 n) {
                            part(first, n, run.g_x + first);
                            run.outgoing(t, run.g_x, first, n);
                        });
                        continue;
                    }
                }
                const real *h = run.membrane(t), *theta = threshold.at(t), *slope = run.slope(t), *more = extra;
                const real *g_s = run.incoming(t), *before = keep_v ? states + t * width : v;
                if (statistics) {
                    g_s = coefficients.add(t, length, h, theta, g_s, run.g_s);
                    more = coefficients.of_z;
                }
                if (p.g_membrane) {
                    const real* kept = (const real*)p.g_membrane + t * p.count + offset;
                    for (i64 i = 0; i < length; ++i) extra[i] = (statistics ? coefficients.of_z[i] : real(0)) + kept[i];
                    more = extra;
                }
                if (sums.wanted()) sums.keep(run.g_v, length);
                run_adjoint({g_s, slope, run.spikes(t), h, before, decay.at(t), theta, more, run.g_v, g_h, run.g_x,
                             real(p.v_reset), p.detach_reset != 0}, length);
                if (sums.wanted()) {
                    const real* x = load<real>(p.x, p.dtype, t * p.x_stride + offset, length, run.x);
                    sums.add(t, length, x, p.gain ? ((const real*)p.gain)[t] : real(1), run.x, decay.at(t), theta, h,
                             run.spikes(t), before, slope, g_s, g_h, run.g_x, coefficients.of_z);
                }
                run.outgoing(t, run.g_x);
            }
            if (exact && p.g_v0) store_real(p.g_v0, offset, length, run.g_v, false);
            if (run.constant && p.g_x) store(p.g_x, p.dtype, offset, length, run.sum, run.past_cache);
        }
        sums.fold(unit);
    });
    gradients.merge();
}

}  // namespace

#define LIF_JOIN(a, b) fastsnn_##a##_##b
#define LIF_NAME(a, b) LIF_JOIN(a, b)

// 0, or 1 where memory for the sums could not be had.
extern "C" int LIF_NAME(forward, LIF_ISA)(const lif::Problem* p) try {
    p->dtype == lif::float64 ? forward<double>(*p) : forward<float>(*p);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
extern "C" int LIF_NAME(backward, LIF_ISA)(const lif::Problem* p) try {
    p->dtype == lif::float64 ? backward<double>(*p) : backward<float>(*p);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
