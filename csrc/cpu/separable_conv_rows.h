// The depthwise loops over staged rows of pixels.
#pragma once

#include <type_traits>

#include "cpu/image_rows.h"

namespace perfvl {
namespace PVL_ISA {

// The depthwise loops' view of staged rows.
struct Taps {
  const float* const* rows;  // [out rows][kernel height]
  int64_t count, width;      // out rows and pixels in one
  int64_t kernel_h, kernel_w, stride_w, dilation_w;
  int64_t vectors, stride;  // of channels in a pixel, and floats from pixel to pixel
};

// sink(pixel, c, vector): for every output pixel of the `count` rows, the sum over taps of weights[tap][c] * row[...].
// kKernel 0: any kernel, stride and dilation. Else a square one, kStride, no dilation: pixels that neighbours share are
// loaded once for four of them.
template <int kKernel, int kStride, class Sink>
void depthwise_loop(Taps t, const float* weights, Sink sink) {  // copies: stores of the sink cannot change them
  constexpr int kPixels = 4;
  for (int64_t v = 0; v < t.vectors; ++v) {
    int64_t c = v * kLanes;
    for (int64_t r = 0; r < t.count; ++r) {
      const float* const* rows = t.rows + r * t.kernel_h;
      auto pixels = [&]<int P>(std::integral_constant<int, P>, int64_t w) {
        Vec sums[P] = {};
        if constexpr (kKernel > 0) {
#pragma GCC unroll 8
          for (int i = 0; i < kKernel; ++i) {
            const float* x = rows[i] + w * kStride * t.stride + c;
            constexpr int kWide = (P - 1) * kStride + kKernel;
            Vec seen[kWide];
#pragma GCC unroll 16
            for (int j = 0; j < kWide; ++j) seen[j] = in_register(load<Vec>(x + j * t.stride));
#pragma GCC unroll 8
            for (int l = 0; l < kKernel; ++l) {
              Vec weight = load<Vec>(weights + (i * kKernel + l) * t.stride + c);
#pragma GCC unroll 4
              for (int p = 0; p < P; ++p) sums[p] = fma(weight, seen[p * kStride + l], sums[p]);
            }
          }
        } else {
          for (int64_t i = 0; i < t.kernel_h; ++i)
            for (int64_t l = 0; l < t.kernel_w; ++l) {
              Vec weight = load<Vec>(weights + (i * t.kernel_w + l) * t.stride + c);
              const float* x = rows[i] + (w * t.stride_w + l * t.dilation_w) * t.stride + c;
              for (int p = 0; p < P; ++p) sums[p] = fma(weight, load<Vec>(x + p * t.stride_w * t.stride), sums[p]);
            }
        }
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sink(r * t.width + w + p, c, sums[p]);
      };
      int64_t w = 0;
      for (; w + kPixels <= t.width; w += kPixels) pixels(std::integral_constant<int, kPixels>{}, w);
      if (w + 2 <= t.width) pixels(std::integral_constant<int, 2>{}, w), w += 2;
      if (w < t.width) pixels(std::integral_constant<int, 1>{}, w);
    }
  }
}

// sums[tap][c] += gradient[pixel][c] * row[...] over all pixels; the gradient's rows and pixels lie so many floats
// apart.
template <int kKernel, int kStride>
void depthwise_weight_loop(Taps t, const float* gradient, int64_t gradient_row, int64_t gradient_pixel, float* sums) {
  constexpr int kPixels = 4;
  for (int64_t v = 0; v < t.vectors; ++v) {
    int64_t c = v * kLanes;
    for (int64_t i = 0; i < t.kernel_h; ++i) {
      if constexpr (kKernel > 0) {
        // Chains for each tap: a sum alone would wait for itself.
        constexpr int kChains = kKernel > 3 || kLanes < 16 ? 2 : 4;
        Vec total[kChains][kKernel] = {};
        for (int64_t r = 0; r < t.count; ++r) {
          const float *x = t.rows[r * t.kernel_h + i] + c, *g = gradient + r * gradient_row + c;
          int64_t w = 0;
          for (; w + kPixels <= t.width; w += kPixels) {
            constexpr int kWide = (kPixels - 1) * kStride + kKernel;
            Vec seen[kWide];
#pragma GCC unroll 16
            for (int j = 0; j < kWide; ++j) seen[j] = in_register(load<Vec>(x + (w * kStride + j) * t.stride));
#pragma GCC unroll 4
            for (int p = 0; p < kPixels; ++p) {
              Vec upstream = load<Vec>(g + (w + p) * gradient_pixel);
#pragma GCC unroll 8
              for (int l = 0; l < kKernel; ++l) {
                Vec& sum = total[p % kChains][l];
                sum = fma(upstream, seen[p * kStride + l], sum);
              }
            }
          }
          for (; w < t.width; ++w) {
            Vec upstream = load<Vec>(g + w * gradient_pixel);
#pragma GCC unroll 8
            for (int l = 0; l < kKernel; ++l)
              total[0][l] = fma(upstream, load<Vec>(x + (w * kStride + l) * t.stride), total[0][l]);
          }
        }
        for (int l = 0; l < kKernel; ++l) {
          float* sum = sums + (i * kKernel + l) * t.stride + c;
          Vec all = total[0][l] + total[1][l];
          if constexpr (kChains == 4) all = all + (total[2][l] + total[3][l]);
          store(sum, load<Vec>(sum) + all);
        }
      } else {
        for (int64_t l = 0; l < t.kernel_w; ++l) {
          Vec total[2] = {};
          for (int64_t r = 0; r < t.count; ++r) {
            const float* x = t.rows[r * t.kernel_h + i] + l * t.dilation_w * t.stride + c;
            const float* g = gradient + r * gradient_row + c;
            for (int64_t w = 0; w < t.width; ++w)
              total[w % 2] =
                  fma(load<Vec>(g + w * gradient_pixel), load<Vec>(x + w * t.stride_w * t.stride), total[w % 2]);
          }
          float* sum = sums + (i * t.kernel_w + l) * t.stride + c;
          store(sum, load<Vec>(sum) + (total[0] + total[1]));
        }
      }
    }
  }
}

// f(kKernel, kStride) with the specialisation for these taps.
template <class F>
void specialised(const Taps& t, const F& f) {
  using std::integral_constant;
  bool square = t.kernel_h == t.kernel_w && t.dilation_w == 1;
  auto with = [&]<int kKernel>(integral_constant<int, kKernel> kernel) {
    if (t.stride_w == 1) return f(kernel, integral_constant<int, 1>{});
    f(kernel, integral_constant<int, 2>{});
  };
  if (square && t.stride_w <= 2) {
    if (t.kernel_w == 3) return with(integral_constant<int, 3>{});
    if (t.kernel_w == 5) return with(integral_constant<int, 5>{});
    if (t.kernel_w == 7) return with(integral_constant<int, 7>{});
  }
  f(integral_constant<int, 0>{}, integral_constant<int, 1>{});
}

template <class Sink>
void depthwise(const Taps& t, const float* weights, const Sink& sink) {
  specialised(t, [&](auto kernel, auto stride) { depthwise_loop<kernel(), stride()>(t, weights, sink); });
}
inline void depthwise_weights(const Taps& t, const float* gradient, int64_t gradient_row, int64_t gradient_pixel,
                              float* sums) {
  specialised(t, [&](auto kernel, auto stride) {
    depthwise_weight_loop<kernel(), stride()>(t, gradient, gradient_row, gradient_pixel, sums);
  });
}

}  // namespace PVL_ISA
}  // namespace perfvl
