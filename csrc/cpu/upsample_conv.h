// The CPU kernels of the upsample_conv ops: see ../upsample_conv.h. `scratch` is 64-byte aligned.
#pragma once

#include "../upsample_conv.h"

namespace perfvl {

struct UpsampleConvKernel {
  int64_t (*scratch_bytes)(const UpsampleConv& conv, const Host& host);
  void (*run)(const UpsampleConv& conv, void* scratch, const Host& host);
  int64_t (*backward_scratch_bytes)(const UpsampleConvBackward& backward, const Host& host);
  void (*backward)(const UpsampleConvBackward& backward, void* scratch, const Host& host);
};

}  // namespace perfvl
