// One row of the losses of two networks: its losses, and its gradients.
//
// A row is read by kWidth lanes side by side, class c by lane c mod kWidth: coalesced, and just the partial sums of
// small_loss.h, which shuffles then fold by halves. Up to 16 classes the upper half of 32 partial sums is 0, and half a
// warp gives the same bits. Passes after the first find the row in the L1 cache. Products are __fmul_rn, which nothing
// fuses with a sum.
#pragma once

#include "cuda/small_loss_select.cuh"

namespace perfvl::cuda {
namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kNotANumber = __builtin_nanf("");
constexpr int kDepth = 4;  // classes in flight per lane and network

// What kernels take beside the arguments of the op.
struct TwinTask {
  TwinLoss loss;
  bool of_probabilities, looks_at_disagreement, joint, weighs;
  bool settles;         // rows and all the rest in one launch
  unsigned* tickets;    // [groups], 0 at first
  int* class_counts;    // [groups, classes], 0 at first, where rows are weighed by class
  double* tile_losses;  // [groups, 2, tiles]
};

// e^x for x <= 1, as `exp_terms` of the CPU.
__device__ float exp_terms(float x) {
  x = __fmul_rn(x, 1.44269504f);
  x = x < -127.f ? -127.f : x;
  constexpr float kMagic = 12582912.f + 127.f;  // rounds to an integer, and leaves its exponent in the lowest bits
  float shifted = x + kMagic;
  float r = x - (shifted - kMagic);
  float p = __fmul_rn(1.326472715e-03f, r) + 9.671512643e-03f;
  p = __fmul_rn(p, r) + 5.550733743e-02f;
  p = __fmul_rn(p, r) + 2.402224209e-01f;
  p = __fmul_rn(p, r) + 6.931469776e-01f;
  p = __fmul_rn(p, r) + 1.f;
  return __fmul_rn(p, __uint_as_float(__float_as_uint(shifted) << 23));
}

__device__ float log_of(float sum) { return float(log(double(sum))); }

__device__ float log_softmax(float z, const RowStats& s) { return (z - s.max) - s.log_sum; }

// p and log p - log q, which is 0 where neither network gives the class a probability.
struct Divergence {
  float p, q, d;

