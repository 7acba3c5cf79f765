// How the activations walk over dense memory.
#pragma once

#include "cpu/vec.h"

namespace perfvl {
namespace PVL_ISA {

constexpr int64_t kGrain = 16384;  // elements of a task

// f(first, elements) for vectors of a span. The compiler makes two of f: one for whole vectors.
template <class F>
[[gnu::always_inline]] inline void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, int64_t(kLanes));
  if (i < count) f(i, count - i);
}

}  // namespace PVL_ISA
}  // namespace perfvl
