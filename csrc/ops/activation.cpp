// Maxout and APL, and their gradients.
#include <tuple>

#include "activation_tensors.h"
#include "ops/host.h"

namespace perfvl {
namespace {

std::tuple<Tensor, Tensor> maxout(const Tensor& input, int64_t pieces, bool with_winner) {
  bool channels_last = is_channels_last(input);
  Tensor from = without_gaps(input, channels_last);
  Maxout problem = maxout_sizes(input, pieces ? input.size(1) / pieces : 0, pieces, channels_last);
  Tensor output = empty_image(channels_last, input.scalar_type(), input.size(0), input.size(1) / pieces, input.size(2),
                              input.size(3), aoti_torch_device_type_cpu(), 0);
  Tensor winner = with_winner ? empty_bytes(output) : empty_dense({0}, aoti_torch_dtype_uint8());
  problem.input = from.const_data_ptr(), problem.dtype = dtype_of(input.scalar_type());
  problem.output = output.mutable_data_ptr();
  if (with_winner) problem.winner = static_cast<uint8_t*>(winner.mutable_data_ptr());
  current_level()->activation->maxout(problem, host());
  return {output, winner};
}

Tensor maxout_backward(const Tensor& grad_output, const Tensor& winner, int64_t pieces) {
  bool channels_last = is_channels_last(winner);
  Tensor upstream = without_gaps(grad_output, channels_last), bytes = without_gaps(winner, channels_last);
  Maxout sizes = maxout_sizes(winner, winner.size(1), pieces, channels_last);
  Tensor grad_input = empty_image(channels_last, grad_output.scalar_type(), winner.size(0), pieces * winner.size(1),
                                  winner.size(2), winner.size(3), aoti_torch_device_type_cpu(), 0);
  MaxoutBackward problem{upstream.const_data_ptr(),
                         static_cast<const uint8_t*>(bytes.const_data_ptr()),
                         sizes.rows,
                         sizes.pieces,
                         sizes.columns,
                         dtype_of(grad_output.scalar_type()),
                         grad_input.mutable_data_ptr()};
  current_level()->activation->maxout_backward(problem, host());
  return grad_input;
}

Tensor apl(const Tensor& input, const Tensor& slope, const Tensor& hinge) {
  bool channels_last = is_channels_last(input);
  Tensor from = without_gaps(input, channels_last);
  Tensor slopes = without_gaps(slope, channels_last), hinges = without_gaps(hinge, channels_last);
  Apl problem = apl_arguments(from, slopes, hinges, channels_last);
  Tensor output = empty_image(channels_last, input.scalar_type(), input.size(0), input.size(1), input.size(2),
                              input.size(3), aoti_torch_device_type_cpu(), 0);
  problem.output = output.mutable_data_ptr();
  current_level()->activation->apl(problem, host());
  return output;
}

std::tuple<Tensor, Tensor, Tensor> apl_backward(const Tensor& grad_output, const Tensor& input, const Tensor& slope,
                                                const Tensor& hinge) {
  bool channels_last = is_channels_last(input);
  Tensor from = without_gaps(input, channels_last), upstream = without_gaps(grad_output, channels_last);
  Tensor slopes = without_gaps(slope, channels_last), hinges = without_gaps(hinge, channels_last);
  auto beside = [&](const Tensor& t) {
    return empty_image(channels_last, t.scalar_type(), t.size(0), t.size(1), t.size(2), t.size(3),
                       aoti_torch_device_type_cpu(), 0);
  };
  Tensor grad_input = beside(input), grad_slope = beside(slope), grad_hinge = beside(hinge);
  AplBackward problem{apl_arguments(from, slopes, hinges, channels_last), upstream.const_data_ptr(),
                      grad_input.mutable_data_ptr(), static_cast<float*>(grad_slope.mutable_data_ptr()),
                      static_cast<float*>(grad_hinge.mutable_data_ptr())};
  const ActivationKernel& kernel = *current_level()->activation;
  Tensor scratch = kept_scratch_of(kernel.apl_backward_scratch_bytes(problem));
  kernel.apl_backward(problem, scratch.mutable_data_ptr(), host());
  return {grad_input, grad_slope, grad_hinge};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CPU, m) {
  m.impl("maxout", TORCH_BOX(&maxout));
  m.impl("maxout_backward", TORCH_BOX(&maxout_backward));
  m.impl("apl", TORCH_BOX(&apl));
  m.impl("apl_backward", TORCH_BOX(&apl_backward));
}

}  // namespace perfvl
