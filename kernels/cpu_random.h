// Random numbers of neurons that fire by chance, for the CPU kernels.
#pragma once

#include "cpu_memory.h"

namespace {

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
        if (index) {
#pragma GCC ivdep
            for (i64 i = 0; i < length; ++i) u[i] = uniform<real>(seed, index[i], step);
        } else {
#pragma GCC ivdep
            for (i64 i = 0; i < length; ++i) u[i] = uniform<real>(seed, u64(offset + i), step);
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
