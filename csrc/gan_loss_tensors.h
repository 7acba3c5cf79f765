// The tensors of gan_loss as its kernels see them. perfvl/ops/gan_loss.py has checked shapes and dtypes.
#pragma once

#include <tuple>
#include <vector>

#include "gan_loss.h"
#include "tensor.h"

namespace perfvl {

// The total, the heads' means, and the gradient of all heads' rows, empty where it is not wanted.
using GanLossOutputs = std::tuple<Tensor, Tensor, Tensor>;

inline GanLossOutputs gan_loss_arguments(const TensorList& logits, const std::vector<double>& targets,
                                         const std::vector<double>& weights, bool exact, bool with_grad,
                                         int32_t device_type, int32_t device, GanLoss& loss) {
  STD_TORCH_CHECK(logits.size() > 0 && logits.size() <= kMostHeads && targets.size() == logits.size() &&
                      weights.size() == logits.size(),
                  "gan_loss: between 1 and 16 heads with a target and a weight each");
  int64_t rows = 0;
  loss.count = int32_t(logits.size()), loss.exact = exact;
  for (size_t k = 0; k < logits.size(); ++k) {
    GanHead& head = loss.heads[k];
    int64_t *sizes, *strides;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(logits[k], &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(logits[k], &strides));
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(logits[k], &head.logits));
    head.rows = sizes[0], head.stride = strides[0];
    head.target = float(targets[k]), head.complement = float(1.0 - targets[k]), head.weight = float(weights[k]);
    rows += head.rows;
  }
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(logits[0], &dtype));
  loss.dtype = dtype_of(dtype);
  auto floats = [&](const std::vector<int64_t>& sizes) {
    return empty_dense(sizes, aoti_torch_dtype_float32(), device_type, device);
  };
  Tensor total = floats({}), means = floats({int64_t(logits.size())}), grad = floats({with_grad ? rows : 0});
  loss.total = static_cast<float*>(total.mutable_data_ptr());
  loss.means = static_cast<float*>(means.mutable_data_ptr());
  if (with_grad) loss.grad = static_cast<float*>(grad.mutable_data_ptr());
  return {total, means, grad};
}

}  // namespace perfvl
