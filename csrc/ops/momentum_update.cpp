// The momentum update of all tensors of a call.
#include <optional>
#include <vector>

#include "momentum_pairs.h"
#include "ops/host.h"

namespace perfvl {
namespace {

void momentum_update(const TensorList& targets, const TensorList& sources, double momentum,
                     std::optional<Tensor> momentum_tensor, const TensorList& copies, bool convex) {
  std::vector<MomentumPair> pairs = momentum_pairs(targets, sources, copies);
  (*current_level()->momentum_update)(pairs.data(), int64_t(pairs.size()),
                                      momentum_weights(momentum, momentum_tensor, convex), host());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CPU, m) { m.impl("momentum_update_", TORCH_BOX(&momentum_update)); }

}  // namespace perfvl
