// The kernels of maxout and apl of one ISA level.
#pragma once

#include "../activation.h"

namespace perfvl {

struct ActivationKernel {
  void (*maxout)(const Maxout&, const Host&);
  void (*maxout_backward)(const MaxoutBackward&, const Host&);
  void (*apl)(const Apl&, const Host&);
  int64_t (*apl_backward_scratch_bytes)(const AplBackward&);
  void (*apl_backward)(const AplBackward&, void* scratch, const Host&);
};

}  // namespace perfvl
