// Binary cross-entropies of several discriminator heads, their weighted sum, and its gradient.
//
// A step of StackGAN has 3 to 5 heads of 64 logits: 1 kB, where being called is the cost, and PyTorch calls 4 times for
// each head and again in backward. Here it is one call, one pass and one thread: a vector of rows takes an exponential,
// a logarithm and two divisions, and its gradient is a by-product. Logarithms are series of s = (v - 1) / (v + 1).
#include "cpu/gan_loss.h"

#include <algorithm>

#include "cpu/convert.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the first has 10 bits: multiples of it are exact

// e^x for x <= 89: relative error 2e-7, infinity where float32 has nothing larger, 0 below -87.3; NaN gives NaN.
Vec exp(Vec x) {
  x = max(broadcast(-87.3f), x);
  // The exponent is biased by one less than usual, and the missing factor is last: e^89 is 2^128 and more.
  const float magic = 12582912.f + 126.f;
  Vec shifted = x * kLog2e + magic, n = shifted - magic;
  Vec r = (x - n * kLn2High) - n * kLn2Low;
  Vec p = fma(broadcast(1.9841270e-04f), r, broadcast(1.3888889e-03f));
  p = fma(p, r, broadcast(8.3333333e-03f));
  p = fma(p, r, broadcast(4.1666667e-02f));
  p = fma(p, r, broadcast(1.6666667e-01f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.f));
  p = fma(p, r, broadcast(1.f));
  return p * from_bits(bits(shifted) << 23) * 2.f;
}

// log((1 + s) / (1 - s)) for |s| <= 1/3.
Vec log_ratio(Vec s) {
  Vec square = s * s, p = broadcast(1.f / 15);
  for (int k = 13; k >= 3; k -= 2) p = fma(p, square, broadcast(1.f / float(k)));
  return fma(p * square, s, s) * 2.f;
}

Vec select(IntVec mask, Vec a, Vec b) { return from_bits((bits(a) & mask) | (bits(b) & ~mask)); }

// log(v) for v from 0 to 1, where it is below -100 at 0.
Vec log(Vec v) {
  IntVec tiny = v < 1.17549435e-38f;  // no exponent to read off
  v = select(tiny, v * 16777216.f, v);
  IntVec exponent = (bits(v) - 0x3f3504f3) >> 23;  // the rest is between sqrt(1/2) and sqrt(2)
  Vec rest = from_bits(bits(v) - (exponent << 23));
  Vec n = __builtin_convertvector(exponent, Vec) - select(tiny, broadcast(24.f), Vec{});
  return fma(n, broadcast(kLn2), log_ratio((rest - 1.f) / (rest + 1.f)));
}

struct Rows {
  Vec loss, grad;  // grad: of the head's weighted mean
};

// On the logits: -y log sigmoid(x) - (1 - y) log sigmoid(-x). Of an infinite logit, a term with the factor 0 is 0.
Rows stable(const GanHead& h, float factor, Vec x) {
  Vec size = from_bits(bits(x) & 0x7fffffff), e = exp(-size);
  IntVec positive = x > 0.f;
  Vec wrong = select(positive, broadcast(h.complement), broadcast(h.target));
  Vec linear = from_bits(bits(wrong * size) & (wrong != 0.f));
  Vec near = 1.f / (1.f + e), far = e * near;  // sigmoid(|x|), sigmoid(-|x|)
  Vec grad = select(positive, near, far) * h.complement - select(positive, far, near) * h.target;
  return {linear + log_ratio(e / (2.f + e)), grad * factor};
}

// As BCELoss after Sigmoid: from a rounded probability, with the clamps of either.
Rows exact(const GanHead& h, float factor, Vec x) {
  Vec p = 1.f / (1.f + exp(-max(broadcast(-89.f), x))), q = 1.f - p;
  Vec loss = p - p;  // NaN where p is
  if (h.target != 0.f) loss -= max(broadcast(-100.f), log(p)) * h.target;
  if (h.complement != 0.f) {
    Vec log_q = select(p < 0.5f, log_ratio(-p / (2.f - p)), log(q));  // q is rounded where p is small
    loss -= max(broadcast(-100.f), log_q) * h.complement;
  }
  return {loss, (p - h.target) * factor / max(broadcast(1e-12f), q * p) * q * p};
}

template <class F>
double head_sum(const GanLoss& g, const GanHead& h, float* grad, F rows) {
  Matrix logits{h.logits, 1, h.rows, 0, h.stride, g.dtype};
  float factor = float(double(h.weight) / double(h.rows));
  double total = 0;
  for (int64_t at = 0; at < h.rows; at += kLanes) {
    int64_t count = std::min<int64_t>(kLanes, h.rows - at);
    float lanes[kLanes] = {};
    if (h.stride == 1 && count == kLanes)
      store(lanes, load_lanes(logits, at));
    else
      for (int64_t i = 0; i < count; ++i) lanes[i] = element(logits, 0, at + i);
    Rows out = rows(h, factor, load<Vec>(lanes));
    store(lanes, out.loss);
    std::fill(lanes + count, lanes + kLanes, 0.f);
    total += double(sum(load<Vec>(lanes)));
    if (!grad) continue;
    store(lanes, out.grad);
    std::copy_n(lanes, count, grad + at);
  }
  return total;
}

void run(const GanLoss& g) {
  double total = 0;
  float* grad = g.grad;
  for (int32_t k = 0; k < g.count; ++k) {
    const GanHead& h = g.heads[k];
    double mean = (g.exact ? head_sum(g, h, grad, exact) : head_sum(g, h, grad, stable)) / double(h.rows);
    g.means[k] = float(mean);
    total += double(h.weight) * mean;
    if (grad) grad += h.rows;
  }
  *g.total = float(total);
}

}  // namespace

extern const GanLossKernel gan_loss = run;

}  // namespace PVL_ISA
}  // namespace perfvl
