// What every CPU kernel takes and gives: raw pointers with strides, and the host services it may call. Knows no torch.
#pragma once

#include <cstdint>
#include <cstring>

namespace perfvl {

enum class Dtype : int32_t { float32, bfloat16, float16 };

struct Matrix {
  const void* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;  // in elements
  Dtype dtype;
};

// A float32 operand of a matrix product.
struct Operand {
  const float* data;
  int64_t row_stride, col_stride;
};

// Services of the host program. Under torch: its thread pool and its BLAS.
struct Host {
  void* context;
  int64_t threads;
  // body(state, i) for every i in [0, n), on up to `threads` threads; returns when all are done.
  void (*parallel_for)(int64_t n, void* state, void (*body)(void* state, int64_t i));
  // c[m, n] = a[m, k] b[k, n] (+ c). Called inside parallel_for: must then run on the calling thread alone.
  void (*gemm)(void* context, int64_t m, int64_t n, int64_t k, Operand a, Operand b, float* c, int64_t c_stride,
               bool accumulate);

  template <class F>
  void parallel(int64_t n, const F& f) const {
    parallel_for(n, const_cast<F*>(&f), [](void* state, int64_t i) { (*static_cast<F*>(state))(i); });
  }
};

// Sixteen-bit floats, one at a time.
inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  float magnitude;
  if (exponent == 0) {
    magnitude = float(mantissa) * 5.9604644775390625e-08f;  // 2^-24
  } else {
    uint32_t b = (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | mantissa << 13;
    std::memcpy(&magnitude, &b, 4);
  }
  uint32_t b;
  std::memcpy(&b, &magnitude, 4);
  b |= sign;
  std::memcpy(&magnitude, &b, 4);
  return magnitude;
}
// Rounds to nearest even, NaN kept.
inline uint16_t float_to_half(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  uint32_t sign = b >> 16 & 0x8000u;
  b &= 0x7fffffffu;
  if (b > 0x7f800000u) return uint16_t(sign | 0x7e00u | (b >> 13 & 0x3ffu));
  if (b >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65,520 and above
  if (b < 0x38800000u) {                                  // below 2^-14: a multiple of 2^-24
    float shifted;
    std::memcpy(&shifted, &b, 4);
    shifted += 0.5f;  // whose last bit is worth 2^-24: the sum rounds as a half would
    std::memcpy(&b, &shifted, 4);
    return uint16_t(sign | (b - 0x3f000000u));
  }
  return uint16_t(sign | (b - 0x38000000u + 0xfffu + (b >> 13 & 1u)) >> 13);
}
inline float bfloat_to_float(uint16_t h) {
  uint32_t b = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Hands out 64-byte aligned pieces of one scratch allocation. With base = nullptr it only counts the bytes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace perfvl
