// The maxout and apl kernels on numpy arrays without gaps, in guarded memory.
#pragma once

#include <pybind11/stl.h>

#include <vector>

#include "activation.h"
#include "selection.h"

namespace native_tests {

// What a kernel writes: as many elements as `shape` says.
class WrittenArray {
 public:
  WrittenArray(py::dtype dtype, std::vector<py::ssize_t> shape)
      : dtype_(std::move(dtype)), shape_(std::move(shape)), memory_(bytes()) {}
  template <class T = void>
  T* data() const {
    return memory_.data<T>();
  }
  py::array array(const char* name) const { return memory_.array(dtype_, shape_, name); }

 private:
  int64_t bytes() const {
    int64_t count = dtype_.itemsize();
    for (py::ssize_t size : shape_) count *= size;
    return count;
  }
  py::dtype dtype_;
  std::vector<py::ssize_t> shape_;
  Guarded memory_;
};

inline py::dtype bytes_dtype() { return py::dtype::of<uint8_t>(); }

// Output and winner of an input [rows, pieces, columns].
template <class Run>
py::tuple largest_pieces(const py::array& input, bool with_winner, Run run) {
  Inputs inputs;
  py::ssize_t rows = input.shape(0), pieces = input.shape(1), columns = input.shape(2);
  WrittenArray output(input.dtype(), {rows, columns}), winner(bytes_dtype(), {with_winner ? rows : 0, columns});
  run(perfvl::Maxout{inputs.add(input).data<void>(), rows, pieces, columns, dtype_of(input.dtype()), output.data(),
                     with_winner ? winner.data<uint8_t>() : nullptr});
  return py::make_tuple(output.array("output"), winner.array("winner"));
}

// [rows, pieces, columns] of a gradient and winners [rows, columns].
template <class Run>
py::array give_to_winners(const py::array& grad, const py::array& winner, int64_t pieces, Run run) {
  Inputs inputs;
  py::ssize_t rows = grad.shape(0), columns = grad.shape(1);
  WrittenArray result(grad.dtype(), {rows, pieces, columns});
  run(perfvl::MaxoutBackward{inputs.add(grad).data<void>(), inputs.add(winner).data<uint8_t>(), rows, pieces, columns,
                             dtype_of(grad.dtype()), result.data()});
  return result.array("grad_input");
}

// Of an input [outer, parameters, inner] and parameters [segments, parameters].
inline perfvl::Apl unit(Inputs& inputs, const py::array& input, const py::array& slope, const py::array& hinge) {
  return {inputs.add(input).data<void>(),
          input.shape(0),
          input.shape(1),
          input.shape(2),
          slope.shape(0),
          inputs.add(slope).data<float>(),
          inputs.add(hinge).data<float>(),
          dtype_of(input.dtype()),
          nullptr};
}

template <class Run>
py::array bend(const py::array& input, const py::array& slope, const py::array& hinge, Run run) {
  Inputs inputs;
  perfvl::Apl problem = unit(inputs, input, slope, hinge);
  WrittenArray output(input.dtype(), {input.shape(0), input.shape(1), input.shape(2)});
  problem.output = output.data();
  run(problem);
  return output.array("output");
}

template <class Run>
py::tuple differentiate_unit(const py::array& grad, const py::array& input, const py::array& slope,
                             const py::array& hinge, Run run) {
  Inputs inputs;
  WrittenArray grad_input(input.dtype(), {input.shape(0), input.shape(1), input.shape(2)});
  WrittenArray grad_slope(slope.dtype(), {slope.shape(0), slope.shape(1)});
  WrittenArray grad_hinge(slope.dtype(), {slope.shape(0), slope.shape(1)});
  run(perfvl::AplBackward{unit(inputs, input, slope, hinge), inputs.add(grad).data<void>(), grad_input.data(),
                          grad_slope.data<float>(), grad_hinge.data<float>()});
  return py::make_tuple(grad_input.array("grad_input"), grad_slope.array("grad_slope"), grad_hinge.array("grad_hinge"));
}

}  // namespace native_tests
