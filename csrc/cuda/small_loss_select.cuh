// The k smallest of n keys, ties by row, without sorting: the k-th key digit by digit, then one walk over the rows.
//
// Up to kOneBlock rows, one block does it in shared memory. Beyond, every block counts the digits of its tile of rows,
// one launch per digit. Nobody writes down which digits were found: each block finds them anew from the few kilobytes
// of counts, which is shorter than a launch. All counts are integers, so that the order of atomics does not matter.
#pragma once

#include <algorithm>

#include "cuda/reduce.cuh"
#include "small_loss.h"

namespace perfvl::cuda {
namespace {

constexpr int64_t kOneBlock = 2048;  // rows
constexpr int kDigits = 256, kPasses = 4;
constexpr int kTileThreads = 256;
constexpr int64_t kTiles = 1024;  // per group at most: two for each block that the largest GPU holds

// The rows below `key`, and the first `ties` rows of this key.
struct Border {
  uint32_t key;
  int64_t ties;
};
__device__ inline Border no_row() { return {0, 0}; }
__device__ inline Border all_candidates() { return {kNoCandidate, 0}; }

// The k smallest, or where there is nothing to look for, what `border` says.
struct Choice {
  bool searches;
  int64_t k;
  Border border;
  double divisor;  // of the losses' sum
  bool undefined;  // their mean is one of nothing
};

__device__ inline Choice smallest(int64_t k, int64_t candidates, double divisor = 1.0, bool undefined = false) {
  return {k > 0 && k < candidates, k, k > 0 ? all_candidates() : no_row(), divisor, undefined};
}

__device__ inline uint32_t key_of(float loss) {
  uint32_t b = __float_as_uint(loss + 0.f);  // -0 becomes 0
  if ((b & 0x7fffffffu) > 0x7f800000u) return kNanKey;
  return b >> 31 ? ~b : b | 0x80000000u;
}

__device__ inline double number(const Scalars& s, int64_t group) {
  if (!s.tensor) return s.value;
  int64_t at = group * s.stride;
  return s.is_double ? static_cast<const double*>(s.tensor)[at] : static_cast<const float*>(s.tensor)[at];
}

// keep_count of small_loss.h.
__device__ inline int64_t share_of(double rate, int64_t count) {
  double kept = rate * double(count);
  return kept >= double(count) ? count : kept >= 1.0 ? int64_t(kept) : 0;
}

// Whether this block is the last of its row of the grid to come here, and so sees what all of them wrote. All threads
// must call; *ticket was 0.
__device__ inline bool comes_last(unsigned* ticket) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// By all threads of a block, for consecutive rows: which are kept. Borders move past the ties of these rows.
template <int kCount>
__device__ void keep_in_order(const uint32_t (&keys)[kCount], Border (&borders)[kCount], bool (&kept)[kCount]) {
  __shared__ unsigned tied[kCount][32];
  unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, own[kCount];
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    own[s] = __ballot_sync(kEverybody, keys[s] == borders[s].key);
    if (lane == 0) tied[s][warp] = own[s];
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    // Ties of the block, and in the upper half those of the warps before this one.
    unsigned count = lane < blockDim.x / 32 ? __popc(tied[s][lane]) : 0;
    unsigned sums = warp_sum(count | (lane < warp ? count << 16 : 0));
    int64_t before = (sums >> 16) + __popc(own[s] & ((1u << lane) - 1));
    kept[s] = keys[s] < borders[s].key || (keys[s] == borders[s].key && before < borders[s].ties);
    borders[s].ties -= sums & 0xffffu;
  }
  __syncthreads();
}

// By all threads of a block: for rows [begin, end), how many keys that begin like the borders have which digit next.
template <int kCount, class F>
__device__ void count_digits(int64_t begin, int64_t end, int shift, const Border (&borders)[kCount], unsigned* counts,
                             F keys_at) {
  for (int i = threadIdx.x; i < kCount * kDigits; i += blockDim.x) counts[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
    uint32_t keys[kCount];
    keys_at(row, keys);
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      uint32_t digit = (keys[s] ^ borders[s].key) >> shift;  // more than a digit where they differ before
      if (digit < kDigits) atomicAdd(&counts[s * kDigits + digit], 1u);
    }
  }
  __syncthreads();
}

// By all lanes of a warp: the digit of the key at the border, and how many ties are left among those that share it.
__device__ inline void take_digit(const unsigned* counts, int shift, Border& border) {
  constexpr int kOwn = kDigits / 32;
  unsigned lane = threadIdx.x % 32, own[kOwn], total = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) own[i] = counts[lane * kOwn + i], total += own[i];
  unsigned up_to = total;
  for (int step = 1; step < 32; step *= 2) {
    unsigned others = __shfl_up_sync(kEverybody, up_to, step);
    if (lane >= unsigned(step)) up_to += others;
  }
  int64_t rest = border.ties - int64_t(up_to - total);
  int holder = __ffs(int(__ballot_sync(kEverybody, rest > 0 && rest <= total))) - 1;
  unsigned digit = 0;
#pragma unroll
  for (int i = 0; i < kOwn - 1; ++i)
    if (digit == unsigned(i) && rest > own[i]) rest -= own[i], ++digit;
  border.key |= __shfl_sync(kEverybody, lane * kOwn + digit, holder) << shift;
  border.ties = __shfl_sync(kEverybody, rest, holder);
}

