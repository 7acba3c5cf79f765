// The tensors of maxout and apl as their kernels see them. perfvl/ops/activation.py has checked shapes and dtypes.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "activation.h"
#include "image_tensors.h"

namespace perfvl {

// The same elements as NCHW, or as NHWC of a tensor that is channels_last, without gaps: most often `t` itself.
inline Tensor without_gaps(const Tensor& t, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// `channels`: of the output; `sizes`: a tensor of its batch and pixels.
inline Maxout maxout_sizes(const Tensor& sizes, int64_t channels, int64_t pieces, bool channels_last) {
  STD_TORCH_CHECK(sizes.dim() == 4 && pieces >= 1 && pieces <= kMostPieces && channels > 0 && sizes.numel() > 0,
                  "perfvl: maxout: 1 to 256 pieces of an image that is not empty expected");
  int64_t pixels = sizes.size(2) * sizes.size(3);
  Maxout m{};
  m.rows = sizes.size(0) * (channels_last ? pixels : 1), m.columns = channels * (channels_last ? 1 : pixels);
  m.pieces = pieces;
  return m;
}

// A byte for each element of `like`, as it lies in memory.
inline Tensor empty_bytes(const Tensor& like) {
  auto sizes = like.sizes(), strides = like.strides();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(like.dim(), sizes.data(), strides.data(), aoti_torch_dtype_uint8(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Of tensors without gaps. Parameters are [segments, C, 1, 1] or [segments, C, H, W], float32.
inline Apl apl_arguments(const Tensor& input, const Tensor& slope, const Tensor& hinge, bool channels_last) {
  STD_TORCH_CHECK(input.dim() == 4 && slope.dim() == 4 && hinge.dim() == 4, "perfvl: apl: 4 dimensions expected");
  Apl a{};
  int64_t n = input.size(0), channels = input.size(1), pixels = input.size(2) * input.size(3);
  bool of_positions = slope.size(2) * slope.size(3) == pixels;
  a.input = input.const_data_ptr(), a.dtype = dtype_of(input.scalar_type());
  a.segments = slope.size(0);
  a.parameters = channels * (of_positions ? pixels : 1);
  a.outer = n * (channels_last && !of_positions ? pixels : 1);
  a.inner = channels_last || of_positions ? 1 : pixels;
  a.slope = static_cast<const float*>(slope.const_data_ptr());
  a.hinge = static_cast<const float*>(hinge.const_data_ptr());
  STD_TORCH_CHECK(a.segments >= 1 && a.segments <= kMostSegments && input.numel() > 0 &&
                      slope.numel() == a.segments * a.parameters && hinge.numel() == slope.numel() &&
                      slope.scalar_type() == ScalarType::Float && hinge.scalar_type() == ScalarType::Float,
                  "perfvl: apl: 1 to 6 segments of float32 parameters [segments, C, 1, 1] or [segments, C, H, W]");
  return a;
}

}  // namespace perfvl
