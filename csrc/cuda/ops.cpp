// The CUDA side of perfvl's torch ops, on libtorch's stable ABI: tensors in, raw pointers and the stream to the
// launchers. Loaded only where torch has a GPU. Schemas and every check of arguments are Python (perfvl/ops).
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "cuda/scale_rows.h"
#include "tensor.h"

namespace perfvl {
namespace {

void* current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

Tensor scale_rows(const Tensor& rows, const Tensor& scale, ScalarType dtype) {
  int32_t device = rows.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Matrix from = matrix(rows);
  Tensor out = empty_dense({from.rows, from.cols}, shim_dtype(dtype_of(dtype)), aoti_torch_device_type_cuda(), device);
  if (from.rows > 0 && from.cols > 0)  // CUDA refuses an empty grid
    STD_CUDA_CHECK(
        cudaError_t(cuda::scale_rows(from, static_cast<const float*>(scale.const_data_ptr()), scale.stride(0),
                                     dtype_of(dtype), out.mutable_data_ptr(), current_stream(device))));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CUDA, m) { m.impl("scale_rows", TORCH_BOX(&scale_rows)); }

}  // namespace perfvl
