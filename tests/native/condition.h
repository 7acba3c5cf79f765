// The conditioning kernels on numpy arrays in guarded memory: what is the same for the CPU and for CUDA.
#pragma once

#include "conditioning.h"
#include "convolution.h"

namespace native_tests {

inline perfvl::Matrix matrix(Inputs& inputs, const Optional& a) {
  if (!a) return {};
  const GuardedArray& own = inputs.add(*a);
  return {own.data<void>(), a->shape(0), a->shape(1), own.stride(0), own.stride(1), dtype_of(a->dtype())};
}

// `x` with the taps [N, 9, O] that fall inside, as it lies in memory.
template <class Run>
py::array with_taps(const py::array& x, const py::array& taps, bool channels_last, Run run) {
  Inputs inputs;
  const GuardedArray& own = inputs.add(taps);
  Written output({x.shape(0), x.shape(1), x.shape(2), x.shape(3)}, dtype_of(x.dtype()), channels_last);
  run(perfvl::AddTaps{image(inputs.add(x), x),
                      {own.data<float>(), own.stride(0), own.stride(1), own.stride(2)},
                      x.shape(0),
                      x.shape(1),
                      x.shape(2),
                      x.shape(3),
                      output.image()});
  return output.array("output");
}

// [N, 9, O].
template <class Run>
py::array sums_of_taps(const py::array& grad, Run run) {
  Inputs inputs;
  int64_t batch = grad.shape(0), channels = grad.shape(1);
  Guarded sums(4 * batch * 9 * channels);
  run(perfvl::TapSums{image(inputs.add(grad), grad), batch, channels, grad.shape(2), grad.shape(3),
                      sums.data<float>()});
  return sums.array(py::dtype::of<float>(), {batch, 9, channels}, "sums");
}

// (condition, mu, logvar, kl).
template <class Run>
py::tuple augmented(const py::array& projected, const py::array& eps, int activation, Run run) {
  Inputs inputs;
  int64_t rows = eps.shape(0), dim = eps.shape(1), bytes = rows * dim * projected.itemsize();
  Guarded condition(bytes), mu(bytes), logvar(bytes), kl(4);
  perfvl::Augmentation a{};
  a.projected = matrix(inputs, projected), a.eps = matrix(inputs, eps);
  a.activation = perfvl::Projection(activation), a.rows = rows, a.dim = dim;
  a.condition = condition.data(), a.mu = mu.data(), a.logvar = logvar.data(), a.kl = kl.data<float>();
  run(a);
  py::dtype dtype = projected.dtype();
  return py::make_tuple(condition.array(dtype, {rows, dim}, "condition"), mu.array(dtype, {rows, dim}, "mu"),
                        logvar.array(dtype, {rows, dim}, "logvar"), kl.array(py::dtype::of<float>(), {}, "kl"));
}

// The gradient of the projection. `upstream`: of condition, mu, logvar and kl.
template <class Run>
py::array differentiate_augmentation(const std::array<Optional, 4>& upstream, const py::array& mu,
                                     const py::array& logvar, const py::array& eps, const Optional& projected,
                                     int activation, Run run) {
  Inputs inputs;
  perfvl::AugmentationBackward b{};
  b.grad_condition = matrix(inputs, upstream[0]), b.grad_mu = matrix(inputs, upstream[1]);
  b.grad_logvar = matrix(inputs, upstream[2]), b.grad_kl = floats(inputs, upstream[3]);
  b.mu = matrix(inputs, mu), b.logvar = matrix(inputs, logvar), b.eps = matrix(inputs, eps);
  b.projected = matrix(inputs, projected), b.activation = perfvl::Projection(activation);
  b.rows = mu.shape(0), b.dim = mu.shape(1);
  int64_t width = (b.activation == perfvl::Projection::glu ? 4 : 2) * b.dim;
  Guarded grad(b.rows * width * mu.itemsize());
  b.grad_projected = grad.data();
  run(b);
  return grad.array(mu.dtype(), {b.rows, width}, "grad");
}

}  // namespace native_tests
