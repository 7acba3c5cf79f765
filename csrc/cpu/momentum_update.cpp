// target <- m target + (1 - m) source over a list of tensors, as one pass over memory.
//
// Two operations per element: memory is the whole cost, 12 bytes per float32 element (both operands read, the target
// written). The list is cut by bytes, not by tensors: each thread takes an equal share, which may begin and end inside
// a tensor, so that one huge embedding beside a hundred small biases keeps every thread busy. Shares begin at multiples
// of 64 elements, so that no two threads write one cache line. Copies of a list too large for the caches are written
// past them: nothing has read those lines, and the usual store would first fetch them from memory.
#include "cpu/momentum_update.h"

#include <algorithm>

#include "cpu/vec.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

constexpr int64_t large_list = 16 << 20;  // bytes: about the share of last-level cache that training leaves

enum class Rule { keep, replace, near_target, near_source, convex };

struct Weights {
  Rule rule;
  float momentum, weight;  // m and 1 - m
  bool past_caches;        // where copies go
};

Weights resolve(const MomentumWeights& w, bool past_caches) {
  double m = w.momentum;
  if (w.tensor) m = w.tensor_is_double ? *static_cast<const double*>(w.tensor) : *static_cast<const float*>(w.tensor);
  float momentum = float(m), weight = float(1.0 - m);
  if (w.convex) return {Rule::convex, momentum, weight, past_caches};
  // The nearer end is the exact one: rounding never moves past it.
  Rule rule = weight == 0.f   ? Rule::keep
              : weight == 1.f ? Rule::replace
              : weight < 0.5f ? Rule::near_target
                              : Rule::near_source;
  return {rule, momentum, weight, past_caches};
}

template <Dtype type>
using Element = std::conditional_t<type == Dtype::float32, float, uint16_t>;

template <Dtype type>
Vec widen(const void* p, int64_t at) {
  const auto* from = static_cast<const Element<type>*>(p) + at;
  if constexpr (type == Dtype::float32) return load<Vec>(from);
  if constexpr (type == Dtype::bfloat16) return widen_bfloat(load<HalfVec>(from));
  if constexpr (type == Dtype::float16) return widen_half(load<HalfVec>(from));
}

template <Dtype type>
void narrow(void* p, int64_t at, Vec v) {
  auto* to = static_cast<Element<type>*>(p) + at;
  if constexpr (type == Dtype::float32) store(to, v);
  if constexpr (type == Dtype::bfloat16) store(to, narrow_bfloat(v));
  if constexpr (type == Dtype::float16) store(to, narrow_half(v));
}

// As `narrow`, or past the caches: `p` is then aligned to whole vectors.
template <Dtype type>
void narrow_copy(void* p, int64_t at, Vec v, bool past_caches) {
  if (!past_caches) return narrow<type>(p, at, v);
  auto* to = static_cast<Element<type>*>(p) + at;
  if constexpr (type == Dtype::float32) stream(to, v);
  if constexpr (type == Dtype::bfloat16) stream(to, narrow_bfloat(v));
  if constexpr (type == Dtype::float16) stream(to, narrow_half(v));
}

template <Dtype type>
Vec rounded(Vec v) {
  if constexpr (type == Dtype::bfloat16) return widen_bfloat(narrow_bfloat(v));
  if constexpr (type == Dtype::float16) return widen_half(narrow_half(v));
  return v;
}

template <Rule rule, Dtype target, Dtype source>
Vec average(Vec t, Vec s, Vec momentum, Vec weight) {
  if constexpr (rule == Rule::keep) return t;
  if constexpr (rule == Rule::replace) return s;
  if constexpr (rule == Rule::near_target) return fma(weight, s - t, t);
  if constexpr (rule == Rule::near_source) return s - (s - t) * momentum;
  if constexpr (rule == Rule::convex) return rounded<target>(t * momentum) + rounded<source>(s * weight);
}

