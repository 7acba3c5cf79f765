// The tensors of color_transform as its kernels see them. perfvl/ops/color_transform.py has checked shapes and dtypes.
#pragma once

#include <optional>
#include <tuple>

#include "color_transform.h"
#include "image_tensors.h"

namespace perfvl {

// Of a 1x1 convolution.
inline Matrix pointwise_weight(const Tensor& t) {
  return {t.const_data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1), dtype_of(t.scalar_type())};
}
inline Matrix row_of(const std::optional<Tensor>& t) {
  if (!t) return {};
  return {t->const_data_ptr(), 1, t->size(0), 0, t->stride(0), dtype_of(t->scalar_type())};
}

inline ColorTransform color_transform_arguments(const Tensor& pixels, const Tensor& weight1,
                                                const std::optional<Tensor>& bias1, const Tensor& weight2,
                                                const std::optional<Tensor>& bias2, const std::optional<Tensor>& mean,
                                                double scale, double negative_slope, bool residual) {
  ColorTransform t{};
  t.bytes = pixels.scalar_type() == ScalarType::Byte;
  t.image = {const_cast<void*>(pixels.const_data_ptr()),
             pixels.stride(0),
             pixels.stride(1),
             pixels.stride(2),
             pixels.stride(3),
             t.bytes ? Dtype::float32 : dtype_of(pixels.scalar_type())};
  t.batch = pixels.size(0), t.channels = pixels.size(1), t.height = pixels.size(2), t.width = pixels.size(3);
  t.weight1 = pointwise_weight(weight1), t.weight2 = pointwise_weight(weight2);
  t.bias1 = row_of(bias1), t.bias2 = row_of(bias2), t.mean = row_of(mean);
  t.hidden = weight1.size(0), t.outputs = weight2.size(0);
  t.scale = float(scale), t.negative_slope = float(negative_slope), t.residual = residual;
  STD_TORCH_CHECK(t.channels <= kMostColors && t.hidden <= kMostColors && t.outputs <= kMostColors &&
                      weight1.size(1) == t.channels && weight2.size(1) == t.hidden && negative_slope >= 0,
                  "perfvl: color_transform: weights [M, C, 1, 1] and [O, M, 1, 1] of at most 16 each expected");
  return t;
}

// Gradients of the image and of the four parameters.
using ColorTransformGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace perfvl
