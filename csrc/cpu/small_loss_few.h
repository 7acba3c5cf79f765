// Losses and gradients of up to 16 classes: a vector holds one class of many rows.
//
// A row of 10 classes fills no vector, and three quarters of its time are spent in sums across the vector and in
// waiting for them. Here all rows of a tile are summed at once, in the same order of classes and so to the same bits.
#pragma once

#include "cpu/small_loss_rows.h"

namespace perfvl {
namespace PVL_ISA {

constexpr int64_t kFewClasses = 16;

inline bool few_classes(const TwinLoss& w) {
  return w.classes <= kFewClasses && !w.of_probabilities() && w.method != TwinMethod::jocor;
}

// Rows first, first + 1, ... of all groups, as many as a vector has lanes or as there are.
struct RowTile {
  int64_t first, count, group[kLanes], row[kLanes], label[kLanes];

  RowTile(const TwinLoss& w, int64_t first, int64_t end) : first(first), count(std::min<int64_t>(kLanes, end - first)) {
    int64_t g = first / w.rows, r = first % w.rows;
    for (int64_t i = 0; i < count; ++i, ++r) {
      if (r == w.rows) r = 0, ++g;
      group[i] = g, row[i] = r, label[i] = label_of(w, g, r);
    }
  }
};

// z[c]: class c of the tile's rows, 0 beyond them.
inline void load_columns(const TwinLoss& w, int network, const RowTile& tile, Vec* z) {
  const Logits& l = w.logits[network];
  float block[kFewClasses][kLanes] = {};
  for (int64_t i = 0; i < tile.count; ++i) {
    int64_t at = tile.group[i] * l.group_stride + tile.row[i] * l.row_stride;
    if (w.dtype == Dtype::float32) {
      const float* row = static_cast<const float*>(l.data) + at;
      for (int64_t c = 0; c < w.classes; ++c) block[c][i] = row[c * l.class_stride];
    } else {
      Matrix row{l.data, 1, w.classes, at, l.class_stride, w.dtype};
      for (int64_t c = 0; c < w.classes; ++c) block[c][i] = element(row, 1, c);
    }
  }
  for (int64_t c = 0; c < w.classes; ++c) z[c] = load<Vec>(block[c]);
}

// As torch.argmax: the first of the largest, NaN being larger than anything.
inline IntVec argmax_of_columns(const Vec* z, int64_t classes, Vec top) {
  IntVec largest{}, nan = IntVec{} - 1;
  for (int64_t c = classes - 1; c >= 0; --c) {
    IntVec here = IntVec{} + int32_t(c);
    largest = z[c] == top ? here : largest;
    nan = z[c] == z[c] ? nan : here;
  }
  return nan >= 0 ? nan : largest;
}

// Losses [2] of each row, and whether the networks agree on it.
inline void measure_columns(const TwinLoss& w, const RowTile& tile, float (*loss)[kLanes], bool* agrees) {
  IntVec choice[2] = {};
  for (int network = 0; network < 2; ++network) {
    Vec z[kFewClasses], sums[kFewClasses] = {};
    load_columns(w, network, tile, z);
    Vec top = z[0];
    for (int64_t c = 1; c < w.classes; ++c) top = max(top, z[c]);
    for (int64_t c = 0; c < w.classes; ++c) sums[c] = exp_terms(z[c] - top);
    for (int64_t width = kFewClasses / 2; width > 0; width /= 2)
      for (int64_t c = 0; c < width; ++c) sums[c] += sums[c + width];
    if (w.looks_at_disagreement()) choice[network] = argmax_of_columns(z, w.classes, top);
    RowStats* stats = w.stats + network * w.groups * w.rows + tile.first;
    for (int64_t i = 0; i < tile.count; ++i) {
      stats[i] = {top[i], log_of(sums[0][i]), 0.f};
      loss[network][i] = stats[i].log_sum - (z[tile.label[i]][i] - stats[i].max);
    }
  }
  if (!w.looks_at_disagreement()) return;
  for (int64_t i = 0; i < tile.count; ++i) agrees[i] = choice[0][i] == choice[1][i];
}

// The gradients of a tile's rows by the logits of one network.
inline void differentiate_columns(const TwinLossBackward& b, int network, const RowTile& tile) {
  const TwinLoss& w = b.forward;
  int64_t at = network * w.groups * w.rows + tile.first;
  float scales[kLanes] = {}, tops[kLanes] = {}, logs[kLanes] = {};
  int32_t labels[kLanes] = {}, kept[kLanes] = {};
  for (int64_t i = 0; i < tile.count; ++i) {
    const RowStats& stats = w.stats[at + i];
    kept[i] = w.coefficients[at + i] != 0.f ? -1 : 0;
    scales[i] = w.coefficients[at + i] * b.upstream[network][tile.group[i] * b.upstream_stride[network]];
    tops[i] = stats.max, logs[i] = stats.log_sum, labels[i] = int32_t(tile.label[i]);
  }
  Vec z[kFewClasses], scale = load<Vec>(scales), top = load<Vec>(tops), log_sum = load<Vec>(logs);
  IntVec label = load<IntVec>(labels), keep = load<IntVec>(kept);
  load_columns(w, network, tile, z);
  float block[kFewClasses][kLanes];
  for (int64_t c = 0; c < w.classes; ++c) {
    Vec softmax = exp2(((z[c] - top) - log_sum) * kLog2e);
    Vec target = from_bits(bits(broadcast(1.f)) & (label == int32_t(c)));
    store(block[c], from_bits(bits((softmax - target) * scale) & keep));
  }
  int64_t first = tile.first * w.classes;
  for (int64_t i = 0; i < tile.count; ++i)
    for (int64_t c = 0; c < w.classes; ++c) {
      int64_t to = first + i * w.classes + c;
      if (w.dtype == Dtype::float32)
        static_cast<float*>(b.gradients[network])[to] = block[c][i];
      else
        static_cast<uint16_t*>(b.gradients[network])[to] =
            w.dtype == Dtype::bfloat16 ? float_to_bfloat(block[c][i]) : float_to_half(block[c][i]);
    }
}

}  // namespace PVL_ISA
}  // namespace perfvl
