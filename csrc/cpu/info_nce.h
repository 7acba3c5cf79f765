// The arguments of the InfoNCE kernel and the kernel table of one ISA level.
#pragma once

#include "common.h"

namespace perfvl {

struct InfoNceArgs {
  Matrix query, positive, queue;  // [B, d], [B, d], [K, d]
  float scale;                    // 1 / temperature
  bool bfloat16_products;         // operands of both products rounded to bfloat16, as autocast does
  float row_factor;               // 1, or 1 / B where the mean is taken
  // Outputs. Per row, dense; rank, grad_query and positive_weight may be null.
  float* loss;
  float* lse;
  float* positive_logit;
  int32_t* rank;           // how many negatives score at least as high as the positive
  float* grad_query;       // [B, d], row_factor * d loss_i / d query_i
  float* positive_weight;  // row_factor * (1 - softmax probability of the positive)
  Host host;
};

// Both are declared once per compiled level (see isa.h) and picked at run time.
struct InfoNceKernel {
  int64_t (*scratch_bytes)(const InfoNceArgs&);
  void (*run)(const InfoNceArgs&, void* scratch);  // scratch: 64-byte aligned
};

}  // namespace perfvl
