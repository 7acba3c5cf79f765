// One window, for as many channels as lie behind one another in each of its pixels.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/pooling_blocks.h"

namespace perfvl {
namespace PVL_ISA {

// The part of a window that is inside the image, and where its results go.
struct Window {
  char* from;  // the first pixel
  int64_t h_step, w_step;
  int64_t rows, cols;
  int32_t position, width;  // of the first pixel; of the kernel
  float size;               // in the padded image
  char *to, *position_to;   // the latter null where positions are not wanted
};

inline bool any_nan(Vec x) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0;
#else
  bool found = false;
  for (int i = 0; i < kLanes; ++i) found |= x[i] != x[i];
  return found;
#endif
}

// f(first channel, lanes) for vectors of channels. How many lanes a whole one has is a constant: reads and writes need
// not ask.
template <class F>
inline void by_vector(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, std::integral_constant<int64_t, kLanes>{});
  if (c < channels) f(c, channels - c);
}

// f(pixel, position) in scan order, but for the first pixel. K: rows and columns, where known.
template <int K, class Pointer, class F>
void other_pixels(const Window& w, Pointer first, const F& f) {
  int64_t rows = K ? K : w.rows, cols = K ? K : w.cols;
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t x = 0; x < cols; ++x)
      if (y + x > 0) f(first + y * w.h_step + x * w.w_step, w.position + int32_t(y) * w.width + int32_t(x));
}

// Maximum + average.
template <class T, class P, bool kPositions, int K>
void max_average_window(const Window& w, int64_t channels) {
  by_vector(channels, [&](int64_t c, auto lanes) {
    const char* first = w.from + c * T::kBytes;
    Vec top = T::read(first, lanes), sum = top;
    IntVec at = w.position + IntVec{};
    other_pixels<K>(w, first, [&](const char* p, int32_t position) {
      Vec x = T::read(p, lanes);
      IntVec larger = x > top;
      top = larger ? x : top;
      if constexpr (kPositions) at = larger ? position + IntVec{} : at;
      sum += x;
    });
    // A NaN is in the sum, and so in the result. Comparisons pass it over: it is looked for where there is one.
    if constexpr (kPositions) {
      if (any_nan(sum))
        other_pixels<0>(w, first, [&](const char* p, int32_t position) {
          Vec x = T::read(p, lanes);
          at = x != x ? position + IntVec{} : at;
        });
      P::write(w.position_to + c * P::kBytes, from_bits(at), lanes);
    }
    T::write(w.to + c * T::kBytes, top + sum / w.size, lanes);
  });
}

// Stochastic pooling. `uniform`: a number for each of the first `drawn` channels, null for the expectation.
template <class T, class P>
void stochastic_window(const Window& w, int64_t channels, const char* uniform, int64_t step, int64_t drawn) {
  by_vector(channels, [&](int64_t c, auto lanes) {
    const char* first = w.from + c * T::kBytes;
    Vec start = T::read(first, lanes), sum = start, squares = start * start;
    other_pixels<0>(w, first, [&](const char* p, int32_t) {
      Vec x = T::read(p, lanes);
      sum += x, squares += x * x;
    });
    Vec chosen = squares / (sum + std::numeric_limits<float>::min());
    if (uniform) {
      Vec threshold{};
      for (int64_t i = 0; i < std::min<int64_t>(lanes, drawn - c); ++i)
        threshold[i] = *reinterpret_cast<const float*>(uniform + (c + i) * step);
      threshold *= sum;
      chosen = start;
      IntVec at = w.position + IntVec{}, open = start < threshold;
      Vec reached = start;
      other_pixels<0>(w, first, [&](const char* p, int32_t position) {
        Vec x = T::read(p, lanes);
        chosen = open ? x : chosen, at = open ? position + IntVec{} : at;
        reached += x;
        open &= reached < threshold;
      });
      chosen = sum == sum ? chosen : sum;  // a NaN is not lost
      P::write(w.position_to + c * P::kBytes, from_bits(at), lanes);
    }
    T::write(w.to + c * T::kBytes, chosen, lanes);
  });
}

// Adds the gradient of a window to its pixels, in blocks.
template <bool kAverage, int K>
void scatter_window(const Window& w) {
  Vec gradient = Words::read(w.to, kLanes), share{}, all = gradient;
  if constexpr (kAverage) share = gradient / w.size, all = gradient + share;
  IntVec at = bits(Words::read(w.position_to, kLanes));
  auto add = [&](char* p, int32_t position) {
    Vec part = at == position ? all : share;
    Words::write(p, Words::read(p, kLanes) + part, kLanes);
  };
  add(w.from, w.position);
  other_pixels<K>(w, w.from, add);
}

// A window over a pixel: its gradient, its position, which position the pixel has in it, and what part of the gradient
// every pixel of it has.
struct Visit {
  const char *gradient, *position;
  int32_t here;
  float share;
};

// The gradient of a pixel. N: number of windows over it, where known.
template <class T, class P, bool kAverage, int N>
void gather(const Visit* visits, int64_t count, char* __restrict to, int64_t channels) {
  if constexpr (N > 0) count = N;
  by_vector(channels, [&](int64_t c, auto lanes) {
    Vec total{};
    for (int64_t i = 0; i < count; ++i) {
      const Visit& v = visits[i];
      Vec g = T::read(v.gradient + c * T::kBytes, lanes);
      IntVec here = bits(P::read(v.position + c * P::kBytes, lanes)) == v.here;
      if constexpr (kAverage)
        total = fma(g, here ? broadcast(1.f + v.share) : broadcast(v.share), total);
      else
        total += here ? g : Vec{};
    }
    T::write(to + c * T::kBytes, total, lanes);
  });
}

}  // namespace PVL_ISA
}  // namespace perfvl
