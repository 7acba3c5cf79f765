// Tensors on libtorch's stable ABI, as the kernels see them. For the two files that know torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common.h"

namespace perfvl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "perfvl: float32, bfloat16 or float16 expected");
  }
}

inline Matrix matrix(const Tensor& t) {
  return {t.const_data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1), dtype_of(t.scalar_type())};
}

inline int32_t shim_dtype(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return aoti_torch_dtype_float32();
    case Dtype::bfloat16: return aoti_torch_dtype_bfloat16();
    default: return aoti_torch_dtype_float16();
  }
}

// A dense, uninitialised tensor. `dtype` and `device_type` are the shim's numbers.
inline Tensor empty_dense(const std::vector<int64_t>& sizes, int32_t dtype,
                          int32_t device_type = aoti_torch_device_type_cpu(), int32_t device = 0) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 0 ? sizes[i] : 1);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                         device_type, device, &handle));
  return Tensor(handle);
}

}  // namespace perfvl
