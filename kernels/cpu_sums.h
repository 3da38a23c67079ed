// Sums of the CPU kernels over batch and space: channel statistics and their gradients.
// Each unit sums its own elements, then the units are added up in order: the same bits for any number of threads.
#pragma once

#include "cpu_memory.h"

namespace {

struct Segment {
    i64 begin, end, channel, local;  // local: the channel counted from the unit's first
};

// The stretches of a run that belong to one channel; none where channels are too narrow for it to pay.
class Segments {
  public:
    Segments(Arena& arena, const Unit& unit) : unit(unit) {
        if (unit.plan.inner < narrowest_segment) return;
        items = arena.take<Segment>(unit.places() / unit.plan.inner + 2);
        if (unit.plan.kind == Plan::flat) return;
        find(unit.places(), unit.column(0));
    }
    // Runs of a flat plan hold other channels each time.
    void move_to(i64 row) {
        if (items && unit.plan.kind == Plan::flat) find(unit.length(row), unit.offset(row));
    }
    const Segment* begin() const { return items; }
    const Segment* end() const { return items + count; }
    bool any() const { return items != nullptr; }

  private:
    const Unit& unit;
    Segment* items = nullptr;
    i64 count = 0;

    // first: the place of the run's first neuron in the step, or among the columns.
    void find(i64 length, i64 first) {
        const i64 inner = unit.plan.inner, channels = unit.plan.channels;
        count = 0;
        i64 stretch = first / inner, end = (stretch + 1) * inner - first;
        for (i64 i = 0; i < length; i = end, end += inner, ++stretch) {
            const i64 channel = stretch % channels;
            items[count++] = Segment{i, end < length ? end : length, channel, unit.local(unit.plan.kind == Plan::flat ? stretch : channel)};
        }
    }
};

// ---- statistics -----------------------------------------------------------------------------------------------------

// One unit's share of one step and channel. Sums are taken from a shift near the mean, so that nothing cancels.
struct Moment {
    double shift, sum, square, rate, guard;
};

// Room for the shares of a call, kept for the next one of this thread: mapping it anew costs more than filling it.
inline Moment* kept_shares(i64 count) {
    static thread_local struct Kept {
        Moment* data = nullptr;
        i64 count = 0;
        ~Kept() { free(data); }
    } kept;
    if (count > kept.count) {
        free(kept.data);
        kept.count = 0;
        kept.data = (Moment*)malloc(size_t(count) * sizeof(Moment));
        if (!kept.data) throw std::bad_alloc();
        kept.count = count;
    }
    return kept.data;
}
constexpr i64 most_kept = (i64(16) << 20) / i64(sizeof(Moment));

// The shares of all units, and their sum.
class Moments {
  public:
    Moments(const Plan& plan, const Problem& p, bool on) : plan(plan), steps(p.steps) {
        if (!on) return;
        for (i64 unit = 0; unit < (plan.kind == Plan::flat ? plan.units : plan.strips); ++unit) {
            i64 channels = Unit(plan, unit).channels();
            if (channels > width) width = channels;
        }
        const i64 count = plan.units * steps * width;
        if (count <= most_kept) {
            shares = kept_shares(count);
        } else {
            shares = own = (Moment*)malloc(size_t(count) * sizeof(Moment));
            if (!own) throw std::bad_alloc();
        }
    }
    ~Moments() { free(own); }
    Moments(const Moments&) = delete;
    Moment* of(i64 unit) { return shares + unit * steps * width; }
    i64 stride() const { return width; }

    void merge(const Problem& p) {
        const double n = double(p.count / p.channels);
        double *mean = (double*)p.mean, *variance = (double*)p.variance, *rate = (double*)p.rate, *guard = (double*)p.guard;
        for (double* table : {mean, variance, rate, guard})
            if (table) memset(table, 0, size_t(steps * p.channels) * sizeof(double));
        each(p, [&](const Moment& m, i64 at, double elements, double) {
            mean[at] += m.shift * elements + m.sum;
            if (rate) rate[at] += m.rate;
            if (guard) guard[at] += m.guard;
        });
        for (double* table : {mean, rate, guard})
            for (i64 at = 0; table && at < steps * p.channels; ++at) table[at] /= n;
        each(p, [&](const Moment& m, i64 at, double elements, double share) {
            const double here = m.sum * share, away = m.shift + here - mean[at];
            variance[at] += m.square - m.sum * here + elements * away * away;
        });
        for (i64 at = 0; at < steps * p.channels; ++at) variance[at] = variance[at] < 0 ? 0 : variance[at] / n;
    }

