// Batch norm and an activation, on either side of it, and their gradients.
//
// Bound by memory. Training reads the input for the statistics, reads it again and writes the output: 12 bytes an
// element in float32, and 8 where a channel's planes stay in the cache from one pass to the next. Backward reads the
// input and the output's gradient for two sums, reads them again and writes the input's gradient: 20 bytes, or 12.
// Neither the normalised input nor the activation is stored: both are made again from the input. Apart, the two layers
// move 20 and 32. Sums are float32 for a few thousand elements, of distances from a number near the mean, then float64;
// their order depends on the sizes alone.
#include "cpu/norm_act.h"

#include <type_traits>

#include "cpu/norm_act_columns.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

// Statistics: of the passes whose norm sees the same numbers. Passes: of everything else.
template <class Statistics, class Passes>
void forward_by(const NormAct& a, const Tasks& tasks, const Channels& k, const Host& host) {
  if (tasks.whole()) {
    host.parallel(tasks.count(), [&](int64_t i) {
      Task task(a, tasks, i);
      if (a.training) Statistics::collect(a, k, task);
      finish_statistics(a, k, task.first, task.last);
      Passes::apply(a, k, task);
    });
    return;
  }
  if (a.training) host.parallel(tasks.count(), [&](int64_t i) { Statistics::collect(a, k, Task(a, tasks, i)); });
  finish_statistics(a, k, 0, a.channels);
  host.parallel(tasks.count(), [&](int64_t i) { Passes::apply(a, k, Task(a, tasks, tasks.back(i, host.threads))); });
}

template <class Passes>
void backward_by(const NormActBackward& b, const Tasks& tasks, const Channels& k, const Host& host) {
  const NormAct& a = b.forward;
  bool sums = a.training || b.grad_weight;
  if (tasks.whole()) {
    host.parallel(tasks.count(), [&](int64_t i) {
      Task task(a, tasks, i);
      if (sums) Passes::reduce(b, k, task), finish_gradients(b, k, task.first, task.last);
      if (b.grad_input) Passes::differentiate(b, k, task);
    });
    return;
  }
  if (sums) {
    host.parallel(tasks.count(), [&](int64_t i) { Passes::reduce(b, k, Task(a, tasks, i)); });
    finish_gradients(b, k, 0, a.channels);
  }
  if (!b.grad_input) return;
  host.parallel(tasks.count(),
                [&](int64_t i) { Passes::differentiate(b, k, Task(a, tasks, tasks.back(i, host.threads))); });
}

struct Chosen {
  void (*forward)(const NormAct&, const Tasks&, const Channels&, const Host&);
  void (*backward)(const NormActBackward&, const Tasks&, const Channels&, const Host&);
};
template <Dtype dtype, class Act, bool kAfter>
Chosen choose_layout(const NormAct& a) {
  using Seen = std::conditional_t<kAfter, Act, Fixed<NormActivation::identity>>;
  if (a.inner == 1)
    return {forward_by<Columns<dtype, Seen, kAfter>, Columns<dtype, Act, kAfter>>,
            backward_by<Columns<dtype, Act, kAfter>>};
  return {forward_by<Planes<dtype, Seen, kAfter>, Planes<dtype, Act, kAfter>>, backward_by<Planes<dtype, Act, kAfter>>};
}
template <Dtype dtype, class Act>
Chosen choose_order(const NormAct& a) {
  if constexpr (!Act::kIdentity)
    if (a.after) return choose_layout<dtype, Act, true>(a);
  return choose_layout<dtype, Act, false>(a);
}
Chosen choose(const NormAct& a) {
  if (a.dtype == Dtype::bfloat16) return choose_order<Dtype::bfloat16, Any>(a);
  if (a.dtype == Dtype::float16) return choose_order<Dtype::float16, Any>(a);
  constexpr Dtype dtype = Dtype::float32;
  switch (a.activation) {
    case NormActivation::relu: return choose_order<dtype, Fixed<NormActivation::relu>>(a);
    case NormActivation::leaky_relu: return choose_order<dtype, Fixed<NormActivation::leaky_relu>>(a);
    case NormActivation::elu: return choose_order<dtype, Fixed<NormActivation::elu>>(a);
    case NormActivation::tanh: return choose_order<dtype, Fixed<NormActivation::tanh>>(a);
    case NormActivation::sigmoid: return choose_order<dtype, Fixed<NormActivation::sigmoid>>(a);
    default: return choose_order<dtype, Fixed<NormActivation::identity>>(a);
  }
}

int64_t scratch_bytes(const NormAct& a) { return Channels(a, Tasks(a, 1), nullptr).bytes; }
void forward(const NormAct& a, void* scratch, const Host& host) {
  Tasks tasks(a, 1);
  choose(a).forward(a, tasks, Channels(a, tasks, scratch), host);
}

int64_t backward_scratch_bytes(const NormActBackward& b) {
  return Channels(b.forward, Tasks(b.forward, 2), nullptr).bytes;
}
void backward(const NormActBackward& b, void* scratch, const Host& host) {
  const NormAct& a = b.forward;
  Tasks tasks(a, 2);
  Channels channels(a, tasks, scratch);
  find_affine(a, channels, 0, a.channels);
  choose(a).backward(b, tasks, channels, host);
}

}  // namespace

extern const NormActKernel norm_act = {scratch_bytes, forward, backward_scratch_bytes, backward};

}  // namespace PVL_ISA
}  // namespace perfvl
