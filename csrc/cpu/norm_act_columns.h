// The passes of norm_act over rows of channels: channels_last, and vectors. A few rows share what is read of their
// channels, which with their sums stays in the L1 cache.
#pragma once

#include "cpu/norm_act_planes.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

constexpr int64_t kSumRows = 64;  // added in float32

struct ColumnSums {
  alignas(64) float first[kMostColumns], second[kMostColumns];
};
// As sum_planes: begin(row, rows) before kSumRows rows, add(row, rows, column, lanes, sums), end(rows, sums) behind.
template <class Begin, class Add, class End>
void sum_columns(const Task& t, const Begin& begin, const Add& add, const End& end) {
  constexpr int64_t kRows = 8;
  ColumnSums sums;
  int64_t columns = t.last - t.first;
  for (int64_t start = t.begin; start < t.end; start += kSumRows) {
    int64_t until = std::min(t.end, start + kSumRows);
    begin(start, until - start);
    std::fill_n(sums.first, columns, 0.f), std::fill_n(sums.second, columns, 0.f);
    for_rows<kRows>(start, until, [&](int64_t row, auto rows) {
      for_vectors(columns, [&](int64_t i, int64_t lanes) {
        Pair own{get_float(sums.first + i, lanes), get_float(sums.second + i, lanes)};
        add(row, rows, i, lanes, own);
        write_lanes(Dtype::float32, sums.first + i, own.first, lanes);
        write_lanes(Dtype::float32, sums.second + i, own.second, lanes);
      });
    });
    end(until - start, sums);
  }
}

// f(at, column, lanes, rows) for the vectors of a task, a few rows at a time.
template <class F>
void for_columns(const NormAct& a, const Task& t, const F& f) {
  constexpr int64_t kRows = 4;
  for_rows<kRows>(t.begin, t.end, [&](int64_t row, auto rows) {
    for_vectors(t.last - t.first,
                [&](int64_t i, int64_t lanes) { f(row * a.channels + t.first + i, t.first + i, lanes, rows); });
  });
}

template <Dtype dtype, class Act, bool kAfter>
struct Columns {
  using N = Norm<Act, kAfter>;

  [[gnu::always_inline]] static N norm_of(const NormAct& a, const Channels& k, int64_t c, int64_t lanes) {
    return {Act(a), get_float(a.mean + c, lanes), get_float(k.scale + c, lanes), get_float(k.shift + c, lanes)};
  }

  static void collect(const NormAct& a, const Channels& k, const Task& t) {
    constexpr int64_t kPilot = 4;
    Elements<dtype> input(a.input);
    Act act(a);
    int64_t columns = t.last - t.first;
    double *first = k.first(t.part) + t.first, *second = k.second(t.part) + t.first;
    std::fill_n(first, columns, 0.), std::fill_n(second, columns, 0.);
    alignas(64) float pivot[kMostColumns], near[kMostColumns];
    for_vectors(columns, [&](int64_t i, int64_t lanes) {
      Vec found = finite(N::seen(act, input.get(t.first + i, lanes)));
      write_lanes(Dtype::float32, pivot + i, found, lanes);
      if (t.part == 0) write_lanes(Dtype::float32, k.pivot + t.first + i, found, lanes);
    });
    sum_columns(
        t,
        [&](int64_t start, int64_t rows) {
          int64_t few = std::min(kPilot, rows);
          for_vectors(columns, [&](int64_t i, int64_t lanes) {
            Vec total{};
            for (int64_t r = 0; r < few; ++r)
              total += N::seen(act, input.get((start + r) * a.channels + t.first + i, lanes));
            write_lanes(Dtype::float32, near + i, finite(total / float(few)), lanes);
          });
        },
        [&](int64_t row, auto rows, int64_t i, int64_t lanes, Pair& sums) {
          Vec from = get_float(near + i, lanes);
          for (int64_t r = 0; r < rows; ++r) {
            Vec x = input.get_ahead((row + r) * a.channels + t.first + i, lanes, rows, a.channels);
            Vec distance = N::seen(act, x) - from;
            sums.first += distance, sums.second = fma(distance, distance, sums.second);
          }
        },
        [&](int64_t rows, const ColumnSums& sums) {
          for (int64_t i = 0; i < columns; ++i) {
            double moved = double(near[i]) - pivot[i], once = sums.first[i];
            first[i] += once + double(rows) * moved;
            second[i] += double(sums.second[i]) + moved * (2 * once + double(rows) * moved);
          }
        });
  }

  static void apply(const NormAct& a, const Channels& k, const Task& t) {
    Elements<dtype> input(a.input);
    Lines<dtype> output(a.output, a);
    for_columns(a, t, [&](int64_t at, int64_t c, int64_t lanes, auto rows) {
      N norm = norm_of(a, k, c, lanes);
      for (int64_t r = 0; r < rows; ++r, at += a.channels)
        output.set(at, norm.forward(input.get_ahead(at, lanes, rows, a.channels)), lanes);
    });
    output.finish();
  }

  static void reduce(const NormActBackward& b, const Channels& k, const Task& t) {
    const NormAct& a = b.forward;
    Elements<dtype> input(a.input), upstream(b.grad_output);
    int64_t columns = t.last - t.first;
    double *first = k.first(t.part) + t.first, *second = k.second(t.part) + t.first;
    std::fill_n(first, columns, 0.), std::fill_n(second, columns, 0.);
    sum_columns(
        t, [](int64_t, int64_t) {},
        [&](int64_t row, auto rows, int64_t i, int64_t lanes, Pair& sums) {
          N norm = norm_of(a, k, t.first + i, lanes);
          for (int64_t r = 0; r < rows; ++r) {
            int64_t at = (row + r) * a.channels + t.first + i;
            Vec x = input.get_ahead(at, lanes, rows, a.channels),
                grad = upstream.get_ahead(at, lanes, rows, a.channels);
            auto terms = norm.terms(x, grad);
            sums.first += terms.grad, sums.second = fma(terms.grad, terms.distance, sums.second);
          }
        },
        [&](int64_t, const ColumnSums& sums) {
          for (int64_t i = 0; i < columns; ++i) first[i] += sums.first[i], second[i] += sums.second[i];
        });
  }

  static void differentiate(const NormActBackward& b, const Channels& k, const Task& t) {
    const NormAct& a = b.forward;
    Elements<dtype> input(a.input), upstream(b.grad_output);
    Lines<dtype> result(b.grad_input, a);
    for_columns(a, t, [&](int64_t at, int64_t c, int64_t lanes, auto rows) {
      N norm = norm_of(a, k, c, lanes);
      Vec offset = get_float(k.offset + c, lanes), slope = get_float(k.slope + c, lanes);
      for (int64_t r = 0; r < rows; ++r, at += a.channels) {
        Vec x = input.get_ahead(at, lanes, rows, a.channels), grad = upstream.get_ahead(at, lanes, rows, a.channels);
        result.set(at, norm.backward(x, grad, offset, slope, !a.training), lanes);
      }
    });
    result.finish();
  }
};

}  // namespace
}  // namespace PVL_ISA
}  // namespace perfvl
