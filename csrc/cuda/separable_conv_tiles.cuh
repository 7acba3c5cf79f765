// How depthwise kernels divide a batch of images among blocks and threads, and what they load. The same for every
// layout: a block takes `lanes` vectors of V channels (one channel of NCHW), its workers take strips of pixels, one
// after the other.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/separable_conv.h"
#include "cuda/separable_conv_activation.cuh"

namespace perfvl::cuda {
namespace {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kInvalidArgument = 1;  // cudaErrorInvalidValue
constexpr int64_t kSharedBytes = 48 << 10;
constexpr int kFinishLanes = 32, kFinishWorkers = 16;  // of kernels that add up what blocks have left

// n / divisor by a multiplication, for n < 2^31.
class Divider {
 public:
  Divider() = default;
  explicit Divider(uint32_t divisor) : divisor_(divisor), shift_(0) {
    while ((uint64_t(1) << shift_) < divisor) ++shift_;
    multiplier_ = uint32_t((((uint64_t(1) << shift_) - divisor) << 32) / divisor + 1);
  }
  // The quotient; `n` becomes the remainder.
  __device__ uint32_t split(uint32_t& n) const {
    uint32_t quotient = (uint32_t((uint64_t(n) * multiplier_) >> 32) + n) >> shift_;
    n -= quotient * divisor_;
    return quotient;
  }

 private:
  uint32_t divisor_, multiplier_, shift_;
};

struct Place {  // of a worker: strip and column in units of the kernel
  int column, strip;
  int64_t image;
};

struct Tiles {
  unsigned lanes, workers;  // of a block: threadIdx.x and threadIdx.y
  unsigned groups, parts;   // blocks over channels, and over pixels
  unsigned strips;          // of the whole batch
  bool channels_first;      // neighbouring blocks are neighbouring channels, where these are neighbours in memory
  Divider by_group, by_column, by_strip;

  dim3 grid() const { return dim3(groups * parts); }
  dim3 block() const { return dim3(lanes, workers); }
  int64_t width(int vector) const { return int64_t(lanes) * vector; }  // channels of a block

  __device__ void place(unsigned& group, unsigned& part) const {
    unsigned rest = blockIdx.x, quotient = by_group.split(rest);
    group = channels_first ? rest : quotient;
    part = channels_first ? quotient : rest;
  }
  __device__ Place at(uint32_t strip) const {
    Place place;
    uint32_t line = by_column.split(strip);
    place.column = int(strip);
    place.image = by_strip.split(line);
    place.strip = int(line);
    return place;
  }
};

// Tiles for `channels` (a multiple of V) and strips of `columns` times `strips` in each image, `threads` a block. More
// than about `blocks` blocks would only fetch weights and write partial sums once more. False: too many strips.
inline bool make_tiles(Tiles& tiles, int64_t channels, int vector, bool channels_last, int64_t batch, int64_t strips,
                       int64_t columns, int64_t taps, unsigned threads, int64_t blocks) {
  int64_t vectors = channels / vector, all = batch * strips * columns;
  // 32 channels, 64 bytes or more, leave many columns of pixels to a block, which share what they read.
  unsigned lanes = 1;
  if (channels_last) {
    while ((lanes * vector < 32 || lanes < 8) && lanes < vectors) lanes *= 2;
    while ((lanes > 8 || lanes * vector > 32) && 8 * round_up(vectors, lanes) > 9 * vectors) lanes /= 2;
  }
  while (lanes > 1 && lanes * vector * taps * int64_t(sizeof(float)) > kSharedBytes / 2) lanes /= 2;
  int64_t groups = ceil_div(vectors, lanes);
  int64_t parts = std::min(ceil_div(all * lanes, threads), std::max<int64_t>(1, blocks / groups));
  if (all >= int64_t(1) << 31 || groups * parts >= int64_t(1) << 31) return false;
  tiles.lanes = lanes, tiles.workers = threads / lanes;
  tiles.groups = unsigned(groups), tiles.parts = unsigned(parts);
  tiles.strips = unsigned(all);
  tiles.channels_first = channels_last;
  tiles.by_group = Divider(unsigned(channels_last ? groups : parts));
  tiles.by_column = Divider(unsigned(columns)), tiles.by_strip = Divider(unsigned(strips));
  return true;
}

// How many blocks of the kernel a device runs at a time; asked once, of the device that needs it first.
template <auto kKernel>
int64_t one_wave(unsigned threads) {
#if defined(__CUDACC__)
  static const int64_t blocks = [&] {
    int device = 0, count = 1, each = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernel, int(threads), 0);
    return int64_t(count) * each;
  }();
  return blocks;
#else
  return threads ? 5 : 0;  // so few that threads take many strips
#endif
}

// Walks along rows. The workers of a block walk side by side, each along a strip of its own; column after column of all
// such groups of strips, a block's part is `length` of them.
struct Walks : Tiles {
  unsigned length, stop;

