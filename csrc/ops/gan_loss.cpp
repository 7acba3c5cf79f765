// The losses of a discriminator with their gradients.
#include <vector>

#include "gan_loss_tensors.h"
#include "ops/host.h"

namespace perfvl {
namespace {

GanLossOutputs gan_loss(const TensorList& logits, std::vector<double> targets, std::vector<double> weights, bool exact,
                        bool with_grad) {
  GanLoss loss{};
  GanLossOutputs outputs =
      gan_loss_arguments(logits, targets, weights, exact, with_grad, aoti_torch_device_type_cpu(), 0, loss);
  (*current_level()->gan_loss)(loss);
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CPU, m) { m.impl("gan_loss", TORCH_BOX(&gan_loss)); }

}  // namespace perfvl
