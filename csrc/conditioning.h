// What the conditioning ops compute on: checked sizes and raw pointers. The same on every device; knows no torch.
#pragma once

#include "image.h"

namespace perfvl {

// A 3x3 convolution, padded with a pixel of zeros, of a map that is the same everywhere: a number for each tap
// (ky, kx), output channel and sample, of which a pixel adds up those whose tap falls inside the image.
struct Taps {
  const float* data;  // [N, 9, O]
  int64_t n_stride, tap_stride, c_stride;
};

// taps[n, 3 ky + kx, o] = sum_e condition[n, e] weight[o, e, ky, kx]
struct ConditionTaps {
  Matrix condition;  // [N, E]
  Image weight;      // [O, E, 3, 3]
  int64_t outputs;
  float* taps;  // [N, 9, O], dense
};

// output[n, o, h, w] = image[n, o, h, w] + the taps that fall inside.
struct AddTaps {
  Image image;
  Taps taps;
  int64_t batch, channels, height, width;
  Image output;
};

// sums[n, 3 ky + kx, o] = sum of grad[n, o, h, w] over the pixels whose tap falls inside.
struct TapSums {
  Image grad;
  int64_t batch, channels, height, width;
  float* sums;  // [N, 9, O], dense
};

// In the order of perfvl/reference/conditioning.py.
enum class Projection : int32_t { none, relu, leaky_relu, glu };
constexpr float kLeakySlope = 0.2f;

// mu and logvar are the halves of activation(projected); condition = mu + eps exp(logvar / 2);
// kl = mean of (mu^2 + exp(logvar) - 1 - logvar) / 2.
struct Augmentation {
  Matrix projected;  // [N, 2 e], with GLU [N, 4 e]
  Matrix eps;        // [N, e]
  Projection activation;
  int64_t rows, dim;              // N, e
  void *condition, *mu, *logvar;  // [N, e], dense, of the dtype of `projected`
  float* kl;
};

// The gradient of `projected` for the gradients of the outputs, which are null where there are none.
struct AugmentationBackward {
  Matrix grad_condition, grad_mu, grad_logvar;  // [N, e]
  const float* grad_kl;
  Matrix mu, logvar, eps;  // [N, e]
  Matrix projected;        // with GLU
  Projection activation;
  int64_t rows, dim;
  void* grad_projected;  // dense, of the dtype of `mu`
};

}  // namespace perfvl
