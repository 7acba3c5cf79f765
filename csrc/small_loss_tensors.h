// The tensors of the small-loss ops as their kernels see them. perfvl/ops/small_loss.py has checked shapes and dtypes.
#pragma once

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "small_loss.h"
#include "tensor.h"

namespace perfvl {

// The stride of a dimension, 0 where the tensor has no such dimension.
inline int64_t stride_of(const Tensor& t, int64_t from_the_end) {
  return t.dim() < from_the_end ? 0 : t.stride(t.dim() - from_the_end);
}

inline Scalars scalars(double value, const std::optional<Tensor>& tensor) {
  if (!tensor) return {value, nullptr, 0, false};
  return {value, tensor->const_data_ptr(), tensor->numel() == 1 ? 0 : tensor->stride(0),
          tensor->scalar_type() == ScalarType::Double};
}

inline const int64_t* integers(const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); }

// Losses are [groups, rows] or [rows].
inline SmallLossMask mask_arguments(const Tensor& losses, double keep_rate, const std::optional<Tensor>& keep_rates,
                                    const std::optional<Tensor>& candidates, const Tensor& mask) {
  SmallLossMask m{};
  m.losses = losses.const_data_ptr(), m.dtype = dtype_of(losses.scalar_type());
  m.groups = losses.dim() == 2 ? losses.size(0) : 1, m.rows = losses.size(losses.dim() - 1);
  m.group_stride = stride_of(losses, 2), m.row_stride = stride_of(losses, 1);
  m.keep_rate = scalars(keep_rate, keep_rates);
  if (candidates) {
    m.candidates = static_cast<const uint8_t*>(candidates->const_data_ptr());
    m.candidate_group_stride = stride_of(*candidates, 2), m.candidate_row_stride = stride_of(*candidates, 1);
  }
  m.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  return m;
}

// What the ops on the losses of two networks share. Logits are [groups, rows, classes] or [rows, classes].
inline TwinLoss twin_arguments(const Tensor* logits1, const Tensor* logits2, const Tensor& labels, int64_t method,
                               bool released, double parameter) {
  const Tensor& shape = logits1 ? *logits1 : *logits2;
  TwinLoss w{};
  w.classes = shape.size(shape.dim() - 1), w.rows = shape.size(shape.dim() - 2);
  w.groups = shape.dim() == 3 ? shape.size(0) : 1;
  w.dtype = dtype_of(shape.scalar_type());
  std::array<const Tensor*, 2> networks{logits1, logits2};
  for (int i = 0; i < 2; ++i)
    if (const Tensor* t = networks[i])
      w.logits[i] = {t->const_data_ptr(), stride_of(*t, 3), stride_of(*t, 2), stride_of(*t, 1)};
  w.labels = integers(labels);
  w.label_group_stride = stride_of(labels, 2), w.label_row_stride = stride_of(labels, 1);
  w.method = TwinMethod(method), w.released = released;
  w.co_lambda = float(parameter), w.least_fraction = parameter;
  return w;
}

// Losses, kept rows, coefficients and row statistics: the outputs of twin_loss.
using TwinOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline TwinOutputs twin_outputs(const Tensor& logits, TwinLoss& w, int32_t device_type, int32_t device) {
  auto make = [&](std::vector<int64_t> sizes, std::vector<int64_t> more, int32_t dtype) {
    if (logits.dim() == 3) sizes.push_back(w.groups);
    sizes.insert(sizes.end(), more.begin(), more.end());
    return empty_dense(sizes, dtype, device_type, device);
  };
  int32_t floats = aoti_torch_dtype_float32(), bools = aoti_torch_dtype_bool();
  Tensor losses[] = {make({}, {}, floats), make({}, {}, floats)};
  Tensor kept[] = {make({}, {w.rows}, bools), make({}, {w.rows}, bools)};
  Tensor coefficients = make({2}, {w.rows}, floats), stats = make({2}, {w.rows, 3}, floats);
  for (int network = 0; network < 2; ++network) {
    w.losses[network] = static_cast<float*>(losses[network].mutable_data_ptr());
    w.kept[network] = static_cast<uint8_t*>(kept[network].mutable_data_ptr());
  }
  w.coefficients = static_cast<float*>(coefficients.mutable_data_ptr());
  w.stats = static_cast<RowStats*>(stats.mutable_data_ptr());
  return {losses[0], losses[1], kept[0], kept[1], coefficients, stats};
}

inline void set_choice(TwinLoss& w, double forget_rate, const std::optional<Tensor>& forget_rates, int64_t step,
                       const std::optional<Tensor>& step_tensor, const std::optional<Tensor>& sample_ids) {
  w.forget_rate = scalars(forget_rate, forget_rates);
  w.step = step, w.step_tensor = step_tensor ? integers(*step_tensor) : nullptr;
  if (!sample_ids) return;
  w.sample_ids = integers(*sample_ids);
  w.id_group_stride = stride_of(*sample_ids, 2), w.id_row_stride = stride_of(*sample_ids, 1);
}

inline TwinLossBackward twin_backward(const TwinLoss& forward, const Tensor& coefficients, const Tensor& stats,
                                      const std::optional<Tensor>& upstream1, const std::optional<Tensor>& upstream2) {
  TwinLossBackward b{};
  b.forward = forward;
  b.forward.coefficients = const_cast<float*>(static_cast<const float*>(coefficients.const_data_ptr()));
  b.forward.stats = const_cast<RowStats*>(static_cast<const RowStats*>(stats.const_data_ptr()));
  const std::optional<Tensor>* upstreams[] = {&upstream1, &upstream2};
  for (int i = 0; i < 2; ++i)
    if (const std::optional<Tensor>& t = *upstreams[i]) {
      b.upstream[i] = static_cast<const float*>(t->const_data_ptr());
      b.upstream_stride[i] = stride_of(*t, 1);
    }
  return b;
}

// The gradients that are needed, as large as the logits; empty where none is.
inline std::array<Tensor, 2> twin_gradients(const Tensor& logits, TwinLossBackward& b, bool need1, bool need2,
                                            int32_t device_type, int32_t device) {
  auto make = [&](bool needed) {
    return empty_dense(needed ? sizes_of(logits) : std::vector<int64_t>{0}, shim_dtype(b.forward.dtype), device_type,
                       device);
  };
  std::array<Tensor, 2> out{make(need1), make(need2)};
  if (need1) b.gradients[0] = out[0].mutable_data_ptr();
  if (need2) b.gradients[1] = out[1].mutable_data_ptr();
  return out;
}

}  // namespace perfvl
