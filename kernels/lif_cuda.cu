// The LIF operator on CUDA: forward, backward, straight (the approximate adjoints), and the sums over blocks.
// One source for nvcc, NVRTC and, under tests/emulation/cuda_emulation.h, g++. Which elements a thread serves is
// decided by fastsnn/cuda.py and arrives in Tiles; the rows of the tables come from lif.h alone.
#include "lif.h"

#if defined(LIF_EMULATION)
#define DEVICE inline __attribute__((always_inline))
#define SHARED(name) unsigned char* name = emulation::shared_memory()
#else
#define DEVICE __device__ __forceinline__
#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

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

enum Quantity : int { sum_decay, sum_threshold, sum_gain };              // of the backward pass
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

// ---- elements in memory ------------------------------------------------------------------------------------------

struct bf16 {
    unsigned short bits;
};
struct f16 {
    unsigned short bits;
};
template <class E> struct RealOf {
    typedef float type;
};
template <> struct RealOf<double> {
    typedef double type;
};

DEVICE float widen(float e) { return e; }
DEVICE double widen(double e) { return e; }
DEVICE float widen(bf16 e) { return __uint_as_float(u32(e.bits) << 16); }
DEVICE void narrow(float y, float& e) { e = y; }
DEVICE void narrow(double y, double& e) { e = y; }
#if defined(LIF_EMULATION)
DEVICE float widen(f16 e) { return emulation::half_to_float(e.bits); }
DEVICE void narrow(float y, f16& e) { e.bits = emulation::float_to_half(y); }
DEVICE void narrow(float y, bf16& e) { e.bits = emulation::float_to_bfloat16(y); }
#else
DEVICE float widen(f16 e) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(e.bits));
    return y;
}
DEVICE void narrow(float y, f16& e) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(e.bits) : "f"(y)); }
DEVICE void narrow(float y, bf16& e) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(e.bits) : "f"(y)); }
#endif

#if !defined(LIF_EMULATION)
template <int bytes> DEVICE void copy_async(void* to, const void* from) {
    const u32 place = u32(__cvta_generic_to_shared(to));
    if constexpr (bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(place), "l"(from), "n"(bytes) : "memory");
}
DEVICE void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> DEVICE void wait_async() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }
#endif

// What K elements are moved as: the widest word that divides them.
template <class E, int K, int rest> struct WordOf {
    typedef E type;
};
template <class E, int K> struct WordOf<E, K, 0> {
    typedef uint4 type;
};
template <class E, int K> struct WordOf<E, K, 8> {
    typedef uint2 type;
};
template <class E> struct WordOf<E, 1, 8> {
    typedef E type;
};

// K neighbouring elements.
template <class E, int K> struct Pack {
    static constexpr int bytes = K * int(sizeof(E));
    typedef typename WordOf<E, K, bytes % 16>::type Word;
    static constexpr int words = bytes / int(sizeof(Word));
    union {
        E e[K];
        Word word[words];
    };
    DEVICE Pack() {}
    // once: not read again soon, so not worth a place in the cache.
    DEVICE void load(const E* at, bool once) {
        const Word* from = reinterpret_cast<const Word*>(at);
        for (int j = 0; j < words; ++j) {
            if constexpr (sizeof(Word) >= 8 && K > 1)
                word[j] = once ? __ldcs(from + j) : __ldg(from + j);
            else
                word[j] = from[j];
        }
    }
    DEVICE void store(E* at) const {
        Word* to = reinterpret_cast<Word*>(at);
        for (int j = 0; j < words; ++j) {
            if constexpr (sizeof(Word) >= 8 && K > 1)
                __stcs(to + j, word[j]);
            else
                to[j] = word[j];
        }
    }
};

