// What the upsample_conv ops compute on: checked sizes and raw pointers. The same on every device; knows no torch.
#pragma once

#include "image.h"

namespace perfvl {

// output[N, O, 2H, 2W] = act(conv3x3(nearest x2 of input) * scale + shift), zeros around. Null scale and shift: 1 and
// 0.
struct UpsampleConv {
  Image input;
  int64_t batch, channels, outputs, height, width;  // of the input
  Image weight;                                     // [O, C, 3, 3]
  const float *scale, *shift;
  Activation activation;
  Image output;
};

// Gradients of the convolution alone. Null results are not wanted.
struct UpsampleConvBackward {
  UpsampleConv forward;
  Image grad_output;
  Image grad_input;
  Image grad_weight;  // dense
  float* grad_bias;
};

}  // namespace perfvl
