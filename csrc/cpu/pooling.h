// The CPU kernels of the pooling ops: see ../pooling.h. `scratch` is 64-byte aligned.
#pragma once

#include "../pooling.h"

namespace perfvl {

struct PoolingKernel {
  int64_t (*scratch_bytes)(const Pool& pool, const Host& host);
  void (*max_average)(const Pool& pool, void* scratch, const Host& host);
  void (*stochastic)(const StochasticPool& pool, void* scratch, const Host& host);
  int64_t (*backward_scratch_bytes)(const PoolBackward& backward, const Host& host);
  void (*backward)(const PoolBackward& backward, void* scratch, const Host& host);
};

}  // namespace perfvl
