// The adaptive piecewise linear unit: max(0, x) + sum over s of slope[s] max(0, hinge[s] - x), and its gradients.
//
// Parameters of channels stay in registers for a plane of NCHW. Where neighbours in memory have parameters of their
// own, a block of columns keeps parameters and sums in the L1 cache, and a few rows share what is read of them.
#pragma once

#include <algorithm>

#include "cpu/activation_spans.h"
#include "cpu/activation_units.h"
#include "cpu/image_rows.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

// Rows that share what is read of their parameters, and in backward what is written of their sums. Eight at a
// time took backward a third longer where rows lie far apart.
constexpr int64_t kRows = 4;

// A block of parameters and a part of `outer` are a task; in backward it leaves its sums where `Sums` says.
struct Tasks {
  explicit Tasks(const Apl& a) {
    constexpr int64_t kMostTasks = 64, kElements = 4096;
    across = a.inner == 1;
    block = std::min(
        across ? round_up(kMostColumns / a.segments, kLanes) : std::clamp<int64_t>(kElements / a.inner, 1, kMostPlanes),
        a.parameters);
    blocks = ceil_div(a.parameters, block);
    int64_t most = std::min(ceil_div(kMostTasks, blocks), a.outer * block * a.inner / kGrain);
    height = ceil_div(a.outer, std::clamp<int64_t>(most, 1, a.outer));
    parts = ceil_div(a.outer, height);
  }
  static constexpr int64_t kMostColumns = 2048, kMostPlanes = 32;
  bool across;  // neighbours in memory have parameters of their own
  int64_t block, blocks, height, parts;
};

struct Task {
  Task(const Apl& a, const Tasks& t, int64_t i)
      : part(i / t.blocks),
        begin(part * t.height),
        end(std::min(a.outer, begin + t.height)),
        first(i % t.blocks * t.block),
        last(std::min(a.parameters, first + t.block)) {}
  int64_t part, begin, end, first, last;  // of outer, and of parameters
};

// Of [outer, parameters, inner]. Rows that would not stay in the caches go past them.
template <Dtype dtype>
Results<dtype> results_of(void* p, const Apl& a) {
  constexpr int64_t kBeyondCaches = 4 << 20, kLine = Results<dtype>::kLine;
  bool aligned = a.parameters % kLanes == 0 && reinterpret_cast<uintptr_t>(p) % kLine == 0;
  return {p, a.inner == 1 && aligned && a.outer * a.parameters * Results<dtype>::kBytes > kBeyondCaches};
}

template <int S, Dtype dtype>
void apl_planes(const Apl& a, const Task& t) {
  Elements<dtype> input(a.input);
  Results<dtype> output = results_of<dtype>(a.output, a);
  for (int64_t o = t.begin; o < t.end; ++o)
    for (int64_t p = t.first; p < t.last; ++p) {
      Vec slope[S], hinge[S];
      for (int s = 0; s < S; ++s) {
        slope[s] = broadcast(a.slope[s * a.parameters + p]);
        hinge[s] = broadcast(a.hinge[s * a.parameters + p]);
      }
      int64_t start = (o * a.parameters + p) * a.inner;
      for_vectors(a.inner, [&](int64_t i, int64_t lanes) {
        Vec x = input.get(start + i, lanes), y = max(Vec{}, x);
#pragma GCC unroll 6
        for (int s = 0; s < S; ++s) y = fma(slope[s], max(Vec{}, hinge[s] - x), y);
        output.set(start + i, y, lanes);
      });
    }
}

template <Dtype dtype>
void apl_columns(const Apl& a, const Task& t) {
  Elements<dtype> input(a.input);
  Results<dtype> output = results_of<dtype>(a.output, a);
  for_rows<kRows>(t.begin, t.end, [&](int64_t row, auto rows) {
    for_vectors(t.last - t.first, [&](int64_t i, int64_t lanes) {
      int64_t start = row * a.parameters + t.first + i;
      Vec x[rows], y[rows];
      for (int64_t r = 0; r < rows; ++r) {
        x[r] = input.get_ahead(start + r * a.parameters, lanes, rows, a.parameters);
        y[r] = max(Vec{}, x[r]);
      }
      for (int64_t s = 0, at = t.first + i; s < a.segments; ++s, at += a.parameters) {
        Vec slope = get_float(a.slope + at, lanes), hinge = get_float(a.hinge + at, lanes);
        for (int64_t r = 0; r < rows; ++r) y[r] = fma(slope, max(Vec{}, hinge - x[r]), y[r]);
      }
      for (int64_t r = 0; r < rows; ++r) output.set(start + r * a.parameters, y[r], lanes);
    });
  });
  output.finish();
}

// Where a task writes the gradients of its parameters, [S, parameters]: its part of them.
struct Sums {
  float *slope, *hinge;
};

