// Maximum + average pooling, stochastic pooling, and their gradients.
#include <optional>
#include <vector>

#include "ops/host.h"
#include "pooling_tensors.h"

namespace perfvl {
namespace {

PoolOutputs max_avg_pool(const Tensor& input, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                         std::vector<int64_t> padding, bool ceil_mode, bool with_argmax) {
  Pool pool{};
  PoolOutputs outputs = pool_arguments(input, kernel, stride, padding, ceil_mode, with_argmax, pool);
  const PoolingKernel& kernels = *current_level()->pooling;
  Host services = host();
  Tensor scratch = kept_scratch_of(kernels.scratch_bytes(pool, services));
  kernels.max_average(pool, scratch.mutable_data_ptr(), services);
  return outputs;
}

PoolOutputs stochastic_pool(const Tensor& input, std::optional<Tensor> uniform, std::vector<int64_t> kernel,
                            std::vector<int64_t> stride, std::vector<int64_t> padding, bool ceil_mode) {
  StochasticPool problem{};
  PoolOutputs outputs = pool_arguments(input, kernel, stride, padding, ceil_mode, uniform.has_value(), problem.pool);
  problem.uniform = image(uniform);
  const PoolingKernel& kernels = *current_level()->pooling;
  Host services = host();
  Tensor scratch = kept_scratch_of(kernels.scratch_bytes(problem.pool, services));
  kernels.stochastic(problem, scratch.mutable_data_ptr(), services);
  return outputs;
}

Tensor pool_backward(const Tensor& grad_output, const Tensor& positions, const std::vector<int64_t>& size,
                     const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, bool average) {
  PoolBackward backward{};
  Tensor grad = pool_backward_arguments(grad_output, positions, size, kernel, stride, padding, average, backward);
  const PoolingKernel& kernels = *current_level()->pooling;
  Host services = host();
  Tensor scratch = kept_scratch_of(kernels.backward_scratch_bytes(backward, services));
  kernels.backward(backward, scratch.mutable_data_ptr(), services);
  return grad;
}

Tensor max_avg_pool_backward(const Tensor& grad_output, const Tensor& argmax, std::vector<int64_t> size,
                             std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding) {
  return pool_backward(grad_output, argmax, size, kernel, stride, padding, true);
}

Tensor stochastic_pool_backward(const Tensor& grad_output, const Tensor& picked, std::vector<int64_t> size,
                                std::vector<int64_t> kernel, std::vector<int64_t> stride,
                                std::vector<int64_t> padding) {
  return pool_backward(grad_output, picked, size, kernel, stride, padding, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CPU, m) {
  m.impl("max_avg_pool", TORCH_BOX(&max_avg_pool));
  m.impl("max_avg_pool_backward", TORCH_BOX(&max_avg_pool_backward));
  m.impl("stochastic_pool", TORCH_BOX(&stochastic_pool));
  m.impl("stochastic_pool_backward", TORCH_BOX(&stochastic_pool_backward));
}

}  // namespace perfvl
