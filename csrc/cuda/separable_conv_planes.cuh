// Depthwise convolution with three rows, one or three columns and stride 1, forward, of planes (NCHW) whose rows are
// whole vectors of 16 bytes.
//
// A thread takes a few rows of one such vector of outputs. It asks for all that these cover, and for the next strip's
// before it stores: 64 bytes for the first time, as many as memory's speed asks of 256 threads of an SM. A vector and
// what stands beside it in three loads: about 24 instructions an element.
#pragma once

#include "cuda/separable_conv_packed.cuh"
#include "cuda/separable_conv_tiles.cuh"

namespace perfvl::cuda {
namespace {

constexpr int kPlanesThreads = 128;
constexpr int64_t kPlanesBlocks = 1 << 30;  // as many as there are: measured best
template <class T, bool kPlain>
constexpr int kPlanesRows = kPlain && sizeof(T) == 4 ? 6 : 4;
template <class T>
constexpr int kPlanesVector = 16 / sizeof(T);

// The first `count` of V neighbouring outputs, in vectors as long as their address allows.
template <class T, int V>
__device__ inline void store_columns(T* to, const float (&x)[V], int count) {
  Vector<T, V> packed;
#pragma unroll
  for (int k = 0; k < V; ++k) packed.values[k] = from_float<T>(x[k]);
  unsigned place = unsigned(reinterpret_cast<uintptr_t>(to));
  if (count >= V && place % sizeof packed == 0) {
    *reinterpret_cast<Vector<T, V>*>(to) = packed;
    return;
  }
  bool pairs = place % (2 * sizeof(T)) == 0;
#pragma unroll
  for (int k = 0; k < V; k += 2) {
    Vector<T, 2> pair{packed.values[k], packed.values[k + 1]};
    if (pairs && k + 1 < count) {
      *reinterpret_cast<Vector<T, 2>*>(to + k) = pair;
    } else {
      if (k < count) to[k] = pair.values[0];
      if (k + 1 < count) to[k + 1] = pair.values[1];
    }
  }
}

// kLeft: how many columns of input stand left of the vector. kPlain: nothing stands before the convolution.
template <class T, int kWidth, int kLeft, bool kPlain>
__global__ void __launch_bounds__(kPlanesThreads, kPlain || sizeof(T) == 4 ? 4 : 3)
    planes_kernel(const __grid_constant__ DepthwiseConv c, const __grid_constant__ Tiles tiles) {
  constexpr int rows = kPlanesRows<T, kPlain>, span = rows + 2, vector = kPlanesVector<T>, right = kWidth - 1 - kLeft;
  float* weights = dynamic_shared<float>();

  // 1. The channel of this block.
  unsigned channel, part;
  tiles.place(channel, part);
  int64_t source = int(channel) / int(c.multiplier);
  Pixels<const T> input(c.input, source);
  Pixels<T> output(c.output, channel);
  Prologue<1> prologue(c, source);
  float bias = c.bias ? to_float(static_cast<const T*>(c.bias)[channel * c.bias_stride]) : 0.f;

  // 2. The first strip's pixels are on their way while the weights are staged.
  int height = int(c.h.in), columns = int(c.w.in), out_height = int(c.h.out), out_columns = int(c.w.out);
  unsigned strip = part * tiles.workers + threadIdx.y, stop = tiles.strips;
  Packed<T, vector> middle[span];
  Packed<T, 1> before[span];
  Packed<T, right == 2 ? 2 : 1> behind[span];
  int row, column;
  auto fetch = [&](Place place) {  // nothing beyond the last strip
    row = place.strip * rows - int(c.h.pad), column = place.column * vector - int(c.w.pad) + kLeft;
    const T* from = input.at(place.image, row, column);
    auto image_rows = [&](int x) { return strip < stop && unsigned(x) < unsigned(columns) ? height : 0; };
    load_packed(from, input.h_stride, row, image_rows(column), middle);
    if constexpr (kLeft == 1) load_packed(from - 1, input.h_stride, row, image_rows(column - 1), before);
    if constexpr (right > 0) load_packed(from + vector, input.h_stride, row, image_rows(column + vector), behind);
  };
  Place next = tiles.at(strip);
  fetch(next);
  stage_weights<T>(c, channel, 1, weights);
  float weight[kWidth][3];
#pragma unroll
  for (int l = 0; l < kWidth; ++l)
#pragma unroll
    for (int i = 0; i < 3; ++i) weight[l][i] = weights[l * 3 + i];

  while (strip < stop) {
    Place place = next;
    float sum[rows][vector];
#pragma unroll
    for (int r = 0; r < rows; ++r)
#pragma unroll
      for (int k = 0; k < vector; ++k) sum[r][k] = bias;

    // 3. The pixels, what stands before the convolution, and the products.
    float pixels[span][vector + kWidth - 1];
#pragma unroll
    for (int j = 0; j < span; ++j) {
      float own[vector], one[1], more[right == 2 ? 2 : 1];
      middle[j].unpack(0, own);
#pragma unroll
      for (int k = 0; k < vector; ++k) pixels[j][kLeft + k] = own[k];
      if constexpr (kLeft == 1) before[j].unpack(0, one), pixels[j][0] = one[0];
      if constexpr (right > 0) {
        behind[j].unpack(0, more);
#pragma unroll
        for (int k = 0; k < right; ++k) pixels[j][kLeft + vector + k] = more[k];
      }
    }
    if constexpr (!kPlain) {
#pragma unroll
      for (int j = 0; j < span; ++j) {
        bool inside = unsigned(row + j) < unsigned(height);
#pragma unroll
        for (int k = 0; k < vector + kWidth - 1; ++k)
          if (!inside || unsigned(column - kLeft + k) >= unsigned(columns))
            pixels[j][k] = 0.f;
          else if (prologue.affine)
            pixels[j][k] = fmaf(pixels[j][k], prologue.scale[0], prologue.shift[0]);
      }
      activate(prologue.activation, pixels);
    }
#pragma unroll
    for (int j = 0; j < span; ++j)
#pragma unroll
      for (int i = 0; i < 3; ++i)
        if (j >= i && j - i < rows)
#pragma unroll
          for (int l = 0; l < kWidth; ++l)
#pragma unroll
            for (int k = 0; k < vector; ++k) sum[j - i][k] += weight[l][i] * pixels[j][k + l];
    strip += tiles.parts * tiles.workers;
    fetch(next = tiles.at(strip));

    // 4. Activation and the outputs.
    activate(c.post, sum);
    int out_row = place.strip * rows, out_column = place.column * vector, left = out_columns - out_column;
    T* to = output.at(place.image, out_row, out_column);
#pragma unroll
    for (int r = 0; r < rows; ++r, to += output.h_stride) {
      if (out_row + r >= out_height) continue;
      store_columns(to, sum[r], left);
    }
  }
}

// How many columns stand left of the vectors; -1: the kernel or the layout is another.
template <class T>
int planes_left(const DepthwiseConv& c) {
  constexpr int vector = kPlanesVector<T>;
  const Image& from = c.input;
  bool rows = c.h.kernel == 3 && c.h.stride == 1 && c.h.dilation == 1 && c.w.stride == 1 && c.w.dilation == 1;
  bool whole = from.w_stride == 1 && c.output.w_stride == 1 && c.w.in % vector == 0 && from.h_stride % vector == 0 &&
               from.c_stride % vector == 0 && from.n_stride % vector == 0 && aligned(from.data, 16);
  int left = int(c.w.pad % vector);
  return rows && whole && (c.w.kernel == 1 || c.w.kernel == 3) && left <= c.w.kernel / 2 ? left : -1;
}

template <class T, int kWidth, int kLeft>
int planes(const DepthwiseConv& c, void* stream) {
  Tiles tiles;
  bool plain = is_plain(c);
  int64_t rows = plain ? kPlanesRows<T, true> : kPlanesRows<T, false>;
  if (!make_tiles(tiles, c.outputs, 1, false, c.batch, ceil_div(c.h.out, rows), ceil_div(c.w.out, kPlanesVector<T>),
                  3 * kWidth, kPlanesThreads, kPlanesBlocks))
    return kInvalidArgument;
  auto kernel = plain ? planes_kernel<T, kWidth, kLeft, true> : planes_kernel<T, kWidth, kLeft, false>;
  return launch(kernel, tiles.grid(), tiles.block(), 3 * kWidth * sizeof(float), stream, c, tiles);
}

// `left` of planes_left. Without statistics.
template <class T>
int planes(const DepthwiseConv& c, int left, void* stream) {
  if (c.w.kernel == 1) return planes<T, 1, 0>(c, stream);
  return left == 0 ? planes<T, 3, 0>(c, stream) : planes<T, 3, 1>(c, stream);
}

}  // namespace
}  // namespace perfvl::cuda
