// Nearest x2 and a 3x3 convolution, and its gradients.
#include <optional>
#include <tuple>
#include <vector>

#include "image_tensors.h"
#include "ops/host.h"

namespace perfvl {
namespace {

UpsampleConv upsample_conv_arguments(const Tensor& input, const Tensor& weight) {
  UpsampleConv conv{};
  conv.input = image(input), conv.weight = image(weight);
  conv.batch = input.size(0), conv.channels = input.size(1), conv.outputs = weight.size(0);
  conv.height = input.size(2), conv.width = input.size(3);
  return conv;
}

Tensor upsample_conv(const Tensor& input, const Tensor& weight, std::optional<Tensor> scale,
                     std::optional<Tensor> shift, int64_t activation) {
  UpsampleConv conv = upsample_conv_arguments(input, weight);
  conv.scale = floats_of(scale), conv.shift = floats_of(shift), conv.activation = Activation(activation);
  Tensor output =
      empty_image(input, conv.batch, conv.outputs, 2 * conv.height, 2 * conv.width, aoti_torch_device_type_cpu(), 0);
  conv.output = image(output);
  const UpsampleConvKernel& kernel = *current_level()->upsample_conv;
  Host services = host();
  Tensor scratch = kept_scratch_of(kernel.scratch_bytes(conv, services));
  kernel.run(conv, scratch.mutable_data_ptr(), services);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> upsample_conv_backward(const Tensor& grad_output, const Tensor& input,
                                                          const Tensor& weight, bool need_input, bool need_weight,
                                                          bool need_bias) {
  UpsampleConvBackward b{};
  b.forward = upsample_conv_arguments(input, weight);
  const UpsampleConv& conv = b.forward;
  b.grad_output = image(grad_output);
  int32_t dtype = shim_dtype(dtype_of(input.scalar_type()));
  Tensor grad_input = need_input ? empty_image(input, conv.batch, conv.channels, conv.height, conv.width,
                                               aoti_torch_device_type_cpu(), 0)
                                 : empty_dense({0}, dtype);
  Tensor grad_weight = empty_dense(need_weight ? sizes_of(weight) : std::vector<int64_t>{0}, dtype);
  Tensor grad_bias = empty_float({need_bias ? conv.outputs : 0});
  if (need_input) b.grad_input = image(grad_input);
  if (need_weight) b.grad_weight = image(grad_weight);
  if (need_bias) b.grad_bias = static_cast<float*>(grad_bias.mutable_data_ptr());
  const UpsampleConvKernel& kernel = *current_level()->upsample_conv;
  Host services = host();
  Tensor scratch = kept_scratch_of(kernel.backward_scratch_bytes(b, services));
  kernel.backward(b, scratch.mutable_data_ptr(), services);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CPU, m) {
  m.impl("upsample_conv", TORCH_BOX(&upsample_conv));
  m.impl("upsample_conv_backward", TORCH_BOX(&upsample_conv_backward));
}

}  // namespace perfvl
