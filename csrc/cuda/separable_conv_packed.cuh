// Columns of pixels on their way from and to memory, as they lie there: in 16 bits they take half the registers.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"

namespace perfvl::cuda {
namespace {

// V neighbouring elements as they lie in memory, in whole registers where they fill one: moved by one instruction.
template <class T, int V>
struct Packed {
  using Word = std::conditional_t<V * sizeof(T) % 4 == 0, uint32_t, uint16_t>;
  using Words = Vector<Word, int(V * sizeof(T) / sizeof(Word))>;
  Words words;

  // Elements from `first` on, which is known when compiling.
  template <int kCount>
  __device__ void unpack(int first, float (&x)[kCount]) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16> && V > 1) {  // nvcc takes two instructions for an upper half
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        uint32_t word = words.values[(first + k) / 2];
        x[k] = __uint_as_float((first + k) % 2 ? word & 0xffff0000u : word << 16);
      }
    } else {
      Vector<T, V> elements = __builtin_bit_cast(Vector<T, V>, words);
#pragma unroll
      for (int k = 0; k < kCount; ++k) x[k] = to_float(elements.values[first + k]);
    }
  }
};

// Pixels a `stride` apart, 0 outside: their y are first, first + 1, ..., the image's are below `height`.
template <class T, int V, int kCount>
__device__ inline void load_packed(const T* from, int64_t stride, int first, int height, Packed<T, V> (&x)[kCount]) {
  using Words = typename Packed<T, V>::Words;
#pragma unroll
  for (int j = 0; j < kCount; ++j, from += stride) {
    x[j].words = Words{};
    if (unsigned(first + j) < unsigned(height)) x[j].words = *reinterpret_cast<const Words*>(from);
  }
}

// Those of the rows of a column from `first` on that the image has; they are a `stride` apart.
template <class T, int kCount, int V>
__device__ inline void store_column(T* to, int64_t stride, int first, int height, const float (&x)[kCount][V]) {
#pragma unroll
  for (int r = 0; r < kCount; ++r, to += stride) {
    if (first + r >= height) continue;
    Vector<T, V> packed;
#pragma unroll
    for (int v = 0; v < V; ++v) packed.values[v] = from_float<T>(x[r][v]);
    *reinterpret_cast<Vector<T, V>*>(to) = packed;
  }
}

}  // namespace
}  // namespace perfvl::cuda
