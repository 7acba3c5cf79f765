// The kernels of norm_act of one ISA level. `scratch` is 64-byte aligned.
#pragma once

#include "../norm_act.h"

namespace perfvl {

struct NormActKernel {
  int64_t (*scratch_bytes)(const NormAct&);
  void (*forward)(const NormAct&, void* scratch, const Host&);
  int64_t (*backward_scratch_bytes)(const NormActBackward&);
  void (*backward)(const NormActBackward&, void* scratch, const Host&);
};

}  // namespace perfvl
