// The pooling kernels on numpy arrays in guarded memory.
#pragma once

#include "convolution.h"
#include "pooling.h"

namespace native_tests {

using Pair = std::array<int64_t, 2>;

struct Windows {
  Pair kernel, stride, padding, size;  // size: how many there are
  perfvl::PoolSide side(int axis, int64_t in) const {
    return {in, size[axis], kernel[axis], stride[axis], padding[axis]};
  }
};

inline perfvl::Positions positions_of(const GuardedArray& a) {
  return {const_cast<uint8_t*>(a.data<uint8_t>()), a.stride(0), a.stride(1), a.stride(2), a.stride(3)};
}

// (output, positions or None), as they lie in memory, by `run(pool)`.
template <class Run>
py::tuple pooled(const py::array& input, const Windows& windows, bool with_positions, bool channels_last, Run run) {
  Inputs inputs;
  int64_t n = input.shape(0), c = input.shape(1), oh = windows.size[0], ow = windows.size[1];
  Written output({n, c, oh, ow}, dtype_of(input.dtype()), channels_last);
  Guarded positions(with_positions ? n * c * oh * ow : 0);
  perfvl::Pool pool{image(inputs.add(input), input),
                    n,
                    c,
                    windows.side(0, input.shape(2)),
                    windows.side(1, input.shape(3)),
                    output.image(),
                    {}};
  if (with_positions) {
    auto* data = positions.data<uint8_t>();
    pool.positions = channels_last ? perfvl::Positions{data, oh * ow * c, 1, ow * c, c}
                                   : perfvl::Positions{data, c * oh * ow, oh * ow, ow, 1};
  }
  run(inputs, pool);
  std::vector<py::ssize_t> shape =
      channels_last ? std::vector<py::ssize_t>{n, oh, ow, c} : std::vector<py::ssize_t>{n, c, oh, ow};
  py::object found = py::none();
  if (with_positions) found = positions.array(py::dtype::of<uint8_t>(), shape, "positions");
  return py::make_tuple(output.array("output"), found);
}

// The gradient of the input, as it lies in memory, by `run(backward)`.
template <class Run>
py::array unpooled(const py::array& grad_output, const py::array& positions, const Windows& windows, Pair size,
                   bool average, bool channels_last, Run run) {
  Inputs inputs;
  int64_t n = grad_output.shape(0), c = grad_output.shape(1);
  Written grad_input({n, c, size[0], size[1]}, dtype_of(grad_output.dtype()), channels_last);
  run(perfvl::PoolBackward{image(inputs.add(grad_output), grad_output), positions_of(inputs.add(positions)), n, c,
                           windows.side(0, size[0]), windows.side(1, size[1]), average, grad_input.image()});
  return grad_input.array("grad_input");
}

}  // namespace native_tests
