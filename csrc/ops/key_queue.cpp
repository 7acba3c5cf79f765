// The write into a ring of keys and payloads.
#include <optional>
#include <vector>

#include "ops/host.h"
#include "ring_write.h"

namespace perfvl {
namespace {

void enqueue(const Tensor& queue, const Tensor& cursor, const Tensor& keys, std::optional<Tensor> valid,
             std::optional<Tensor> mask, std::vector<Tensor> payload_queues, std::vector<Tensor> payloads,
             bool normalize, bool drop_tail) {
  std::vector<RingPayload> storage;
  RingWrite write =
      ring_write(queue, cursor, keys, valid, mask, payload_queues, payloads, normalize, drop_tail, storage);
  (*current_level()->key_queue)(write, host());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perfvl, CPU, m) { m.impl("enqueue_", TORCH_BOX(&enqueue)); }

}  // namespace perfvl
