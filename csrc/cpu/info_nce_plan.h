// How one InfoNCE problem is cut into tasks, and where each task keeps its state. Shared by both sweeps.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common.h"
#include "cpu/convert.h"
#include "cpu/info_nce.h"

namespace perfvl {
namespace PVL_ISA {

constexpr float kLog2e = 1.44269504088896340736f;

// A row's reference point may lag behind its largest logit by this much (in powers of two) before its sums are
// rescaled: exp2 stays below 2^20, far from overflow, and rescaling all but disappears.
constexpr float kSlack = 20.f;

// score * scale - top, rounded once while it can be. The largest product was rounded before it became `top`; where that
// took away more than exp2 bears, all products are.
constexpr float kFar = 1 << 30;
template <bool kIsFar>
[[gnu::always_inline]] inline Vec exponent(Vec score, Vec scale, Vec top) {
  return kIsFar ? score * scale - top : fma(score, scale, -top);
}

struct Plan {
  bool tiles;      // bfloat16 tile products instead of the host's float32 BLAS
  int64_t width;   // d, padded for tiles
  int64_t block;   // query rows per task
  int64_t chunk;   // keys per step
  int64_t blocks;  // row blocks x key splits = tasks
  int64_t splits;
  int64_t workers;
  int64_t tasks() const { return blocks * splits; }
};

// One task's running softmax: sum of exp2(t - top) and of exp2(t - top) * key, with t = logit * log2(e).
struct State {
  float* top;    // [block]
  float* total;  // [block]
  int32_t* rank;
  float* weighted_keys;  // [block, width]
};

struct Problem {
  const InfoNceArgs& args;
  Plan plan;
  float scale2;  // logits in powers of two: scale * log2(e)
  int64_t rows, dim, keys;
  bool convert_query, convert_positive;
  float *query, *positive;  // float32 rows, where the arguments are something else
  float* positive2;         // [B] positive logits in powers of two
  uint16_t* packed_query;   // tiles only
  State* states;
  char* worker_scratch;
  int64_t worker_bytes;

