// Which rows of a batch have the smallest losses, and the losses of two networks that teach one another by it.
//
// A batch of 128 rows and 10 classes is 10 kB: what costs there is being called at all, so everything is one call. A
// batch of 1,024 rows and 1,000 classes is 4 MB per network, read once here and once in backward, which recomputes the
// softmax from two numbers per row instead of keeping it. Every stage runs over a tile of rows before the next begins:
// within a row each waits for the one before.
#include "cpu/small_loss.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include "cpu/small_loss_few.h"
#include "cpu/small_loss_select.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

constexpr int64_t kSums = 32;         // partial sums over classes, on every level (see small_loss.h)
constexpr int64_t kShare = 16 << 10;  // elements: fewer are done before another thread has woken
constexpr int64_t kTile = 16;         // rows at most
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

double number(const Scalars& s, int64_t group) {
  if (!s.tensor) return s.value;
  int64_t at = group * s.stride;
  return s.is_double ? static_cast<const double*>(s.tensor)[at] : static_cast<const float*>(s.tensor)[at];
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
    uint32_t* keys = memory + 2 * g * m.rows;
    int64_t candidates = write_keys(m, g, keys);
    int64_t kept = keep_count(number(m.keep_rate, g), candidates);
    write_mask(smallest(keys, m.rows, kept, keys + m.rows), keys, m.rows, m.mask + g * m.rows);
  });
}

constexpr int64_t kVecs = kSums / kLanes;

float fold(Vec* sums) {
  for (int64_t width = kVecs / 2; width > 0; width /= 2)
    for (int64_t v = 0; v < width; ++v) sums[v] += sums[v + width];
  return sum(sums[0]);
}

// f(c, v) for vectors of classes beginning at c, which go to partial sums v. Past the last vector they stay 0.
template <class F>
void each_vec(int64_t padded, F f) {
  int64_t c = 0;
  for (; c + kSums <= padded; c += kSums)
    for (int64_t v = 0; v < kVecs; ++v) f(c + v * kLanes, v);
  for (int64_t v = 0; c < padded; c += kLanes) f(c, v++);
}

// f(c) for all vectors, added up in the order of small_loss.h.
template <class F>
float sum_classes(int64_t padded, F f) {
  Vec sums[kVecs] = {};
  each_vec(padded, [&](int64_t c, int64_t v) { sums[v] += f(c); });
  return fold(sums);
}

// The same for an f that returns two vectors.
template <class F>
std::pair<float, float> sum_classes_twice(int64_t padded, F f) {
  Vec first[kVecs] = {}, second[kVecs] = {};
  each_vec(padded, [&](int64_t c, int64_t v) {
    auto [a, b] = f(c);
    first[v] += a, second[v] += b;
  });
  return {fold(first), fold(second)};
}

float largest_of(const float* z, int64_t padded) {
  Vec top = load<Vec>(z);
  for (int64_t c = kLanes; c < padded; c += kLanes) top = max(top, load<Vec>(z + c));
  return largest(top);
}

// A row of logits as float32, -inf from `classes` to `padded`.
void load_row(const TwinLoss& w, int network, int64_t group, int64_t row, int64_t padded, float* z) {
  const Logits& l = w.logits[network];
  const char* first = static_cast<const char*>(l.data) + group * l.group_stride * size_of(w);
  if (w.dtype == Dtype::float32 && l.class_stride == 1)
    std::memcpy(z, first + row * l.row_stride * 4, w.classes * 4);
  else
    copy_rows(Matrix{first, w.rows, w.classes, l.row_stride, l.class_stride, w.dtype}, row, 1, z, w.classes);
  std::fill(z + w.classes, z + padded, -kInfinity);
}

