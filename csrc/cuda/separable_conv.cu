// Depthwise convolution, forward: output = post(bias + depthwise pre(input * scale + shift)), and its batch statistics.
//
// Cost: input read and output written once, 4 bytes an element in 16 bits, 8 in float32. Three kernels know a 3x3 of
// stride 1, on an H100 at 72 to 84 % (NHWC) and 91 to 98 % (NCHW) of its copy bandwidth of 3.0 TB/s: of neighbouring
// channels separable_conv_rows.cuh, with something before the convolution separable_conv_walk.cuh; of planes
// separable_conv_planes.cuh. Here is the kernel for all the rest, and for statistics. A thread takes four channels
// (NHWC) or one (NCHW) of one output column, some rows high, and waits for one column of the kernel after the other.
// Weights are staged once a block in shared memory, which then takes many strips.
#include "cuda/separable_conv_moments.cuh"
#include "cuda/separable_conv_planes.cuh"
#include "cuda/separable_conv_rows.cuh"
#include "cuda/separable_conv_tiles.cuh"
#include "cuda/separable_conv_walk.cuh"

namespace perfvl::cuda {
namespace {

constexpr int kVector = 4;         // channels of a thread where they are neighbours: 8 or 16 bytes
constexpr int64_t kBlocks = 4096;  // about eight waves of the largest GPU

constexpr int kThreads = 128;
// Rows of output a thread computes. Five leave little over at heights of 10, 19, 37 and 74; planes are taller.
template <int V>
constexpr int kRows = V == 1 ? 8 : 5;

// kTaps rows of the kernel at a time, of any width, vertical stride and dilation 1. kTaps = 1: one tap after the other
// of any kernel; a stride of 2 leaves little for two taps to share.
template <class T, int V, int kTaps>
__global__ void __launch_bounds__(kThreads, kTaps == 7 ? 2 : 3)
    depthwise_kernel(const __grid_constant__ DepthwiseConv c, const __grid_constant__ Tiles tiles, float* partials) {
  constexpr int rows = kRows<V>, span = rows - 1 + kTaps;
  float* weights = dynamic_shared<float>();

  // 1. The channels of this block, and their weights.
  unsigned group, part;
  tiles.place(group, part);
  int width = int(tiles.lanes) * V, lane = int(threadIdx.x) * V;
  int64_t first = int64_t(group) * width, channel = first + lane;
  stage_weights<T>(c, first, width, weights);
  bool exists = channel < c.outputs;
  int64_t source = !exists ? 0 : V == 1 ? int(channel) / int(c.multiplier) : channel;
  Pixels<const T> input(c.input, source);
  Pixels<T> output(c.output, exists ? channel : 0);
  Prologue<V> prologue(c, source);
  float bias[V] = {};
  if (exists && c.bias)
    for (int v = 0; v < V; ++v) bias[v] = to_float(static_cast<const T*>(c.bias)[(channel + v) * c.bias_stride]);
  Moments moments[V];

  int kh = int(c.h.kernel), steps = kTaps == 1 ? kh * int(c.w.kernel) : int(c.w.kernel);
  int step = kTaps == 1 ? int(c.h.stride) : 1;  // between the rows of input that are loaded
  int height = int(c.h.in), out_height = int(c.h.out);
  unsigned stop = exists ? tiles.strips : 0;
  for (unsigned strip = part * tiles.workers + threadIdx.y; strip < stop; strip += tiles.parts * tiles.workers) {
    Place place = tiles.at(strip);
    int out_row = place.strip * rows;
    int row = out_row * int(c.h.stride) - int(c.h.pad), column = place.column * int(c.w.stride) - int(c.w.pad);
    float sum[rows][V];
#pragma unroll
    for (int r = 0; r < rows; ++r)
#pragma unroll
      for (int v = 0; v < V; ++v) sum[r][v] = bias[v];

    // 2. One column of the kernel after the other: what it covers of the input, then all its products.
#pragma unroll 1
    for (int t = 0; t < steps; ++t) {
      int l = kTaps == 1 ? t / kh : t;
      int x = column + l * int(c.w.dilation), y = kTaps == 1 ? row + (t - l * kh) * int(c.h.dilation) : row;
      if (unsigned(x) >= unsigned(c.w.in)) continue;
      float pixels[span][V];
      load_column(input.at(place.image, y, x), step * input.h_stride, y, step, height, pixels);
      prologue(pixels, y, step, height);
#pragma unroll
      for (int i = 0; i < kTaps; ++i) {
        float weight[V];
        load(weights + (t * kTaps + i) * width + lane, weight);
#pragma unroll
        for (int r = 0; r < rows; ++r)
#pragma unroll
          for (int v = 0; v < V; ++v) sum[r][v] += weight[v] * pixels[r + i][v];
      }
    }

    // 3. Activation, the outputs, and the statistics of what was stored.
    activate(c.post, sum);
    T* to = output.at(place.image, out_row, place.column);
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (out_row + r >= out_height) continue;
      Vector<T, V> packed;
#pragma unroll
      for (int v = 0; v < V; ++v) packed.values[v] = from_float<T>(sum[r][v]), sum[r][v] = to_float(packed.values[v]);
      *reinterpret_cast<Vector<T, V>*>(to + r * output.h_stride) = packed;
    }
    if (!c.mean) continue;
    int left = out_height - out_row;
    float count = float(left < rows ? left : rows);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float mean = 0.f, squares = 0.f;
#pragma unroll
      for (int r = 0; r < rows; ++r) mean += r < left ? sum[r][v] : 0.f;
      mean /= count;
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        float deviation = r < left ? sum[r][v] - mean : 0.f;
        squares += deviation * deviation;
      }
      moments[v].add(count, mean, squares);
    }
  }
  if (!c.mean) return;
  __syncthreads();  // the weights have been read
  store_moments(moments, first, c.outputs, width, part, weights, partials);
}

