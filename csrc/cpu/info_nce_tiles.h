// The bfloat16 sweep: both products on tiles, 4 B K d FLOP at several times the float32 rate.
// Scores are formed transposed, [keys, queries]: the softmax then runs with one query per vector lane, without a
// horizontal sum. The queue is read once, in order; each chunk is packed once for all queries of the block.
#pragma once

#include "cpu/bfloat16_tiles.h"
#include "cpu/info_nce_plan.h"

#if defined(__AVX512BF16__)
namespace perfvl {
namespace PVL_ISA {

// Columns are taken in slabs, so that what both products read again for every 32 queries fits the core's own cache.
constexpr int64_t kSlab = 512;

struct TileBuffers {
  uint16_t* rows;   // 32 queue rows as dense bfloat16, where they are not that already
  uint16_t* keys;   // [chunk / 16][width / 32] tiles of rows
  uint16_t* pairs;  // [slab / 32][chunk / 32][2] tiles of pairs
  float* scores;    // [block / 32][chunk, 32]
  uint16_t* terms;  // [block / 32][2][chunk / 32] tiles of rows
};

inline TileBuffers tile_buffers(const Problem& p, Arena& arena) {
  TileBuffers b{};
  b.rows = arena.take<uint16_t>(32 * p.plan.width);
  b.keys = arena.take<uint16_t>(p.plan.chunk * p.plan.width);
  b.pairs = arena.take<uint16_t>(p.plan.chunk * std::min(p.plan.width, kSlab));
  b.scores = arena.take<float>(p.plan.chunk * p.plan.block);
  b.terms = arena.take<uint16_t>(p.plan.chunk * p.plan.block);
  return b;
}

// 32 queries -> [width / 32][2] tiles of pairs, with zeros beyond the last row and column.
inline void pack_queries(const Problem& p, int64_t first, uint16_t* packed) {
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t c = 0; c < p.plan.width; c += 32) {
      __m512i rows[16];
      for (int64_t q = 0; q < 16; ++q) {
        int64_t row = first + half * 16 + q;
        alignas(64) float values[32] = {};
        if (row < p.rows) std::copy_n(p.query_row(row) + c, std::min<int64_t>(32, p.dim - c), values);
        rows[q] = (__m512i)_mm512_cvtne2ps_pbh(load<Vec>(values + 16), load<Vec>(values));
      }
      transpose(rows);
      for (int64_t j = 0; j < 16; ++j) _mm512_store_si512(packed + (c / 32 * 2 + half) * kTile + j * 32, rows[j]);
    }
  }
}

// Rows [first, first + n) of the queue -> tiles of rows; rows from n to the next 32 are zero.
inline void pack_keys(const Problem& p, int64_t first, int64_t n, const TileBuffers& buffers) {
  const Matrix& queue = p.args.queue;
  int64_t width = p.plan.width;
  bool direct = queue.dtype == Dtype::bfloat16 && queue.col_stride == 1 && p.dim == width;
  for (int64_t group = 0; group < n; group += 32) {
    int64_t count = std::min<int64_t>(32, n - group), stride = direct ? queue.row_stride : width;
    const uint16_t* rows = static_cast<const uint16_t*>(queue.data) + (first + group) * queue.row_stride;
    if (!direct) {
      copy_rows(queue, first + group, count, buffers.rows, width);
      rows = buffers.rows;
    }
    for (int64_t r = 0; r < 32; ++r) {
      uint16_t* tile = buffers.keys + (group + r / 16 * 16) * width + r % 16 * 32;
      for (int64_t c = 0; c < width; c += 32, tile += kTile) {
        const uint16_t* from = rows + r * stride + c;
        if (direct) _mm_prefetch(reinterpret_cast<const char*>(from) + 4096, _MM_HINT_T0);  // past rows and pages
        _mm512_store_si512(tile, r < count ? _mm512_loadu_si512(from) : _mm512_setzero_si512());
      }
    }
  }
}

// Columns [slab, slab + columns) of the packed keys -> tiles of pairs.
inline void pair_keys(const TileBuffers& buffers, int64_t width, int64_t slab, int64_t columns, int64_t steps) {
  uint16_t* out = buffers.pairs;
  for (int64_t c = slab; c < slab + columns; c += 32)
    for (int64_t s = 0; s < steps; ++s, out += 2 * kTile)
      for (int64_t half = 0; half < 2; ++half) {
        const uint16_t* tile = buffers.keys + (s * 2 + half) * 16 * width + c * 16;
        for (int64_t j = 0; j < 8; ++j)
          interleave(_mm512_load_si512(tile + j * 64), _mm512_load_si512(tile + j * 64 + 32), out + (half * 8 + j) * 32,
                     out + kTile + (half * 8 + j) * 32);
      }
}

