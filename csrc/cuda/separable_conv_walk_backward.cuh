// Backward of a depthwise 3 x 3 convolution of stride 1 of neighbouring channels.
//
// Memory's speed asks for 16 kB on their way to every SM at any time. A thread walks along a strip of rows of the input
// and keeps the three columns of grad_output around it, as they lie in memory. It asks for the next column of both a
// step before it needs them: 2.4 vectors loaded for each one written, about 40 instructions an element, and 96 (16
// bits: 48) bytes on their way to each of 384 (512) threads of an SM.
#pragma once

#include "cuda/separable_conv_packed.cuh"
#include "cuda/separable_conv_reduce.cuh"
#include "cuda/separable_conv_tiles.cuh"

namespace perfvl::cuda {
namespace {

constexpr int kWalkBackVector = 2, kWalkBackRows = 5, kWalkBackThreads = 128;
template <class T, bool kPlain>
constexpr int kWalkBackEach = (sizeof(T) == 4 ? 3 : 4) - !kPlain;  // blocks an SM

// kPlain: nothing stands before the convolution. partials[parts][9 taps, scale, shift][channels].
template <class T, bool kPlain>
__global__ void __launch_bounds__(kWalkBackThreads, kWalkBackEach<T, kPlain>)
    walk_backward_kernel(const __grid_constant__ DepthwiseConvBackward b, const __grid_constant__ Walks walks,
                         float* partials) {
  constexpr int V = kWalkBackVector, rows = kWalkBackRows, span = rows + 2;
  const DepthwiseConv& c = b.forward;
  float* shared = dynamic_shared<float>();

  // 1. The channels of this block.
  unsigned group, part;
  walks.place(group, part);
  int width = int(walks.lanes) * V, lane = int(threadIdx.x) * V;
  int64_t first = int64_t(group) * width, channel = first + lane;
  bool exists = channel < c.channels;
  if (!exists) channel = 0;
  Pixels<const T> input(c.input, channel), grad_output(b.grad_output, channel);
  Pixels<T> grad_input(b.grad_input, channel);
  Prologue<V> prologue(c, channel);
  bool need_input = b.grad_input.data != nullptr, need_affine = !kPlain && b.grad_scale != nullptr;
  bool need_weight = b.grad_weight != nullptr;
  float sums[kPlain ? 9 : 11][V] = {};

  stage_weights<T>(c, first, width, shared);
  const float* weights = shared + lane;

  int height = int(c.h.in), columns = int(c.w.in), out_height = int(c.h.out), out_columns = int(c.w.out);
  unsigned stop = (part + 1) * walks.length < walks.stop ? (part + 1) * walks.length : walks.stop;
  for (unsigned at = part * walks.length; at < stop;) {
    // 2. The first columns of a strip.
    Place place;
    int count = walks.at(at, stop, columns, place), row = place.strip * rows, column = place.column;
    int end = column + count;
    bool here = exists && place.image < c.batch;
    int in_height = here ? height : 0, grad_height = here ? out_height : 0;
    int out_row = row + int(c.h.pad) - 2, out_column = column + int(c.w.pad) - 2;  // the next to be asked for
    const T* from = input.at(place.image, row, column);
    const T* grad_from = grad_output.at(place.image, out_row, out_column);
    T* to = need_input ? grad_input.at(place.image, row, column) : nullptr;
    int out_end = end + int(c.w.pad) < out_columns ? end + int(c.w.pad) : out_columns;
    Packed<T, V> window[4][span], pixels[rows], next[rows];  // window[3]: on its way
    auto fetch = [&](Packed<T, V>(&grads)[span]) {           // nothing beyond the walk
      bool inside = out_column >= 0 && out_column < out_end;
      load_packed(grad_from, grad_output.h_stride, out_row, inside ? grad_height : 0, grads);
      grad_from += grad_output.w_stride, ++out_column;
    };
#pragma unroll
    for (int l = 0; l < 2; ++l) fetch(window[l]);
    fetch(window[3]);
    load_packed(from, input.h_stride, row, in_height, next);

#pragma unroll 1
    for (; column < end; ++column) {
#pragma unroll
      for (int j = 0; j < span; ++j) window[2][j] = window[3][j];
#pragma unroll
      for (int r = 0; r < rows; ++r) pixels[r] = next[r];
      fetch(window[3]);
      from += input.w_stride;
      load_packed(from, input.h_stride, row, column + 1 < end ? in_height : 0, next);
      float a[rows][V], grads[rows][V] = {};
#pragma unroll
      for (int r = 0; r < rows; ++r) pixels[r].unpack(0, a[r]);
      if constexpr (!kPlain) prologue(a, row, 1, in_height);

      // 3. One column of the kernel after the other.
#pragma unroll
      for (int l = 0; l < 3; ++l) {
        float weight[3][V];
#pragma unroll
        for (int i = 0; i < 3; ++i) load(weights + (l * 3 + i) * width, weight[i]);
#pragma unroll
        for (int j = 0; j < span; ++j) {
          float gradient[V];
          window[2 - l][j].unpack(0, gradient);
#pragma unroll
          for (int i = 0; i < 3; ++i) {
            int r = j - 2 + i;
            if (r < 0 || r >= rows) continue;
#pragma unroll
            for (int v = 0; v < V; ++v) {
              grads[r][v] += weight[i][v] * gradient[v];
              sums[i * 3 + l][v] += a[r][v] * gradient[v];
            }
          }
        }
        asm volatile("" ::: "memory");
      }

      // 4. Through the activation and the scale.
      if constexpr (!kPlain) {
        float x[rows][V], z[rows][V];
#pragma unroll
        for (int r = 0; r < rows; ++r) pixels[r].unpack(0, x[r]), pixels[r].unpack(0, z[r]);
        prologue.normalize(z, row, 1, in_height);
        activate_backward(prologue.activation, z, grads);
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          bool inside = row + r < in_height;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            sums[9][v] += inside ? grads[r][v] * x[r][v] : 0.f;
            sums[10][v] += inside ? grads[r][v] : 0.f;
            grads[r][v] *= prologue.scale[v];
          }
        }
      }
      if (need_input) {
        store_column(to, grad_input.h_stride, row, in_height, grads);
        to += grad_input.w_stride;
      }
#pragma unroll
      for (int j = 0; j < span; ++j) window[0][j] = window[1][j], window[1][j] = window[2][j];
    }
  }

