// A batch of keys into a ring: cast, normalise, wrap, payloads, cursor and count in one pass.
//
// Rows of a (K, d) ring are contiguous, so a batch is one block of memory (two where it wraps), at the cost of reading
// the keys and writing the rows once. A (d, K) buffer, passed as its transpose, takes the same batch in d stripes: it
// is written column by column, so that the bytes of a stripe stay together.
#include "cpu/key_queue.h"

#include <algorithm>
#include <cmath>

#include "cpu/convert.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

constexpr int64_t large_ring = 16 << 20;  // bytes: about the share of last-level cache that training leaves a ring

// Kept rows with an index in [first, limit) are written; kept row i goes to ring row (start + i) mod K.
struct Plan {
  int64_t start, first, limit;
};

int64_t kept_before(const RingWrite& w, int64_t row) {
  if (!w.mask) return row;
  int64_t count = 0;
  for (int64_t i = 0; i < row; ++i) count += w.mask[i * w.mask_stride] != 0;
  return count;
}

float inverse_norm(const RingWrite& w, int64_t row) {
  float total = 0.f;
  int64_t c = 0, at = row * w.keys.row_stride;
  if (w.keys.col_stride == 1) {
    Vec lanes{};
    for (; c + kLanes <= w.dim; c += kLanes) {
      Vec v = load_lanes(w.keys, at + c);
      lanes = fma(v, v, lanes);
    }
    total = sum(lanes);
  }
  for (; c < w.dim; ++c) {
    float x = element(w.keys, row, c);
    total += x * x;
  }
  float length = std::sqrt(total);
  return 1.f / (length < 1e-12f ? 1e-12f : length);  // NaN stays
}

void put_element(const RingWrite& w, int64_t at, float x) {
  if (w.ring_dtype == Dtype::float32)
    static_cast<float*>(w.ring)[at] = x;
  else
    static_cast<uint16_t*>(w.ring)[at] = w.ring_dtype == Dtype::bfloat16 ? float_to_bfloat(x) : float_to_half(x);
}

void put_lanes(const RingWrite& w, int64_t at, Vec v) {
  if (w.ring_dtype == Dtype::float32)
    store(static_cast<float*>(w.ring) + at, v);
  else
    store(static_cast<uint16_t*>(w.ring) + at, w.ring_dtype == Dtype::bfloat16 ? narrow_bfloat(v) : narrow_half(v));
}

// memcpy past the caches. A ring larger than the caches has lost its oldest rows from them: writing those the usual way
// would first read them from memory.
void stream_bytes(char* to, const char* from, int64_t bytes) {
  constexpr int64_t step = sizeof(Vec);
  int64_t head = std::min<int64_t>(-reinterpret_cast<uintptr_t>(to) & (step - 1), bytes), at = head;
  std::memcpy(to, from, head);
  for (; at + step <= bytes; at += step) stream(to + at, load<Vec>(from + at));
  std::memcpy(to + at, from + at, bytes - at);
  stream_fence();
}

// Rows row, row + 1, ... to ring rows to, to + 1, ... as they are, in one piece where there are no gaps between them.
void copy_rows(const RingWrite& w, int64_t row, int64_t to, int64_t count) {
  int64_t size = w.ring_dtype == Dtype::float32 ? 4 : 2;
  auto* ring = static_cast<char*>(w.ring) + to * w.ring_row_stride * size;
  auto* keys = static_cast<const char*>(w.keys.data) + row * w.keys.row_stride * size;
  if (w.ring_row_stride != w.dim || w.keys.row_stride != w.dim) {
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(ring + i * w.ring_row_stride * size, keys + i * w.keys.row_stride * size, w.dim * size);
  } else if (w.size * w.dim * size > large_ring) {
    stream_bytes(ring, keys, count * w.dim * size);
  } else {
    std::memcpy(ring, keys, count * w.dim * size);
  }
}

void write_dense_row(const RingWrite& w, int64_t row, int64_t to, float scale) {
  int64_t from_at = row * w.keys.row_stride, to_at = to * w.ring_row_stride, c = 0;
  for (; c + kLanes <= w.dim; c += kLanes) put_lanes(w, to_at + c, load_lanes(w.keys, from_at + c) * scale);
  for (; c < w.dim; ++c) put_element(w, to_at + c, element(w.keys, row, c) * scale);
}

// Source rows [begin, end).
void write_rows(const RingWrite& w, const Plan& plan, int64_t begin, int64_t end) {
  constexpr int64_t block = 64;
  bool dense = w.ring_col_stride == 1 && w.keys.col_stride == 1;
  bool as_they_are = dense && !w.normalize && w.keys.dtype == w.ring_dtype;
  int64_t kept = kept_before(w, begin);
  for (int64_t row = begin; row < end;) {
    // 1. The next rows that are written, and where to.
    int64_t rows[block], to[block], count = 0;
    float scale[block];
    for (; row < end && count < block; ++row) {
      if (w.mask && !w.mask[row * w.mask_stride]) continue;
      int64_t index = kept++;
      if (index < plan.first || index >= plan.limit) continue;
      rows[count] = row;
      to[count] = (plan.start + index) % w.size;
      scale[count++] = w.normalize ? inverse_norm(w, row) : 1.f;
    }
    // 2. Keys.
    if (as_they_are)
      for (int64_t i = 0, run; i < count; i += run) {
        for (run = 1; i + run < count && rows[i + run] == rows[i] + run && to[i + run] == to[i] + run;) ++run;
        copy_rows(w, rows[i], to[i], run);
      }
    else if (dense)
      for (int64_t i = 0; i < count; ++i) write_dense_row(w, rows[i], to[i], scale[i]);
    else
      for (int64_t c = 0; c < w.dim; ++c)
        for (int64_t i = 0; i < count; ++i)
          put_element(w, to[i] * w.ring_row_stride + c * w.ring_col_stride, element(w.keys, rows[i], c) * scale[i]);
    // 3. What moves with them.
    for (int64_t p = 0; p < w.payload_count; ++p) {
      const RingPayload& payload = w.payloads[p];
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(static_cast<char*>(payload.ring) + to[i] * payload.ring_stride,
                    static_cast<const char*>(payload.rows) + rows[i] * payload.row_stride, payload.row_bytes);
    }
  }
}

void run(const RingWrite& w, const Host& host) {
  int64_t batch = w.keys.rows, kept = kept_before(w, batch);
  int64_t start = (*w.cursor % w.size + w.size) % w.size;
  Plan plan{start, std::max<int64_t>(kept - w.size, 0), kept};
  if (w.drop_tail) plan.first = 0, plan.limit = std::min(kept, w.size - start);
  constexpr int64_t share = 32 << 10;  // elements: fewer are written before another thread has woken
  int64_t workers = std::clamp<int64_t>(batch * w.dim / share, 1, host.threads);
  if (workers > 1)
    host.parallel(workers, [&](int64_t i) { write_rows(w, plan, batch * i / workers, batch * (i + 1) / workers); });
  else
    write_rows(w, plan, 0, batch);
  *w.cursor = w.drop_tail && start + kept >= w.size ? 0 : (start + kept) % w.size;
  if (w.valid) *w.valid = std::min(w.size, *w.valid + kept);
}

}  // namespace

extern const RingKernel key_queue = run;

}  // namespace PVL_ISA
}  // namespace perfvl
