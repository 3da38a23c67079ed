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
        const i64 inner = unit.plan.inner, channels = unit.plan.channels, stretch = first / inner;
        const bool again = unit.meets_all() || unit.plan.kind != Plan::flat;  // channels come round, and are counted as such
        i64 channel = stretch % channels, local = (again ? channel : stretch) - (unit.meets_all() ? 0 : unit.first_channel());
        count = 0;
        for (i64 i = 0, end = (stretch + 1) * inner - first; i < length; i = end, end += inner) {
            items[count++] = Segment{i, end < length ? end : length, channel, local};
            ++local;
            if (++channel == channels) channel = 0, local = again ? local - channels : local;
        }
    }
};

// ---- statistics -----------------------------------------------------------------------------------------------------

// What a unit hands over of one step, by channel. Sums are taken from a shift near the mean, so that nothing cancels.
// rate and guard are null where nobody asks for them.
struct Shares {
    double *shift, *sum, *square, *rate, *guard;
    static i64 rows(const Problem& p) { return 3 + (p.rate != nullptr) + (p.guard != nullptr); }
    Shares(const Problem& p, double* at, i64 channels) : shift(at), sum(shift + channels), square(sum + channels) {
        rate = p.rate ? square + channels : nullptr;
        guard = p.guard ? (rate ? rate : square) + channels : nullptr;
    }
    void begin(i64 channel, double from) const {
        shift[channel] = from, sum[channel] = square[channel] = 0;
        if (rate) rate[channel] = 0;
        if (guard) guard[channel] = 0;
    }
};

// Room for the shares of a call, kept for the next one of this thread: mapping it anew costs more than filling it.
inline double* kept_shares(i64 count) {
    static thread_local struct Kept {
        double* data = nullptr;
        i64 count = 0;
        ~Kept() { free(data); }
    } kept;
    if (count > kept.count) {
        free(kept.data);
        kept.count = 0;
        kept.data = (double*)malloc(size_t(count) * sizeof(double));
        if (!kept.data) throw std::bad_alloc();
        kept.count = count;
    }
    return kept.data;
}
constexpr i64 most_kept = (i64(16) << 20) / i64(sizeof(double));

// The shares of all units, and their sum.
class Moments {
  public:
    Moments(const Plan& plan, const Problem& p, bool on) : plan(plan), p(p), steps(p.steps), rows(Shares::rows(p)) {
        if (!on) return;
        for (i64 unit = 0; unit < (plan.kind == Plan::flat ? plan.units : plan.strips); ++unit) {
            i64 channels = Unit(plan, unit).channels();
            if (channels > width) width = channels;
        }
        const i64 count = plan.units * width * (steps * rows + 1);
        if (count <= most_kept) {
            shares = kept_shares(count);
        } else {
            shares = own = (double*)malloc(size_t(count) * sizeof(double));
            if (!own) throw std::bad_alloc();
        }
    }
    ~Moments() { free(own); }
    Moments(const Moments&) = delete;
    Shares of(i64 unit, i64 t, i64 k = 0) const { return Shares(p, shares + (unit * steps + t) * rows * width + k, width); }

    void merge() {
        const double n = double(p.count / p.channels);
        double *mean = (double*)p.mean, *variance = (double*)p.variance, *rate = (double*)p.rate, *guard = (double*)p.guard;
        for (double* table : {mean, variance, rate, guard})
            if (table) memset(table, 0, size_t(steps * p.channels) * sizeof(double));
        for (i64 unit = 0; unit < plan.units; ++unit) Unit(plan, unit).count(elements(unit));
        each([&](const Shares& from, const double* count, i64 at, i64 channels) {
            double* to = mean + at;
#pragma GCC ivdep
            for (i64 k = 0; k < channels; ++k) to[k] += from.shift[k] * count[k] + from.sum[k];
            for (i64 k = 0; rate && k < channels; ++k) rate[at + k] += from.rate[k];
            for (i64 k = 0; guard && k < channels; ++k) guard[at + k] += from.guard[k];
        });
        for (double* table : {mean, rate, guard})
            for (i64 at = 0; table && at < steps * p.channels; ++at) table[at] /= n;
        each([&](const Shares& from, const double* count, i64 at, i64 channels) {
            const double* all = mean + at;
            double* to = variance + at;
#pragma GCC ivdep
            for (i64 k = 0; k < channels; ++k) {
                const double here = from.sum[k] * (1 / count[k]), away = from.shift[k] + here - all[k];
                to[k] += from.square[k] - from.sum[k] * here + count[k] * away * away;
            }
        });
        for (i64 at = 0; at < steps * p.channels; ++at) variance[at] = variance[at] < 0 ? 0 : variance[at] / n;
    }

