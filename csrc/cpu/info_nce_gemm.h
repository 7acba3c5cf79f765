// The float32 sweep: scores of a chunk of keys by BLAS, softmax terms in place, weighted keys by BLAS.
// The two products are the whole cost at large d (4 B K d FLOP); what this saves over eager is the B x K logits' trips
// through memory: a chunk's scores never leave the core's cache.
#pragma once

#include "cpu/info_nce_plan.h"

namespace perfvl {
namespace PVL_ISA {

struct GemmBuffers {
  float* scores;  // [block, chunk]
  float* keys;    // [chunk, dim], only where the queue cannot go to BLAS as it lies
};

inline bool blas_can_read(const Matrix& m) {
  return m.dtype == Dtype::float32 &&
         ((m.col_stride == 1 && m.row_stride >= m.cols) || (m.row_stride == 1 && m.col_stride >= m.rows));
}

inline GemmBuffers gemm_buffers(const Problem& p, Arena& arena) {
  GemmBuffers b{};
  b.scores = arena.take<float>(p.plan.block * round_up(p.plan.chunk, 16));
  b.keys = arena.take<float>(blas_can_read(p.args.queue) ? 0 : p.plan.chunk * p.dim);
  return b;
}

// scores[n] -> exp2(scale2 * score - top) in place; adds to total and rank; rescales the row where it must.
template <bool kRank>
void softmax_terms(float* scores, int64_t n, float scale2, float positive2, float& top, float& total, int32_t& rank,
                   float* weighted_keys, int64_t width) {
  constexpr int kUnroll = 4;  // independent chains: a maximum or a sum alone would wait for itself
  const float lowest = -__builtin_inff();
  int64_t whole = n / (kUnroll * kLanes) * (kUnroll * kLanes);
  Vec most[kUnroll];
  for (int u = 0; u < kUnroll; ++u) most[u] = broadcast(lowest);
  for (int64_t j = 0; j < whole; j += kUnroll * kLanes)
    for (int u = 0; u < kUnroll; ++u) most[u] = max(most[u], load<Vec>(scores + j + u * kLanes) * scale2);
  float chunk_top = largest(max(max(most[0], most[1]), max(most[2], most[3])));
  for (int64_t j = whole; j < n; ++j) chunk_top = std::max(chunk_top, scores[j] * scale2);
  if (chunk_top > top + kSlack) {
    float factor = std::exp2(top - chunk_top);
    top = chunk_top;
    total *= factor;
    if (weighted_keys) scale_row(weighted_keys, width, factor);
  }
  Vec sums[kUnroll] = {}, first = broadcast(positive2), base = broadcast(top), scale = broadcast(scale2);
  IntVec counts = {};
  auto fill = [&](auto far) {
    for (int64_t j = 0; j < whole; j += kUnroll * kLanes) {
      for (int u = 0; u < kUnroll; ++u) {
        Vec score = load<Vec>(scores + j + u * kLanes);
        if constexpr (kRank) counts += at_least(score * scale, first);
        Vec term = exp2(exponent<far.value>(score, scale, base));
        sums[u] += term;
        store(scores + j + u * kLanes, term);
      }
    }
    total += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (int64_t j = whole; j < n; j += kLanes) {
      int64_t lanes = std::min<int64_t>(kLanes, n - j);
      Vec score = {};
      std::memcpy(&score, scores + j, lanes * sizeof(float));
      Vec term = exp2(exponent<far.value>(score, scale, base));
      for (int64_t lane = 0; lane < lanes; ++lane) {
        if (kRank) rank += score[lane] * scale2 >= positive2;
        total += term[lane];
      }
      std::memcpy(scores + j, &term, lanes * sizeof(float));
    }
  };
  std::fabs(top) > kFar ? fill(std::true_type{}) : fill(std::false_type{});
  if constexpr (kRank)
    for (int lane = 0; lane < kLanes; ++lane) rank += counts[lane];
}

inline void sweep_gemm(const Problem& p, int64_t task, const GemmBuffers& buffers) {
  const Host& host = p.args.host;
  const Matrix& queue = p.args.queue;
  State& state = p.states[task];
  int64_t row = p.row_begin(task), rows = p.row_end(task) - row, score_stride = round_up(p.plan.chunk, 16);
  Operand query{p.query_row(row), p.query_stride(), 1};
  for (int64_t first = p.key_begin(task), end = p.key_end(task); first < end; first += p.plan.chunk) {
    int64_t n = std::min(p.plan.chunk, end - first);
    // 1. The chunk's keys as a float32 operand.
    Operand keys{static_cast<const float*>(queue.data) + first * queue.row_stride, queue.row_stride, queue.col_stride};
    if (!blas_can_read(queue)) {
      copy_rows(queue, first, n, buffers.keys, p.dim);
      keys = {buffers.keys, p.dim, 1};
    }
    // 2. scores = query keys^T.
    host.gemm(host.context, rows, n, p.dim, query, {keys.data, keys.col_stride, keys.row_stride}, buffers.scores,
              score_stride, false);
    // 3. Softmax terms, row by row. Meanwhile the next chunk comes into the core's cache, where it is small enough not
    // to drive out this one: BLAS would wait for it.
    auto terms = p.args.rank ? softmax_terms<true> : softmax_terms<false>;
    int64_t key_bytes = p.dim * (queue.dtype == Dtype::float32 ? 4 : 2);
    const char* next = static_cast<const char*>(queue.data) + (first + n) * key_bytes;
    int64_t next_bytes = std::min(p.plan.chunk, end - first - n) * key_bytes;
    if (queue.col_stride != 1 || queue.row_stride != p.dim || next_bytes > 256 * 1024) next_bytes = 0;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t at = next_bytes * i / rows / 64 * 64; at < next_bytes * (i + 1) / rows; at += 64)
        __builtin_prefetch(next + at, 0, 2);
      float* weighted = p.args.grad_query ? state.weighted_keys + i * p.plan.width : nullptr;
      terms(buffers.scores + i * score_stride, n, p.scale2, p.positive2[row + i], state.top[i], state.total[i],
            state.rank[i], weighted, p.plan.width);
    }
    // 4. weighted_keys += terms keys.
    if (p.args.grad_query)
      host.gemm(host.context, rows, p.dim, n, {buffers.scores, score_stride, 1}, keys, state.weighted_keys,
                p.plan.width, true);
  }
}

}  // namespace PVL_ISA
}  // namespace perfvl