template <class T>
bool channels_fit(const DepthwiseConv& c, int vector) {
  return c.multiplier == 1 && vectors_fit(c.input, c.channels, vector, sizeof(T)) &&
         vectors_fit(c.output, c.channels, vector, sizeof(T));
}

template <class T>
int vector_of(const DepthwiseConv& c) {
  bool staged = c.h.kernel * c.w.kernel * kVector * int64_t(sizeof(float)) <= kSharedBytes / 2;
  return staged && channels_fit<T>(c, kVector) ? kVector : 1;
}

int64_t unrolled_taps(const DepthwiseConv& c) {
  bool known = (c.h.kernel == 3 || c.h.kernel == 5 || c.h.kernel == 7) && c.h.stride == 1 && c.h.dilation == 1;
  return known ? c.h.kernel : 1;
}

// The same for the kernel and for its scratch.
bool tiles_of(const DepthwiseConv& c, int vector, Tiles& tiles) {
  return make_tiles(tiles, c.outputs, vector, is_channels_last(c.output, c.outputs), c.batch,
                    ceil_div(c.h.out, vector == 1 ? kRows<1> : kRows<kVector>), c.w.out, c.h.kernel * c.w.kernel,
                    kThreads, kBlocks);
}

template <class T, int V, int kTaps>
int run(const DepthwiseConv& c, const Tiles& tiles, float* partials, void* stream) {
  int64_t width = tiles.width(V), weights = c.h.kernel * c.w.kernel * width;
  int64_t moments = c.mean ? kThreads / 32 * 3 * width : 0;
  size_t shared = size_t(std::max(weights, moments)) * sizeof(float);
  return launch(depthwise_kernel<T, V, kTaps>, tiles.grid(), tiles.block(), shared, stream, c, tiles, partials);
}

template <class T, int V>
int run(const DepthwiseConv& c, float* partials, void* stream) {
  Tiles tiles;
  if (!tiles_of(c, V, tiles)) return kInvalidArgument;
  int error;
  switch (unrolled_taps(c)) {
    case 3: error = run<T, V, 3>(c, tiles, partials, stream); break;
    case 5: error = run<T, V, 5>(c, tiles, partials, stream); break;
    case 7: error = run<T, V, 7>(c, tiles, partials, stream); break;
    default: error = run<T, V, 1>(c, tiles, partials, stream);
  }
  if (error || !c.mean) return error;
  return launch(merge_moments_kernel, dim3(unsigned(ceil_div(c.outputs, kFinishLanes))),
                dim3(kFinishLanes, kFinishWorkers), 0, stream, partials, int64_t(tiles.parts), c.outputs, c.mean,
                c.variance);
}

}  // namespace

int64_t depthwise_conv_scratch_bytes(const DepthwiseConv& c) {
  if (!c.mean) return 0;
  return with_dtype(c.input.dtype, [&](auto zero) {
    Tiles tiles;
    if (!tiles_of(c, vector_of<decltype(zero)>(c), tiles)) return int64_t(0);
    return round_up(int64_t(tiles.parts) * 3 * c.outputs * int64_t(sizeof(float)), 64);
  });
}

int depthwise_conv(const DepthwiseConv& c, void* scratch, void* stream) {
  if (c.h.kernel * c.w.kernel > kLargestKernel) return kInvalidArgument;
  return with_dtype(c.input.dtype, [&](auto zero) {
    using T = decltype(zero);
    int vector = vector_of<T>(c);
    if (!c.mean) {
      constexpr int widest = 16 / sizeof(T);
      if (is_3x3(c) && vector == kVector)
        return is_plain(c) && channels_fit<T>(c, widest) ? rows<T, widest>(c, stream) : walk<T>(c, stream);
      if (int left = planes_left<T>(c); left >= 0) return planes<T>(c, left, stream);
      if (is_3x3(c) && is_plain(c)) return rows<T, 1>(c, stream);
    }
    float* partials = static_cast<float*>(scratch);
    return vector == kVector ? run<T, kVector>(c, partials, stream) : run<T, 1>(c, partials, stream);
  });
}

}  // namespace perfvl::cuda
