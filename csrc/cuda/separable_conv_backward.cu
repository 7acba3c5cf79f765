// Depthwise convolution, backward: gradients of the input, of its scale and shift, and of the weight, in one pass.
//
// Cost: grad_output and input read once, grad_input written once, 6 bytes an element in 16 bits, 12 in float32; a
// kernel for each gradient would read grad_output twice. The pixels of a tile of input share a neighbourhood of
// grad_output, and each of its elements serves both sums:
//   grad_a[y] += weight[i] grad_output[y - i]    and    grad_weight[i] += a[y] grad_output[y - i],
// 18 FMAs a pixel of a 3x3. A block takes many tiles before it adds up its weight gradients, so partial sums are a few
// percent of the bytes. 3x3 of stride 1: separable_conv_walk_backward.cuh (of neighbouring channels; on an H100 at 1.6
// TB/s in 16 bits and 2.3 in float32) and separable_conv_rows_backward.cuh (of planes: 2.7 TB/s). Here are 5x5, 7x7,
// and stride 2 of 3x3 and 5x5 in NHWC; for all the rest separable_conv_any.cuh, one kernel per gradient.
#include "cuda/separable_conv_any.cuh"
#include "cuda/separable_conv_reduce.cuh"
#include "cuda/separable_conv_rows_backward.cuh"
#include "cuda/separable_conv_tiles.cuh"
#include "cuda/separable_conv_walk_backward.cuh"

