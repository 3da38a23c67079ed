// The C ABI of the CPU kernels: one library for every x86-64 machine, the instruction set chosen when it is loaded.

#include <cstdint>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "lif.h"

#define LIF_DECLARE(isa)                                     \
    extern "C" int fastsnn_forward_##isa(const lif::Problem*); \
    extern "C" int fastsnn_backward_##isa(const lif::Problem*);
LIF_DECLARE(baseline)
#if defined(FASTSNN_X86)
LIF_DECLARE(v3)
LIF_DECLARE(v4)
#endif

namespace {

struct Kernels {
    const char* name;
    int (*forward)(const lif::Problem*);
    int (*backward)(const lif::Problem*);
};

// A set by its name, or, without one, the widest that this machine has.
Kernels pick(const char* wanted) {
    auto is = [&](const char* name) {
        if (!wanted) return true;
        const char *a = wanted, *b = name;
        while (*a && *a == *b) ++a, ++b;
        return *a == *b;
    };
#if defined(FASTSNN_X86)
    __builtin_cpu_init();
    if (is("v4") && __builtin_cpu_supports("x86-64-v4")) return {"v4", fastsnn_forward_v4, fastsnn_backward_v4};
    if (is("v3") && __builtin_cpu_supports("x86-64-v3")) return {"v3", fastsnn_forward_v3, fastsnn_backward_v3};
#endif
    if (is("baseline")) return {"baseline", fastsnn_forward_baseline, fastsnn_backward_baseline};
    return {nullptr, nullptr, nullptr};
}

Kernels chosen = pick(nullptr);

// Fresh memory of this size is mapped page by page while it is written; large pages make that some hundred times rarer.
void advise(void* base, lif::i64 bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const std::uintptr_t page = 4096;
    std::uintptr_t begin = (std::uintptr_t(base) + page - 1) / page * page, end = (std::uintptr_t(base) + std::uintptr_t(bytes)) / page * page;
    if (base && bytes >= (lif::i64(8) << 20)) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)base, (void)bytes;
#endif
}

// A row of the statistics as its reader wants it.
void round_row(const double* from, lif::i64 count, bool to_double, void* to) {
    for (lif::i64 i = 0; to && i < count; ++i) to_double ? (void)(((double*)to)[i] = from[i]) : (void)(((float*)to)[i] = float(from[i]));
}

void round_rows(const lif::Problem& p) {
    const void* tables[] = {p.mean, p.variance, p.rate, p.guard};
    for (int row = 0; row < 4; ++row) round_row((const double*)tables[row], p.steps * p.channels, p.dtype == 1, p.rows[row]);
}

// A call whose gradients of rows are as the kernels add them up: in double, and of the sums that the rows are means of.
struct Summed {
    lif::Problem p;
    explicit Summed(const lif::Problem& given) : p(given) {
        static thread_local std::vector<double> kept;
        const std::size_t count = std::size_t(p.steps * p.channels);
        std::vector<double>& room = 4 * count <= most_kept ? kept : own;
        room.resize(4 * count);
        lif::ptr* const gradients[] = {&p.g_mean, &p.g_variance, &p.g_rate, &p.g_guard};
        for (int row = 0; row < 4; ++row) {
            const void* from = p.g_rows[row];
            double *to = room.data() + row * count, share = (row == 1 ? 2.0 : 1.0) / double(p.count / p.channels);
            for (std::size_t i = 0; from && i < count; ++i) to[i] = (p.dtype == 1 ? ((const double*)from)[i] : double(((const float*)from)[i])) * share;
            if (from) *gradients[row] = to;
        }
    }
    static bool needed(const lif::Problem& p) { return p.g_rows[0] || p.g_rows[1] || p.g_rows[2] || p.g_rows[3]; }

  private:
    static constexpr std::size_t most_kept = (std::size_t(1) << 20) / sizeof(double);
    std::vector<double> own;
};

}  // namespace

extern "C" {

// The size of struct Problem, for the caller to compare with its own.
long long fastsnn_problem_size() { return sizeof(lif::Problem); }

const char* fastsnn_instruction_set() { return chosen.name; }

// For tests: run the kernels of another instruction set that this machine has. 0, or 1 where it has not.
int fastsnn_use_instruction_set(const char* name) {
    Kernels kernels = pick(name);
    if (!kernels.name) return 1;
    chosen = kernels;
    return 0;
}

int fastsnn_forward(const lif::Problem* p) {
    const lif::i64 real = p->dtype == 1 ? 8 : 4, size = p->dtype == 0 ? 4 : (p->dtype == 1 ? 8 : 2);
    advise(p->spikes, p->steps * p->count * size);
    advise(p->membrane, p->membrane ? p->steps * p->count * real : 0);
    advise(p->v, p->count * real);
    const int failed = chosen.forward(p);
    if (!failed) round_rows(*p);
    return failed;
}

int fastsnn_backward(const lif::Problem* p) {
    const lif::i64 size = p->dtype == 0 ? 4 : (p->dtype == 1 ? 8 : 2);
    advise(p->g_x, (p->x_stride ? p->steps : 1) * p->count * size);
    if (!Summed::needed(*p)) return chosen.backward(p);
    try {
        const Summed summed(*p);
        return chosen.backward(&summed.p);
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
}
