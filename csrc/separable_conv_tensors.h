// Tensors as the separable_conv kernels see them, and results to write to. For the files that know torch.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "image_tensors.h"
#include "separable_conv.h"

namespace perfvl {

inline Side side(const Tensor& input, const Tensor& weight, int64_t axis, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  Side s{input.size(2 + axis), 0, weight.size(2 + axis), stride[axis], dilation[axis], padding[2 * axis]};
  s.out = (s.in + padding[2 * axis] + padding[2 * axis + 1] - s.reach() - 1) / s.stride + 1;
  return s;
}

// Sizes and operands; what is computed, and what else goes in, is left empty.
inline SeparableConv separable_conv_arguments(const Tensor& input, const std::optional<Tensor>& scale,
                                              const std::optional<Tensor>& shift, const Tensor& depthwise_weight,
                                              const Tensor& pointwise_weight, const std::vector<int64_t>& stride,
                                              const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                              int64_t pre_activation) {
  SeparableConv conv{};
  conv.input = image(input), conv.depthwise = image(depthwise_weight), conv.pointwise = image(pointwise_weight);
  conv.batch = input.size(0), conv.channels = input.size(1);
  conv.multiplier = depthwise_weight.size(0) / conv.channels, conv.outputs = pointwise_weight.size(0);
  conv.h = side(input, depthwise_weight, 0, stride, padding, dilation);
  conv.w = side(input, depthwise_weight, 1, stride, padding, dilation);
  conv.scale = floats_of(scale), conv.shift = floats_of(shift);
  conv.pre = Activation(pre_activation);
  return conv;
}

using SeparableConvOutputs = std::tuple<Tensor, Tensor, Tensor>;
using SeparableConvGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace perfvl
