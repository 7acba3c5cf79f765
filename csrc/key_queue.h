// What both sides of enqueue_ are given: a ring of rows, the rows to write, and what moves with them.
#pragma once

#include "common.h"

namespace perfvl {

constexpr int64_t kMaxPayloads = 8;

// Rows of bytes that move with the keys (ids, labels): dense within a row.
struct RingPayload {
  void* ring;
  const void* rows;
  int64_t ring_stride, row_stride, row_bytes;  // in bytes
};

// Kept row i (of the rows that `mask` keeps, in order; all B without a mask) goes to ring row (cursor + i) mod K; where
// more than K rows are kept, only the last K are written. Then cursor <- (cursor + kept) mod K and
// valid <- min(K, valid + kept). With `drop_tail` (the memory bank of lightly) rows that would wrap are dropped:
// the first min(kept, K - cursor) are written, and cursor <- 0 where cursor + kept >= K.
// A cursor outside [0, K) is taken modulo K (on CUDA one between -2^47 and 2^47): no write ever leaves the ring.
struct RingWrite {
  void* ring;                                           // K x d, not const: shares Matrix's meaning of strides
  int64_t size, dim, ring_row_stride, ring_col_stride;  // in elements
  Dtype ring_dtype;
  Matrix keys;  // B x d
  int64_t* cursor;
  int64_t* valid;       // null: not counted
  const uint8_t* mask;  // null: every row is kept
  int64_t mask_stride;
  const RingPayload* payloads;
  int64_t payload_count;
  bool normalize;  // rows are scaled by 1 / max(their L2 norm, 1e-12) in float32, then rounded once
  bool drop_tail;
};

}  // namespace perfvl
