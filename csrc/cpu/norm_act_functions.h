// The activations beside a batch norm and their derivatives on vectors, as torch defines them, NaN kept.
//
// Exponentials are of numbers that are not positive, e^x = 2^n (1 + p): e^x - 1 keeps its digits near 0, where a
// difference with e^x would lose them.
#pragma once

#include "cpu/activation.h"
#include "norm_act.h"

namespace perfvl {
namespace PVL_ISA {

struct Exponential {
  Vec power, p;  // 2^n and e^r - 1
  Vec value() const { return fma(power, p, power); }
  Vec minus_one() const { return fma(power, p, power - 1.f); }
};

// Of x <= 0; below -87 as of -87.
[[gnu::always_inline]] inline Exponential exponential(Vec x) {
  x = max(broadcast(-87.f), x);
  // 1. Adding 1.5 * 2^23 + 127 rounds x / ln 2 to an integer n and leaves n + 127 in the low mantissa bits.
  const float magic = 12582912.f + 127.f;
  Vec shifted = fma(x, broadcast(1.44269504f), broadcast(magic)), n = shifted - magic;
  // 2. r = x - n ln 2 in two steps, of which the first is exact.
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  // 3. Taylor's polynomial for |r| <= ln(2) / 2: what is left out is below 2^-25 of the result.
  Vec q = fma(broadcast(1.f / 5040), r, broadcast(1.f / 720));
  q = fma(q, r, broadcast(1.f / 120));
  q = fma(q, r, broadcast(1.f / 24));
  q = fma(q, r, broadcast(1.f / 6));
  q = fma(q, r, broadcast(0.5f));
  return {from_bits(bits(shifted) << 23), fma(r * r, q, r)};
}

constexpr int32_t kSign = INT32_MIN;

// Activation A, known to the compiler.
template <NormActivation A>
struct Fixed {
  static constexpr bool kIdentity = A == NormActivation::identity;
  Vec parameter;
  Fixed() = default;
  explicit Fixed(const NormAct& a) : Fixed(a.parameter) {}
  explicit Fixed(float parameter) : parameter(broadcast(parameter)) {}

  [[gnu::always_inline]] Vec operator()(Vec x) const {
    if constexpr (A == NormActivation::relu) return max(Vec{}, x);
    if constexpr (A == NormActivation::leaky_relu) return select(x > 0.f, x, x * parameter);
    if constexpr (A == NormActivation::elu) return select(x <= 0.f, exponential(x).minus_one() * parameter, x);
    if constexpr (A == NormActivation::tanh) {
      Vec e = exponential(from_bits(bits(x) | kSign) * 2.f).minus_one();
      return from_bits(bits(-e / (2.f + e)) | (bits(x) & kSign));
    }
    if constexpr (A == NormActivation::sigmoid) {
      Vec e = exponential(from_bits(bits(x) | kSign)).value();
      return select(x >= 0.f, broadcast(1.f), e) / (1.f + e);
    }
    return x;
  }

  // grad * act'(x).
  [[gnu::always_inline]] Vec differentiate(Vec x, Vec grad) const {
    if constexpr (A == NormActivation::relu) return select(x <= 0.f, Vec{}, grad);
    if constexpr (A == NormActivation::leaky_relu) return select(x > 0.f, grad, grad * parameter);
    if constexpr (A == NormActivation::elu) return select(x <= 0.f, grad * parameter * exponential(x).value(), grad);
    if constexpr (A == NormActivation::tanh) {
      Vec y = (*this)(x);
      return grad * (1.f - y * y);
    }
    if constexpr (A == NormActivation::sigmoid) {
      Vec y = (*this)(x);
      return grad * (y * (1.f - y));
    }
    return grad;
  }
};

// Any of them: code for one where speed does not ask for six.
struct Any {
  static constexpr bool kIdentity = false;
  NormActivation which;
  float parameter;
  Any() = default;
  explicit Any(const NormAct& a) : which(a.activation), parameter(a.parameter) {}
  template <class F>
  [[gnu::always_inline]] Vec with(const F& f) const {
    switch (which) {
      case NormActivation::relu: return f(Fixed<NormActivation::relu>(parameter));
      case NormActivation::leaky_relu: return f(Fixed<NormActivation::leaky_relu>(parameter));
      case NormActivation::elu: return f(Fixed<NormActivation::elu>(parameter));
      case NormActivation::tanh: return f(Fixed<NormActivation::tanh>(parameter));
      case NormActivation::sigmoid: return f(Fixed<NormActivation::sigmoid>(parameter));
      default: return f(Fixed<NormActivation::identity>(parameter));
    }
  }
  [[gnu::always_inline]] Vec operator()(Vec x) const {
    return with([&](auto act) { return act(x); });
  }
  [[gnu::always_inline]] Vec differentiate(Vec x, Vec grad) const {
    return with([&](auto act) { return act.differentiate(x, grad); });
  }
};

}  // namespace PVL_ISA
}  // namespace perfvl
