// The CPU kernels of the separable_conv ops: see ../separable_conv.h. `scratch` is 64-byte aligned.
#pragma once

#include "../separable_conv.h"

namespace perfvl {

struct SeparableConvKernel {
  int64_t (*scratch_bytes)(const SeparableConv& conv, const Host& host);
  void (*run)(const SeparableConv& conv, void* scratch, const Host& host);
  int64_t (*backward_scratch_bytes)(const SeparableConvBackward& backward, const Host& host);
  void (*backward)(const SeparableConvBackward& backward, void* scratch, const Host& host);
};

}  // namespace perfvl
