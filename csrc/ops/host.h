// What the CPU side of all of perfvl's torch ops needs: tensors in, raw pointers to the kernels. Built on libtorch's
// stable ABI, so one binary serves every torch from 2.11 on. Schemas are defined in Python (perfvl/ops), as is every
// check of arguments.
#pragma once

#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/isa.h"
#include "tensor.h"

namespace perfvl {

// torch's threads and products, for the kernels.
Host host();

Tensor empty_float(const std::vector<int64_t>& sizes);
Tensor scratch_of(int64_t bytes);
// Scratch that the calling thread keeps for its next call, up to a limit: tens of megabytes would be mapped and cleared
// by the system for every call, which takes as long as the work of a layer.
Tensor kept_scratch_of(int64_t bytes);

}  // namespace perfvl
