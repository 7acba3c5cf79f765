// Which rows of a batch have the smallest losses, and the losses of two networks that teach one another by it.
//
// A batch of 128 rows and 10 classes is 10 kB: what costs there is being called at all, so everything is one call. A
// batch of 1,024 rows and 1,000 classes is 4 MB per network, read once here and once in backward, which recomputes the
// softmax from two numbers per row instead of keeping it. The k smallest of n losses are found without sorting, by
// counting: the leading digits of 32-bit keys, then those that share the digit of the k-th, then bits of the few left.
#include "cpu/small_loss.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "cpu/convert.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

constexpr int64_t kSums = 32;         // partial sums over classes, on every level (see small_loss.h)
constexpr int64_t kShare = 16 << 10;  // elements: fewer are done before another thread has woken
constexpr float kLog2e = 1.44269504f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

uint32_t key_of(float loss) {
  uint32_t b;
  loss += 0.f;  // -0 becomes 0
  std::memcpy(&b, &loss, 4);
  if ((b & 0x7fffffffu) > 0x7f800000u) return kNanKey;
  return b >> 31 ? ~b : b | 0x80000000u;
}

double number(const Scalars& s, int64_t group) {
  if (!s.tensor) return s.value;
  int64_t at = group * s.stride;
  return s.is_double ? static_cast<const double*>(s.tensor)[at] : static_cast<const float*>(s.tensor)[at];
}

// Rows below `key`, and the first `ties` rows of this key.
struct Threshold {
  uint32_t key;
  int64_t ties;

  bool keeps(uint32_t k) { return k < key || (k == key && ties-- > 0); }
};

int64_t count_below(const uint32_t* keys, int64_t n, uint32_t border) {
  constexpr int64_t kBlock = 1 << 30;  // so that 32 bits hold a block's count
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    uint32_t below = 0;
    for (const uint32_t *key = keys + i, *end = keys + std::min(i + kBlock, n); key < end; ++key)
      below += *key < border;
    count += below;
  }
  return count;
}

// Of the k smallest of n keys, k <= n. `work` holds n keys.
Threshold smallest(const uint32_t* keys, int64_t n, int64_t k, uint32_t* work) {
  constexpr int64_t kFew = 4096;
  if (k == 0) return {0, 0};
  uint32_t key = 0;
  int shift = 24;
  for (; n > kFew && shift >= 0; shift -= 8) {
    // 1. How many keys have which digit. Four counters each, so that equal digits do not wait for one another.
    uint32_t counts[4][256] = {};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
      for (int lane = 0; lane < 4; ++lane) ++counts[lane][keys[i + lane] >> shift & 255];
    for (; i < n; ++i) ++counts[0][keys[i] >> shift & 255];
    // 2. The digit of the k-th.
    uint32_t digit = 0;
    for (;; ++digit) {
      int64_t count = int64_t(counts[0][digit]) + counts[1][digit] + counts[2][digit] + counts[3][digit];
      if (k <= count) break;
      k -= count;
    }
    key |= digit << shift;
    // 3. The keys that share it.
    int64_t left = 0;
    for (i = 0; i < n; ++i) {
      uint32_t candidate = keys[i];
      work[left] = candidate;
      left += (candidate >> shift & 255) == digit;
    }
    keys = work, n = left;
  }
  // 4. Few: bit by bit, the largest number that has fewer than k keys below it.
  for (int bit = shift + 7; bit >= 0; --bit)
    if (uint32_t larger = key | 1u << bit; count_below(keys, n, larger) < k) key = larger;
  return {key, k - count_below(keys, n, key)};
}

int64_t workers_for(int64_t elements, const Host& host) {
  return std::clamp<int64_t>(elements / kShare, 1, host.threads);
}

template <class F>
void run_tasks(const Host& host, int64_t count, bool threads, const F& task) {
  if (threads && count > 1) return host.parallel(count, task);
  for (int64_t i = 0; i < count; ++i) task(i);
}

int64_t mask_scratch_bytes(const SmallLossMask& m) {
  Arena arena(nullptr);
  arena.take<uint32_t>(2 * m.groups * m.rows);
  return arena.used();
}

