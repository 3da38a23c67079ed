// Numbers side by side: the functions of lif.h, and so the rows of its tables, taken by a register full of neurons.
#pragma once

#include "cpu_memory.h"

namespace {

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif

#define LIF_LAMBDA __attribute__((always_inline))

struct Vector {
    static constexpr i64 lanes = register_bytes / i64(sizeof(float));
    typedef float native __attribute__((vector_size(register_bytes)));
    typedef int mask __attribute__((vector_size(register_bytes)));
    native v;
    Vector() = default;
    LIF_INLINE Vector(native v) : v(v) {}
    LIF_INLINE explicit Vector(float number) {
        for (int k = 0; k < int(lanes); ++k) v[k] = number;
    }
    LIF_INLINE explicit Vector(double number) : Vector(float(number)) {}
    LIF_INLINE explicit Vector(int number) : Vector(float(number)) {}
};

#define LIF_ARITHMETIC(op) \
    LIF_INLINE Vector operator op(Vector a, Vector b) { return a.v op b.v; }
LIF_ARITHMETIC(+)
LIF_ARITHMETIC(-)
LIF_ARITHMETIC(*)
LIF_ARITHMETIC(/)
#undef LIF_ARITHMETIC
#define LIF_COMPARISON(op) \
    LIF_INLINE Vector::mask operator op(Vector a, Vector b) { return a.v op b.v; }
LIF_COMPARISON(<)
LIF_COMPARISON(>)
LIF_COMPARISON(>=)
LIF_COMPARISON(!=)
#undef LIF_COMPARISON

LIF_INLINE Vector select(Vector::mask condition, Vector yes, Vector no) {
    return Vector::native((Vector::mask(yes.v) & condition) | (Vector::mask(no.v) & ~condition));
}
LIF_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
LIF_INLINE Vector maximum(Vector a, Vector b) { return select(b > a, b, a); }
LIF_INLINE Vector absolute(Vector y) { return Vector::native(Vector::mask(y.v) & 0x7fffffff); }
LIF_INLINE Vector power_of_two(Vector k) { return Vector::native((__builtin_convertvector(k.v, Vector::mask) + 127) << 23); }
LIF_INLINE Vector exponential(Vector y) { return exponential_single(y); }

// a * a + b, in one rounding where the machine has it: sums for statistics, not the recurrence.
LIF_INLINE float square_added(float a, float b) {
#if defined(__FMA__)
    return __builtin_fmaf(a, a, b);
#else
    return a * a + b;
#endif
}
LIF_INLINE Vector square_added(Vector a, Vector b) {
#if defined(__AVX512F__)
    return Vector::native(_mm512_fmadd_ps(__m512(a.v), __m512(a.v), __m512(b.v)));
#elif defined(__FMA__)
    return Vector::native(_mm256_fmadd_ps(__m256(a.v), __m256(a.v), __m256(b.v)));
#else
    return a * a + b;
#endif
}

// A constant of a loop, as a number and as a register full of it.
struct Constant {
    float number;
    Vector many;
    LIF_INLINE explicit Constant(float number) : number(number), many(number) {}
    LIF_INLINE float as(float) const { return number; }
    LIF_INLINE Vector as(Vector) const { return many; }
};

// Loads and stores of one number or a register full, at any address.
template <class value> LIF_INLINE value get(const float* from) {
    value y;
    memcpy(&y, from, sizeof(value));
    return y;
}
template <class value> LIF_INLINE void put(float* to, value y) { memcpy(to, &y, sizeof(value)); }

// A store past the cache; `to` must be a multiple of the register.
LIF_INLINE void put_past_cache(float* to, float y) { *to = y; }
LIF_INLINE void put_past_cache(float* to, Vector y) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, __m512(y.v));
#elif defined(__AVX__)
    _mm256_stream_ps(to, __m256(y.v));
#elif defined(__SSE2__)
    _mm_stream_ps(to, __m128(y.v));
#else
    put(to, y);
#endif
}

// The sum of a register, by halves: upper and lower half, then those of what is left.
LIF_INLINE float sum_of(Vector y) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(__m512(y.v)), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(__m512(y.v)), 1)));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif defined(__AVX__)
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(__m256(y.v)), _mm256_extractf128_ps(__m256(y.v), 1));
#else
    __m128 four = __m128(y.v);
#endif
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
#else
    float sum[Vector::lanes];
    for (int k = 0; k < int(Vector::lanes); ++k) sum[k] = y.v[k];
    for (int half = int(Vector::lanes) / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) sum[k] += sum[k + half];
    return sum[0];
#endif
}

// work(place, first, value): `value()` is a float or a Vector, in which the numbers from `first` on are to be computed;
// place tells two registers in flight apart. The numbers at `out` start a register where stores go past the cache.
template <bool streamed, class Work> LIF_INLINE void in_registers(const float* out, i64 length, const Work& work) {
    i64 i = 0;
    if (streamed)
        for (; i < length && uintptr_t(out + i) % register_bytes; ++i) work(i, 0, float());
    for (; i + 2 * Vector::lanes <= length; i += 2 * Vector::lanes) {
        work(i, 0, Vector());
        work(i + Vector::lanes, 1, Vector());
    }
    for (; i < length; ++i) work(i, 0, float());
}

}  // namespace
