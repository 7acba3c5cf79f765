// The kernels that write in place, on numpy arrays in guarded memory: what is the same for the CPU and for CUDA.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <deque>
#include <optional>
#include <vector>

#include "guarded.h"
#include "key_queue.h"
#include "momentum_update.h"

namespace native_tests {

// How far before a page's end so many bytes must end to begin `offset` bytes after a multiple of 16; -1: at the end.
inline int64_t shift_to(int64_t offset, int64_t bytes) { return offset < 0 ? 0 : (-bytes - offset) & 15; }

// A numpy array that a kernel writes: its span in guarded memory, gaps between elements included, and back.
class GuardedInOut {
 public:
  // `offset`: shift_to's.
  explicit GuardedInOut(const py::array& a, int64_t offset = -1)
      : bytes_(span(a)), memory_(bytes_, shift_to(offset, bytes_)), array_(a) {
    each([](char* own, char* numpy, size_t size) { std::memcpy(own, numpy, size); });
  }
  void* data() const { return memory_.data(); }
  int64_t stride(int axis) const { return array_.strides(axis) / array_.itemsize(); }
  const py::array& array() const { return array_; }
  void give_back(const char* name) {
    if (small()) memory_.check(name);  // beyond, untouched bytes are zero
    each([](char* own, char* numpy, size_t size) { std::memcpy(numpy, own, size); });
  }

 private:
  bool small() const { return bytes_ < int64_t(1) << 30; }
  // All at once, or element by element where rows are far apart.
  template <class F>
  void each(F f) {
    char *own = memory_.data<char>(), *numpy = static_cast<char*>(array_.mutable_data());
    if (small()) return f(own, numpy, size_t(bytes_));
    for (int64_t r = 0; r < array_.shape(0); ++r)
      for (int64_t c = 0; c < array_.shape(1); ++c) {
        int64_t at = r * array_.strides(0) + c * array_.strides(1);
        f(own + at, numpy + at, size_t(array_.itemsize()));
      }
  }

  int64_t bytes_;
  Guarded memory_;
  py::array array_;
};

using Arrays = std::vector<py::array>;

// In place, as the op. `copies` is as long as `targets` or empty; `offsets` are shift_to's, one for each kind.
template <class Kernel>
void update_momentum(const Arrays& targets, const Arrays& sources, const Arrays& copies, double momentum,
                     const std::optional<py::array>& tensor, bool convex, std::array<int64_t, 3> offsets,
                     Kernel kernel) {
  std::deque<GuardedInOut> to, from, rounded;
  std::vector<perfvl::MomentumPair> pairs;
  for (size_t i = 0; i < targets.size(); ++i) {
    perfvl::MomentumPair pair{};
    pair.target = to.emplace_back(targets[i], offsets[0]).data(), pair.target_dtype = dtype_of(targets[i].dtype());
    pair.source = from.emplace_back(sources[i], offsets[1]).data(), pair.source_dtype = dtype_of(sources[i].dtype());
    if (!copies.empty())
      pair.copy = rounded.emplace_back(copies[i], offsets[2]).data(), pair.copy_dtype = dtype_of(copies[i].dtype());
    pair.count = targets[i].size();
    pairs.push_back(pair);
  }
  std::optional<GuardedInput> device;
  if (tensor) device.emplace(*tensor);
  perfvl::MomentumWeights weights{momentum, device ? device->data<void>() : nullptr, tensor && tensor->itemsize() == 8,
                                  convex};
  kernel(pairs, weights);
  for (GuardedInOut& memory : to) memory.give_back("target");
  for (GuardedInOut& memory : rounded) memory.give_back("copy");
}

// In place, as the op. Payloads are matrices.
template <class Kernel>
void write_ring(const py::array& ring, const py::array& cursor, const py::array& keys,
                const std::optional<py::array>& valid, const std::optional<py::array>& mask,
                const Arrays& payload_rings, const Arrays& payloads, bool normalize, bool drop_tail,
                int64_t ring_offset, int64_t key_offset, Kernel kernel) {
  GuardedInOut rows(ring, ring_offset), position(cursor);
  GuardedInput from(keys, shift_to(key_offset, span(keys)) / keys.itemsize());
  std::optional<GuardedInOut> count;
  std::optional<GuardedInput> kept;
  std::deque<GuardedInOut> payload_memory;
  std::deque<GuardedInput> payload_rows;
  std::vector<perfvl::RingPayload> descriptions;
  for (size_t i = 0; i < payloads.size(); ++i)
    descriptions.push_back({payload_memory.emplace_back(payload_rings[i]).data(),
                            payload_rows.emplace_back(payloads[i]).data<void>(), payload_rings[i].strides(0),
                            payloads[i].strides(0), payloads[i].shape(1) * payloads[i].itemsize()});
  perfvl::RingWrite write{};
  write.ring = rows.data(), write.ring_dtype = dtype_of(ring.dtype());
  write.size = ring.shape(0), write.dim = ring.shape(1);
  write.ring_row_stride = rows.stride(0), write.ring_col_stride = rows.stride(1);
  write.keys = from.matrix();
  write.cursor = static_cast<int64_t*>(position.data());
  if (valid) write.valid = static_cast<int64_t*>(count.emplace(*valid).data());
  if (mask) write.mask = kept.emplace(*mask).data<uint8_t>(), write.mask_stride = mask->strides(0);
  write.payloads = descriptions.data(), write.payload_count = int64_t(descriptions.size());
  write.normalize = normalize, write.drop_tail = drop_tail;
  kernel(write);
  rows.give_back("ring"), position.give_back("cursor");
  if (count) count->give_back("valid");
  for (GuardedInOut& memory : payload_memory) memory.give_back("payload");
}

}  // namespace native_tests
