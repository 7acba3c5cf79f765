// The CPU kernels of the color_transform ops: see ../color_transform.h. `scratch` is 64-byte aligned.
#pragma once

#include "../color_transform.h"

namespace perfvl {

struct ColorTransformKernel {
  void (*run)(const ColorTransform& transform, const Host& host);
  int64_t (*backward_scratch_bytes)(const ColorTransformBackward& backward);
  void (*backward)(const ColorTransformBackward& backward, void* scratch, const Host& host);
};

}  // namespace perfvl
