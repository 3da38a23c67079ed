// The short way through the CPU kernels, for what most networks are made of: parameters that are numbers, fire `ge`,
// a hard or soft reset. The same functions of lif.h in one loop forward and one backward, by registers full of neurons,
// which store their results where they belong at once.
#pragma once

#include "cpu_sums.h"
#include "cpu_vector.h"

namespace {

struct Plain {
    float p, theta, r, a, b;
    bool detach;
    int charge;
};

// How the statistics of a step are taken, and their gradients given: not at all, for a stretch of one channel, or by
// place, where channels are narrow.
enum Summing : int { no_moments, of_a_stretch, by_place, moment_kinds };

// What a step writes: spikes, or membranes for the backward pass.
enum Written : int { spikes_kept, spikes_streamed, membranes_kept, written };

// One step of the places [begin, end) of a run; `out` is for the places from `begin` on.
template <int charge, int reset, int what, bool moments>
void plain_step(const Plain& a, MomentSums<float>* moment_sums, i64 t, const float* x, float* v, float* out, i64 begin, i64 end) {
    constexpr bool streamed = what == spikes_streamed;
    const Constant p_(a.p), theta_(a.theta), r_(a.r);
    struct Sums {
        float sum, square;
    };
    // The sums of the distances from a shift, where moments are wanted.
    auto stretch = [&](i64 from, i64 to, float shift) LIF_LAMBDA {
        const Constant shift_(shift);
        const float* x_ = x + from;
        float *v_ = v + from, *out_ = out + (from - begin);
        Vector sums[2] = {Vector(0), Vector(0)}, squares[2] = {Vector(0), Vector(0)};
        float sum = 0, square = 0;
        in_registers<streamed>(out_, to - from, [&](i64 i, int place, auto kind) LIF_LAMBDA {
            using value = decltype(kind);
            const value p = p_.as(kind), theta = theta_.as(kind), r = r_.as(kind);
            const value h = charge_plain(charge, get<value>(v_ + i), get<value>(x_ + i), p, r), z = h - theta;
            const value s = spike(fire_ge, z, value(0), value(0));
            put(v_ + i, next_state(reset, h, s, theta, value(0), r));
            if constexpr (streamed)
                put_past_cache(out_ + i, s);
            else
                put(out_ + i, what == membranes_kept ? h : s);
            if constexpr (moments) {
                const value d = z - shift_.as(kind);
                if constexpr (sizeof(value) == sizeof(float)) {
                    sum += d;
                    square = square_added(d, square);
                } else {
                    sums[place] = sums[place] + d;
                    squares[place] = square_added(d, squares[place]);
                }
            }
        });
        return Sums{sum + sum_of(sums[0] + sums[1]), square + sum_of(squares[0] + squares[1])};
    };
    if constexpr (!moments) {
        stretch(begin, end, 0);
        return;
    }
    for (const Segment& segment : moment_sums->stretches()) {
        if (segment.begin >= end) break;
        if (segment.end <= begin) continue;
        const i64 from = segment.begin < begin ? begin : segment.begin, to = segment.end < end ? segment.end : end;
        const Shares shares = moment_sums->at(t, segment, from, to, [&](i64 i) LIF_LAMBDA { return charge_plain(charge, v[i], x[i], a.p, a.r) - a.theta; });
        const Sums here = stretch(from, to, float(shares.shift[segment.local]));
        shares.sum[segment.local] += here.sum;
        shares.square[segment.local] += here.square;
    }
}

// One step of a run, summed by place; the sums of a round stay in the cache.
template <int charge, int reset, bool streamed>
void plain_step_by_place(const Plain& a, const float* x, float* v, float* out, const PlaceSums<float>& to, i64 length) {
    const Constant p_(a.p), theta_(a.theta), r_(a.r);
    in_cycles(length, to.cycle, [&](i64 begin, i64 end) LIF_LAMBDA {
        const float* x_i = x + begin;
        float *v_i = v + begin, *out_i = out + begin, *sum = to.sum, *square = to.square;
        const float* shift = to.shift;
        in_registers<streamed>(out_i, end - begin, [&](i64 i, int, auto kind) LIF_LAMBDA {
            using value = decltype(kind);
            const value p = p_.as(kind), theta = theta_.as(kind), r = r_.as(kind);
            const value h = charge_plain(charge, get<value>(v_i + i), get<value>(x_i + i), p, r), z = h - theta;
            const value s = spike(fire_ge, z, value(0), value(0)), d = z - get<value>(shift + i);
            put(v_i + i, next_state(reset, h, s, theta, value(0), r));
            if constexpr (streamed)
                put_past_cache(out_i + i, s);
            else
                put(out_i + i, s);
            put(sum + i, get<value>(sum + i) + d);
            put(square + i, square_added(d, get<value>(square + i)));
        });
    });
}

// The adjoint of one step of the places [begin, end) of a run; g_x is for the places from `begin` on.
template <int charge, int reset, int surrogate, int summing, bool streamed>
void plain_adjoint(const Plain& a, const Coefficients<float>& coefficients, i64 t, const float* h, const float* g_s, float* g_v, float* g_x,
                   i64 begin, i64 end) {
    const Constant p_(a.p), theta_(a.theta), r_(a.r), first(a.a), second(a.b);
    const bool detach = a.detach;
    // term: of the stretch; places: those of the round that begins at `from`.
    auto stretch = [&](i64 from, i64 to, const MomentTerm<float>& term, const PlaceTerms<float>& places) LIF_LAMBDA {
        const Constant rise(term.slope), mean(term.mean), flat(summing == of_a_stretch ? term.flat - term.slope * term.rest : 0.0f);
        const float *h_ = h + from, *g_s_ = g_s + from;
        float *g_v_ = g_v + from, *g_x_ = g_x + (from - begin);
        in_registers<streamed>(g_x_, to - from, [&](i64 i, int, auto kind) LIF_LAMBDA {
            using value = decltype(kind);
            const value p = p_.as(kind), theta = theta_.as(kind), r = r_.as(kind), zero(0);
            const value h_i = get<value>(h_ + i), g = get<value>(g_v_ + i), direct = get<value>(g_s_ + i), z = h_i - theta;
            const value s = spike(fire_ge, z, zero, zero), slope = surrogate_plain(surrogate, z, first.as(kind), second.as(kind));
            const value g_spike = spike_gradient(reset, detach, direct, g, h_i, theta, r);
            value extra = zero;
            // A slope of 0 keeps infinite membranes out.
            if constexpr (summing == of_a_stretch)
                extra = flat.as(kind) + select(rise.as(kind) != zero, rise.as(kind) * (z - mean.as(kind)), zero);
            if constexpr (summing == by_place) {
                const value slope_i = get<value>(places.slope + i), away = (z - get<value>(places.mean + i)) - get<value>(places.rest + i);
                extra = get<value>(places.flat + i) + select(slope_i != zero, slope_i * away, zero);
            }
            const value total = membrane_gradient(fire_ge, reset, g_spike, g, s, slope, extra);
            const value out = total * charge_dx(charge, zero, zero, p, r);
            put(g_v_ + i, total * charge_dv(charge, zero, zero, p, r));
            if constexpr (streamed)
                put_past_cache(g_x_ + i, out);
            else
                put(g_x_ + i, out);
        });
    };
    if constexpr (summing == no_moments) stretch(begin, end, {}, {});
    if constexpr (summing == by_place) {
        const PlaceTerms<float> places = coefficients.at_places(t);
        in_cycles(end - begin, places.cycle, [&](i64 from, i64 to) LIF_LAMBDA { stretch(begin + from, begin + to, {}, places); });
    }
    if constexpr (summing == of_a_stretch) {
        for (const Segment& segment : coefficients.stretches()) {
            if (segment.begin >= end) break;
            if (segment.end <= begin) continue;
            stretch(segment.begin < begin ? begin : segment.begin, segment.end < end ? segment.end : end, coefficients.of(t, segment), {});
        }
    }
}

using PlainStep = void (*)(const Plain&, MomentSums<float>*, i64, const float*, float*, float*, i64, i64);
using PlainStepByPlace = void (*)(const Plain&, const float*, float*, float*, const PlaceSums<float>&, i64);
using PlainAdjoint = void (*)(const Plain&, const Coefficients<float>&, i64, const float*, const float*, float*, float*, i64, i64);

// The rows that have a short way; a charge, reset or surrogate without one takes the long way. Builds for tests, which are
// made often and not for speed, leave most surrogates out (LIF_FEW): three quarters of what there is to compile.
#ifdef LIF_FEW
constexpr int plain_surrogates = 2;
#else
constexpr int plain_surrogates = surrogates;
#endif
constexpr int plain_charges[] = {charge_leak, charge_leak_input}, plain_resets[] = {reset_hard, reset_soft};

inline int place_of(const int (&rows)[2], i64 row) { return row == rows[0] ? 0 : (row == rows[1] ? 1 : -1); }

template <int... id> PlainStep plain_step_at(int place, std::integer_sequence<int, id...>) {
    static const PlainStep all[] = {
        plain_step<plain_charges[id / (4 * written)], plain_resets[id / (2 * written) % 2], id / 2 % written,
                   id % 2 == 1 && id / 2 % written != membranes_kept>...};  // the statistics are taken in the forward pass
    return all[place];
}
template <int... id> PlainAdjoint plain_adjoint_at(int place, std::integer_sequence<int, id...>) {
    static const PlainAdjoint all[] = {
        plain_adjoint<plain_charges[id / (4 * moment_kinds * plain_surrogates)], plain_resets[id / (2 * moment_kinds * plain_surrogates) % 2],
                      id / (2 * moment_kinds) % plain_surrogates, id / 2 % moment_kinds, id % 2 == 1>...};
    return all[place];
}

inline float plain_value(const void* base, double value) { return base ? *(const float*)base : float(value); }

inline bool is_number(i64 steps, i64 columns) { return steps == 1 && columns == 1; }

// Whether a call may go the short way.
inline bool is_plain(const Problem& p) {
    return p.dtype != float64 && p.fire == fire_ge && place_of(plain_charges, p.charge) >= 0 &&
           place_of(plain_resets, p.reset) >= 0 && is_number(p.decay_steps, p.decay_columns) &&
           is_number(p.threshold_steps, p.threshold_columns) && !p.membrane && !p.rate && !p.guard;
}
inline bool is_plain_backward(const Problem& p) {
    return is_plain(p) && p.adjoint == adjoint_bptt && !p.relative && p.surrogate < plain_surrogates && is_number(p.a_steps, p.a_columns) &&
           is_number(p.b_steps, p.b_columns) && !p.g_membrane && !p.g_rate && !p.g_guard && !p.g_decay &&
           !p.g_threshold && !p.g_gain;
}

inline Plain make_plain(const Problem& p) {
    return {plain_value(p.decay, p.decay_value), plain_value(p.threshold, p.threshold_value), float(p.v_reset),
            plain_value(p.a, p.a_value), plain_value(p.b, p.b_value), p.detach_reset != 0, int(p.charge)};
}
inline PlainStep find_plain_step(const Problem& p, int what, bool moments) {
    int place = place_of(plain_charges, p.charge) * 2 + place_of(plain_resets, p.reset);
    return plain_step_at((place * written + what) * 2 + moments, std::make_integer_sequence<int, 8 * written>());
}
template <int... id> PlainStepByPlace plain_by_place_at(int place, std::integer_sequence<int, id...>) {
    static const PlainStepByPlace all[] = {plain_step_by_place<plain_charges[id / 4], plain_resets[id / 2 % 2], id % 2 == 1>...};
    return all[place];
}
inline PlainStepByPlace find_plain_step_by_place(const Problem& p, bool streamed) {
    int place = place_of(plain_charges, p.charge) * 2 + place_of(plain_resets, p.reset);
    return plain_by_place_at(place * 2 + streamed, std::make_integer_sequence<int, 8>());
}
inline PlainAdjoint find_plain_adjoint(const Problem& p, int summing, bool streamed) {
    int place = place_of(plain_charges, p.charge) * 2 + place_of(plain_resets, p.reset);
    return plain_adjoint_at(int(((place * plain_surrogates + p.surrogate) * moment_kinds + summing) * 2 + streamed),
                            std::make_integer_sequence<int, 8 * moment_kinds * plain_surrogates>());
}

}  // namespace
