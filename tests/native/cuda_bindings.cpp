// perfvl's CUDA kernels and the emulator's own test kernels, on numpy arrays.
#include "cuda/scale_rows.h"
#include "cuda_emulator.h"
#include "emulator_kernels.h"
#include "guarded.h"

namespace {

using namespace native_tests;
namespace ek = emulator_kernels;

void expect_success(int error) {
  if (error) throw std::runtime_error("cudaError " + std::to_string(error));
}

py::array scale_rows(const py::array& rows, const py::array& scale, const py::dtype& dtype, int64_t row_shift,
                     int64_t scale_shift) {
  GuardedInput from(rows, row_shift), factors(scale, scale_shift);
  Dtype out_dtype = dtype_of(dtype);
  Guarded out(rows.size() * item_size(out_dtype));
  expect_success(perfvl::cuda::scale_rows(from.matrix(), factors.data<float>(), scale.strides(0) / 4, out_dtype,
                                          out.data(), nullptr));
  return out.array(dtype, {rows.shape(0), rows.shape(1)}, "out");
}

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

// Runs f(in, n, out) from guarded memory to guarded memory.
template <class F>
py::array map_floats(const Floats& in, int64_t count, F f) {
  GuardedInput from(in);
  Guarded out(count * 4);
  expect_success(f(from.data<float>(), in.size(), out.data<float>()));
  return out.array(py::dtype::of<float>(), {count}, "out");
}

template <class F>
py::array make_ints(int64_t count, F f) {
  Guarded out(count * 4);
  expect_success(f(out.data<int>()));
  return out.array(py::dtype::of<int>(), {count}, "out");
}

}  // namespace

PYBIND11_MODULE(native_cuda, m) {
  m.def("set_order", [](bool reverse) { cuda_emulator::reverse = reverse; });
  m.def("set_grid_limit", [](unsigned blocks) { cuda_emulator::grid_limit = blocks; });

  m.def("last_launch", [] {
    return py::make_tuple(py::make_tuple(gridDim.x, gridDim.y, gridDim.z),
                          py::make_tuple(blockDim.x, blockDim.y, blockDim.z));
  });

  m.def("scale_rows", scale_rows, py::arg("rows"), py::arg("scale"), py::arg("dtype"), py::arg("row_shift") = 0,
        py::arg("scale_shift") = 0);

  m.def("block_sums", [](const Floats& in, int blocks, int threads) {
    return map_floats(in, blocks, [=](const float* from, int64_t n, float* out) {
      return ek::block_sums(from, n, out, blocks, threads);
    });
  });
  m.def("reversed", [](const Floats& in, bool barrier) {
    return map_floats(in, in.size(), [=](const float* from, int64_t n, float* out) {
      return ek::reversed(from, int(n), out, barrier);
    });
  });
  m.def("shared_at_start", [](int blocks) {
    return map_floats(Floats(0), 2 * blocks,
                      [=](const float*, int64_t, float* out) { return ek::shared_at_start(out, blocks); });
  });
  m.def("kept_positive", [](const Floats& in) {
    int count = 0;
    py::array out = map_floats(
        in, 32, [&](const float* from, int64_t n, float* to) { return ek::kept_positive(from, int(n), to, &count); });
    return py::make_tuple(out, count);
  });
  m.def("scaled_by_four", [](const Floats& in) {
    return map_floats(in, in.size(),
                      [](const float* from, int64_t n, float* out) { return ek::scaled_by_four(from, int(n), out); });
  });
  m.def("misaligned_vector", [](const Floats& in) {
    return map_floats(in, 4, [](const float* from, int64_t, float* out) { return ek::misaligned_vector(from, out); });
  });
  m.def("shuffles", [] { return make_ints(5 * 32, ek::shuffles); });
  m.def("two_groups", [] { return make_ints(32, ek::two_groups); });
  m.def("to_half_and_back", [](const Floats& in) {
    int64_t n = in.size();
    GuardedInput from(in);
    Guarded half(2 * n), bfloat(2 * n), from_half(4 * n), from_bfloat(4 * n);
    expect_success(ek::to_half_and_back(from.data<float>(), int(n), half.data<uint16_t>(), bfloat.data<uint16_t>(),
                                        from_half.data<float>(), from_bfloat.data<float>()));
    return py::make_tuple(half.array(py::dtype("e"), {n}, "half"),
                          bfloat.array(py::dtype::of<uint16_t>(), {n}, "bfloat"),
                          from_half.array(py::dtype::of<float>(), {n}, "from_half"),
                          from_bfloat.array(py::dtype::of<float>(), {n}, "from_bfloat"));
  });
  m.def("barrier_in_a_branch", ek::barrier_in_a_branch);
  m.def("different_barriers", ek::different_barriers);
  m.def("shuffle_without_everybody", ek::shuffle_without_everybody);
  m.def("shuffle_from_outside_the_mask", ek::shuffle_from_outside_the_mask);
  m.def("one_past_shared", ek::one_past_shared);
  m.def("launch_only", ek::launch_only);
}
