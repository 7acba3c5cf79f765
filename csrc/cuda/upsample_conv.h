#pragma once

#include "../image.h"

namespace perfvl::cuda {

// The weights of the transposed convolution (kernel 4, stride 2, padding 1) that upsampling and a 3x3 convolution are,
// and the gradient of the latter's from that of the former's. `weight` and `grad_weight` are [O, C, 3, 3], `kernel` and
// `grad_kernel` [C, O, 4, 4]; what is written is dense, or channels_last. `scale` [O] may be null.
// All pointers are of the device, `stream` is a cudaStream_t. Returns a cudaError_t; nothing may be empty.
int upsample_weight(const Image& weight, const float* scale, int64_t outputs, int64_t channels, const Image& kernel,
                    void* stream);
int upsample_weight_backward(const Image& grad_kernel, int64_t outputs, int64_t channels, const Image& grad_weight,
                             void* stream);

}  // namespace perfvl::cuda