namespace perfvl::cuda {
namespace {

constexpr int64_t kBlocks = 1056;  // two waves of the largest GPU; each block's partial sums are written and read

// Channels of a thread where these are neighbours, and threads of a block. Both follow from where the k x k sums of
// every channel of every thread live: in registers for 3x3, in shared memory, [k * k][threads][V], beyond.
template <int kSide>
constexpr int kVector = kSide == 3 ? 4 : 2;
template <int kSide>
constexpr int kThreads = kSide == 7 ? 64 : 128;
// The tile: kRows rows of kStride columns, so that every row and column of it meets taps known when compiling.
template <int V, int kStride>
constexpr int kRows = (V == 4 ? 4 : 8) / kStride;

template <class T, int V, int kSide, int kStride>
__global__ void __launch_bounds__(kThreads<kSide>, kSide == 7 ? 6 : 3)
    backward_kernel(const __grid_constant__ DepthwiseConvBackward b, const __grid_constant__ Tiles tiles,
                    float* partials) {
  constexpr int rows = kRows<V, kStride>, taps = kSide * kSide;
  constexpr int above = (kSide - 1) / kStride, span = above + (rows - 1) / kStride + 1;  // rows of grad_output
  constexpr bool in_registers = kSide == 3;
  using Sums = Vector<float, V>;
  const DepthwiseConv& c = b.forward;
  float* weights = dynamic_shared<float>();
  int thread = int(threadIdx.y * blockDim.x + threadIdx.x);

  // 1. The channels of this block, and their weights.
  unsigned group, part;
  tiles.place(group, part);
  int width = int(tiles.lanes) * V, lane = int(threadIdx.x) * V;
  int64_t first = int64_t(group) * width, channel = first + lane;
  stage_weights<T>(c, first, width, weights);
  bool exists = channel < c.channels;
  if (!exists) channel = 0;
  Pixels<const T> input(c.input, channel), grad_output(b.grad_output, channel);
  Pixels<T> grad_input(b.grad_input, channel);
  Prologue<V> prologue(c, channel);
  bool need_input = b.grad_input.data != nullptr, need_affine = b.grad_scale != nullptr;
  bool need_weight = b.grad_weight != nullptr;
  float scale_sum[V] = {}, shift_sum[V] = {};
  float register_sums[in_registers ? taps : 1][V] = {};
  Sums* shared_sums = reinterpret_cast<Sums*>(weights + taps * tiles.lanes * kVector<kSide>) + thread;
  if (!in_registers)
    for (int t = 0; t < taps; ++t) shared_sums[t * kThreads<kSide>] = Sums{};

  int height = int(c.h.in), columns = int(c.w.in), out_height = int(c.h.out), out_columns = int(c.w.out);
  unsigned stop = exists ? tiles.strips : 0;
  for (unsigned strip = part * tiles.workers + threadIdx.y; strip < stop; strip += tiles.parts * tiles.workers) {
    // 2. The tile's input. It begins where the first tap of an output can lie.
    Place place = tiles.at(strip);
    int row = place.strip * rows - int(c.h.pad) % kStride, column = place.column * kStride - int(c.w.pad) % kStride;
    int out_row = (row + int(c.h.pad)) / kStride - above, out_column = (column + int(c.w.pad)) / kStride;
    float a[kStride][rows][V], sums[kStride][rows][V] = {};
#pragma unroll
    for (int q = 0; q < kStride; ++q) {
      int in_height = unsigned(column + q) < unsigned(columns) ? height : 0;
      load_column(input.at(place.image, row, column + q), input.h_stride, row, 1, in_height, a[q]);
      prologue(a[q], row, 1, in_height);
    }

    // 3. One column of the kernel after the other: the outputs that it reaches from the tile, then all products.
#pragma unroll(in_registers ? kSide : 1)
    for (int left = 0; left < kSide; left += kStride) {
      int x = out_column - left / kStride;
      if (unsigned(x) >= unsigned(out_columns)) continue;
      float grads[span][V];
      load_column(grad_output.at(place.image, out_row, x), grad_output.h_stride, out_row, 1, out_height, grads);
#pragma unroll
      for (int q = 0; q < kStride; ++q) {
        int l = left + q;
        if (l >= kSide) continue;
        if (need_weight) {
#pragma unroll
          for (int i = 0; i < kSide; ++i) {
            float sum[V] = {};
#pragma unroll
            for (int r = i % kStride; r < rows; r += kStride)
#pragma unroll
              for (int v = 0; v < V; ++v) sum[v] += a[q][r][v] * grads[above + (r - i) / kStride][v];
            if constexpr (in_registers) {
#pragma unroll
              for (int v = 0; v < V; ++v) register_sums[i * kSide + l][v] += sum[v];
            } else {
              Sums& kept = shared_sums[(i * kSide + l) * kThreads<kSide>];
              Sums more = kept;
#pragma unroll
              for (int v = 0; v < V; ++v) more.values[v] += sum[v];
              kept = more;
            }
          }
        }
        if (!need_input && !need_affine) continue;
#pragma unroll
        for (int i = 0; i < kSide; ++i) {
          float weight[V];
          load(weights + (l * kSide + i) * width + lane, weight);
#pragma unroll
          for (int r = i % kStride; r < rows; r += kStride)
#pragma unroll
            for (int v = 0; v < V; ++v) sums[q][r][v] += weight[v] * grads[above + (r - i) / kStride][v];
        }
      }
    }
    if (!need_input && !need_affine) continue;

    // 4. Through the activation and the scale. The input is read again, from L1: kept, it would cost registers.
#pragma unroll
    for (int q = 0; q < kStride; ++q) {
      int in_height = unsigned(column + q) < unsigned(columns) ? height : 0;
      if (prologue.affine || prologue.activation != Activation::none) {
        float x[rows][V], z[rows][V];
        load_column(input.at(place.image, row, column + q), input.h_stride, row, 1, in_height, x);
#pragma unroll
        for (int r = 0; r < rows; ++r)
#pragma unroll
          for (int v = 0; v < V; ++v) z[r][v] = x[r][v];
        prologue.normalize(z, row, 1, in_height);
        activate_backward(prologue.activation, z, sums[q]);
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          bool inside = unsigned(row + r) < unsigned(in_height);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            scale_sum[v] += inside ? sums[q][r][v] * x[r][v] : 0.f;
            shift_sum[v] += inside ? sums[q][r][v] : 0.f;
            sums[q][r][v] *= prologue.scale[v];
          }
        }
      }
      if (!need_input) continue;
      T* to = grad_input.at(place.image, row, column + q);
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        if (unsigned(row + r) >= unsigned(in_height)) continue;
        Vector<T, V> packed;
#pragma unroll
        for (int v = 0; v < V; ++v) packed.values[v] = from_float<T>(sums[q][r][v]);
        *reinterpret_cast<Vector<T, V>*>(to + r * grad_input.h_stride) = packed;
      }
    }
  }

  // 5. The sums of this block, [parts][taps, scale, shift][channels].
  bool stores = thread < width && first + thread < c.channels;
  float* to = partials + int64_t(part) * (taps + 2) * c.channels + first + thread;
  if (need_weight) {
#pragma unroll(in_registers ? taps : 1)
    for (int t = 0; t < taps; ++t) {
      float own[V];
#pragma unroll
      for (int v = 0; v < V; ++v)
        own[v] = in_registers ? register_sums[in_registers ? t : 0][v] : shared_sums[t * kThreads<kSide>].values[v];
      float sum = sum_over_workers(own, width, weights);
      if (stores) to[t * c.channels] = sum;
    }
  }
  if (!need_affine) return;
  float scale = sum_over_workers(scale_sum, width, weights), shift = sum_over_workers(shift_sum, width, weights);
  if (stores) to[taps * c.channels] = scale, to[(taps + 1) * c.channels] = shift;
}

