// What the pooling ops compute on: checked sizes and raw pointers. The same on every device; knows no torch.
#pragma once

#include <algorithm>

#include "image.h"

namespace perfvl {

// Windows along one axis. Window `o` begins at o * stride - padding; of it counts what lies inside the image.
struct PoolSide {
  int64_t in, out;  // pixels, and windows
  int64_t kernel, stride, padding;

  int64_t begin(int64_t o) const { return o * stride - padding; }
  int64_t first(int64_t o) const { return std::max<int64_t>(begin(o), 0); }
  int64_t last(int64_t o) const { return std::min(begin(o) + kernel, in); }  // one past it
  // Pixels of the padded image in the window: what an average is divided by.
  int64_t extent(int64_t o) const { return std::min(begin(o) + kernel, in + padding) - begin(o); }
  // Windows that hold pixel `i`: from the first to one before the last.
  int64_t first_over(int64_t i) const {
    int64_t reach = i + padding - kernel + 1;
    return reach > 0 ? std::min((reach + stride - 1) / stride, out) : 0;
  }
  int64_t last_over(int64_t i) const { return std::min((i + padding) / stride + 1, out); }
};

// Positions inside windows, row * kernel width + column, of any strides. `data` is null where they are not wanted.
struct Positions {
  uint8_t* data;
  int64_t n_stride, c_stride, h_stride, w_stride;
};

// output[n, c, oh, ow] = maximum + average of the window, the average with zeros for padding. Positions: of the first
// largest element, or of the last NaN. Every window holds a pixel of the image.
struct Pool {
  Image input;
  int64_t batch, channels;
  PoolSide h, w;
  Image output;
  Positions positions;
};

// Zeiler and Fergus' stochastic pooling. With `uniform` (float32, as large as the output), the element at which the sum
// of the window so far first reaches that share of the whole; else the expectation of it, without positions.
struct StochasticPool {
  Pool pool;
  Image uniform;
};

// grad_input = what every window that holds the pixel sends it: all of its gradient to the position, and, with
// `average`, an equal share to every pixel of the padded window.
struct PoolBackward {
  Image grad_output;
  Positions positions;
  int64_t batch, channels;
  PoolSide h, w;
  bool average;
  Image grad_input;
};

}  // namespace perfvl
