// Blocks of pixels as the color_transform kernels work on them: a plane of float32 for each channel. Dtypes and layouts
// are dealt with on the way in and out, so that the arithmetic knows only planes.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cpu/image_rows.h"

namespace perfvl {
namespace PVL_ISA {

constexpr int64_t kPixels = 128;  // of a block, and floats of a plane

// Pixels of an image, `step` apart.
struct Run {
  char* data;
  int64_t step, channel_stride;  // in elements
  int64_t element;               // bytes
  Dtype dtype;
  bool bytes;  // numbers of 8 bits, whatever the dtype
};

// All pixels in blocks. None goes across the end of a row, unless rows follow one another in every image.
class Blocks {
 public:
  struct Block {
    int64_t n, h, w, pixels;
  };

  Blocks(int64_t batch, int64_t height, int64_t width, std::initializer_list<Image> images)
      : batch_(batch), rows_(height), width_(width), column_(width == 1) {
    bool joined = true;
    for (const Image& x : images)
      if (x.data && height > 1 && x.h_stride != width * step(x)) joined = false;
    if (joined) width_ *= rows_, rows_ = 1;
    across_ = ceil_div(width_, kPixels);
  }
  int64_t count() const { return batch_ * rows_ * across_; }
  Block operator[](int64_t i) const {
    int64_t row = i / across_, w = i % across_ * kPixels;
    return {row / rows_, row % rows_, w, std::min(kPixels, width_ - w)};
  }
  Run run(const Image& x, const Block& b, bool bytes = false) const {
    int64_t element = bytes ? 1 : element_bytes(x.dtype);
    int64_t offset = b.n * x.n_stride + b.h * x.h_stride + b.w * step(x);
    return {static_cast<char*>(x.data) + offset * element, step(x), x.c_stride, element, x.dtype, bytes};
  }

 private:
  // The stride of a dimension of one element says nothing.
  int64_t step(const Image& x) const { return column_ ? x.h_stride : x.w_stride; }

  int64_t batch_, rows_, width_, across_ = 0;
  bool column_;
};

// Numbers that lie behind one another.
inline void widen(const Run& x, const char* from, int64_t count, float* to) {
  if (x.bytes) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = float(bytes[i]);
    return;
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    int64_t lanes = std::min<int64_t>(kLanes, count - i);
    Vec v = read_lanes(x.dtype, from + i * x.element, lanes);
    if (lanes == kLanes)
      store(to + i, v);
    else
      write_lanes(Dtype::float32, to + i, v, lanes);
  }
}
inline void narrow_to(const Run& x, const float* from, int64_t count, char* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    int64_t lanes = std::min<int64_t>(kLanes, count - i);
    write_lanes(x.dtype, to + i * x.element, read_lanes(Dtype::float32, from + i, lanes), lanes);
  }
}

// Pixels of three channels, the usual ones, for the compiler to make shuffles of.
inline void split(const float* __restrict pixels, int64_t count, float* __restrict planes) {
  for (int64_t i = 0; i < count; ++i) {
    planes[i] = pixels[3 * i];
    planes[kPixels + i] = pixels[3 * i + 1];
    planes[2 * kPixels + i] = pixels[3 * i + 2];
  }
}
inline void join(const float* __restrict planes, int64_t count, float* __restrict pixels) {
  for (int64_t i = 0; i < count; ++i) {
    pixels[3 * i] = planes[i];
    pixels[3 * i + 1] = planes[kPixels + i];
    pixels[3 * i + 2] = planes[2 * kPixels + i];
  }
}

// planes[c][i] <- channel c of pixel i.
inline void read_planes(const Run& x, int64_t channels, int64_t count, float* planes) {
  if (x.step == 1) {
    for (int64_t c = 0; c < channels; ++c)
      widen(x, x.data + c * x.channel_stride * x.element, count, planes + c * kPixels);
  } else if (x.channel_stride == 1 && x.step == channels) {
    alignas(64) float pixels[kMostColors * kPixels];
    widen(x, x.data, count * channels, pixels);
    if (channels == 3) return split(pixels, count, planes);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < count; ++i) planes[c * kPixels + i] = pixels[i * channels + c];
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < count; ++i) {
        const char* from = x.data + (c * x.channel_stride + i * x.step) * x.element;
        planes[c * kPixels + i] = x.bytes ? float(*reinterpret_cast<const uint8_t*>(from)) : read(x.dtype, from);
      }
  }
}

// The other way, for images of either dense layout.
inline void write_planes(const float* planes, int64_t channels, int64_t count, const Run& x) {
  if (x.step == 1) {
    for (int64_t c = 0; c < channels; ++c)
      narrow_to(x, planes + c * kPixels, count, x.data + c * x.channel_stride * x.element);
    return;
  }
  alignas(64) float pixels[kMostColors * kPixels];
  if (channels == 3) {
    join(planes, count, pixels);
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < count; ++i) pixels[i * channels + c] = planes[c * kPixels + i];
  }
  narrow_to(x, pixels, count * channels, x.data);
}

}  // namespace PVL_ISA
}  // namespace perfvl
