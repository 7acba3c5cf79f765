// The separable_conv kernels on numpy arrays in guarded memory.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "selection.h"
#include "separable_conv.h"

namespace native_tests {

struct Geometry {
  std::array<int64_t, 2> stride;
  std::array<int64_t, 4> padding;
  std::array<int64_t, 2> dilation;
};

inline perfvl::Image image(const GuardedArray& a, const py::array& from) {
  return {
      const_cast<void*>(a.data<void>()), a.stride(0), a.stride(1), a.stride(2), a.stride(3), dtype_of(from.dtype())};
}

// An image that a kernel writes, dense in either layout.
class Written {
 public:
  Written(std::array<int64_t, 4> shape, perfvl::Dtype dtype, bool channels_last, bool wanted = true)
      : shape_(shape), last_(channels_last), wanted_(wanted), dtype_(dtype), memory_(count() * item_size(dtype)) {}
  perfvl::Image image() const {
    if (!wanted_) return {};
    auto [n, c, h, w] = shape_;
    (void)n;
    if (last_) return {memory_.data(), h * w * c, 1, w * c, c, dtype_};
    return {memory_.data(), c * h * w, h * w, w, 1, dtype_};
  }
  // [n, c, h, w] or [n, h, w, c], as it lies in memory.
  py::array array(const char* name) const {
    auto [n, c, h, w] = shape_;
    if (!wanted_) return py::array(native_tests::dtype_of(dtype_), std::vector<py::ssize_t>{0});
    return memory_.array(native_tests::dtype_of(dtype_),
                         last_ ? std::vector<py::ssize_t>{n, h, w, c} : std::vector<py::ssize_t>{n, c, h, w}, name);
  }

 private:
  int64_t count() const { return wanted_ ? shape_[0] * shape_[1] * shape_[2] * shape_[3] : 0; }
  std::array<int64_t, 4> shape_;
  bool last_, wanted_;
  perfvl::Dtype dtype_;
  Guarded memory_;
};

inline const float* floats(Inputs& inputs, const Optional& a) { return a ? inputs.add(*a).data<float>() : nullptr; }

inline perfvl::SeparableConv problem(Inputs& inputs, const py::array& input, const Optional& scale,
                                     const Optional& shift, const py::array& depthwise, const py::array& pointwise,
                                     const Geometry& g, int pre) {
  perfvl::SeparableConv conv{};
  conv.input = image(inputs.add(input), input);
  conv.depthwise = image(inputs.add(depthwise), depthwise), conv.pointwise = image(inputs.add(pointwise), pointwise);
  conv.batch = input.shape(0), conv.channels = input.shape(1);
  conv.multiplier = depthwise.shape(0) / input.shape(1), conv.outputs = pointwise.shape(0);
  for (int axis : {0, 1}) {
    perfvl::Side& side = axis ? conv.w : conv.h;
    side = {input.shape(2 + axis), 0, depthwise.shape(2 + axis), g.stride[axis], g.dilation[axis], g.padding[2 * axis]};
    side.out = (side.in + g.padding[2 * axis] + g.padding[2 * axis + 1] - side.reach() - 1) / side.stride + 1;
  }
  conv.scale = floats(inputs, scale), conv.shift = floats(inputs, shift);
  conv.pre = perfvl::Activation(pre);
  return conv;
}

}  // namespace native_tests
