// Tensors on libtorch's stable ABI, as the kernels see them. For the files that know torch: csrc/ops
// and csrc/cuda/ops.cpp.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <vector>

#include "common.h"

// Python's (its stable ABI), where this library was loaded into one.
extern "C" {
[[gnu::weak]] int PyGILState_Ensure();
[[gnu::weak]] void PyGILState_Release(int);
[[gnu::weak]] int Py_IsInitialized();
}

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

// From the shim's number.
inline Dtype dtype_of(int32_t type) {
  if (type == aoti_torch_dtype_float32()) return Dtype::float32;
  if (type == aoti_torch_dtype_bfloat16()) return Dtype::bfloat16;
  STD_TORCH_CHECK(type == aoti_torch_dtype_float16(), "perfvl: float32, bfloat16 or float16 expected");
  return Dtype::float16;
}

// An argument of type Tensor[] as plain handles: std::vector<Tensor> would allocate a reference count for each, which
// for hundreds of small tensors takes as long as the work on them.
class TensorList {
 public:
  explicit TensorList(StableListHandle list) {
    size_t count;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &count));
    handles_.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      StableIValue value;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &value));
      handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(value));
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
  TensorList(TensorList&&) noexcept = default;
  TensorList& operator=(TensorList&&) = delete;
  ~TensorList() {
    // For each tensor that Python alone still holds, torch takes the GIL: a third of the time of a call on hundreds of
    // small tensors. Taking it once makes that cheap.
    bool gil = !handles_.empty() && PyGILState_Ensure && Py_IsInitialized();
    int state = gil ? PyGILState_Ensure() : 0;
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
    if (gil) PyGILState_Release(state);
  }
  size_t size() const { return handles_.size(); }
  AtenTensorHandle operator[](size_t i) const { return handles_[i]; }

 private:
  std::vector<AtenTensorHandle> handles_;
};

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

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// A dense, uninitialised tensor. `dtype` and `device_type` are the shim's numbers.
inline Tensor empty_dense(const std::vector<int64_t>& sizes, int32_t dtype,
                          int32_t device_type = aoti_torch_device_type_cpu(), int32_t device = 0) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 0 ? sizes[i] : 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  device_type, device, &handle));
  return Tensor(handle);
}

}  // namespace perfvl

// How TORCH_BOX makes one of an operator's argument.
template <>
struct torch::stable::detail::ToImpl<perfvl::TensorList> {
  static perfvl::TensorList call(StableIValue value, uint64_t, bool) {
    return perfvl::TensorList(torch::stable::detail::to<StableListHandle>(value));
  }
};
