// Sums over a warp and over a block, each in one fixed order.
#pragma once

#include "cuda/launch.cuh"

namespace perfvl::cuda {
namespace {

constexpr unsigned kEverybody = 0xffffffffu;  // all lanes of a warp

template <class T>
__device__ T warp_sum(T x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kEverybody, x, step);
  return x;
}

// The sum over the threads of the block, whole warps of them; all must call.
template <class T>
__device__ T block_sum(T x, unsigned thread, unsigned warps) {
  __shared__ T sums[32];
  x = warp_sum(x);
  __syncthreads();  // of a sum before this one, everybody has read
  if (thread % 32 == 0) sums[thread / 32] = x;
  __syncthreads();
  x = sums[0];
  for (unsigned i = 1; i < warps; ++i) x += sums[i];
  return x;
}
template <class T>
__device__ T block_sum(T x) {  // of a block that is one row of threads
  return block_sum(x, threadIdx.x, blockDim.x / 32);
}

}  // namespace
}  // namespace perfvl::cuda
