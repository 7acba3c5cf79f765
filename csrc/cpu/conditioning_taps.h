// The numbers of the nine taps, and from taps to pixels and back. At the border fewer taps fall inside: there are nine
// classes of pixels (top, inner, bottom x left, inner, right), each with its own sum of taps. Channels go in blocks,
// whose nine rows stay in the core's nearest cache; images are read once and written once.
#pragma once

#include <algorithm>

#include "conditioning.h"
#include "cpu/convert.h"
#include "cpu/image_rows.h"

namespace perfvl {
namespace PVL_ISA {

constexpr int64_t kTaps = 9, kBlock = 128;  // channels of a block
constexpr int64_t kPlane = 256;             // pixels of a channel, at most, that are one run
enum Place { kFirst, kInner, kLast };       // of a row or a column; of a single one: kFirst

inline Place place(int64_t at, int64_t size) { return at == 0 ? kFirst : at == size - 1 ? kLast : kInner; }
// Whether tap `k` of 0, 1, 2 reads inside the image from rows (or columns) at this place.
inline bool inside(int64_t k, Place at, int64_t size) {
  if (k == 0) return at != kFirst;
  return k == 1 || (at != kLast && size > 1);
}

// f(i) for all tasks, on no more threads than their work is worth.
template <class F>
void spread(const Host& host, int64_t tasks, int64_t elements, const F& f) {
  constexpr int64_t kShare = 32 << 10;  // elements that are worth a thread
  int64_t shares = std::max<int64_t>(std::min({elements / kShare, host.threads, tasks}), 1);
  host.parallel(shares, [&](int64_t share) {
    for (int64_t i = tasks * share / shares; i < tasks * (share + 1) / shares; ++i) f(i);
  });
}

// A pixel's sum of taps, for each class: sums[3 * row place + column place][channel].
inline void sum_by_class(const Taps& taps, int64_t n, int64_t first, int64_t count, int64_t height, int64_t width,
                         float (&sums)[kTaps][kBlock]) {
  float rows[3][kBlock];  // of the taps of one ky, by place of the column
  std::fill(&sums[0][0], &sums[0][0] + kTaps * kBlock, 0.f);
  for (int64_t ky = 0; ky < 3; ++ky) {
    std::fill(&rows[0][0], &rows[0][0] + 3 * kBlock, 0.f);
    for (int64_t kx = 0; kx < 3; ++kx) {
      const float* from = taps.data + n * taps.n_stride + (3 * ky + kx) * taps.tap_stride + first * taps.c_stride;
      for (int column = 0; column < 3; ++column)
        if (inside(kx, Place(column), width))
          for (int64_t c = 0; c < count; ++c) rows[column][c] += from[c * taps.c_stride];
    }
    for (int row = 0; row < 3; ++row)
      if (inside(ky, Place(row), height))
        for (int column = 0; column < 3; ++column)
          for (int64_t c = 0; c < count; ++c) sums[3 * row + column][c] += rows[column][c];
  }
}

// The other way: from sums of pixels of each class to the sum of the pixels whose tap falls inside. Only additions, so
// that no digits are lost where one class is much larger than another.
inline void sum_by_tap(const float (&classes)[kTaps][kBlock], int64_t count, int64_t height, int64_t width, float* sums,
                       int64_t tap_stride) {
  for (int64_t ky = 0; ky < 3; ++ky)
    for (int64_t kx = 0; kx < 3; ++kx) {
      float* to = sums + (3 * ky + kx) * tap_stride;
      std::fill_n(to, count, 0.f);
      for (int row = 0; row < 3; ++row)
        for (int column = 0; column < 3; ++column)
          if (inside(ky, Place(row), height) && inside(kx, Place(column), width))
            for (int64_t c = 0; c < count; ++c) to[c] += classes[3 * row + column][c];
    }
}

// taps = condition x weight, sixteen samples to a vector: each weight is read where it lies, whatever its layout, and
// multiplied with all of them. 2 N E 9 O FLOP; the weight is read once for every sixteen samples.
class TapProduct {
 public:
  explicit TapProduct(const ConditionTaps& problem)
      : p_(problem), dim_(problem.condition.cols), groups_(ceil_div(problem.condition.rows, kLanes)) {}

