// Backward of a depthwise 3 x 3 convolution of stride 1, one channel a thread: of planes (NCHW).
//
// A thread asks for all that a strip of pixels of input needs, these and three columns of grad_output, before it needs
// the first of them; as soon as a column has been used, that of the next strip is on its way into the same registers.
#pragma once

#include "cuda/separable_conv_packed.cuh"
#include "cuda/separable_conv_reduce.cuh"
#include "cuda/separable_conv_tiles.cuh"

namespace perfvl::cuda {
namespace {

constexpr int kRowsBackHeight = 8, kRowsBackThreads = 128;
constexpr int64_t kRowsBackBlocks = 4224;  // eight waves of the largest GPU

// kPlain: nothing stands before the convolution. partials[parts][9 taps, scale, shift][channels].
template <class T, bool kPlain>
__global__ void __launch_bounds__(kRowsBackThreads, kPlain ? 4 : 3)
    rows_backward_kernel(const __grid_constant__ DepthwiseConvBackward b, const __grid_constant__ Tiles tiles,
                         float* partials) {
  constexpr int V = 1, rows = kRowsBackHeight, span = rows + 2;
  const DepthwiseConv& c = b.forward;
  float* shared = dynamic_shared<float>();

  // 1. The channels of this block.
  unsigned group, part;
  tiles.place(group, part);
  int width = int(tiles.lanes) * V, lane = int(threadIdx.x) * V;
  int64_t first = int64_t(group) * width, channel = first + lane;
  bool exists = channel < c.channels;
  if (!exists) channel = 0;
  Pixels<const T> input(c.input, channel), grad_output(b.grad_output, channel);
  Pixels<T> grad_input(b.grad_input, channel);
  Prologue<V> prologue(c, channel);
  bool need_input = b.grad_input.data != nullptr, need_affine = !kPlain && b.grad_scale != nullptr;
  bool need_weight = b.grad_weight != nullptr;
  float sums[kPlain ? 9 : 11][V] = {};

  // 2. The first strip's pixels are on their way while the weights are staged.
  int height = int(c.h.in), out_height = int(c.h.out), out_columns = int(c.w.out);
  unsigned strip = part * tiles.workers + threadIdx.y, stop = exists ? tiles.strips : 0;
  Packed<T, V> pixels[rows], window[3][span];
  int row, out_column;
  const T *from, *grad_from;
  auto go_to = [&](Place place) {
    row = place.strip * rows, out_column = place.column + int(c.w.pad);
    from = input.at(place.image, row, place.column);
    grad_from = grad_output.at(place.image, row + int(c.h.pad) - 2, out_column);
  };
  auto fetch = [&](int l) {  // nothing beyond the last strip
    int grad_height = strip < stop && unsigned(out_column - l) < unsigned(out_columns) ? out_height : 0;
    load_packed(grad_from, grad_output.h_stride, row + int(c.h.pad) - 2, grad_height, window[l]);
    grad_from -= grad_output.w_stride;
  };
  Place next = tiles.at(strip);
  go_to(next);
  load_packed(from, input.h_stride, row, strip < stop ? height : 0, pixels);
#pragma unroll
  for (int l = 0; l < 3; ++l) fetch(l);
  stage_weights<T>(c, first, width, shared);
  const float* weights = shared + lane;

  while (strip < stop) {
    Place place = next;
    strip += tiles.parts * tiles.workers;
    go_to(next = tiles.at(strip));
    int here = place.strip * rows;
    float a[rows][V], grads[rows][V] = {};
#pragma unroll
    for (int r = 0; r < rows; ++r) pixels[r].unpack(0, a[r]);
    if constexpr (!kPlain) prologue(a, here, 1, height);

    // 3. One column of the kernel after the other; then the next strip's takes its place.
#pragma unroll
    for (int l = 0; l < 3; ++l) {
      float weight[3][V];
#pragma unroll
      for (int i = 0; i < 3; ++i) load(weights + (l * 3 + i) * width, weight[i]);
#pragma unroll
      for (int j = 0; j < span; ++j) {
        float gradient[V];
        window[l][j].unpack(0, gradient);
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
      fetch(l);
    }

    // 4. Through the activation and the scale.
    if constexpr (!kPlain) {
      float x[rows][V], z[rows][V];
#pragma unroll
      for (int r = 0; r < rows; ++r) pixels[r].unpack(0, x[r]), pixels[r].unpack(0, z[r]);
      prologue.normalize(z, here, 1, height);
      activate_backward(prologue.activation, z, grads);
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        bool inside = here + r < height;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          sums[9][v] += inside ? grads[r][v] * x[r][v] : 0.f;
          sums[10][v] += inside ? grads[r][v] : 0.f;
          grads[r][v] *= prologue.scale[v];
        }
      }
    }
    load_packed(from, input.h_stride, row, strip < stop ? height : 0, pixels);
    if (!need_input) continue;
    T* to = grad_input.at(place.image, here, place.column);
    store_column(to, grad_input.h_stride, here, height, grads);
  }

  // 5. The sums of this block.
  float* to = partials + int64_t(part) * 11 * c.channels + first;
  store_sums(sums, need_weight ? 0 : 9, need_affine ? 11 : 9, width, shared, c.channels - first, c.channels, to);
}

bool rows_of(const DepthwiseConvBackward& b, Tiles& tiles) {
  const DepthwiseConv& c = b.forward;
  return make_tiles(tiles, c.channels, 1, is_channels_last(c.input, c.channels), c.batch,
                    ceil_div(c.h.in, kRowsBackHeight), c.w.in, 9, kRowsBackThreads, kRowsBackBlocks);
}

// Of a 3 x 3 of stride and dilation 1.
template <class T>
int rows_backward(const DepthwiseConvBackward& b, void* scratch, void* stream) {
  Tiles tiles;
  if (!rows_of(b, tiles)) return kInvalidArgument;
  float* partials = static_cast<float*>(scratch);
  size_t shared = size_t(kRowsBackThreads / 32 * 11 * tiles.width(1)) * sizeof(float);
  auto kernel = is_plain(b.forward) ? rows_backward_kernel<T, true> : rows_backward_kernel<T, false>;
  int error = launch(kernel, tiles.grid(), tiles.block(), shared, stream, b, tiles, partials);
  return error ? error : sum_parts_of<T>(b, partials, tiles.parts, stream);
}

}  // namespace
}  // namespace perfvl::cuda
