// Float vectors as wide as the compiled ISA level, on the compiler's vector types: one source for every level.
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace perfvl {
namespace PVL_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

template <class V, class T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
// Stores past the caches, for memory that is too large to stay there and need not be fetched to be overwritten. `p` is
// aligned to the vector; `stream_fence` ends a series of them.
template <class V, class T>
inline void stream(T* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof v == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#endif
#if defined(__x86_64__)
  if constexpr (sizeof v == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#endif
  store(p, v);
}
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}
// What is used more than once is loaded once. GCC would rather make it an operand in memory of every instruction.
inline Vec in_register(Vec x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
  return x;
}
inline Vec broadcast(float x) { return x - Vec{}; }
inline IntVec bits(Vec v) { return (IntVec)v; }
inline Vec from_bits(IntVec v) { return (Vec)v; }

// The larger lane by lane; NaN in `b` is kept, NaN in `a` is not.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// a * b + c, rounded once where the level can. Contraction is otherwise off, so that the same expression gives the same
// bits wherever it is inlined.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// 1 where a >= b, else 0.
inline IntVec at_least(Vec a, Vec b) { return (a >= b) & 1; }

#if defined(__AVX512F__)
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
inline float largest(Vec v) { return _mm512_reduce_max_ps(v); }
#else
template <class F>
inline float fold(Vec v, F f) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = f(lanes[i], lanes[i + width]);
  return lanes[0];
}
inline float sum(Vec v) {
  return fold(v, [](float a, float b) { return a + b; });
}
inline float largest(Vec v) {
  return fold(v, [](float a, float b) { return a > b ? a : b; });
}
#endif

#if defined(__AVX512F__)
// 16 x 16 transposed, 32-bit elements, in place.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
inline void transpose(Vec (&r)[kLanes]) {
  __m512i square[kLanes];
  for (int i = 0; i < kLanes; ++i) square[i] = (__m512i)r[i];
  transpose(square);
  for (int i = 0; i < kLanes; ++i) r[i] = (Vec)square[i];
}
#else
inline void transpose(Vec (&r)[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = i + 1; j < kLanes; ++j) {
      float upper = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = upper;
    }
}
#endif

// 2^x for x <= 120, relative error 1.6e-7, exactly 1 at 0; 0 below 2^-126.5; NaN gives NaN.
template <class MultiplyAdd>
inline Vec exp2(Vec x, MultiplyAdd multiply_add) {
  x = max(broadcast(-127.f), x);
  // Adding 1.5 * 2^23 + 127 rounds x to an integer n and leaves the biased exponent n + 127 in the low mantissa bits.
  const float magic = 12582912.f + 127.f;
  Vec shifted = x + magic;
  Vec r = x - (shifted - magic);
  Vec p = multiply_add(broadcast(1.326472715e-03f), r, broadcast(9.671512643e-03f));
  p = multiply_add(p, r, broadcast(5.550733743e-02f));
  p = multiply_add(p, r, broadcast(2.402224209e-01f));
  p = multiply_add(p, r, broadcast(6.931469776e-01f));
  p = multiply_add(p, r, broadcast(1.f));
  return p * from_bits(bits(shifted) << 23);
}
inline Vec exp2(Vec x) { return exp2(x, fma); }

inline Vec widen_bfloat(HalfVec h) { return from_bits(__builtin_convertvector(h, IntVec) << 16); }
inline Vec widen_half(HalfVec h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)h);
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(h[i]);
  return v;
#endif
}

// Round to nearest even, NaN kept.
inline uint16_t float_to_bfloat(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  if ((b & 0x7fffffffu) > 0x7f800000u) return uint16_t(b >> 16 | 0x40u);
  return uint16_t((b + 0x7fffu + (b >> 16 & 1u)) >> 16);
}
inline HalfVec narrow_bfloat(Vec v) {
  IntVec b = bits(v);
  IntVec rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  IntVec quiet = b >> 16 | 0x40;
  return __builtin_convertvector(v == v ? rounded : quiet, HalfVec);
}

inline HalfVec narrow_half(Vec v) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (HalfVec)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  HalfVec h;
  for (int i = 0; i < kLanes; ++i) h[i] = float_to_half(v[i]);
  return h;
#endif
}

}  // namespace PVL_ISA
}  // namespace perfvl
