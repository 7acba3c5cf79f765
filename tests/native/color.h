// The color_transform kernels on numpy arrays in guarded memory.
#pragma once

#include "color_transform.h"
#include "convolution.h"

namespace native_tests {

// [n] as [1, n].
inline perfvl::Matrix parameter(Inputs& inputs, const Optional& a) {
  if (!a) return {};
  const GuardedArray& own = inputs.add(*a);
  if (a->ndim() == 1) return {own.data<void>(), 1, a->shape(0), 0, own.stride(0), dtype_of(a->dtype())};
  return {own.data<void>(), a->shape(0), a->shape(1), own.stride(0), own.stride(1), dtype_of(a->dtype())};
}

// What both directions are given. Parameters: weight1, bias1, weight2, bias2, mean.
struct ColorSettings {
  std::array<Optional, 5> parameters;
  double scale, negative_slope;
  bool residual;
};

inline perfvl::ColorTransform colors(Inputs& inputs, const py::array& pixels, const ColorSettings& s) {
  perfvl::ColorTransform t{};
  t.bytes = pixels.dtype().is(py::dtype::of<uint8_t>());
  const GuardedArray& own = inputs.add(pixels);
  t.image = {const_cast<void*>(own.data<void>()),
             own.stride(0),
             own.stride(1),
             own.stride(2),
             own.stride(3),
             t.bytes ? Dtype::float32 : dtype_of(pixels.dtype())};
  t.batch = pixels.shape(0), t.channels = pixels.shape(1), t.height = pixels.shape(2), t.width = pixels.shape(3);
  t.weight1 = parameter(inputs, s.parameters[0]), t.bias1 = parameter(inputs, s.parameters[1]);
  t.weight2 = parameter(inputs, s.parameters[2]), t.bias2 = parameter(inputs, s.parameters[3]);
  t.mean = parameter(inputs, s.parameters[4]);
  t.hidden = t.weight1.rows, t.outputs = t.weight2.rows;
  t.scale = float(s.scale), t.negative_slope = float(s.negative_slope), t.residual = s.residual;
  return t;
}

// The output, as it lies in memory, by `run(transform)`.
template <class Run>
py::array transform_colors(const py::array& pixels, const ColorSettings& settings, bool channels_last, Run run) {
  Inputs inputs;
  perfvl::ColorTransform t = colors(inputs, pixels, settings);
  Written output({t.batch, t.outputs, t.height, t.width}, t.weight1.dtype, channels_last);
  t.output = output.image();
  run(t);
  return output.array("output");
}

// Gradients by name, by `run(backward)`. needed: the image's, the parameters'.
template <class Run>
py::dict differentiate_colors(const py::array& grad_output, const py::array& pixels, const ColorSettings& settings,
                              std::array<bool, 2> needed, bool channels_last, Run run) {
  Inputs inputs;
  perfvl::ColorTransformBackward b{};
  const perfvl::ColorTransform& t = b.forward = colors(inputs, pixels, settings);
  b.grad_output = image(inputs.add(grad_output), grad_output);
  Written grad_image({t.batch, t.channels, t.height, t.width}, t.image.dtype, channels_last, needed[0]);
  b.grad_image = grad_image.image();
  auto bytes = [&](bool wanted, int64_t count) { return wanted && needed[1] ? 4 * count : 0; };
  Guarded weight1(bytes(true, t.hidden * t.channels)), weight2(bytes(true, t.outputs * t.hidden));
  Guarded bias1(bytes(t.bias1.data, t.hidden)), bias2(bytes(t.bias2.data, t.outputs));
  if (needed[1]) {
    b.grad_weight1 = weight1.data<float>(), b.grad_weight2 = weight2.data<float>();
    if (t.bias1.data) b.grad_bias1 = bias1.data<float>();
    if (t.bias2.data) b.grad_bias2 = bias2.data<float>();
  }
  run(b);
  py::dict found;
  py::dtype floats = py::dtype::of<float>();
  if (needed[0]) found["image"] = grad_image.array("image");
  if (!needed[1]) return found;
  found["weight1"] = weight1.array(floats, {t.hidden, t.channels}, "weight1");
  found["weight2"] = weight2.array(floats, {t.outputs, t.hidden}, "weight2");
  if (t.bias1.data) found["bias1"] = bias1.array(floats, {t.hidden}, "bias1");
  if (t.bias2.data) found["bias2"] = bias2.array(floats, {t.outputs}, "bias2");
  return found;
}

}  // namespace native_tests
