// Memory for the CPU kernels: dtypes, stores past the cache, scratch, the division of a step into units of work.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "lif.h"

namespace lif {
enum Dtype : int { float32, float64, bfloat16, float16 };
}

// Every instruction set gets its own copy of all of this: no name may be shared at link time.
namespace {

using namespace lif;

// Results of a call larger than this are stored past the cache: nobody finds them there again.
constexpr i64 cache_bytes = i64(4) << 20;

// A run is as long as reading it keeps memory busy (a page for each step), and as its membranes fit the second cache.
constexpr i64 longest_run = 2048;
constexpr i64 run_bytes = i64(256) << 10;

inline i64 size_of(i64 dtype) { return dtype == float64 ? 8 : (dtype == float32 ? 4 : 2); }

template <class real> inline void fill(real* out, i64 length, real value) {
    for (i64 i = 0; i < length; ++i) out[i] = value;
}

// ---- load and store -----------------------------------------------------------------------------------------------

inline float from_bfloat16(uint16_t bits) { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
inline uint16_t to_bfloat16(float y) {
    uint32_t bits = __builtin_bit_cast(uint32_t, y);
    uint32_t even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t(y != y ? 0x7fc0u : even);
}

inline void from_float16(const uint16_t* in, i64 length, float* out) {
    i64 i = 0;
#if defined(__F16C__)
    for (; i + 8 <= length; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + i))));
