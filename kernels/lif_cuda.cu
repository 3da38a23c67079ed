// The LIF operator on CUDA: forward, backward, straight (the approximate adjoints), and the sums over blocks.
// One source for nvcc, NVRTC and, under tests/emulation/cuda_emulation.h, g++. Which elements a thread serves is
// decided by fastsnn/cuda.py and arrives in Tiles; the rows of the tables come from lif.h alone.
#include "cuda_straight.h"
#include "cuda_sums.h"

namespace lif {

// ---- forward -----------------------------------------------------------------------------------------------------


template <class E, int K, class Kinds> DEVICE void emit(const Neurons<E, K, Kinds>& n, i64 t, const Place& place,
        const typename RealOf<E>::type (&h)[K], const typename RealOf<E>::type (&s)[K]) {
    typedef typename RealOf<E>::type real;
    const Problem& p = n.p;
    const i64 at = t * p.count + place.i;
    if (n.rows.fire == fire_none)
        store<E, K>(static_cast<E*>(p.spikes) + at, h);
    else
        store<E, K>(static_cast<E*>(p.spikes) + at, s);
    if (p.membrane) store<real, K>(static_cast<real*>(p.membrane) + at, h);
}
template <class real, int K> DEVICE void keep_state(const Problem& p, i64 t, const Place& place, const real (&v)[K]) {
    if (p.states && t % p.state_interval == 0)
        store<real, K>(static_cast<real*>(p.states) + t / p.state_interval * p.count + place.i, v);
}

template <class E, int K, class Kinds>
__global__ void __launch_bounds__(256, K < 8 ? 4 : 2) forward(const __grid_constant__ Problem p, const __grid_constant__ Tiles g) {
    typedef typename RealOf<E>::type real;
    SHARED(memory);
    const Neurons<E, K, Kinds> n(p, g);
    const Place place = locate<K>(p, g, 0, 1);
    if (!place.valid) return;
    real v[K], x[K], theta[K], h[K], s[K], fired[K];
    n.start(place, v);
    const Ahead<E, K> ahead(memory);
    const int steps = int(p.steps);
    for (int t = 0; t < ahead.depth - 1; ++t) ahead.ask(t, n.x_once(t, steps, place));
    Pack<E, K> pack;
    for (int t = 0; t < steps; ++t) {
        ahead.ask(t + ahead.depth - 1, n.x_once(t + ahead.depth - 1, steps, place));
        if (t == 0 || p.x_stride) ahead.get(t, pack);
        keep_state(p, t, place, v);
        n.current(t, pack, x);
        n.threshold.fetch(p, g, t, place, theta);
        n.step(t, place, x, theta, v, h, s, fired);
        emit(n, t, place, h, s);
    }
    store<real, K>(static_cast<real*>(p.v) + place.i, v);
}

// Forward with statistics: several tiles per block, all at the same step, so that a block has one sum per step.
template <class E, int K, bool by_column, class Kinds>
__global__ void __launch_bounds__(256, 2) forward_statistics(const __grid_constant__ Problem p, const __grid_constant__ Tiles g) {
    typedef typename RealOf<E>::type real;
    constexpr int parts = by_column && K >= 8 ? 1 : 2, slots = by_column ? K : 1;
    SHARED(memory);
    const Neurons<E, K, Kinds> n(p, g);
    Place place[parts];
    real v[parts][K];
    for (int j = 0; j < parts; ++j) {
        place[j] = locate<K>(p, g, j, parts);
        n.start(place[j], v[j]);
    }
    // the rate, then the guard, follow mean and variance where they are wanted
    const int guard = p.rate ? 3 : 2, quantities = guard + (p.guard ? 1 : 0);
    const int size = quantities * slots * int(blockDim.x);
    const real delta = real(p.delta);
    const Ahead<E, K, 8> ahead(memory + 2 * size * sizeof(double));
    const int steps = int(p.steps);
    // Counted over steps and parts; parts is a power of two.
#pragma unroll
    for (int j = 0; j < ahead.depth - 1; ++j) ahead.ask(j, j < steps * parts ? n.x_at(j / parts, place[j % parts]) : nullptr);
    for (int t = 0; t < steps; ++t) {
        double sums[moments][slots] = {};
#pragma unroll
        for (int j = 0; j < parts; ++j) {
            real x[K], theta[K], h[K], s[K], fired[K];
            Pack<E, K> pack;
            const int next = t * parts + j + ahead.depth - 1;
            ahead.ask(next, next < steps * parts ? n.x_at(next / parts, place[(j + ahead.depth - 1) % parts]) : nullptr);
            ahead.get(t * parts + j, pack);
            n.current(t, pack, x);
            n.threshold.fetch(p, g, t, place[j], theta);
            if (place[j].valid) keep_state(p, t, place[j], v[j]);
            n.step(t, place[j], x, theta, v[j], h, s, fired);
            if (!place[j].valid) continue;
            emit(n, t, place[j], h, s);
            for (int k = 0; k < K; ++k) {
                const real z = h[k] - theta[k];
                const int slot = by_column ? k : 0;
                sums[sum_z][slot] += double(z);
                sums[sum_squares][slot] += double(z) * double(z);
                sums[sum_spikes][slot] += double(s[k]);
                if (p.guard) sums[sum_guard][slot] += double(guard_value(p.power, z, delta));
            }
        }
        // Two buffers in turn: whoever writes one has seen everybody leave it.
        double* values = reinterpret_cast<double*>(memory) + (t & 1) * size;
        put_values(g, values, 0, sums[sum_z]);
        put_values(g, values, 1, sums[sum_squares]);
        if (p.rate) put_values(g, values, 2, sums[sum_spikes]);
        if (p.guard) put_values(g, values, guard, sums[sum_guard]);
        __syncthreads();
        sum_block<K>(g, values, quantities, [&](int q) {
            const int moment = q < 2 ? q : (q == 2 && p.rate ? int(sum_spikes) : int(sum_guard));
            return static_cast<double*>(p.scratch) + offset_of(g, moment) + t * g.chunks * g.groups;
        });
    }
    for (int j = 0; j < parts; ++j)
        if (place[j].valid) store<real, K>(static_cast<real*>(p.v) + place[j].i, v[j]);
}

// ---- backward ----------------------------------------------------------------------------------------------------

// [steps, channels] double, at the channels of a thread's neurons; false where there is none.
template <int K> DEVICE bool fetch_channels(const Problem& p, const Tiles& g, const void* from, i64 t, const Place& place, double (&y)[K]) {
    if (!from) return false;
    const double* at = static_cast<const double*>(from) + t * p.channels + place.channel;
    if (g.channel_step == 0) {
        const double same = __ldg(at);
        for (int k = 0; k < K; ++k) y[k] = same;
    } else {
        for (int k = 0; k < K; ++k) y[k] = __ldg(at + k);
    }
    return true;
}
// What the gradients of the statistics add to the gradient of z.
template <int K, class real> DEVICE void statistics_gradient(const Problem& p, const Tiles& g, i64 t, const Place& place,
                                                             const real (&z)[K], real (&extra)[K]) {
    double sum[K] = {}, factor[K], mean[K];
    if (fetch_channels(p, g, p.g_mean, t, place, factor))
        for (int k = 0; k < K; ++k) sum[k] += factor[k];
    if (fetch_channels(p, g, p.g_variance, t, place, factor) && fetch_channels(p, g, p.mean, t, place, mean))
        for (int k = 0; k < K; ++k) sum[k] += factor[k] * (double(z[k]) - mean[k]);
    if (fetch_channels(p, g, p.g_guard, t, place, factor))
        for (int k = 0; k < K; ++k) sum[k] += factor[k] * double(guard_slope(p.power, z[k], real(p.delta)));
    for (int k = 0; k < K; ++k) extra[k] = real(sum[k]);
}

// Whether a row's derivatives look at x: then the backward pass reads x a second time. Folds to a constant.
DEVICE bool needs_x(int charge, bool parameter) {
    bool needs = true;
    by_charge(charge, [&](auto id) {
        needs = charge_dx(id, 0.3, 0.7, 0.6, 0.1) != charge_dx(id, 0.3, 0.9, 0.6, 0.1) ||
                charge_dv(id, 0.3, 0.7, 0.6, 0.1) != charge_dv(id, 0.3, 0.9, 0.6, 0.1) ||
                (parameter && charge_dp(id, 0.3, 0.7, 0.6, 0.1) != charge_dp(id, 0.3, 0.9, 0.6, 0.1));
    });
    return needs;
}

// What a backward kernel can do besides: parameters that are tensors and the gradient of the membrane; gradients of
// statistics; gradients of parameters. What it need not do costs it no registers.
enum Uses : int { uses_tensors = 1, uses_statistics = 2, uses_sums = 4, uses_all = 7 };

template <class E, int K, int T, class Kinds, int uses>
__global__ void __launch_bounds__(128, uses == 0 ? (K < 8 ? 4 : 3) : (uses == uses_statistics ? (K < 8 ? 3 : 2) : 1)) backward(const __grid_constant__ Problem p, const __grid_constant__ Tiles g) {
    typedef typename RealOf<E>::type real;
    [[maybe_unused]] constexpr int turns = T ? T : 1;
    constexpr bool tensors = uses & uses_tensors, sums = uses & uses_sums;
    SHARED(memory);
    const Neurons<E, K, Kinds, tensors> n(p, g);
    const Place place = locate<K>(p, g, 0, 1);
    if (!sums && !place.valid) return;
    const Parameter<real, tensors> a(p.a, p.a_value, p.a_steps, p.a_columns), b(p.b, p.b_value, p.b_steps, p.b_columns);
    const bool is_none = n.rows.fire == fire_none;
    const bool every_step = sums && (p.g_gain || (p.g_decay && p.decay_steps > 1) || (p.g_threshold && p.threshold_steps > 1));
    const bool again = needs_x(n.rows.charge, sums && p.g_decay);
    const int sum_size = sums ? quantities * (g.by_column ? K : 1) * int(blockDim.x) : 0;  // one of two buffers
    double* const sum_memory = reinterpret_cast<double*>(memory);
    const Ahead<E, K> ahead(memory + 2 * sum_size * sizeof(double));
    // Where partial sums go: of parameters that vary with t at every step, of the others at the end; null: nowhere.
    auto sums_at = [&](int q, i64 t, bool step) -> double* {
        const i64 rows = q == sum_decay ? p.decay_steps : (q == sum_threshold ? p.threshold_steps : 2);
        const bool wanted = offset_of(g, q) >= 0 && (rows > 1) == step;
        return wanted ? static_cast<double*>(p.scratch) + offset_of(g, q) + t * g.chunks * g.groups : nullptr;
    };
    Kept<real, K, T> kept(ahead.base + ahead.depth * ahead.bytes * int(blockDim.x));

    real g_v[K], g_constant[K];
    load_or<K>(p.g_v, place.i, real(0), g_v);
    for (int k = 0; k < K; ++k) g_constant[k] = real(0);
    double total[2][K] = {};
    Pack<E, K> pack;
    if (!p.x_stride) pack.load(n.x_at(0, place), false);
    const i64 segments = T ? 1 : (p.steps + g.segment - 1) / g.segment;
    for (i64 segment = segments - 1; segment >= 0; --segment) {
        const i64 first = segment * g.segment;
        const int length = T ? T : int(p.steps - first < g.segment ? p.steps - first : g.segment);
        real begin[K], v[K], x[K], theta[K], h[K], s[K], fired[K];
        u32 spiked[K], due[K];
        if (segments > 1)
            load<real, K>(static_cast<const real*>(p.states) + segment * p.count + place.i, begin);
        else
            n.start(place, begin);
        for (int k = 0; k < K; ++k) {
            v[k] = begin[k];
            spiked[k] = due[k] = 0;
        }
        auto ask_x = [&](int t) { ahead.ask(t, t < length && p.x_stride ? n.x_at(first + t, place) : nullptr); };
        for (int t = 0; t < ahead.depth - 1; ++t) ask_x(t);
#pragma unroll (turns)
        for (int t = 0; t < length; ++t) {
            ask_x(t + ahead.depth - 1);
            if (p.x_stride) ahead.get(t, pack);
            n.current(first + t, pack, x);
            n.threshold.fetch(p, g, first + t, place, theta);
            n.step(first + t, place, x, theta, v, h, s, fired);
            kept.put(t, h);
            for (int k = 0; k < K; ++k) {
                spiked[k] |= s[k] != real(0) ? 1u << t : 0u;
                due[k] |= fired[k] != real(0) ? 1u << t : 0u;
            }
        }

        const E* const g_spikes = static_cast<const E*>(p.g_spikes);
        // Counted from the last step backwards.
        auto ask_gradient = [&](int j) {
            ahead.ask(j, g_spikes && j < length ? g_spikes + (first + length - 1 - j) * p.count + place.i : nullptr);
        };
        for (int j = 0; j < ahead.depth - 1; ++j) ask_gradient(j);
        kept.get(length - 1, h);
#pragma unroll (turns)
        for (int turn = length - 1; turn >= 0; --turn) {
            const i64 t = first + turn;
            Pack<E, K> g_pack;
            ask_gradient(length - 1 - turn + ahead.depth - 1);
            ahead.get(length - 1 - turn, g_pack);
            real before[K], q[K], z[K], extra[K], extra_z[K], slope[K], g_s[K], g_spike[K], g_h[K], g_x[K], dx[K], dv[K];
            real h_before[K], y[K];
            n.threshold.fetch(p, g, t, place, theta);
            n.decay.fetch(p, g, t, place, q);
            for (int k = 0; k < K; ++k) {
                s[k] = spiked[k] >> turn & 1 ? real(1) : real(0);
                fired[k] = due[k] >> turn & 1 ? real(1) : real(0);
                z[k] = h[k] - theta[k];
                g_s[k] = g_spikes ? real(widen(g_pack.e[k])) : real(0);
                extra_z[k] = real(0);
            }
            // The state before this step: v0 or the kept one, or what the step before left.
            if (turn == 0) {
                for (int k = 0; k < K; ++k) before[k] = h_before[k] = begin[k];
            } else {
                kept.get(turn - 1, h_before);
                n.threshold.fetch(p, g, t - 1, place, y);
                real s_before[K], fired_before[K];
                for (int k = 0; k < K; ++k) {
                    s_before[k] = spiked[k] >> (turn - 1) & 1 ? real(1) : real(0);
                    fired_before[k] = due[k] >> (turn - 1) & 1 ? real(1) : real(0);
                }
                n.after_spike(h_before, s_before, y, fired_before, before);
            }
            if (again) {
                Pack<E, K> x_pack;
                x_pack.load(n.x_at(t, place), true);
                n.current(t, x_pack, x);
            } else {
                for (int k = 0; k < K; ++k) x[k] = real(0);
            }
            if constexpr (uses & uses_statistics) {
                double factor[K];
                if (fetch_channels(p, g, p.g_rate, t, place, factor))
                    for (int k = 0; k < K; ++k) g_s[k] = real(double(g_s[k]) + factor[k]);
                if (p.g_mean || p.g_variance || p.g_guard) statistics_gradient(p, g, t, place, z, extra_z);
            }
            for (int k = 0; k < K; ++k) extra[k] = extra_z[k];
            if (tensors && p.g_membrane) {
                load<real, K>(static_cast<const real*>(p.g_membrane) + t * p.count + place.i, y);
                for (int k = 0; k < K; ++k) extra[k] += y[k];
            }
            for (int k = 0; k < K; ++k) slope[k] = real(0);
            if (!is_none) {
                real a_t[K], b_t[K];
                a.fetch(p, g, t, place, a_t);
                b.fetch(p, g, t, place, b_t);
                by_surrogate(n.rows.surrogate, [&](auto surrogate) {
                    for (int k = 0; k < K; ++k) slope[k] = surrogate_slope(surrogate, p.relative != 0, z[k], theta[k], a_t[k], b_t[k]);
                });
            }
            by_reset(n.rows.reset, [&](auto reset) {
                for (int k = 0; k < K; ++k) {
                    g_spike[k] = spike_gradient(reset, is_none || p.detach_reset != 0, g_s[k], g_v[k], h[k], theta[k], n.v_reset);
                    g_h[k] = membrane_gradient(n.rows.fire, reset, g_spike[k], g_v[k], s[k], slope[k], extra[k]);
                }
            });
            double part[3][K] = {};
            if constexpr (sums) {
                if (p.g_threshold)
                    by_reset(n.rows.reset, [&](auto reset) {
                        for (int k = 0; k < K; ++k)
                            part[sum_threshold][k] = double(threshold_gradient(n.rows.fire, reset, p.relative != 0, g_spike[k], g_v[k],
                                g_h[k], h[k], s[k], slope[k], theta[k], fired[k], extra_z[k]));
                    });
            }
            by_reset(n.rows.reset, [&](auto reset) {
                for (int k = 0; k < K; ++k) {
                    y[k] = before_charge(reset, before[k], fired[k]);
                    dv[k] = before_charge_dv(reset, fired[k]);
                }
            });
            by_charge(n.rows.charge, [&](auto charge) {
                for (int k = 0; k < K; ++k) {
                    dx[k] = g_h[k] * charge_dx(charge, y[k], x[k], q[k], n.v_reset);
                    if (sums) part[sum_decay][k] = double(g_h[k] * charge_dp(charge, y[k], x[k], q[k], n.v_reset));
                    g_v[k] = g_h[k] * charge_dv(charge, y[k], x[k], q[k], n.v_reset) * dv[k];
                }
            });
            const real gain = n.gain_at(t);
            for (int k = 0; k < K; ++k) g_x[k] = gain * dx[k];
            if constexpr (sums) {
                if (p.g_gain) {
                    Pack<E, K> x_pack;
                    x_pack.load(n.x_at(t, place), false);
                    for (int k = 0; k < K; ++k) part[sum_gain][k] = double(dx[k]) * double(widen(x_pack.e[k]));
                }
            }
            if (p.g_x) {
                if (!p.x_stride) {
                    for (int k = 0; k < K; ++k) g_constant[k] += g_x[k];
                } else if (place.valid) {
                    store<E, K>(static_cast<E*>(p.g_x) + t * p.count + place.i, g_x);
                }
            }
            if constexpr (sums) {
                for (int k = 0; k < K; ++k) {
                    if (!place.valid) part[sum_decay][k] = part[sum_threshold][k] = part[sum_gain][k] = 0;
                    total[sum_decay][k] += part[sum_decay][k];
                    total[sum_threshold][k] += part[sum_threshold][k];
                }
                if (every_step) {
                    double* values = sum_memory + (t & 1) * sum_size;
                    for (int q = 0; q < quantities; ++q) put_values(g, values, q, part[q]);
                    __syncthreads();
                    sum_block<K>(g, values, quantities, [&](int q) { return sums_at(q, t, true); });
                }
            }
            for (int k = 0; k < K; ++k) h[k] = h_before[k];
        }
    }
    if (place.valid) {
        if (p.g_x && !p.x_stride) store<E, K>(static_cast<E*>(p.g_x) + place.i, g_constant);
        if (p.g_v0) store<real, K>(static_cast<real*>(p.g_v0) + place.i, g_v);
    }
    if constexpr (sums) {
        __syncthreads();
        for (int q = 0; q < 2; ++q) put_values(g, sum_memory, q, total[q]);
        __syncthreads();
        sum_block<K>(g, sum_memory, 2, [&](int q) { return sums_at(q, 0, false); });
    }
}

// ---- finish: from the partial sums of the blocks to results ----------------------------------------------------------

#if !defined(LIF_PART) || LIF_PART == 4
__global__ void __launch_bounds__(256) finish_statistics(const __grid_constant__ Problem p, const __grid_constant__ Tiles g) {
    SHARED(memory);
    double* const values = reinterpret_cast<double*>(memory);
    const i64 results = p.steps * p.channels, result = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / g.lanes;
    const double size = double(p.count / p.channels);
    const bool mine = result < results && threadIdx.x % g.lanes == 0;
    const double mean = sum_partials(p, g, values, sum_z, result, results, p.channels) / size;
    const double square = sum_partials(p, g, values, sum_squares, result, results, p.channels) / size;
    const double variance = square - mean * mean;
    if (mine) {
        static_cast<double*>(p.mean)[result] = mean;
        static_cast<double*>(p.variance)[result] = variance < 0 ? 0 : variance;
    }
    if (p.rate) {
        const double rate = sum_partials(p, g, values, sum_spikes, result, results, p.channels) / size;
        if (mine) static_cast<double*>(p.rate)[result] = rate;
    }
    if (p.guard) {
        const double guard = sum_partials(p, g, values, sum_guard, result, results, p.channels) / size;
        if (mine) static_cast<double*>(p.guard)[result] = guard;
    }
}

__global__ void __launch_bounds__(256) finish_gradient(const __grid_constant__ Problem p, const __grid_constant__ Tiles g) {
    SHARED(memory);
    const int quantity = int(g.quantity);
    const i64 steps = quantity == sum_decay ? p.decay_steps : (quantity == sum_threshold ? p.threshold_steps : p.steps);
    const i64 columns = quantity == sum_decay ? p.decay_columns : (quantity == sum_threshold ? p.threshold_columns : 1);
    void* const out = quantity == sum_decay ? p.g_decay : (quantity == sum_threshold ? p.g_threshold : p.g_gain);
    const i64 results = steps * columns, result = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / g.lanes;
    const double sum = sum_partials(p, g, reinterpret_cast<double*>(memory), quantity, result, results, columns);
    if (result < results && threadIdx.x % g.lanes == 0) static_cast<double*>(out)[result] = sum;
}
#endif

}  // namespace lif

