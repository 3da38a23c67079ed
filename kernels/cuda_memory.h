// Elements of every dtype in global and shared memory, for CUDA and its emulation.
#pragma once

#if defined(__CUDACC_RTC__)  // knows no builtins of the host compiler
#define __builtin_nanf(text) __int_as_float(0x7fffffff)
#endif

#include "lif.h"

#if defined(LIF_EMULATION)
#define DEVICE inline __attribute__((always_inline))
#define SHARED(name) unsigned char* name = emulation::shared_memory()
#else
#define DEVICE __device__ __forceinline__
#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace lif {

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
template <class E, int K, int depth_ = 4> struct Ahead {
    static constexpr int depth = depth_;
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

}  // namespace lif
