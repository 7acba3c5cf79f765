// How the activations and the norms beside them walk over dense memory.
#pragma once

#include <type_traits>

#include "cpu/image_rows.h"

namespace perfvl {
namespace PVL_ISA {

constexpr int64_t kGrain = 16384;  // elements of a task

// f(first, elements) for vectors of a span. The compiler makes two of f: one for whole vectors.
template <class F>
[[gnu::always_inline]] inline void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, int64_t(kLanes));
  if (i < count) f(i, count - i);
}

// f(row, integral_constant of how many) for rows [begin, end), `kMany` at a time while there are as many.
template <int64_t kMany, class F>
[[gnu::always_inline]] inline void for_rows(int64_t begin, int64_t end, const F& f) {
  int64_t row = begin;
  for (; row + kMany <= end; row += kMany) f(row, std::integral_constant<int64_t, kMany>{});
  for (; row < end; ++row) f(row, std::integral_constant<int64_t, 1>{});
}

// The elements of one dtype, from number `at` on.
template <Dtype dtype>
struct Elements {
  static constexpr int64_t kBytes = dtype == Dtype::float32 ? 4 : 2;
  const char* data;
  explicit Elements(const void* p) : data(static_cast<const char*>(p)) {}
  Vec get(int64_t at, int64_t lanes) const { return read_lanes(dtype, data + at * kBytes, lanes); }
  // Of `rows` rows read side by side, `stride` apart, which the processor follows badly: asks for what is ahead. That
  // is in the next rows where these are short, for what is nearer is read by now.
  Vec get_ahead(int64_t at, int64_t lanes, int64_t rows, int64_t stride) const {
    constexpr int64_t kShort = 16384 / kBytes, kAhead = 1536 / kBytes;
    int64_t next = rows * stride, ahead = next <= kShort ? next : kAhead;
    __builtin_prefetch(data + (at + ahead) * kBytes);
    return get(at, lanes);
  }
};
inline Vec get_float(const float* p, int64_t lanes) { return read_lanes(Dtype::float32, p, lanes); }

// Elements that are written once: past the caches where they would not stay in them, so that memory is not fetched to
// be overwritten, and what is read twice stays.
template <Dtype dtype>
struct Results : Elements<dtype> {
  using Elements<dtype>::kBytes;
  static constexpr int64_t kLine = kLanes * kBytes;
  bool past;
  Results(void* p, bool past) : Elements<dtype>(p), past(past) {}
  void set(int64_t at, Vec x, int64_t lanes) const {
    char* to = const_cast<char*>(this->data) + at * kBytes;
    if (!past || lanes != kLanes) return write_lanes(dtype, to, x, lanes);
    if constexpr (dtype == Dtype::float32)
      stream(to, x);
    else
      stream(to, narrow(dtype, x));
  }
  void finish() const {
    if (past) stream_fence();
  }
};

}  // namespace PVL_ISA
}  // namespace perfvl
