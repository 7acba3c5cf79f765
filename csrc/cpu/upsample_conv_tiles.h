// Nearest x2 and a 3x3 convolution behind it, as nine products at the smaller size.
//
// In one dimension, with weights (w0, w1, w2) and s = w0 + w1 + w2, the two outputs beside input pixel i are
//   even = x[i-1] w0 + x[i] (w1 + w2) = (x[i-1] - x[i]) w0 + x[i] s,
//   odd  = x[i] (w0 + w1) + x[i+1] w2 = x[i] s + (x[i+1] - x[i]) w2:
// three products, (x[i-1] - x[i]) w0, x[i] s and (x[i+1] - x[i]) w2, where the convolution takes six and its four
// phases four. In two dimensions nine, for 36 and 16. (Winograd's F(2, 3) on rows a, b, b, c: its fourth product is 0.)
// Zeros around the image are zeros of x; borders are no special case. The gradients are the transposed maps:
//   dx[i] = (even[i+1] - even[i]) w0 + (even[i] + odd[i]) s + (odd[i-1] - odd[i]) w2,
//   dw0 = sum (x[i-1] - x[i]) even[i] + ds, dw1 = ds = sum x[i] (even[i] + odd[i]), dw2 = sum (x[i+1] - x[i]) odd[i] +
//   ds.
// A plane is one of the three operands of a dimension, or one of their nine combinations.
#pragma once

#include <algorithm>

#include "cpu/image_rows.h"
#include "upsample_conv.h"

namespace perfvl {
namespace PVL_ISA {

constexpr int kPlanes = 9;

// A rectangle of input pixels of one image, or several whole images.
struct Tile {
  int64_t n, h, w;  // the first
  int64_t images, rows, width;
  int64_t pixels() const { return images * rows * width; }
};

struct Tiling {
  int64_t batch, height, width;
  int64_t images, rows, columns;  // of a tile

