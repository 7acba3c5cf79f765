// The CPU side of perfvl's torch ops: tensors in, raw pointers to the kernels. Built on libtorch's stable ABI, so one
// binary serves every torch from 2.11 on. Schemas are defined in Python (perfvl/ops), as is every check of arguments.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "activation_tensors.h"
#include "color_transform_tensors.h"
#include "conditioning_tensors.h"
#include "cpu/isa.h"
#include "gan_loss_tensors.h"
#include "momentum_pairs.h"
#include "norm_act_tensors.h"
#include "pooling_tensors.h"
#include "ring_write.h"
#include "separable_conv_tensors.h"
#include "small_loss_tensors.h"
#include "tensor.h"

namespace perfvl {
namespace {

Tensor empty_float(const std::vector<int64_t>& sizes) { return empty_dense(sizes, aoti_torch_dtype_float32()); }

void run_parallel(int64_t n, void* state, void (*body)(void*, int64_t)) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(state, i);
  });
}

Tensor view_float(const float* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(const_cast<float*>(data), 2, sizes, strides, 0,
                                                            aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                                            &handle));
  return Tensor(handle);
}

// A few thousand multiplications are done before a call of BLAS has begun.
void gemm_small(int64_t m, int64_t n, int64_t k, Operand a, Operand b, float* c, int64_t c_stride, bool accumulate) {
  for (int64_t i = 0; i < m; ++i) {
    float* out = c + i * c_stride;
    if (!accumulate) std::fill_n(out, n, 0.f);
    for (int64_t l = 0; l < k; ++l) {
      float left = a.data[i * a.row_stride + l * a.col_stride];
      const float* right = b.data + l * b.row_stride;
      for (int64_t j = 0; j < n; ++j) out[j] += left * right[j * b.col_stride];
    }
  }
}

// torch's own product: its BLAS, its precision settings. Inside parallel_for it runs on the calling thread alone.
void gemm(void*, int64_t m, int64_t n, int64_t k, Operand a, Operand b, float* c, int64_t c_stride, bool accumulate) {
  if (m * n * k <= 4096) return gemm_small(m, n, k, a, b, c, c_stride, accumulate);
  Tensor left = view_float(a.data, m, k, a.row_stride, a.col_stride);
  Tensor right = view_float(b.data, k, n, b.row_stride, b.col_stride);
  Tensor out = view_float(c, m, n, c_stride, 1);
  TORCH_ERROR_CODE_CHECK(accumulate ? aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), 1.0, 1.0)
                                    : aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}

Host host() { return {nullptr, int64_t(torch::stable::get_num_threads()), run_parallel, gemm}; }

