// The CUDA side of perfvl's torch ops, on libtorch's stable ABI: tensors in, raw pointers and the stream to the
// launchers. Loaded only where torch has a GPU. Schemas and every check of arguments are Python (perfvl/ops).
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <optional>
#include <tuple>
#include <vector>

#include "conditioning_tensors.h"
#include "cuda/conditioning.h"
#include "cuda/gan_loss.h"
#include "cuda/key_queue.h"
#include "cuda/momentum_update.h"
#include "cuda/scale_rows.h"
#include "cuda/separable_conv.h"
#include "cuda/small_loss.h"
#include "cuda/upsample_conv.h"
#include "gan_loss_tensors.h"
#include "momentum_pairs.h"
#include "ring_write.h"
#include "separable_conv_tensors.h"
#include "small_loss_tensors.h"
#include "tensor.h"

namespace perfvl {
namespace {

void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

Tensor scale_rows(const Tensor& rows, const Tensor& scale, ScalarType dtype) {
  int32_t device = rows.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Matrix from = matrix(rows);
  Tensor out = empty_dense({from.rows, from.cols}, shim_dtype(dtype_of(dtype)), aoti_torch_device_type_cuda(), device);
  if (from.rows > 0 && from.cols > 0)  // CUDA refuses an empty grid
    STD_CUDA_CHECK(
        cudaError_t(cuda::scale_rows(from, static_cast<const float*>(scale.const_data_ptr()), scale.stride(0),
                                     dtype_of(dtype), out.mutable_data_ptr(), current_stream(device))));
  return out;
}

void momentum_update(const TensorList& targets, const TensorList& sources, double momentum,
                     std::optional<Tensor> momentum_tensor, const TensorList& copies, bool convex) {
  std::vector<MomentumPair> pairs = momentum_pairs(targets, sources, copies);
  if (pairs.empty()) return;
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(targets[0], &device));
  torch::stable::accelerator::DeviceGuard guard(device);
  MomentumWeights weights = momentum_weights(momentum, momentum_tensor, convex);
  STD_CUDA_CHECK(
      cudaError_t(cuda::momentum_update(pairs.data(), int64_t(pairs.size()), weights, current_stream(device))));
}

void enqueue(const Tensor& queue, const Tensor& cursor, const Tensor& keys, std::optional<Tensor> valid,
             std::optional<Tensor> mask, std::vector<Tensor> payload_queues, std::vector<Tensor> payloads,
             bool normalize, bool drop_tail) {
  std::vector<RingPayload> storage;
  RingWrite write =
      ring_write(queue, cursor, keys, valid, mask, payload_queues, payloads, normalize, drop_tail, storage);
  int32_t device = queue.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  STD_CUDA_CHECK(cudaError_t(cuda::key_queue(write, current_stream(device))));
}

GanLossOutputs gan_loss(const TensorList& logits, std::vector<double> targets, std::vector<double> weights, bool exact,
                        bool with_grad) {
  STD_TORCH_CHECK(logits.size() > 0, "gan_loss: no head");
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(logits[0], &device));
  torch::stable::accelerator::DeviceGuard guard(device);
  GanLoss loss{};
  GanLossOutputs outputs =
      gan_loss_arguments(logits, targets, weights, exact, with_grad, aoti_torch_device_type_cuda(), device, loss);
  STD_CUDA_CHECK(cudaError_t(cuda::gan_loss(loss, current_stream(device))));
  return outputs;
}

Tensor scratch_of(int64_t bytes, int32_t device) {
  return empty_dense({bytes}, aoti_torch_dtype_uint8(), aoti_torch_device_type_cuda(), device);
}

