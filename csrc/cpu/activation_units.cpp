// Activations with several linear pieces: maxout over channels, and the adaptive piecewise linear unit (APL).
//
// Both are bound by memory. Maxout reads its pieces and writes the largest and one byte that names it, 13 bytes an
// output for two pieces in float32; backward reads the byte and the gradient, not the input, and writes the pieces'
// gradients: 13 more. APL moves 8 bytes an element, backward 12: the input's gradient and the sums for the parameters
// come from one pass. Sums are added in an order that depends on the sizes alone.
#include "cpu/activation_units.h"

#include <algorithm>
#include <array>
#include <utility>

#include "cpu/activation_apl.h"
#include "cpu/activation_maxout.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

template <class F>
void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32: return f(std::integral_constant<Dtype, Dtype::float32>{});
    case Dtype::bfloat16: return f(std::integral_constant<Dtype, Dtype::bfloat16>{});
    case Dtype::float16: return f(std::integral_constant<Dtype, Dtype::float16>{});
  }
}

void maxout(const Maxout& m, const Host& host) {
  with_dtype(m.dtype,
             [&](auto dtype) { m.winner ? maxout_of<dtype, true>(m, host) : maxout_of<dtype, false>(m, host); });
}
void maxout_backward(const MaxoutBackward& m, const Host& host) {
  with_dtype(m.dtype, [&](auto dtype) { maxout_backward_of<dtype>(m, host); });
}

template <int S, Dtype dtype>
void apl_output(const Apl& a, const Host& host) {
  Tasks tasks(a);
  host.parallel(tasks.parts * tasks.blocks, [&](int64_t i) {
    Task task(a, tasks, i);
    tasks.across ? apl_columns<dtype>(a, task) : apl_planes<S, dtype>(a, task);
  });
}

template <int S, Dtype dtype>
void apl_sums(const AplBackward& b, const Tasks& tasks, const Sums& sums, const Host& host) {
  const Apl& a = b.forward;
  host.parallel(tasks.parts * tasks.blocks, [&](int64_t i) {
    Task task(a, tasks, i);
    int64_t before = task.part * S * a.parameters;
    Sums own{sums.slope + before, sums.hinge + before};
    tasks.across ? columns_backward<S, dtype>(b, task, own) : planes_backward<S, dtype>(b, task, own);
  });
}

struct BySegments {
  void (*output)(const Apl&, const Host&);
  void (*sums)(const AplBackward&, const Tasks&, const Sums&, const Host&);
};
template <Dtype dtype, int... S>
constexpr std::array<BySegments, kMostSegments> by_segments(std::integer_sequence<int, S...>) {
  return {BySegments{apl_output<S + 1, dtype>, apl_sums<S + 1, dtype>}...};
}
BySegments kernels_of(const Apl& a) {
  BySegments found;
  with_dtype(a.dtype, [&](auto dtype) {
    static constexpr auto all = by_segments<dtype>(std::make_integer_sequence<int, kMostSegments>{});
    found = all[a.segments - 1];
  });
  return found;
}

void apl(const Apl& a, const Host& host) { kernels_of(a).output(a, host); }

int64_t apl_backward_scratch_bytes(const AplBackward& b) {
  const Apl& a = b.forward;
  int64_t parts = Tasks(a).parts;
  return parts == 1 ? 0 : round_up(parts * 2 * a.segments * a.parameters * int64_t(sizeof(float)), 64);
}

void apl_backward(const AplBackward& b, void* scratch, const Host& host) {
  const Apl& a = b.forward;
  Tasks tasks(a);
  if (tasks.parts == 1) return kernels_of(a).sums(b, tasks, {b.grad_slope, b.grad_hinge}, host);
  int64_t wanted = a.segments * a.parameters;
  float* slope = static_cast<float*>(scratch);
  float* hinge = slope + tasks.parts * wanted;
  kernels_of(a).sums(b, tasks, {slope, hinge}, host);
  // The parts' sums, in their order.
  host.parallel(ceil_div(wanted, kGrain), [&](int64_t task) {
    int64_t begin = task * kGrain, end = std::min(wanted, begin + kGrain);
    for (int64_t i = begin; i < end; ++i) b.grad_slope[i] = slope[i], b.grad_hinge[i] = hinge[i];
    for (int64_t part = 1; part < tasks.parts; ++part)
      for (int64_t i = begin; i < end; ++i) {
        b.grad_slope[i] += slope[part * wanted + i];
        b.grad_hinge[i] += hinge[part * wanted + i];
      }
  });
}

}  // namespace

extern const ActivationKernel activation = {maxout, maxout_backward, apl, apl_backward_scratch_bytes, apl_backward};

}  // namespace PVL_ISA
}  // namespace perfvl
