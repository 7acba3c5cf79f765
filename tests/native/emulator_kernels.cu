#include "cuda/launch.cuh"
#include "emulator_kernels.h"

namespace emulator_kernels {
namespace {

using namespace perfvl::cuda;
constexpr unsigned kEverybody = 0xffffffffu;

__device__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kEverybody, x, step);
  return x;
}

__global__ void block_sums_kernel(const float* in, int64_t n, float* out, int per_block) {
  __shared__ float sums[32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int b = blockIdx.x; b < per_block; b += gridDim.x) {
    float x = 0;
    for (int64_t i = int64_t(b) * blockDim.x + threadIdx.x; i < n; i += int64_t(per_block) * blockDim.x) x += in[i];
    x = warp_sum(x);
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    if (warp == 0) {
      x = warp_sum(lane < int(blockDim.x) / 32 ? sums[lane] : 0.f);
      if (lane == 0) out[b] = x;
    }
    __syncthreads();
  }
}

template <bool kBarrier>
__global__ void reversed_kernel(const float* in, int n, float* out) {
  float* copy = dynamic_shared<float>();
  int i = threadIdx.x;
  copy[i] = in[i];
  if (kBarrier) __syncthreads();
  out[i] = copy[n - 1 - i];
}

__global__ void shared_at_start_kernel(float* out) {
  __shared__ float fixed;
  float* dynamic = dynamic_shared<float>();
  out[2 * blockIdx.x] = fixed;
  out[2 * blockIdx.x + 1] = *dynamic;
  fixed = *dynamic = 1.f;
}

__global__ void kept_positive_kernel(const float* in, int n, float* out, int* count) {
  int i = threadIdx.x;
  bool keep = i < n && in[i] > 0;
  unsigned kept = __ballot_sync(kEverybody, keep);
  if (keep) out[__popc(kept & ((1u << i) - 1))] = in[i];
  if (keep) atomicAdd(count, 1);
  __syncwarp();
  if (kept && i == __ffs(int(kept)) - 1) *count = -*count;  // the first one kept, after everybody counted
}

__global__ void shuffles_kernel(int* out) {
  int lane = threadIdx.x;
  out[lane] = __shfl_sync(kEverybody, lane, 5, 8);
  out[32 + lane] = __shfl_up_sync(kEverybody, lane, 3, 16);
  out[64 + lane] = __shfl_down_sync(kEverybody, lane, 3, 16);
  out[96 + lane] = __shfl_xor_sync(kEverybody, lane, 7);
  out[128 + lane] = int(__shfl_xor_sync(kEverybody, double(lane), 12, 8));
}

__global__ void two_groups_kernel(int* out) {
  int lane = threadIdx.x, x = lane;
  if (lane < 16) {
    x = __shfl_xor_sync(0xffffu, x, 1);
    x = 100 + __shfl_xor_sync(0xffffu, x, 2);
  } else {
    x = 200 + __shfl_xor_sync(0xffff0000u, x, 1);
  }
  out[lane] = __shfl_xor_sync(kEverybody, x, 16);
}

__global__ void scaled_by_four_kernel(const float4* in, int n, float4* out) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    float4 v = in[i];
    out[i] = make_float4(4 * v.x, 4 * v.y, 4 * v.z, 4 * v.w);
  }
}

__global__ void to_half_and_back_kernel(const float* in, int n, __half* half, __nv_bfloat16* bfloat, float* from_half,
                                        float* from_bfloat) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    half[i] = from_float<__half>(in[i]);
    bfloat[i] = from_float<__nv_bfloat16>(in[i]);
    from_half[i] = to_float(half[i]);
    from_bfloat[i] = to_float(bfloat[i]);
  }
}

__global__ void barrier_in_a_branch_kernel() {
  if (threadIdx.x < blockDim.x / 2) __syncthreads();
}

__global__ void different_barriers_kernel() {
  if (threadIdx.x < blockDim.x / 2)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void shuffle_without_everybody_kernel() {
  if (threadIdx.x != 7) __shfl_xor_sync(kEverybody, 1, 1);
}

__global__ void shuffle_from_outside_the_mask_kernel() {
  if (threadIdx.x < 4) __shfl_sync(0xfu, 1, 9);
}

__global__ void one_past_shared_kernel(int n) {
  __shared__ float values[32];
  float* volatile value = values;  // UBSan knows the bounds of what it sees, AddressSanitizer those of memory
  for (int i = threadIdx.x; i <= n; i += blockDim.x) value[i] = 0.f;
}

__global__ void nothing() {}

}  // namespace

int block_sums(const float* in, int64_t n, float* out, int blocks, int threads) {
  return launch(block_sums_kernel, dim3(blocks), dim3(threads), 0, nullptr, in, n, out, blocks);
}
int reversed(const float* in, int n, float* out, bool barrier) {
  return launch(barrier ? reversed_kernel<true> : reversed_kernel<false>, dim3(1), dim3(n), n * sizeof(float), nullptr,
                in, n, out);
}
int shared_at_start(float* out, int blocks) {
  return launch(shared_at_start_kernel, dim3(blocks), dim3(1), sizeof(float), nullptr, out);
}
int kept_positive(const float* in, int n, float* out, int* count) {
  return launch(kept_positive_kernel, dim3(1), dim3(32), 0, nullptr, in, n, out, count);
}
int shuffles(int* out) { return launch(shuffles_kernel, dim3(1), dim3(32), 0, nullptr, out); }
int two_groups(int* out) { return launch(two_groups_kernel, dim3(1), dim3(32), 0, nullptr, out); }
int scaled_by_four(const float* in, int n, float* out) {
  return launch(scaled_by_four_kernel, dim3(3), dim3(32), 0, nullptr, reinterpret_cast<const float4*>(in), n / 4,
                reinterpret_cast<float4*>(out));
}
int to_half_and_back(const float* in, int n, uint16_t* half, uint16_t* bfloat, float* from_half, float* from_bfloat) {
  return launch(to_half_and_back_kernel, dim3(4), dim3(32), 0, nullptr, in, n, reinterpret_cast<__half*>(half),
                reinterpret_cast<__nv_bfloat16*>(bfloat), from_half, from_bfloat);
}
int barrier_in_a_branch(int threads) { return launch(barrier_in_a_branch_kernel, dim3(1), dim3(threads), 0, nullptr); }
int different_barriers(int threads) { return launch(different_barriers_kernel, dim3(1), dim3(threads), 0, nullptr); }
int shuffle_without_everybody(int threads) {
  return launch(shuffle_without_everybody_kernel, dim3(1), dim3(threads), 0, nullptr);
}
int shuffle_from_outside_the_mask() {
  return launch(shuffle_from_outside_the_mask_kernel, dim3(1), dim3(32), 0, nullptr);
}
int one_past_shared() { return launch(one_past_shared_kernel, dim3(1), dim3(16), 0, nullptr, 32); }
int misaligned_vector(const float* in, float* out) { return scaled_by_four(in + 1, 4, out); }
int launch_only(unsigned grid, unsigned block, int64_t shared_bytes) {
  return launch(nothing, dim3(grid), dim3(block), size_t(shared_bytes), nullptr);
}

}  // namespace emulator_kernels
