// See host.h; and the level of instructions that the kernels use.
#include "ops/host.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>

namespace perfvl {
namespace {

void run_parallel(int64_t n, void* state, void (*body)(void*, int64_t)) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(state, i);
  });
}

Tensor view_float(const float* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(const_cast<float*>(data), 2, sizes, strides, 0,
                                                            aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                                            &handle));
  return Tensor(handle);
}

// A few thousand multiplications are done before a call of BLAS has begun.
void gemm_small(int64_t m, int64_t n, int64_t k, Operand a, Operand b, float* c, int64_t c_stride, bool accumulate) {
  for (int64_t i = 0; i < m; ++i) {
    float* out = c + i * c_stride;
    if (!accumulate) std::fill_n(out, n, 0.f);
    for (int64_t l = 0; l < k; ++l) {
      float left = a.data[i * a.row_stride + l * a.col_stride];
      const float* right = b.data + l * b.row_stride;
      for (int64_t j = 0; j < n; ++j) out[j] += left * right[j * b.col_stride];
    }
  }
}

// torch's own product: its BLAS, its precision settings. Inside parallel_for it runs on the calling thread alone.
void gemm(void*, int64_t m, int64_t n, int64_t k, Operand a, Operand b, float* c, int64_t c_stride, bool accumulate) {
  if (m * n * k <= 4096) return gemm_small(m, n, k, a, b, c, c_stride, accumulate);
  Tensor left = view_float(a.data, m, k, a.row_stride, a.col_stride);
  Tensor right = view_float(b.data, k, n, b.row_stride, b.col_stride);
  Tensor out = view_float(c, m, n, c_stride, 1);
  TORCH_ERROR_CODE_CHECK(accumulate ? aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), 1.0, 1.0)
                                    : aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}

}  // namespace

Host host() { return {nullptr, int64_t(torch::stable::get_num_threads()), run_parallel, gemm}; }

Tensor empty_float(const std::vector<int64_t>& sizes) { return empty_dense(sizes, aoti_torch_dtype_float32()); }

Tensor scratch_of(int64_t bytes) { return empty_dense({bytes}, aoti_torch_dtype_uint8()); }

Tensor kept_scratch_of(int64_t bytes) {
  constexpr int64_t kMost = 64 << 20;
  if (bytes > kMost) return scratch_of(bytes);
  static thread_local std::optional<Tensor> kept;
  if (!kept || kept->numel() < bytes) {
    kept.reset();
    kept = scratch_of(bytes);
  }
  return *kept;
}

namespace {

std::string isa() { return current_level()->name; }

// For tests: every level this machine can run, in one process.
void set_isa(std::string name) {
  const Level* level = find_level(name.c_str());
  STD_TORCH_CHECK(level, "perfvl: this CPU or this build has no level ", name);
  current_level() = level;
}

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const Level* level = levels_begin(); level->name; ++level)
    if (level->supported()) names.push_back(level->name);
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(perfvl, m) {
  m.def("_isa() -> str");
  m.def("_set_isa(str level) -> ()");
  m.def("_isa_levels() -> str[]");
}
STABLE_TORCH_LIBRARY_IMPL(perfvl, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&isa));
  m.impl("_set_isa", TORCH_BOX(&set_isa));
  m.impl("_isa_levels", TORCH_BOX(&isa_levels));
}

}  // namespace perfvl
