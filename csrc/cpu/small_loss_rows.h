// What the losses of rows share: the arithmetic of small_loss.h, and where rows and labels are.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/convert.h"
#include "cpu/small_loss.h"

namespace perfvl {
namespace PVL_ISA {

constexpr float kLog2e = 1.44269504f;

// e^x for x <= 1 by operations that every level and GPU rounds alike.
inline Vec exp_terms(Vec x) {
  return exp2(x * kLog2e, [](Vec a, Vec b, Vec c) { return a * b + c; });
}

inline float log_of(float sum) { return float(std::log(double(sum))); }

inline int64_t size_of(const TwinLoss& w) { return w.dtype == Dtype::float32 ? 4 : 2; }

inline int64_t label_of(const TwinLoss& w, int64_t group, int64_t row) {
  return w.labels[group * w.label_group_stride + row * w.label_row_stride];
}

}  // namespace PVL_ISA
}  // namespace perfvl
