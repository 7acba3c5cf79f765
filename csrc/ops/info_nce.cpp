// InfoNCE with its gradient.
#include <algorithm>
#include <optional>
#include <tuple>

#include "ops/host.h"

namespace perfvl {
namespace {

float read_float(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return float(*static_cast<const double*>(t.const_data_ptr()));
    case ScalarType::Float: return *static_cast<const float*>(t.const_data_ptr());
    default: {
      uint16_t h = *static_cast<const uint16_t*>(t.const_data_ptr());
      return t.scalar_type() == ScalarType::Half ? half_to_float(h) : bfloat_to_float(h);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce(const Tensor& query, const Tensor& positive,
                                                                    const Tensor& queue, double temperature,
                                                                    std::optional<Tensor> temperature_tensor,
                                                                    std::optional<Tensor> valid,
                                                                    ScalarType compute_dtype, int64_t reduction,
                                                                    bool with_rank, bool with_grad) {
  int64_t rows = query.size(0), dim = query.size(1);
  InfoNceArgs args{};
  args.query = matrix(query), args.positive = matrix(positive), args.queue = matrix(queue);
  if (valid) {
    int64_t count = *static_cast<const int64_t*>(valid->const_data_ptr());
    args.queue.rows = std::clamp<int64_t>(count, 0, args.queue.rows);
  }
  args.scale = float(1.0 / (temperature_tensor ? double(read_float(*temperature_tensor)) : temperature));
  args.bfloat16_products = compute_dtype == ScalarType::BFloat16;
  bool mean = reduction == 1, reduce = reduction != 0;
  args.row_factor = mean ? 1.f / float(rows) : 1.f;

  Tensor loss = reduce ? empty_float({}) : empty_float({rows});
  Tensor lse = empty_float({rows}), positive_logit = empty_float({rows});
  Tensor rank = empty_dense({with_rank ? rows : 0}, aoti_torch_dtype_int32());
  Tensor grad_query = empty_float({with_grad ? rows : 0, dim}), positive_weight = empty_float({with_grad ? rows : 0});
  auto floats = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  args.lse = floats(lse), args.positive_logit = floats(positive_logit);
  if (with_rank) args.rank = static_cast<int32_t*>(rank.mutable_data_ptr());
  if (with_grad) args.grad_query = floats(grad_query), args.positive_weight = floats(positive_weight);
  args.host = host();

  const InfoNceKernel& kernel = *current_level()->info_nce;
  int64_t kernel_bytes = rows ? kernel.scratch_bytes(args) : 0;
  Tensor scratch = empty_dense({kernel_bytes + rows * int64_t(sizeof(float))}, aoti_torch_dtype_uint8());
  char* base = static_cast<char*>(scratch.mutable_data_ptr());
  args.loss = reduce ? reinterpret_cast<float*>(base + kernel_bytes) : floats(loss);
  if (rows) kernel.run(args, base);
  if (reduce) {
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) total += args.loss[i];
    *floats(loss) = float(mean ? total / double(rows) : total);
  }
  return {loss, lse, positive_logit, rank, grad_query, positive_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CPU, m) { m.impl("info_nce", TORCH_BOX(&info_nce)); }

}  // namespace perfvl