float read_float(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return float(*static_cast<const double*>(t.const_data_ptr()));
    case ScalarType::Float: return *static_cast<const float*>(t.const_data_ptr());
    default: {
      uint16_t h = *static_cast<const uint16_t*>(t.const_data_ptr());
      return t.scalar_type() == ScalarType::Half ? half_to_float(h) : bfloat_to_float(h);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce(const Tensor& query, const Tensor& positive,
                                                                    const Tensor& queue, double temperature,
                                                                    std::optional<Tensor> temperature_tensor,
                                                                    std::optional<Tensor> valid,
                                                                    ScalarType compute_dtype, int64_t reduction,
                                                                    bool with_rank, bool with_grad) {
  int64_t rows = query.size(0), dim = query.size(1);
  InfoNceArgs args{};
  args.query = matrix(query), args.positive = matrix(positive), args.queue = matrix(queue);
  if (valid) {
    int64_t count = *static_cast<const int64_t*>(valid->const_data_ptr());
    args.queue.rows = std::clamp<int64_t>(count, 0, args.queue.rows);
  }
  args.scale = float(1.0 / (temperature_tensor ? double(read_float(*temperature_tensor)) : temperature));
  args.bfloat16_products = compute_dtype == ScalarType::BFloat16;
  bool mean = reduction == 1, reduce = reduction != 0;
  args.row_factor = mean ? 1.f / float(rows) : 1.f;

  Tensor loss = reduce ? empty_float({}) : empty_float({rows});
  Tensor lse = empty_float({rows}), positive_logit = empty_float({rows});
  Tensor rank = empty_dense({with_rank ? rows : 0}, aoti_torch_dtype_int32());
  Tensor grad_query = empty_float({with_grad ? rows : 0, dim}), positive_weight = empty_float({with_grad ? rows : 0});
  auto floats = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  args.lse = floats(lse), args.positive_logit = floats(positive_logit);
  if (with_rank) args.rank = static_cast<int32_t*>(rank.mutable_data_ptr());
  if (with_grad) args.grad_query = floats(grad_query), args.positive_weight = floats(positive_weight);
  args.host = host();

  const InfoNceKernel& kernel = *current_level()->info_nce;
  int64_t kernel_bytes = rows ? kernel.scratch_bytes(args) : 0;
  Tensor scratch = empty_dense({kernel_bytes + rows * int64_t(sizeof(float))}, aoti_torch_dtype_uint8());
  char* base = static_cast<char*>(scratch.mutable_data_ptr());
  args.loss = reduce ? reinterpret_cast<float*>(base + kernel_bytes) : floats(loss);
  if (rows) kernel.run(args, base);
  if (reduce) {
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) total += args.loss[i];
    *floats(loss) = float(mean ? total / double(rows) : total);
  }
  return {loss, lse, positive_logit, rank, grad_query, positive_weight};
}

void momentum_update(const TensorList& targets, const TensorList& sources, double momentum,
                     std::optional<Tensor> momentum_tensor, const TensorList& copies, bool convex) {
  std::vector<MomentumPair> pairs = momentum_pairs(targets, sources, copies);
  (*current_level()->momentum_update)(pairs.data(), int64_t(pairs.size()),
                                      momentum_weights(momentum, momentum_tensor, convex), host());
}

void enqueue(const Tensor& queue, const Tensor& cursor, const Tensor& keys, std::optional<Tensor> valid,
             std::optional<Tensor> mask, std::vector<Tensor> payload_queues, std::vector<Tensor> payloads,
             bool normalize, bool drop_tail) {
  std::vector<RingPayload> storage;
  RingWrite write =
      ring_write(queue, cursor, keys, valid, mask, payload_queues, payloads, normalize, drop_tail, storage);
  (*current_level()->key_queue)(write, host());
}

Tensor scratch_of(int64_t bytes) { return empty_dense({bytes}, aoti_torch_dtype_uint8()); }

// Scratch that the calling thread keeps for its next call, up to a limit: tens of megabytes would be mapped and cleared
// by the system for every call, which takes as long as the work of a layer.
Tensor kept_scratch_of(int64_t bytes) {
  constexpr int64_t kMost = 64 << 20;
  if (bytes > kMost) return scratch_of(bytes);
  static thread_local std::optional<Tensor> kept;
  if (!kept || kept->numel() < bytes) {
    kept.reset();
    kept = scratch_of(bytes);
  }
  return *kept;
}

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

GanLossOutputs gan_loss(const TensorList& logits, std::vector<double> targets, std::vector<double> weights, bool exact,
                        bool with_grad) {
  GanLoss loss{};
  GanLossOutputs outputs =
      gan_loss_arguments(logits, targets, weights, exact, with_grad, aoti_torch_device_type_cpu(), 0, loss);
  (*current_level()->gan_loss)(loss);
  return outputs;
}

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

PoolOutputs max_avg_pool(const Tensor& input, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                         std::vector<int64_t> padding, bool ceil_mode, bool with_argmax) {
  Pool pool{};
  PoolOutputs outputs = pool_arguments(input, kernel, stride, padding, ceil_mode, with_argmax, pool);
  const PoolingKernel& kernels = *current_level()->pooling;
  Host services = host();
  Tensor scratch = kept_scratch_of(kernels.scratch_bytes(pool, services));
  kernels.max_average(pool, scratch.mutable_data_ptr(), services);
  return outputs;
}

PoolOutputs stochastic_pool(const Tensor& input, std::optional<Tensor> uniform, std::vector<int64_t> kernel,
                            std::vector<int64_t> stride, std::vector<int64_t> padding, bool ceil_mode) {
  StochasticPool problem{};
  PoolOutputs outputs = pool_arguments(input, kernel, stride, padding, ceil_mode, uniform.has_value(), problem.pool);
  problem.uniform = image(uniform);
  const PoolingKernel& kernels = *current_level()->pooling;
  Host services = host();
  Tensor scratch = kept_scratch_of(kernels.scratch_bytes(problem.pool, services));
  kernels.stochastic(problem, scratch.mutable_data_ptr(), services);
  return outputs;
}

Tensor pool_backward(const Tensor& grad_output, const Tensor& positions, const std::vector<int64_t>& size,
                     const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, bool average) {
  PoolBackward backward{};
  Tensor grad = pool_backward_arguments(grad_output, positions, size, kernel, stride, padding, average, backward);
  const PoolingKernel& kernels = *current_level()->pooling;
  Host services = host();
  Tensor scratch = kept_scratch_of(kernels.backward_scratch_bytes(backward, services));
  kernels.backward(backward, scratch.mutable_data_ptr(), services);
  return grad;
}

Tensor max_avg_pool_backward(const Tensor& grad_output, const Tensor& argmax, std::vector<int64_t> size,
                             std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding) {
  return pool_backward(grad_output, argmax, size, kernel, stride, padding, true);
}

Tensor stochastic_pool_backward(const Tensor& grad_output, const Tensor& picked, std::vector<int64_t> size,
                                std::vector<int64_t> kernel, std::vector<int64_t> stride,
                                std::vector<int64_t> padding) {
  return pool_backward(grad_output, picked, size, kernel, stride, padding, false);
}

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

std::string isa() { return current_level()->name; }

// For tests: every level this machine can run, in one process.
void set_isa(std::string name) {
  const Level* level = find_level(name.c_str());
  STD_TORCH_CHECK(level, "perfvl: this CPU or this build has no level ", name);
  current_level() = level;
}

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const Level* level = levels_begin(); level->name; ++level)
    if (level->supported()) names.push_back(level->name);
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CPU, m) {
  m.impl("add_taps", TORCH_BOX(&add_taps));
  m.impl("apl", TORCH_BOX(&apl));
  m.impl("apl_backward", TORCH_BOX(&apl_backward));
  m.impl("color_transform", TORCH_BOX(&color_transform));
  m.impl("color_transform_backward", TORCH_BOX(&color_transform_backward));
  m.impl("condition_taps", TORCH_BOX(&condition_taps));
  m.impl("conditioning_augmentation", TORCH_BOX(&conditioning_augmentation));
  m.impl("conditioning_augmentation_backward", TORCH_BOX(&conditioning_augmentation_backward));
  m.impl("tap_sums", TORCH_BOX(&tap_sums));
  m.impl("gan_loss", TORCH_BOX(&gan_loss));
  m.impl("info_nce", TORCH_BOX(&info_nce));
  m.impl("momentum_update_", TORCH_BOX(&momentum_update));
  m.impl("max_avg_pool", TORCH_BOX(&max_avg_pool));
  m.impl("max_avg_pool_backward", TORCH_BOX(&max_avg_pool_backward));
  m.impl("maxout", TORCH_BOX(&maxout));
  m.impl("maxout_backward", TORCH_BOX(&maxout_backward));
  m.impl("stochastic_pool", TORCH_BOX(&stochastic_pool));
  m.impl("stochastic_pool_backward", TORCH_BOX(&stochastic_pool_backward));
  m.impl("enqueue_", TORCH_BOX(&enqueue));
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
  m.impl("separable_conv", TORCH_BOX(&separable_conv));
  m.impl("separable_conv_backward", TORCH_BOX(&separable_conv_backward));
  m.impl("small_loss_mask", TORCH_BOX(&small_loss_mask));
  m.impl("twin_loss", TORCH_BOX(&twin_loss));
  m.impl("twin_loss_backward", TORCH_BOX(&twin_loss_backward));
  m.impl("upsample_conv", TORCH_BOX(&upsample_conv));
  m.impl("upsample_conv_backward", TORCH_BOX(&upsample_conv_backward));
}

STABLE_TORCH_LIBRARY_FRAGMENT(perfvl, m) {
  m.def("_isa() -> str");
  m.def("_set_isa(str level) -> ()");
  m.def("_isa_levels() -> str[]");
}
STABLE_TORCH_LIBRARY_IMPL(perfvl, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&isa));
  m.impl("_set_isa", TORCH_BOX(&set_isa));
  m.impl("_isa_levels", TORCH_BOX(&isa_levels));
}

}  // namespace perfvl
