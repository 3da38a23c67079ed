// Random numbers of neurons that fire by chance, for the CPU kernels.
#pragma once

#include "cpu_vector.h"

namespace {

// Numbers of 64 bits side by side. Compilers vectorise philox() in 32 bits, and pack and unpack every product: three
// times as slow.
struct Words {
    static constexpr i64 lanes = register_bytes / i64(sizeof(u64));
    typedef u64 native __attribute__((vector_size(register_bytes)));
};

// The product of the lower halves.
LIF_INLINE Words::native times(Words::native a, Words::native b) {
#if defined(__AVX512F__)
    return Words::native(_mm512_mul_epu32(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
    return Words::native(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif defined(__SSE2__) && !defined(__AVX__)
    return Words::native(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// philox() of two registers full of places. The upper halves of the words are not kept clean: only lower ones are read.
template <class Index> LIF_INLINE void philox_of(u64 seed, const Index& index, u32 step, u32* out) {
    using native = Words::native;
    const native zero = {}, a = zero + 0xD2511F53u, b = zero + 0xCD9E8D57u;
    native c0[2], c1[2], c2[2], c3[2];
    for (int k = 0; k < 2; ++k) {
        c0[k] = index(k * Words::lanes);
        c1[k] = c0[k] >> 32;
        c2[k] = zero + step;
        c3[k] = zero;
    }
    u32 k0 = u32(seed), k1 = u32(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        for (int k = 0; k < 2; ++k) {
            const native p0 = times(a, c0[k]), p1 = times(b, c2[k]);
            c0[k] = (p1 >> 32) ^ c1[k] ^ (zero + k0);
            c1[k] = p1;
            c2[k] = (p0 >> 32) ^ c3[k] ^ (zero + k1);
            c3[k] = p0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int k = 0; k < 2; ++k)
        for (int lane = 0; lane < int(Words::lanes); ++lane) out[k * Words::lanes + lane] = u32(c0[k][lane]);
}

// uniform() of a row: index(i) are the places from the i-th on, a register full, and place(i) the i-th.
template <class real, class Index, class Place>
LIF_INLINE void uniforms_of(u64 seed, u32 step, i64 length, const Index& index, const Place& place, real* out) {
    constexpr i64 several = 2 * Words::lanes, piece = 8 * several;
    u32 words[piece];
    i64 done = 0;
    for (; done + piece <= length; done += piece) {
        for (i64 i = 0; i < piece; i += several)
            philox_of(seed, [&](i64 more) LIF_LAMBDA { return index(done + i + more); }, step, words + i);
        for (i64 i = 0; i < piece; ++i) out[done + i] = to_uniform<real>(words[i]);
    }
    for (; done < length; ++done) out[done] = uniform<real>(seed, place(done), step);
}

// The uniform numbers of a row of neurons, step after step. Where memory is not in the order of the index, the places of the row are
// looked up once for all steps.
template <class real> class Uniforms {
  public:
    Uniforms(Arena& arena, const Problem& p, i64 width) : p(p), seed(p.seed ? u64(*(const i64*)p.seed) : 0) {
        if (p.fire != fire_gaussian) return;
        u = arena.take<real>(width);
        if (p.rank) index = arena.take<u64>(width);
    }
    void move_to(i64 first, i64 count) {
        offset = first, length = count;
        if (index) look_up();
    }
    // Of one step; nothing where neurons do not fire by chance.
    const real* at(i64 t) {
        if (!u) return nullptr;
        const u32 step = u32(p.first_step + t);
        using native = Words::native;
        if (index) {
            auto load = [&](i64 i) LIF_LAMBDA {
                native places;
                memcpy(&places, index + i, sizeof(native));
                return places;
            };
            uniforms_of(seed, step, length, load, [&](i64 i) { return index[i]; }, u);
        } else {
            native lanes;
            for (int k = 0; k < int(Words::lanes); ++k) lanes[k] = u64(offset + k);
            uniforms_of(seed, step, length, [&](i64 i) LIF_LAMBDA { return lanes + u64(i); }, [&](i64 i) { return u64(offset + i); }, u);
        }
        return u;
    }

  private:
    // logical_index of each place, counted up dimension by dimension as memory is.
    void look_up() {
        int order[8];
        i64 at[8];
        const int rank = int(p.rank);
        for (int k = 0; k < rank; ++k) {
            int place = k;
            for (; place > 0 && p.order_inner[order[place - 1]] > p.order_inner[k]; --place) order[place] = order[place - 1];
            order[place] = k;
            at[k] = offset / p.order_inner[k] % p.order_size[k];
        }
        u64 found = logical_index(p, offset);
        for (i64 i = 0; i < length; ++i) {
            index[i] = found;
            for (int place = 0; place < rank; ++place) {
                const int k = order[place];
                if (++at[k] < p.order_size[k]) {
                    found += u64(p.order_stride[k]);
                    break;
                }
                found -= u64((p.order_size[k] - 1) * p.order_stride[k]);
                at[k] = 0;
            }
        }
    }

    const Problem& p;
    const u64 seed;
    real* u = nullptr;
    u64* index = nullptr;
    i64 offset = 0, length = 0;
};

}  // namespace
