// Gradients of decay, threshold and gain in the CPU kernels: sums over batch, space and steps, in double.
#pragma once

#include "cpu_memory.h"

namespace {

template <class real> struct ParameterArrays {
    const real *x, *p, *threshold, *h, *s, *v, *slope, *g_s, *g_v, *g_h, *of_z;
    real *g_p, *g_theta;
    real r;
    bool detach, relative;
};

template <class real, int charge, int reset> void parameter_terms(const ParameterArrays<real>& a, i64 length) {
    constexpr bool linear = reset == resets;
    constexpr int kind = linear ? int(reset_none) : reset;
#pragma GCC ivdep
    for (i64 i = 0; i < length; ++i) {
        real theta = a.threshold[i], fired = fired_before(kind, a.v[i], theta);
        real g_spike = spike_gradient(kind, a.detach, a.g_s[i], a.g_v[i], a.h[i], theta, a.r);
        a.g_p[i] = parameter_gradient(charge, kind, a.g_h[i], a.v[i], a.x[i], a.p[i], theta, a.r);
        a.g_theta[i] = threshold_gradient(linear ? fire_none : fire_ge, kind, a.relative, g_spike, a.g_v[i], a.g_h[i],
                                          a.h[i], a.s[i], a.slope[i], theta, fired, a.of_z[i]);
    }
}
template <class real> using ParameterTerms = void (*)(const ParameterArrays<real>&, i64);
template <class real, int... id> ParameterTerms<real> terms_at(int place, std::integer_sequence<int, id...>) {
    static const ParameterTerms<real> all[] = {parameter_terms<real, id / (resets + 1), id % (resets + 1)>...};
    return all[place];
}

// A sum [steps or 1, columns] in double, in two stages.
class ColumnSum {
  public:
    ColumnSum(const Plan& plan, const Problem& p, void* out, i64 steps, i64 columns)
        : plan(plan), out((double*)out), steps(steps), columns(columns), inner(columns == p.channels ? p.inner : 1) {
        if (!out) return;
        width = columns == 1 ? 1 : 0;
        for (i64 strip = 0; columns > 1 && strip < plan.strips; ++strip) {
            i64 here = held(Unit(plan, strip));
            if (here > width) width = here;
        }
        shares = (double*)calloc(size_t(plan.units * steps * width), sizeof(double));
        if (!shares) throw std::bad_alloc();
    }
    ~ColumnSum() { free(shares); }
    ColumnSum(const ColumnSum&) = delete;
    bool on() const { return out != nullptr; }
    i64 step(i64 t) const { return steps > 1 ? t : 0; }

    void fold(i64 index, const Unit& unit, const double* places) {
        double* to = shares + index * steps * width;
        const i64 used = columns == 1 ? unit.plan.run : unit.places();
        for (i64 i = 0; i < used; ++i) {
            const i64 column = columns == 1 ? 0 : unit.column(i) / inner - first(unit);
            for (i64 t = 0; t < steps; ++t) to[t * width + column] += places[t * unit.plan.run + i];
        }
    }
    void merge() {
        if (!out) return;
        memset(out, 0, size_t(steps * columns) * sizeof(double));
        for (i64 index = 0; index < plan.units; ++index) {
            Unit unit(plan, index);
            const double* from = shares + index * steps * width;
            for (i64 t = 0; t < steps; ++t)
                for (i64 c = 0; c < held(unit); ++c) out[t * columns + (columns == 1 ? 0 : first(unit)) + c] += from[t * width + c];
        }
    }

  private:
    const Plan& plan;
    double *out, *shares = nullptr;
    i64 steps, columns, inner, width = 0;
    i64 first(const Unit& unit) const { return unit.first_column / inner; }
    i64 held(const Unit& unit) const {
        return columns == 1 ? 1 : (unit.first_column + unit.columns - 1) / inner - first(unit) + 1;
    }
};

struct ParameterGradients {
    ColumnSum decay, threshold, gain;
    ParameterGradients(const Plan& plan, const Problem& p)
        : decay(plan, p, p.g_decay, p.decay_steps, p.decay_columns),
          threshold(plan, p, p.g_threshold, p.threshold_steps, p.threshold_columns),
          gain(plan, p, p.g_gain, p.steps, 1) {}
    void merge() {
        decay.merge();
        threshold.merge();
        gain.merge();
    }
};

// The sums of one unit while it runs.
template <class real> class ParameterSums {
  public:
    ParameterSums(Arena& arena, const Unit& unit, const Problem& p, ParameterGradients& all)
        : unit(unit), p(p), all(all), on(all.decay.on() || all.threshold.on() || all.gain.on()) {
        if (!on) return;
        const i64 width = unit.plan.run;
        old_g_v = arena.take<real>(width);
        g_p = arena.take<real>(width);
        g_theta = arena.take<real>(width);
        zeros = arena.take<real>(width);
        fill(zeros, width, real(0));
        decay = take(arena, all.decay.on(), p.decay_steps);
        threshold = take(arena, all.threshold.on(), p.threshold_steps);
        gain = take(arena, all.gain.on(), p.steps);
        const int reset = p.fire == fire_none ? int(resets) : int(p.reset);
        terms = terms_at<real>(int(p.charge * (resets + 1) + reset), std::make_integer_sequence<int, charges*(resets + 1)>());
    }
    bool wanted() const { return on; }
    // The gradient of v as it is before the step's adjoint overwrites it.
    void keep(const real* g_v, i64 length) { memcpy(old_g_v, g_v, size_t(length) * sizeof(real)); }

    // x: the input before the gain.
    void add(i64 t, i64 length, const real* x, real gain_t, real* buffer, const real* decay_t, const real* theta,
             const real* h, const real* s, const real* v, const real* slope, const real* g_s, const real* g_h,
             const real* g_x, const real* of_z) {
        if (gain) {
            double* to = gain + t * unit.plan.run;
            for (i64 i = 0; i < length; ++i) to[i] += double(g_x[i] * x[i]);
        }
        if (!decay && !threshold) return;
        if (p.gain) {
            for (i64 i = 0; i < length; ++i) buffer[i] = gain_t * x[i];
            x = buffer;
        }
        terms({x, decay_t, theta, h, s, v, slope, g_s, old_g_v, g_h, of_z ? of_z : zeros, g_p, g_theta,
               real(p.v_reset), p.detach_reset != 0, p.relative != 0}, length);
        accumulate(decay, all.decay, t, length, g_p);
        accumulate(threshold, all.threshold, t, length, g_theta);
    }
    void fold(i64 index) {
        if (decay) all.decay.fold(index, unit, decay);
        if (threshold) all.threshold.fold(index, unit, threshold);
        if (gain) all.gain.fold(index, unit, gain);
    }

  private:
    const Unit& unit;
    const Problem& p;
    ParameterGradients& all;
    bool on;
    real *old_g_v = nullptr, *g_p = nullptr, *g_theta = nullptr, *zeros = nullptr;
    double *decay = nullptr, *threshold = nullptr, *gain = nullptr;
    ParameterTerms<real> terms = nullptr;

    double* take(Arena& arena, bool wanted, i64 steps) {
        if (!wanted) return nullptr;
        double* sums = arena.take<double>(steps * unit.plan.run);
        fill(sums, steps * unit.plan.run, 0.0);
        return sums;
    }
    void accumulate(double* sums, const ColumnSum& sum, i64 t, i64 length, const real* terms) {
        if (!sums) return;
        double* to = sums + sum.step(t) * unit.plan.run;
        for (i64 i = 0; i < length; ++i) to[i] += double(terms[i]);
    }
};

}  // namespace