template <class E, int K, class real> DEVICE void load(const E* at, real (&y)[K]) {
    Pack<E, K> pack;
    pack.load(at, true);
    for (int k = 0; k < K; ++k) y[k] = widen(pack.e[k]);
}
template <class E, int K, class real> DEVICE void store(E* at, const real (&y)[K]) {
    Pack<E, K> pack;
    for (int k = 0; k < K; ++k) narrow(y[k], pack.e[k]);
    pack.store(at);
}
// [count] real, or a number where there is no pointer.
template <int K, class real> DEVICE void load_or(const void* from, i64 i, real number, real (&y)[K]) {
    if (from)
        load<real, K>(static_cast<const real*>(from) + i, y);
    else
        for (int k = 0; k < K; ++k) y[k] = number;
}

// Elements on their way from memory: each thread sees `depth` packs ahead, in shared memory, at no cost in registers.
template <class E, int K> struct Ahead {
    static constexpr int depth = 4;
    static constexpr int bytes = Pack<E, K>::bytes;
    unsigned char* base;
    DEVICE explicit Ahead(unsigned char* memory) : base(memory) {}
    DEVICE unsigned char* slot(int j) const { return base + ((j & (depth - 1)) * int(blockDim.x) + int(threadIdx.x)) * bytes; }
    // Asks for pack j, or, without an address, counts as if it had.
    DEVICE void ask(int j, const E* from) const {
        if (from) {
            if constexpr (bytes >= 4)
                copy_async<bytes>(slot(j), from);
            else
                *reinterpret_cast<E*>(slot(j)) = *from;
        }
        commit_async();
    }
    // Pack j, once `depth` packs from j on were asked for.
    DEVICE void get(int j, Pack<E, K>& pack) const {
        wait_async<depth - 1>();
        const Pack<E, K>* from = reinterpret_cast<const Pack<E, K>*>(slot(j));
        pack = *from;
    }
};

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

// A parameter [steps or 1, columns], or a number.
template <class real> struct Parameter {
    const real* at;
    real number;
    i64 row;
    i64 columns;
    DEVICE Parameter(const void* from, f64 value, i64 steps, i64 columns)
        : at(static_cast<const real*>(from)), number(real(value)), row(steps > 1 ? columns : 0), columns(columns) {}
    template <int K> DEVICE void fetch(const Problem& p, const Tiles& g, i64 t, const Place& place, real (&y)[K]) const {
        if (!at || columns == 1) {
            const real same = at ? __ldg(at + t * row) : number;
            for (int k = 0; k < K; ++k) y[k] = same;
        } else {
            const bool by_channel = columns == p.channels;
            const real* from = at + t * row + (by_channel ? place.channel : place.column);
            const i64 step = by_channel ? g.channel_step : 1;
            for (int k = 0; k < K; ++k) y[k] = __ldg(from + k * step);
        }
    }
};