// The softmax of 32 queries over one chunk: scores[n, 32] -> tiles of terms; total, rank and, where a row must be
// rescaled, weighted_keys are updated.
template <bool kRank>
void softmax_tiles(const Problem& p, const float* scores, int64_t n, const float* positive2, float* top, float* total,
                   int32_t* rank, float* weighted_keys, uint16_t* terms, int64_t steps) {
  // 1. The chunk's largest logit of every query; where it is far above the row's reference point, that moves.
  Vec most[2] = {broadcast(-__builtin_inff()), broadcast(-__builtin_inff())};
  for (int64_t j = 0; j < n; ++j)
    for (int half = 0; half < 2; ++half)
      most[half] = max(most[half], load<Vec>(scores + j * 32 + half * 16) * p.scale2);
  for (int64_t q = 0; q < 32; ++q) {
    float chunk_top = most[q / 16][q % 16];
    if (!(chunk_top > top[q] + kSlack)) continue;
    float factor = std::exp2(top[q] - chunk_top);
    top[q] = chunk_top;
    total[q] *= factor;
    if (weighted_keys) scale_row(weighted_keys + q * p.plan.width, p.plan.width, factor);
  }
  // 2. Terms of two neighbouring keys become a pair; 16 pairs of 16 queries, turned, are a tile of rows.
  for (int64_t half = 0; half < 2; ++half) {
    Vec base = load<Vec>(top + half * 16), first = load<Vec>(positive2 + half * 16);
    Vec sums = {};  // of this chunk alone: one running float32 sum over a long queue would drift
    IntVec counts = load<IntVec>(rank + half * 16);
    auto fill = [&](auto far) {
      auto term = [&](int64_t j) {
        if (j >= n) return Vec{};
        Vec score = load<Vec>(scores + j * 32 + half * 16);
        if constexpr (kRank) counts += at_least(score * p.scale2, first);
        Vec t = exp2(exponent<far.value>(score, broadcast(p.scale2), base));
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
        uint16_t* tile = terms + (half * steps + s) * kTile;
        for (int64_t j = 0; j < 16; ++j) _mm512_store_si512(tile + j * 32, pairs[j]);
      }
    };
    largest(max(base, -base)) > kFar ? fill(std::true_type{}) : fill(std::false_type{});
    store(total + half * 16, load<Vec>(total + half * 16) + sums);
    store(rank + half * 16, counts);
  }
}

inline void sweep_tiles(const Problem& p, int64_t task, const TileBuffers& buffers) {
  TileScope scope;
  State& state = p.states[task];
  auto softmax = p.args.rank ? softmax_tiles<true> : softmax_tiles<false>;
  int64_t width = p.plan.width, row = p.row_begin(task), rows = p.row_end(task) - row;
  for (int64_t first = p.key_begin(task), end = p.key_end(task); first < end; first += p.plan.chunk) {
    int64_t n = std::min(p.plan.chunk, end - first), steps = ceil_div(n, 32);
    // 1. The chunk's keys.
    pack_keys(p, first, n, buffers);
    // 2. scores[keys, 32 queries], for every group of 32 queries.
    for (int64_t slab = 0; slab < width; slab += kSlab)
      for (int64_t q = 0; q < rows; q += 32)
        for (int64_t s = 0; s < steps; ++s)
          tile_product(buffers.keys + s * 32 * width + slab * 16, 16 * width,
                       p.packed_query + (row + q) * width + slab * 32, std::min(kSlab, width - slab) / 32,
                       buffers.scores + q * p.plan.chunk + s * 32 * 32, slab > 0);
    for (int64_t q = 0; q < rows; q += 32) {
      // 3. Softmax terms, one query per lane.
      float* weighted = p.args.grad_query ? state.weighted_keys + q * width : nullptr;
      uint16_t* terms = buffers.terms + q * p.plan.chunk;
      softmax(p, buffers.scores + q * p.plan.chunk, n, p.positive2 + row + q, state.top + q, state.total + q,
              state.rank + q, weighted, terms, steps);
    }
    // 4. weighted_keys += terms keys.
    for (int64_t slab = 0; slab < width && p.args.grad_query; slab += kSlab) {
      int64_t columns = std::min(kSlab, width - slab);
      pair_keys(buffers, width, slab, columns, steps);
      for (int64_t q = 0; q < rows; q += 32)
        for (int64_t c = 0; c < columns; c += 32)
          tile_accumulate(buffers.terms + q * p.plan.chunk, buffers.pairs + c * steps * 32, steps,
                          state.weighted_keys + q * width + slab + c, width);
    }
  }
}

}  // namespace PVL_ISA
}  // namespace perfvl
#endif