  int64_t scratch_bytes() const { return round_up(groups_ * dim_ * kLanes * int64_t(sizeof(float)), 64); }

  void run(float* condition, const Host& host) const {
    // 1. The condition with samples behind one another: [group][E][lane], 0 in lanes without a sample.
    for (int64_t g = 0; g < groups_; ++g)
      for (int64_t e = 0; e < dim_; ++e)
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          int64_t n = g * kLanes + lane;
          condition[(g * dim_ + e) * kLanes + lane] = n < p_.condition.rows ? element(p_.condition, n, e) : 0.f;
        }
    int64_t blocks = ceil_div(p_.outputs, kLanes);
    spread(host, blocks * groups_, groups_ * p_.outputs * dim_ * kTaps, [&](int64_t i) {
      block(condition + i % groups_ * dim_ * kLanes, i % groups_ * kLanes, i / groups_ * kLanes);
    });
  }

 private:
  // Taps of kLanes samples and kLanes outputs.
  void block(const float* condition, int64_t n, int64_t o) const {
    Vec found[kTaps][kLanes];
    int64_t outputs = std::min<int64_t>(kLanes, p_.outputs - o),
            rows = std::min<int64_t>(kLanes, p_.condition.rows - n);
    // 2. For each output, its nine taps in all samples.
    for (int64_t i = 0; i < outputs; ++i) products(condition, o + i, found, i);
    // 3. Turned: for each sample and tap, the outputs.
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      for (int64_t i = outputs; i < kLanes; ++i) found[tap][i] = Vec{};
      transpose(found[tap]);
      for (int64_t r = 0; r < rows; ++r)
        write_lanes(Dtype::float32, p_.taps + ((n + r) * kTaps + tap) * p_.outputs + o, found[tap][r], outputs);
    }
  }

  void products(const float* condition, int64_t o, Vec (&found)[kTaps][kLanes], int64_t i) const {
    constexpr int64_t kStaged = 64;
    Vec sums[kTaps] = {};
    const Image& w = p_.weight;
    if (w.dtype == Dtype::float32) {
      add_products(condition, static_cast<const float*>(w.data) + o * w.n_stride, w.c_stride, w.h_stride, w.w_stride,
                   dim_, sums);
    } else {
      float staged[kStaged * kTaps];
      for (int64_t e0 = 0; e0 < dim_; e0 += kStaged) {
        int64_t count = std::min(kStaged, dim_ - e0);
        for (int64_t e = 0; e < count; ++e)
          for (int64_t tap = 0; tap < kTaps; ++tap)
            staged[e * kTaps + tap] = read(w.dtype, at(w, o, e0 + e, tap / 3, tap % 3));
        add_products(condition + e0 * kLanes, staged, kTaps, 3, 1, count, sums);
      }
    }
    for (int64_t tap = 0; tap < kTaps; ++tap) found[tap][i] = sums[tap];
  }

  static void add_products(const float* condition, const float* weight, int64_t e_stride, int64_t y_stride,
                           int64_t x_stride, int64_t count, Vec (&sums)[kTaps]) {
    Vec s[kTaps];  // a copy, which stays in registers
    for (int64_t tap = 0; tap < kTaps; ++tap) s[tap] = sums[tap];
    for (int64_t e = 0; e < count; ++e) {
      Vec c = load<Vec>(condition + e * kLanes);
      const float *top = weight + e * e_stride, *middle = top + y_stride, *bottom = middle + y_stride;
      for (int64_t x = 0; x < 3; ++x) {
        s[x] = fma(c, broadcast(top[x * x_stride]), s[x]);
        s[3 + x] = fma(c, broadcast(middle[x * x_stride]), s[3 + x]);
        s[6 + x] = fma(c, broadcast(bottom[x * x_stride]), s[6 + x]);
      }
    }
    for (int64_t tap = 0; tap < kTaps; ++tap) sums[tap] = s[tap];
  }