// ---- the C ABI -----------------------------------------------------------------------------------------------------

// With LIF_PART this file is compiled in five parts, side by side: 0 to 3 hold the kernels of a dtype, 4 the rest.
#if !defined(__CUDACC_RTC__) && !defined(LIF_KERNELS_ONLY)
namespace lif {

typedef void (*Kernel)(Problem, Tiles);
// The kernel with this index in the list of Tiles; null where there is none.
template <class E> Kernel find(int kernel, int vector);

#if !defined(LIF_PART) || LIF_PART < 4
template <class E, int K> Kernel choose(int kernel) {
    switch (kernel) {
        case 0: return forward<E, K, AnyRows>;
        case 1: return forward_statistics<E, K, false, AnyRows>;
        case 2: return forward_statistics<E, K, true, AnyRows>;
        case 3: return backward<E, K, 0, AnyRows, 0>;
        case 4: return backward<E, K, 0, AnyRows, uses_statistics>;
        case 5: return K < 8 ? backward<E, K < 8 ? K : 1, 0, AnyRows, uses_all> : nullptr;
        case 6: return straight<E, K, AnyRows>;
    }
    return nullptr;
}
template <class E> Kernel find(int kernel, int vector) {
    constexpr int most = 16 / int(sizeof(E));
    if (vector == most) return choose<E, most>(kernel);
    if (vector == 1) return choose<E, 1>(kernel);
    if constexpr (most == 8) {
        // 8 neurons per thread leave too little shared memory for more than 16 steps, and too few registers for sums
        switch (vector == 4 ? kernel : -1) {
            case 3: return backward<E, 4, 0, AnyRows, 0>;
            case 4: return backward<E, 4, 0, AnyRows, uses_statistics>;
            case 5: return backward<E, 4, 0, AnyRows, uses_all>;
        }
    }
    return nullptr;
}
#endif
#if defined(LIF_PART) && LIF_PART == 0
template Kernel find<float>(int, int);
#elif defined(LIF_PART) && LIF_PART == 1
template Kernel find<double>(int, int);
#elif defined(LIF_PART) && LIF_PART == 2
template Kernel find<bf16>(int, int);
#elif defined(LIF_PART) && LIF_PART == 3
template Kernel find<f16>(int, int);
#endif

}  // namespace lif