  // 5. The sums of this block.
  float* to = partials + int64_t(part) * 11 * c.channels + first;
  store_sums(sums, need_weight ? 0 : 9, need_affine ? 11 : 9, width, shared, c.channels - first, c.channels, to);
}

bool walks_of(const DepthwiseConvBackward& b, Walks& walks) {
  const DepthwiseConv& c = b.forward;
  return with_dtype(c.input.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t blocks = is_plain(c) ? one_wave<walk_backward_kernel<T, true>>(kWalkBackThreads)
                                 : one_wave<walk_backward_kernel<T, false>>(kWalkBackThreads);
    return make_walks(walks, c.channels, kWalkBackVector, c.batch, ceil_div(c.h.in, kWalkBackRows), c.w.in,
                      kWalkBackThreads, blocks);
  });
}

// Of a 3 x 3 of stride and dilation 1 whose vectors fit.
template <class T>
int walk_backward(const DepthwiseConvBackward& b, void* scratch, void* stream) {
  Walks walks;
  if (!walks_of(b, walks)) return kInvalidArgument;
  float* partials = static_cast<float*>(scratch);
  size_t shared = size_t(kWalkBackThreads / 32 * 11 * walks.width(kWalkBackVector)) * sizeof(float);
  auto kernel = is_plain(b.forward) ? walk_backward_kernel<T, true> : walk_backward_kernel<T, false>;
  int error = launch(kernel, walks.grid(), walks.block(), shared, stream, b, walks, partials);
  return error ? error : sum_parts_of<T>(b, partials, walks.parts, stream);
}

}  // namespace
}  // namespace perfvl::cuda
