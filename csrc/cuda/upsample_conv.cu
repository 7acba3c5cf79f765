// Weights of the transposed convolution that upsampling and a 3x3 convolution are: k = M w M^T, and back, M^T k M.
//
// Along either axis (w0, w1, w2) becomes (w2, w1 + w2, w0 + w1, w0). PyTorch takes some 25 launches for that and as
// many in backward. Here it is one, and about the least bytes, 25 numbers a pair of channels: a block takes 32 by 32
// pairs through shared memory, since one side lies along O and the other along C. 1024 to 512 channels in float32, the
// largest of StackGAN: 52 MB.
#include "cuda/launch.cuh"
#include "cuda/upsample_conv.h"

namespace perfvl::cuda {
namespace {

constexpr int kTile = 32, kThreads = 256;
constexpr int kPitch = kTile * 9 + 1;  // floats of an output's weights in shared memory; odd: no two in one bank

struct Weights {
  const void* from;
  void* to;
  const float* scale;
  int outputs, channels;
  int64_t from_o, from_c, from_h, from_w, to_o, to_c, to_h, to_w;  // strides in elements
};

// f(o, c, tap) over the tile's weights, neighbours for neighbouring threads.
template <class F>
__device__ inline void each_weight(bool channels_innermost, F f) {
  for (int e = int(threadIdx.x); e < kTile * kTile * 9; e += kThreads) {
    int o = e / (kTile * 9), rest = e % (kTile * 9);
    if (channels_innermost)
      f(o, rest % kTile, rest / kTile);
    else
      f(o, rest / 9, rest % 9);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) expand_kernel(const __grid_constant__ Weights p) {
  float* staged = dynamic_shared<float>();
  int first_o = int(blockIdx.x) * kTile, first_c = int(blockIdx.y) * kTile;
  // 1. The 3x3 weights, scaled.
  each_weight(p.from_c == 1, [&](int o, int c, int tap) {
    if (first_o + o >= p.outputs || first_c + c >= p.channels) return;
    const T* w = static_cast<const T*>(p.from) + (first_o + o) * p.from_o + (first_c + c) * p.from_c;
    float factor = p.scale ? p.scale[first_o + o] : 1.f;
    staged[o * kPitch + c * 9 + tap] = factor * to_float(w[tap / 3 * p.from_h + tap % 3 * p.from_w]);
  });
  __syncthreads();
  // 2. A pair of channels a thread, neighbours along O.
  int o = int(threadIdx.x) % kTile;
  for (int c = int(threadIdx.x) / kTile; c < kTile; c += kThreads / kTile) {
    if (first_o + o >= p.outputs || first_c + c >= p.channels) return;
    const float* w = staged + o * kPitch + c * 9;
    T* k = static_cast<T*>(p.to) + (first_o + o) * p.to_o + (first_c + c) * p.to_c;
    float rows[4][3];
#pragma unroll
    for (int j = 0; j < 3; ++j)
      rows[0][j] = w[6 + j], rows[1][j] = w[3 + j] + w[6 + j], rows[2][j] = w[j] + w[3 + j], rows[3][j] = w[j];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float columns[4] = {rows[i][2], rows[i][1] + rows[i][2], rows[i][0] + rows[i][1], rows[i][0]};
#pragma unroll
      for (int j = 0; j < 4; ++j) k[i * p.to_h + j * p.to_w] = from_float<T>(columns[j]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) contract_kernel(const __grid_constant__ Weights p) {
  float* staged = dynamic_shared<float>();
  int first_o = int(blockIdx.x) * kTile, first_c = int(blockIdx.y) * kTile;
  // 1. A pair of channels a thread, neighbours along O.
  int own = int(threadIdx.x) % kTile;
  for (int c = int(threadIdx.x) / kTile; c < kTile; c += kThreads / kTile) {
    if (first_o + own >= p.outputs || first_c + c >= p.channels) break;
    const T* k = static_cast<const T*>(p.from) + (first_o + own) * p.from_o + (first_c + c) * p.from_c;
    float rows[4][3];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = to_float(k[i * p.from_h + j * p.from_w]);
      rows[i][0] = x[2] + x[3], rows[i][1] = x[1] + x[2], rows[i][2] = x[0] + x[1];
    }
    float* w = staged + own * kPitch + c * 9;
#pragma unroll
    for (int j = 0; j < 3; ++j)
      w[j] = rows[2][j] + rows[3][j], w[3 + j] = rows[1][j] + rows[2][j], w[6 + j] = rows[0][j] + rows[1][j];
  }
  __syncthreads();
  // 2. The gradient of the 3x3 weights.
  each_weight(p.to_c == 1, [&](int o, int c, int tap) {
    if (first_o + o >= p.outputs || first_c + c >= p.channels) return;
    T* w = static_cast<T*>(p.to) + (first_o + o) * p.to_o + (first_c + c) * p.to_c;
    w[tap / 3 * p.to_h + tap % 3 * p.to_w] = from_float<T>(staged[o * kPitch + c * 9 + tap]);
  });
}

template <bool kExpands, class T>
int run(const Weights& p, void* stream) {
  dim3 grid(unsigned(ceil_div(p.outputs, kTile)), unsigned(ceil_div(p.channels, kTile)));
  return launch(kExpands ? expand_kernel<T> : contract_kernel<T>, grid, dim3(kThreads), kTile * kPitch * sizeof(float),
                stream, p);
}

template <bool kExpands>
int run(Dtype dtype, const Weights& p, void* stream) {
  switch (dtype) {
    case Dtype::float32: return run<kExpands, float>(p, stream);
    case Dtype::bfloat16: return run<kExpands, __nv_bfloat16>(p, stream);
    default: return run<kExpands, __half>(p, stream);
  }
}

}  // namespace

int upsample_weight(const Image& weight, const float* scale, int64_t outputs, int64_t channels, const Image& kernel,
                    void* stream) {
  Weights p{weight.data,     kernel.data,     scale,           int(outputs),    int(channels),
            weight.n_stride, weight.c_stride, weight.h_stride, weight.w_stride, kernel.c_stride,
            kernel.n_stride, kernel.h_stride, kernel.w_stride};
  return run<true>(weight.dtype, p, stream);
}

int upsample_weight_backward(const Image& grad_kernel, int64_t outputs, int64_t channels, const Image& grad_weight,
                             void* stream) {
  const Image &k = grad_kernel, &w = grad_weight;
  Weights p{k.data,     w.data,     nullptr,    int(outputs), int(channels), k.c_stride, k.n_stride,
            k.h_stride, k.w_stride, w.n_stride, w.c_stride,   w.h_stride,    w.w_stride};
  return run<false>(k.dtype, p, stream);
}

}  // namespace perfvl::cuda