  private:
    const Plan& plan;
    i64 steps, width = 0;
    Moment *shares = nullptr, *own = nullptr;

    template <class Visit> void each(const Problem& p, const Visit& visit) {
        for (i64 index = 0; index < plan.units; ++index) {
            const Unit unit(plan, index);
            for (i64 k = 0; k < unit.channels(); ++k) {
                const double elements = double(unit.share(k)), share = 1 / elements;
                const i64 channel = unit.channel(k);
                const Moment* from = of(index) + k;
                for (i64 t = 0; t < steps; ++t) visit(from[t * width], t * p.channels + channel, elements, share);
            }
        }
    }
};

// Sums of one step by place: a place is summed again after `cycle` places.
template <class real> struct PlaceSums {
    real *shift, *sum, *square, *rate, *guard;
    i64 cycle;
};

// work(begin, end) for each round of places in a run.
template <class Work> LIF_INLINE void in_cycles(i64 length, i64 cycle, const Work& work) {
    for (i64 begin = 0; begin < length; begin += cycle) work(begin, begin + cycle < length ? begin + cycle : length);
}

// So many additions in single precision, then their sum is added up in double.
constexpr i64 additions = 256;

// A shift for the sums of a channel: the middle one of three membranes, so that a single odd one does not become it.
template <class real> real middle(real a, real b, real c) {
    const real low = a < b ? a : b, high = a < b ? b : a;
    const real m = c < low ? low : (c > high ? high : c);
    return m - m == 0 ? m : (a - a == 0 ? a : (b - b == 0 ? b : real(0)));  // it must be finite
}

// The sums of one unit while it runs: per channel where channels are wide, else per place.
template <class real> class MomentSums {
  public:
    // shares: where the unit hands its sums over, [steps, stride].
    MomentSums(Arena& arena, const Unit& unit, const Problem& p, bool on, Moment* shares, i64 stride)
        : unit(unit), p(p), segments(arena, unit), shares(shares), stride(stride) {
        if (!on) return;
        channels = unit.channels();
        if (segments.any()) {
            seen = arena.take<bool>(p.steps * channels);
            memset(seen, 0, size_t(p.steps * channels));
        } else {
            cycle = unit.cycle();
            narrow = arena.take<real>(p.steps * cycle * 5);
            first = arena.take<i64>(cycle);
            for (i64 i = 0; i < cycle; ++i) {
                // The first place of the channel in this run, from which the shift of all its places is taken.
                i64 column = unit.column(i), start = column / unit.plan.inner * unit.plan.inner;
                first[i] = start < unit.first_column ? 0 : start - unit.first_column;
            }
            const i64 rounds = ceil_div(unit.plan.run, cycle);
            rows_in_single = rounds < additions ? additions / rounds : 1;
            if (unit.last_row - unit.first_row > rows_in_single) added = arena.take<double>(p.steps * cycle * 4);
        }
    }

    // The sums of a stretch [begin, end) of a channel at a step. z(i): the membrane at a place.
    template <class Membrane> Moment& at(i64 t, const Segment& segment, i64 begin, i64 end, const Membrane& z) {
        Moment& m = shares[t * stride + segment.local];
        bool& known = seen[t * channels + segment.local];
        if (!known) m = Moment{double(middle(z(begin), z(begin + (end - begin) / 2), z(end - 1))), 0, 0, 0, 0};
        known = true;
        return m;
    }
    const Segments& stretches() const { return segments; }
    void move_to(i64 row) { segments.move_to(row); }

    // Where channels are narrow: the sums of a step, begun anew with the unit's first row. z(i): the membrane at a place.
    bool by_place() const { return narrow != nullptr; }
    template <class Membrane> PlaceSums<real> at_places(i64 t, i64 row, i64 length, const Membrane& z) {
        real* at = narrow + t * cycle * 5;
        const PlaceSums<real> sums{at, at + cycle, at + 2 * cycle, at + 3 * cycle, at + 4 * cycle, cycle};
        if (row == unit.first_row) {
            memset(sums.sum, 0, size_t(cycle * 4) * sizeof(real));
            if (added) memset(added + t * cycle * 4, 0, size_t(cycle * 4) * sizeof(double));
            // Other places of the channel: of later rounds, or, where a run is one round, of the same.
            const bool several = length > cycle;
            for (i64 i = 0; i < cycle; ++i) {
                const i64 a = first[i] < length ? first[i] : 0;
                if (i > 0 && first[i] == first[i - 1]) {
                    sums.shift[i] = sums.shift[i - 1];
                    continue;
                }
                const i64 last = several ? a + (length - 1 - a) / cycle * cycle : a + unit.plan.inner - 1;
                const i64 between = several ? a + (length - 1 - a) / cycle / 2 * cycle : a + unit.plan.inner / 2;
                const real here = z(a);
                sums.shift[i] = last == a ? middle(here, here, here) : middle(here, z(between < length ? between : a), z(last < length ? last : a));
            }
        } else if (added && (row - unit.first_row) % rows_in_single == 0) {
            double* to = added + t * cycle * 4;
            for (i64 i = 0; i < cycle * 4; ++i) to[i] += double(sums.sum[i]);
            memset(sums.sum, 0, size_t(cycle * 4) * sizeof(real));
        }
        return sums;
    }

    void add(i64 t, i64 row, i64 length, const real* h, const real* theta, const real* s) {
        segments.any() ? add_segments(t, h, theta, s, length) : add_places(t, row, length, h, theta, s);
    }

    // Hands over what was summed by place; sums of stretches are there already.
    void fold() const {
        if (!by_place()) return;
        for (i64 t = 0; t < p.steps; ++t)
            for (i64 c = 0; c < channels; ++c) shares[t * stride + c] = Moment{0, 0, 0, 0, 0};
        for (i64 i = 0; i < cycle; ++i) {
            Moment* to = shares + unit.column(i) / unit.plan.inner - unit.first_channel();
            for (i64 t = 0; t < p.steps; ++t) {
                const real* at = narrow + t * cycle * 5;
                auto sum = [&](i64 which) { return double(at[(which + 1) * cycle + i]) + (added ? added[(t * 4 + which) * cycle + i] : 0.0); };
                Moment& m = to[t * stride];
                m.shift = at[i];
                m.sum += sum(0);
                m.square += sum(1);
                m.rate += sum(2);
                m.guard += sum(3);
            }
        }
    }

  private:
    const Unit& unit;
    const Problem& p;
    Segments segments;
    Moment* shares;
    i64 stride, channels = 0, cycle = 0, rows_in_single = 0;
    double* added = nullptr;
    bool* seen = nullptr;
    real* narrow = nullptr;
    i64* first = nullptr;

    void add_segments(i64 t, const real* h, const real* theta, const real* s, i64 length) {
        for (const Segment& segment : segments) {
            if (segment.begin >= length) break;
            Moment& m = at(t, segment, segment.begin, segment.end, [&](i64 i) { return h[i] - theta[i]; });
            const real shift = real(m.shift);
            real sum = 0, square = 0, rate = 0;
#pragma omp simd simdlen(16) reduction(+ : sum, square, rate)
            for (i64 i = segment.begin; i < segment.end; ++i) {
                real d = (h[i] - theta[i]) - shift;
                sum += d;
                square += d * d;
                rate += s[i];
            }
            m.sum += sum;
            m.square += square;
            m.rate += rate;
            if (p.guard) {
                real guard = 0, delta = real(p.delta);
#pragma omp simd simdlen(16) reduction(+ : guard)
                for (i64 i = segment.begin; i < segment.end; ++i) guard += guard_value(p.power, h[i] - theta[i], delta);
                m.guard += guard;
            }
        }
    }

    void add_places(i64 t, i64 row, i64 length, const real* h, const real* theta, const real* s) {
        const PlaceSums<real> to = at_places(t, row, length, [&](i64 i) { return h[i] - theta[i]; });
        const real delta = real(p.delta);
        in_cycles(length, cycle, [&](i64 begin, i64 end) {
            const real *h_i = h + begin, *theta_i = theta + begin, *s_i = s + begin;
#pragma GCC ivdep
            for (i64 i = 0; i < end - begin; ++i) {
                real d = (h_i[i] - theta_i[i]) - to.shift[i];
                to.sum[i] += d;
                to.square[i] += d * d;
                to.rate[i] += s_i[i];
            }
            if (!p.guard) return;
#pragma GCC ivdep
            for (i64 i = 0; i < end - begin; ++i) to.guard[i] += guard_value(p.power, h_i[i] - theta_i[i], delta);
        });
    }
};

// ---- gradients of the statistics ------------------------------------------------------------------------------------

// Of one step and channel: flat + slope * (z - mean) is added to the gradient of h, rate to that of the spike, and
// guard times the guard's slope. mean + rest is the mean as a pair: in z - mean it must be more exact than z.
template <class real> struct MomentTerm {
    real flat, slope, mean, rest, rate, guard;
};

// The same of each place of a round.
template <class real> struct PlaceTerms {
    real *flat, *slope, *mean, *rest, *rate, *guard;
    i64 cycle;
};

// What the statistics add to the gradients of h and s.
template <class real> class Coefficients {
  public:
    real* of_z = nullptr;  // the last step's addition to the gradient of z

    Coefficients(Arena& arena, const Unit& unit, const Problem& p, bool on) : p(p), unit(unit), segments(arena, unit) {
        if (!on) return;
        of_z = arena.take<real>(unit.plan.run);
        if (segments.any()) {
            return;
        }
        cycle = unit.cycle();
        places = arena.take<real>(p.steps * cycle * 6);
        i64* channel = arena.take<i64>(cycle);
        for (i64 i = 0; i < cycle; ++i) channel[i] = unit.column(i) / unit.plan.inner;
        for (i64 t = 0; t < p.steps; ++t) {
            const PlaceTerms<real> at = at_places(t);
            for (i64 i = 0; i < cycle; ++i) {
                const Term term = read(t, channel[i]);
                at.flat[i] = term.flat;
                at.slope[i] = term.slope;
                at.mean[i] = term.mean;
                at.rest[i] = term.rest;
                at.rate[i] = term.rate;
                at.guard[i] = term.guard;
            }
        }
    }

    PlaceTerms<real> at_places(i64 t) const {
        real* at = places + t * cycle * 6;
        return {at, at + cycle, at + 2 * cycle, at + 3 * cycle, at + 4 * cycle, at + 5 * cycle, cycle};
    }
    MomentTerm<real> of(i64 t, const Segment& segment) const { return read(t, segment.channel); }
    const Segments& stretches() const { return segments; }
    void move_to(i64 row) { segments.move_to(row); }

    // Fills of_z; returns the gradient of the spikes, with the rate's share where there is one.
    const real* add(i64 t, i64 length, const real* h, const real* theta, const real* g, real* g_s) const {
        const real delta = real(p.delta);
        if (segments.any()) {
            for (const Segment& segment : segments) {
                if (segment.begin >= length) break;
                const Term c = of(t, segment);
#pragma GCC ivdep
                for (i64 i = segment.begin; i < segment.end; ++i) {
                    real z = h[i] - theta[i];
                    of_z[i] = c.flat + (c.slope != real(0) ? c.slope * ((z - c.mean) - c.rest) : real(0));
                }
                if (p.g_rate)
                    for (i64 i = segment.begin; i < segment.end; ++i) g_s[i] = g[i] + c.rate;
                if (p.g_guard)
                    for (i64 i = segment.begin; i < segment.end; ++i)
                        of_z[i] += c.guard * guard_slope(p.power, h[i] - theta[i], delta);
            }
            return p.g_rate ? g_s : g;
        }
        const PlaceTerms<real> c = at_places(t);
        in_cycles(length, cycle, [&](i64 begin, i64 end) {
            const real *h_i = h + begin, *theta_i = theta + begin;
            real* to = of_z + begin;
            const i64 n = end - begin;
#pragma GCC ivdep
            for (i64 i = 0; i < n; ++i) {
                real z = h_i[i] - theta_i[i];
                to[i] = c.flat[i] + (c.slope[i] != real(0) ? c.slope[i] * ((z - c.mean[i]) - c.rest[i]) : real(0));
            }
            if (p.g_rate)
                for (i64 i = 0; i < n; ++i) g_s[begin + i] = g[begin + i] + c.rate[i];
            if (p.g_guard)
                for (i64 i = 0; i < n; ++i) to[i] += c.guard[i] * guard_slope(p.power, h_i[i] - theta_i[i], delta);
        });
        return p.g_rate ? g_s : g;
    }

  private:
    using Term = MomentTerm<real>;
    const Problem& p;
    const Unit& unit;
    Segments segments;
    i64 cycle = 0;
    real* places = nullptr;

    Term read(i64 t, i64 channel) const {
        const i64 at = t * p.channels + channel;
        auto value = [&](const void* base) { return base ? ((const double*)base)[at] : 0.0; };
        const double slope = value(p.g_variance), mean = slope != 0 ? value(p.mean) : 0.0;
        const real high = real(mean);
        return Term{real(value(p.g_mean)), real(slope), high, real(mean - double(high)), real(value(p.g_rate)),
                    real(value(p.g_guard))};
    }
};

}  // namespace
