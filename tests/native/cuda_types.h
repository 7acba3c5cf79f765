// CUDA's built-in types and arithmetic for g++: vectors, half, bfloat16, roundings, bit counts.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Aligned as CUDA aligns them, so that UBSan reports a vector access that a GPU would fault on.
#define CUDA_VECTORS(scalar, name)                                     \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };         \
  struct alignas(4 * sizeof(scalar)) name##4 { scalar x, y, z, w; };   \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; } \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
CUDA_VECTORS(float, float)
CUDA_VECTORS(int, int)
CUDA_VECTORS(unsigned, uint)
#undef CUDA_VECTORS

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

namespace cuda_emulator {
template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace cuda_emulator

inline float __bfloat162float(__nv_bfloat16 x) { return cuda_emulator::bit_cast<float>(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t b = cuda_emulator::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {uint16_t((b + 0x7fffu + (b >> 16 & 1u)) >> 16)};
}

inline float __half2float(__half x) {
  uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, mantissa = x.bits & 0x3ffu;
  if (exponent == 31) return cuda_emulator::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return (sign ? -1.f : 1.f) * float(mantissa) * 0x1p-24f;
  return cuda_emulator::bit_cast<float>(sign | (exponent + 112u) << 23 | mantissa << 13);
}
inline __half __float2half_rn(float x) {
  uint32_t b = cuda_emulator::bit_cast<uint32_t>(x), sign = b >> 16 & 0x8000u, magnitude = b & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                                    // below 2^-14: a multiple of 2^-24
    float steps = cuda_emulator::bit_cast<float>(magnitude) * 0x1p24f;
    float rounded = (steps + 0x1p23f) - 0x1p23f;  // adding 2^23 rounds to an integer, ties to even
    return {uint16_t(sign | uint16_t(rounded))};
  }
  uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {uint16_t(sign | ((rounded >> 13) - (112u << 10)))};
}

// Functions of their own, or the compiler might fuse them.
[[gnu::noinline]] inline float __fmul_rn(float a, float b) { return a * b; }
[[gnu::noinline]] inline float __fadd_rn(float a, float b) { return a + b; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
