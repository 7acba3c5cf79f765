// The bfloat16 sweep: both products on tiles, 4 B K d FLOP at several times the float32 rate.
// Scores are formed transposed, [keys, queries]: queue rows are then the A operand as they lie in memory, and the
// softmax runs with one query per vector lane, without a horizontal sum. The terms are turned once, in registers, into
// rows for the second product, whose B operand is the chunk's keys with neighbouring rows interleaved: the only packing
// the queue needs, once per chunk for all queries of the block.
#pragma once

#include "cpu/bfloat16_tiles.h"
#include "cpu/info_nce_plan.h"

#if defined(__AVX512BF16__)
namespace perfvl {
namespace PVL_ISA {

struct TileBuffers {
  float* scores;    // [chunk, 32]
  uint16_t* terms;  // [2][chunk / 32] tiles of rows
  uint16_t* keys;   // [chunk, width], dense and padded
  uint16_t* pairs;  // [chunk / 32][width / 16] tiles of pairs
};

inline TileBuffers tile_buffers(const Problem& p, Arena& arena) {
  TileBuffers b{};
  b.scores = arena.take<float>(p.plan.chunk * 32);
  b.terms = arena.take<uint16_t>(p.plan.chunk * 32);
  b.keys = arena.take<uint16_t>(p.plan.chunk * p.plan.width);
  b.pairs = arena.take<uint16_t>(p.args.grad_query ? p.plan.chunk * p.plan.width : 0);
  return b;
}

// 32 queries -> [width / 32][2] tiles of pairs, with zeros beyond the last row and column.
inline void pack_queries(const Problem& p, int64_t first, uint16_t* packed) {
  for (int64_t q = 0; q < 32; ++q) {
    const float* row = first + q < p.rows ? p.query_row(first + q) : nullptr;
    for (int64_t c = 0; c < p.plan.width; ++c) {
      int64_t tile = c / 32 * 2 + q / 16, pair = c % 32 / 2;
      packed[tile * kTile + pair * 32 + q % 16 * 2 + c % 2] = row && c < p.dim ? float_to_bfloat(row[c]) : 0;
    }
  }
}

// keys [n padded to 32, width] -> tiles of pairs.
inline void pack_keys(const uint16_t* keys, int64_t stride, int64_t padded, int64_t width, uint16_t* pairs) {
  for (int64_t r = 0; r < padded; r += 2) {
    uint16_t* out = pairs + r / 32 * 32 * width + r % 32 / 2 * 32;
    for (int64_t c = 0; c < width; c += 32, out += 2 * kTile)
      interleave_rows(keys + r * stride + c, keys + (r + 1) * stride + c, out, out + kTile);
  }
}

// The softmax of 32 queries over one chunk: scores[n, 32] -> tiles of terms; total, rank and, where a row must be
// rescaled, weighted_keys are updated.
template <bool kRank>
void softmax_tiles(const Problem& p, const float* scores, int64_t n, const float* positive2, float* top, float* total,
                   int32_t* rank, float* weighted_keys, uint16_t* terms, int64_t steps) {
  for (int64_t half = 0; half < 2;
       ++half, scores += 16, terms += steps * kTile, top += 16, total += 16, rank += 16, positive2 += 16) {
    Vec most = broadcast(-__builtin_inff()), first = load<Vec>(positive2);
    for (int64_t j = 0; j < n; ++j) most = max(most, load<Vec>(scores + j * 32) * p.scale2);
    for (int lane = 0; lane < 16; ++lane) {
      if (!(most[lane] > top[lane] + kSlack)) continue;
      float factor = std::exp2(top[lane] - most[lane]);
      top[lane] = most[lane];
      total[lane] *= factor;
      if (weighted_keys) scale_row(weighted_keys + (half * 16 + lane) * p.plan.width, p.plan.width, factor);
    }
    Vec base = load<Vec>(top), sums = load<Vec>(total);
    IntVec counts = load<IntVec>(rank);
    auto term = [&](int64_t j) {
      if (j >= n) return Vec{};
      Vec score = load<Vec>(scores + j * 32);
      if constexpr (kRank) counts += at_least(score * p.scale2, first);
      Vec t = exp2(fma(score, broadcast(p.scale2), -base));
      sums += t;
      return t;
    };
    for (int64_t s = 0; s < steps; ++s) {
      __m512i pairs[16];
      for (int64_t j = 0; j < 16; ++j) {
        Vec even = term(s * 32 + 2 * j), odd = term(s * 32 + 2 * j + 1);
        pairs[j] = make_pairs(even, odd);
      }
      if (!weighted_keys) continue;
      transpose(pairs);
      for (int64_t j = 0; j < 16; ++j) _mm512_store_si512(terms + s * kTile + j * 32, pairs[j]);
    }
    store(total, sums);
    store(rank, counts);
  }
}

inline void sweep_tiles(const Problem& p, int64_t task, const TileBuffers& buffers) {
  TileScope scope;
  const Matrix& queue = p.args.queue;
  State& state = p.states[task];
  bool grad = p.args.grad_query,
       direct = queue.dtype == Dtype::bfloat16 && queue.col_stride == 1 && p.dim == p.plan.width;
  int64_t width = p.plan.width, row = p.row_begin(task), rows = p.row_end(task) - row;
  for (int64_t first = p.key_begin(task), end = p.key_end(task); first < end; first += p.plan.chunk) {
    int64_t n = std::min(p.plan.chunk, end - first), steps = ceil_div(n, 32);
    // 1. The chunk's keys as bfloat16 rows, copied only where they do not already lie so, and as pairs.
    const uint16_t* keys = static_cast<const uint16_t*>(queue.data) + first * queue.row_stride;
    int64_t stride = queue.row_stride;
    if (!direct || n % 32) {
      copy_rows(queue, first, n, buffers.keys, width);
      std::fill_n(buffers.keys + n * width, (steps * 32 - n) * width, uint16_t(0));
      keys = buffers.keys, stride = width;
    }
    if (grad) pack_keys(keys, stride, steps * 32, width, buffers.pairs);
    for (int64_t q = 0; q < rows; q += 32) {
      // 2. scores[keys, 32 queries].
      const uint16_t* queries = p.packed_query + (row + q) * width;
      for (int64_t s = 0; s < steps; ++s)
        tile_product(keys + s * 32 * stride, stride, queries, width / 32, buffers.scores + s * 32 * 32);
      // 3. Softmax terms, one query per lane.
      float* weighted = grad ? state.weighted_keys + q * width : nullptr;
      auto softmax = p.args.rank ? softmax_tiles<true> : softmax_tiles<false>;
      softmax(p, buffers.scores, n, p.positive2 + row + q, state.top + q, state.total + q, state.rank + q, weighted,
              buffers.terms, steps);
      // 4. weighted_keys += terms keys.
      if (!grad) continue;
      for (int64_t c = 0; c < width; c += 32)
        tile_accumulate(buffers.terms, buffers.pairs + c / 16 * kTile, 32 * width, steps, weighted + c, width);
    }
  }
}

}  // namespace PVL_ISA
}  // namespace perfvl
#endif