  const float* query_row(int64_t i) const {
    return convert_query ? query + i * dim : static_cast<const float*>(args.query.data) + i * args.query.row_stride;
  }
  const float* positive_row(int64_t i) const {
    return convert_positive ? positive + i * dim
                            : static_cast<const float*>(args.positive.data) + i * args.positive.row_stride;
  }
  int64_t query_stride() const { return convert_query ? dim : args.query.row_stride; }
  int64_t row_begin(int64_t task) const { return task / plan.splits * plan.block; }
  int64_t row_end(int64_t task) const { return std::min(row_begin(task) + plan.block, rows); }
  // Key ranges are whole chunks, so that the result does not depend on where the last one ends.
  int64_t key_begin(int64_t task) const {
    int64_t chunks = ceil_div(keys, plan.chunk);
    return std::min(chunks * (task % plan.splits) / plan.splits * plan.chunk, keys);
  }
  int64_t key_end(int64_t task) const { return task % plan.splits + 1 == plan.splits ? keys : key_begin(task + 1); }
};

inline bool is_dense_float(const Matrix& m) { return m.dtype == Dtype::float32 && (m.col_stride == 1 || m.cols == 1); }

inline Plan make_plan(const InfoNceArgs& a, bool tiles) {
  Plan p{};
  int64_t rows = a.query.rows, dim = a.query.cols, keys = a.queue.rows;
  p.tiles = tiles;
  p.width = tiles ? round_up(std::max<int64_t>(dim, 1), 32) : dim;
  // Rows of a block share one pass over the keys; its accumulator should stay in the core's own cache.
  p.block = tiles ? std::min<int64_t>(round_up(rows, 32), 256) : std::min<int64_t>(rows, 256);
  // Keys of a chunk are read from memory once and used twice. For few queries reading is the cost: a chunk stays in the
  // core's cache between the two products. For many the products are, and want longer sums. Measured, d = 128 to 2560.
  p.chunk = rows > 64 ? 512 : std::clamp<int64_t>(round_up(262144 / std::max<int64_t>(p.width, 1), 32), 128, 512);
  p.chunk = std::min(p.chunk, round_up(std::max<int64_t>(keys, 1), 32));
  double flops = 4.0 * double(rows) * double(keys) * double(dim);
  p.workers = std::clamp<int64_t>(int64_t(flops / 1e6), 1, a.host.threads);
  // Every split keeps a gradient of its own. Where many threads and wide rows would make those large (64 MB), the rows
  // are shared out instead.
  int64_t most_splits = std::max<int64_t>((int64_t{64} << 20) / std::max<int64_t>(rows * p.width * 4, 1), 1);
  p.block = std::min(p.block, std::max<int64_t>(round_up(ceil_div(rows, ceil_div(p.workers, most_splits)), 32), 32));
  p.blocks = std::max<int64_t>(ceil_div(rows, p.block), 1);
  int64_t chunks = std::max<int64_t>(ceil_div(keys, p.chunk), 1);
  // Fewest splits that keep the workers evenly busy.
  for (p.splits = 1; p.splits < std::min({chunks, p.workers, most_splits}); ++p.splits)
    if (p.tasks() * 10 >= round_up(p.tasks(), p.workers) * 9) break;
  p.workers = std::min(p.workers, p.tasks());
  return p;
}

// Lays the problem out in scratch. With base = nullptr only the size is wanted.
template <class WorkerBytes>
Problem lay_out(const InfoNceArgs& a, const Plan& plan, WorkerBytes worker_bytes, void* base, int64_t* bytes) {
  Problem p{a,
            plan,
            a.scale * kLog2e,
            a.query.rows,
            a.query.cols,
            a.queue.rows,
            !is_dense_float(a.query),
            !is_dense_float(a.positive),
            nullptr,
            nullptr,
            nullptr,
            nullptr,
            nullptr,
            nullptr,
            0};
  Arena arena(base);
  p.query = arena.take<float>(p.convert_query ? p.rows * p.dim : 0);
  p.positive = arena.take<float>(p.convert_positive ? p.rows * p.dim : 0);
  p.positive2 = arena.take<float>(p.rows);
  p.packed_query = arena.take<uint16_t>(plan.tiles ? plan.blocks * plan.block * plan.width : 0);
  p.states = arena.take<State>(plan.tasks());
  for (int64_t t = 0; t < plan.tasks(); ++t) {
    State s{};
    s.top = arena.take<float>(plan.block);
    s.total = arena.take<float>(plan.block);
    s.rank = arena.take<int32_t>(plan.block);
    s.weighted_keys = arena.take<float>(a.grad_query ? plan.block * plan.width : 0);
    if (base) p.states[t] = s;
  }
  p.worker_bytes = worker_bytes(p);
  p.worker_scratch = arena.take<char>(plan.workers * p.worker_bytes);
  *bytes = arena.used();
  return p;
}

inline float dot(const float* a, const float* b, int64_t n) {
  Vec parts[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) parts[j] = fma(load<Vec>(a + i + j * kLanes), load<Vec>(b + i + j * kLanes), parts[j]);
  for (; i + kLanes <= n; i += kLanes) parts[0] = fma(load<Vec>(a + i), load<Vec>(b + i), parts[0]);
  float rest = 0.f;
  for (; i < n; ++i) rest += a[i] * b[i];
  return sum((parts[0] + parts[1]) + (parts[2] + parts[3])) + rest;
}

inline void scale_row(float* row, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) row[i] *= factor;
}

// Float32 copies where needed, and the positive logit of every row.
inline void prepare_rows(const Problem& p, int64_t begin, int64_t end) {
  if (p.convert_query) copy_rows(p.args.query, begin, end - begin, p.query + begin * p.dim, p.dim);
  if (p.convert_positive) copy_rows(p.args.positive, begin, end - begin, p.positive + begin * p.dim, p.dim);
  for (int64_t i = begin; i < end; ++i) {
    float z = dot(p.query_row(i), p.positive_row(i), p.dim);
    p.args.positive_logit[i] = z * p.args.scale;
    p.positive2[i] = z * p.scale2;
  }
}

inline void start_state(const Problem& p, int64_t task) {
  State& s = p.states[task];
  int64_t begin = p.row_begin(task);
  for (int64_t i = 0; i < p.plan.block; ++i) {
    float positive2 = begin + i < p.rows ? p.positive2[begin + i] : 0.f;
    s.top[i] = positive2 < -1e30f ? -1e30f : positive2;  // -inf would turn the first difference into NaN
    s.total[i] = 0.f;
    s.rank[i] = 0;
  }
  if (p.args.grad_query) std::fill_n(s.weighted_keys, p.plan.block * p.plan.width, 0.f);
}

// Row i from its key splits, always in the same order: identity 6 of block-wise softmax.
inline void merge_row(const Problem& p, int64_t i) {
  const InfoNceArgs& a = p.args;
  const State* states = p.states + i / p.plan.block * p.plan.splits;
  int64_t at = i % p.plan.block;
  double positive2 = p.positive2[i], top = positive2;
  for (int64_t s = 0; s < p.plan.splits; ++s) top = std::max(top, double(states[s].top[at]));
  double negatives = 0;
  int64_t rank = 0;
  for (int64_t s = 0; s < p.plan.splits; ++s) {
    negatives += states[s].total[at] * std::exp2(double(states[s].top[at]) - top);
    rank += states[s].rank[at];
  }
  double positive = std::exp2(positive2 - top), all = positive + negatives;
  // lse - positive logit without the cancellation: what the negatives add to the positive's own term.
  double loss = std::log1p(negatives / positive);
  if (std::isinf(loss)) loss = std::log(negatives) + (top - positive2) / kLog2e;
  a.loss[i] = float(loss);
  a.lse[i] = float(std::isinf(loss) ? std::log(all) + top / kLog2e : loss + a.positive_logit[i]);
  if (a.rank) a.rank[i] = int32_t(rank);
  if (!a.grad_query) return;
  double weight = negatives / all;
  a.positive_weight[i] = float(weight * a.row_factor);
  float* grad = a.grad_query + i * p.dim;
  const float* key = p.positive_row(i);
  float pull = -float(a.scale * weight * a.row_factor);
  for (int64_t c = 0; c < p.dim; ++c) grad[c] = pull * key[c];
  for (int64_t s = 0; s < p.plan.splits; ++s) {
    float push = float(std::exp2(double(states[s].top[at]) - top) / all * a.scale * a.row_factor);
    const float* keys = states[s].weighted_keys + at * p.plan.width;
    for (int64_t c = 0; c < p.dim; ++c) grad[c] += push * keys[c];
  }
}

}  // namespace PVL_ISA
}  // namespace perfvl
