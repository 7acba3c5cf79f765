// The kernels of small_loss_mask and of the two-network losses of one ISA level.
#pragma once

#include "../small_loss.h"

namespace perfvl {

struct SmallLossKernel {
  int64_t (*mask_scratch_bytes)(const SmallLossMask&);
  void (*mask)(const SmallLossMask&, void* scratch, const Host&);
  int64_t (*twin_scratch_bytes)(const TwinLoss&, const Host&);
  // Returns false, and has then written nothing but scratch and outputs, where a label is not in [0, classes).
  bool (*twin)(const TwinLoss&, void* scratch, const Host&);
  int64_t (*backward_scratch_bytes)(const TwinLossBackward&, const Host&);
  void (*backward)(const TwinLossBackward&, void* scratch, const Host&);
};

}  // namespace perfvl