// Elements [begin, end) of one pair.
template <Rule rule, Dtype target, Dtype source>
void sweep(const MomentumPair& pair, int64_t begin, int64_t end, const Weights& w) {
  Vec momentum = broadcast(w.momentum), weight = broadcast(w.weight);
  bool past_caches = w.past_caches && reinterpret_cast<uintptr_t>(pair.copy) % sizeof(Vec) == 0;
  auto step = [&](void* t, const void* s, void* copy, int64_t at) {
    Vec moved = average<rule, target, source>(widen<target>(t, at), widen<source>(s, at), momentum, weight);
    if constexpr (rule != Rule::keep) narrow<target>(t, at, moved);
    if (!copy) return;
    moved = rounded<target>(moved);
    if (pair.copy_dtype == Dtype::float32) narrow_copy<Dtype::float32>(copy, at, moved, past_caches);
    if (pair.copy_dtype == Dtype::bfloat16) narrow_copy<Dtype::bfloat16>(copy, at, moved, past_caches);
    if (pair.copy_dtype == Dtype::float16) narrow_copy<Dtype::float16>(copy, at, moved, past_caches);
  };
  int64_t at = begin;
  if (pair.copy)
    for (; at + kLanes <= end; at += kLanes) step(pair.target, pair.source, pair.copy, at);
  else
    for (; at + kLanes <= end; at += kLanes) step(pair.target, pair.source, nullptr, at);
  if (at == end) return;
  // The ragged tail: one whole step on copies.
  int64_t rest = end - at, copy_bytes = pair.copy_dtype == Dtype::float32 ? 4 : 2;
  Element<target> t[kLanes] = {};
  Element<source> s[kLanes] = {};
  alignas(Vec) float copy[kLanes];
  auto* own = static_cast<Element<target>*>(pair.target) + at;
  std::copy_n(own, rest, t);
  std::copy_n(static_cast<const Element<source>*>(pair.source) + at, rest, s);
  step(t, s, pair.copy ? copy : nullptr, 0);
  std::copy_n(t, rest, own);
  if (pair.copy) std::memcpy(static_cast<char*>(pair.copy) + at * copy_bytes, copy, rest * copy_bytes);
}

using Sweep = void (*)(const MomentumPair&, int64_t begin, int64_t end, const Weights&);

template <Rule rule, Dtype target>
Sweep pick(Dtype source) {
  if (source == Dtype::float32) return sweep<rule, target, Dtype::float32>;
  if (source == Dtype::bfloat16) return sweep<rule, target, Dtype::bfloat16>;
  return sweep<rule, target, Dtype::float16>;
}

template <Rule rule>
Sweep pick(Dtype target, Dtype source) {
  if (target == Dtype::float32) return pick<rule, Dtype::float32>(source);
  if (target == Dtype::bfloat16) return pick<rule, Dtype::bfloat16>(source);
  return pick<rule, Dtype::float16>(source);
}

Sweep pick(Rule rule, Dtype target, Dtype source) {
  switch (rule) {
    case Rule::keep: return pick<Rule::keep>(target, source);
    case Rule::replace: return pick<Rule::replace>(target, source);
    case Rule::near_target: return pick<Rule::near_target>(target, source);
    case Rule::near_source: return pick<Rule::near_source>(target, source);
    default: return pick<Rule::convex>(target, source);
  }
}

int64_t size_of(Dtype type) { return type == Dtype::float32 ? 4 : 2; }

// Bytes that one element moves.
int64_t cost(const MomentumPair& p) {
  return 2 * size_of(p.target_dtype) + size_of(p.source_dtype) + (p.copy ? size_of(p.copy_dtype) : 0);
}

void run(const MomentumPair* pairs, int64_t count, const MomentumWeights& weights, const Host& host) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += pairs[i].count * cost(pairs[i]);
  Weights w = resolve(weights, total > large_list);
  constexpr int64_t share = 1 << 20;  // bytes: done before another thread has surely woken
  int64_t workers = std::clamp<int64_t>(total / share, 1, host.threads);
  auto work = [&](int64_t worker) {
    int64_t begin = total / workers * worker, end = worker + 1 == workers ? total : total / workers * (worker + 1);
    int64_t first = 0;  // where this pair begins in the sum of all costs
    for (const MomentumPair* p = pairs; p != pairs + count && first < end; ++p) {
      int64_t step = cost(*p), last = first + p->count * step;
      // The first element at or after a share's border, moved on to the next multiple of 64: both sides of the border
      // compute the same one.
      auto element = [&](int64_t at) {
        return at <= first ? 0 : at >= last ? p->count : std::min(round_up(ceil_div(at - first, step), 64), p->count);
      };
      int64_t from = element(begin), to = element(end);
      if (from < to) pick(w.rule, p->target_dtype, p->source_dtype)(*p, from, to, w);
      first = last;
    }
    if (w.past_caches) stream_fence();
  };
  if (workers > 1)
    host.parallel(workers, work);
  else
    work(0);
}

}  // namespace

extern const MomentumKernel momentum_update = run;

}  // namespace PVL_ISA
}  // namespace perfvl
