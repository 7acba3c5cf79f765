// Activations and their derivatives as torch defines them, NaN kept.
//
// On arrays, so that the branch on the activation, the same for all threads, is taken once for many elements.
#pragma once

#include <cmath>

#include "../separable_conv.h"
#include "cuda/launch.cuh"

namespace perfvl::cuda {
namespace {

// Right to a few units in the last place, a relative 1e-7 |x| where x < -10: unrolled over a tile, expf and an exact
// division would be most of a kernel's code.
__device__ inline float sigmoid(float x) {
#if defined(__CUDACC__)
  return __fdividef(1.f, 1.f + __expf(-x));
#else
  return 1.f / (1.f + expf(-x));
#endif
}
// 0 below 0 and 6 above 6: not fminf and fmaxf, which lose a NaN.
__device__ inline float clamp6(float x) { return x <= 0.f ? 0.f : x >= 6.f ? 6.f : x; }

template <int kCount, int V>
__device__ inline void activate(Activation activation, float (&x)[kCount][V]) {
  auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) x[i][v] = f(x[i][v]);
  };
  switch (activation) {
    case Activation::none: return;
    case Activation::relu: return each([](float z) { return z <= 0.f ? 0.f : z; });
    case Activation::relu6: return each([](float z) { return clamp6(z); });
    case Activation::silu: return each([](float z) { return z * sigmoid(z); });
    case Activation::hardswish: return each([](float z) { return z * clamp6(z + 3.f) * (1.f / 6.f); });
    case Activation::leaky_relu: return each([](float z) { return z > 0.f ? z : z * 0.01f; });
  }
}

// gradient *= activation'(x).
template <int kCount, int V>
__device__ inline void activate_backward(Activation activation, const float (&x)[kCount][V],
                                         float (&gradient)[kCount][V]) {
  auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) gradient[i][v] = f(x[i][v], gradient[i][v]);
  };
  switch (activation) {
    case Activation::none: return;
    case Activation::relu: return each([](float z, float g) { return z <= 0.f ? 0.f : g; });
    case Activation::relu6: return each([](float z, float g) { return z <= 0.f || z >= 6.f ? 0.f : g; });
    case Activation::silu:
      return each([](float z, float g) {
        float s = sigmoid(z);
        return g * s * (1.f + z * (1.f - s));
      });
    case Activation::hardswish:
      return each([](float z, float g) { return z <= -3.f ? 0.f : z >= 3.f ? g : g * (z * (1.f / 3.f) + 0.5f); });
    case Activation::leaky_relu: return each([](float z, float g) { return z > 0.f ? g : g * 0.01f; });
  }
}

}  // namespace
}  // namespace perfvl::cuda