  __device__ Divergence(float z1, float z2, const RowStats& s1, const RowStats& s2) {
    float log_p = log_softmax(z1, s1), log_q = log_softmax(z2, s2);
    p = exp_terms(log_p), q = exp_terms(log_q);
    d = p != 0.f || q != 0.f ? log_p - log_q : 0.f;
  }
};

template <int kWidth, class T>
__device__ T row_sum(T x, unsigned lanes = kEverybody) {
#pragma unroll
  for (int step = kWidth / 2; step > 0; step /= 2) x += __shfl_xor_sync(lanes, x, step);
  return x;
}

template <class T>
__device__ const T* row_of(const Logits& l, int64_t group, int64_t row) {
  return static_cast<const T*>(l.data) + group * l.group_stride + row * l.row_stride;
}

// f(class, logit of network 1, logit of network 2) for this lane's classes in ascending order.
template <int kWidth, class T, class F>
__device__ void for_classes(const TwinLoss& w, const T* first, const T* second, F f) {
  int c = threadIdx.x % kWidth, classes = int(w.classes);
  int64_t first_stride = w.logits[0].class_stride, second_stride = w.logits[1].class_stride;
  first += c * first_stride, second += c * second_stride;
#pragma unroll kDepth
  for (; c < classes; c += kWidth) {
    f(c, to_float(*first), to_float(*second));
    first += kWidth * first_stride, second += kWidth * second_stride;
  }
}

// By kWidth lanes. The rows' losses wait where their coefficients will be, whether it is a candidate where it is kept.
template <int kWidth, class T>
__device__ void measure_row(const TwinTask& task, int64_t group, int64_t row, bool writes) {
  const TwinLoss& w = task.loss;
  const T *first = row_of<T>(w.logits[0], group, row), *second = row_of<T>(w.logits[1], group, row);
  int lane = threadIdx.x % kWidth, classes = int(w.classes);
  int64_t label = w.labels[group * w.label_group_stride + row * w.label_row_stride];
  bool is_class = label >= 0 && label < classes;
  // 1. The largest logits and the classes that have them first, NaN being larger than anything.
  RowStats stats[2] = {{-kInfinity, 0.f, 0.f}, {-kInfinity, 0.f, 0.f}};
  int choice[2] = {lane < classes ? lane : classes, lane < classes ? lane : classes};
  auto compare = [](float z, int c, float& most, int& at) {
    if (!(z <= most) && most == most) most = z, at = c;
  };
  for_classes<kWidth>(w, first, second, [&](int c, float z1, float z2) {
    compare(z1, c, stats[0].max, choice[0]), compare(z2, c, stats[1].max, choice[1]);
  });
#pragma unroll
  for (int network = 0; network < 2; ++network) {
    float own = stats[network].max, most = own;
#pragma unroll
    for (int step = kWidth / 2; step > 0; step /= 2) {
      float other = __shfl_xor_sync(kEverybody, most, step);
      most = other > most || other != other ? other : most;
    }
    stats[network].max = most;
    if (!task.looks_at_disagreement) continue;
    int at = own == most || own != own ? choice[network] : classes;
#pragma unroll
    for (int step = kWidth / 2; step > 0; step /= 2) {
      int other = __shfl_xor_sync(kEverybody, at, step);
      at = other < at ? other : at;
    }
    choice[network] = at;
  }
  // 2. The logarithms of their sums of exponentials, of both networks at once: they take long.
  auto logs = [lane](float sum1, float sum2, float& log1, float& log2) {
    sum1 = row_sum<kWidth>(sum1), sum2 = row_sum<kWidth>(sum2);
    float own = log_of(lane % 2 ? sum2 : sum1);
    log1 = __shfl_sync(kEverybody, own, 0, kWidth), log2 = __shfl_sync(kEverybody, own, 1, kWidth);
  };
  float sum1 = 0.f, sum2 = 0.f;
  for_classes<kWidth>(w, first, second, [&](int, float z1, float z2) {
    sum1 += exp_terms(z1 - stats[0].max), sum2 += exp_terms(z2 - stats[1].max);
  });
  logs(sum1, sum2, stats[0].log_sum, stats[1].log_sum);
  // 3. The losses.
  float at_label[2] = {kNotANumber, kNotANumber}, loss[2];
  if (is_class) {
    at_label[0] = to_float(first[label * w.logits[0].class_stride]);
    at_label[1] = to_float(second[label * w.logits[1].class_stride]);
  }
#pragma unroll
  for (int network = 0; network < 2; ++network)
    loss[network] = stats[network].log_sum - (at_label[network] - stats[network].max);
  if (task.of_probabilities) {
    sum1 = sum2 = 0.f;
    for_classes<kWidth>(w, first, second, [&](int, float z1, float z2) {
      sum1 += exp_terms(exp_terms(log_softmax(z1, stats[0])));
      sum2 += exp_terms(exp_terms(log_softmax(z2, stats[1])));
    });
    logs(sum1, sum2, stats[0].extra, stats[1].extra);
#pragma unroll
    for (int network = 0; network < 2; ++network)
      loss[network] = stats[network].extra - exp_terms(log_softmax(at_label[network], stats[network]));
  }
  if (task.joint) {
    sum1 = sum2 = 0.f;
    for_classes<kWidth>(w, first, second, [&](int, float z1, float z2) {
      Divergence v(z1, z2, stats[0], stats[1]);
      // A class that a network rules out adds nothing to its mean, however far the other network is from that.
      sum1 += v.p == 0.f ? 0.f : __fmul_rn(v.p, v.d), sum2 += v.q == 0.f ? 0.f : __fmul_rn(v.q, v.d);
    });
    stats[0].extra = row_sum<kWidth>(sum1), stats[1].extra = row_sum<kWidth>(sum2);
    loss[0] = __fmul_rn(1.f - w.co_lambda, loss[0] + loss[1]) + __fmul_rn(w.co_lambda, stats[0].extra - stats[1].extra);
    loss[1] = loss[0];
  }
  // 4. Into memory.
  if (lane != 0 || !writes) return;
  int64_t all = w.groups * w.rows, at = group * w.rows + row;
  w.kept[0][at] = !task.looks_at_disagreement || choice[0] != choice[1];
#pragma unroll
  for (int network = 0; network < 2; ++network) {
    w.coefficients[network * all + at] = loss[network];
    w.stats[network * all + at] = stats[network];
  }
  if (task.weighs && is_class) atomicAdd(&task.class_counts[group * w.classes + label], 1);
}

// By kWidth lanes: out = f(class, logit), several on their way.
template <int kWidth, class T, class F>
__device__ void map_classes(const T* row, int64_t stride, int classes, T* out, F f) {
#pragma unroll 1
  for (int first = threadIdx.x % kWidth; first < classes; first += kDepth * kWidth) {
    float z[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
      if (int c = first + d * kWidth; c < classes) z[d] = to_float(row[c * stride]);
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
      if (int c = first + d * kWidth; c < classes) out[c] = from_float<T>(f(c, z[d]));
  }
}

template <int kWidth, class T>
__device__ void fill_zeros(T* out, int classes) {
  for (int c = threadIdx.x % kWidth; c < classes; c += kWidth) out[c] = from_float<T>(0.f);
}

// JoCoR: both gradients of a kept row, each where it is wanted.
template <int kWidth, class T>
__device__ void differentiate_joint(const TwinLoss& w, int64_t group, int64_t row, int label, float scale,
                                    const RowStats& s1, const RowStats& s2, T* out1, T* out2) {
  const T *first = row_of<T>(w.logits[0], group, row), *second = row_of<T>(w.logits[1], group, row);
  int64_t first_stride = w.logits[0].class_stride, second_stride = w.logits[1].class_stride;
  float entropy = scale * (1.f - w.co_lambda), agreement = scale * w.co_lambda;
  int classes = int(w.classes);
#pragma unroll 1
  for (int begin = threadIdx.x % kWidth; begin < classes; begin += kDepth * kWidth) {
    float z1[kDepth], z2[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
      if (int c = begin + d * kWidth; c < classes)
        z1[d] = to_float(first[c * first_stride]), z2[d] = to_float(second[c * second_stride]);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      int c = begin + d * kWidth;
      if (c >= classes) continue;
      Divergence v(z1[d], z2[d], s1, s2);
      float apart = v.p - v.q, target = c == label ? entropy : 0.f;
      if (out1) out1[c] = from_float<T>(v.p * entropy + (v.p * (v.d - s1.extra) + apart) * agreement - target);
      if (out2) out2[c] = from_float<T>(v.q * entropy - (v.q * (v.d - s2.extra) + apart) * agreement - target);
    }
  }
}

// By kWidth lanes: the gradient of a kept row of one network, through one softmax or two.
template <int kWidth, class T>
__device__ void differentiate_row(const TwinLoss& w, int network, bool of_probabilities, int64_t group, int64_t row,
                                  int label, float scale, const RowStats& s, T* out) {
  const Logits& l = w.logits[network];
  const T* z = row_of<T>(l, group, row);
  int classes = int(w.classes);
  if (!of_probabilities)
    return map_classes<kWidth>(z, l.class_stride, classes, out, [&](int c, float x) {
      return exp_terms(log_softmax(x, s)) * scale - (c == label ? scale : 0.f);
    });
  // p (g - sum p g), where g = scale (softmax(p) - 1 at the label) is the gradient by the probabilities p.
  auto by_probability = [&](int c, float p) { return exp_terms(p - s.extra) * scale - (c == label ? scale : 0.f); };
  float inner = 0.f;
#pragma unroll kDepth
  for (int c = threadIdx.x % kWidth; c < classes; c += kWidth) {
    float p = exp_terms(log_softmax(to_float(z[c * l.class_stride]), s));
    inner += p * by_probability(c, p);
  }
  unsigned lanes = kWidth == 32 ? kEverybody : 0xffffu << (threadIdx.x & 16u);  // the other half may have left
  inner = row_sum<kWidth>(inner, lanes);
  map_classes<kWidth>(z, l.class_stride, classes, out, [&](int c, float x) {
    float p = exp_terms(log_softmax(x, s));
    return p * (by_probability(c, p) - inner);
  });
}

}  // namespace
}  // namespace perfvl::cuda
