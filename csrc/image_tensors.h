// Tensors as the kernels on images see them, and images to write to. For the files that know torch.
#pragma once

#include <optional>

#include "image.h"
#include "tensor.h"

namespace perfvl {

inline Image image(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()),
          t.stride(0),
          t.stride(1),
          t.stride(2),
          t.stride(3),
          dtype_of(t.scalar_type())};
}
inline Image image(const std::optional<Tensor>& t) { return t ? image(*t) : Image{}; }

// perfvl.ops.separable_conv.is_channels_last.
inline bool is_channels_last(const Tensor& x) { return x.size(1) > 1 && x.stride(1) == 1; }

// Uninitialised and dense, or channels_last.
inline Tensor empty_image(bool channels_last, ScalarType dtype, int64_t n, int64_t c, int64_t h, int64_t w,
                          int32_t device_type, int32_t device) {
  int64_t sizes[] = {n, c, h, w};
  int64_t last[] = {h * w * c, 1, w * c, c}, first[] = {c * h * w, h * w, w, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, channels_last ? last : first, shim_dtype(dtype_of(dtype)),
                                                  device_type, device, &handle));
  return Tensor(handle);
}
// In the layout of `beside`; elements of its dtype, on its device.
inline Tensor empty_image(const Tensor& beside, int64_t n, int64_t c, int64_t h, int64_t w, int32_t device_type,
                          int32_t device) {
  return empty_image(is_channels_last(beside), beside.scalar_type(), n, c, h, w, device_type, device);
}

inline const float* floats_of(const std::optional<Tensor>& t) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && (t->numel() < 2 || t->stride(0) == 1),
                  "perfvl: dense float32 scales and shifts expected");
  return static_cast<const float*>(t->const_data_ptr());
}

}  // namespace perfvl
