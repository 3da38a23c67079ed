// Which neurons a thread of a CUDA kernel serves, their parameters, and their steps.
#pragma once

#include "cuda_memory.h"

namespace lif {

// The geometry of one launch. fastsnn/cuda.py reads the names of the fields from these lines.
struct Tiles {
    i64 kernel;        // index in the list of kernels below
    i64 dtype;
    i64 vector;        // neurons per thread
    i64 blocks;
    i64 threads;       // per block
    i64 shared;        // bytes per block
    i64 by_column;     // 0: a block serves `chunk` of one group; 1: a strip of columns, threads hold fixed columns
    i64 groups;        // what partial sums are kept for: 1, channels (by_column 0), or columns (by_column 1)
    i64 inner;         // elements in a row from one group to the next (by_column 0)
    i64 period;        // elements from one row to the next
    i64 rows;
    i64 chunks;        // partial sums per group
    i64 width;         // threads side by side (by_column 1)
    i64 channel_step;  // 1 where the neurons of a thread lie in neighbouring channels, 0 where they share one
    i64 segment;       // steps that the backward pass keeps at a time
    i64 offset_0;      // where in the scratch, in doubles, the partial sums of each quantity begin; -1: not asked for
    i64 offset_1;
    i64 offset_2;
    i64 offset_3;
    i64 quantity;      // of a launch of `finish`
    i64 lanes;         // threads per result of `finish`
};

enum Quantity : int { sum_decay, sum_threshold, sum_gain, quantities };  // of the backward pass
enum Moment : int { sum_z, sum_squares, sum_spikes, sum_guard, moments };  // of the forward pass

DEVICE i64 offset_of(const Tiles& g, int quantity) {
    return quantity == 0 ? g.offset_0 : (quantity == 1 ? g.offset_1 : (quantity == 2 ? g.offset_2 : g.offset_3));
}

// ---- rows as compile-time constants ------------------------------------------------------------------------------

template <int N> struct Id {
    LIF_INLINE constexpr operator int() const { return N; }
};
// f(Id) for the row with this id, once for all neurons of a thread: one uniform branch.
template <class F> DEVICE void by_charge(int id, F f) {
    switch (id) {
#define CHARGE(name, ...) case charge_##name: return f(Id<charge_##name>());
#include "lif.def"
    }
    f(Id<-1>());
}
template <class F> DEVICE void by_fire(int id, F f) {
    switch (id) {
#define FIRE(name, ...) case fire_##name: return f(Id<fire_##name>());
#include "lif.def"
    }
    f(Id<-1>());
}
template <class F> DEVICE void by_reset(int id, F f) {
    switch (id) {
#define RESET(name, ...) case reset_##name: return f(Id<reset_##name>());
#include "lif.def"
    }
    f(Id<-1>());
}
template <class F> DEVICE void by_surrogate(int id, F f) {
    switch (id) {
#define SURROGATE(name, ...) case surrogate_##name: return f(Id<surrogate_##name>());
#include "lif.def"
    }
    f(Id<-1>());
}

// The rows of a call: template arguments where they are known at compile time, -1 where the struct holds them.
template <int C, int F, int R, int S> struct Rows {
    int charge, fire, reset, surrogate;
    DEVICE explicit Rows(const Problem& p)
        : charge(C >= 0 ? C : int(p.charge)), fire(F >= 0 ? F : int(p.fire)),
          reset(R >= 0 ? R : int(p.reset)),
          surrogate(S >= 0 ? S : int(p.surrogate)) {}
};
typedef Rows<-1, -1, -1, -1> AnyRows;

// ---- which elements a thread serves --------------------------------------------------------------------------------

DEVICE i64 quotient(i64 a, i64 b) {
    return ((a | b) >> 32) == 0 ? i64(u32(a) / u32(b)) : a / b;
}

// A thread without elements stands at 0, reads what is there and writes nothing.
struct Place {
    i64 i;       // of the first neuron, in a step
    i64 column;  // i % period of the struct
    i64 channel;
    bool valid;
};

template <int K> DEVICE Place locate(const Problem& p, const Tiles& g, int part, int parts) {
    Place place;
    const int thread = threadIdx.x, threads = blockDim.x;
    if (g.by_column) {
        const int width = int(g.width), height = threads / width;
        const i64 strips = (g.period + width * K - 1) / (width * K);
        const i64 chunk = blockIdx.x / strips, strip = blockIdx.x - chunk * strips;
        const i64 column = (strip * width + thread % width) * K;
        const i64 row = (chunk * parts + part) * height + thread / width;
        place.valid = column < g.period && row < g.rows;
        place.i = row * g.period + column;
    } else {
        const i64 group = blockIdx.x / g.chunks, chunk = blockIdx.x - group * g.chunks;
        const i64 member = ((chunk * parts + part) * threads + thread) * K;
        place.valid = member < g.rows * g.inner;
        if (g.groups == 1) {
            place.i = member;
        } else {
            const i64 row = quotient(member, g.inner);
            place.i = row * g.period + group * g.inner + (member - row * g.inner);
        }
    }
    if (!place.valid) place.i = 0;
    const i64 period = p.channels * p.inner;
    place.column = place.i - quotient(place.i, period) * period;
    place.channel = quotient(place.column, p.inner);
    return place;
}

// A parameter [steps or 1, columns], or a number; without `tensors` always a number.
template <class real, bool tensors> struct Parameter {
    const real* at;
    real number;
    i64 row;
    i64 columns;
    DEVICE Parameter(const void* from, f64 value, i64 steps, i64 columns)
        : at(static_cast<const real*>(from)), number(real(value)), row(steps > 1 ? columns : 0), columns(columns) {}
    template <int K> DEVICE void fetch(const Problem& p, const Tiles& g, i64 t, const Place& place, real (&y)[K]) const {
        if (!tensors || !at || columns == 1) {
            const real same = tensors && at ? __ldg(at + t * row) : number;
            for (int k = 0; k < K; ++k) y[k] = same;
        } else {
            const bool by_channel = columns == p.channels;
            const real* from = at + t * row + (by_channel ? place.channel : place.column);
            const i64 step = by_channel ? g.channel_step : 1;
            for (int k = 0; k < K; ++k) y[k] = __ldg(from + k * step);
        }
    }
};

// What the forward, the backward and the straight kernel share. tensors: whether parameters may be tensors.
template <class E, int K, class Kinds, bool tensors = true> struct Neurons {
    typedef typename RealOf<E>::type real;
    const Problem& p;
    const Tiles& g;
    const Kinds rows;
    const Parameter<real, tensors> decay, threshold;
    const real v_reset, sigma;
    const u64 seed;

    DEVICE Neurons(const Problem& p, const Tiles& g)
        : p(p), g(g), rows(p), decay(p.decay, p.decay_value, p.decay_steps, p.decay_columns),
          threshold(p.threshold, p.threshold_value, p.threshold_steps, p.threshold_columns), v_reset(real(p.v_reset)),
          sigma(real(p.noise)), seed(p.seed ? u64(*static_cast<const i64*>(p.seed)) : 0) {}

    DEVICE void start(const Place& place, real (&v)[K]) const { load_or<K>(p.v0, place.i, real(p.v_start), v); }
    DEVICE const E* x_at(i64 t, const Place& place) const { return static_cast<const E*>(p.x) + t * p.x_stride + place.i; }
    // Where x of step t lies, for the one time it is asked for: a constant current only at its first step.
    DEVICE const E* x_once(i64 t, i64 end, const Place& place) const {
        return t < end && (t == 0 || p.x_stride) ? x_at(t, place) : nullptr;
    }
    DEVICE real gain_at(i64 t) const { return tensors && p.gain ? __ldg(static_cast<const real*>(p.gain) + t) : real(1); }
    DEVICE void current(i64 t, const Pack<E, K>& x, real (&y)[K]) const {
        for (int k = 0; k < K; ++k) y[k] = widen(x.e[k]);
        if (tensors && p.gain) {
            const real gain = gain_at(t);
            for (int k = 0; k < K; ++k) y[k] = gain * y[k];
        }
    }
    // The state after the spike; where nothing fires, that is h.
    DEVICE void after_spike(const real (&h)[K], const real (&s)[K], const real (&theta)[K], const real (&fired)[K], real (&v)[K]) const {
        by_reset(rows.fire == fire_none ? int(reset_none) : rows.reset, [&](auto reset) {
            for (int k = 0; k < K; ++k) v[k] = next_state(reset, h[k], s[k], theta[k], fired[k], v_reset);
        });
    }
    // Charge, fire, reset: v moves on; h, s, and where a delayed reset was due, come back.
    DEVICE void step(i64 t, const Place& place, const real (&x)[K], const real (&theta)[K], real (&v)[K], real (&h)[K],
                     real (&s)[K], real (&fired)[K]) const {
        real q[K], u[K];
        decay.fetch(p, g, t, place, q);
        by_reset(rows.reset, [&](auto reset) {
            for (int k = 0; k < K; ++k) {
                fired[k] = fired_before(reset, v[k], theta[k]);
                u[k] = before_charge(reset, v[k], fired[k]);
            }
        });
        by_charge(rows.charge, [&](auto charge) {
            for (int k = 0; k < K; ++k) h[k] = charge_plain(charge, u[k], x[k], q[k], v_reset);
        });
        by_reset(rows.reset, [&](auto reset) {
            for (int k = 0; k < K; ++k) h[k] = after_charge(reset, h[k], theta[k], fired[k]);
        });
        by_fire(rows.fire, [&](auto fire) {
            for (int k = 0; k < K; ++k) {
                // Rows that do not look at the random number drop it with all that makes it.
                const real random = uniform<real>(seed, logical_index(p, place.i + k), u32(p.first_step + t));
                s[k] = spike(fire, h[k] - theta[k], random, sigma);
            }
        });
        after_spike(h, s, theta, fired, v);
    }
};

}  // namespace lif