// What the forward, the backward and the straight kernel share.
template <class E, int K, class Kinds> struct Neurons {
    typedef typename RealOf<E>::type real;
    const Problem& p;
    const Tiles& g;
    const Kinds rows;
    const Parameter<real> decay, threshold;
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
    DEVICE real gain_at(i64 t) const { return p.gain ? __ldg(static_cast<const real*>(p.gain) + t) : real(1); }
    DEVICE void current(i64 t, const Pack<E, K>& x, real (&y)[K]) const {
        for (int k = 0; k < K; ++k) y[k] = widen(x.e[k]);
        if (p.gain) {
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

// ---- sums over a block -------------------------------------------------------------------------------------------

// values[slot][thread] of `quantities` quantities (by_column: K slots each) to the partial sums of this block.
template <int K> DEVICE void sum_block(const Tiles& g, const double* values, int quantities, double* const* out) {
    const int thread = threadIdx.x, threads = blockDim.x;
    if (g.by_column) {
        const int width = int(g.width), height = threads / width;
        const i64 strips = (g.period + width * K - 1) / (width * K);
        const i64 chunk = blockIdx.x / strips, strip = blockIdx.x - chunk * strips;
        for (int j = thread; j < quantities * K * width; j += threads) {
            const int k = j % K, side = j / K % width, quantity = j / (K * width);
            const double* from = values + (quantity * K + k) * threads + side;
            double sum = 0;
            for (int y = 0; y < height; ++y) sum += from[y * width];
            const i64 column = (strip * width + side) * K + k;
            if (column < g.period) out[quantity][chunk * g.groups + column] = sum;
        }
    } else {
        const i64 group = blockIdx.x / g.chunks, chunk = blockIdx.x - group * g.chunks;
        const int lane = thread % 32;
        for (int quantity = thread / 32; quantity < quantities; quantity += threads / 32) {
            double sum = 0;
            for (int y = lane; y < threads; y += 32) sum += values[quantity * threads + y];
            for (int far = 16; far > 0; far /= 2) sum += __shfl_down_sync(0xffffffffu, sum, far);
            if (lane == 0) out[quantity][chunk * g.groups + group] = sum;
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

// ---- forward -----------------------------------------------------------------------------------------------------

// Tiles per block with statistics.
template <int K> struct Shape {
    static constexpr int parts = K >= 8 ? 2 : 4;
};

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
__global__ void __launch_bounds__(256) forward(const __grid_constant__ Problem p, const __grid_constant__ Tiles g) {
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
template <class E, int K, class Kinds>
__global__ void __launch_bounds__(256) forward_statistics(const __grid_constant__ Problem p, const __grid_constant__ Tiles g) {
    typedef typename RealOf<E>::type real;
    constexpr int parts = Shape<K>::parts;
    SHARED(memory);
    const Neurons<E, K, Kinds> n(p, g);
    Place place[parts];
    real v[parts][K];
    for (int j = 0; j < parts; ++j) {
        place[j] = locate<K>(p, g, j, parts);
        n.start(place[j], v[j]);
    }
    // rate and guard follow mean and variance where they are wanted
    const int rate = 2, guard = p.rate ? 3 : 2, quantities = guard + (p.guard ? 1 : 0);
    const i64 slots = quantities * (g.by_column ? K : 1) * i64(blockDim.x);
    const real delta = real(p.delta);
    Pack<E, K> packs[parts];
    for (i64 t = 0; t < p.steps; ++t) {
        if (t == 0 || p.x_stride)
            for (int j = 0; j < parts; ++j) packs[j].load(n.x_at(t, place[j]), true);
        double sums[moments][K] = {};
#pragma unroll
        for (int j = 0; j < parts; ++j) {
            real x[K], theta[K], h[K], s[K], fired[K];
            n.current(t, packs[j], x);
            n.threshold.fetch(p, g, t, place[j], theta);
            if (place[j].valid) keep_state(p, t, place[j], v[j]);
            n.step(t, place[j], x, theta, v[j], h, s, fired);
            if (!place[j].valid) continue;
            emit(n, t, place[j], h, s);
            for (int k = 0; k < K; ++k) {
                const real z = h[k] - theta[k];
                sums[sum_z][k] += double(z);
                sums[sum_squares][k] += double(z) * double(z);
                sums[sum_spikes][k] += double(s[k]);
                if (p.guard) sums[sum_guard][k] += double(guard_value(p.power, z, delta));
            }
        }
        // Two buffers in turn: whoever writes one has seen everybody leave it.
        double* values = reinterpret_cast<double*>(memory) + (t & 1) * slots;
        put_values(g, values, 0, sums[sum_z]);
        put_values(g, values, 1, sums[sum_squares]);
        if (p.rate) put_values(g, values, rate, sums[sum_spikes]);
        if (p.guard) put_values(g, values, guard, sums[sum_guard]);
        __syncthreads();
        double* out[moments];
        for (int q = 0; q < moments; ++q) {
            const int moment = q < 2 ? q : (q == rate && p.rate ? int(sum_spikes) : int(sum_guard));
            out[q] = static_cast<double*>(p.scratch) + offset_of(g, moment) + t * g.chunks * g.groups;
        }
        sum_block<K>(g, values, quantities, out);
    }
    for (int j = 0; j < parts; ++j)
        if (place[j].valid) store<real, K>(static_cast<real*>(p.v) + place[j].i, v[j]);
}

// ---- backward ----------------------------------------------------------------------------------------------------

// The membranes h of the steps of one segment: registers where the number of steps T is a template argument, else
// shared memory, in pieces of 16 bytes per thread so that neighbouring threads hit neighbouring banks.
template <class real, int K, int T> struct Kept {
    real h[T][K];
    DEVICE explicit Kept(unsigned char*) {}
    DEVICE void put(int t, const real (&y)[K]) {
        for (int k = 0; k < K; ++k) h[t][k] = y[k];
    }
    DEVICE void get(int t, real (&y)[K]) const {
        for (int k = 0; k < K; ++k) y[k] = h[t][k];
    }
};
template <class real, int K> struct Kept<real, K, 0> {
    static constexpr int wide = K * int(sizeof(real)) >= 16 ? 16 / int(sizeof(real)) : K;
    real* base;
    DEVICE explicit Kept(unsigned char* memory) : base(reinterpret_cast<real*>(memory)) {}
    DEVICE real* piece(int t, int j) const { return base + ((t * (K / wide) + j) * int(blockDim.x) + int(threadIdx.x)) * wide; }
    DEVICE void put(int t, const real (&y)[K]) {
        struct alignas(sizeof(real) * wide) Piece { real e[wide]; };
        for (int j = 0; j < K / wide; ++j) {
            Piece piece_j;
            for (int k = 0; k < wide; ++k) piece_j.e[k] = y[j * wide + k];
            *reinterpret_cast<Piece*>(piece(t, j)) = piece_j;
        }
    }
    DEVICE void get(int t, real (&y)[K]) const {
        struct alignas(sizeof(real) * wide) Piece { real e[wide]; };
        for (int j = 0; j < K / wide; ++j) {
            const Piece piece_j = *reinterpret_cast<const Piece*>(piece(t, j));
            for (int k = 0; k < wide; ++k) y[j * wide + k] = piece_j.e[k];
        }
    }
};

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

// Whether a row's dh/dp looks at x: then, and for the gain, the backward pass reads x a second time.
DEVICE bool parameter_needs_x(int charge) {
    bool needs = true;
    by_charge(charge, [&](auto id) { needs = charge_dp(id, 0.3, 0.7, 0.6, 0.1) != charge_dp(id, 0.3, 0.9, 0.6, 0.1); });
    return needs;
}

// sums: whether gradients of parameters are wanted.
template <class E, int K, int T, class Kinds, bool sums>
__global__ void __launch_bounds__(128) backward(const __grid_constant__ Problem p, const __grid_constant__ Tiles g) {
    typedef typename RealOf<E>::type real;
    constexpr int turns = T ? T : 1;
    SHARED(memory);
    const Neurons<E, K, Kinds> n(p, g);
    const Place place = locate<K>(p, g, 0, 1);
    if (!sums && !place.valid) return;
    const Parameter<real> a(p.a, p.a_value, p.a_steps, p.a_columns), b(p.b, p.b_value, p.b_steps, p.b_columns);
    const bool is_none = n.rows.fire == fire_none, statistics = p.g_mean || p.g_variance || p.g_guard;
    const bool every_step = sums && (p.g_gain || (p.g_decay && p.decay_steps > 1) || (p.g_threshold && p.threshold_steps > 1));
    const bool again = !sums || p.g_gain || (p.g_decay && parameter_needs_x(n.rows.charge));
    const i64 sum_bytes = sums ? 3 * (g.by_column ? K : 1) * i64(blockDim.x) : 0;  // in doubles, one of two buffers
    double* const sum_memory = reinterpret_cast<double*>(memory);
    const Ahead<E, K> ahead(memory + 2 * sum_bytes * sizeof(double));
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
            double factor[K];
            if (fetch_channels(p, g, p.g_rate, t, place, factor))
                for (int k = 0; k < K; ++k) g_s[k] = real(double(g_s[k]) + factor[k]);
            if (statistics) statistics_gradient(p, g, t, place, z, extra_z);
            for (int k = 0; k < K; ++k) extra[k] = extra_z[k];
            if (p.g_membrane) {
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
                    double* values = sum_memory + (t & 1) * sum_bytes;
                    double* out[3];
                    int quantities = 0;
                    for (int q = 0; q < 3; ++q) {
                        const bool wanted = q == sum_decay ? p.g_decay && p.decay_steps > 1
                                                           : (q == sum_threshold ? p.g_threshold && p.threshold_steps > 1 : p.g_gain != nullptr);
                        if (!wanted) continue;
                        put_values(g, values, quantities, part[q]);
                        out[quantities++] = static_cast<double*>(p.scratch) + offset_of(g, q) + t * g.chunks * g.groups;
                    }
                    __syncthreads();
                    sum_block<K>(g, values, quantities, out);
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
        double* out[2];
        int quantities = 0;
        __syncthreads();
        for (int q = 0; q < 2; ++q) {
            const bool wanted = q == sum_decay ? p.g_decay && p.decay_steps == 1 : p.g_threshold && p.threshold_steps == 1;
            if (!wanted) continue;
            put_values(g, sum_memory, quantities, total[q]);
            out[quantities++] = static_cast<double*>(p.scratch) + offset_of(g, q);
        }
        __syncthreads();
        sum_block<K>(g, sum_memory, quantities, out);
    }
}

// ---- straight: the approximations that carry no gradient through time --------------------------------------------

template <class E, int K, class Kinds>
__global__ void __launch_bounds__(128) straight(const __grid_constant__ Problem p, const __grid_constant__ Tiles g) {
    typedef typename RealOf<E>::type real;
    const Neurons<E, K, Kinds> n(p, g);
    const Place place = locate<K>(p, g, 0, 1);
    if (!place.valid) return;
    const Parameter<real> a(p.a, p.a_value, p.a_steps, p.a_columns), b(p.b, p.b_value, p.b_steps, p.b_columns);
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

// ---- finish: from the partial sums of the blocks to results, in a fixed order --------------------------------------

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

}  // namespace lif

// ---- the C ABI -----------------------------------------------------------------------------------------------------

#if !defined(__CUDACC_RTC__)
namespace {

typedef void (*Kernel)(lif::Problem, lif::Tiles);

template <class E, int K> Kernel choose(int kernel) {
    using namespace lif;
    switch (kernel) {
        case 0: return forward<E, K, AnyRows>;
        case 1: return forward_statistics<E, K, AnyRows>;
        case 2: return backward<E, K, 0, AnyRows, false>;
        case 3: return backward<E, K, 0, AnyRows, true>;
        case 4: return straight<E, K, AnyRows>;
        case 5: return finish_statistics;
        case 6: return finish_gradient;
    }
    return nullptr;
}
template <class E> Kernel choose(int kernel, int vector) {
    constexpr int most = 16 / int(sizeof(E));
    if (vector == most) return choose<E, most>(kernel);
    return vector == 1 ? choose<E, 1>(kernel) : nullptr;
}
template <class E> Kernel choose_short(int kernel, int vector) {
    // 8 neurons per thread leave too little shared memory for more than 16 kept steps
    if (vector == 4) return kernel == 2 ? Kernel(lif::backward<E, 4, 0, lif::AnyRows, false>) : (kernel == 3 ? Kernel(lif::backward<E, 4, 0, lif::AnyRows, true>) : nullptr);
    return choose<E>(kernel, vector);
}

}  // namespace

#if defined(__GNUC__)
#define LIF_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define LIF_EXPORT extern "C" __declspec(dllexport)
#endif

// One launch on `stream`, on the current device. Returns a CUDA error code, 0 for success.
LIF_EXPORT int fastsnn_cuda_launch(const lif::Problem* problem, const lif::Tiles* tiles, void* stream) {
    const int kernel = int(tiles->kernel), vector = int(tiles->vector);
    Kernel chosen = nullptr;
    switch (tiles->dtype) {
        case 0: chosen = choose<float>(kernel, vector); break;
        case 1: chosen = choose<double>(kernel, vector); break;
        case 2: chosen = choose_short<lif::bf16>(kernel, vector); break;
        case 3: chosen = choose_short<lif::f16>(kernel, vector); break;
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
