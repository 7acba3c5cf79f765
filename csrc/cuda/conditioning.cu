// StackGAN's conditioning: from the numbers of nine taps to pixels, from pixels back to taps, and the condition itself.
//
// add_taps reads and writes the image once (8 bytes an element in float32), tap_sums reads it once; the nine numbers of
// a channel come from the nearest cache. The condition of a batch has some thousand elements: one block and one launch
// for what takes PyTorch a dozen.
#include <algorithm>

#include "cuda/conditioning.h"
#include "cuda/reduce.cuh"

namespace perfvl::cuda {
namespace {

constexpr int kThreads = 256, kTaps = 9;
constexpr int64_t kBlocks = 4096;  // enough for any GPU; what is left is done in further turns

struct Place {
  int64_t n, c;
  int h, w;
};

template <class T>
__device__ const T* pixel_of(const Image& x, const Place& at) {
  return static_cast<const T*>(x.data) + at.n * x.n_stride + at.c * x.c_stride + at.h * x.h_stride + at.w * x.w_stride;
}

// A thread for each element of a sample of the dense output, in its order. Index is 32 bits wide where that will do:
// the divisions are most of the work.
template <class T, bool kLast, class Index>
__global__ void __launch_bounds__(kThreads) add_taps_kernel(const __grid_constant__ AddTaps p) {
  Index channels = Index(p.channels), pixels = Index(p.height * p.width), width = Index(p.width);
  Index count = channels * pixels, step = Index(gridDim.x) * kThreads;
  for (int64_t n = blockIdx.y; n < p.batch; n += gridDim.y)
    for (Index i = Index(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
      Index c = kLast ? i % channels : i / pixels, pixel = kLast ? i / channels : i % pixels;
      Place at{n, int64_t(c), int(pixel / width), int(pixel % width)};
      const float* tap = p.taps.data + n * p.taps.n_stride + at.c * p.taps.c_stride;
      float sum = 0.f;
#pragma unroll
      for (int ky = 0; ky < 3; ++ky)
#pragma unroll
        for (int kx = 0; kx < 3; ++kx)
          if (unsigned(at.h + ky - 1) < unsigned(p.height) && unsigned(at.w + kx - 1) < unsigned(p.width))
            sum += tap[(3 * ky + kx) * p.taps.tap_stride];
      static_cast<T*>(p.output.data)[n * int64_t(count) + int64_t(i)] =
          from_float<T>(to_float(*pixel_of<T>(p.image, at)) + sum);
    }
}

// Adds a pixel to the taps that fall inside there.
__device__ inline void add_pixel(float (&sums)[kTaps], float x, int h, int w, int height, int width) {
#pragma unroll
  for (int ky = 0; ky < 3; ++ky)
#pragma unroll
    for (int kx = 0; kx < 3; ++kx)
      if (unsigned(h + ky - 1) < unsigned(height) && unsigned(w + kx - 1) < unsigned(width)) sums[3 * ky + kx] += x;
}

// Channels behind one another: a lane for each of 32 channels, a warp for every eighth pixel.
template <class T>
__global__ void __launch_bounds__(kThreads) tap_sums_of_channels_kernel(const __grid_constant__ TapSums p) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float parts[kWarps][kTaps][32];
  int lane = int(threadIdx.x), warp = int(threadIdx.y), height = int(p.height), width = int(p.width);
  int64_t blocks = (p.channels + 31) / 32;
  for (int64_t i = blockIdx.x; i < p.batch * blocks; i += gridDim.x) {
    int64_t n = i / blocks, c = i % blocks * 32 + lane;
    float sums[kTaps] = {};
    // 1. The pixels of this warp.
    if (c < p.channels)
      for (int pixel = warp; pixel < height * width; pixel += kWarps) {
        int h = pixel / width, w = pixel % width;
        add_pixel(sums, to_float(*pixel_of<T>(p.grad, {n, c, h, w})), h, w, height, width);
      }
    // 2. The sums of the warps, in their order.
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) parts[warp][tap][lane] = sums[tap];
    __syncthreads();
    for (int tap = warp; tap < kTaps; tap += kWarps) {
      float total = 0.f;
      for (int other = 0; other < kWarps; ++other) total += parts[other][tap][lane];
      if (c < p.channels) p.sums[(n * kTaps + tap) * p.channels + c] = total;
    }
    __syncthreads();
  }
}

// Pixels behind one another: a warp for each channel of each sample.
template <class T>
__global__ void __launch_bounds__(kThreads) tap_sums_of_pixels_kernel(const __grid_constant__ TapSums p) {
  int lane = int(threadIdx.x), height = int(p.height), width = int(p.width);
  int64_t step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; i < p.batch * p.channels; i += step) {
    int64_t n = i / p.channels, c = i % p.channels;
    float sums[kTaps] = {};
    for (int pixel = lane; pixel < height * width; pixel += 32) {
      int h = pixel / width, w = pixel % width;
      add_pixel(sums, to_float(*pixel_of<T>(p.grad, {n, c, h, w})), h, w, height, width);
    }
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      float total = warp_sum(sums[tap]);
      if (lane == 0) p.sums[(n * kTaps + tap) * p.channels + c] = total;
    }
  }
}