  Tiling(const UpsampleConv& conv, int64_t pixels) : batch(conv.batch), height(conv.height), width(conv.width) {
    constexpr int64_t kWidest = 32;  // a tile that is wide and low has more neighbours
    auto equal = [](int64_t size, int64_t most) { return ceil_div(size, ceil_div(size, std::max<int64_t>(1, most))); };
    columns = equal(width, kWidest);
    rows = equal(height, pixels / columns);
    images = rows == height && columns == width ? equal(batch, pixels / (rows * columns)) : 1;
  }
  int64_t pixels() const { return images * rows * columns; }  // at most
  int64_t count() const { return ceil_div(batch, images) * ceil_div(height, rows) * ceil_div(width, columns); }
  Tile operator[](int64_t i) const {
    int64_t across = ceil_div(width, columns), down = ceil_div(height, rows);
    Tile t{i / (across * down) * images, i / across % down * rows, i % across * columns, 0, 0, 0};
    t.images = std::min(images, batch - t.n), t.rows = std::min(rows, height - t.h);
    t.width = std::min(columns, width - t.w);
    return t;
  }
};

inline Image from_channel(Image x, int64_t c) {
  x.data = static_cast<char*>(x.data) + c * x.c_stride * element_bytes(x.dtype);
  return x;
}

// Pixels [first, first + count) of row `h`, zeros where the image is not.
inline void stage_span(const Image& x, int64_t n, int64_t h, int64_t height, int64_t width, int64_t first,
                       int64_t count, int64_t channels, float* out, int64_t stride) {
  int64_t begin = std::clamp<int64_t>(-first, 0, count), end = std::clamp(width - first, begin, count);
  if (h < 0 || h >= height) begin = end = count;
  std::memset(out, 0, begin * stride * sizeof(float));
  Pointwise plain{nullptr, nullptr, Activation::none};
  if (begin < end) stage_pixels(x, n, h, first + begin, end - begin, channels, 1, plain, out + begin * stride, stride);
  std::memset(out + end * stride, 0, (count - end) * stride * sizeof(float));
}

// The tile's pixels and those around it: [image][rows + 2][width + 2][stride], channels [c, c + channels).
inline int64_t input_patch(const Tiling& t) { return t.images * (t.rows + 2) * (t.columns + 2); }
inline void stage_input(const UpsampleConv& conv, const Tile& t, int64_t c, int64_t channels, float* patch,
                        int64_t stride) {
  Image x = from_channel(conv.input, c);
  for (int64_t g = 0; g < t.images; ++g)
    for (int64_t r = -1; r <= t.rows; ++r, patch += (t.width + 2) * stride)
      stage_span(x, t.n + g, t.h + r, conv.height, conv.width, t.w - 1, t.width + 2, channels, patch, stride);
}

// The gradient of the four outputs of every pixel of the tile and, with `around` 1, of the outputs next to these:
// [image][2 rows + 2 around][2 width + 2 around][stride].
inline int64_t output_patch(const Tiling& t, int64_t around) {
  return t.images * (2 * t.rows + 2 * around) * (2 * t.columns + 2 * around);
}
inline void stage_gradient(const UpsampleConv& conv, const Image& gradient, const Tile& t, int64_t around, int64_t c,
                           int64_t channels, float* patch, int64_t stride) {
  Image x = from_channel(gradient, c);
  int64_t width = 2 * t.width + 2 * around;
  for (int64_t g = 0; g < t.images; ++g)
    for (int64_t r = -around; r < 2 * t.rows + around; ++r, patch += width * stride)
      stage_span(x, t.n + g, 2 * t.h + r, 2 * conv.height, 2 * conv.width, 2 * t.w - around, width, channels, patch,
                 stride);
}

// Three planes of a tile, [plane][pixel][stride], of the vertical operand a: out = first + plane * plane_stride.
struct PlaneRows {
  float* first;
  int64_t plane_stride, stride;
};

// (x[-1] - x[0], x[0], x[1] - x[0]): number `a` of the three.
inline Vec difference(int a, Vec before, Vec at, Vec after) { return a == 0 ? before - at : a == 1 ? at : after - at; }

template <int a>
void input_planes(const Tile& t, const float* patch, int64_t channels, const PlaneRows& out) {
  int64_t stride = out.stride, row = (t.width + 2) * stride;
  for (int64_t c = 0; c < channels; c += kLanes) {
    float* to = out.first + c;
    for (int64_t g = 0; g < t.images; ++g)
      for (int64_t r = 0; r < t.rows; ++r) {
        const float* corner = patch + (g * (t.rows + 2) + r) * row + c;
        auto column = [&](int64_t w) {
          const float* x = corner + w * stride;
          Vec at = load<Vec>(x + row);
          if constexpr (a == 1) return at;
          return (a == 0 ? load<Vec>(x) : load<Vec>(x + 2 * row)) - at;
        };
        Vec before = column(0), at = column(1);
        for (int64_t w = 0; w < t.width; ++w, to += stride) {
          Vec after = column(w + 2);
          store(to, before - at);
          store(to + out.plane_stride, at);
          store(to + 2 * out.plane_stride, after - at);
          before = at, at = after;
        }
      }
  }
}

// What the gradient of the input is made of: (even[1] - even[0], even[0] + odd[0], odd[-1] - odd[0]) both ways. `patch`
// has one row and column around.
template <int a>
void gradient_planes(const Tile& t, const float* patch, int64_t channels, const PlaneRows& out) {
  int64_t stride = out.stride, row = (2 * t.width + 2) * stride;
  for (int64_t c = 0; c < channels; c += kLanes) {
    float* to = out.first + c;
    for (int64_t g = 0; g < t.images; ++g)
      for (int64_t r = 0; r < t.rows; ++r) {
        const float* corner = patch + (g * (2 * t.rows + 2) + 2 * r) * row + c;  // odd[-1]
        auto column = [&](int64_t w) {
          const float* x = corner + w * stride;
          if constexpr (a == 0) return load<Vec>(x + 3 * row) - load<Vec>(x + row);
          if constexpr (a == 1) return load<Vec>(x + row) + load<Vec>(x + 2 * row);
          return load<Vec>(x) - load<Vec>(x + 2 * row);
        };
        Vec odd_before = column(0), even = column(1);
        for (int64_t w = 0; w < t.width; ++w, to += stride) {
          Vec odd = column(2 * w + 2), even_after = column(2 * w + 3);
          store(to, even_after - even);
          store(to + out.plane_stride, even + odd);
          store(to + 2 * out.plane_stride, odd_before - odd);
          odd_before = odd, even = even_after;
        }
      }
  }
}

// What the gradient of the weights multiplies the input's planes with: (even, even + odd, odd) both ways. `patch` has
// nothing around.
template <int a>
void output_planes(const Tile& t, const float* patch, int64_t channels, const PlaneRows& out) {
  int64_t stride = out.stride, row = 2 * t.width * stride;
  for (int64_t c = 0; c < channels; c += kLanes) {
    float* to = out.first + c;
    for (int64_t r = 0; r < t.images * t.rows; ++r) {
      const float* x = patch + 2 * r * row + c;
      for (int64_t w = 0; w < t.width; ++w, x += 2 * stride, to += stride) {
        auto column = [&](const float* from) {
          if constexpr (a == 0) return load<Vec>(from);
          if constexpr (a == 2) return load<Vec>(from + row);
          return load<Vec>(from) + load<Vec>(from + row);
        };
        Vec even = column(x), odd = column(x + stride);
        store(to, even);
        store(to + out.plane_stride, even + odd);
        store(to + 2 * out.plane_stride, odd);
      }
    }
  }
}

// f(integral constant a) for the three vertical operands.
template <class F>
void for_rows(const F& f) {
  f(std::integral_constant<int, 0>{});
  f(std::integral_constant<int, 1>{});
  f(std::integral_constant<int, 2>{});
}

// Pixels [w, w + count) of a row, from [pixel][stride] floats: `channels` from c on.
inline void write_pixels(const Image& out, int64_t n, int64_t h, int64_t w, int64_t count, int64_t c, int64_t channels,
                         const float* from, int64_t stride) {
  int64_t bytes = element_bytes(out.dtype);
  char* to = const_cast<char*>(at(out, n, c, h, w));
  if (out.c_stride == 1) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < channels; j += kLanes)
        write_lanes(out.dtype, to + (i * out.w_stride + j) * bytes, load<Vec>(from + i * stride + j),
                    std::min<int64_t>(kLanes, channels - j));
    return;
  }
  for (int64_t j = 0; j < channels; j += kLanes)
    for (int64_t i = 0; i < count; i += kLanes) {
      int64_t pixels = std::min<int64_t>(kLanes, count - i);
      Vec square[kLanes];
      for (int64_t k = 0; k < kLanes; ++k) square[k] = k < pixels ? load<Vec>(from + (i + k) * stride + j) : Vec{};
      transpose(square);
      for (int64_t k = 0; k < std::min<int64_t>(kLanes, channels - j); ++k)
        write_lanes(out.dtype, to + ((j + k) * out.c_stride + i) * bytes, square[k], pixels);
    }
}

}  // namespace PVL_ISA
}  // namespace perfvl
