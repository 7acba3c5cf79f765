#pragma once

#include "common.h"

namespace perfvl::cuda {

// out[i, c] = scale[i * scale_stride] * rows[i, c], rounded to `dtype`; out is dense, all pointers are of the device.
// `stream` is a cudaStream_t. Returns a cudaError_t; rows must not be empty.
int scale_rows(const Matrix& rows, const float* scale, int64_t scale_stride, Dtype dtype, void* out, void* stream);

}  // namespace perfvl::cuda
