// Activations and their derivatives on vectors, NaN kept, as torch defines them.
#pragma once

#include "cpu/vec.h"
#include "image.h"

namespace perfvl {
namespace PVL_ISA {

inline Vec select(IntVec condition, Vec yes, Vec no) { return condition ? yes : no; }

inline Vec sigmoid(Vec x) {
  // exp2 is right up to 120: beyond, the sigmoid is 0 to all digits.
  Vec power = x * -1.44269504f;
  return 1.f / (1.f + exp2(select(power > 120.f, broadcast(120.f), power)));
}

inline Vec activate(Activation activation, Vec x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return max(Vec{}, x);
    case Activation::relu6: return select(x > 6.f, broadcast(6.f), max(Vec{}, x));
    case Activation::silu: return x * sigmoid(x);
    case Activation::hardswish: {
      Vec gate = x + 3.f;
      gate = select(gate > 6.f, broadcast(6.f), max(Vec{}, gate));
      return x * gate * (1.f / 6.f);
    }
    case Activation::leaky_relu: return select(x > 0.f, x, x * 0.01f);
  }
  return x;
}

// gradient * activation'(x).
inline Vec activate_backward(Activation activation, Vec x, Vec gradient) {
  switch (activation) {
    case Activation::none: return gradient;
    case Activation::relu: return select(x <= 0.f, Vec{}, gradient);
    case Activation::relu6: return select((x <= 0.f) | (x >= 6.f), Vec{}, gradient);
    case Activation::silu: {
      Vec s = sigmoid(x);
      return gradient * s * (1.f + x * (1.f - s));
    }
    case Activation::hardswish:
      return select(x <= -3.f, Vec{}, select(x < 3.f, gradient * (x * (1.f / 3.f) + 0.5f), gradient));
    case Activation::leaky_relu: return select(x > 0.f, gradient, gradient * 0.01f);
  }
  return gradient;
}

}  // namespace PVL_ISA
}  // namespace perfvl