// Parameters of a vector of elements, and what these add to the gradients: of the slopes, and of the hinges but for the
// factor slope.
template <int S>
struct Segments {
  Vec slope[S], hinge[S], by_slope[S], by_hinge[S];

  // The gradient of the input.
  [[gnu::always_inline]] Vec differentiate(Vec x, Vec grad) {
    Vec result = select(x <= 0.f, Vec{}, grad);
#pragma GCC unroll 6
    for (int s = 0; s < S; ++s) {
      Vec below = hinge[s] - x, passed = select(below <= 0.f, Vec{}, grad);
      by_slope[s] = fma(grad, max(Vec{}, below), by_slope[s]);
      by_hinge[s] += passed;
      result = fma(-slope[s], passed, result);
    }
    return result;
  }
  // The sums, element by element: they never leave their registers.
  [[gnu::always_inline]] void keep(const Segments& from) {
#pragma GCC unroll 6
    for (int s = 0; s < S; ++s) by_slope[s] = from.by_slope[s], by_hinge[s] = from.by_hinge[s];
  }
};

template <int S, Dtype dtype>
void planes_backward(const AplBackward& b, const Task& t, const Sums& sums) {
  const Apl& a = b.forward;
  Elements<dtype> input(a.input), upstream(b.grad_output);
  Results<dtype> result = results_of<dtype>(b.grad_input, a);
  Segments<S> total[Tasks::kMostPlanes];
  for (int64_t p = t.first; p < t.last; ++p)
    for (int s = 0; s < S; ++s) {
      Segments<S>& own = total[p - t.first];
      own.slope[s] = broadcast(a.slope[s * a.parameters + p]), own.hinge[s] = broadcast(a.hinge[s * a.parameters + p]);
      own.by_slope[s] = own.by_hinge[s] = Vec{};
    }
  for (int64_t o = t.begin; o < t.end; ++o)
    for (int64_t p = t.first; p < t.last; ++p) {
      Segments<S> own = total[p - t.first];
      int64_t start = (o * a.parameters + p) * a.inner;
      for_vectors(a.inner, [&](int64_t i, int64_t lanes) {
        Vec grad = upstream.get(start + i, lanes);  // 0 beyond the plane: adds nothing
        result.set(start + i, own.differentiate(input.get(start + i, lanes), grad), lanes);
      });
      total[p - t.first].keep(own);
    }
  for (int64_t p = t.first; p < t.last; ++p)
    for (int s = 0; s < S; ++s) {
      int64_t at = s * a.parameters + p;
      sums.slope[at] = sum(total[p - t.first].by_slope[s]);
      sums.hinge[at] = sum(total[p - t.first].by_hinge[s]) * a.slope[at];
    }
}

template <int S, Dtype dtype>
void columns_backward(const AplBackward& b, const Task& t, const Sums& sums) {
  const Apl& a = b.forward;
  Elements<dtype> input(a.input), upstream(b.grad_output);
  Results<dtype> result = results_of<dtype>(b.grad_input, a);
  Segments<S> columns[(Tasks::kMostColumns / S + kLanes - 1) / kLanes];
  int64_t count = t.last - t.first;
  for_vectors(count, [&](int64_t i, int64_t lanes) {
    Segments<S>& own = columns[i / kLanes];
    for (int s = 0; s < S; ++s) {
      int64_t at = s * a.parameters + t.first + i;
      own.slope[s] = get_float(a.slope + at, lanes), own.hinge[s] = get_float(a.hinge + at, lanes);
      own.by_slope[s] = own.by_hinge[s] = Vec{};
    }
  });
  for_rows<kRows>(t.begin, t.end, [&](int64_t row, auto rows) {
    for_vectors(count, [&](int64_t i, int64_t lanes) {
      Segments<S> own = columns[i / kLanes];
      for (int64_t r = 0; r < rows; ++r) {
        int64_t at = (row + r) * a.parameters + t.first + i;
        Vec x = input.get_ahead(at, lanes, rows, a.parameters);
        Vec grad = upstream.get_ahead(at, lanes, rows, a.parameters);
        result.set(at, own.differentiate(x, grad), lanes);
      }
      columns[i / kLanes].keep(own);
    });
  });
  result.finish();
  for_vectors(count, [&](int64_t i, int64_t lanes) {
    for (int s = 0; s < S; ++s) {
      const Segments<S>& own = columns[i / kLanes];
      int64_t at = s * a.parameters + t.first + i;
      write_lanes(Dtype::float32, sums.slope + at, own.by_slope[s], lanes);
      write_lanes(Dtype::float32, sums.hinge + at, own.by_hinge[s] * own.slope[s], lanes);
    }
  });
}

}  // namespace
}  // namespace PVL_ISA
}  // namespace perfvl
