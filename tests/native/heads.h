// The gan_loss kernels on numpy arrays in guarded memory: what is the same for the CPU and for CUDA.
#pragma once

#include "gan_loss.h"
#include "selection.h"

namespace native_tests {

// (total, means[heads], gradient[rows of all heads] or None), by `run(loss)`.
template <class Run>
py::tuple lose_heads(const std::vector<py::array>& logits, const std::vector<double>& targets,
                     const std::vector<double>& weights, bool exact, bool with_grad, Run run) {
  Inputs inputs;
  perfvl::GanLoss loss{};
  int64_t rows = 0, count = int64_t(logits.size());
  loss.count = int32_t(count), loss.exact = exact, loss.dtype = dtype_of(logits[0].dtype());
  for (size_t k = 0; k < logits.size(); ++k) {
    const GuardedArray& own = inputs.add(logits[k]);
    loss.heads[k] = {own.data<void>(),  logits[k].shape(0),      own.stride(0),
                     float(targets[k]), float(1.0 - targets[k]), float(weights[k])};
    rows += logits[k].shape(0);
  }
  Guarded total(4), means(4 * count), grad(with_grad ? 4 * rows : 0);
  loss.total = total.data<float>(), loss.means = means.data<float>();
  if (with_grad) loss.grad = grad.data<float>();
  run(loss);
  py::dtype floats = py::dtype::of<float>();
  return py::make_tuple(total.array(floats, {}, "total"), means.array(floats, {count}, "means"),
                        with_grad ? py::object(grad.array(floats, {rows}, "grad")) : py::object(py::none()));
}

}  // namespace native_tests
