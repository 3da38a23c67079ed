// Sums over neurons in a fixed order and without atomics: over a block, then over blocks.
#pragma once

#include "cuda_neurons.h"

namespace lif {

// values[slot][thread] of `quantities` quantities (by_column: K slots each) to the partial sums of this block;
// out(j): where those of the j-th begin, null to leave it out.
template <int K, class Out> DEVICE void sum_block(const Tiles& g, const double* values, int quantities, Out out) {
    const int thread = threadIdx.x, threads = blockDim.x;
    if (g.by_column) {
        const int width = int(g.width), height = threads / width;
        const i64 strips = (g.period + width * K - 1) / (width * K);
        const i64 chunk = blockIdx.x / strips, strip = blockIdx.x - chunk * strips;
        for (int j = thread; j < quantities * K * width; j += threads) {
            const int k = j % K, side = j / K % width, quantity = j / (K * width);
            if (!out(quantity)) continue;
            const double* from = values + (quantity * K + k) * threads + side;
            double sum = 0;
            for (int y = 0; y < height; ++y) sum += from[y * width];
            const i64 column = (strip * width + side) * K + k;
            if (column < g.period) out(quantity)[chunk * g.groups + column] = sum;
        }
    } else {
        const i64 group = blockIdx.x / g.chunks, chunk = blockIdx.x - group * g.chunks;
        const int lane = thread % 32;
        for (int quantity = thread / 32; quantity < quantities; quantity += threads / 32) {
            if (!out(quantity)) continue;
            double sum = 0;
            for (int y = lane; y < threads; y += 32) sum += values[quantity * threads + y];
            for (int far = 16; far > 0; far /= 2) sum += __shfl_down_sync(0xffffffffu, sum, far);
            if (lane == 0) out(quantity)[chunk * g.groups + group] = sum;
        }
    }
}
// The values of one thread, put where sum_block finds them.
template <int K> DEVICE void put_values(const Tiles& g, double* values, int quantity, const double (&y)[K]) {
    const int thread = threadIdx.x, threads = blockDim.x;
    if (g.by_column) {
        for (int k = 0; k < K; ++k) values[(quantity * K + k) * threads + thread] = y[k];
    } else {
        double sum = 0;
        for (int k = 0; k < K; ++k) sum += y[k];
        values[quantity * threads + thread] = sum;
    }
}

// The sum of the partial sums of one result; `lanes` threads share it. Every thread of the block must come here.
DEVICE double sum_partials(const Problem& p, const Tiles& g, double* values, int quantity, i64 result, i64 results, i64 columns) {
    const i64 t = result / columns, column = result - t * columns, span = g.groups / columns, items = span * g.chunks;
    const int lanes = int(g.lanes), lane = threadIdx.x % lanes;
    const double* from = static_cast<const double*>(p.scratch) + offset_of(g, quantity) + t * g.chunks * g.groups + column * span;
    double sum = 0;
    if (result < results)
        for (i64 j = lane; j < items; j += lanes) {
            const i64 chunk = quotient(j, span);
            sum += __ldg(from + chunk * g.groups + (j - chunk * span));
        }
    __syncthreads();
    values[threadIdx.x] = sum;
    for (int far = lanes / 2; far > 0; far /= 2) {
        __syncthreads();
        if (lane < far) values[threadIdx.x] += values[threadIdx.x + far];
    }
    __syncthreads();
    return values[threadIdx.x - lane];
}


}  // namespace lif
