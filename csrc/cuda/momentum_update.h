#pragma once

#include "../momentum_update.h"

namespace perfvl::cuda {

// Every target <- average of target and source (csrc/momentum_update.h), in one launch per 880 pairs; all pointers
// are of the device, no element is written twice. `stream` is a cudaStream_t. Returns a cudaError_t.
int momentum_update(const MomentumPair* pairs, int64_t count, const MomentumWeights& weights, void* stream);

}  // namespace perfvl::cuda
