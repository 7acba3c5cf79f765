// The mask of small losses; the losses of two networks and their gradients.
#include <optional>
#include <tuple>

#include "ops/host.h"
#include "small_loss_tensors.h"

namespace perfvl {
namespace {

Tensor small_loss_mask(const Tensor& losses, double keep_rate, std::optional<Tensor> keep_rates,
                       std::optional<Tensor> candidates) {
  Tensor mask = empty_dense(sizes_of(losses), aoti_torch_dtype_bool());
  SmallLossMask arguments = mask_arguments(losses, keep_rate, keep_rates, candidates, mask);
  const SmallLossKernel& kernel = *current_level()->small_loss;
  Tensor scratch = scratch_of(kernel.mask_scratch_bytes(arguments));
  kernel.mask(arguments, scratch.mutable_data_ptr(), host());
  return mask;
}

TwinOutputs twin_loss(const Tensor& logits1, const Tensor& logits2, const Tensor& labels, int64_t method, bool released,
                      double parameter, double forget_rate, std::optional<Tensor> forget_rates, int64_t step,
                      std::optional<Tensor> step_tensor, std::optional<Tensor> sample_ids) {
  TwinLoss w = twin_arguments(&logits1, &logits2, labels, method, released, parameter);
  set_choice(w, forget_rate, forget_rates, step, step_tensor, sample_ids);
  TwinOutputs outputs = twin_outputs(logits1, w, aoti_torch_device_type_cpu(), 0);
  const SmallLossKernel& kernel = *current_level()->small_loss;
  Host services = host();
  Tensor scratch = scratch_of(kernel.twin_scratch_bytes(w, services));
  STD_TORCH_CHECK(kernel.twin(w, scratch.mutable_data_ptr(), services), "twin_loss: a label is not a class");
  return outputs;
}

std::tuple<Tensor, Tensor> twin_loss_backward(std::optional<Tensor> upstream1, std::optional<Tensor> upstream2,
                                              std::optional<Tensor> logits1, std::optional<Tensor> logits2,
                                              const Tensor& labels, const Tensor& coefficients, const Tensor& stats,
                                              int64_t method, bool released, double parameter, bool need1, bool need2) {
  const Tensor *first = logits1 ? &*logits1 : nullptr, *second = logits2 ? &*logits2 : nullptr;
  TwinLossBackward b = twin_backward(twin_arguments(first, second, labels, method, released, parameter), coefficients,
                                     stats, upstream1, upstream2);
  const SmallLossKernel& kernel = *current_level()->small_loss;
  auto [grad1, grad2] = twin_gradients(first ? *first : *second, b, need1, need2, aoti_torch_device_type_cpu(), 0);
  Host services = host();
  Tensor scratch = scratch_of(kernel.backward_scratch_bytes(b, services));
  kernel.backward(b, scratch.mutable_data_ptr(), services);
  return {grad1, grad2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CPU, m) {
  m.impl("small_loss_mask", TORCH_BOX(&small_loss_mask));
  m.impl("twin_loss", TORCH_BOX(&twin_loss));
  m.impl("twin_loss_backward", TORCH_BOX(&twin_loss_backward));
}

}  // namespace perfvl