void mask(const SmallLossMask& m, void* scratch, const Host& host) {
  auto* memory = static_cast<uint32_t*>(scratch);
  run_tasks(host, m.groups, m.groups * m.rows > kShare, [&](int64_t g) {
    // 1. Keys of the candidates.
    uint32_t* keys = memory + 2 * g * m.rows;
    Matrix losses{m.losses, m.groups, m.rows, m.group_stride, m.row_stride, m.dtype};
    const uint8_t* candidate = m.candidates ? m.candidates + g * m.candidate_group_stride : nullptr;
    int64_t count = 0;
    for (int64_t i = 0; i < m.rows; ++i) {
      bool counts = !candidate || candidate[i * m.candidate_row_stride];
      keys[i] = counts ? key_of(element(losses, g, i)) : kNoCandidate;
      count += counts;
    }
    // 2. The border, 3. the mask.
    Threshold border = smallest(keys, m.rows, keep_count(number(m.keep_rate, g), count), keys + m.rows);
    for (int64_t i = 0; i < m.rows; ++i) m.mask[g * m.rows + i] = border.keeps(keys[i]);
  });
}

// e^x for x <= 1 by operations that every level and GPU rounds alike.
Vec exp_terms(Vec x) {
  return exp2(x * kLog2e, [](Vec a, Vec b, Vec c) { return a * b + c; });
}

// f(c) for vectors of classes beginning at c, added up in the order of small_loss.h.
template <class F>
float sum_classes(int64_t padded, F f) {
  constexpr int64_t kVecs = kSums / kLanes;
  Vec sums[kVecs] = {};
  for (int64_t c = 0; c < padded; c += kSums)
    for (int64_t v = 0; v < kVecs; ++v) sums[v] += f(c + v * kLanes);
  for (int64_t width = kVecs / 2; width > 0; width /= 2)
    for (int64_t v = 0; v < width; ++v) sums[v] += sums[v + width];
  return sum(sums[0]);
}

float largest_of(const float* z, int64_t padded) {
  Vec top = load<Vec>(z);
  for (int64_t c = kLanes; c < padded; c += kLanes) top = max(top, load<Vec>(z + c));
  return largest(top);
}

float log_of(float sum) { return float(std::log(double(sum))); }

// A row of logits as float32, -inf from `classes` to `padded`.
void load_row(const TwinLoss& w, int network, int64_t group, int64_t row, int64_t padded, float* z) {
  const Logits& l = w.logits[network];
  int64_t size = w.dtype == Dtype::float32 ? 4 : 2;
  const char* first = static_cast<const char*>(l.data) + group * l.group_stride * size;
  if (w.dtype == Dtype::float32 && l.class_stride == 1)
    std::memcpy(z, first + row * l.row_stride * size, w.classes * size);
  else
    copy_rows(Matrix{first, w.rows, w.classes, l.row_stride, l.class_stride, w.dtype}, row, 1, z, w.classes);
  std::fill(z + w.classes, z + padded, -kInfinity);
}

// As torch.argmax: the first of the largest, NaN being larger than anything.
int64_t argmax(const float* z, int64_t classes, float top, bool has_nan) {
  if (has_nan)
    for (int64_t c = 0; c < classes; ++c)
      if (std::isnan(z[c])) return c;
  int32_t first = int32_t(classes);
  for (int32_t c = 0; c < int32_t(classes); ++c) first = std::min(first, z[c] == top ? c : int32_t(classes));
  return first;
}

Vec log_softmax(const float* z, const RowStats& s) { return (load<Vec>(z) - s.max) - s.log_sum; }

// p and log p - log q, which is 0 where neither network gives the class a probability.
struct Divergence {
  Vec p, q, d;

  Divergence(const float* z1, const float* z2, const RowStats& s1, const RowStats& s2) {
    Vec log_p = log_softmax(z1, s1), log_q = log_softmax(z2, s2);
    p = exp_terms(log_p), q = exp_terms(log_q);
    d = from_bits(bits(log_p - log_q) & ((p != 0.f) | (q != 0.f)));
  }
};

struct Scratch {
  uint32_t *keys, *work;  // [2, groups, rows] each
  float* row_losses;      // [2, groups, rows]
  int64_t* candidates;    // [groups]
  int32_t* class_counts;  // [groups, classes] where Decoupling weighs classes
  float* rows;            // [workers, 2, padded]
  int64_t padded, workers, used;