#endif
    for (; i < length; ++i) out[i] = float(__builtin_bit_cast(_Float16, in[i]));
}
inline void to_float16(const float* in, i64 length, uint16_t* out) {
    i64 i = 0;
#if defined(__F16C__)
    for (; i + 8 <= length; i += 8) _mm_storeu_si128((__m128i*)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
#endif
    for (; i < length; ++i) out[i] = __builtin_bit_cast(uint16_t, _Float16(in[i]));
}

// `length` values from element `offset` on, as real: in place where the dtype is real, else in the buffer.
template <class real>
const real* load(const void* base, i64 dtype, i64 offset, i64 length, real* buffer) {
    if (dtype == (sizeof(real) == 8 ? float64 : float32)) return (const real*)base + offset;
    if constexpr (sizeof(real) == 4) {
        const uint16_t* in = (const uint16_t*)base + offset;
        if (dtype == bfloat16)
            for (i64 i = 0; i < length; ++i) buffer[i] = from_bfloat16(in[i]);
        else
            from_float16(in, length, buffer);
    }
    return buffer;
}

// A copy that does not put its target into the cache.
inline void stream(void* to, const void* from, i64 bytes) {
    char* out = (char*)to;
    const char* in = (const char*)from;
#if defined(__SSE2__)
    i64 head = i64(-uintptr_t(out) & 63);
    if (head > bytes) head = bytes;
    memcpy(out, in, head);
    i64 i = head;
#if defined(__AVX512F__)
    for (; i + 64 <= bytes; i += 64) _mm512_stream_si512((__m512i*)(out + i), _mm512_loadu_si512((const void*)(in + i)));
#elif defined(__AVX__)
    for (; i + 64 <= bytes; i += 64) {
        _mm256_stream_si256((__m256i*)(out + i), _mm256_loadu_si256((const __m256i*)(in + i)));
        _mm256_stream_si256((__m256i*)(out + i + 32), _mm256_loadu_si256((const __m256i*)(in + i + 32)));
    }
#else
    for (; i + 64 <= bytes; i += 64)
        for (int j = 0; j < 64; j += 16) _mm_stream_si128((__m128i*)(out + i + j), _mm_loadu_si128((const __m128i*)(in + i + j)));
#endif
    memcpy(out + i, in + i, bytes - i);
#else
    memcpy(out, in, bytes);
#endif
}
inline void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Cuts a run of results into pieces that end where a cache line ends, so that stores past the cache leave while the next
// piece is computed. work(first, length).
template <class Work> void in_pieces(const void* out, i64 size, i64 length, const Work& work) {
    constexpr i64 piece = 256;
    i64 end = i64(-uintptr_t(out) & 63) / size;
    for (i64 at = 0; at < length; at = end, end += piece) {
        if (end > length) end = length;
        if (end > at) work(at, end - at);
    }
}

template <class real> void store_real(void* base, i64 offset, i64 length, const real* values, bool past_cache) {
    real* out = (real*)base + offset;
    past_cache ? stream(out, values, length * i64(sizeof(real))) : (void)memcpy(out, values, length * sizeof(real));
}

template <class real>
void store(void* base, i64 dtype, i64 offset, i64 length, const real* values, bool past_cache) {
    if (dtype == (sizeof(real) == 8 ? float64 : float32)) return store_real(base, offset, length, values, past_cache);
    if constexpr (sizeof(real) == 4) {
        uint16_t packed[256];
        for (i64 done = 0; done < length; done += 256) {
            i64 part = length - done < 256 ? length - done : 256;
            if (dtype == bfloat16)
                for (i64 i = 0; i < part; ++i) packed[i] = to_bfloat16(values[done + i]);
            else
                to_float16(values + done, part, packed);
            uint16_t* out = (uint16_t*)base + offset + done;
            past_cache ? stream(out, packed, part * 2) : (void)memcpy(out, packed, part * 2);
        }
    }
}

// ---- scratch --------------------------------------------------------------------------------------------------------

// Scratch of one thread, handed out in aligned pieces and taken back all at once.
class Arena {
  public:
    ~Arena() { release(); }
    template <class type> type* take(i64 length) {
        i64 bytes = (length * i64(sizeof(type)) + 127) / 64 * 64;
        if (!last || used + bytes > last->size) grow(bytes);
        char* at = (char*)last + header + used;
        used += bytes;
        total += bytes;
        return (type*)at;
    }
    void reset() {
        if (last && last->before) {  // one block next time
            i64 wanted = total;
            release();
            total = 0;
            grow(wanted);
        }
        used = total = 0;
    }

  private:
    struct Block {
        Block* before;
        i64 size;
    };
    static constexpr i64 header = 64;
    Block* last = nullptr;
    i64 used = 0, total = 0;
    void grow(i64 bytes) {
        i64 size = bytes < (i64(64) << 10) ? i64(64) << 10 : bytes;
        Block* block = (Block*)aligned_alloc(64, size_t(header + (size + 63) / 64 * 64));
        if (!block) throw std::bad_alloc();
        block->before = last;
        block->size = size;
        last = block;
        used = 0;
    }
    void release() {
        while (last) {
            Block* before = last->before;
            free(last);
            last = before;
        }
    }
};

// ---- units of work --------------------------------------------------------------------------------------------------

// From this width on a channel is met as a stretch of a run, not as a column.
constexpr i64 wide_channel = 256;

// Channels narrower than this are summed place by place.
constexpr i64 narrowest_segment = 32;

// Rows that a unit which sums by place takes at the least, where there are so many: it hands over the sums of every
// place, and prepares the terms of their gradients.
constexpr i64 summed_rows = 32;

// How a step is cut into runs, and runs are gathered into units. Where something depends on the column of a neuron, a
// unit's runs all hold the same columns: a strip of a long period, or whole short periods.
struct Plan {
    enum Kind { flat, strip, periods } kind;
    i64 count, channels, period, inner, run, strips, rows, rows_per_unit, units;
};

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

inline Plan make_plan(const Problem& p, bool statistics, i64 target) {
    Plan plan;
    const i64 share = ceil_div(ceil_div(p.count, 8), 16) * 16;  // small calls are for all threads too
    if (share < target) target = share < 64 ? 64 : share;
    plan.count = p.count;
    plan.channels = p.channels;
    plan.inner = p.inner;
    plan.period = p.channels * p.inner;
    plan.strips = 1;
    // Statistics of wide channels need no columns: neighbouring runs, which the hardware foresees, are read faster.
    const bool sums_by_place = statistics && p.inner < narrowest_segment;
    bool columns = (statistics && p.inner < wide_channel) || p.decay_columns > 1 || p.threshold_columns > 1 || p.a_columns > 1 || p.b_columns > 1;
    if (!columns) {
        plan.kind = Plan::flat;
        plan.run = target;
        plan.rows = ceil_div(p.count, target);
        plan.rows_per_unit = plan.rows < 128 ? 1 : 16;
        // Each unit hands over the sums of every channel and step: few units, long ones.
        if (statistics && plan.rows >= 256) plan.rows_per_unit = ceil_div(plan.rows, 16) < 64 ? ceil_div(plan.rows, 16) : 64;
    } else if (plan.period >= target) {
        plan.kind = Plan::strip;
        plan.rows = p.count / plan.period;
        if (sums_by_place) {  // narrow strips, so that there are enough units of so many rows
            const i64 narrow = plan.period / ceil_div(64 * summed_rows, plan.rows);
            if (narrow < target && target > 256) target = narrow < 256 ? 256 : narrow;
        }
        plan.run = ceil_div(ceil_div(plan.period, ceil_div(plan.period, target)), 16) * 16;
        plan.strips = ceil_div(plan.period, plan.run);
        i64 chunks = ceil_div(64, plan.strips);
        plan.rows_per_unit = ceil_div(plan.rows, chunks < plan.rows ? chunks : plan.rows);
        if (sums_by_place && plan.rows_per_unit < summed_rows) plan.rows_per_unit = summed_rows;
    } else {
        plan.kind = Plan::periods;
        plan.run = target / plan.period * plan.period;
        plan.rows = ceil_div(p.count, plan.run);
        plan.rows_per_unit = ceil_div(plan.rows, plan.rows < 64 ? plan.rows : 64);
        const i64 fewest = ceil_div(summed_rows * plan.period, plan.run);
        if (sums_by_place && plan.rows_per_unit < fewest) plan.rows_per_unit = fewest;
    }
    if (plan.rows_per_unit > 256) plan.rows_per_unit = 256;
    plan.units = plan.strips * ceil_div(plan.rows, plan.rows_per_unit);
    return plan;
}

struct Unit {
    const Plan& plan;
    i64 first_row, last_row, first_column, columns;
    Unit(const Plan& plan, i64 unit) : plan(plan) {
        i64 strip = unit % plan.strips;
        first_row = unit / plan.strips * plan.rows_per_unit;
        last_row = first_row + plan.rows_per_unit < plan.rows ? first_row + plan.rows_per_unit : plan.rows;
        first_column = plan.kind == Plan::strip ? strip * plan.run : 0;
        i64 rest = plan.period - first_column;
        columns = plan.kind == Plan::strip && plan.run < rest ? plan.run : rest;
    }
    i64 offset(i64 row) const {
        return plan.kind == Plan::strip ? row * plan.period + first_column : row * plan.run;
    }
    i64 length(i64 row) const {
        i64 rest = plan.count - offset(row);
        return plan.kind == Plan::strip ? columns : (plan.run < rest ? plan.run : rest);
    }
    // The column of a place in a run.
    i64 column(i64 place) const { return plan.kind == Plan::strip ? first_column + place : place % plan.period; }
    // The channels that a unit meets, counted from 0 in the order of memory. A flat unit that meets all of them meets
    // them again and again: its k is the channel.
    bool meets_all() const { return plan.kind == Plan::flat && span() >= plan.channels; }
    i64 channels() const { return meets_all() ? plan.channels : span(); }
    i64 channel(i64 k) const { return meets_all() ? k : (first_channel() + k) % plan.channels; }
    i64 first_channel() const { return first_place() / plan.inner; }
    // How many elements the unit has of each of them.
    void count(double* elements) const {
        const i64 from = first_place(), to = last_place(), inner = plan.inner, n = channels();
        if (meets_all()) {
            const i64 periods = to / plan.period - from / plan.period, begin = from % plan.period, end = to % plan.period;
            // Elements of a channel before a place of a period.
            auto before = [&](i64 place, i64 k) { return within(place - k * inner, inner); };
            for (i64 k = 0; k < n; ++k) elements[k] = double(periods * inner + before(end, k) - before(begin, k));
            return;
        }
        const i64 times = this->elements() / (to - from), start = first_channel() * inner;
        for (i64 k = 0; k < n; ++k) elements[k] = double(times * (within(to - start - k * inner, inner) - within(from - start - k * inner, inner)));
    }
    // After so many places the same columns come round again; enough of them to fill registers.
    i64 cycle() const {
        if (plan.kind == Plan::strip) return columns;
        const i64 periods = plan.period < 64 ? 64 / plan.period : 1;
        return periods * plan.period < plan.run ? periods * plan.period : plan.run;
    }
    // Places of a run that hold columns.
    i64 places() const { return plan.kind == Plan::strip ? columns : plan.run; }
    i64 elements() const {
        if (plan.kind == Plan::strip) return (last_row - first_row) * columns;
        i64 end = last_row * plan.run;
        return (end < plan.count ? end : plan.count) - first_row * plan.run;
    }

  private:
    i64 span() const { return (last_place() - 1) / plan.inner - first_channel() + 1; }
    static i64 within(i64 place, i64 length) { return place < 0 ? 0 : (place < length ? place : length); }
    i64 first_place() const { return plan.kind == Plan::flat ? offset(first_row) : first_column; }
    i64 last_place() const { return plan.kind == Plan::flat ? offset(first_row) + elements() : first_column + columns; }
};

// A parameter for each place of a run.
template <class real> class Columns {
  public:
    Columns(Arena& arena, const Unit& unit, const Problem& p, const void* base, double value, i64 steps, i64 columns)
        : step(steps > 1 ? unit.plan.run : 0) {
        const real* in = (const real*)base;
        if (in && columns == unit.plan.period && columns > 1 && unit.plan.kind == Plan::strip) {
            values = in + unit.first_column;
            step = steps > 1 ? columns : 0;
            return;
        }
        i64 width = unit.plan.run;
        real* out = arena.take<real>(width * (steps > 1 ? steps : 1));
        values = out;
        for (i64 t = 0; t < (steps > 1 ? steps : 1); ++t, out += width) {
            if (!in) {
                fill(out, width, real(value));
            } else if (columns == 1) {
                fill(out, width, in[t]);
            } else {
                i64 inner = columns == p.channels ? p.inner : 1;
                for (i64 i = 0; i < unit.places(); ++i) out[i] = in[t * columns + unit.column(i) / inner];
                for (i64 i = unit.places(); i < width; ++i) out[i] = real(1);
            }
        }
    }
    const real* at(i64 t) const { return values + t * step; }

  private:
    const real* values;
    i64 step;
};

// Run `work(arena, unit)` for every unit.
template <class Work> void parallel(const Problem& p, i64 units, const Work& work) {
    static thread_local Arena own;
    // Below this a second thread costs more than it brings.
    const int threads = p.count * p.steps < 32768 || units < 2 ? 1 : int(p.threads < units ? p.threads : units);
    if (threads <= 1) {
        for (i64 unit = 0; unit < units; ++unit) {
            own.reset();
            work(own, unit);
        }
        stream_fence();
        return;
    }
    bool failed = false;  // no exception may leave a thread
#pragma omp parallel num_threads(threads)
    {
        Arena& arena = own;
#pragma omp for schedule(dynamic)
        for (i64 unit = 0; unit < units; ++unit) {
            try {
                arena.reset();
                work(arena, unit);
            } catch (const std::bad_alloc&) {
#pragma omp atomic write
                failed = true;
            }
        }
        stream_fence();
    }
    if (failed) throw std::bad_alloc();
}

}  // namespace
