// Products of small tiles that stay in registers: kTileRows rows of A, each value broadcast, times a panel of B two
// vectors wide. At 14 x 32 floats (AVX-512) a step over k is 28 multiply-adds to 16 loads, so the multiply-adds are the
// limit; no library call, no copy of A.
//
// An element is 32 bits: a float, or two bfloat16 values along k that one instruction multiplies and adds.
#pragma once

#include <algorithm>

#include "cpu/vec.h"

namespace perfvl {
namespace PVL_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 14;  // 28 sums, 2 of B and 1 of A in 32 registers
#else
constexpr int kTileRows = 6;  // 12 sums, 2 of B and 1 of A in 16 registers
#endif
constexpr int kPanel = 2 * kLanes;                                 // columns of B beside each other
constexpr int kSlot = (kTileRows + kLanes - 1) / kLanes * kLanes;  // a tile's rows of A in whole vectors

struct Floats {
  typedef float Element;
  static constexpr int kValues = 1;  // along k in an element
  static Vec multiply_add(Element a, Vec b, Vec sum) { return fma(broadcast(a), b, sum); }
};
#if defined(__AVX512BF16__)
struct Pairs {
  typedef int32_t Element;
  static constexpr int kValues = 2;
  static Vec multiply_add(Element a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }
};
#endif

// out[R, kVectors * kLanes] = or += A B over `steps` elements of k. A's element (r, k) is a[r * a_row + k * a_step];
// B's vectors for k begin at b + k * b_step.
template <class Product, int R, int kVectors>
void multiply_tile(const typename Product::Element* a, int64_t a_row, int64_t a_step,
                   const typename Product::Element* b, int64_t b_step, int64_t steps, float* out, int64_t out_row,
                   bool add) {
  Vec sums[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[r][v] = add ? load<Vec>(out + r * out_row + v * kLanes) : Vec{};
  for (int64_t k = 0; k < steps; ++k, a += a_step, b += b_step) {
    Vec right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load<Vec>(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Product::multiply_add(a[r * a_row], right[v], sums[r][v]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(out + r * out_row + v * kLanes, sums[r][v]);
}

template <class Product>
using MultiplyTile = void (*)(const typename Product::Element*, int64_t, int64_t, const typename Product::Element*,
                              int64_t, int64_t, float*, int64_t, bool);

// The tile of `rows` rows and one or two vectors.
template <class Product, int R = 1>
MultiplyTile<Product> tile_of(int64_t rows, bool wide) {
  if constexpr (R < kTileRows)
    if (rows > R) return tile_of<Product, R + 1>(rows, wide);
  return wide ? multiply_tile<Product, R, 2> : multiply_tile<Product, R, 1>;
}

// Operand A: element (row, k) at data[row * row_stride + k * step]; with block_stride the rows of tile number i begin
// at data + i * block_stride instead.
template <class Product>
struct Left {
  const typename Product::Element* data;
  int64_t row_stride, step, block_stride = 0;
  const typename Product::Element* tile(int64_t i, int64_t first) const {
    return data + (block_stride ? i * block_stride : first * row_stride);
  }
};
// Operand B in panels of kPanel columns, `panel_stride` elements apart; within one, `step` elements from k to k + 1.
template <class Product>
struct Right {
  const typename Product::Element* data;
  int64_t panel_stride, step;
};

// Rows [first, first + count) of the tile number i of `blocks`: all of nearly one height, since a short tile is slow.
struct TileRows {
  int64_t first, count;
};
inline TileRows tile_rows(int64_t rows, int64_t blocks, int64_t i) {
  int64_t base = rows / blocks, longer = rows % blocks;
  return {i * base + std::min(i, longer), base + (i < longer)};
}

// finish(rows, column, columns, tile) for every tile of A B, which is [rows][kPanel]. Columns of a panel stay together,
// so that its part of B is read from the nearest cache.
template <class Product, class Finish>
void multiply(const Left<Product>& a, const Right<Product>& b, int64_t rows, int64_t columns, int64_t steps,
              const Finish& finish) {
  alignas(64) float tile[kTileRows * kPanel];
  int64_t blocks = ceil_div(rows, kTileRows);
  for (int64_t n = 0; n < columns; n += kPanel) {
    int64_t width = std::min<int64_t>(kPanel, columns - n);
    const auto* panel = b.data + n / kPanel * b.panel_stride;
    for (int64_t i = 0; i < blocks; ++i) {
      TileRows r = tile_rows(rows, blocks, i);
      tile_of<Product>(r.count, width > kLanes)(a.tile(i, r.first), a.row_stride, a.step, panel, b.step, steps, tile,
                                                kPanel, false);
      finish(r, n, width, tile);
    }
  }
}

// out[rows, columns] = or += A B.
template <class Product>
void multiply_into(const Left<Product>& a, const Right<Product>& b, int64_t rows, int64_t columns, int64_t steps,
                   float* out, int64_t out_row, bool add) {
  alignas(64) float tile[kTileRows * kPanel];
  int64_t blocks = ceil_div(rows, kTileRows);
  for (int64_t n = 0; n < columns; n += kPanel) {
    int64_t width = std::min<int64_t>(kPanel, columns - n);
    const auto* panel = b.data + n / kPanel * b.panel_stride;
    for (int64_t i = 0; i < blocks; ++i) {
      TileRows r = tile_rows(rows, blocks, i), next = tile_rows(rows, blocks, std::min(i + 1, blocks - 1));
      for (int64_t j = next.first; j < next.first + next.count; ++j)  // sums come from far away
        for (int64_t c = 0; c < kPanel; c += 16) __builtin_prefetch(out + j * out_row + n + c, 1);
      auto multiply_one = tile_of<Product>(r.count, width > kLanes);
      const auto* left = a.tile(i, r.first);
      float* to = out + r.first * out_row + n;
      if (width % kLanes == 0) {
        multiply_one(left, a.row_stride, a.step, panel, b.step, steps, to, out_row, add);
      } else {  // whole vectors would write over what lies behind
        multiply_one(left, a.row_stride, a.step, panel, b.step, steps, tile, kPanel, false);
        for (int64_t j = 0; j < r.count; ++j)
          for (int64_t c = 0; c < width; ++c) {
            float* sum = to + j * out_row + c;
            *sum = add ? *sum + tile[j * kPanel + c] : tile[j * kPanel + c];
          }
      }
    }
  }
}

}  // namespace PVL_ISA
}  // namespace perfvl
