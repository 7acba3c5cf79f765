// Depthwise 3 x 3 with stride 1 of neighbouring channels, forward, with a batch norm or an activation before it.
//
// A thread walks along a strip of rows and asks for every column of the input once, a step before it adds it to the
// three columns of outputs that it touches: what stands before the convolution is evaluated 1.5 times a pixel, where
// separable_conv_rows.cuh would do it 4.2 times. About 35 instructions an element.
#pragma once

#include "cuda/separable_conv_packed.cuh"
#include "cuda/separable_conv_tiles.cuh"

namespace perfvl::cuda {
namespace {

constexpr int kWalkVector = 4, kWalkRows = 4, kWalkThreads = 128, kWalkEach = 3;  // of these, blocks an SM

template <class T>
__global__ void __launch_bounds__(kWalkThreads, kWalkEach)
    walk_kernel(const __grid_constant__ DepthwiseConv c, const __grid_constant__ Walks walks) {
  constexpr int V = kWalkVector, rows = kWalkRows, span = rows + 2;
  float* weights = dynamic_shared<float>();

  // 1. The channels of this block, their weights and biases.
  unsigned group, part;
  walks.place(group, part);
  int width = int(walks.lanes) * V, lane = int(threadIdx.x) * V;
  int64_t first = int64_t(group) * width, channel = first + lane;
  bool exists = channel < c.outputs;
  if (!exists) channel = 0;
  Pixels<const T> input(c.input, channel);
  Pixels<T> output(c.output, channel);
  Prologue<V> prologue(c, channel);
  float* bias = weights + 9 * width + lane;
  if (threadIdx.y == 0)
    for (int v = 0; v < V; ++v)
      bias[v] = exists && c.bias ? to_float(static_cast<const T*>(c.bias)[(channel + v) * c.bias_stride]) : 0.f;
  stage_weights<T>(c, first, width, weights);
  weights += lane;

  int height = int(c.h.in), columns = int(c.w.in), out_height = int(c.h.out), out_columns = int(c.w.out);
  unsigned stop = (part + 1) * walks.length < walks.stop ? (part + 1) * walks.length : walks.stop;
  for (unsigned at = part * walks.length; at < stop;) {
    // 2. The first column of a strip.
    Place place;
    int count = walks.at(at, stop, out_columns, place), out_row = place.strip * rows, out_column = place.column;
    int row = out_row - int(c.h.pad), column = out_column - int(c.w.pad);  // the next to be asked for
    bool here = exists && place.image < c.batch;
    int in_height = here ? height : 0, end_row = here ? out_height : 0;
    const T* from = input.at(place.image, row, column);
    T* to = output.at(place.image, out_row, out_column);
    int end = count + 2;
    int last = column + end;
    Packed<T, V> ahead[span];
    auto fetch = [&] {  // nothing beyond the walk
      int rows_there = column < last && unsigned(column) < unsigned(columns) ? in_height : 0;
      load_packed(from, input.h_stride, row, rows_there, ahead);
      from += input.w_stride, ++column;
    };
    fetch();
    float sums[3][rows][V];  // of the outputs whose last, second and first column comes next
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int r = 0; r < rows; ++r) load(bias, sums[s][r]);

#pragma unroll 1
    for (int t = 0; t < end; ++t) {
      // 3. What column t adds, while the next is on its way.
      float pixels[span][V];
#pragma unroll
      for (int j = 0; j < span; ++j) ahead[j].unpack(0, pixels[j]);
      prologue(pixels, row, 1, unsigned(column - 1) < unsigned(columns) ? height : 0);
      fetch();
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        float weight[3][V];
#pragma unroll
        for (int i = 0; i < 3; ++i) load(weights + ((2 - s) * 3 + i) * width, weight[i]);
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          if (s == 2) load(bias, sums[s][r]);
#pragma unroll
          for (int i = 0; i < 3; ++i)
#pragma unroll
            for (int v = 0; v < V; ++v) sums[s][r][v] += weight[i][v] * pixels[r + i][v];
        }
        asm volatile("" ::: "memory");  // or the compiler loads all weights first, for which there are no registers
      }

      // 4. The column of outputs that is complete.
      if (t >= 2) {
        activate(c.post, sums[0]);
        store_column(to, output.h_stride, out_row, end_row, sums[0]);
        to += output.w_stride;
      }
#pragma unroll
      for (int r = 0; r < rows; ++r)
#pragma unroll
        for (int v = 0; v < V; ++v) sums[0][r][v] = sums[1][r][v], sums[1][r][v] = sums[2][r][v];
    }
  }
}

// Of a 3 x 3 of stride and dilation 1 without statistics, whose vectors fit.
template <class T>
int walk(const DepthwiseConv& c, void* stream) {
  Walks walks;
  if (!make_walks(walks, c.outputs, kWalkVector, c.batch, ceil_div(c.h.out, kWalkRows), c.w.out, kWalkThreads,
                  one_wave<walk_kernel<T>>(kWalkThreads)))
    return kInvalidArgument;
  size_t shared = size_t(10 * walks.width(kWalkVector)) * sizeof(float);
  return launch(walk_kernel<T>, walks.grid(), walks.block(), shared, stream, c, walks);
}

}  // namespace
}  // namespace perfvl::cuda
