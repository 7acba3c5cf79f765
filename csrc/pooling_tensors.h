// The tensors of the pooling ops as their kernels see them. perfvl/ops/pooling.py has checked shapes and dtypes.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "image_tensors.h"
#include "pooling.h"

namespace perfvl {

using Sizes = std::vector<int64_t>;  // of height and width
using PoolOutputs = std::tuple<Tensor, Tensor>;

// perfvl.ops.pooling.output_size: with `ceil_mode` a last window may reach beyond the padding, but not begin in it.
inline int64_t window_count(int64_t in, int64_t kernel, int64_t stride, int64_t padding, bool ceil_mode) {
  int64_t count = (in + 2 * padding - kernel + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  return ceil_mode && (count - 1) * stride >= in + padding ? count - 1 : count;
}

inline Positions positions_of(const Tensor& t) {
  return {static_cast<uint8_t*>(const_cast<void*>(t.const_data_ptr())), t.stride(0), t.stride(1), t.stride(2),
          t.stride(3)};
}

// Dense, or channels_last, bytes.
inline Tensor empty_positions(bool channels_last, int64_t n, int64_t c, int64_t h, int64_t w) {
  int64_t sizes[] = {n, c, h, w};
  int64_t last[] = {h * w * c, 1, w * c, c}, first[] = {c * h * w, h * w, w, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, channels_last ? last : first, aoti_torch_dtype_uint8(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The problem, and the tensors that its outputs go to; no positions where they are not wanted.
inline PoolOutputs pool_arguments(const Tensor& input, const Sizes& kernel, const Sizes& stride, const Sizes& padding,
                                  bool ceil_mode, bool with_positions, Pool& pool) {
  STD_TORCH_CHECK(input.dim() == 4 && kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 &&
                      kernel[0] * kernel[1] <= 255,
                  "perfvl: pooling: an input [N, C, H, W] and windows of at most 255 positions expected");
  pool.input = image(input), pool.batch = input.size(0), pool.channels = input.size(1);
  for (int axis : {0, 1}) {
    int64_t in = input.size(2 + axis);
    (axis ? pool.w : pool.h) = {in, window_count(in, kernel[axis], stride[axis], padding[axis], ceil_mode),
                                kernel[axis], stride[axis], padding[axis]};
  }
  Tensor output =
      empty_image(input, pool.batch, pool.channels, pool.h.out, pool.w.out, aoti_torch_device_type_cpu(), 0);
  Tensor positions = with_positions
                         ? empty_positions(is_channels_last(input), pool.batch, pool.channels, pool.h.out, pool.w.out)
                         : empty_dense({0}, aoti_torch_dtype_uint8());
  pool.output = image(output);
  if (with_positions) pool.positions = positions_of(positions);
  return {output, positions};
}

// The problem, and the tensor that the gradient goes to, in the layout of the positions.
inline Tensor pool_backward_arguments(const Tensor& grad_output, const Tensor& positions, const Sizes& size,
                                      const Sizes& kernel, const Sizes& stride, const Sizes& padding, bool average,
                                      PoolBackward& backward) {
  STD_TORCH_CHECK(positions.dim() == 4 && grad_output.dim() == 4 && positions.scalar_type() == ScalarType::Byte &&
                      sizes_of(positions) == sizes_of(grad_output) && size.size() == 2 && kernel.size() == 2 &&
                      stride.size() == 2 && padding.size() == 2 && kernel[0] * kernel[1] <= 255,
                  "perfvl: pooling backward: a byte for each element of the gradient expected");
  backward.grad_output = image(grad_output), backward.positions = positions_of(positions);
  backward.batch = positions.size(0), backward.channels = positions.size(1), backward.average = average;
  for (int axis : {0, 1})
    (axis ? backward.w : backward.h) = {size[axis], positions.size(2 + axis), kernel[axis], stride[axis],
                                        padding[axis]};
  // Not by the stride of the channels alone, which is 1 in either layout where there is one window.
  bool last = backward.channels > 1 && positions.stride(1) == 1 && positions.stride(3) == backward.channels;
  Tensor grad_input = empty_image(last, grad_output.scalar_type(), backward.batch, backward.channels, size[0], size[1],
                                  aoti_torch_device_type_cpu(), 0);
  backward.grad_input = image(grad_input);
  return grad_input;
}

}  // namespace perfvl
