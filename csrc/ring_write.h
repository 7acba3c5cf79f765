// The tensors of enqueue_ as its kernels see them. Whatever a kernel cannot do is refused here, by an exception, before
// anything is written; perfvl/ops/key_queue.py then says which argument it was, or takes another way.
#pragma once

#include <optional>
#include <vector>

#include "key_queue.h"
#include "tensor.h"

namespace perfvl {

inline bool beside(const Tensor& a, const Tensor& b) { return a.get_device() == b.get_device(); }

// A buffer whose rows, and elements in a row, all have memory of their own as far as strides can tell.
inline bool expanded(const Tensor& t) {
  auto sizes = t.sizes(), strides = t.strides();
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] > 1 && strides[i] == 0) return true;
  return false;
}

// One thing for every row, each in one piece.
inline bool holds(const Tensor& t, int64_t rows, const Tensor& queue) {
  if (t.dim() == 0 || t.size(0) != rows || !beside(t, queue)) return false;
  if (t.numel() == 0) return true;
  int64_t step = 1;
  for (int64_t i = t.dim() - 1; i > 0; step *= t.size(i--))
    if (t.size(i) != 1 && t.stride(i) != step) return false;
  return true;
}

inline bool alike(const Tensor& ring, const Tensor& rows) {
  if (ring.scalar_type() != rows.scalar_type() || ring.dim() != rows.dim()) return false;
  for (int64_t i = 1; i < ring.dim(); ++i)
    if (ring.size(i) != rows.size(i)) return false;
  return true;
}

// `storage` keeps what the result points to.
inline RingWrite ring_write(const Tensor& queue, const Tensor& cursor, const Tensor& keys,
                            const std::optional<Tensor>& valid, const std::optional<Tensor>& mask,
                            const std::vector<Tensor>& payload_queues, const std::vector<Tensor>& payloads,
                            bool normalize, bool drop_tail, std::vector<RingPayload>& storage) {
  auto counter = [&](const Tensor& t) {
    return t.scalar_type() == ScalarType::Long && t.numel() == 1 && beside(t, queue);
  };
  STD_TORCH_CHECK(queue.dim() == 2 && keys.dim() == 2 && queue.size(0) > 0 && queue.size(1) == keys.size(1) &&
                      !expanded(queue) && beside(keys, queue) && counter(cursor) && (!valid || counter(*valid)) &&
                      (!mask || (mask->dim() == 1 && mask->size(0) == keys.size(0) &&
                                 mask->scalar_type() == ScalarType::Bool && beside(*mask, queue))),
                  "enqueue_: arguments that do not fit together");
  RingWrite write{};
  write.ring = queue.mutable_data_ptr();
  write.size = queue.size(0), write.dim = queue.size(1);
  write.ring_row_stride = queue.stride(0), write.ring_col_stride = queue.stride(1);
  write.ring_dtype = dtype_of(queue.scalar_type());
  write.keys = matrix(keys);
  write.cursor = static_cast<int64_t*>(cursor.mutable_data_ptr());
  if (valid) write.valid = static_cast<int64_t*>(valid->mutable_data_ptr());
  if (mask) {
    write.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    write.mask_stride = mask->stride(0);
  }
  STD_TORCH_CHECK(payloads.size() == payload_queues.size() && int64_t(payloads.size()) <= kMaxPayloads,
                  "enqueue_: payloads that do not fit together");
  for (size_t i = 0; i < payloads.size(); ++i) {
    const Tensor &ring = payload_queues[i], &rows = payloads[i];
    STD_TORCH_CHECK(
        holds(ring, queue.size(0), queue) && holds(rows, keys.size(0), queue) && alike(ring, rows) && !expanded(ring),
        "enqueue_: payloads that do not fit together");
    int64_t width = rows.size(0) ? rows.numel() / rows.size(0) : 0, bytes = int64_t(rows.element_size());
    storage.push_back({ring.mutable_data_ptr(), rows.const_data_ptr(), ring.stride(0) * bytes, rows.stride(0) * bytes,
                       width * bytes});
  }
  write.payloads = storage.data(), write.payload_count = int64_t(storage.size());
  write.normalize = normalize, write.drop_tail = drop_tail;
  return write;
}

}  // namespace perfvl
