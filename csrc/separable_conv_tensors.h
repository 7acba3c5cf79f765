// Tensors as the separable_conv kernels see them, and results to write to. For the files that know torch.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "separable_conv.h"
#include "tensor.h"

namespace perfvl {

inline Image image(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()),
          t.stride(0),
          t.stride(1),
          t.stride(2),
          t.stride(3),
          dtype_of(t.scalar_type())};
}
inline Image image(const std::optional<Tensor>& t) { return t ? image(*t) : Image{}; }

// perfvl.ops.separable_conv.is_channels_last.
inline bool is_channels_last(const Tensor& x) { return x.size(1) > 1 && x.stride(1) == 1; }

// Uninitialised and dense, channels_last where `beside` is; elements of its dtype, on its device.
inline Tensor empty_image(const Tensor& beside, int64_t n, int64_t c, int64_t h, int64_t w, int32_t device_type,
                          int32_t device) {
  int64_t sizes[] = {n, c, h, w};
  int64_t last[] = {h * w * c, 1, w * c, c}, first[] = {c * h * w, h * w, w, 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, is_channels_last(beside) ? last : first,
                                                         shim_dtype(dtype_of(beside.scalar_type())), device_type,
                                                         device, &handle));
  return Tensor(handle);
}

inline Side side(const Tensor& input, const Tensor& weight, int64_t axis, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  Side s{input.size(2 + axis), 0, weight.size(2 + axis), stride[axis], dilation[axis], padding[2 * axis]};
  s.out = (s.in + padding[2 * axis] + padding[2 * axis + 1] - s.reach() - 1) / s.stride + 1;
  return s;
}

inline const float* floats_of(const std::optional<Tensor>& t) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && (t->numel() < 2 || t->stride(0) == 1),
                  "perfvl: dense float32 scales and shifts expected");
  return static_cast<const float*>(t->const_data_ptr());
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
