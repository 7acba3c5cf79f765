// Sums of channels: over the workers of a block, then by a second kernel over blocks, in one fixed order.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/separable_conv_tiles.cuh"

namespace perfvl::cuda {
namespace {

// `values` of the block's width in shared memory; whoever has `thread` < width gets the sum over the block's workers.
template <int V>
__device__ inline float sum_over_workers(const float (&x)[V], int width, float* shared) {
  int lanes = int(blockDim.x), thread = int(threadIdx.y) * lanes + int(threadIdx.x);
  int warp = thread / 32, warps = int(blockDim.x * blockDim.y) / 32;
  __syncthreads();  // of a sum before this one, everybody has read
#pragma unroll
  for (int v = 0; v < V; ++v) {
    float sum = x[v];
    for (int step = 16; step >= lanes; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
    if (thread % 32 < lanes) shared[warp * width + int(threadIdx.x) * V + v] = sum;
  }
  __syncthreads();
  float sum = 0.f;
  if (thread < width)
    for (int w = 0; w < warps; ++w) sum += shared[w * width + thread];
  return sum;
}

// Rows from `begin` to `end` of sums over the block's workers, into to[kRows][stride], of which `channels` are there.
template <int kRows, int V>
__device__ inline void store_sums(float (&x)[kRows][V], int begin, int end, int width, float* shared, int64_t channels,
                                  int64_t stride, float* to) {
  int lanes = int(blockDim.x), threads = lanes * int(blockDim.y), thread = int(threadIdx.y) * lanes + int(threadIdx.x);
  __syncthreads();  // of what lay in `shared`, everybody has read
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      for (int step = 16; step >= lanes; step /= 2) x[r][v] += __shfl_xor_sync(kWholeWarp, x[r][v], step);
      if (thread % 32 < lanes) shared[(thread / 32 * kRows + r) * width + int(threadIdx.x) * V + v] = x[r][v];
    }
  }
  __syncthreads();
  for (int e = begin * width + thread; e < end * width; e += threads) {
    int r = e / width, of = e - r * width;
    float sum = 0.f;
    for (int warp = 0; warp < threads / 32; ++warp) sum += shared[warp * kRows * width + e];
    if (of < channels) to[r * stride + of] = sum;
  }
}

// Partial sums [parts][rows][channels], of which rows from `first` to `last` are wanted. Row r < taps goes to
// weight[c, r], the two rows after these to scale and shift.
struct PartialSums {
  const float* partials;
  int64_t parts, channels, rows, first, last, taps;
  void* weight;
  float *scale, *shift;
};

template <class T>
__global__ void __launch_bounds__(kFinishLanes* kFinishWorkers)
    sum_parts_kernel(const __grid_constant__ PartialSums s) {
  __shared__ float sums[kFinishWorkers][kFinishLanes];
  int lane = int(threadIdx.x), worker = int(threadIdx.y);
  unsigned wanted = unsigned(s.last - s.first);
  int64_t row = s.first + blockIdx.x % wanted, channel = int64_t(blockIdx.x / wanted) * kFinishLanes + lane;
  float sum = 0.f;
  if (channel < s.channels) {
#pragma unroll 4
    for (int64_t part = worker; part < s.parts; part += kFinishWorkers)
      sum += s.partials[(part * s.rows + row) * s.channels + channel];
  }
  sums[worker][lane] = sum;
  __syncthreads();
  if (worker != 0 || channel >= s.channels) return;
  for (int i = 1; i < kFinishWorkers; ++i) sum += sums[i][lane];
  if (row < s.taps)
    static_cast<T*>(s.weight)[channel * s.taps + row] = from_float<T>(sum);
  else
    (row == s.taps ? s.scale : s.shift)[channel] = sum;
}

template <class T>
int sum_parts(const PartialSums& s, void* stream) {
  dim3 grid(unsigned((s.last - s.first) * ceil_div(s.channels, kFinishLanes)));
  return launch(sum_parts_kernel<T>, grid, dim3(kFinishLanes, kFinishWorkers), 0, stream, s);
}

// The gradients that are wanted, from partials[parts][taps, scale, shift][channels].
template <class T>
int sum_parts_of(const DepthwiseConvBackward& b, const float* partials, int64_t parts, void* stream) {
  int64_t taps = b.forward.h.kernel * b.forward.w.kernel;
  int64_t from = b.grad_weight ? 0 : taps, to = b.grad_scale ? taps + 2 : taps;
  if (from == to) return 0;
  PartialSums sums{partials, parts, b.forward.channels, taps + 2, from, to, taps};
  sums.weight = b.grad_weight, sums.scale = b.grad_scale, sums.shift = b.grad_shift;
  return sum_parts<T>(sums, stream);
}

}  // namespace
}  // namespace perfvl::cuda
