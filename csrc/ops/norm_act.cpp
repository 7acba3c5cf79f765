// Batch norm with an activation, and its gradients.
#include <algorithm>
#include <optional>
#include <tuple>

#include "norm_act_tensors.h"
#include "ops/host.h"

namespace perfvl {
namespace {

std::tuple<Tensor, Tensor, Tensor> norm_act(const Tensor& input, std::optional<Tensor> weight,
                                            std::optional<Tensor> bias, std::optional<Tensor> running_mean,
                                            std::optional<Tensor> running_var, bool training, double momentum,
                                            double eps, int64_t activation, double parameter, bool after) {
  bool channels_last = is_channels_last(input);
  Tensor from = without_gaps(input, channels_last);
  NormAct problem = norm_act_arguments(from, weight, bias, training, eps, activation, parameter, after, channels_last);
  problem.momentum = momentum;
  Tensor output = empty_image(channels_last, input.scalar_type(), input.size(0), input.size(1), input.size(2),
                              input.size(3), aoti_torch_device_type_cpu(), 0);
  Tensor mean = empty_float({problem.channels}), variance = empty_float({problem.channels});
  problem.output = output.mutable_data_ptr();
  problem.mean = static_cast<float*>(mean.mutable_data_ptr());
  problem.variance = static_cast<float*>(variance.mutable_data_ptr());
  problem.running_mean = running_of(running_mean, problem.channels);
  problem.running_var = running_of(running_var, problem.channels);
  if (!training) {
    STD_TORCH_CHECK(running_mean && running_var, "perfvl: norm_act: running statistics expected");
    std::copy_n(problem.running_mean, problem.channels, problem.mean);
    std::copy_n(problem.running_var, problem.channels, problem.variance);
  }
  const NormActKernel& kernel = *current_level()->norm_act;
  Tensor scratch = kept_scratch_of(kernel.scratch_bytes(problem));
  kernel.forward(problem, scratch.mutable_data_ptr(), host());
  return {output, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> norm_act_backward(const Tensor& grad_output, const Tensor& input,
                                                     std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                     const Tensor& mean, const Tensor& variance, bool training,
                                                     double eps, int64_t activation, double parameter, bool after,
                                                     bool need_input, bool need_affine) {
  bool channels_last = is_channels_last(input);
  Tensor from = without_gaps(input, channels_last), upstream = without_gaps(grad_output, channels_last);
  NormActBackward problem{};
  problem.forward = norm_act_arguments(from, weight, bias, training, eps, activation, parameter, after, channels_last);
  int64_t channels = problem.forward.channels;
  problem.forward.mean = running_of(mean, channels), problem.forward.variance = running_of(variance, channels);
  problem.grad_output = upstream.const_data_ptr();
  Tensor grad_input = empty_image(channels_last, input.scalar_type(), need_input ? input.size(0) : 0, input.size(1),
                                  input.size(2), input.size(3), aoti_torch_device_type_cpu(), 0);
  Tensor grad_weight = empty_float({need_affine ? channels : 0}), grad_bias = empty_float({need_affine ? channels : 0});
  if (need_input) problem.grad_input = grad_input.mutable_data_ptr();
  if (need_affine) {
    problem.grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
    problem.grad_bias = static_cast<float*>(grad_bias.mutable_data_ptr());
  }
  const NormActKernel& kernel = *current_level()->norm_act;
  Tensor scratch = kept_scratch_of(kernel.backward_scratch_bytes(problem));
  kernel.backward(problem, scratch.mutable_data_ptr(), host());
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
}

}  // namespace perfvl
