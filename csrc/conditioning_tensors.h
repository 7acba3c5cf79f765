// Tensors as the conditioning kernels see them, and results to write to. For the files that know torch.
#pragma once

#include <optional>
#include <tuple>

#include "conditioning.h"
#include "image_tensors.h"

namespace perfvl {

// float32 [N, 9, O], to be written.
inline Tensor empty_taps(int64_t batch, int64_t outputs, int32_t device_type, int32_t device) {
  return empty_dense({batch, 9, outputs}, aoti_torch_dtype_float32(), device_type, device);
}

inline AddTaps add_taps_arguments(const Tensor& x, const Tensor& taps, const Tensor& output) {
  STD_TORCH_CHECK(taps.scalar_type() == ScalarType::Float && taps.dim() == 3 && taps.size(0) == x.size(0) &&
                      taps.size(1) == 9 && taps.size(2) == x.size(1),
                  "perfvl: add_taps: float32 taps [N, 9, O] expected");
  Taps from{static_cast<const float*>(taps.const_data_ptr()), taps.stride(0), taps.stride(1), taps.stride(2)};
  return {image(x), from, x.size(0), x.size(1), x.size(2), x.size(3), image(output)};
}

inline TapSums tap_sums_arguments(const Tensor& grad, const Tensor& sums) {
  return {image(grad),  grad.size(0), grad.size(1),
          grad.size(2), grad.size(3), static_cast<float*>(sums.mutable_data_ptr())};
}

using AugmentationOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The problem, and the tensors that its outputs go to.
inline AugmentationOutputs augmentation_arguments(const Tensor& projected, const Tensor& eps, int64_t activation,
                                                  int32_t device_type, int32_t device, Augmentation& problem) {
  problem.projected = matrix(projected), problem.eps = matrix(eps), problem.activation = Projection(activation);
  problem.rows = eps.size(0), problem.dim = eps.size(1);
  int64_t parts = problem.activation == Projection::glu ? 4 : 2;
  STD_TORCH_CHECK(projected.size(0) == problem.rows && projected.size(1) == parts * problem.dim &&
                      projected.scalar_type() == eps.scalar_type(),
                  "perfvl: conditioning_augmentation: projected of the dtype of eps and two (GLU: four) times as many "
                  "columns expected");
  auto empty = [&] {
    return empty_dense({problem.rows, problem.dim}, shim_dtype(problem.projected.dtype), device_type, device);
  };
  Tensor condition = empty(), mu = empty(), logvar = empty();
  Tensor kl = empty_dense({}, aoti_torch_dtype_float32(), device_type, device);
  problem.condition = condition.mutable_data_ptr(), problem.mu = mu.mutable_data_ptr();
  problem.logvar = logvar.mutable_data_ptr(), problem.kl = static_cast<float*>(kl.mutable_data_ptr());
  return {condition, mu, logvar, kl};
}

// The problem, and the tensor that the gradient goes to.
inline Tensor augmentation_backward_arguments(const std::optional<Tensor>& grad_condition,
                                              const std::optional<Tensor>& grad_mu,
                                              const std::optional<Tensor>& grad_logvar,
                                              const std::optional<Tensor>& grad_kl, const Tensor& mu,
                                              const Tensor& logvar, const Tensor& eps,
                                              const std::optional<Tensor>& projected, int64_t activation,
                                              int32_t device_type, int32_t device, AugmentationBackward& problem) {
  auto given = [](const std::optional<Tensor>& t) { return t ? matrix(*t) : Matrix{}; };
  problem.grad_condition = given(grad_condition), problem.grad_mu = given(grad_mu);
  problem.grad_logvar = given(grad_logvar), problem.grad_kl = floats_of(grad_kl);
  problem.mu = matrix(mu), problem.logvar = matrix(logvar), problem.eps = matrix(eps);
  problem.projected = given(projected), problem.activation = Projection(activation);
  problem.rows = mu.size(0), problem.dim = mu.size(1);
  bool glu = problem.activation == Projection::glu;
  STD_TORCH_CHECK(!glu || projected, "perfvl: conditioning_augmentation_backward: GLU without `projected`");
  Tensor grad =
      empty_dense({problem.rows, (glu ? 4 : 2) * problem.dim}, shim_dtype(problem.mu.dtype), device_type, device);
  problem.grad_projected = grad.mutable_data_ptr();
  return grad;
}

}  // namespace perfvl
