// Images as the kernels see them, and what may be done to their values. The same on every device; knows no torch.
#pragma once

#include "common.h"

namespace perfvl {

// In the order of perfvl/reference/activation.py.
enum class Activation : int32_t { none, relu, relu6, silu, hardswish, leaky_relu };

// A tensor [N, C, H, W] of any strides, in elements. `data` is null where there is none.
struct Image {
  void* data;
  int64_t n_stride, c_stride, h_stride, w_stride;
  Dtype dtype;
};

}  // namespace perfvl
