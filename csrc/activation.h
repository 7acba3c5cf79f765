// What the maxout and apl ops compute on: sizes and raw pointers to dense memory. See perfvl/reference/activation.py.
#pragma once

#include "common.h"

namespace perfvl {

constexpr int64_t kMostPieces = 256;  // what a byte can name
constexpr int64_t kMostSegments = 6;  // of an adaptive piecewise linear unit, in the kernels

// output[row, c] = the largest of input[row, piece, c]; of equal ones the last wins. A row is an image in NCHW, a pixel
// in channels_last.
struct Maxout {
  const void* input;  // [rows, pieces, columns]
  int64_t rows, pieces, columns;
  Dtype dtype;
  void* output;     // [rows, columns]
  uint8_t* winner;  // null, or [rows, columns]: the piece
};

struct MaxoutBackward {
  const void* grad_output;  // [rows, columns]
  const uint8_t* winner;
  int64_t rows, pieces, columns;
  Dtype dtype;
  void* grad_input;  // [rows, pieces, columns]
};

// output = max(0, x) + sum over s of slope[s, p] max(0, hinge[s, p] - x) for x = input[o, p, i].
struct Apl {
  const void* input;  // [outer, parameters, inner]; inner is 1 where neighbours in memory have parameters of their own
  int64_t outer, parameters, inner, segments;
  const float *slope, *hinge;  // [segments, parameters]
  Dtype dtype;
  void* output;  // as the input; null in backward
};

struct AplBackward {
  Apl forward;
  const void* grad_output;
  void* grad_input;
  float *grad_slope, *grad_hinge;  // [segments, parameters]
};

}  // namespace perfvl
