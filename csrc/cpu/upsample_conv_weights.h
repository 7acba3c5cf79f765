// The weights of an upsample_conv as its nine products read them, and the gradients of the products as one of the
// weights: w0, w0 + w1 + w2, w2 both ways.
#pragma once

#include <algorithm>

#include "cpu/image_rows.h"
#include "cpu/pointwise_tiles.h"
#include "upsample_conv.h"

namespace perfvl {
namespace PVL_ISA {

constexpr int kTaps = 9;

// block[tap][i][lane]: the weight of output o + lane, input c + i, for `outputs` and `channels` of at most a vector;
// others are 0.
typedef Vec WeightBlock[kTaps][kLanes];

inline void load_weights(const Image& w, int64_t o, int64_t outputs, int64_t c, int64_t channels, WeightBlock& block) {
  int64_t bytes = element_bytes(w.dtype);
  Vec square[kLanes];
  if (w.w_stride == 1 && w.h_stride == 3 && w.c_stride == kTaps) {  // taps of a channel behind one another
    int64_t values = channels * kTaps;
    for (int64_t s = 0; s < kTaps; ++s) {
      int64_t lanes = std::clamp<int64_t>(values - s * kLanes, 0, kLanes);
      for (int64_t k = 0; k < kLanes; ++k)
        square[k] =
            k < outputs && lanes ? read_lanes(w.dtype, at(w, o + k, c, 0, 0) + s * kLanes * bytes, lanes) : Vec{};
      transpose(square);
      for (int64_t k = 0; k < kLanes; ++k) block[(s * kLanes + k) % kTaps][(s * kLanes + k) / kTaps] = square[k];
    }
    return;
  }
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    for (int64_t k = 0; k < kLanes; ++k)
      square[k] = k < outputs ? read_channels(w, at(w, o + k, c, tap / 3, tap % 3), 0, channels) : Vec{};
    transpose(square);
    for (int64_t i = 0; i < kLanes; ++i) block[tap][i] = square[i];
  }
}

// One column of the nine taps of input i, in place: (w0, w0 + w1 + w2, w2) both ways.
inline void to_products(WeightBlock& block, int64_t i) {
  for (int r = 0; r < 3; ++r) block[3 * r + 1][i] = block[3 * r][i] + block[3 * r + 1][i] + block[3 * r + 2][i];
  for (int r = 0; r < 3; ++r) block[3 + r][i] = block[r][i] + block[3 + r][i] + block[6 + r][i];
}
// Its transpose, for gradients: (d0 + d1, d1, d2 + d1) both ways.
inline void from_products(WeightBlock& block, int64_t i) {
  for (int r = 0; r < 3; ++r) block[r][i] += block[3 + r][i], block[6 + r][i] += block[3 + r][i];
  for (int r = 0; r < 3; ++r) block[3 * r][i] += block[3 * r + 1][i], block[3 * r + 2][i] += block[3 * r + 1][i];
}

// Operand B: [panel][product][depth][kPanel]. Columns are outputs and depth runs over inputs (forward), or the other
// way round (`across`, for the gradient of the input).
struct WeightPanels {
  int64_t columns, depth;
  WeightPanels(const UpsampleConv& conv, bool across)
      : columns(across ? conv.channels : conv.outputs), depth(across ? conv.outputs : conv.channels) {}
  int64_t panels() const { return ceil_div(columns, kPanel); }
  int64_t product() const { return depth * kPanel; }   // floats
  int64_t panel() const { return kTaps * product(); }  // floats
};

inline void pack_weights(const UpsampleConv& conv, bool across, int64_t panel, float* out) {
  WeightPanels p(conv, across);
  WeightBlock block;
  Vec square[kLanes];
  for (int64_t j = 0; j < kPanel; j += kLanes) {
    int64_t column = panel * kPanel + j, columns = std::clamp<int64_t>(p.columns - column, 0, kLanes);
    for (int64_t k = 0; k < p.depth; k += kLanes) {
      int64_t depth = std::min<int64_t>(kLanes, p.depth - k);
      if (columns == 0) {
        std::fill_n(&block[0][0], kTaps * kLanes, Vec{});
      } else if (across) {
        load_weights(conv.weight, k, depth, column, columns, block);
      } else {
        load_weights(conv.weight, column, columns, k, depth, block);
      }
      for (int64_t i = 0; i < kLanes; ++i) to_products(block, i);
      for (int64_t q = 0; q < kTaps; ++q) {
        float* to = out + q * p.product() + k * kPanel + j;
        if (across) {
          std::copy_n(block[q], kLanes, square);
          transpose(square);
        }
        for (int64_t i = 0; i < depth; ++i) store(to + i * kPanel, across ? square[i] : block[q][i]);
      }
    }
  }
}

// The gradient of the weights of outputs [o, o + outputs) and inputs [c, c + channels), from `parts` sums of products
// [product][channel][row], `part_stride` floats apart.
inline void unpack_weights(const Image& out, int64_t o, int64_t outputs, int64_t c, int64_t channels, const float* sums,
                           int64_t row, int64_t parts, int64_t part_stride) {
  WeightBlock block;
  Vec square[kLanes];
  for (int64_t j = 0; j < outputs; j += kLanes)
    for (int64_t k = 0; k < channels; k += kLanes) {
      int64_t lanes = std::min<int64_t>(kLanes, outputs - j), rows = std::min<int64_t>(kLanes, channels - k);
      for (int64_t q = 0; q < kTaps; ++q)
        for (int64_t i = 0; i < kLanes; ++i) {
          Vec sum{};
          for (int64_t part = 0; part < parts && i < rows; ++part)
            sum += read_lanes(Dtype::float32, sums + part * part_stride + (q * channels + k + i) * row + j, lanes);
          block[q][i] = sum;
        }
      for (int64_t i = 0; i < rows; ++i) from_products(block, i);
      for (int64_t s = 0; s < kTaps; ++s) {
        int64_t values = std::clamp<int64_t>(rows * kTaps - s * kLanes, 0, kLanes);
        if (values == 0) break;
        for (int64_t i = 0; i < kLanes; ++i) square[i] = block[(s * kLanes + i) % kTaps][(s * kLanes + i) / kTaps];
        transpose(square);
        for (int64_t i = 0; i < lanes; ++i)
          write_lanes(out.dtype,
                      const_cast<char*>(at(out, o + j + i, c + k, 0, 0)) + s * kLanes * element_bytes(out.dtype),
                      square[i], values);
      }
    }
}

}  // namespace PVL_ISA
}  // namespace perfvl
