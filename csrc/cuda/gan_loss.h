#pragma once

#include "../gan_loss.h"

namespace perfvl::cuda {

// In one launch; all pointers are of the device. `stream` is a cudaStream_t. Returns a cudaError_t.
int gan_loss(const GanLoss& loss, void* stream);

}  // namespace perfvl::cuda