// By all threads of a block: the borders of the k smallest of keys[kCount][rows] in shared memory.
template <int kCount>
__device__ void search(const uint32_t* keys, int rows, int64_t k, Border (&borders)[kCount]) {
  __shared__ unsigned counts[kCount * kDigits];
  __shared__ Border found[kCount];
  int warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int s = 0; s < kCount; ++s) borders[s] = {0, k};
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    count_digits(0, rows, shift, borders, counts, [&](int64_t row, uint32_t (&own)[kCount]) {
#pragma unroll
      for (int s = 0; s < kCount; ++s) own[s] = keys[s * rows + row];
    });
    for (int s = warp; s < kCount; s += warps) {
      Border border = shift == 24 ? Border{0, k} : found[s];
      take_digit(counts + s * kDigits, shift, border);
      if (threadIdx.x % 32 == 0) found[s] = border;
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kCount; ++s) borders[s] = found[s];
  }
}

// What the blocks of a selection among more than kOneBlock rows tell one another.
struct Survey {
  unsigned long long* candidates;  // [groups], 0 at first
  unsigned* counts;                // [groups, kCount, kPasses, kDigits] of all rows, 0 at first
  unsigned* tile_counts;           // [groups, tiles, kCount, kDigits]: of the last digit
  int64_t rows;

  int64_t tiles() const { return std::min(ceil_div(rows, kOneBlock), kTiles); }
  void take_zeroed(Arena& arena, int64_t groups, int count) {
    candidates = arena.take<unsigned long long>(groups);
    counts = arena.take<unsigned>(groups * count * kPasses * kDigits);
  }
  void take_others(Arena& arena, int64_t groups, int count) {
    tile_counts = arena.take<unsigned>(groups * tiles() * count * kDigits);
  }
};

struct Tile {
  int64_t begin, end;

  // Of the block, whose x runs over tiles.
  __device__ explicit Tile(int64_t rows) {
    int64_t share = ((rows + gridDim.x - 1) / gridDim.x + 31) / 32 * 32;
    begin = blockIdx.x * share;
    end = begin + share < rows ? begin + share : rows;
  }
};

// By all threads of a block: the borders as far as `passes` digits are known.
template <int kCount>
__device__ void recall(const Survey& survey, int64_t group, int passes, int64_t k, Border (&borders)[kCount]) {
  __shared__ Border found[kCount];
  int s = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();
  if (s < kCount) {
    Border border{0, k};
    const unsigned* counts = survey.counts + (group * kCount + s) * kPasses * kDigits;
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) take_digit(counts + pass * kDigits, 24 - 8 * pass, border);
    if (passes == kPasses) {  // the ties of tiles before this one
      const unsigned* tile = survey.tile_counts + (group * gridDim.x * kCount + s) * kDigits + border.key % kDigits;
      unsigned ties = 0;
      for (int64_t i = lane; i < blockIdx.x; i += 32) ties += tile[i * kCount * kDigits];
      border.ties -= warp_sum(ties);
    }
    if (lane == 0) found[s] = border;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) borders[i] = found[i];
}

// `Source` says what is selected: keys(group, row, keys) and choice(group, candidates) for kCount networks.
template <class Source>
__global__ void __launch_bounds__(kTileThreads, 3)
    digits_kernel(const __grid_constant__ Source source, const __grid_constant__ Survey survey, int64_t groups,
                  int pass) {
  constexpr int kCount = Source::kCount;
  __shared__ unsigned counts[kCount * kDigits];
  for (int64_t group = blockIdx.y; group < groups; group += gridDim.y) {
    // 1. The digits that are known.
    Border borders[kCount] = {};
    if (pass > 0) {
      Choice choice = source.choice(group, int64_t(survey.candidates[group]));
      if (!choice.searches) continue;
      recall(survey, group, pass, choice.k, borders);
    }
    // 2. How often each comes next in this tile.
    Tile tile(survey.rows);
    unsigned long long candidates = 0;
    count_digits(tile.begin, tile.end, 24 - 8 * pass, borders, counts, [&](int64_t row, uint32_t (&keys)[kCount]) {
      source.keys(group, row, keys);
      candidates += keys[0] != kNoCandidate;
    });
    // 3. In all tiles.
    for (int i = threadIdx.x; i < kCount * kDigits; i += blockDim.x) {
      int64_t s = i / kDigits, digit = i % kDigits;
      if (counts[i]) atomicAdd(&survey.counts[((group * kCount + s) * kPasses + pass) * kDigits + digit], counts[i]);
      if (pass == kPasses - 1) survey.tile_counts[(group * gridDim.x + blockIdx.x) * kCount * kDigits + i] = counts[i];
    }
    if (pass == 0) {
      candidates = block_sum(candidates);
      if (threadIdx.x == 0) atomicAdd(&survey.candidates[group], candidates);
    }
    __syncthreads();
  }
}

// A whole number of warps for so many lanes.
inline unsigned threads_for(int64_t lanes, int64_t most) { return unsigned(std::min(round_up(lanes, 32), most)); }

inline int zero(void* memory, int64_t bytes, void* stream) {
  return bytes ? cudaMemsetAsync(memory, 0, size_t(bytes), static_cast<cudaStream_t>(stream)) : cudaSuccess;
}

inline dim3 grid_of(int64_t across, int64_t groups) {
  return dim3(unsigned(across), unsigned(std::min<int64_t>(groups, 65535)));
}

// Digits [0, passes): after one, the candidates are counted; after all, the borders are known.
template <class Source>
int count_all(const Source& source, const Survey& survey, int64_t groups, int passes, void* stream) {
  for (int pass = 0; pass < passes; ++pass)
    if (int error = launch(digits_kernel<Source>, grid_of(survey.tiles(), groups), dim3(kTileThreads), 0, stream,
                           source, survey, groups, pass))
      return error;
  return 0;
}

}  // namespace
}  // namespace perfvl::cuda