  // This thread's place, and how many of the `columns` of its strip come before `end`; `position` moves beyond them.
  // The last group has strips of no image.
  __device__ int at(unsigned& position, unsigned end, int columns, Place& place) const {
    unsigned column = position, strip = by_column.split(column) * workers + threadIdx.y;
    place.column = int(column);
    place.image = by_strip.split(strip);
    place.strip = int(strip);
    unsigned left = unsigned(columns) - column, count = end - position < left ? end - position : left;
    position += count;
    return int(count);
  }
};

// `columns` of `strips` in each image, by neighbouring channels.
inline bool make_walks(Walks& walks, int64_t channels, int vector, int64_t batch, int64_t strips, int64_t columns,
                       unsigned threads, int64_t blocks) {
  constexpr int64_t shortest = 6;  // where two walks meet, both load the columns between them
  if (!make_tiles(walks, channels, vector, true, batch, strips, columns, 9, threads, blocks)) return false;
  int64_t stop = ceil_div(batch * strips, walks.workers) * columns;
  if (stop >= int64_t(1) << 31) return false;
  int64_t length = ceil_div(stop, std::min<int64_t>(walks.parts, ceil_div(stop, shortest)));
  walks.length = unsigned(length), walks.stop = unsigned(stop), walks.parts = unsigned(ceil_div(stop, length));
  return true;
}

inline bool is_channels_last(const Image& image, int64_t channels) { return channels > 1 && image.c_stride == 1; }

inline bool is_3x3(const DepthwiseConv& c) {  // of stride and dilation 1
  auto three = [](const Side& side) { return side.kernel == 3 && side.stride == 1 && side.dilation == 1; };
  return three(c.h) && three(c.w);
}

// Whether nothing stands before the convolution.
inline bool is_plain(const DepthwiseConv& c) { return !c.scale && !c.shift && c.pre == Activation::none; }

// Whether V neighbouring channels of every pixel are one aligned vector.
inline bool vectors_fit(const Image& image, int64_t channels, int vector, int64_t item) {
  return channels % vector == 0 && image.c_stride == 1 && image.n_stride % vector == 0 &&
         image.h_stride % vector == 0 && image.w_stride % vector == 0 && aligned(image.data, size_t(vector * item));
}

template <class T>
struct Pixels {  // an image, as a thread sees it that starts at its first channel
  T* data;
  int64_t n_stride, h_stride, w_stride;
  __device__ Pixels(const Image& image, int64_t channel)
      : data(static_cast<T*>(image.data) + channel * image.c_stride),
        n_stride(image.n_stride),
        h_stride(image.h_stride),
        w_stride(image.w_stride) {}
  __device__ T* at(int64_t n, int64_t y, int64_t x) const { return data + n * n_stride + y * h_stride + x * w_stride; }
};

template <class T, int V>
__device__ inline void load(const T* from, float (&x)[V]) {
  Vector<T, V> packed = *reinterpret_cast<const Vector<T, V>*>(from);
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = to_float(packed.values[v]);
}

// kCount pixels a `stride` apart, 0 outside: their y are first, first + step, ..., the image's are below `height`.
template <class T, int kCount, int V>
__device__ inline void load_column(const T* from, int64_t stride, int first, int step, int height,
                                   float (&x)[kCount][V]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
#pragma unroll
    for (int v = 0; v < V; ++v) x[j][v] = 0.f;
    if (unsigned(first + j * step) < unsigned(height)) load(from + j * stride, x[j]);
  }
}

// What stands before the convolution. Forward and backward both compute it here, or a ReLU could differ between them.
template <int V>
struct Prologue {
  float scale[V], shift[V];
  bool affine;
  Activation activation;

  __device__ Prologue(const DepthwiseConv& c, int64_t channel)
      : affine(c.scale != nullptr || c.shift != nullptr), activation(c.pre) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      scale[v] = c.scale ? c.scale[channel + v] : 1.f;
      shift[v] = c.shift ? c.shift[channel + v] : 0.f;
    }
  }
  // x * scale + shift. Outside stays 0, and so does what every activation makes of it.
  template <int kCount>
  __device__ void normalize(float (&x)[kCount][V], int first, int step, int height) const {
    if (!affine) return;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      bool inside = unsigned(first + j * step) < unsigned(height);
#pragma unroll
      for (int v = 0; v < V; ++v) x[j][v] = inside ? fmaf(x[j][v], scale[v], shift[v]) : 0.f;
    }
  }
  template <int kCount>
  __device__ void operator()(float (&x)[kCount][V], int first, int step, int height) const {
    normalize(x, first, step, height);
    activate(activation, x);
  }
};

// The weights of the block's channels from `channel` on, as float32 [kw][kh][channels of the block] in shared memory.
// Of vectors of V channels, the first four of every lane come first: lanes would meet in a bank if all eight did.
template <class T, int V = 4>
__device__ inline void stage_weights(const DepthwiseConv& c, int64_t channel, int width, float* staged) {
  int kh = int(c.h.kernel), kw = int(c.w.kernel), taps = kh * kw;
  int threads = int(blockDim.x * blockDim.y), thread = int(threadIdx.y * blockDim.x + threadIdx.x);
  for (int e = thread; e < taps * width; e += threads) {
    int of = e / taps, tap = e - of * taps, i = tap / kw, l = tap - i * kw;
    bool exists = channel + of < c.outputs;
    const T* from = static_cast<const T*>(c.weight.data) + (channel + of) * c.weight.n_stride;
    int place = V <= 4 ? of : of % V / 4 * (width / V * 4) + of / V * 4 + of % 4;
    staged[(l * kh + i) * width + place] = exists ? to_float(from[i * c.weight.h_stride + l * c.weight.w_stride]) : 0.f;
  }
  __syncthreads();
}

// f(T()) for the type of the dtype.
template <class F>
auto with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: return f(float());
    case Dtype::bfloat16: return f(__nv_bfloat16());
    default: return f(__half());
  }
}

}  // namespace
}  // namespace perfvl::cuda
