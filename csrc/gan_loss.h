// What both sides of gan_loss are given: see perfvl/reference/gan_loss.py.
#pragma once

#include "common.h"

namespace perfvl {

constexpr int kMostHeads = 16;

struct GanHead {
  const void* logits;        // [rows]
  int64_t rows, stride;      // in elements
  float target, complement;  // y and 1 - y
  float weight;
};

// total = sum over heads of weight * mean over rows of the cross-entropy.
struct GanLoss {
  GanHead heads[kMostHeads];
  int32_t count;  // at least 1
  Dtype dtype;
  bool exact;            // BCELoss of a float32 sigmoid instead of the logits' own
  float *total, *means;  // [], [count]
  float* grad;           // null, or [rows of all heads]: of the total
};

}  // namespace perfvl
