// Depthwise and pointwise convolution in one pass, and its gradients.
#include <optional>
#include <vector>

#include "ops/host.h"
#include "separable_conv_tensors.h"

namespace perfvl {
namespace {

SeparableConvOutputs separable_conv(const Tensor& input, std::optional<Tensor> scale, std::optional<Tensor> shift,
                                    const Tensor& depthwise_weight, std::optional<Tensor> mid_scale,
                                    std::optional<Tensor> mid_shift, const Tensor& pointwise_weight,
                                    std::optional<Tensor> output_scale, std::optional<Tensor> output_shift,
                                    std::optional<Tensor> residual, std::vector<int64_t> stride,
                                    std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t pre_activation,
                                    int64_t mid_activation, int64_t activation, bool statistics) {
  SeparableConv conv = separable_conv_arguments(input, scale, shift, depthwise_weight, pointwise_weight, stride,
                                                padding, dilation, pre_activation);
  conv.mid_scale = floats_of(mid_scale), conv.mid_shift = floats_of(mid_shift);
  conv.output_scale = floats_of(output_scale), conv.output_shift = floats_of(output_shift);
  conv.residual = image(residual);
  conv.mid = Activation(mid_activation), conv.post = Activation(activation);
  Tensor output = empty_image(input, conv.batch, conv.outputs, conv.h.out, conv.w.out, aoti_torch_device_type_cpu(), 0);
  conv.output = image(output);
  Tensor mean = empty_float({statistics ? conv.outputs : 0}), variance = empty_float({statistics ? conv.outputs : 0});
  if (statistics) {
    conv.mean = static_cast<float*>(mean.mutable_data_ptr());
    conv.variance = static_cast<float*>(variance.mutable_data_ptr());
  }
  const SeparableConvKernel& kernel = *current_level()->separable_conv;
  Host services = host();
  Tensor scratch = kept_scratch_of(kernel.scratch_bytes(conv, services));
  kernel.run(conv, scratch.mutable_data_ptr(), services);
  return {output, mean, variance};
}

SeparableConvGradients separable_conv_backward(const Tensor& grad_output, std::optional<Tensor> output,
                                               std::optional<Tensor> slope, std::optional<Tensor> offset,
                                               const Tensor& input, std::optional<Tensor> scale,
                                               std::optional<Tensor> shift, const Tensor& depthwise_weight,
                                               const Tensor& pointwise_weight, std::vector<int64_t> stride,
                                               std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                               int64_t pre_activation, bool need_input, bool need_affine,
                                               bool need_depthwise, bool need_pointwise, bool need_bias) {
  SeparableConvBackward b{};
  SeparableConv& conv = b.forward;
  conv = separable_conv_arguments(input, scale, shift, depthwise_weight, pointwise_weight, stride, padding, dilation,
                                  pre_activation);
  conv.output = image(output);
  b.grad_output = image(grad_output);
  b.slope = floats_of(slope), b.offset = floats_of(offset);
  int32_t dtype = shim_dtype(dtype_of(input.scalar_type()));
  auto dense_weights = [&](bool needed, const Tensor& weight) {
    return empty_dense(needed ? sizes_of(weight) : std::vector<int64_t>{0}, dtype);
  };
  Tensor grad_input =
      need_input ? empty_image(input, conv.batch, conv.channels, conv.h.in, conv.w.in, aoti_torch_device_type_cpu(), 0)
                 : empty_dense({0}, dtype);
  Tensor grad_scale = empty_float({need_affine ? conv.channels : 0});
  Tensor grad_shift = empty_float({need_affine ? conv.channels : 0});
  Tensor grad_depthwise = dense_weights(need_depthwise, depthwise_weight);
  Tensor grad_pointwise = dense_weights(need_pointwise, pointwise_weight);
  Tensor grad_bias = empty_float({need_bias ? conv.outputs : 0});
  if (need_input) b.grad_input = image(grad_input);
  if (need_affine) {
    b.grad_scale = static_cast<float*>(grad_scale.mutable_data_ptr());
    b.grad_shift = static_cast<float*>(grad_shift.mutable_data_ptr());
  }
  if (need_depthwise) b.grad_depthwise = image(grad_depthwise);
  if (need_pointwise) b.grad_pointwise = image(grad_pointwise);
  if (need_bias) b.grad_bias = static_cast<float*>(grad_bias.mutable_data_ptr());
  const SeparableConvKernel& kernel = *current_level()->separable_conv;
  Host services = host();
  Tensor scratch = kept_scratch_of(kernel.backward_scratch_bytes(b, services));
  kernel.backward(b, scratch.mutable_data_ptr(), services);
  return {grad_input, grad_scale, grad_shift, grad_depthwise, grad_pointwise, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CPU, m) {
  m.impl("separable_conv", TORCH_BOX(&separable_conv));
  m.impl("separable_conv_backward", TORCH_BOX(&separable_conv_backward));
}

}  // namespace perfvl