// As torch.argmax: the first of the largest, NaN being larger than anything.
int64_t argmax(const float* z, int64_t classes, const RowStats& stats) {
  if (std::isnan(stats.log_sum))
    for (int64_t c = 0; c < classes; ++c)
      if (std::isnan(z[c])) return c;
  int32_t first = int32_t(classes);
  for (int32_t c = 0; c < int32_t(classes); ++c) first = std::min(first, z[c] == stats.max ? c : int32_t(classes));
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

// A class that a network rules out adds nothing to its mean, however far the other network is from that.
Vec unless_zero(Vec weight, Vec product) { return from_bits(bits(product) & (weight != 0.f)); }

struct Scratch {
  uint32_t *keys, *work;  // [2, groups, rows] each
  float* row_losses;      // [2, groups, rows]
  int64_t* candidates;    // [groups]
  int32_t* class_counts;  // [groups, classes] where Decoupling weighs classes
  float* rows;            // [workers, 2, tile, padded]
  int64_t padded, tile, workers, used;

  Scratch(void* base, const TwinLoss& w, const Host& host) {
    Arena arena(base);
    int64_t all = w.groups * w.rows;
    bool weighs = w.released && w.method == TwinMethod::decoupling;
    padded = round_up(w.classes, kLanes);
    tile = std::clamp<int64_t>(2048 / padded, 1, kTile);
    workers = workers_for(2 * all * w.classes, host);
    keys = arena.take<uint32_t>(2 * all), work = arena.take<uint32_t>(2 * all);
    row_losses = arena.take<float>(2 * all);
    candidates = arena.take<int64_t>(w.groups);
    class_counts = arena.take<int32_t>(weighs ? w.groups * w.classes : 0);
    rows = arena.take<float>(workers * 2 * tile * padded);
    used = arena.used();
  }
};

// Where row `at` of all groups begins, or the last one where there are fewer.
const char* row_start(const TwinLoss& w, int network, int64_t at) {
  at = std::min(at, w.groups * w.rows - 1);
  const Logits& l = w.logits[network];
  return static_cast<const char*>(l.data) + (at / w.rows * l.group_stride + at % w.rows * l.row_stride) * size_of(w);
}

void rank_row(const TwinLoss& w, const Scratch& s, int64_t at, float loss1, float loss2, bool agrees) {
  int64_t other = w.groups * w.rows + at;
  s.row_losses[at] = loss1, s.row_losses[other] = loss2;
  s.keys[at] = agrees ? kNoCandidate : key_of(loss1), s.keys[other] = agrees ? kNoCandidate : key_of(loss2);
}

// Losses, keys and stats of up to `s.tile` rows from row `at` of all groups; false where a label is not a class.
bool measure_rows(const TwinLoss& w, const Scratch& s, int64_t at, int64_t count, float* z) {
  int64_t all = w.groups * w.rows, labels[kTile];
  float loss[2][kTile];
  bool agrees[kTile] = {};
  for (int64_t r = 0; r < count; ++r) {
    labels[r] = label_of(w, (at + r) / w.rows, (at + r) % w.rows);
    if (labels[r] < 0 || labels[r] >= w.classes) return false;
  }
  auto row = [&](int network, int64_t r) { return z + (network * s.tile + r) * s.padded; };
  auto each = [&](auto f) {
    for (int network = 0; network < 2; ++network)
      for (int64_t r = 0; r < count; ++r) f(w.stats[network * all + at + r], row(network, r), loss[network][r], r);
  };
  // 1. Logits and the largest of each row.
  for (int network = 0; network < 2; ++network)
    for (int64_t r = 0; r < count; ++r)
      load_row(w, network, (at + r) / w.rows, (at + r) % w.rows, s.padded, row(network, r));
  each([&](RowStats& stats, float* z, float&, int64_t) { stats.max = largest_of(z, s.padded); });
  // 2. Cross-entropy.
  int64_t size = size_of(w);
  for (int network = 0; network < 2; ++network)
    for (int64_t r = 0; r < count; ++r) {
      RowStats& stats = w.stats[network * all + at + r];
      const float* z = row(network, r);
      // Meanwhile the row that will be next in this place comes from memory: its start is too far away to be foreseen.
      const char* next = row_start(w, network, at + s.tile + r);
      stats.log_sum = sum_classes(s.padded, [&](int64_t c) {
        __builtin_prefetch(next + c * size);
        return exp_terms(load<Vec>(z + c) - stats.max);
      });
    }
  each([&](RowStats& stats, float* z, float& loss, int64_t r) {
    stats.log_sum = log_of(stats.log_sum), stats.extra = 0.f;
    loss = stats.log_sum - (z[labels[r]] - stats.max);
  });
  if (w.looks_at_disagreement())
    for (int64_t r = 0; r < count; ++r)
      agrees[r] = argmax(row(0, r), w.classes, w.stats[at + r]) == argmax(row(1, r), w.classes, w.stats[all + at + r]);
  // 3. Cross-entropy of probabilities instead, or both networks' together.
  if (w.of_probabilities()) {
    each([&](RowStats& stats, float* z, float& loss, int64_t r) {
      for (int64_t c = 0; c < s.padded; c += kLanes) store(z + c, exp_terms(log_softmax(z + c, stats)));
      std::fill(z + w.classes, z + s.padded, -kInfinity);
      stats.extra = log_of(sum_classes(s.padded, [&](int64_t c) { return exp_terms(load<Vec>(z + c)); }));
      loss = stats.extra - z[labels[r]];
    });
  }
  if (w.method == TwinMethod::jocor) {
    for (int64_t r = 0; r < count; ++r) {
      RowStats &first = w.stats[at + r], &second = w.stats[all + at + r];
      std::tie(first.extra, second.extra) = sum_classes_twice(s.padded, [&](int64_t c) {
        Divergence v(row(0, r) + c, row(1, r) + c, first, second);
        return std::pair(unless_zero(v.p, v.p * v.d), unless_zero(v.q, v.q * v.d));
      });
      float agreement = first.extra - second.extra;
      loss[0][r] = (1.f - w.co_lambda) * (loss[0][r] + loss[1][r]) + w.co_lambda * agreement;
      loss[1][r] = loss[0][r];
    }
  }
  // 4. Where they rank.
  for (int64_t r = 0; r < count; ++r) rank_row(w, s, at + r, loss[0][r], loss[1][r], agrees[r]);
  return true;
}

bool measure_few(const TwinLoss& w, const Scratch& s, int64_t at, int64_t end) {
  RowTile tile(w, at, end);
  for (int64_t i = 0; i < tile.count; ++i)
    if (tile.label[i] < 0 || tile.label[i] >= w.classes) return false;
  float loss[2][kLanes];
  bool agrees[kLanes] = {};
  measure_columns(w, tile, loss, agrees);
  for (int64_t i = 0; i < tile.count; ++i) rank_row(w, s, at + i, loss[0][i], loss[1][i], agrees[i]);
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
  for (int64_t i = 0; i < w.rows; ++i) ++counts[label_of(w, group, i)];
}

// The rows that train a network, their coefficients, and its loss.
void settle(const TwinLoss& w, const Scratch& s, int64_t group, int network) {
  int64_t all = w.groups * w.rows, first = group * w.rows, count = s.candidates[group];
  uint8_t* kept = w.kept[network] + first;
  double divisor = 1;
  bool undefined = false;  // a mean of nothing
  if (w.method == TwinMethod::decoupling) {
    for (int64_t i = 0; i < w.rows; ++i) kept[i] = s.keys[first + i] != kNoCandidate;
    divisor = std::max(w.released ? w.least_fraction * double(w.rows) : 1.0, double(count));
  } else if (w.of_probabilities() && count == 0) {
    std::fill_n(kept, w.rows, (w.step_tensor ? *w.step_tensor : w.step) < 5000);
    divisor = double(w.rows);
  } else {
    double rate = 1.0 - number(w.forget_rate, group);
    int64_t k = keep_count(rate, count);
    bool twice = w.released && w.method != TwinMethod::jocor;
    if (k == 0 && twice) k = count;
    if (k == 0 && !w.released && rate > 0) k = std::min<int64_t>(1, count);
    undefined = k == 0 && w.released;
    divisor = twice ? double(k) * double(k) : double(k);
    // A network learns from the choice of the other; in JoCoR both have one choice.
    const uint32_t* keys = s.keys + (w.method == TwinMethod::jocor ? 0 : 1 - network) * all + first;
    write_mask(smallest(keys, w.rows, k, s.work + network * all + first), keys, w.rows, kept);
  }
  const float* losses = s.row_losses + network * all + first;
  float* coefficients = w.coefficients + network * all + first;
  double total = 0;
  for (int64_t i = 0; i < w.rows; ++i) {
    double weight = 1.0;
    if (w.released && w.method == TwinMethod::decoupling)
      weight = double(w.rows) / (double(w.classes) * s.class_counts[group * w.classes + label_of(w, group, i)]);
    coefficients[i] = kept[i] ? float(weight / divisor) : 0.f;
    total += kept[i] ? double(coefficients[i]) * losses[i] : 0.0;
  }
  w.losses[network][group] = undefined ? kNan : float(total);
}

int64_t twin_scratch_bytes(const TwinLoss& w, const Host& host) { return Scratch(nullptr, w, host).used; }

bool twin(const TwinLoss& w, void* scratch, const Host& host) {
  Scratch s(scratch, w, host);
  int64_t all = w.groups * w.rows;
  // 1. Every row on its own.
  std::atomic<bool> valid = true;
  run_tasks(host, s.workers, true, [&](int64_t worker) {
    float* z = s.rows + worker * 2 * s.tile * s.padded;
    int64_t begin = all * worker / s.workers, end = all * (worker + 1) / s.workers;
    int64_t step = few_classes(w) ? kLanes : s.tile;
    for (int64_t at = begin; at < end; at += step)
      if (!(few_classes(w) ? measure_few(w, s, at, end) : measure_rows(w, s, at, std::min(step, end - at), z)))
        valid = false;
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
  int64_t label = label_of(w, group, row);
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
  arena.take<float>(workers_for(2 * w.groups * w.rows * w.classes, host) * 2 * round_up(w.classes, kLanes));
  return arena.used();
}

void backward(const TwinLossBackward& b, void* scratch, const Host& host) {
  const TwinLoss& w = b.forward;
  int64_t all = w.groups * w.rows, padded = round_up(w.classes, kLanes);
  int64_t workers = workers_for(2 * all * w.classes, host), bytes = size_of(w);
  run_tasks(host, workers, true, [&](int64_t worker) {
    float* z = static_cast<float*>(scratch) + worker * 2 * padded;
    int64_t begin = all * worker / workers, end = all * (worker + 1) / workers;
    if (few_classes(w)) {
      for (int64_t at = begin; at < end; at += kLanes) {
        RowTile tile(w, at, end);
        for (int network = 0; network < 2; ++network)
          if (b.gradients[network]) differentiate_columns(b, network, tile);
      }
      return;
    }
    for (int64_t at = begin; at < end; ++at) {
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
