// Two 1x1 convolutions over pixels, and their gradients.
#include <optional>
#include <vector>

#include "color_transform_tensors.h"
#include "ops/host.h"

namespace perfvl {
namespace {

Tensor color_transform(const Tensor& pixels, const Tensor& weight1, std::optional<Tensor> bias1, const Tensor& weight2,
                       std::optional<Tensor> bias2, std::optional<Tensor> mean, double scale, double negative_slope,
                       bool residual) {
  ColorTransform transform =
      color_transform_arguments(pixels, weight1, bias1, weight2, bias2, mean, scale, negative_slope, residual);
  Tensor output = empty_image(is_channels_last(pixels), weight1.scalar_type(), transform.batch, transform.outputs,
                              transform.height, transform.width, aoti_torch_device_type_cpu(), 0);
  transform.output = image(output);
  current_level()->color_transform->run(transform, host());
  return output;
}

ColorTransformGradients color_transform_backward(const Tensor& grad_output, const Tensor& pixels, const Tensor& weight1,
                                                 std::optional<Tensor> bias1, const Tensor& weight2,
                                                 std::optional<Tensor> bias2, std::optional<Tensor> mean, double scale,
                                                 double negative_slope, bool residual, bool need_image,
                                                 bool need_weights) {
  ColorTransformBackward b{};
  b.forward = color_transform_arguments(pixels, weight1, bias1, weight2, bias2, mean, scale, negative_slope, residual);
  const ColorTransform& t = b.forward;
  b.grad_output = image(grad_output);
  Tensor grad_image = need_image ? empty_image(is_channels_last(pixels), pixels.scalar_type(), t.batch, t.channels,
                                               t.height, t.width, aoti_torch_device_type_cpu(), 0)
                                 : empty_dense({0}, t.bytes ? aoti_torch_dtype_uint8() : shim_dtype(t.image.dtype));
  auto floats = [&](bool given, const std::vector<int64_t>& sizes) {
    return empty_float(given && need_weights ? sizes : std::vector<int64_t>{0});
  };
  Tensor grad_weight1 = floats(true, {t.hidden, t.channels, 1, 1}), grad_bias1 = floats(bool(bias1), {t.hidden});
  Tensor grad_weight2 = floats(true, {t.outputs, t.hidden, 1, 1}), grad_bias2 = floats(bool(bias2), {t.outputs});
  if (need_image) b.grad_image = image(grad_image);
  if (need_weights) {
    b.grad_weight1 = static_cast<float*>(grad_weight1.mutable_data_ptr());
    b.grad_weight2 = static_cast<float*>(grad_weight2.mutable_data_ptr());
    if (bias1) b.grad_bias1 = static_cast<float*>(grad_bias1.mutable_data_ptr());
    if (bias2) b.grad_bias2 = static_cast<float*>(grad_bias2.mutable_data_ptr());
  }
  const ColorTransformKernel& kernel = *current_level()->color_transform;
  Tensor scratch = kept_scratch_of(kernel.backward_scratch_bytes(b));
  kernel.backward(b, scratch.mutable_data_ptr(), host());
  return {grad_image, grad_weight1, grad_bias1, grad_weight2, grad_bias2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CPU, m) {
  m.impl("color_transform", TORCH_BOX(&color_transform));
  m.impl("color_transform_backward", TORCH_BOX(&color_transform_backward));
}

}  // namespace perfvl