  Scratch(void* base, const TwinLoss& w, const Host& host) {
    Arena arena(base);
    int64_t all = w.groups * w.rows;
    bool weighs = w.released && w.method == TwinMethod::decoupling;
    padded = round_up(w.classes, kSums);
    workers = workers_for(2 * all * w.classes, host);
    keys = arena.take<uint32_t>(2 * all), work = arena.take<uint32_t>(2 * all);
    row_losses = arena.take<float>(2 * all);
    candidates = arena.take<int64_t>(w.groups);
    class_counts = arena.take<int32_t>(weighs ? w.groups * w.classes : 0);
    rows = arena.take<float>(workers * 2 * padded);
    used = arena.used();
  }
};

// Losses, keys and stats of one row; false where its label is not a class.
bool measure_row(const TwinLoss& w, const Scratch& s, int64_t group, int64_t row, float* z) {
  int64_t all = w.groups * w.rows, at = group * w.rows + row;
  int64_t label = w.labels[group * w.label_group_stride + row * w.label_row_stride];
  if (label < 0 || label >= w.classes) return false;
  float loss[2];
  int64_t choice[2] = {};
  for (int network = 0; network < 2; ++network) {
    float* row_z = z + network * s.padded;
    RowStats& stats = w.stats[network * all + at];
    load_row(w, network, group, row, s.padded, row_z);
    float top = largest_of(row_z, s.padded);
    float sum = sum_classes(s.padded, [&](int64_t c) { return exp_terms(load<Vec>(row_z + c) - top); });
    stats = {top, log_of(sum), 0.f};
    loss[network] = stats.log_sum - (row_z[label] - top);
    if (w.looks_at_disagreement()) choice[network] = argmax(row_z, w.classes, top, std::isnan(sum));
    if (!w.of_probabilities()) continue;
    for (int64_t c = 0; c < s.padded; c += kLanes) store(row_z + c, exp_terms(log_softmax(row_z + c, stats)));
    std::fill(row_z + w.classes, row_z + s.padded, -kInfinity);
    stats.extra = log_of(sum_classes(s.padded, [&](int64_t c) { return exp_terms(load<Vec>(row_z + c)); }));
    loss[network] = stats.extra - row_z[label];
  }
  if (w.method == TwinMethod::jocor) {
    RowStats &first = w.stats[at], &second = w.stats[all + at];
    auto at_class = [&](int64_t c) { return Divergence(z + c, z + s.padded + c, first, second); };
    first.extra = sum_classes(s.padded, [&](int64_t c) {
      Divergence v = at_class(c);
      return v.p * v.d;
    });
    second.extra = sum_classes(s.padded, [&](int64_t c) {
      Divergence v = at_class(c);
      return v.q * v.d;
    });
    loss[0] = (1.f - w.co_lambda) * (loss[0] + loss[1]) + w.co_lambda * (first.extra - second.extra);
    loss[1] = loss[0];
  }
  bool candidate = !w.looks_at_disagreement() || choice[0] != choice[1];
  for (int network = 0; network < 2; ++network) {
    s.row_losses[network * all + at] = loss[network];
    s.keys[network * all + at] = candidate ? key_of(loss[network]) : kNoCandidate;
  }
  return true;
}

// Counts a group's candidates, and what else depends on all of its rows.
void survey(const TwinLoss& w, const Scratch& s, int64_t group) {
  uint32_t *keys = s.keys + group * w.rows, *others = keys + w.groups * w.rows;
  int64_t count = 0, dropped = 0;
  for (int64_t i = 0; i < w.rows; ++i) count += keys[i] != kNoCandidate;
  if (w.sample_ids) {  // as released: a candidate of id 0 is lost, and the last candidate goes in its place
    for (int64_t i = 0; i < w.rows; ++i)
      dropped += keys[i] != kNoCandidate && w.sample_ids[group * w.id_group_stride + i * w.id_row_stride] == 0;
    count -= dropped;
    for (int64_t i = w.rows - 1; dropped > 0; --i)
      if (keys[i] != kNoCandidate) keys[i] = others[i] = kNoCandidate, --dropped;
  }
  s.candidates[group] = count;
  if (!w.released || w.method != TwinMethod::decoupling) return;
  int32_t* counts = s.class_counts + group * w.classes;
  std::fill_n(counts, w.classes, 0);
  for (int64_t i = 0; i < w.rows; ++i) ++counts[w.labels[group * w.label_group_stride + i * w.label_row_stride]];
}

