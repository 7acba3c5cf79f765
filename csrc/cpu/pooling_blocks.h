// Images in blocks of channels, [pixel][channel], a vector of channels for each pixel: the layout that windows are
// walked over in. Channels_last images have it already; of others a few rows at a time are turned.
#pragma once

#include <algorithm>

#include "cpu/image_rows.h"
#include "pooling.h"

namespace perfvl {
namespace PVL_ISA {

typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));

// How numbers lie in memory. Both are read as vectors of 32 bits.
template <Dtype D>
struct Floats {
  static constexpr int64_t kBytes = D == Dtype::float32 ? 4 : 2;
  static Vec read(const char* p, int64_t lanes) { return read_lanes(D, p, lanes); }
  static void write(char* p, Vec x, int64_t lanes) { write_lanes(D, p, x, lanes); }
};
// Integers from 0 to 255.
struct Bytes {
  static constexpr int64_t kBytes = 1;
  static Vec read(const char* p, int64_t lanes) {
    ByteVec b{};
    if (lanes == kLanes)
      b = load<ByteVec>(p);
    else
      std::memcpy(&b, p, size_t(lanes));
#if defined(__AVX512F__)  // gcc 12 converts lane by lane
    return (Vec)_mm512_cvtepu8_epi32((__m128i)b);
#else
    return from_bits(__builtin_convertvector(b, IntVec));
#endif
  }
  static void write(char* p, Vec x, int64_t lanes) {
#if defined(__AVX512F__)
    ByteVec b = (ByteVec)_mm512_cvtepi32_epi8((__m512i)x);
#else
    ByteVec b = __builtin_convertvector(bits(x), ByteVec);
#endif
    if (lanes == kLanes) return store(p, b);
    std::memcpy(p, &b, size_t(lanes));
  }
};
using Words = Floats<Dtype::float32>;  // also integers, in a block

// The images of one sample, from one of its channels on; steps in bytes.
struct Plane {
  char* data = nullptr;
  int64_t c_step = 0, h_step = 0, w_step = 0;
  char* at(int64_t h, int64_t w) const { return data + h * h_step + w * w_step; }
};
inline Plane plane(const Image& x, int64_t n, int64_t c) {
  int64_t bytes = element_bytes(x.dtype);
  return {const_cast<char*>(at(x, n, c, 0, 0)), x.c_stride * bytes, x.h_stride * bytes, x.w_stride * bytes};
}
inline Plane plane(const Positions& x, int64_t n, int64_t c) {
  if (!x.data) return {};
  return {reinterpret_cast<char*>(x.data) + n * x.n_stride + c * x.c_stride, x.c_stride, x.h_stride, x.w_stride};
}
// A block of rows that begins with row `h` of an image.
inline Plane block(float* data, int64_t h, int64_t width) {
  int64_t step = kLanes * int64_t(sizeof(float));
  return {reinterpret_cast<char*>(data) - h * width * step, 0, width * step, step};
}

// The square turned: lane j of vector i becomes lane i of vector j.
inline void turn(Vec (&r)[kLanes]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  Vec t[kLanes];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    Vec low = r[i], high = r[i + 4];
    r[i] = _mm256_permute2f128_ps(low, high, 0x20);
    r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  }
#elif defined(__x86_64__) && !defined(__AVX512F__)
  __m128 a = r[0], b = r[1], c = r[2], d = r[3];
  _MM_TRANSPOSE4_PS(a, b, c, d);
  r[0] = a, r[1] = b, r[2] = c, r[3] = d;
#else
  transpose(r);
#endif
}

// f(start, c_step, first pixel, count) for every run of pixels that lie w_step apart, of rows [h, h + rows).
template <class F>
void by_run(const Plane& x, int64_t h, int64_t rows, int64_t width, const F& f) {
  if (x.h_step == width * x.w_step) return f(x.at(h, 0), int64_t(0), rows * width);
  for (int64_t r = 0; r < rows; ++r) f(x.at(h + r, 0), r * width, width);
}

