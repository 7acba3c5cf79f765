// Depthwise 3 x 3 with stride 1 and nothing before it, forward.
//
// Memory's speed asks for 16 kB on their way to every SM at any time. A thread asks for all that a strip of outputs
// covers, three columns of rows, before it needs the first of them; as soon as a column has been used, that of the next
// strip is on its way into the same registers. Of the loads, 4.2 for each vector written, most find their line in L1;
// 80 bytes are for the first time, in each of 384 threads of an SM. About 25 instructions an element.
#pragma once

#include "cuda/separable_conv_packed.cuh"
#include "cuda/separable_conv_tiles.cuh"

namespace perfvl::cuda {
namespace {

// V channels of a thread: 16 bytes of neighbours, or one.
constexpr int kRowsThreads = 128;
template <int V>
constexpr int kRowsHeight = V == 1 ? 8 : 5;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kRowsEach = 2;  // blocks an SM; of three, ptxas spills a few registers
#else
constexpr int kRowsEach = 3;
#endif

template <class T, int V>
__global__ void __launch_bounds__(kRowsThreads, V == 1 ? 5 : kRowsEach)
    rows_kernel(const __grid_constant__ DepthwiseConv c, const __grid_constant__ Tiles tiles) {
  constexpr int rows = kRowsHeight<V>, span = rows + 2, part_of_vector = V < 4 ? V : 4;
  float* weights = dynamic_shared<float>();

  // 1. The channels of this block.
  unsigned group, part;
  tiles.place(group, part);
  int width = int(tiles.lanes) * V, lane = int(threadIdx.x);
  int64_t first = int64_t(group) * width, channel = first + lane * V;
  bool exists = channel < c.outputs;
  int64_t source = !exists ? 0 : V == 1 ? int(channel) / int(c.multiplier) : channel;
  Pixels<const T> input(c.input, source);
  Pixels<T> output(c.output, exists ? channel : 0);

  // 2. The first strip's pixels are on their way while the weights are staged.
  int height = int(c.h.in), columns = int(c.w.in), out_height = int(c.h.out);
  unsigned strip = part * tiles.workers + threadIdx.y, stop = exists ? tiles.strips : 0;
  Packed<T, V> window[3][span];
  int row, column;
  const T* from;
  auto go_to = [&](Place place) {
    row = place.strip * rows - int(c.h.pad), column = place.column - int(c.w.pad);
    from = input.at(place.image, row, column);
  };
  auto fetch = [&](int l) {  // nothing beyond the last strip
    int in_height = strip < stop && unsigned(column + l) < unsigned(columns) ? height : 0;
    load_packed(from, input.h_stride, row, in_height, window[l]);
    from += input.w_stride;
  };
  go_to(tiles.at(strip));
#pragma unroll
  for (int l = 0; l < 3; ++l) fetch(l);
  float* bias = weights + 9 * width + lane * V;
  if (threadIdx.y == 0)
    for (int v = 0; v < V; ++v)
      bias[v] = exists && c.bias ? to_float(static_cast<const T*>(c.bias)[(channel + v) * c.bias_stride]) : 0.f;
  stage_weights<T, V>(c, first, width, weights);

  while (strip < stop) {
    unsigned here = strip;
    strip += tiles.parts * tiles.workers;
    go_to(tiles.at(strip));
    float sum[rows][V];
#pragma unroll
    for (int r = 0; r < rows; ++r) load(bias, sum[r]);

    // 3. One column after the other: its products, then the next strip's column takes its place.
#pragma unroll
    for (int l = 0; l < 3; ++l) {
#pragma unroll
      for (int v = 0; v < V; v += part_of_vector) {
        float weight[3][part_of_vector];
#pragma unroll
        for (int i = 0; i < 3; ++i)
          load(weights + (l * 3 + i) * width + (v * int(tiles.lanes) + lane * part_of_vector), weight[i]);
#pragma unroll
        for (int j = 0; j < span; ++j) {
          float pixel[part_of_vector];
          window[l][j].unpack(v, pixel);
#pragma unroll
          for (int i = 0; i < 3; ++i)
            if (j >= i && j - i < rows)
#pragma unroll
              for (int k = 0; k < part_of_vector; ++k) sum[j - i][v + k] += weight[i][k] * pixel[k];
        }
        asm volatile("" ::: "memory");  // or the compiler loads all weights first, for which there are no registers
      }
      fetch(l);
    }

    // 4. Activation and the outputs.
    activate(c.post, sum);
    Place place = tiles.at(here);  // once more: kept, it would cost registers
    int out_row = place.strip * rows;
    T* to = output.at(place.image, out_row, place.column);
    store_column(to, output.h_stride, out_row, out_height, sum);
  }
}

// Of a 3 x 3 of stride and dilation 1 without statistics, before which nothing stands.
template <class T, int V>
int rows(const DepthwiseConv& c, void* stream) {
  Tiles tiles;
  // All load all the time in one wave; but of planes there may be more channels than blocks in a wave.
  int64_t blocks = (V == 1 ? 8 : 1) * one_wave<rows_kernel<T, V>>(kRowsThreads);
  if (!make_tiles(tiles, c.outputs, V, is_channels_last(c.output, c.outputs), c.batch,
                  ceil_div(c.h.out, kRowsHeight<V>), c.w.out, 9, kRowsThreads, blocks))
    return kInvalidArgument;
  size_t shared = size_t(10 * tiles.width(V)) * sizeof(float);
  return launch(rows_kernel<T, V>, tiles.grid(), tiles.block(), shared, stream, c, tiles);
}

}  // namespace
}  // namespace perfvl::cuda