// The rows that train a network, their coefficients, and its loss.
void settle(const TwinLoss& w, const Scratch& s, int64_t group, int network) {
  int64_t all = w.groups * w.rows, first = group * w.rows, count = s.candidates[group];
  const float* losses = s.row_losses + network * all + first;
  uint8_t* kept = w.kept[network] + first;
  float* coefficients = w.coefficients + network * all + first;
  double total = 0;
  auto take = [&](int64_t i, bool keep, double coefficient) {
    kept[i] = keep;
    coefficients[i] = keep ? float(coefficient) : 0.f;
    if (keep) total += double(coefficients[i]) * losses[i];
  };
  if (w.method == TwinMethod::decoupling) {
    const uint32_t* keys = s.keys + first;
    double denominator = std::max(w.released ? w.least_fraction * double(w.rows) : 1.0, double(count));
    for (int64_t i = 0; i < w.rows; ++i) {
      double weight = 1.0;
      if (w.released) {
        int64_t label = w.labels[group * w.label_group_stride + i * w.label_row_stride];
        weight = double(w.rows) / (double(w.classes) * s.class_counts[group * w.classes + label]);
      }
      take(i, keys[i] != kNoCandidate, weight / denominator);
    }
  } else if (w.of_probabilities() && count == 0) {
    bool open = (w.step_tensor ? *w.step_tensor : w.step) < 5000;
    for (int64_t i = 0; i < w.rows; ++i) take(i, open, 1.0 / double(w.rows));
  } else {
    // A network learns from the choice of the other; in JoCoR both have one choice.
    int64_t chosen_by = w.method == TwinMethod::jocor ? 0 : 1 - network;
    const uint32_t* keys = s.keys + chosen_by * all + first;
    double rate = 1.0 - number(w.forget_rate, group);
    int64_t k = keep_count(rate, count);
    double divisor;
    if (w.released && w.method != TwinMethod::jocor) {
      if (k == 0) k = count;
      divisor = double(k) * double(k);
    } else {
      if (!w.released && k == 0 && rate > 0) k = std::min<int64_t>(1, count);
      divisor = double(k);
    }
    Threshold border = smallest(keys, w.rows, k, s.work + network * all + first);
    for (int64_t i = 0; i < w.rows; ++i) take(i, border.keeps(keys[i]), 1.0 / divisor);
    if (k == 0 && w.released) total = kNan;  // a mean of nothing
  }
  w.losses[network][group] = float(total);
}

int64_t twin_scratch_bytes(const TwinLoss& w, const Host& host) { return Scratch(nullptr, w, host).used; }

bool twin(const TwinLoss& w, void* scratch, const Host& host) {
  Scratch s(scratch, w, host);
  int64_t all = w.groups * w.rows;
  // 1. Every row on its own.
  std::atomic<bool> valid = true;
  run_tasks(host, s.workers, true, [&](int64_t worker) {
    float* z = s.rows + worker * 2 * s.padded;
    for (int64_t at = all * worker / s.workers; at < all * (worker + 1) / s.workers; ++at)
      if (!measure_row(w, s, at / w.rows, at % w.rows, z)) valid = false;
  });
  if (!valid) return false;
  // 2. Every group as a whole.
  bool threads = all > kShare / 4;
  run_tasks(host, w.groups, threads, [&](int64_t g) { survey(w, s, g); });
  // 3. Every network of every group.
  run_tasks(host, 2 * w.groups, threads, [&](int64_t i) { settle(w, s, i / 2, int(i % 2)); });
  return true;
}

void store_row(const float* from, Dtype dtype, int64_t classes, void* gradients, int64_t at) {
  if (dtype == Dtype::float32) {
    std::memcpy(static_cast<float*>(gradients) + at, from, classes * sizeof(float));
    return;
  }
  auto* to = static_cast<uint16_t*>(gradients) + at;
  int64_t c = 0;
  for (; c + kLanes <= classes; c += kLanes) {
    Vec v = load<Vec>(from + c);
    store(to + c, dtype == Dtype::bfloat16 ? narrow_bfloat(v) : narrow_half(v));
  }
  for (; c < classes; ++c) to[c] = dtype == Dtype::bfloat16 ? float_to_bfloat(from[c]) : float_to_half(from[c]);
}

