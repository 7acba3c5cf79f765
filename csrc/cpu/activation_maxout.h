// Maxout: the largest of a few rows, and which it was. Backward needs no more than that.
#pragma once

#include <algorithm>

#include "cpu/activation_spans.h"
#include "cpu/activation_units.h"
#include "cpu/image_rows.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

// f(row, first column, columns) for pieces of [rows, columns], kGrain elements to a task.
template <class F>
void for_spans(int64_t rows, int64_t columns, const Host& host, const F& f) {
  if (columns >= kGrain) {
    int64_t spans = ceil_div(columns, kGrain);
    host.parallel(rows * spans, [&](int64_t i) {
      int64_t first = i % spans * kGrain;
      f(i / spans, first, std::min(kGrain, columns - first));
    });
    return;
  }
  int64_t height = kGrain / columns;
  host.parallel(ceil_div(rows, height), [&](int64_t i) {
    for (int64_t row = i * height; row < std::min(rows, (i + 1) * height); ++row) f(row, int64_t(0), columns);
  });
}

typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));
typedef int16_t ShortVec __attribute__((vector_size(kLanes * 2)));

// Elements as they lie in memory, so that what is chosen is what was given, and what they are worth in a comparison.
template <Dtype dtype>
struct Raw {
  using Element = int16_t;
  using Lanes = ShortVec;
  static Vec value(Lanes raw) {
    return dtype == Dtype::bfloat16 ? widen_bfloat((HalfVec)raw) : widen_half((HalfVec)raw);
  }
};
template <>
struct Raw<Dtype::float32> {
  using Element = int32_t;
  using Lanes = IntVec;
  static Vec value(Lanes raw) { return from_bits(raw); }
};

template <class V>
[[gnu::always_inline]] inline V load_some(const void* p, int64_t lanes) {
  V v{};
  std::memcpy(&v, p, lanes == kLanes ? sizeof v : size_t(lanes) * (sizeof v / kLanes));
  return v;
}
template <class V>
[[gnu::always_inline]] inline void store_some(void* p, V v, int64_t lanes) {
  std::memcpy(p, &v, lanes == kLanes ? sizeof v : size_t(lanes) * (sizeof v / kLanes));
}

template <Dtype dtype, bool kWinner>
void maxout_of(const Maxout& m, const Host& host) {
  using Element = typename Raw<dtype>::Element;
  using Lanes = typename Raw<dtype>::Lanes;
  // Asks for what is some way ahead, which the processor, following several pieces, is late with: in a long piece
  // further on, else in the same place of a later row, for what is nearer is read by now.
  constexpr int64_t kAhead = 4096 / sizeof(Element);
  int64_t width = m.pieces * m.columns, ahead = m.columns < kGrain ? round_up(kAhead, width) : kAhead;
  for_spans(m.rows, m.columns, host, [&](int64_t row, int64_t first, int64_t count) {
    const Element* from = static_cast<const Element*>(m.input) + row * m.pieces * m.columns + first;
    Element* to = static_cast<Element*>(m.output) + row * m.columns + first;
    uint8_t* winner = m.winner + (kWinner ? row * m.columns + first : 0);
    for_vectors(count, [&](int64_t i, int64_t lanes) {
      for (int64_t p = 0; p < m.pieces; ++p) __builtin_prefetch(from + p * m.columns + i + ahead);
      Lanes best = load_some<Lanes>(from + i, lanes);
      Vec largest = Raw<dtype>::value(best);
      IntVec piece{};
      for (int64_t p = 1; p < m.pieces; ++p) {
        Lanes other = load_some<Lanes>(from + p * m.columns + i, lanes);
        Vec value = Raw<dtype>::value(other);
        IntVec wins = (value >= largest) | (value != value);  // NaN stays
        Lanes chosen = __builtin_convertvector(wins, Lanes);
        best = (other & chosen) | (best & ~chosen);
        largest = select(wins, value, largest);
        if constexpr (kWinner) piece = wins ? IntVec{} + int32_t(p) : piece;
      }
      store_some(to + i, best, lanes);
      if constexpr (kWinner) store_some(winner + i, __builtin_convertvector(piece, ByteVec), lanes);
    });
  });
}

template <Dtype dtype>
void maxout_backward_of(const MaxoutBackward& m, const Host& host) {
  using Element = typename Raw<dtype>::Element;
  using Lanes = typename Raw<dtype>::Lanes;
  for_spans(m.rows, m.columns, host, [&](int64_t row, int64_t first, int64_t count) {
    const Element* from = static_cast<const Element*>(m.grad_output) + row * m.columns + first;
    const uint8_t* winner = m.winner + row * m.columns + first;
    Element* to = static_cast<Element*>(m.grad_input) + row * m.pieces * m.columns + first;
    for_vectors(count, [&](int64_t i, int64_t lanes) {
      Lanes grad = load_some<Lanes>(from + i, lanes);
      Lanes piece = __builtin_convertvector(load_some<ByteVec>(winner + i, lanes), Lanes);
      for (int64_t p = 0; p < m.pieces; ++p)
        store_some(to + p * m.columns + i, grad & (piece == Lanes{} + Element(p)), lanes);
    });
  });
}

}  // namespace
}  // namespace PVL_ISA
}  // namespace perfvl
