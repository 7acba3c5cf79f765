// One window, for as many channels as lie behind one another in each of its pixels.
#pragma once

#include <limits>

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

inline bool any(IntVec mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
#endif
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
  for (int64_t c = 0; c < channels; c += kLanes) {
    int64_t lanes = std::min<int64_t>(kLanes, channels - c);
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
      if (any(sum != sum))
        other_pixels<0>(w, first, [&](const char* p, int32_t position) {
          Vec x = T::read(p, lanes);
          at = x != x ? position + IntVec{} : at;
        });
      P::write(w.position_to + c * P::kBytes, from_bits(at), lanes);
    }
    T::write(w.to + c * T::kBytes, top + sum / w.size, lanes);
  }
}

// Stochastic pooling. `uniform`: a number for each of the first `drawn` channels, null for the expectation.
template <class T, class P>
void stochastic_window(const Window& w, int64_t channels, const char* uniform, int64_t step, int64_t drawn) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    int64_t lanes = std::min<int64_t>(kLanes, channels - c);
    const char* first = w.from + c * T::kBytes;
    Vec start = T::read(first, lanes), sum = start, squares = start * start;
    other_pixels<0>(w, first, [&](const char* p, int32_t) {
      Vec x = T::read(p, lanes);
      sum += x, squares += x * x;
    });
    Vec chosen = squares / (sum + std::numeric_limits<float>::min());
    if (uniform) {
      Vec threshold{};
      for (int64_t i = 0; i < std::min(lanes, drawn - c); ++i)
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
  }
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
void gather(const Visit* visits, int64_t count, char* to, int64_t channels) {
  int64_t n = N ? N : count;
  for (int64_t c = 0; c < channels; c += kLanes) {
    int64_t lanes = std::min<int64_t>(kLanes, channels - c);
    Vec total{};
    for (int64_t i = 0; i < n; ++i) {
      Vec g = T::read(visits[i].gradient + c * T::kBytes, lanes);
      IntVec here = bits(P::read(visits[i].position + c * P::kBytes, lanes)) == visits[i].here;
      if constexpr (kAverage) total += g * visits[i].share;
      total += here ? g : Vec{};
    }
    T::write(to + c * T::kBytes, total, lanes);
  }
}

}  // namespace PVL_ISA
}  // namespace perfvl
