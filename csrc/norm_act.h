// What the norm_act op computes on: sizes and raw pointers to dense memory. See perfvl/reference/norm_act.py.
#pragma once

#include "common.h"

namespace perfvl {

// In the order of perfvl/reference/norm_act.py.
enum class NormActivation : int32_t { identity, relu, leaky_relu, elu, tanh, sigmoid };

// output = act(n(input)), or n(act(input)) with `after`, for n(z) = (z - mean) / sqrt(variance + eps) * weight + bias.
struct NormAct {
  const void* input;  // [outer, channels, inner]: NCHW, or channels_last with inner = 1
  int64_t outer, channels, inner;
  Dtype dtype;
  NormActivation activation;
  float parameter;  // slope of leaky_relu, alpha of elu
  bool after, training;
  double eps, momentum;
  const float *weight, *bias;         // null, or [channels]
  float *mean, *variance;             // [channels], biased: written in training, else read
  float *running_mean, *running_var;  // null, or [channels]: moved by `momentum` in training
  void* output;                       // as the input; null in backward
};

struct NormActBackward {
  NormAct forward;
  const void* grad_output;
  void* grad_input;                // null where not needed
  float *grad_weight, *grad_bias;  // [channels], both or none
};

}  // namespace perfvl