  const ConditionTaps& p_;
  int64_t dim_, groups_;
};

// Rows shorter than a vector, one behind another: all pixels of a channel are one run.
inline void add_planes(const AddTaps& p, int64_t n, int64_t first, int64_t count, const float (&sums)[kTaps][kBlock]) {
  const Image image = p.image, output = p.output;
  int64_t pixels = p.height * p.width, bytes = element_bytes(image.dtype);
  uint8_t classes[kPlane];
  float plane[kPlane + kLanes] = {};
  for (int64_t h = 0; h < p.height; ++h)
    for (int64_t w = 0; w < p.width; ++w)
      classes[h * p.width + w] = uint8_t(3 * place(h, p.height) + place(w, p.width));
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t i = 0; i < pixels; ++i) plane[i] = sums[classes[i]][c];
    const char* from = at(image, n, first + c, 0, 0);
    char* to = const_cast<char*>(at(output, n, first + c, 0, 0));
    for (int64_t i = 0; i < pixels; i += kLanes) {
      int64_t lanes = std::min<int64_t>(kLanes, pixels - i);
      Vec x = read_lanes(image.dtype, from + i * bytes, lanes) + load<Vec>(plane + i);
      write_lanes(output.dtype, to + i * bytes, x, lanes);
    }
  }
}

inline void add_block(const AddTaps& p, int64_t n, int64_t first, int64_t count) {
  float sums[kTaps][kBlock];
  sum_by_class(p.taps, n, first, count, p.height, p.width, sums);
  const Image image = p.image, output = p.output;  // copies: stores through `char*` might change the others
  int64_t bytes = element_bytes(image.dtype);
  if (image.c_stride == 1 && output.c_stride == 1) {
    for (int64_t h = 0; h < p.height; ++h)
      for (int64_t w = 0; w < p.width; ++w) {
        const char* from = at(image, n, first, h, w);
        char* to = const_cast<char*>(at(output, n, first, h, w));
        const float* sum = sums[3 * place(h, p.height) + place(w, p.width)];
        for (int64_t c = 0; c < count; c += kLanes) {
          int64_t lanes = std::min<int64_t>(kLanes, count - c);
          Vec x = read_lanes(image.dtype, from + c * bytes, lanes) + load<Vec>(sum + c);
          write_lanes(output.dtype, to + c * bytes, x, lanes);
        }
      }
    return;
  }
  bool rows = image.w_stride == 1 && output.w_stride == 1;
  if (rows && image.h_stride == p.width && output.h_stride == p.width && p.width < kLanes &&
      p.height * p.width <= kPlane)
    return add_planes(p, n, first, count, sums);
  for (int64_t c = 0; c < count; ++c)
    for (int64_t h = 0; h < p.height; ++h) {
      const char* from = at(image, n, first + c, h, 0);
      char* to = const_cast<char*>(at(output, n, first + c, h, 0));
      int row = 3 * place(h, p.height);
      if (!rows) {
        for (int64_t w = 0; w < p.width; ++w) {
          float x = read(image.dtype, from + w * image.w_stride * bytes) + sums[row + place(w, p.width)][c];
          write(output.dtype, to + w * output.w_stride * bytes, x);
        }
        continue;
      }
      for (int64_t w = 0; w < p.width; w += kLanes) {
        int64_t lanes = std::min<int64_t>(kLanes, p.width - w);
        Vec sum = broadcast(sums[row + kInner][c]);
        if (w + lanes == p.width) sum[lanes - 1] = sums[row + kLast][c];
        if (w == 0) sum[0] = sums[row + kFirst][c];
        write_lanes(output.dtype, to + w * bytes, read_lanes(image.dtype, from + w * bytes, lanes) + sum, lanes);
      }
    }
}

