// Convolutions over a condition that is the same at every pixel, and the augmentation of conditions.
#include <optional>

#include "conditioning_tensors.h"
#include "ops/host.h"

namespace perfvl {
namespace {

Tensor condition_taps(const Tensor& condition, const Tensor& weight) {
  Tensor taps = empty_taps(condition.size(0), weight.size(0), aoti_torch_device_type_cpu(), 0);
  ConditionTaps problem{matrix(condition), image(weight), weight.size(0), static_cast<float*>(taps.mutable_data_ptr())};
  const ConditioningKernel& kernel = *current_level()->conditioning;
  Tensor scratch = scratch_of(kernel.taps_scratch_bytes(problem));
  kernel.condition_taps(problem, scratch.mutable_data_ptr(), host());
  return taps;
}

Tensor add_taps(const Tensor& x, const Tensor& taps) {
  Tensor output = empty_image(x, x.size(0), x.size(1), x.size(2), x.size(3), aoti_torch_device_type_cpu(), 0);
  current_level()->conditioning->add_taps(add_taps_arguments(x, taps, output), host());
  return output;
}

Tensor tap_sums(const Tensor& grad) {
  Tensor sums = empty_taps(grad.size(0), grad.size(1), aoti_torch_device_type_cpu(), 0);
  current_level()->conditioning->tap_sums(tap_sums_arguments(grad, sums), host());
  return sums;
}

AugmentationOutputs conditioning_augmentation(const Tensor& projected, const Tensor& eps, int64_t activation) {
  Augmentation problem{};
  auto outputs = augmentation_arguments(projected, eps, activation, aoti_torch_device_type_cpu(), 0, problem);
  current_level()->conditioning->augment(problem);
  return outputs;
}

Tensor conditioning_augmentation_backward(std::optional<Tensor> grad_condition, std::optional<Tensor> grad_mu,
                                          std::optional<Tensor> grad_logvar, std::optional<Tensor> grad_kl,
                                          const Tensor& mu, const Tensor& logvar, const Tensor& eps,
                                          std::optional<Tensor> projected, int64_t activation) {
  AugmentationBackward problem{};
  Tensor grad = augmentation_backward_arguments(grad_condition, grad_mu, grad_logvar, grad_kl, mu, logvar, eps,
                                                projected, activation, aoti_torch_device_type_cpu(), 0, problem);
  current_level()->conditioning->augment_backward(problem);
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CPU, m) {
  m.impl("condition_taps", TORCH_BOX(&condition_taps));
  m.impl("add_taps", TORCH_BOX(&add_taps));
  m.impl("tap_sums", TORCH_BOX(&tap_sums));
  m.impl("conditioning_augmentation", TORCH_BOX(&conditioning_augmentation));
  m.impl("conditioning_augmentation_backward", TORCH_BOX(&conditioning_augmentation_backward));
}

}  // namespace perfvl