// Of the kernel that backward_kernel knows, and the vectors it takes. Side 0: none.
struct Shape {
  int side, vector;
};

Shape shape_of(const DepthwiseConvBackward& b) {
  const DepthwiseConv& c = b.forward;
  bool square = c.h.kernel == c.w.kernel && c.h.stride == c.w.stride && c.h.dilation == 1 && c.w.dilation == 1;
  int side = int(c.h.kernel), vector = side == 3 ? kVector<3> : kVector<5>;
  if (c.multiplier != 1 || !square || (side != 3 && side != 5 && side != 7)) return {};
  int64_t item = c.input.dtype == Dtype::float32 ? 4 : 2;
  for (const Image* image : {&c.input, &b.grad_output, &b.grad_input})
    if (image->data && !vectors_fit(*image, c.channels, vector, item)) vector = 1;
  bool known = c.h.stride == 1 || (c.h.stride == 2 && side != 7 && vector > 1);
  return known ? Shape{side, vector} : Shape{};
}

// The same for the kernel and for its scratch.
bool tiles_of(const DepthwiseConvBackward& b, Shape shape, Tiles& tiles) {
  const DepthwiseConv& c = b.forward;
  int64_t stride = c.h.stride, rows = (shape.vector == 4 ? kRows<4, 1> : kRows<1, 1>) / stride;
  return make_tiles(tiles, c.channels, shape.vector, is_channels_last(c.input, c.channels), c.batch,
                    ceil_div(c.h.in + c.h.pad % stride, rows), ceil_div(c.w.in + c.w.pad % stride, stride),
                    int64_t(shape.side) * shape.side, shape.side == 7 ? kThreads<7> : kThreads<5>, kBlocks);
}

// Of the partial sums; 0 where the kernel will refuse.
int64_t parts_of(const DepthwiseConvBackward& b, Shape shape) {
  Tiles tiles;
  Walks walks;
  if (!is_3x3(b.forward)) return tiles_of(b, shape, tiles) ? tiles.parts : 0;
  if (shape.vector == 1) return rows_of(b, tiles) ? tiles.parts : 0;
  return walks_of(b, walks) ? walks.parts : 0;
}

template <class T, int V, int kSide, int kStride>
int run(const DepthwiseConvBackward& b, void* scratch, void* stream) {
  Tiles tiles;
  if (!tiles_of(b, {kSide, V}, tiles)) return kInvalidArgument;
  constexpr int64_t taps = kSide * kSide;
  int64_t sums_kept = kSide == 3 ? 0 : taps * kThreads<kSide> * V;  // behind the weights
  size_t shared = size_t(taps * tiles.lanes * kVector<kSide> + sums_kept) * sizeof(float);
  float* partials = static_cast<float*>(scratch);
  int error =
      launch(backward_kernel<T, V, kSide, kStride>, tiles.grid(), tiles.block(), shared, stream, b, tiles, partials);
  return error ? error : sum_parts_of<T>(b, partials, tiles.parts, stream);
}

template <class T, int kSide>
int run(const DepthwiseConvBackward& b, int vector, void* scratch, void* stream) {
  if constexpr (kSide == 3) {
    if (b.forward.h.stride == 2) return run<T, kVector<3>, 3, 2>(b, scratch, stream);
    return vector == 1 ? rows_backward<T>(b, scratch, stream) : walk_backward<T>(b, scratch, stream);
  } else {
    if (vector == 1) return run<T, 1, kSide, 1>(b, scratch, stream);
    if constexpr (kSide == 5)
      if (b.forward.h.stride == 2) return run<T, kVector<5>, 5, 2>(b, scratch, stream);
    return run<T, kVector<kSide>, kSide, 1>(b, scratch, stream);
  }
}

}  // namespace

int64_t depthwise_conv_backward_scratch_bytes(const DepthwiseConvBackward& b) {
  Shape shape = shape_of(b);
  if (shape.side == 0) return any_backward_scratch_bytes(b);
  int64_t sums = parts_of(b, shape) * (shape.side * shape.side + 2) * b.forward.channels;
  return round_up(sums * int64_t(sizeof(float)), 64);
}

int depthwise_conv_backward(const DepthwiseConvBackward& b, void* scratch, void* stream) {
  return with_dtype(b.forward.input.dtype, [&](auto zero) {
    using T = decltype(zero);
    Shape shape = shape_of(b);
    switch (shape.side) {
      case 3: return run<T, 3>(b, shape.vector, scratch, stream);
      case 5: return run<T, 5>(b, shape.vector, scratch, stream);
      case 7: return run<T, 7>(b, shape.vector, scratch, stream);
      default: return any_backward<T>(b, scratch, stream);
    }
  });
}

}  // namespace perfvl::cuda
