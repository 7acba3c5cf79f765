// Mean and variance of channels: over the workers of a block, then by a second kernel over blocks, in one fixed order.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/separable_conv_tiles.cuh"

namespace perfvl::cuda {
namespace {

struct Moments {
  float count = 0.f, mean = 0.f, squares = 0.f;  // squares of deviations from the mean

  // Chan, Golub and LeVeque. Never a sum of squares of the numbers themselves: it loses a small variance.
  __device__ void add(float other_count, float other_mean, float other_squares) {
    if (other_count == 0.f) return;
    float total = count + other_count, share = other_count / total, delta = other_mean - mean;
    mean += delta * share;
    squares += other_squares + delta * delta * count * share;
    count = total;
  }
};

// Moments [parts][3][channels] of the block's workers.
template <int V>
__device__ inline void store_moments(Moments (&moments)[V], int64_t first, int64_t channels, int width, unsigned part,
                                     float* shared, float* partials) {
  int lanes = int(blockDim.x), thread = int(threadIdx.y) * lanes + int(threadIdx.x);
  int warp = thread / 32, warps = int(blockDim.x * blockDim.y) / 32;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    Moments& m = moments[v];
    for (int step = 16; step >= lanes; step /= 2) {
      float count = __shfl_xor_sync(kWholeWarp, m.count, step), mean = __shfl_xor_sync(kWholeWarp, m.mean, step);
      float squares = __shfl_xor_sync(kWholeWarp, m.squares, step);
      m.add(count, mean, squares);
    }
    if (thread % 32 >= lanes) continue;
    float* to = shared + warp * 3 * width + int(threadIdx.x) * V + v;
    to[0] = m.count, to[width] = m.mean, to[2 * width] = m.squares;
  }
  __syncthreads();
  if (thread >= width || first + thread >= channels) return;
  Moments sum;
  for (int w = 0; w < warps; ++w) {
    const float* from = shared + w * 3 * width + thread;
    sum.add(from[0], from[width], from[2 * width]);
  }
  float* to = partials + int64_t(part) * 3 * channels + first + thread;
  to[0] = sum.count, to[channels] = sum.mean, to[2 * channels] = sum.squares;
}

__global__ void __launch_bounds__(kFinishLanes* kFinishWorkers)
    merge_moments_kernel(const float* partials, int64_t parts, int64_t channels, float* mean, float* variance) {
  __shared__ float counts[kFinishWorkers][kFinishLanes], means[kFinishWorkers][kFinishLanes];
  __shared__ float squares[kFinishWorkers][kFinishLanes];
  int lane = int(threadIdx.x), worker = int(threadIdx.y);
  int64_t channel = int64_t(blockIdx.x) * kFinishLanes + lane;
  Moments sum;
  if (channel < channels) {
#pragma unroll 4
    for (int64_t part = worker; part < parts; part += kFinishWorkers) {
      const float* from = partials + part * 3 * channels + channel;
      sum.add(from[0], from[channels], from[2 * channels]);
    }
  }
  counts[worker][lane] = sum.count, means[worker][lane] = sum.mean, squares[worker][lane] = sum.squares;
  __syncthreads();
  if (worker != 0 || channel >= channels) return;
  for (int i = 1; i < kFinishWorkers; ++i) sum.add(counts[i][lane], means[i][lane], squares[i][lane]);
  mean[channel] = sum.mean, variance[channel] = sum.squares / sum.count;
}

}  // namespace
}  // namespace perfvl::cuda
