// What the color_transform ops compute on: checked sizes and raw pointers. Knows no torch.
#pragma once

#include "image.h"

namespace perfvl {

constexpr int64_t kMostColors = 16;  // channels, hidden units and outputs

// output = act(weight2 act(weight1 x + bias1) + bias2 (+ x)), x = scale * (image - mean): see
// perfvl/reference/color_transform.py.
struct ColorTransform {
  Image image;
  bool bytes;  // of the image: unsigned numbers of 8 bits, whatever its dtype says
  int64_t batch, height, width, channels, hidden, outputs;
  Matrix weight1, weight2;    // [hidden, channels], [outputs, hidden]
  Matrix bias1, bias2, mean;  // [1, n]; data is null where there is none
  float scale, negative_slope;
  bool residual;
  Image output;
};

// Null results are not wanted. Weights' gradients are dense and all wanted or none, but for those of absent biases.
struct ColorTransformBackward {
  ColorTransform forward;
  Image grad_output;
  Image grad_image;
  float *grad_weight1, *grad_bias1, *grad_weight2, *grad_bias2;
};

}  // namespace perfvl
