// The passes of norm_act over planes of NCHW: channels stay in registers for a plane.
#pragma once

#include "cpu/norm_act_functions.h"
#include "cpu/norm_act_parts.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

// The norm of one vector, and the activation on its side.
template <class Act, bool kAfter>
struct Norm {
  Act act;
  Vec mean, scale, shift;

  // What the norm sees.
  [[gnu::always_inline]] static Vec seen(const Act& act, Vec x) { return kAfter ? act(x) : x; }
  [[gnu::always_inline]] Vec forward(Vec x) const {
    Vec y = fma(seen(act, x) - mean, scale, shift);
    return kAfter ? y : act(y);
  }
  // The gradient of what the norm gives, and how far what it sees is from the mean.
  struct Terms {
    Vec grad, distance;
  };
  [[gnu::always_inline]] Terms terms(Vec x, Vec grad) const {
    Vec distance = seen(act, x) - mean;
    return {kAfter ? grad : act.differentiate(fma(distance, scale, shift), grad), distance};
  }
  // The gradient of x; by the batch's statistics, or by fixed ones.
  [[gnu::always_inline]] Vec backward(Vec x, Vec grad, Vec offset, Vec slope, bool fixed) const {
    Terms t = terms(x, grad);
    Vec result = fixed ? t.grad : fma(-slope, t.distance, t.grad - offset);
    result *= scale;
    return kAfter ? act.differentiate(x, result) : result;
  }
};

// Two sums for each channel of a task. What is added in float32 is added up in float64 every kSum elements.
// begin(p, first, count) before them, add(p, at, lanes, sums) for vectors, end(p, count, sums) behind.
struct Pair {
  Vec first, second;
};
template <class Begin, class Add, class End>
void sum_planes(const NormAct& a, const Task& t, const Begin& begin, const Add& add, const End& end) {
  int64_t run = std::min(a.inner, kSum), rows = std::max<int64_t>(1, kSum / a.inner), planes = t.last - t.first;
  for (int64_t o = t.begin; o < t.end; o += rows)
    for (int64_t start = 0; start < a.inner; start += run) {
      int64_t until = std::min(t.end, o + rows), length = std::min(run, a.inner - start);
      auto place = [&](int64_t row, int64_t p) { return (row * a.channels + t.first + p) * a.inner + start; };
      Pair sums[kMostPlanes];
      for (int64_t p = 0; p < planes; ++p) sums[p] = Pair{}, begin(p, place(o, p), length);
      for (int64_t row = o; row < until; ++row)
        for (int64_t p = 0; p < planes; ++p) {
          Pair own = sums[p];
          int64_t at = place(row, p);
          for_vectors(length, [&](int64_t i, int64_t lanes) { add(p, at + i, lanes, own); });
          sums[p] = own;
        }
      for (int64_t p = 0; p < planes; ++p) end(p, (until - o) * length, sums[p]);
    }
}

// f(p, at, lanes) for the vectors of a task's planes, whole ones where `to` can be written a whole line at a time.
template <class To, class F>
void for_planes(const NormAct& a, const Task& t, const To& to, const F& f) {
  for (int64_t o = t.begin; o < t.end; ++o)
    for (int64_t p = t.first; p < t.last; ++p) {
      int64_t at = (o * a.channels + p) * a.inner, head = to.head(at, a.inner);
      auto run = f(p);
      if (head) run(at, head);
      for_vectors(a.inner - head, [&](int64_t i, int64_t lanes) { run(at + head + i, lanes); });
    }
  to.finish();
}

template <Dtype dtype, class Act, bool kAfter>
struct Planes {
  using N = Norm<Act, kAfter>;

  static N norm_of(const NormAct& a, const Channels& k, int64_t c) {
    return {Act(a), broadcast(a.mean[c]), broadcast(k.scale[c]), broadcast(k.shift[c])};
  }