Tensor small_loss_mask(const Tensor& losses, double keep_rate, std::optional<Tensor> keep_rates,
                       std::optional<Tensor> candidates) {
  int32_t device = losses.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Tensor mask = empty_dense(sizes_of(losses), aoti_torch_dtype_bool(), aoti_torch_device_type_cuda(), device);
  if (losses.numel() == 0) return mask;  // CUDA refuses an empty grid
  SmallLossMask arguments = mask_arguments(losses, keep_rate, keep_rates, candidates, mask);
  Tensor scratch = scratch_of(cuda::mask_scratch_bytes(arguments), device);
  STD_CUDA_CHECK(cudaError_t(cuda::small_loss_mask(arguments, scratch.mutable_data_ptr(), current_stream(device))));
  return mask;
}

TwinOutputs twin_loss(const Tensor& logits1, const Tensor& logits2, const Tensor& labels, int64_t method, bool released,
                      double parameter, double forget_rate, std::optional<Tensor> forget_rates, int64_t step,
                      std::optional<Tensor> step_tensor, std::optional<Tensor> sample_ids) {
  int32_t device = logits1.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  TwinLoss w = twin_arguments(&logits1, &logits2, labels, method, released, parameter);
  set_choice(w, forget_rate, forget_rates, step, step_tensor, sample_ids);
  TwinOutputs outputs = twin_outputs(logits1, w, aoti_torch_device_type_cuda(), device);
  if (logits1.numel() == 0) return outputs;
  Tensor scratch = scratch_of(cuda::twin_scratch_bytes(w), device);
  STD_CUDA_CHECK(cudaError_t(cuda::twin_loss(w, scratch.mutable_data_ptr(), current_stream(device))));
  return outputs;
}

std::tuple<Tensor, Tensor> twin_loss_backward(std::optional<Tensor> upstream1, std::optional<Tensor> upstream2,
                                              std::optional<Tensor> logits1, std::optional<Tensor> logits2,
                                              const Tensor& labels, const Tensor& coefficients, const Tensor& stats,
                                              int64_t method, bool released, double parameter, bool need1, bool need2) {
  const Tensor *first = logits1 ? &*logits1 : nullptr, *second = logits2 ? &*logits2 : nullptr;
  const Tensor& logits = first ? *first : *second;
  int32_t device = logits.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  TwinLossBackward b = twin_backward(twin_arguments(first, second, labels, method, released, parameter), coefficients,
                                     stats, upstream1, upstream2);
  auto [grad1, grad2] = twin_gradients(logits, b, need1, need2, aoti_torch_device_type_cuda(), device);
  if (logits.numel() > 0) STD_CUDA_CHECK(cudaError_t(cuda::twin_loss_backward(b, current_stream(device))));
  return {grad1, grad2};
}

cuda::DepthwiseConv depthwise_arguments(const Tensor& input, const std::optional<Tensor>& scale,
                                        const std::optional<Tensor>& shift, const Tensor& weight,
                                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                        const std::vector<int64_t>& dilation, int64_t pre_activation) {
  STD_TORCH_CHECK(input.numel() > 0, "perfvl: depthwise_conv of an empty input");
  cuda::DepthwiseConv conv{};
  conv.input = image(input), conv.weight = image(weight);
  conv.batch = input.size(0), conv.channels = input.size(1), conv.outputs = weight.size(0);
  conv.multiplier = conv.outputs / conv.channels;
  conv.h = side(input, weight, 0, stride, padding, dilation),
  conv.w = side(input, weight, 1, stride, padding, dilation);
  conv.scale = floats_of(scale), conv.shift = floats_of(shift);
  conv.pre = Activation(pre_activation);
  return conv;
}