__device__ inline float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

template <class T>
__device__ float at(const Matrix& m, int64_t row, int64_t col) {
  return to_float(static_cast<const T*>(m.data)[row * m.row_stride + col * m.col_stride]);
}

// A column of the activated projection, as it is stored.
template <class T>
__device__ T activated(const Augmentation& p, int64_t row, int64_t col) {
  float x = at<T>(p.projected, row, col);
  switch (p.activation) {
    case Projection::relu: x = x < 0.f ? 0.f : x; break;
    case Projection::leaky_relu: x = x > 0.f ? x : x * kLeakySlope; break;
    case Projection::glu: x *= sigmoid(at<T>(p.projected, row, 2 * p.dim + col)); break;
    case Projection::none: break;
  }
  return from_float<T>(x);
}

// e^x - 1 - x; near 0 by its series, where most of the digits of that difference would cancel.
__device__ float excess(float x) {
  if (!(fabsf(x) < 1.f)) return expm1f(x) - x;
  constexpr float kFactors[] = {1.f / 3628800.f, 1.f / 362880.f, 1.f / 40320.f, 1.f / 5040.f, 1.f / 720.f,
                                1.f / 120.f,     1.f / 24.f,     1.f / 6.f,     0.5f};
  float sum = 1.f / 39916800.f;
#pragma unroll
  for (float factor : kFactors) sum = fmaf(sum, x, factor);
  return sum * x * x;
}

// Sums over all elements, in float64: each block its part, in `parts`, or where it is the only one all of it.
template <class T>
__global__ void __launch_bounds__(1024) augment_kernel(const __grid_constant__ Augmentation p, double* parts) {
  int64_t count = p.rows * p.dim, step = int64_t(gridDim.x) * blockDim.x;
  double divergence = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    int64_t row = i / p.dim, col = i % p.dim;
    T mu = activated<T>(p, row, col), logvar = activated<T>(p, row, p.dim + col);
    float m = to_float(mu), v = to_float(logvar);
    static_cast<T*>(p.mu)[i] = mu, static_cast<T*>(p.logvar)[i] = logvar;
    static_cast<T*>(p.condition)[i] = from_float<T>(fmaf(at<T>(p.eps, row, col), expf(0.5f * v), m));
    divergence += double(fmaf(m, m, excess(v)));
  }
  divergence = block_sum(divergence);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1)
    *p.kl = float(0.5 * divergence / double(count));
  else
    parts[blockIdx.x] = divergence;
}

__global__ void __launch_bounds__(1024)
    sum_divergence_kernel(const double* parts, int count, int64_t elements, float* kl) {
  double divergence = 0;
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) divergence += parts[i];
  divergence = block_sum(divergence);
  if (threadIdx.x == 0) *kl = float(0.5 * divergence / double(elements));
}

// The gradient of an activated column, on to the projection's.
template <class T>
__device__ void write_gradient(const AugmentationBackward& p, int64_t row, int64_t col, float stored, float gradient) {
  bool glu = p.activation == Projection::glu;
  T* to = static_cast<T*>(p.grad_projected) + row * (glu ? 4 : 2) * p.dim + col;
  if (p.activation == Projection::relu && stored <= 0.f) gradient = 0.f;
  if (p.activation == Projection::leaky_relu && !(stored > 0.f)) gradient *= kLeakySlope;
  if (glu) {
    float value = at<T>(p.projected, row, col), gate = sigmoid(at<T>(p.projected, row, 2 * p.dim + col));
    to[2 * p.dim] = from_float<T>(gradient * value * gate * (1.f - gate));
    gradient *= gate;
  }
  *to = from_float<T>(gradient);
}

