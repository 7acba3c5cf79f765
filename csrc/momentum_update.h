// What both sides of momentum_update are given: flat pairs of tensors, of any dtype mix, and the two weights.
#pragma once

#include "common.h"

namespace perfvl {

// target <- average of target and source, element by element; copy, where there is one, <- the new target.
struct MomentumPair {
  void* target;
  const void* source;
  void* copy;  // null: none
  int64_t count;
  Dtype target_dtype, source_dtype, copy_dtype;
};

// target <- m target + (1 - m) source. In float32, as a linear interpolation from the nearer end: exactly the source at
// m = 0 and exactly the target at m = 1, whatever the other holds.
struct MomentumWeights {
  double momentum;     // m
  const void* tensor;  // null, or where m is instead: one float or double, on the device of the targets
  bool tensor_is_double;
  // MoCo's expression instead, bit for bit: round_t(round_t(t * m) + round_s(s * (1 - m))), where round_t and round_s
  // round to the dtypes of target and source, and m and 1 - m are rounded to float32.
  bool convex;
};

}  // namespace perfvl
