// The tensors of norm_act as its kernels see them. perfvl/ops/norm_act.py has checked shapes and dtypes.
#pragma once

#include <algorithm>

#include "activation_tensors.h"
#include "norm_act.h"

namespace perfvl {

// Of an input without gaps. Weight and bias are float32 [C].
inline NormAct norm_act_arguments(const Tensor& input, const std::optional<Tensor>& weight,
                                  const std::optional<Tensor>& bias, bool training, double eps, int64_t activation,
                                  double parameter, bool after, bool channels_last) {
  STD_TORCH_CHECK(input.dim() == 4 && input.numel() > 0, "perfvl: norm_act: an image that is not empty expected");
  NormAct a{};
  int64_t pixels = input.size(2) * input.size(3);
  a.input = input.const_data_ptr(), a.dtype = dtype_of(input.scalar_type());
  a.outer = input.size(0) * (channels_last ? pixels : 1), a.channels = input.size(1);
  a.inner = channels_last ? 1 : pixels;
  a.activation = NormActivation(activation), a.parameter = float(parameter);
  a.after = after, a.training = training, a.eps = eps;
  for (const std::optional<Tensor>* t : {&weight, &bias})
    STD_TORCH_CHECK(!*t || (*t)->numel() == a.channels, "perfvl: norm_act: parameters of every channel expected");
  a.weight = floats_of(weight), a.bias = floats_of(bias);
  return a;
}

// A running statistic that the kernel may write to.
inline float* running_of(const std::optional<Tensor>& t, int64_t channels) {
  STD_TORCH_CHECK(!t || t->numel() == channels, "perfvl: norm_act: statistics of every channel expected");
  return const_cast<float*>(floats_of(t));
}

}  // namespace perfvl