  static void collect(const NormAct& a, const Channels& k, const Task& t) {
    constexpr int64_t kPilot = 64;
    Elements<dtype> input(a.input);
    Act act(a);
    double *first = k.first(t.part) + t.first, *second = k.second(t.part) + t.first;
    float pivot[kMostPlanes], near[kMostPlanes];
    for (int64_t p = 0; p < t.last - t.first; ++p) {
      pivot[p] = finite(N::seen(act, input.get((t.first + p) * a.inner, 1)))[0];
      if (t.part == 0) k.pivot[t.first + p] = pivot[p];
      first[p] = second[p] = 0;
    }
    sum_planes(
        a, t,
        // The mean of a few is near that of all: squares of the distances lose few digits, whatever the mean.
        [&](int64_t p, int64_t at, int64_t length) {
          int64_t few = std::min(kPilot, length);
          Vec total{};
          for_vectors(few,
                      [&](int64_t i, int64_t lanes) { total += only(N::seen(act, input.get(at + i, lanes)), lanes); });
          near[p] = finite(broadcast(sum(total) / float(few)))[0];
        },
        [&](int64_t p, int64_t at, int64_t lanes, Pair& sums) {
          Vec distance = only(N::seen(act, input.get(at, lanes)) - near[p], lanes);
          sums.first += distance, sums.second = fma(distance, distance, sums.second);
        },
        [&](int64_t p, int64_t count, const Pair& sums) {
          double moved = double(near[p]) - pivot[p], once = sum(sums.first);
          first[p] += once + double(count) * moved;
          second[p] += double(sum(sums.second)) + moved * (2 * once + double(count) * moved);
        });
  }

  static void apply(const NormAct& a, const Channels& k, const Task& t) {
    Elements<dtype> input(a.input);
    Lines<dtype> output(a.output, a);
    for_planes(a, t, output, [&](int64_t c) {
      return [&, norm = norm_of(a, k, c)](int64_t at, int64_t lanes) {
        output.set(at, norm.forward(input.get(at, lanes)), lanes);
      };
    });
  }

  static void reduce(const NormActBackward& b, const Channels& k, const Task& t) {
    const NormAct& a = b.forward;
    Elements<dtype> input(a.input), upstream(b.grad_output);
    double *first = k.first(t.part) + t.first, *second = k.second(t.part) + t.first;
    std::fill_n(first, t.last - t.first, 0.), std::fill_n(second, t.last - t.first, 0.);
    N norms[kMostPlanes];
    for (int64_t p = 0; p < t.last - t.first; ++p) norms[p] = norm_of(a, k, t.first + p);
    sum_planes(
        a, t, [](int64_t, int64_t, int64_t) {},
        [&](int64_t p, int64_t at, int64_t lanes, Pair& sums) {
          auto terms = norms[p].terms(input.get(at, lanes), upstream.get(at, lanes));  // 0 beyond: adds nothing
          sums.first += terms.grad, sums.second = fma(terms.grad, terms.distance, sums.second);
        },
        [&](int64_t p, int64_t, const Pair& sums) { first[p] += sum(sums.first), second[p] += sum(sums.second); });
  }

  static void differentiate(const NormActBackward& b, const Channels& k, const Task& t) {
    const NormAct& a = b.forward;
    Elements<dtype> input(a.input), upstream(b.grad_output);
    Lines<dtype> result(b.grad_input, a);
    for_planes(a, t, result, [&](int64_t c) {
      Vec offset = broadcast(k.offset[c]), slope = broadcast(k.slope[c]);
      return [&, offset, slope, norm = norm_of(a, k, c)](int64_t at, int64_t lanes) {
        Vec grad = upstream.get(at, lanes);
        result.set(at, norm.backward(input.get(at, lanes), grad, offset, slope, !a.training), lanes);
      };
    });
  }
};

}  // namespace
}  // namespace PVL_ISA
}  // namespace perfvl
