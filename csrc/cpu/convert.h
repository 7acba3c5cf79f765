// Rows of any supported dtype and stride, as dense float32 or bfloat16 rows.
#pragma once

#include "common.h"
#include "cpu/vec.h"

namespace perfvl {
namespace PVL_ISA {

inline float element(const Matrix& m, int64_t row, int64_t col) {
  int64_t at = row * m.row_stride + col * m.col_stride;
  if (m.dtype == Dtype::float32) return static_cast<const float*>(m.data)[at];
  uint16_t h = static_cast<const uint16_t*>(m.data)[at];
  return m.dtype == Dtype::bfloat16 ? bfloat_to_float(h) : half_to_float(h);
}

// What one vector of a dense row becomes on its way: float32 lanes.
inline Vec load_lanes(const Matrix& m, int64_t at) {
  if (m.dtype == Dtype::float32) return load<Vec>(static_cast<const float*>(m.data) + at);
  HalfVec h = load<HalfVec>(static_cast<const uint16_t*>(m.data) + at);
  return m.dtype == Dtype::bfloat16 ? widen_bfloat(h) : widen_half(h);
}

inline void put(float* p, float x) { *p = x; }
inline void put(uint16_t* p, float x) { *p = float_to_bfloat(x); }
inline void put(float* p, Vec v) { store(p, v); }
inline void put(uint16_t* p, Vec v) { store(p, narrow_bfloat(v)); }

// out[count, stride] <- rows [first, first + count) of m; float* keeps float32, uint16_t* rounds to bfloat16.
// Columns from m.cols to `stride` become zero.
template <class T>
void copy_rows(const Matrix& m, int64_t first, int64_t count, T* out, int64_t stride) {
  if (m.col_stride != 1) {
    // A transposed buffer: walk it in blocks of rows so that its own contiguous direction stays in cache.
    constexpr int64_t block = 16;
    for (int64_t r0 = 0; r0 < count; r0 += block) {
      int64_t r1 = r0 + block < count ? r0 + block : count;
      for (int64_t c = 0; c < m.cols; ++c)
        for (int64_t r = r0; r < r1; ++r) put(out + r * stride + c, element(m, first + r, c));
    }
  } else {
    for (int64_t r = 0; r < count; ++r) {
      int64_t c = 0, start = (first + r) * m.row_stride;
      for (; c + kLanes <= m.cols; c += kLanes) put(out + r * stride + c, load_lanes(m, start + c));
      for (; c < m.cols; ++c) put(out + r * stride + c, element(m, first + r, c));
    }
  }
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = m.cols; c < stride; ++c) out[r * stride + c] = T(0);
}

}  // namespace PVL_ISA
}  // namespace perfvl