#if !defined(LIF_PART) || LIF_PART == 4
#if defined(__GNUC__)
#define LIF_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define LIF_EXPORT extern "C" __declspec(dllexport)
#endif

// One launch on `stream`, on the current device. Returns a CUDA error code, 0 for success.
LIF_EXPORT int fastsnn_cuda_launch(const lif::Problem* problem, const lif::Tiles* tiles, void* stream) {
    const int kernel = int(tiles->kernel), vector = int(tiles->vector);
    lif::Kernel chosen = nullptr;
    if (kernel == 7) {
        chosen = lif::finish_statistics;
    } else if (kernel == 8) {
        chosen = lif::finish_gradient;
    } else {
        switch (tiles->dtype) {
            case 0: chosen = lif::find<float>(kernel, vector); break;
            case 1: chosen = lif::find<double>(kernel, vector); break;
            case 2: chosen = lif::find<lif::bf16>(kernel, vector); break;
            case 3: chosen = lif::find<lif::f16>(kernel, vector); break;
        }
    }
    if (!chosen) return int(cudaErrorInvalidValue);
    if (tiles->shared > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(chosen, cudaFuncAttributeMaxDynamicSharedMemorySize, int(tiles->shared));
        if (error != cudaSuccess) return int(error);
    }
    void* arguments[] = {const_cast<lif::Problem*>(problem), const_cast<lif::Tiles*>(tiles)};
    return int(cudaLaunchKernel(chosen, dim3(unsigned(tiles->blocks)), dim3(unsigned(tiles->threads)), arguments,
                                size_t(tiles->shared), static_cast<cudaStream_t>(stream)));
}
LIF_EXPORT const char* fastsnn_cuda_message(int error) { return cudaGetErrorString(cudaError_t(error)); }
LIF_EXPORT long long fastsnn_cuda_problem_bytes() { return sizeof(lif::Problem); }
LIF_EXPORT long long fastsnn_cuda_tiles_bytes() { return sizeof(lif::Tiles); }
#endif
#endif
