// The norm_act kernels on numpy arrays without gaps, in guarded memory.
#pragma once

#include <pybind11/stl.h>

#include "norm_act.h"
#include "units.h"

namespace native_tests {

struct NormSettings {
  bool training, after;
  int activation;
  double parameter, eps, momentum;
};

// Of an input [outer, channels, inner].
inline perfvl::NormAct norm_of(Inputs& inputs, const py::array& input, const Optional& weight, const Optional& bias,
                               const NormSettings& s) {
  perfvl::NormAct a{};
  a.input = inputs.add(input).data<void>();
  a.outer = input.shape(0), a.channels = input.shape(1), a.inner = input.shape(2);
  a.dtype = dtype_of(input.dtype()), a.activation = perfvl::NormActivation(s.activation);
  a.parameter = float(s.parameter), a.after = s.after, a.training = s.training, a.eps = s.eps, a.momentum = s.momentum;
  a.weight = weight ? inputs.add(*weight).data<float>() : nullptr;
  a.bias = bias ? inputs.add(*bias).data<float>() : nullptr;
  return a;
}

// A vector that is read and written.
struct MovedArray : WrittenArray {
  explicit MovedArray(const py::array& from) : WrittenArray(from.dtype(), {from.shape(0)}) {
    std::memcpy(data(), from.data(), size_t(from.nbytes()));
  }
};

// Output, mean and variance; in training the running ones, moved; else those are given.
template <class Run>
py::tuple normalise(const py::array& input, const Optional& weight, const Optional& bias, const py::array& running_mean,
                    const py::array& running_var, const NormSettings& s, Run run) {
  Inputs inputs;
  perfvl::NormAct a = norm_of(inputs, input, weight, bias, s);
  WrittenArray output(input.dtype(), {input.shape(0), input.shape(1), input.shape(2)});
  MovedArray mean(running_mean), variance(running_var), moved_mean(running_mean), moved_var(running_var);
  a.output = output.data(), a.mean = mean.data<float>(), a.variance = variance.data<float>();
  a.running_mean = moved_mean.data<float>(), a.running_var = moved_var.data<float>();
  run(a);
  return py::make_tuple(output.array("output"), mean.array("mean"), variance.array("variance"),
                        moved_mean.array("running_mean"), moved_var.array("running_var"));
}

// The gradients of the input, the weight and the bias; None where not needed.
template <class Run>
py::tuple differentiate_norm(const py::array& grad, const py::array& input, const Optional& weight,
                             const Optional& bias, const py::array& mean, const py::array& variance,
                             const NormSettings& s, std::array<bool, 2> needed, Run run) {
  Inputs inputs;
  perfvl::NormActBackward b{};
  b.forward = norm_of(inputs, input, weight, bias, s);
  b.forward.mean = const_cast<float*>(inputs.add(mean).data<float>());
  b.forward.variance = const_cast<float*>(inputs.add(variance).data<float>());
  b.grad_output = inputs.add(grad).data<void>();
  WrittenArray grad_input(input.dtype(), {needed[0] ? input.shape(0) : 0, input.shape(1), input.shape(2)});
  WrittenArray grad_weight(mean.dtype(), {needed[1] ? mean.shape(0) : 0});
  WrittenArray grad_bias(mean.dtype(), {needed[1] ? mean.shape(0) : 0});
  if (needed[0]) b.grad_input = grad_input.data();
  if (needed[1]) b.grad_weight = grad_weight.data<float>(), b.grad_bias = grad_bias.data<float>();
  run(b);
  return py::make_tuple(grad_input.array("grad_input"), grad_weight.array("grad_weight"), grad_bias.array("grad_bias"));
}

}  // namespace native_tests
