// Rows of pixels as the kernels work on them, [pixel][channel] in float32. A row is staged once: its dtype and layout,
// the batch norm and activation before it and the zeros around it are dealt with there, so that loops know only dense
// vectors of channels.
#pragma once

#include <type_traits>

#include "cpu/activation.h"
#include "cpu/vec.h"
#include "image.h"

namespace perfvl {
namespace PVL_ISA {

inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }
inline const char* at(const Image& x, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<const char*>(x.data) +
         (n * x.n_stride + c * x.c_stride + h * x.h_stride + w * x.w_stride) * element_bytes(x.dtype);
}

// One value, or the first `lanes` values behind one another (the others 0), of any dtype.
inline float read(Dtype dtype, const void* p) {
  if (dtype == Dtype::float32) return *static_cast<const float*>(p);
  uint16_t h = *static_cast<const uint16_t*>(p);
  return dtype == Dtype::bfloat16 ? bfloat_to_float(h) : half_to_float(h);
}
inline Vec read_lanes(Dtype dtype, const void* p, int64_t lanes) {
  if (dtype == Dtype::float32) {
    if (lanes == kLanes) return load<Vec>(static_cast<const float*>(p));
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps(__mmask16((1u << lanes) - 1), p);
#else
    Vec v{};
    for (int64_t i = 0; i < lanes; ++i) v[i] = static_cast<const float*>(p)[i];
    return v;
#endif
  }
  HalfVec h{};
  if (lanes == kLanes) {
    h = load<HalfVec>(static_cast<const uint16_t*>(p));
  } else {
#if defined(__AVX512F__)
    h = (HalfVec)_mm256_maskz_loadu_epi16(__mmask16((1u << lanes) - 1), p);
#else
    for (int64_t i = 0; i < lanes; ++i) h[i] = static_cast<const uint16_t*>(p)[i];
#endif
  }
  return dtype == Dtype::bfloat16 ? widen_bfloat(h) : widen_half(h);
}
inline void write(Dtype dtype, void* p, float x) {
  if (dtype == Dtype::float32) {
    *static_cast<float*>(p) = x;
  } else {
    *static_cast<uint16_t*>(p) = dtype == Dtype::bfloat16 ? float_to_bfloat(x) : float_to_half(x);
  }
}
inline HalfVec narrow(Dtype dtype, Vec x) {
#if defined(__AVX512BF16__)
  if (dtype == Dtype::bfloat16) return (HalfVec)_mm512_cvtneps_pbh(x);
#endif
  return dtype == Dtype::bfloat16 ? narrow_bfloat(x) : narrow_half(x);
}
// What is left of x after it has been stored.
inline Vec rounded(Dtype dtype, Vec x) {
  if (dtype == Dtype::float32) return x;
  return dtype == Dtype::bfloat16 ? widen_bfloat(narrow(dtype, x)) : widen_half(narrow(dtype, x));
}
inline void write_lanes(Dtype dtype, void* p, Vec x, int64_t lanes) {
  if (dtype == Dtype::float32) {
    if (lanes == kLanes) return store(static_cast<float*>(p), x);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, __mmask16((1u << lanes) - 1), x);
#else
    for (int64_t i = 0; i < lanes; ++i) static_cast<float*>(p)[i] = x[i];
#endif
    return;
  }
  HalfVec h = narrow(dtype, x);
  if (lanes == kLanes) return store(static_cast<uint16_t*>(p), h);
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, __mmask16((1u << lanes) - 1), (__m256i)h);
#else
  for (int64_t i = 0; i < lanes; ++i) static_cast<uint16_t*>(p)[i] = h[i];
#endif
}

// Channels [c, c + lanes) of the pixel at `p`.
inline Vec read_channels(const Image& x, const char* p, int64_t c, int64_t lanes) {
  int64_t bytes = element_bytes(x.dtype);
  if (x.c_stride == 1) return read_lanes(x.dtype, p + c * bytes, lanes);
  Vec v{};
  for (int64_t i = 0; i < lanes; ++i) v[i] = read(x.dtype, p + (c + i) * x.c_stride * bytes);
  return v;
}

// Walks over the pixels of rows of `width`, from pixel number `start` after the beginning of row `h`.
struct Pixel {
  Pixel(const Image& x, int64_t n, int64_t c, int64_t h, int64_t start, int64_t width) {
    if (!x.data) return;
    at = const_cast<char*>(perfvl::PVL_ISA::at(x, n, c, h, 0));
    step_ = x.w_stride * element_bytes(x.dtype);
    wrap_ = (x.h_stride - width * x.w_stride) * element_bytes(x.dtype);
    at += start * step_;
    if (wrap_ == 0) return;  // rows behind one another: nothing to divide
    width_ = width, left_ = width - start % width;
    at += start / width * wrap_;
  }
  void next() {
    at += step_;
    if (--left_ == 0) at += wrap_, left_ = width_;
  }
  char* at = nullptr;

 private:
  int64_t width_ = 0, left_ = INT64_MAX, step_ = 0, wrap_ = 0;
};

// Channels of a staged pixel: whole vectors, an odd number of them, so that pixels do not all fall into the same sets
// of the cache.
inline int64_t staged_channels(int64_t channels) { return (ceil_div(channels, kLanes) | 1) * kLanes; }