// Adds pixels [1, width - 1) of a row to `inner`, four vectors of channels at a time.
inline void add_inner(const Image& x, const char* row, int64_t width, int64_t count, float* inner) {
  constexpr int64_t kVecs = 4;
  int64_t bytes = element_bytes(x.dtype), step = x.w_stride * bytes, c = 0;
  for (; c + kVecs * kLanes <= count; c += kVecs * kLanes) {
    Vec sums[kVecs] = {};
    for (int64_t w = 1; w + 1 < width; ++w)
      for (int64_t v = 0; v < kVecs; ++v)
        sums[v] += read_lanes(x.dtype, row + w * step + (c + v * kLanes) * bytes, kLanes);
    for (int64_t v = 0; v < kVecs; ++v) {
      float* to = inner + c + v * kLanes;
      store(to, load<Vec>(to) + sums[v]);
    }
  }
  for (; c < count; c += kLanes) {
    int64_t lanes = std::min<int64_t>(kLanes, count - c);
    Vec sum{};
    for (int64_t w = 1; w + 1 < width; ++w) sum += read_lanes(x.dtype, row + w * step + c * bytes, lanes);
    store(inner + c, load<Vec>(inner + c) + sum);
  }
}

inline void sum_block(const TapSums& p, int64_t n, int64_t first, int64_t count) {
  float sums[kTaps][kBlock];
  std::fill(&sums[0][0], &sums[0][0] + kTaps * kBlock, 0.f);
  const Image grad = p.grad;
  int64_t bytes = element_bytes(grad.dtype), step = grad.w_stride * bytes;
  for (int64_t h = 0; h < p.height; ++h) {
    float (*row)[kBlock] = sums + 3 * place(h, p.height);
    if (grad.c_stride == 1) {
      const char* from = at(grad, n, first, h, 0);
      auto add_pixel = [&](Place column, int64_t w) {
        for (int64_t c = 0; c < count; c += kLanes) {
          Vec x = read_lanes(grad.dtype, from + w * step + c * bytes, std::min<int64_t>(kLanes, count - c));
          store(row[column] + c, load<Vec>(row[column] + c) + x);
        }
      };
      add_pixel(kFirst, 0);
      if (p.width > 2) add_inner(grad, from, p.width, count, row[kInner]);
      if (p.width > 1) add_pixel(kLast, p.width - 1);
      continue;
    }
    for (int64_t c = 0; c < count; ++c) {
      const char* from = at(grad, n, first + c, h, 0);
      row[kFirst][c] += read(grad.dtype, from);
      if (p.width > 1) row[kLast][c] += read(grad.dtype, from + (p.width - 1) * step);
      float inner = 0.f;
      int64_t w = 1;
      if (grad.w_stride == 1 && p.width > kLanes) {
        Vec lanes{};
        for (; w + kLanes < p.width; w += kLanes) lanes += read_lanes(grad.dtype, from + w * bytes, kLanes);
        inner = sum(lanes);
      }
      for (; w + 1 < p.width; ++w) inner += read(grad.dtype, from + w * step);
      row[kInner][c] += inner;
    }
  }
  sum_by_tap(sums, count, p.height, p.width, p.sums + n * kTaps * p.channels + first, p.channels);
}

// f(n, first channel, count) for every sample and block of channels.
template <class Problem, class F>
void by_block(const Problem& p, const Host& host, const F& f) {
  int64_t blocks = ceil_div(p.channels, kBlock);
  spread(host, p.batch * blocks, p.batch * p.channels * p.height * p.width, [&](int64_t i) {
    int64_t first = i % blocks * kBlock;
    f(i / blocks, first, std::min(kBlock, p.channels - first));
  });
}

}  // namespace PVL_ISA
}  // namespace perfvl