// A square of `pixels` pixels of `lanes` channels to or from a block. With constants for both the loops unroll.
template <class T>
inline void stage_square(const char* from, int64_t c_step, int64_t lanes, int64_t pixels, float* to) {
  Vec square[kLanes];
  for (int64_t c = 0; c < kLanes; ++c) square[c] = c < lanes ? T::read(from + c * c_step, pixels) : Vec{};
  turn(square);
  for (int64_t i = 0; i < pixels; ++i) store(to + i * kLanes, square[i]);
}
template <class T>
inline void unstage_square(const float* from, char* to, int64_t c_step, int64_t lanes, int64_t pixels) {
  Vec square[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) square[i] = i < pixels ? load<Vec>(from + i * kLanes) : Vec{};
  turn(square);
  for (int64_t c = 0; c < lanes; ++c) T::write(to + c * c_step, square[c], pixels);
}

// Rows [h, h + rows) of `lanes` channels into a block; lanes without a channel become 0.
template <class T>
[[gnu::flatten]] void stage(const Plane& x, int64_t lanes, int64_t h, int64_t rows, int64_t width, float* out) {
  by_run(x, h, rows, width, [&](const char* from, int64_t first, int64_t count) {
    float* to = out + first * kLanes;
    int64_t i = 0;
    if (x.c_step == T::kBytes) {
      for (; i < count; ++i) store(to + i * kLanes, T::read(from + i * x.w_step, lanes));
    } else if (x.w_step == T::kBytes) {
      if (lanes == kLanes)
        for (; i + kLanes <= count; i += kLanes)
          stage_square<T>(from + i * T::kBytes, x.c_step, kLanes, kLanes, to + i * kLanes);
      for (; i < count; i += kLanes)
        stage_square<T>(from + i * T::kBytes, x.c_step, lanes, std::min<int64_t>(kLanes, count - i), to + i * kLanes);
    } else {
      for (; i < count; ++i) {
        Vec pixel{};
        for (int64_t c = 0; c < lanes; ++c) pixel[c] = T::read(from + c * x.c_step + i * x.w_step, 1)[0];
        store(to + i * kLanes, pixel);
      }
    }
  });
}

// The other way, into an image that is dense or channels_last.
template <class T>
[[gnu::flatten]] void unstage(const float* block, const Plane& x, int64_t lanes, int64_t h, int64_t rows,
                              int64_t width) {
  by_run(x, h, rows, width, [&](char* to, int64_t first, int64_t count) {
    const float* from = block + first * kLanes;
    int64_t i = 0;
    if (x.c_step == T::kBytes) {
      for (; i < count; ++i) T::write(to + i * x.w_step, load<Vec>(from + i * kLanes), lanes);
      return;
    }
    if (lanes == kLanes)
      for (; i + kLanes <= count; i += kLanes)
        unstage_square<T>(from + i * kLanes, to + i * T::kBytes, x.c_step, kLanes, kLanes);
    for (; i < count; i += kLanes)
      unstage_square<T>(from + i * kLanes, to + i * T::kBytes, x.c_step, lanes, std::min<int64_t>(kLanes, count - i));
  });
}

// f(task, share) for all tasks, on no more threads than their work is worth; every share has scratch of its own.
inline int64_t share_count(const Host& host, int64_t tasks, int64_t elements) {
  constexpr int64_t kShare = 32 << 10;  // elements that are worth a thread
  return std::max<int64_t>(std::min({elements / kShare, host.threads, tasks}), 1);
}
template <class F>
void by_task(const Host& host, int64_t tasks, int64_t elements, const F& f) {
  int64_t shares = share_count(host, tasks, elements);
  host.parallel(shares, [&](int64_t share) {
    for (int64_t i = tasks * share / shares; i < tasks * (share + 1) / shares; ++i) f(i, share);
  });
}

// f with the type of a dtype's numbers.
template <class F>
void with_floats(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32: return f(Floats<Dtype::float32>{});
    case Dtype::bfloat16: return f(Floats<Dtype::bfloat16>{});
    case Dtype::float16: return f(Floats<Dtype::float16>{});
  }
}

}  // namespace PVL_ISA
}  // namespace perfvl
