// A batch of keys into a ring: cast, normalise, wrap, payloads, cursor and count in one launch, nothing read by the
// host.
//
// Memory is the cost: keys read once, rows written once (2,048 x 2,560 float32: 42 MB, some 10 us of an H200), so
// vectors of 16 bytes, four on their way per thread; a normalised row is read again, from the cache. A warp takes a row
// where one such batch of loads covers it, else a block does.
//
// Every block needs the cursor, and one must move it on. Blocks cannot wait for one another, so the cursor counts its
// readers itself: each adds 2^48 to it, which leaves what it says in the low bits and a ticket in the high ones, and
// whoever draws the last ticket stores the new value, for by then all have read. No scratch, no second launch.
#include <algorithm>

#include "cuda/key_queue.h"
#include "cuda/reduce.cuh"

namespace perfvl::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kDepth = 4;          // vectors in flight per thread
constexpr int64_t kBlocks = 2048;  // fill the largest GPU; each counts the whole mask
constexpr unsigned long long kTicket = 1ull << 48;

struct Batch {
  RingWrite write;
  RingPayload payloads[kMaxPayloads];
};

// Kept rows with an index in [first, limit) are written; row `first` goes to ring row `start`, and so on around.
struct Plan {
  int64_t start, first, limit;
  int64_t before;  // rows kept before those of this block
};

__device__ bool is_kept(const RingWrite& w, int64_t row) { return !w.mask || w.mask[row * w.mask_stride]; }

// x modulo size, without dividing where x is in range already.
__device__ int64_t wrapped(int64_t x, int64_t size) {
  if (x >= 0 && x < size) return x;
  x %= size;
  return x < 0 ? x + size : x;
}

// By one thread of each block: reads the cursor, and moves it on where all the others have read it.
__device__ Plan draw(const RingWrite& w, int64_t before, int64_t kept) {
  unsigned long long drawn = atomicAdd(reinterpret_cast<unsigned long long*>(w.cursor), kTicket);
  int64_t cursor = int64_t(drawn << 16) >> 16;                               // its sign is that of bit 47
  unsigned ticket = unsigned((drawn - (unsigned long long)(cursor)) >> 48);  // how often kTicket was added
  int64_t start = wrapped(cursor, w.size);
  bool reaches_end = start + kept >= w.size;
  if (ticket == gridDim.x - 1) {
    *w.cursor = w.drop_tail && reaches_end ? 0 : wrapped(start + kept, w.size);
    if (w.valid) *w.valid = *w.valid + kept < w.size ? *w.valid + kept : w.size;
  }
  if (w.drop_tail) return {start, 0, reaches_end ? w.size - start : kept, before};
  int64_t first = kept > w.size ? kept - w.size : 0;
  return {wrapped(start + first, w.size), first, kept, before};
}

template <class Unit>
__device__ void copy_units(char* to, const char* from, int64_t bytes) {
  for (int64_t i = threadIdx.x; i < bytes / int64_t(sizeof(Unit)); i += blockDim.x)
    reinterpret_cast<Unit*>(to)[i] = reinterpret_cast<const Unit*>(from)[i];
}

__device__ void copy_payload(const RingPayload& p, int64_t from_row, int64_t to_row) {
  char* to = static_cast<char*>(p.ring) + to_row * p.ring_stride;
  const char* from = static_cast<const char*>(p.rows) + from_row * p.row_stride;
  uint64_t misfit = reinterpret_cast<uint64_t>(to) | reinterpret_cast<uint64_t>(from) | uint64_t(p.row_bytes);
  if (misfit % 16 == 0)
    copy_units<uint4>(to, from, p.row_bytes);
  else if (misfit % 8 == 0)
    copy_units<uint64_t>(to, from, p.row_bytes);
  else if (misfit % 4 == 0)
    copy_units<uint32_t>(to, from, p.row_bytes);
  else
    copy_units<uint8_t>(to, from, p.row_bytes);
}

// By all threads of a row: 1 / max(its L2 norm, 1e-12); NaN stays.
template <class Key, int kCount>
__device__ float inverse_norm(const Key* row, int64_t step, int64_t pieces) {
  float total = 0.f;
#pragma unroll 4
  for (int64_t piece = threadIdx.x; piece < pieces; piece += blockDim.x) {
    auto values = *reinterpret_cast<const Vector<Key, kCount>*>(row + piece * step);
#pragma unroll
    for (int i = 0; i < kCount; ++i) total = fmaf(to_float(values.values[i]), to_float(values.values[i]), total);
  }
  float length = sqrtf(blockDim.x == 32 ? warp_sum(total) : block_sum(total, threadIdx.x, kWarps));
  return 1.f / (length < 1e-12f ? 1e-12f : length);
}