Tensor empty_float(int64_t count, int32_t device) {
  return empty_dense({count}, aoti_torch_dtype_float32(), aoti_torch_device_type_cuda(), device);
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv(const Tensor& input, std::optional<Tensor> scale,
                                                  std::optional<Tensor> shift, const Tensor& weight,
                                                  std::optional<Tensor> bias, std::vector<int64_t> stride,
                                                  std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                                  int64_t pre_activation, int64_t activation, bool statistics) {
  int32_t device = input.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  cuda::DepthwiseConv conv =
      depthwise_arguments(input, scale, shift, weight, stride, padding, dilation, pre_activation);
  if (bias) conv.bias = bias->const_data_ptr(), conv.bias_stride = bias->stride(0);
  conv.post = Activation(activation);
  Tensor output =
      empty_image(input, conv.batch, conv.outputs, conv.h.out, conv.w.out, aoti_torch_device_type_cuda(), device);
  conv.output = image(output);
  Tensor mean = empty_float(statistics ? conv.outputs : 0, device);
  Tensor variance = empty_float(statistics ? conv.outputs : 0, device);
  if (statistics) {
    conv.mean = static_cast<float*>(mean.mutable_data_ptr());
    conv.variance = static_cast<float*>(variance.mutable_data_ptr());
  }
  Tensor scratch = scratch_of(cuda::depthwise_conv_scratch_bytes(conv), device);
  STD_CUDA_CHECK(cudaError_t(cuda::depthwise_conv(conv, scratch.mutable_data_ptr(), current_stream(device))));
  return {output, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_conv_backward(
    const Tensor& grad_output, const Tensor& input, std::optional<Tensor> scale, std::optional<Tensor> shift,
    const Tensor& weight, std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    int64_t pre_activation, bool need_input, bool need_affine, bool need_weight) {
  int32_t device = input.get_device_index(), dtype = shim_dtype(dtype_of(input.scalar_type()));
  torch::stable::accelerator::DeviceGuard guard(device);
  cuda::DepthwiseConvBackward b{};
  b.forward = depthwise_arguments(input, scale, shift, weight, stride, padding, dilation, pre_activation);
  b.grad_output = image(grad_output);
  const cuda::DepthwiseConv& conv = b.forward;
  Tensor none = empty_dense({0}, dtype, aoti_torch_device_type_cuda(), device);
  Tensor grad_input = need_input ? empty_image(input, conv.batch, conv.channels, conv.h.in, conv.w.in,
                                               aoti_torch_device_type_cuda(), device)
                                 : none;
  Tensor grad_weight = need_weight ? empty_dense(sizes_of(weight), dtype, aoti_torch_device_type_cuda(), device) : none;
  Tensor grad_scale = empty_float(need_affine ? conv.channels : 0, device);
  Tensor grad_shift = empty_float(need_affine ? conv.channels : 0, device);
  if (need_input) b.grad_input = image(grad_input);
  if (need_affine) {
    b.grad_scale = static_cast<float*>(grad_scale.mutable_data_ptr());
    b.grad_shift = static_cast<float*>(grad_shift.mutable_data_ptr());
  }
  if (need_weight) b.grad_weight = grad_weight.mutable_data_ptr();
  Tensor scratch = scratch_of(cuda::depthwise_conv_backward_scratch_bytes(b), device);
  STD_CUDA_CHECK(cudaError_t(cuda::depthwise_conv_backward(b, scratch.mutable_data_ptr(), current_stream(device))));
  return {grad_input, grad_scale, grad_shift, grad_weight};
}

Tensor add_taps(const Tensor& x, const Tensor& taps) {
  int32_t device = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Tensor output = empty_image(x, x.size(0), x.size(1), x.size(2), x.size(3), aoti_torch_device_type_cuda(), device);
  AddTaps problem = add_taps_arguments(x, taps, output);
  if (x.numel() > 0) STD_CUDA_CHECK(cudaError_t(cuda::add_taps(problem, current_stream(device))));
  return output;
}

Tensor tap_sums(const Tensor& grad) {
  int32_t device = grad.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Tensor sums = empty_taps(grad.size(0), grad.size(1), aoti_torch_device_type_cuda(), device);
  if (grad.numel() > 0)
    STD_CUDA_CHECK(cudaError_t(cuda::tap_sums(tap_sums_arguments(grad, sums), current_stream(device))));
  return sums;
}

AugmentationOutputs conditioning_augmentation(const Tensor& projected, const Tensor& eps, int64_t activation) {
  STD_TORCH_CHECK(eps.numel() > 0, "perfvl: conditioning_augmentation of an empty batch");
  int32_t device = eps.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Augmentation problem{};
  auto outputs = augmentation_arguments(projected, eps, activation, aoti_torch_device_type_cuda(), device, problem);
  Tensor scratch = scratch_of(cuda::augment_scratch_bytes(problem), device);
  STD_CUDA_CHECK(cudaError_t(cuda::augment(problem, scratch.mutable_data_ptr(), current_stream(device))));
  return outputs;
}

Tensor conditioning_augmentation_backward(std::optional<Tensor> grad_condition, std::optional<Tensor> grad_mu,
                                          std::optional<Tensor> grad_logvar, std::optional<Tensor> grad_kl,
                                          const Tensor& mu, const Tensor& logvar, const Tensor& eps,
                                          std::optional<Tensor> projected, int64_t activation) {
  int32_t device = mu.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  AugmentationBackward problem{};
  Tensor grad = augmentation_backward_arguments(grad_condition, grad_mu, grad_logvar, grad_kl, mu, logvar, eps,
                                                projected, activation, aoti_torch_device_type_cuda(), device, problem);
  if (mu.numel() > 0) STD_CUDA_CHECK(cudaError_t(cuda::augment_backward(problem, current_stream(device))));
  return grad;
}

Tensor upsample_weight(const Tensor& weight, std::optional<Tensor> scale, bool channels_last) {
  int32_t device = weight.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  int64_t outputs = weight.size(0), channels = weight.size(1);
  Tensor kernel =
      empty_image(channels_last, weight.scalar_type(), channels, outputs, 4, 4, aoti_torch_device_type_cuda(), device);
  STD_CUDA_CHECK(cudaError_t(cuda::upsample_weight(image(weight), floats_of(scale), outputs, channels, image(kernel),
                                                   current_stream(device))));
  return kernel;
}

Tensor upsample_weight_backward(const Tensor& grad_kernel, bool channels_last) {
  int32_t device = grad_kernel.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  int64_t outputs = grad_kernel.size(1), channels = grad_kernel.size(0);
  Tensor grad = empty_image(channels_last, grad_kernel.scalar_type(), outputs, channels, 3, 3,
                            aoti_torch_device_type_cuda(), device);
  STD_CUDA_CHECK(cudaError_t(
      cuda::upsample_weight_backward(image(grad_kernel), outputs, channels, image(grad), current_stream(device))));
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CUDA, m) {
  m.impl("add_taps", TORCH_BOX(&add_taps));
  m.impl("conditioning_augmentation", TORCH_BOX(&conditioning_augmentation));
  m.impl("conditioning_augmentation_backward", TORCH_BOX(&conditioning_augmentation_backward));
  m.impl("tap_sums", TORCH_BOX(&tap_sums));
  m.impl("gan_loss", TORCH_BOX(&gan_loss));
  m.impl("scale_rows", TORCH_BOX(&scale_rows));
  m.impl("upsample_weight", TORCH_BOX(&upsample_weight));
  m.impl("upsample_weight_backward", TORCH_BOX(&upsample_weight_backward));
  m.impl("momentum_update_", TORCH_BOX(&momentum_update));
  m.impl("enqueue_", TORCH_BOX(&enqueue));
  m.impl("small_loss_mask", TORCH_BOX(&small_loss_mask));
  m.impl("twin_loss", TORCH_BOX(&twin_loss));
  m.impl("twin_loss_backward", TORCH_BOX(&twin_loss_backward));
  m.impl("depthwise_conv", TORCH_BOX(&depthwise_conv));
  m.impl("depthwise_conv_backward", TORCH_BOX(&depthwise_conv_backward));
}

}  // namespace perfvl
