// How the work is cut: bands of output rows small enough for a core's cache, dealt out to workers in equal runs; and
// the weights as the products and the depthwise loops read them.
#pragma once

#include <algorithm>

#include "cpu/bfloat16_tiles.h"
#include "cpu/pointwise_tiles.h"
#include "cpu/separable_conv_rows.h"

namespace perfvl {
namespace PVL_ISA {

struct Plan {
  int64_t band;            // output rows computed at once
  int64_t staged_rows;     // input rows that a band reads
  int64_t staged_width;    // pixels in one of these, zeros included
  int64_t inner, outputs;  // floats in a pixel of C m and of O channels
};

// `row_floats`: what a row of the band takes beside the staged rows.
inline Plan make_plan(const SeparableConv& conv, int64_t row_floats) {
  constexpr int64_t kCache = 640 * 1024 / 4;  // floats: most of a megabyte of second-level cache
  constexpr int64_t kFewest = 96;             // pixels: fewer make short products
  Plan p{};
  p.inner = staged_channels(conv.inner()), p.outputs = staged_channels(conv.outputs);
  p.staged_width = (conv.w.out - 1) * conv.w.stride + conv.w.reach() + 1;
  int64_t staged = p.staged_width * p.inner, fixed = (conv.h.reach() + 1) * staged;
  int64_t fits = (kCache - fixed) / (conv.h.stride * staged + row_floats);
  p.band = std::min(std::max({fits, ceil_div(kFewest, conv.w.out), int64_t(1)}), conv.h.out);
  p.band = ceil_div(conv.h.out, ceil_div(conv.h.out, p.band));  // equal bands
  p.staged_rows = (p.band - 1) * conv.h.stride + conv.h.reach() + 1;
  return p;
}

// The staged input rows of a band, in a circle: what the band before has staged of the same image stays.
class StagedRows {
 public:
  StagedRows(const SeparableConv& conv, const Plan& plan, float* memory, const float** table)
      : conv_(conv), plan_(plan), memory_(memory), table_(table) {}

  // [count][kernel height] rows that output rows [first, first + count) read.
  const float* const* operator()(int64_t n, int64_t first, int64_t count) {
    int64_t begin = first * conv_.h.stride, end = begin + (count - 1) * conv_.h.stride + conv_.h.reach() + 1;
    if (n != image_ || begin < begin_) end_ = begin;
    Pointwise before{conv_.scale, conv_.shift, conv_.pre};
    for (int64_t r = std::max(begin, end_); r < end; ++r)
      stage_row(conv_.input, n, r - conv_.h.pad, conv_.h.in, conv_.w.in, conv_.w.pad, plan_.staged_width,
                conv_.channels, conv_.multiplier, before, row(r), plan_.inner);
    image_ = n, begin_ = begin, end_ = end;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < conv_.h.kernel; ++i)
        table_[r * conv_.h.kernel + i] = row(begin + r * conv_.h.stride + i * conv_.h.dilation);
    return table_;
  }

 private:
  float* row(int64_t r) const { return memory_ + r % plan_.staged_rows * plan_.staged_width * plan_.inner; }

