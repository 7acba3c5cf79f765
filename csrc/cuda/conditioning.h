// The CUDA side of the conditioning ops: see ../conditioning.h. Torch-free; every function returns a cudaError_t.
#pragma once

#include "../conditioning.h"

namespace perfvl::cuda {

// There is at least one sample, channel and pixel, and a channel has at most 2^30 pixels. Outputs are dense.
int add_taps(const AddTaps& problem, void* stream);
int tap_sums(const TapSums& problem, void* stream);

// There is at least one row and column. `scratch` is uninitialised device memory.
int64_t augment_scratch_bytes(const Augmentation& problem);
int augment(const Augmentation& problem, void* scratch, void* stream);
int augment_backward(const AugmentationBackward& problem, void* stream);

}  // namespace perfvl::cuda