  private:
    const Plan& plan;
    const Problem& p;
    i64 steps, rows, width = 0;
    double *shares = nullptr, *own = nullptr;

    // How many elements a unit has of each of its channels.
    double* elements(i64 unit) const { return shares + (plan.units * steps * rows + unit) * width; }

    // visit(shares, elements, at, channels) for the neighbouring channels of each unit and step, which begin at this place
    // of a table; units in order.
    template <class Visit> void each(const Visit& visit) const {
        for (i64 index = 0; index < plan.units; ++index) {
            const Unit unit(plan, index);
            const i64 channels = unit.channels(), first = unit.channel(0), rest = plan.channels - first;
            const i64 upper = channels < rest ? channels : rest;
            for (i64 t = 0; t < steps; ++t) {
                visit(of(index, t), elements(index), t * plan.channels + first, upper);
                visit(of(index, t, upper), elements(index) + upper, t * plan.channels, channels - upper);
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

// A shift is chosen among places so far apart: three that share a cache line, so that none but the first is waited for.
constexpr i64 neighbour = 5;

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
    // moments: to whom the unit, which is the one of this index, hands its sums over.
    MomentSums(Arena& arena, const Unit& unit, const Problem& p, bool on, const Moments& moments, i64 index)
        : unit(unit), p(p), segments(arena, unit), moments(moments), index(index) {
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

    // The sums of a step, in which those of a stretch [begin, end) have begun. z(i): the membrane at a place.
    template <class Membrane> Shares at(i64 t, const Segment& segment, i64 begin, i64 end, const Membrane& z) {
        const Shares to = moments.of(index, t);
        bool& known = seen[t * channels + segment.local];
        if (!known) {
            const i64 apart = end - begin > 2 * neighbour ? neighbour : (end - begin - 1) / 2;
            to.begin(segment.local, double(middle(z(begin), z(begin + apart), z(begin + 2 * apart))));
        }
        known = true;
        return to;
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
                const i64 rest = unit.plan.inner - unit.column(a) % unit.plan.inner;  // a strip may begin within a channel
                const i64 last = several ? a + (length - 1 - a) / cycle * cycle : a + rest - 1;
                const i64 between = several ? a + (length - 1 - a) / cycle / 2 * cycle : a + rest / 2;
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
            for (i64 c = 0; c < channels; ++c) moments.of(index, t).begin(c, 0);
        for (i64 i = 0; i < cycle; ++i) {
            const i64 c = unit.column(i) / unit.plan.inner - unit.first_channel();
            for (i64 t = 0; t < p.steps; ++t) {
                const real* at = narrow + t * cycle * 5;
                auto sum = [&](i64 which) { return double(at[(which + 1) * cycle + i]) + (added ? added[(t * 4 + which) * cycle + i] : 0.0); };
                const Shares to = moments.of(index, t);
                to.shift[c] = at[i];
                to.sum[c] += sum(0);
                to.square[c] += sum(1);
                if (to.rate) to.rate[c] += sum(2);
                if (to.guard) to.guard[c] += sum(3);
            }
        }
    }

  private:
    const Unit& unit;
    const Problem& p;
    Segments segments;
    const Moments& moments;
    i64 index, channels = 0, cycle = 0, rows_in_single = 0;
    double* added = nullptr;
    bool* seen = nullptr;
    real* narrow = nullptr;
    i64* first = nullptr;

    void add_segments(i64 t, const real* h, const real* theta, const real* s, i64 length) {
        for (const Segment& segment : segments) {
            if (segment.begin >= length) break;
            const Shares to = at(t, segment, segment.begin, segment.end, [&](i64 i) { return h[i] - theta[i]; });
            const i64 c = segment.local;
            const real shift = real(to.shift[c]);
            real sum = 0, square = 0, rate = 0;
#pragma omp simd simdlen(16) reduction(+ : sum, square, rate)
            for (i64 i = segment.begin; i < segment.end; ++i) {
                real d = (h[i] - theta[i]) - shift;
                sum += d;
                square += d * d;
                rate += s[i];
            }
            to.sum[c] += sum;
            to.square[c] += square;
            if (to.rate) to.rate[c] += rate;
            if (to.guard) {
                real guard = 0, delta = real(p.delta);
#pragma omp simd simdlen(16) reduction(+ : guard)
                for (i64 i = segment.begin; i < segment.end; ++i) guard += guard_value(p.power, h[i] - theta[i], delta);
                to.guard[c] += guard;
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
