// The depthwise kernels of CUDA on numpy arrays in guarded memory.
#pragma once

#include <array>
#include <tuple>

#include "cuda/separable_conv.h"
#include "selection.h"

namespace native_tests {

using Two = std::array<int64_t, 2>;
using Four = std::array<int64_t, 4>;  // top, bottom, left, right

inline void expect_success(int error) {
  if (error) throw std::runtime_error("cudaError " + std::to_string(error));
}

inline perfvl::Image image(const GuardedArray& a, Dtype dtype) {
  return {const_cast<void*>(a.data<void>()), a.stride(0), a.stride(1), a.stride(2), a.stride(3), dtype};
}

// A dense image to be written, or channels_last, as `beside` is; numpy sees its memory in the order it has.
class Result {
 public:
  Result(const py::array& beside, int64_t n, int64_t c, int64_t h, int64_t w)
      : Result(beside.dtype(), beside.shape(1) > 1 && beside.strides(1) == beside.itemsize(), n, c, h, w) {}
  Result(const py::dtype& dtype, bool channels_last, int64_t n, int64_t c, int64_t h, int64_t w)
      : dtype_(dtype),
        last_(channels_last),
        shape_(last_ ? std::vector<py::ssize_t>{n, h, w, c} : std::vector<py::ssize_t>{n, c, h, w}),
        memory_(n * c * h * w * dtype.itemsize()) {
    image_ = last_ ? perfvl::Image{memory_.data(), h * w * c, 1, w * c, c, dtype_of(dtype_)}
                   : perfvl::Image{memory_.data(), c * h * w, h * w, w, 1, dtype_of(dtype_)};
  }
  const perfvl::Image& image() const { return image_; }
  py::object array(const char* name) const {
    py::object a = memory_.array(dtype_, shape_, name);
    return last_ ? a.attr("transpose")(0, 3, 1, 2) : a;
  }

 private:
  py::dtype dtype_;
  bool last_;
  std::vector<py::ssize_t> shape_;
  Guarded memory_;
  perfvl::Image image_;
};

inline perfvl::Side side(const py::array& input, const py::array& weight, int axis, const Two& stride,
                         const Four& padding, const Two& dilation) {
  size_t i = size_t(axis);
  perfvl::Side s{input.shape(2 + axis), 0, weight.shape(2 + axis), stride[i], dilation[i], padding[2 * i]};
  s.out = (s.in + padding[2 * i] + padding[2 * i + 1] - s.reach() - 1) / s.stride + 1;
  return s;
}

inline perfvl::cuda::DepthwiseConv depthwise_arguments(Inputs& inputs, const py::array& input, const py::array& weight,
                                                       const Optional& scale, const Optional& shift, const Two& stride,
                                                       const Four& padding, const Two& dilation, int pre) {
  perfvl::cuda::DepthwiseConv c{};
  Dtype dtype = dtype_of(input.dtype());
  c.input = image(inputs.add(input), dtype), c.weight = image(inputs.add(weight), dtype);
  c.batch = input.shape(0), c.channels = input.shape(1), c.outputs = weight.shape(0);
  c.multiplier = c.outputs / c.channels;
  c.h = side(input, weight, 0, stride, padding, dilation), c.w = side(input, weight, 1, stride, padding, dilation);
  if (scale) c.scale = inputs.add(*scale).data<float>();
  if (shift) c.shift = inputs.add(*shift).data<float>();
  c.pre = perfvl::Activation(pre);
  return c;
}

inline py::tuple depthwise_conv(const py::array& input, const py::array& weight, const Optional& scale,
                                const Optional& shift, const Optional& bias, const Two& stride, const Four& padding,
                                const Two& dilation, int pre, int post, bool statistics) {
  Inputs inputs;
  auto c = depthwise_arguments(inputs, input, weight, scale, shift, stride, padding, dilation, pre);
  if (bias) {
    const GuardedArray& own = inputs.add(*bias);
    c.bias = own.data<void>(), c.bias_stride = own.stride(0);
  }
  c.post = perfvl::Activation(post);
  Result output(input, c.batch, c.outputs, c.h.out, c.w.out);
  c.output = output.image();
  int64_t floats = statistics ? c.outputs : 0;
  Guarded mean(4 * floats), variance(4 * floats);
  if (statistics) c.mean = mean.data<float>(), c.variance = variance.data<float>();
  with_scratch(perfvl::cuda::depthwise_conv_scratch_bytes(c),
               [&](void* scratch) { expect_success(perfvl::cuda::depthwise_conv(c, scratch, nullptr)); });
  py::dtype type = py::dtype::of<float>();
  return py::make_tuple(output.array("output"), mean.array(type, {floats}, "mean"),
                        variance.array(type, {floats}, "variance"));
}

// `needed`: input, scale and shift, weight. What is not needed is empty.
inline py::tuple depthwise_conv_backward(const py::array& grad_output, const py::array& input, const py::array& weight,
                                         const Optional& scale, const Optional& shift, const Two& stride,
                                         const Four& padding, const Two& dilation, int pre,
                                         std::array<bool, 3> needed) {
  Inputs inputs;
  perfvl::cuda::DepthwiseConvBackward b{};
  b.forward = depthwise_arguments(inputs, input, weight, scale, shift, stride, padding, dilation, pre);
  const auto& c = b.forward;
  b.grad_output = image(inputs.add(grad_output), dtype_of(input.dtype()));
  Result grad_input(input, needed[0] ? c.batch : 0, c.channels, c.h.in, c.w.in);
  if (needed[0]) b.grad_input = grad_input.image();
  int64_t affine = needed[1] ? c.channels : 0, filters = needed[2] ? c.outputs : 0;
  Guarded grad_scale(4 * affine), grad_shift(4 * affine);
  if (needed[1]) b.grad_scale = grad_scale.data<float>(), b.grad_shift = grad_shift.data<float>();
  Guarded grad_weight(filters * c.h.kernel * c.w.kernel * input.itemsize());
  if (needed[2]) b.grad_weight = grad_weight.data();
  with_scratch(perfvl::cuda::depthwise_conv_backward_scratch_bytes(b),
               [&](void* scratch) { expect_success(perfvl::cuda::depthwise_conv_backward(b, scratch, nullptr)); });
  py::dtype type = py::dtype::of<float>();
  return py::make_tuple(grad_input.array("grad_input"), grad_scale.array(type, {affine}, "grad_scale"),
                        grad_shift.array(type, {affine}, "grad_shift"),
                        grad_weight.array(input.dtype(), {filters, 1, c.h.kernel, c.w.kernel}, "grad_weight"));
}

}  // namespace native_tests