  const SeparableConv& conv_;
  const Plan& plan_;
  float* memory_;
  const float** table_;
  int64_t image_ = -1, begin_ = 0, end_ = 0;  // staged: padded rows [begin, end) of an image
};

// Depthwise weights as [tap][channel]; `flipped` for the way back.
inline void pack_depthwise(const SeparableConv& conv, int64_t stride, bool flipped, float* out) {
  int64_t taps = conv.h.kernel * conv.w.kernel;
  std::fill_n(out, taps * stride, 0.f);
  for (int64_t i = 0; i < conv.h.kernel; ++i)
    for (int64_t l = 0; l < conv.w.kernel; ++l) {
      int64_t tap = i * conv.w.kernel + l;
      float* to = out + (flipped ? taps - 1 - tap : tap) * stride;
      for (int64_t c = 0; c < conv.inner(); ++c) to[c] = read(conv.depthwise.dtype, at(conv.depthwise, c, 0, i, l));
    }
}

// The pointwise weights as operand B, in panels [k][kPanel]. transposed: k runs over input channels and columns over
// outputs (forward); else the other way round (backward).
struct PanelShape {
  int64_t columns, depth;  // of the matrix
  int64_t panels() const { return ceil_div(columns, kPanel); }
  template <class Product>
  int64_t steps() const {
    return ceil_div(depth, Product::kValues);
  }
  template <class Product>
  int64_t panel() const {  // elements
    return steps<Product>() * kPanel;
  }
};
inline PanelShape panel_shape(const SeparableConv& conv, bool transposed) {
  return transposed ? PanelShape{conv.outputs, conv.inner()} : PanelShape{conv.inner(), conv.outputs};
}

template <class Product>
void pack_panel(const SeparableConv& conv, bool transposed, int64_t panel, typename Product::Element* out) {
  constexpr int64_t kValues = Product::kValues, kBlock = 16;
  PanelShape shape = panel_shape(conv, transposed);
  const Image& w = conv.pointwise;
  int64_t first = panel * kPanel, columns = std::min<int64_t>(kPanel, shape.columns - first);
  int64_t bytes = element_bytes(w.dtype);
  int64_t column_stride = (transposed ? w.n_stride : w.c_stride) * bytes;
  int64_t depth_stride = (transposed ? w.c_stride : w.n_stride) * bytes;
  const char* corner = static_cast<const char*>(w.data) + first * column_stride;
#if defined(__AVX512BF16__)
  // What lies along k in memory, an element or whole elements: 16 columns of 16 at a time, turned in registers.
  if (depth_stride == bytes && bytes * kValues == 4 && shape.depth % kValues == 0) {
    int64_t steps = shape.steps<Product>();
    for (int64_t j = 0; j < kPanel; j += kLanes)
      for (int64_t k = 0; k < steps; k += kLanes) {
        __m512i square[kLanes];
        int64_t present = std::min<int64_t>(kLanes, steps - k);
        for (int i = 0; i < kLanes; ++i) {
          const char* from = corner + (j + i) * column_stride + k * 4;
          square[i] = j + i < columns ? _mm512_maskz_loadu_epi32(__mmask16((1u << present) - 1), from) : __m512i{};
        }
        transpose(square);
        for (int i = 0; i < kLanes && k + i < steps; ++i) _mm512_storeu_si512(out + (k + i) * kPanel + j, square[i]);
      }
    return;
  }
#endif
  alignas(64) float block[kBlock][kPanel] = {};  // columns that are not there stay 0
  for (int64_t k0 = 0; k0 < shape.depth; k0 += kBlock) {
    // 1. A block into the nearest cache, along what lies behind one another in memory.
    int64_t depth = std::min(kBlock, shape.depth - k0);
    const char* from = corner + k0 * depth_stride;
    if (column_stride == bytes) {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t j = 0; j < columns; j += kLanes)
          store(&block[k][j],
                read_lanes(w.dtype, from + k * depth_stride + j * bytes, std::min<int64_t>(kLanes, columns - j)));
    } else {
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t k = 0; k < depth; ++k) block[k][j] = read(w.dtype, from + j * column_stride + k * depth_stride);
    }
    for (int64_t k = depth; k < kBlock; ++k) std::fill_n(block[k], kPanel, 0.f);
    // 2. Out in order. Bfloat16 values lose nothing on the way.
    for (int64_t k = 0; k < depth; k += kValues, out += kPanel)
      for (int64_t j = 0; j < kPanel; j += kLanes) {
        if constexpr (kValues == 1) store(out + j, load<Vec>(&block[k][j]));
#if defined(__AVX512BF16__)
        else
          store(out + j, make_pairs(load<Vec>(&block[k][j]), load<Vec>(&block[k + 1][j])));
#endif
      }
  }
}

}  // namespace PVL_ISA
}  // namespace perfvl