template <class T>
__global__ void __launch_bounds__(kThreads) augment_backward_kernel(const __grid_constant__ AugmentationBackward p) {
  int64_t count = p.rows * p.dim, step = int64_t(gridDim.x) * kThreads;
  float share = p.grad_kl ? *p.grad_kl / float(count) : 0.f;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    int64_t row = i / p.dim, col = i % p.dim;
    float mu = at<T>(p.mu, row, col), logvar = at<T>(p.logvar, row, col), grad_mu = 0.f, grad_logvar = 0.f;
    if (p.grad_condition.data) {
      grad_mu = at<T>(p.grad_condition, row, col);
      grad_logvar = grad_mu * at<T>(p.eps, row, col) * expf(0.5f * logvar) * 0.5f;
    }
    if (p.grad_mu.data) grad_mu += at<T>(p.grad_mu, row, col);
    if (p.grad_logvar.data) grad_logvar += at<T>(p.grad_logvar, row, col);
    if (p.grad_kl) grad_mu += share * mu, grad_logvar += 0.5f * share * expm1f(logvar);
    write_gradient<T>(p, row, col, mu, grad_mu);
    write_gradient<T>(p, row, p.dim + col, logvar, grad_logvar);
  }
}

// f(T{}) for the elements of a dtype.
template <class F>
int with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: return f(float{});
    case Dtype::bfloat16: return f(__nv_bfloat16{});
    default: return f(__half{});
  }
}

dim3 grid_of(int64_t blocks) { return dim3(unsigned(std::min(blocks, kBlocks))); }

// Blocks of 1,024 threads: one as long as its threads have 16 elements each, which is faster than another launch.
int64_t augment_blocks(const Augmentation& p) {
  int64_t blocks = ceil_div(p.rows * p.dim, 16 * 1024);
  return std::min<int64_t>(blocks == 1 ? 1 : 4 * blocks, 1024);
}

}  // namespace

int add_taps(const AddTaps& p, void* stream) {
  int64_t count = p.channels * p.height * p.width;
  dim3 grid(unsigned(std::min(ceil_div(count, kThreads), kBlocks)), unsigned(std::min(p.batch, kBlocks)));
  bool last = p.output.c_stride == 1 && p.channels > 1, small = count < int64_t(1) << 31;
  return with_type(p.image.dtype, [&](auto element) {
    typedef decltype(element) T;
    auto kernel = last ? (small ? add_taps_kernel<T, true, uint32_t> : add_taps_kernel<T, true, uint64_t>)
                       : (small ? add_taps_kernel<T, false, uint32_t> : add_taps_kernel<T, false, uint64_t>);
    return launch(kernel, grid, dim3(kThreads), 0, stream, p);
  });
}

int tap_sums(const TapSums& p, void* stream) {
  constexpr unsigned kWarps = kThreads / 32;
  return with_type(p.grad.dtype, [&](auto element) {
    typedef decltype(element) T;
    if (p.grad.c_stride == 1 && p.channels > 1)
      return launch(tap_sums_of_channels_kernel<T>, grid_of(p.batch * ceil_div(p.channels, 32)), dim3(32, kWarps), 0,
                    stream, p);
    return launch(tap_sums_of_pixels_kernel<T>, grid_of(ceil_div(p.batch * p.channels, kWarps)), dim3(32, kWarps), 0,
                  stream, p);
  });
}

int64_t augment_scratch_bytes(const Augmentation& p) {
  int64_t blocks = augment_blocks(p);
  return blocks == 1 ? 0 : round_up(blocks * int64_t(sizeof(double)), 64);
}

int augment(const Augmentation& p, void* scratch, void* stream) {
  unsigned blocks = unsigned(augment_blocks(p));
  auto* parts = static_cast<double*>(scratch);
  int error = with_type(p.projected.dtype, [&](auto element) {
    return launch(augment_kernel<decltype(element)>, dim3(blocks), dim3(1024), 0, stream, p, parts);
  });
  if (error || blocks == 1) return error;
  return launch(sum_divergence_kernel, dim3(1), dim3(1024), 0, stream, parts, int(blocks), p.rows * p.dim, p.kl);
}

int augment_backward(const AugmentationBackward& p, void* stream) {
  return with_type(p.mu.dtype, [&](auto element) {
    return launch(augment_backward_kernel<decltype(element)>, grid_of(ceil_div(p.rows * p.dim, kThreads)),
                  dim3(kThreads), 0, stream, p);
  });
}

}  // namespace perfvl::cuda
