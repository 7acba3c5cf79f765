// StackGAN's conditioning: what a text condition adds to an image (conditioning_taps.h), and the condition itself, mu +
// eps exp(logvar / 2) with its divergence from the normal distribution. A batch has some thousand elements: one pass on
// one thread, an exponential each, is less than a thread's start.
#include "cpu/conditioning.h"

#include "cpu/conditioning_taps.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

// e^x, infinite where it leaves float32.
Vec exponential(Vec x) {
  Vec power = x * 1.44269504f;
  IntVec large = power > 100.f;  // exp2 is right up to 120
  power = select(large, power - 64.f, power);
  return exp2(select(power > 120.f, broadcast(120.f), power)) * select(large, broadcast(0x1p64f), broadcast(1.f));
}

IntVec near_zero(Vec x) { return (x > -1.f) & (x < 1.f); }

// e^x - 1 - x near 0, where most of the digits of that difference would cancel.
Vec series(Vec x) {
  Vec sum = broadcast(1.f / 39916800.f);
  for (float factor : {1.f / 3628800.f, 1.f / 362880.f, 1.f / 40320.f, 1.f / 5040.f, 1.f / 720.f, 1.f / 120.f,
                       1.f / 24.f, 1.f / 6.f, 0.5f})
    sum = fma(sum, x, broadcast(factor));
  return sum * x * x;
}

Vec read_row(const Matrix& m, int64_t row, int64_t col, int64_t lanes) {
  const char* p = static_cast<const char*>(m.data) + (row * m.row_stride + col * m.col_stride) * element_bytes(m.dtype);
  if (m.col_stride == 1) return read_lanes(m.dtype, p, lanes);
  Vec v{};
  for (int64_t i = 0; i < lanes; ++i) v[i] = read(m.dtype, p + i * m.col_stride * element_bytes(m.dtype));
  return v;
}

void write_row(Dtype dtype, void* to, int64_t at, Vec x, int64_t lanes) {
  write_lanes(dtype, static_cast<char*>(to) + at * element_bytes(dtype), x, lanes);
}

// Columns [col, col + lanes) of the activated projection, as they are stored.
Vec activated(const Augmentation& p, int64_t row, int64_t col, int64_t lanes) {
  Vec x = read_row(p.projected, row, col, lanes);
  switch (p.activation) {
    case Projection::none: return x;
    case Projection::relu: return max(Vec{}, x);
    case Projection::leaky_relu: return rounded(p.projected.dtype, select(x > 0.f, x, x * kLeakySlope));
    case Projection::glu:
      return rounded(p.projected.dtype, x * sigmoid(read_row(p.projected, row, 2 * p.dim + col, lanes)));
  }
  return x;
}

void augment(const Augmentation& p) {
  Dtype dtype = p.projected.dtype;
  double total = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    Vec divergence{};
    for (int64_t c = 0; c < p.dim; c += kLanes) {
      int64_t lanes = std::min<int64_t>(kLanes, p.dim - c);
      Vec mu = activated(p, r, c, lanes), logvar = activated(p, r, p.dim + c, lanes);
      Vec sigma = exponential(logvar * 0.5f);
      write_row(dtype, p.mu, r * p.dim + c, mu, lanes);
      write_row(dtype, p.logvar, r * p.dim + c, logvar, lanes);
      write_row(dtype, p.condition, r * p.dim + c, fma(read_row(p.eps, r, c, lanes), sigma, mu), lanes);
      // mu^2 + exp(logvar) - 1 - logvar: nowhere negative, so that the sum has all its digits. Lanes past the end have
      // 0 for mu, and for logvar too but with GLU, where 0 * sigmoid(0) is it as well.
      divergence += fma(mu, mu, select(near_zero(logvar), series(logvar), sigma * sigma - 1.f - logvar));
    }
    total += double(sum(divergence));
  }
  *p.kl = float(0.5 * total / double(std::max<int64_t>(p.rows * p.dim, 1)));
}

// The gradient of activated columns [col, col + lanes), of `stored` value, on to the projection's.
void write_gradient(const AugmentationBackward& p, int64_t row, int64_t col, Vec stored, Vec gradient, int64_t lanes) {
  Dtype dtype = p.mu.dtype;
  int64_t width = p.activation == Projection::glu ? 4 * p.dim : 2 * p.dim;
  if (p.activation == Projection::relu) gradient = select(stored <= 0.f, Vec{}, gradient);
  if (p.activation == Projection::leaky_relu) gradient = select(stored > 0.f, gradient, gradient * kLeakySlope);
  if (p.activation == Projection::glu) {
    Vec gate = sigmoid(read_row(p.projected, row, 2 * p.dim + col, lanes));
    Vec value = read_row(p.projected, row, col, lanes);
    write_row(dtype, p.grad_projected, row * width + 2 * p.dim + col, gradient * value * gate * (1.f - gate), lanes);
    gradient = gradient * gate;
  }
  write_row(dtype, p.grad_projected, row * width + col, gradient, lanes);
}

void augment_backward(const AugmentationBackward& p) {
  float share = p.grad_kl ? *p.grad_kl / float(std::max<int64_t>(p.rows * p.dim, 1)) : 0.f;
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t c = 0; c < p.dim; c += kLanes) {
      int64_t lanes = std::min<int64_t>(kLanes, p.dim - c);
      Vec mu = read_row(p.mu, r, c, lanes), logvar = read_row(p.logvar, r, c, lanes);
      Vec sigma = exponential(logvar * 0.5f), grad_mu{}, grad_logvar{};
      if (p.grad_condition.data) {
        grad_mu = read_row(p.grad_condition, r, c, lanes);
        grad_logvar = grad_mu * read_row(p.eps, r, c, lanes) * sigma * 0.5f;
      }
      if (p.grad_mu.data) grad_mu += read_row(p.grad_mu, r, c, lanes);
      if (p.grad_logvar.data) grad_logvar += read_row(p.grad_logvar, r, c, lanes);
      if (p.grad_kl) {
        grad_mu += share * mu;
        grad_logvar += 0.5f * share * select(near_zero(logvar), series(logvar) + logvar, sigma * sigma - 1.f);
      }
      write_gradient(p, r, c, mu, grad_mu, lanes);
      write_gradient(p, r, p.dim + c, logvar, grad_logvar, lanes);
    }
}

int64_t taps_scratch_bytes(const ConditionTaps& problem) { return TapProduct(problem).scratch_bytes(); }

void condition_taps(const ConditionTaps& problem, void* scratch, const Host& host) {
  TapProduct(problem).run(static_cast<float*>(scratch), host);
}

void add_taps(const AddTaps& problem, const Host& host) {
  by_block(problem, host, [&](int64_t n, int64_t first, int64_t count) { add_block(problem, n, first, count); });
}

void tap_sums(const TapSums& problem, const Host& host) {
  by_block(problem, host, [&](int64_t n, int64_t first, int64_t count) { sum_block(problem, n, first, count); });
}

}  // namespace

extern const ConditioningKernel conditioning;
const ConditioningKernel conditioning = {taps_scratch_bytes, condition_taps, add_taps,
                                         tap_sums,           augment,        augment_backward};

}  // namespace PVL_ISA
}  // namespace perfvl