// Gradients of one row that is kept, in place of its logits.
void differentiate_row(const TwinLossBackward& b, int64_t group, int64_t row, int64_t padded, float* z) {
  const TwinLoss& w = b.forward;
  int64_t all = w.groups * w.rows, at = group * w.rows + row;
  int64_t label = w.labels[group * w.label_group_stride + row * w.label_row_stride];
  bool joint = w.method == TwinMethod::jocor;
  for (int network = 0; network < 2; ++network)
    if (w.logits[network].data) load_row(w, network, group, row, padded, z + network * padded);
  auto factor = [&](int network) {
    return w.coefficients[network * all + at] * b.upstream[network][group * b.upstream_stride[network]];
  };
  if (joint) {
    const RowStats &first = w.stats[at], &second = w.stats[all + at];
    float scale = factor(0), entropy = scale * (1.f - w.co_lambda), agreement = scale * w.co_lambda;
    for (int64_t c = 0; c < padded; c += kLanes) {
      Divergence v(z + c, z + padded + c, first, second);
      Vec apart = v.p - v.q;
      store(z + c, v.p * entropy + (v.p * (v.d - first.extra) + apart) * agreement);
      store(z + padded + c, v.q * entropy - (v.q * (v.d - second.extra) + apart) * agreement);
    }
    z[label] -= entropy, z[padded + label] -= entropy;
    return;
  }
  for (int network = 0; network < 2; ++network) {
    if (!b.gradients[network]) continue;
    float *row_z = z + network * padded, scale = factor(network);
    const RowStats& stats = w.stats[network * all + at];
    auto softmax = [&](int64_t c) { return exp2(log_softmax(row_z + c, stats) * kLog2e); };
    if (!w.of_probabilities()) {
      for (int64_t c = 0; c < padded; c += kLanes) store(row_z + c, softmax(c) * scale);
      row_z[label] -= scale;
      continue;
    }
    // Through both softmaxes: s * (g - sum s g), where g = scale (softmax(s) - 1_label).
    auto by_probability = [&](Vec s) { return exp2((s - stats.extra) * kLog2e) * scale; };
    for (int64_t c = 0; c < padded; c += kLanes) store(row_z + c, softmax(c));
    float inner = sum_classes(padded, [&](int64_t c) {
      Vec s = load<Vec>(row_z + c);
      return s * by_probability(s);
    });
    float at_label = row_z[label];
    inner -= scale * at_label;
    for (int64_t c = 0; c < padded; c += kLanes) {
      Vec s = load<Vec>(row_z + c);
      store(row_z + c, s * (by_probability(s) - inner));
    }
    row_z[label] -= scale * at_label;
  }
}

int64_t backward_scratch_bytes(const TwinLossBackward& b, const Host& host) {
  const TwinLoss& w = b.forward;
  Arena arena(nullptr);
  arena.take<float>(workers_for(2 * w.groups * w.rows * w.classes, host) * 2 * round_up(w.classes, kSums));
  return arena.used();
}

void backward(const TwinLossBackward& b, void* scratch, const Host& host) {
  const TwinLoss& w = b.forward;
  int64_t all = w.groups * w.rows, padded = round_up(w.classes, kSums);
  int64_t workers = workers_for(2 * all * w.classes, host), bytes = w.dtype == Dtype::float32 ? 4 : 2;
  run_tasks(host, workers, true, [&](int64_t worker) {
    float* z = static_cast<float*>(scratch) + worker * 2 * padded;
    for (int64_t at = all * worker / workers; at < all * (worker + 1) / workers; ++at) {
      bool kept[2];
      for (int network = 0; network < 2; ++network)
        kept[network] = b.gradients[network] && w.coefficients[network * all + at] != 0.f;
      if (kept[0] || kept[1]) differentiate_row(b, at / w.rows, at % w.rows, padded, z);
      for (int network = 0; network < 2; ++network) {
        if (kept[network])
          store_row(z + network * padded, w.dtype, w.classes, b.gradients[network], at * w.classes);
        else if (b.gradients[network])
          std::memset(static_cast<char*>(b.gradients[network]) + at * w.classes * bytes, 0, w.classes * bytes);
      }
    }
  });
}

}  // namespace

extern const SmallLossKernel small_loss = {mask_scratch_bytes,     mask,    twin_scratch_bytes, twin,
                                           backward_scratch_bytes, backward};

}  // namespace PVL_ISA
}  // namespace perfvl
