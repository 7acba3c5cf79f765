// Backward of a depthwise convolution of any kernel, stride, dilation and depth multiplier: right everywhere, fast
// nowhere in particular. One kernel for the gradients of the input, its scale and shift, one for the weight's: a block
// of it takes nine taps, so grad_output is read once for every nine.
#pragma once

#include "cuda/separable_conv_reduce.cuh"
#include "cuda/separable_conv_tiles.cuh"

namespace perfvl::cuda {
namespace {

constexpr int kAnyThreads = 128, kAnyTaps = 9;
constexpr int64_t kAnyBlocks = 1056;

// A thread takes one input pixel after the other; partials[parts][2][C] are the sums for scale and shift.
template <class T>
__global__ void __launch_bounds__(kAnyThreads, 6)
    any_input_kernel(const __grid_constant__ DepthwiseConvBackward b, const __grid_constant__ Tiles tiles,
                     float* partials) {
  const DepthwiseConv& c = b.forward;
  float* shared = dynamic_shared<float>();
  unsigned group, part;
  tiles.place(group, part);
  int width = int(tiles.lanes);
  int64_t first = int64_t(group) * width, channel = first + threadIdx.x;
  bool exists = channel < c.channels;
  if (!exists) channel = 0;
  Pixels<const T> input(c.input, channel);
  Pixels<T> grad_input(b.grad_input, channel);
  Prologue<1> prologue(c, channel);
  float scale_sum[1] = {}, shift_sum[1] = {};
  int kh = int(c.h.kernel), kw = int(c.w.kernel), sh = int(c.h.stride), sw = int(c.w.stride);
  unsigned stop = exists ? tiles.strips : 0;
  for (unsigned strip = part * tiles.workers + threadIdx.y; strip < stop; strip += tiles.parts * tiles.workers) {
    Place place = tiles.at(strip);
    float sum[1][1] = {};
    for (int64_t j = 0; j < c.multiplier; ++j) {
      int64_t to = channel * c.multiplier + j;
      Pixels<const T> grad_output(b.grad_output, to);
      const T* weight = static_cast<const T*>(c.weight.data) + to * c.weight.n_stride;
#pragma unroll 1
      for (int i = 0; i < kh; ++i) {
        int y = place.strip + int(c.h.pad) - i * int(c.h.dilation);
        if (y < 0 || y % sh != 0 || y / sh >= c.h.out) continue;
#pragma unroll 1
        for (int l = 0; l < kw; ++l) {
          int x = place.column + int(c.w.pad) - l * int(c.w.dilation);
          if (x < 0 || x % sw != 0 || x / sw >= c.w.out) continue;
          sum[0][0] += to_float(weight[i * c.weight.h_stride + l * c.weight.w_stride]) *
                       to_float(*grad_output.at(place.image, y / sh, x / sw));
        }
      }
    }
    float x[1][1], z[1][1];
    load(input.at(place.image, place.strip, place.column), x[0]);
    z[0][0] = x[0][0];
    prologue.normalize(z, 0, 1, 1);
    activate_backward(prologue.activation, z, sum);
    scale_sum[0] += sum[0][0] * x[0][0], shift_sum[0] += sum[0][0];
    if (b.grad_input.data)
      *grad_input.at(place.image, place.strip, place.column) = from_float<T>(sum[0][0] * prologue.scale[0]);
  }
  if (!b.grad_scale) return;
  float scale = sum_over_workers(scale_sum, width, shared), shift = sum_over_workers(shift_sum, width, shared);
  if (threadIdx.y != 0 || !exists) return;
  float* to = partials + int64_t(part) * 2 * c.channels + channel;
  to[0] = scale, to[c.channels] = shift;
}

// A thread takes one output pixel after the other, for the taps from blockIdx.y * kAnyTaps on;
// partials[parts][taps][C m].
template <class T>
__global__ void __launch_bounds__(kAnyThreads) any_weight_kernel(const __grid_constant__ DepthwiseConvBackward b,
                                                                 const __grid_constant__ Tiles tiles, float* partials) {
  const DepthwiseConv& c = b.forward;
  float* shared = dynamic_shared<float>();
  unsigned group, part;
  tiles.place(group, part);
  int width = int(tiles.lanes);
  int64_t first = int64_t(group) * width, channel = first + threadIdx.x;
  bool exists = channel < c.outputs;
  if (!exists) channel = 0;
  int64_t source = int(channel) / int(c.multiplier);
  Pixels<const T> input(c.input, source), grad_output(b.grad_output, channel);
  Prologue<1> prologue(c, source);
  float sums[kAnyTaps][1] = {};
  int taps = int(c.h.kernel * c.w.kernel), tap = int(blockIdx.y) * kAnyTaps;
  unsigned stop = exists ? tiles.strips : 0;
  for (unsigned strip = part * tiles.workers + threadIdx.y; strip < stop; strip += tiles.parts * tiles.workers) {
    Place place = tiles.at(strip);
    float gradient = to_float(*grad_output.at(place.image, place.strip, place.column));
    int row = place.strip * int(c.h.stride) - int(c.h.pad), column = place.column * int(c.w.stride) - int(c.w.pad);
#pragma unroll
    for (int t = 0; t < kAnyTaps; ++t) {
      int i = (tap + t) / int(c.w.kernel), l = tap + t - i * int(c.w.kernel);
      int y = row + i * int(c.h.dilation), x = column + l * int(c.w.dilation);
      bool inside = tap + t < taps && unsigned(y) < unsigned(c.h.in) && unsigned(x) < unsigned(c.w.in);
      float a[1][1] = {};
      if (inside) load(input.at(place.image, y, x), a[0]);
      prologue(a, 0, 1, inside);
      if (inside) sums[t][0] += a[0][0] * gradient;
    }
  }
#pragma unroll
  for (int t = 0; t < kAnyTaps; ++t) {
    float sum = sum_over_workers(sums[t], width, shared);
    if (threadIdx.y == 0 && exists && tap + t < taps)
      partials[(int64_t(part) * taps + tap + t) * c.outputs + channel] = sum;
  }
}

bool any_input_tiles(const DepthwiseConvBackward& b, Tiles& tiles) {
  const DepthwiseConv& c = b.forward;
  return make_tiles(tiles, c.channels, 1, is_channels_last(c.input, c.channels), c.batch, c.h.in, c.w.in, 1,
                    kAnyThreads, 4 * kAnyBlocks);
}

bool any_weight_tiles(const DepthwiseConvBackward& b, Tiles& tiles) {
  const DepthwiseConv& c = b.forward;
  return make_tiles(tiles, c.outputs, 1, is_channels_last(b.grad_output, c.outputs), c.batch, c.h.out, c.w.out, 1,
                    kAnyThreads, kAnyBlocks);
}

// The sums for scale and shift come first, those for the weight after them.
int64_t any_affine_bytes(const DepthwiseConvBackward& b) {
  Tiles tiles;
  if (!b.grad_scale || !any_input_tiles(b, tiles)) return 0;
  return round_up(int64_t(tiles.parts) * 2 * b.forward.channels * int64_t(sizeof(float)), 64);
}

int64_t any_backward_scratch_bytes(const DepthwiseConvBackward& b) {
  const DepthwiseConv& c = b.forward;
  Tiles tiles;
  int64_t bytes = any_affine_bytes(b);
  if (!b.grad_weight || !any_weight_tiles(b, tiles)) return bytes;
  int64_t sums = int64_t(tiles.parts) * c.h.kernel * c.w.kernel * c.outputs;
  return bytes + round_up(sums * int64_t(sizeof(float)), 64);
}

template <class T>
int any_backward(const DepthwiseConvBackward& b, void* scratch, void* stream) {
  const DepthwiseConv& c = b.forward;
  Tiles tiles;
  if (b.grad_input.data || b.grad_scale) {
    if (!any_input_tiles(b, tiles)) return kInvalidArgument;
    float* partials = static_cast<float*>(scratch);
    size_t shared = kAnyThreads / 32 * tiles.lanes * sizeof(float);
    int error = launch(any_input_kernel<T>, tiles.grid(), tiles.block(), shared, stream, b, tiles, partials);
    if (!error && b.grad_scale) {
      PartialSums sums{partials, int64_t(tiles.parts), c.channels, 2, 0, 2, 0, nullptr, b.grad_scale, b.grad_shift};
      error = sum_parts<T>(sums, stream);
    }
    if (error) return error;
  }
  if (!b.grad_weight) return 0;
  if (!any_weight_tiles(b, tiles)) return kInvalidArgument;
  int64_t taps = c.h.kernel * c.w.kernel;
  float* partials = reinterpret_cast<float*>(static_cast<char*>(scratch) + any_affine_bytes(b));
  size_t shared = kAnyThreads / 32 * tiles.lanes * sizeof(float);
  dim3 grid = tiles.grid();
  grid.y = unsigned(ceil_div(taps, kAnyTaps));
  if (int error = launch(any_weight_kernel<T>, grid, tiles.block(), shared, stream, b, tiles, partials)) return error;
  PartialSums sums{partials, int64_t(tiles.parts), c.outputs, taps, 0, taps, taps, b.grad_weight, nullptr, nullptr};
  return sum_parts<T>(sums, stream);
}

}  // namespace
}  // namespace perfvl::cuda
