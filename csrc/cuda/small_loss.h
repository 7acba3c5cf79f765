// The CUDA side of the small_loss ops: see small_loss.h. Torch-free; every function returns a cudaError_t.
#pragma once

#include "../small_loss.h"

namespace perfvl::cuda {

// There is at least one row. `scratch` is uninitialised device memory, a multiple of 64 bytes.
int64_t mask_scratch_bytes(const SmallLossMask& mask);
int small_loss_mask(const SmallLossMask& mask, void* scratch, void* stream);

// There is at least one row, and between 1 and 2^31 - 256 classes. A row whose label is not a class has the loss NaN.
int64_t twin_scratch_bytes(const TwinLoss& loss);
int twin_loss(const TwinLoss& loss, void* scratch, void* stream);
int twin_loss_backward(const TwinLossBackward& backward, void* stream);

}  // namespace perfvl::cuda
