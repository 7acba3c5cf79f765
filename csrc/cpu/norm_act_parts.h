// How norm_act divides its work, and what it knows of each channel. By sizes alone: neither threads nor their order
// change a bit.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/activation_spans.h"
#include "cpu/image_rows.h"
#include "cpu/norm_act.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

constexpr int64_t kMostPlanes = 32, kMostColumns = 512;
constexpr int64_t kSum = 128 * kLanes;  // elements of a channel that are added in float32; beyond, in float64

// A block of channels and a part of `outer` are a task.
struct Tasks {
  // `tensors`: how many are read.
  Tasks(const NormAct& a, int64_t tensors) {
    constexpr int64_t kRun = 1024, kCache = 384 << 10, kEnough = 16, kMost = 64;
    columns = a.inner == 1;
    int64_t of_channel = a.outer * a.inner, bytes = a.dtype == Dtype::float32 ? 4 : 2;
    if (columns) {
      block = kMostColumns;
    } else {
      // Runs of memory that are not short, of tasks that are not few and stay in the cache from one pass to the next.
      block = std::clamp<int64_t>(kRun / a.inner, 1, kMostPlanes);
      block = std::min({block, std::max<int64_t>(1, a.channels / kEnough),
                        std::max<int64_t>(1, kCache / (of_channel * bytes * tensors))});
    }
    block = std::min(block, a.channels);
    blocks = ceil_div(a.channels, block);
    int64_t most = std::min(ceil_div(kMost, blocks), of_channel * block / kGrain);
    if (!columns && blocks >= kEnough) most = 1;
    height = ceil_div(a.outer, std::clamp<int64_t>(most, 1, a.outer));
    parts = ceil_div(a.outer, height);
  }
  // Whether a task holds all there is of its channels, and can do everything for them.
  bool whole() const { return !columns && parts == 1; }
  int64_t count() const { return parts * blocks; }
  // The number of task `i` where each thread goes back over what it has read, the latest first.
  int64_t back(int64_t i, int64_t threads) const {
    int64_t chunk = ceil_div(count(), std::max<int64_t>(threads, 1)), begin = i / chunk * chunk;
    return begin + std::min(count(), begin + chunk) - 1 - i;
  }
  bool columns;
  int64_t block, blocks, height, parts;
};

struct Task {
  Task(const NormAct& a, const Tasks& t, int64_t i)
      : part(i / t.blocks),
        begin(part * t.height),
        end(std::min(a.outer, begin + t.height)),
        first(i % t.blocks * t.block),
        last(std::min(a.channels, first + t.block)) {}
  int64_t part, begin, end, first, last;  // of outer, and of channels
};

// What a pass over memory needs of the channels, and what it finds.
struct Channels {
  Channels(const NormAct& a, const Tasks& t, void* base) : count(a.channels), parts(t.parts) {
    Arena arena(base);
    sums = arena.take<double>(2 * parts * count);
    pivot = arena.take<float>(count), scale = arena.take<float>(count), shift = arena.take<float>(count);
    offset = arena.take<float>(count), slope = arena.take<float>(count);
    bytes = arena.used();
  }
  double* first(int64_t part) const { return sums + 2 * part * count; }
  double* second(int64_t part) const { return first(part) + count; }
  // Adds the parts' sums, in their order, to those of the first part.
  void add_parts(int64_t begin, int64_t end) const {
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t c = begin; c < end; ++c) first(0)[c] += first(part)[c];
      for (int64_t c = begin; c < end; ++c) second(0)[c] += second(part)[c];
    }
  }
  int64_t count, parts, bytes;
  double* sums;                  // [parts][2][channels]
  float *pivot, *scale, *shift;  // a number near the mean; n(z) = (z - mean) * scale + shift
  float *offset, *slope;         // dz = (g - offset - (z - mean) * slope) * scale
};

void find_affine(const NormAct& a, const Channels& k, int64_t first, int64_t last) {
  for (int64_t c = first; c < last; ++c) {
    double deviation = 1 / std::sqrt(double(a.variance[c]) + a.eps);
    k.scale[c] = float(a.weight ? deviation * a.weight[c] : deviation);
    k.shift[c] = a.bias ? a.bias[c] : 0.f;
  }
}

// Mean, variance and the running ones; then the affine map. Sums are of z - pivot and of its square.
void finish_statistics(const NormAct& a, const Channels& k, int64_t first, int64_t last) {
  double count = double(a.outer) * double(a.inner);
  if (a.training) k.add_parts(first, last);
  for (int64_t c = first; a.training && c < last; ++c) {
    double mean = k.first(0)[c] / count, square = k.second(0)[c] / count - mean * mean;
    double variance = square < 0 ? 0 : square;  // NaN stays
    mean += k.pivot[c];
    a.mean[c] = float(mean), a.variance[c] = float(variance);
    if (a.running_mean) a.running_mean[c] = float(a.momentum * mean + (1 - a.momentum) * a.running_mean[c]);
    if (a.running_var)
      a.running_var[c] = float(a.momentum * variance * (count / (count - 1)) + (1 - a.momentum) * a.running_var[c]);
  }
  find_affine(a, k, first, last);
}

// Sums are of g and of g (z - mean).
void finish_gradients(const NormActBackward& b, const Channels& k, int64_t first, int64_t last) {
  const NormAct& a = b.forward;
  double count = double(a.outer) * double(a.inner);
  k.add_parts(first, last);
  for (int64_t c = first; c < last; ++c) {
    double inverse = 1 / (double(a.variance[c]) + a.eps), deviation = std::sqrt(inverse);
    double of_bias = k.first(0)[c], of_deviation = k.second(0)[c];
    if (b.grad_weight) b.grad_weight[c] = float(of_deviation * deviation), b.grad_bias[c] = float(of_bias);
    k.offset[c] = float(of_bias / count), k.slope[c] = float(of_deviation * inverse / count);
  }
}

// Results of [outer, channels, inner], of which whole lines may be written past the caches.
template <Dtype dtype>
struct Lines : Results<dtype> {
  using Results<dtype>::kBytes;
  using Results<dtype>::kLine;
  static constexpr int64_t kBeyondCaches = 8 << 20, kShort = 128;
  Lines(void* p, const NormAct& a) : Results<dtype>(p, false) {
    bool lines = a.inner == 1 ? a.channels % kLanes == 0 && address(0) % kLine == 0 : a.inner >= kShort;
    this->past = lines && address(0) % kBytes == 0 && a.outer * a.channels * a.inner * kBytes > kBeyondCaches;
  }
  // Elements from number `at` on before a whole vector can be written past the caches, at most `count`.
  int64_t head(int64_t at, int64_t count) const {
    int64_t before = this->past ? (kLine - address(at) % kLine) % kLine / kBytes : 0;
    return std::min(before, count);
  }

 private:
  int64_t address(int64_t at) const { return int64_t(reinterpret_cast<uintptr_t>(this->data)) + at * kBytes; }
};

// The first `lanes` lanes, the others 0.
[[gnu::always_inline]] inline Vec only(Vec x, int64_t lanes) {
  if (lanes == kLanes) return x;
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return select(lane < int32_t(lanes), x, Vec{});
}
// A pivot must not turn sums into NaN that are infinite.
inline Vec finite(Vec x) { return select(x - x == 0.f, x, Vec{}); }

}  // namespace
}  // namespace PVL_ISA
}  // namespace perfvl
