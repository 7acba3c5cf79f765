// What both sides of small_loss_mask and of the two-network losses are given.
//
// The order of losses is that of (loss, row), NaN last. Whether a row is kept must not depend on who computes it, so
// every backend and instruction-set level computes losses by the same float32 operations in the same order:
//   - sums over classes: 32 partial sums (class c goes to number c mod 32, missing classes count as -inf logits),
//   folded
//     by halves: partial sum i += i + 16, then + 8, + 4, + 2, + 1;
//   - products and sums round one by one, never as fused multiply-adds;
//   - e^x by the polynomial of `exp_terms`; the logarithm in float64, rounded once.
#pragma once

#include "common.h"

namespace perfvl {

// A number per group: one for all, or one each.
struct Scalars {
  double value;
  const void* tensor;  // null, or where the numbers are instead, on the device of the losses
  int64_t stride;      // in elements; 0: one for all
  bool is_double;      // else float
};

// Row g of the mask keeps the floor(rate n) smallest losses of its candidates, n counting candidates (in float64).
struct SmallLossMask {
  const void* losses;
  int64_t groups, rows, group_stride, row_stride;  // strides in elements
  Dtype dtype;
  Scalars keep_rate;
  const uint8_t* candidates;  // null: every row
  int64_t candidate_group_stride, candidate_row_stride;
  uint8_t* mask;  // [groups, rows]
};

enum class TwinMethod : int32_t { decoupling, co_teaching, co_teaching_plus, jocor };

struct Logits {
  const void* data;  // [groups, rows, classes]; null in a backward pass that needs no gradient of this network
  int64_t group_stride, row_stride, class_stride;  // in elements
};

// What backward needs of a row and network: softmax is e^(z - max - log_sum).
struct RowStats {
  float max, log_sum;
  float extra;  // JoCoR: sum p d or sum q d. Cross-entropy of probabilities: the log of their sum of exponentials
};

// perfvl/reference/small_loss.py defines the losses. Network 0 here is network 1 there.
struct TwinLoss {
  int64_t groups, rows, classes;
  Dtype dtype;
  Logits logits[2];
  const int64_t* labels;
  int64_t label_group_stride, label_row_stride;
  TwinMethod method;
  bool released;          // the released code's arithmetic instead of the paper's
  float co_lambda;        // JoCoR
  double least_fraction;  // Decoupling as released: of the rows that the denominator counts at least
  Scalars forget_rate;
  int64_t step;                // Co-teaching+ as released
  const int64_t* step_tensor;  // null, or where the step is instead
  const int64_t* sample_ids;   // null, or the rows' positions in the data set: Co-teaching+ as released
  int64_t id_group_stride, id_row_stride;
  // Outputs.
  float* losses[2];     // [groups] each
  uint8_t* kept[2];     // [groups, rows] each: rows that train the network
  float* coefficients;  // [2, groups, rows]: of the row's loss in the network's loss, 0 where rejected
  RowStats* stats;      // [2, groups, rows]

  bool of_probabilities() const { return released && method == TwinMethod::co_teaching_plus; }
  bool looks_at_disagreement() const {
    return method == TwinMethod::decoupling || method == TwinMethod::co_teaching_plus;
  }
};

// The gradient of sum_g upstream_g loss_g by the logits; exactly 0 for rejected rows.
struct TwinLossBackward {
  TwinLoss forward;          // shapes, logits, labels, method, co_lambda, coefficients, stats
  const float* upstream[2];  // of the loss of each network, or null; JoCoR has one loss: upstream[0]
  int64_t upstream_stride[2];
  void* gradients[2];  // [groups, rows, classes] in the dtype of the logits, dense; null: not needed
};

// Rows kept of `count` candidates, as Python evaluates int(rate * count), within [0, count]; 0 for NaN.
inline int64_t keep_count(double rate, int64_t count) {
  double kept = rate * double(count);
  return kept >= double(count) ? count : kept >= 1.0 ? int64_t(kept) : 0;
}

// Order-preserving 32-bit keys. -0 and 0 are one number, and all NaN are one, after +inf.
constexpr uint32_t kNanKey = 0xfffffffeu;
constexpr uint32_t kNoCandidate = 0xffffffffu;  // after every loss

}  // namespace perfvl
