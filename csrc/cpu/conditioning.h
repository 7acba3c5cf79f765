// The CPU kernels of the conditioning ops: see ../conditioning.h. `scratch` is 64-byte aligned. There is at least one
// channel and one pixel; a batch may be empty.
#pragma once

#include "../conditioning.h"

namespace perfvl {

struct ConditioningKernel {
  int64_t (*taps_scratch_bytes)(const ConditionTaps& problem);
  void (*condition_taps)(const ConditionTaps& problem, void* scratch, const Host& host);
  void (*add_taps)(const AddTaps& problem, const Host& host);
  void (*tap_sums)(const TapSums& problem, const Host& host);
  void (*augment)(const Augmentation& problem);
  void (*augment_backward)(const AugmentationBackward& problem);
};

}  // namespace perfvl