// The affine map and activation at the edges of the op, on `lanes` channels from c on.
struct Pointwise {
  const float *scale, *shift;
  Activation activation;
  Vec affine(Vec x, int64_t c, int64_t lanes) const {
    if (scale) x = x * read_lanes(Dtype::float32, scale + c, lanes);
    if (shift) x = x + read_lanes(Dtype::float32, shift + c, lanes);
    return x;
  }
  Vec operator()(Vec x, int64_t c, int64_t lanes) const { return activate(activation, affine(x, c, lanes)); }
};

// Asks for what lies a page behind a pixel that is being read: the processor's own prefetching ends with each page.
inline void prefetch_pixel(const char* from, int64_t bytes) {
  constexpr int64_t kPage = 4096, kLine = 64;
  for (int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch(from + kPage + b);
}

// Pixels of channels behind one another, without a decision for every vector. f(0) is 0.
template <Dtype dtype, class F>
void stage_dense(const char* from, int64_t step, int64_t count, int64_t channels, const F& f, float* out,
                 int64_t stride) {
  constexpr int64_t kBytes = dtype == Dtype::float32 ? 4 : 2;
  for (int64_t w = 0; w < count; ++w, from += step, out += stride) {
    prefetch_pixel(from, channels * kBytes);
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) store(out + c, f(read_lanes(dtype, from + c * kBytes, kLanes)));
    if (c < channels) store(out + c, f(read_lanes(dtype, from + c * kBytes, channels - c)));
  }
}

// out[w][c] = f(x[n, c / multiplier, h, w]) for w in [first, first + count); padding channels up to a whole vector are
// 0.
inline void stage_pixels(const Image& x, int64_t n, int64_t h, int64_t first, int64_t count, int64_t channels,
                         int64_t multiplier, const Pointwise& f, float* out, int64_t stride) {
  bool plain = !f.scale && !f.shift && f.activation == Activation::none;
  bool rectified = !f.scale && !f.shift && f.activation == Activation::relu;
  if (x.c_stride == 1 && multiplier == 1 && (plain || rectified) && x.dtype != Dtype::float16) {
    auto stage = [&](auto dtype) {
      const char* from = at(x, n, 0, h, first);
      int64_t step = x.w_stride * element_bytes(dtype);
      if (plain) return stage_dense<dtype>(from, step, count, channels, [](Vec v) { return v; }, out, stride);
      stage_dense<dtype>(from, step, count, channels, [](Vec v) { return max(Vec{}, v); }, out, stride);
    };
    using std::integral_constant;
    if (x.dtype == Dtype::float32) return stage(integral_constant<Dtype, Dtype::float32>{});
    return stage(integral_constant<Dtype, Dtype::bfloat16>{});
  }
  if (x.c_stride == 1 && multiplier == 1) {
    for (int64_t w = 0; w < count; ++w) {
      const char* from = at(x, n, 0, h, first + w);
      float* to = out + w * stride;
      int64_t bytes = element_bytes(x.dtype), c = 0;
      prefetch_pixel(from, channels * bytes);
      for (; c + kLanes <= channels; c += kLanes)
        store(to + c, f(read_lanes(x.dtype, from + c * bytes, kLanes), c, kLanes));
      if (c < channels) {
        Vec last = f(read_lanes(x.dtype, from + c * bytes, channels - c), c, channels - c);
        store(to + c, last);
        for (int64_t lane = channels - c; lane < kLanes; ++lane) to[c + lane] = 0.f;
      }
    }
    return;
  }
  // Another layout: gathered into vectors of channels, a few pixels at a time, so that both sides stay in cache.
  constexpr int64_t kBlock = 16;
  int64_t step = x.w_stride * element_bytes(x.dtype), inner = channels * multiplier;
  for (int64_t w0 = 0; w0 < count; w0 += kBlock) {
    int64_t w1 = w0 + kBlock < count ? w0 + kBlock : count;
    for (int64_t c = 0; c < inner; c += kLanes) {
      int64_t lanes = inner - c < kLanes ? inner - c : kLanes;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        float* to = out + c + lane;
        if (lane >= lanes) {
          for (int64_t w = w0; w < w1; ++w) to[w * stride] = 0.f;
          continue;
        }
        int64_t channel = (c + lane) / multiplier;
        const char* from = at(x, n, channel, h, first);
        for (int64_t w = w0; w < w1; ++w) to[w * stride] = read(x.dtype, from + w * step);
        if (multiplier > 1 && !plain)
          for (int64_t w = w0; w < w1; ++w) to[w * stride] = f(broadcast(to[w * stride]), channel, 1)[0];
      }
      if (multiplier > 1 || plain) continue;
      for (int64_t w = w0; w < w1; ++w) {
        Vec pixel = f(load<Vec>(out + w * stride + c), c, lanes);
        write_lanes(Dtype::float32, out + w * stride + c, pixel, lanes);
      }
    }
  }
}

// A row with its zeros: `width` pixels, of which number `pad` is the image's first. Rows outside of it are zeros.
inline void stage_row(const Image& x, int64_t n, int64_t h, int64_t height, int64_t image_width, int64_t pad,
                      int64_t width, int64_t channels, int64_t multiplier, const Pointwise& f, float* out,
                      int64_t stride) {
  int64_t begin = pad < width ? pad : width, end = pad + image_width < width ? pad + image_width : width;
  if (h < 0 || h >= height) begin = end = width;
  std::memset(out, 0, begin * stride * sizeof(float));
  if (begin < end) stage_pixels(x, n, h, 0, end - begin, channels, multiplier, f, out + begin * stride, stride);
  std::memset(out + end * stride, 0, (width - end) * stride * sizeof(float));
}

}  // namespace PVL_ISA
}  // namespace perfvl
