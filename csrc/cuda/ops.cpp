// The CUDA side of perfvl's torch ops, on libtorch's stable ABI: tensors in, raw pointers and the stream to the
// launchers. Loaded only where torch has a GPU. Schemas and every check of arguments are Python (perfvl/ops).
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/scale_rows.h"

namespace perfvl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "perfvl: float32, bfloat16 or float16 expected");
  }
}

int32_t shim_dtype(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return aoti_torch_dtype_float32();
    case Dtype::bfloat16: return aoti_torch_dtype_bfloat16();
    default: return aoti_torch_dtype_float16();
  }
}

Tensor empty_matrix(int64_t rows, int64_t cols, Dtype dtype, int32_t device) {
  int64_t sizes[] = {rows, cols}, strides[] = {cols > 0 ? cols : 1, 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, shim_dtype(dtype), aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

Matrix matrix(const Tensor& t) {
  return {t.const_data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1), dtype_of(t.scalar_type())};
}

void* current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

Tensor scale_rows(const Tensor& rows, const Tensor& scale, ScalarType dtype) {
  int32_t device = rows.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Matrix from = matrix(rows);
  Tensor out = empty_matrix(from.rows, from.cols, dtype_of(dtype), device);
  if (from.rows > 0 && from.cols > 0)  // CUDA refuses an empty grid
    STD_CUDA_CHECK(
        cudaError_t(cuda::scale_rows(from, static_cast<const float*>(scale.const_data_ptr()), scale.stride(0),
                                     dtype_of(dtype), out.mutable_data_ptr(), current_stream(device))));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CUDA, m) { m.impl("scale_rows", TORCH_BOX(&scale_rows)); }

}  // namespace perfvl
