// What the separable_conv ops compute on: checked sizes and raw pointers. The same on every device; knows no torch.
#pragma once

#include "image.h"

namespace perfvl {

struct Side {                                                // a direction of the geometry: height or width
  int64_t in, out, kernel, stride, dilation, pad;            // `pad` before the first pixel
  int64_t reach() const { return (kernel - 1) * dilation; }  // of a kernel, beyond its first tap
};

// u = depthwise(pre(input * scale + shift)); v = mid(u * mid_scale + mid_shift);
// output = act(pointwise v * output_scale + output_shift) + residual. Null scales and shifts are 1 and 0.
struct SeparableConv {
  Image input;
  int64_t batch, channels, multiplier, outputs;
  Side h, w;
  const float *scale, *shift;
  Image depthwise;  // [C m, 1, kh, kw]
  const float *mid_scale, *mid_shift;
  Image pointwise;  // [O, C m, 1, 1]
  const float *output_scale, *output_shift;
  Image residual;
  Activation pre, mid, post;
  Image output;
  float *mean, *variance;  // [O] of the output as stored, or null

  int64_t inner() const { return channels * multiplier; }
  int64_t pixels() const { return batch * h.out * w.out; }
};

// Gradients for the gradient of the output, grad_output + slope * output + offset (the last two as a batch norm's
// statistics ask for; null: grad_output alone). Null results are not wanted. Nothing stands between the convolutions.
struct SeparableConvBackward {
  SeparableConv forward;  // `output` is read where slope is given
  Image grad_output;
  const float *slope, *offset;
  Image grad_input;
  float *grad_scale, *grad_shift;        // both or neither
  Image grad_depthwise, grad_pointwise;  // dense
  float* grad_bias;
};

}  // namespace perfvl
