// The approximate adjoints on CUDA: they carry no gradient through time, so one pass forward in time serves them.
#pragma once

#include "cuda_neurons.h"

namespace lif {

template <class E, int K, class Kinds>
__global__ void __launch_bounds__(128, 1) straight(const __grid_constant__ Problem p, const __grid_constant__ Tiles g) {
    typedef typename RealOf<E>::type real;
    const Neurons<E, K, Kinds> n(p, g);
    const Place place = locate<K>(p, g, 0, 1);
    if (!place.valid) return;
    const Parameter<real, true> a(p.a, p.a_value, p.a_steps, p.a_columns), b(p.b, p.b_value, p.b_steps, p.b_columns);
    const E* const g_spikes = static_cast<const E*>(p.g_spikes) + place.i;
    const int adjoint = int(p.adjoint);
    const real steps = real(p.steps);
    real v[K], x[K], theta[K], q[K], h[K], s[K], fired[K], g_s[K], g_constant[K];
    real sum[K], theta_sum[K], q_sum[K];  // over t
    for (int k = 0; k < K; ++k) sum[k] = theta_sum[k] = q_sum[k] = g_constant[k] = real(0);
    auto put = [&](i64 t, const real (&y)[K]) {
        const real gain = n.gain_at(t);
        real g_x[K];
        for (int k = 0; k < K; ++k) {
            g_x[k] = gain * y[k];
            g_constant[k] += g_x[k];
        }
        if (p.x_stride) store<E, K>(static_cast<E*>(p.g_x) + t * p.count + place.i, g_x);
    };
    n.start(place, v);
    for (i64 t = 0; t < p.steps; ++t) {
        Pack<E, K> pack;
        pack.load(n.x_at(t, place), true);
        n.current(t, pack, x);
        n.threshold.fetch(p, g, t, place, theta);
        n.decay.fetch(p, g, t, place, q);
        if (adjoint == adjoint_rga) {
            for (int k = 0; k < K; ++k) {
                sum[k] += x[k] / theta[k];
                if (t == 0 || p.threshold_steps > 1) theta_sum[k] += theta[k];
                if (t == 0 || p.decay_steps > 1) q_sum[k] += q[k];
            }
            continue;
        }
        real before[K], a_t[K], b_t[K];
        for (int k = 0; k < K; ++k) before[k] = v[k];
        n.step(t, place, x, theta, v, h, s, fired);
        if (adjoint == adjoint_bptr) {
            for (int k = 0; k < K; ++k) sum[k] += s[k];
            continue;
        }
        a.fetch(p, g, t, place, a_t);
        b.fetch(p, g, t, place, b_t);
        load<E, K>(g_spikes + t * p.count, g_s);
        by_surrogate(n.rows.surrogate, [&](auto surrogate) {
            for (int k = 0; k < K; ++k) g_s[k] *= surrogate_slope(surrogate, p.relative != 0, h[k] - theta[k], theta[k], a_t[k], b_t[k]);
        });
        by_charge(n.rows.charge, [&](auto charge) {
            for (int k = 0; k < K; ++k) g_s[k] *= charge_dx(charge, before[k], x[k], q[k], n.v_reset);
        });
        if (adjoint == adjoint_spatial)
            put(t, g_s);
        else
            for (int k = 0; k < K; ++k) sum[k] += g_s[k];
    }
    if (adjoint != adjoint_spatial) {
        real factor[K];
        for (int k = 0; k < K; ++k) {
            if (adjoint == adjoint_bptr) {
                factor[k] = sum[k] > real(0) ? real(1) : real(0);
            } else if (adjoint == adjoint_hart) {
                factor[k] = sum[k] / steps;
            } else {
                const real mean_theta = theta_sum[k] / (p.threshold_steps > 1 ? steps : real(1));
                const real mean_q = q_sum[k] / (p.decay_steps > 1 ? steps : real(1));
                // The leak factor is what one step makes of a membrane of 1, at rest 0 and without input.
                const real leak = charge_plain(n.rows.charge, real(1), real(0), mean_q, real(0));
                factor[k] = rga_weight(sum[k] / steps, leak, real(p.rga_gamma));
                theta_sum[k] = mean_theta;
            }
        }
        for (i64 t = 0; t < p.steps; ++t) {
            if (adjoint == adjoint_hart) {
                put(t, factor);
                continue;
            }
            load<E, K>(g_spikes + t * p.count, g_s);
            for (int k = 0; k < K; ++k) g_s[k] = adjoint == adjoint_bptr ? g_s[k] * factor[k] : g_s[k] * factor[k] / theta_sum[k];
            put(t, g_s);
        }
    }
    if (!p.x_stride) store<E, K>(static_cast<E*>(p.g_x) + place.i, g_constant);
}

}  // namespace lif