template <class Ring, class Key, int kCount>
__device__ void copy_row(Ring* to, int64_t to_stride, const Key* from, int64_t from_stride, int64_t pieces,
                         bool normalize) {
  int64_t to_step = kCount > 1 ? kCount : to_stride, from_step = kCount > 1 ? kCount : from_stride;
  float scale = normalize ? inverse_norm<Key, kCount>(from, from_step, pieces) : 1.f;
#pragma unroll 1
  for (int64_t first = threadIdx.x; first < pieces; first += kDepth * blockDim.x) {
    Vector<Key, kCount> in[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      int64_t piece = first + d * blockDim.x;
      if (piece < pieces) in[d] = *reinterpret_cast<const Vector<Key, kCount>*>(from + piece * from_step);
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      int64_t piece = first + d * blockDim.x;
      if (piece >= pieces) continue;
      Vector<Ring, kCount> out;
#pragma unroll
      for (int i = 0; i < kCount; ++i) out.values[i] = from_float<Ring>(scale * to_float(in[d].values[i]));
      *reinterpret_cast<Vector<Ring, kCount>*>(to + piece * to_step) = out;
    }
  }
}

// threadIdx.x runs along a row, threadIdx.y over rows: blockDim is 32 x kWarps or kThreads x 1. Each block takes an
// equal share of consecutive rows.
template <class Ring, class Key, int kCount>
__global__ void __launch_bounds__(kThreads, 6) key_queue_kernel(const __grid_constant__ Batch batch) {
  const RingWrite& w = batch.write;
  int64_t rows = w.keys.rows, share = (rows + gridDim.x - 1) / gridDim.x;
  int64_t begin = blockIdx.x * share, end = begin + share < rows ? begin + share : rows;
  unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
  // 1. How many rows are kept before this block's, and in all.
  int64_t before = begin, kept = rows;
  if (w.mask) {
    before = kept = 0;
#pragma unroll 4
    for (int64_t row = thread; row < rows; row += kThreads) {
      bool keep = is_kept(w, row);
      kept += keep, before += keep && row < begin;
    }
    before = block_sum(before, thread, kWarps), kept = block_sum(kept, thread, kWarps);
  }
  // 2. Where they go.
  __shared__ Plan plan;
  if (thread == 0) plan = draw(w, before, kept);
  __syncthreads();
  // 3. Rows, with what moves along.
  before = plan.before;
  for (int64_t first = begin; first < end; first += blockDim.y) {
    unsigned lane = thread % 32, own = threadIdx.y;
    unsigned keeps = __ballot_sync(kEverybody, lane < blockDim.y && first + lane < end && is_kept(w, first + lane));
    int64_t row = first + own, index = before + __popc(keeps & ((1u << own) - 1));
    before += __popc(keeps);
    if (!(keeps >> own & 1u) || index < plan.first || index >= plan.limit) continue;
    int64_t to = plan.start + (index - plan.first);
    if (to >= w.size) to -= w.size;
    copy_row<Ring, Key, kCount>(static_cast<Ring*>(w.ring) + to * w.ring_row_stride, w.ring_col_stride,
                                static_cast<const Key*>(w.keys.data) + row * w.keys.row_stride, w.keys.col_stride,
                                w.dim / kCount, w.normalize);
    for (int64_t p = 0; p < w.payload_count; ++p) copy_payload(batch.payloads[p], row, to);
  }
}

template <class Ring, class Key, int kCount>
int run(const RingWrite& write, void* stream) {
  Batch batch{write, {}};
  std::copy_n(write.payloads, write.payload_count, batch.payloads);
  bool warp_per_row = write.dim / kCount <= 32 * kDepth;
  dim3 block = warp_per_row ? dim3(32, kWarps) : dim3(kThreads);
  int64_t blocks = std::min(ceil_div(write.keys.rows, block.y), kBlocks);
  return launch(key_queue_kernel<Ring, Key, kCount>, dim3(unsigned(blocks)), block, 0, stream, batch);
}

template <class Ring, class Key>
int run(const RingWrite& w, void* stream) {
  constexpr int n = 16 / (sizeof(Ring) > sizeof(Key) ? sizeof(Ring) : sizeof(Key));
  bool dense = w.ring_col_stride == 1 && w.keys.col_stride == 1 && w.dim % n == 0;
  bool whole = (w.ring_row_stride % n == 0 || w.size == 1) && (w.keys.row_stride % n == 0 || w.keys.rows == 1);
  if (dense && whole && aligned(w.ring, n * sizeof(Ring)) && aligned(w.keys.data, n * sizeof(Key)))
    return run<Ring, Key, n>(w, stream);
  return run<Ring, Key, 1>(w, stream);
}

template <class Ring>
int run(const RingWrite& w, void* stream) {
  switch (w.keys.dtype) {
    case Dtype::float32: return run<Ring, float>(w, stream);
    case Dtype::bfloat16: return run<Ring, __nv_bfloat16>(w, stream);
    default: return run<Ring, __half>(w, stream);
  }
}

}  // namespace

int key_queue(const RingWrite& write, void* stream) {
  if (write.keys.rows == 0) return 0;
  switch (write.ring_dtype) {
    case Dtype::float32: return run<float>(write, stream);
    case Dtype::bfloat16: return run<__nv_bfloat16>(write, stream);
    default: return run<__half>(write, stream);
  }
}

}  // namespace perfvl::cuda
