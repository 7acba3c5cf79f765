// target <- m target + (1 - m) source over a list of tensors, in one launch for all of them, in any mix of dtypes.
//
// Two operations per element: memory is the whole cost, 12 bytes per float32 element (10 with a bfloat16 source, 2 more
// for a bfloat16 copy), so vectors of 16 bytes, two of each operand on their way per thread. Each block takes one
// chunk of one tensor and finds it by binary search. The list travels by value among the kernel's parameters (up to
// 32,764 bytes of them), where all threads read it from the constant cache: a table in device memory would need an
// upload before every launch or a cache that must notice when a tensor moves, and a CUDA graph would replay whatever
// the table holds by then; parameters are copied at launch and at capture.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/momentum_update.h"

namespace perfvl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kDepth = 2;                                           // vectors of each operand in flight per thread
constexpr int64_t kSmallestChunk = 4096, kLargestChunk = 64 << 10;  // elements; one or two steps of a block, and more
constexpr int64_t kBlocks = 4096;                                   // several waves of the largest GPU

struct Kind {
  uint8_t target : 2, source : 2, copy : 2;  // Dtype
  uint8_t vectors : 1;                       // every pointer is a multiple of 16 bytes
};

template <int kCapacity>
struct Table {
  void* target[kCapacity];
  const void* source[kCapacity];
  void* copy[kCapacity];
  int64_t count[kCapacity];
  uint32_t first_chunk[kCapacity];  // chunks of all tensors before this one
  Kind kind[kCapacity];
  int32_t chunk, used;
};
// A launch costs by the bytes of its parameters, so short lists have a table of their own.
constexpr int kSmallTable = 100, kLargeTable = 880;

static_assert(sizeof(Table<kLargeTable>) < 32700);  // of the 32,764 bytes that a launch can take

struct Weights {
  float momentum, weight;           // m and 1 - m
  bool near_target, exact, convex;  // exact: the nearer end is the result, whatever the other holds
};

__host__ __device__ inline Weights weights_of(float momentum, float weight, bool convex) {
  return {momentum, weight, weight < 0.5f, weight == 0.f || weight == 1.f, convex};
}

// One chunk of one pair.
struct Piece {
  void* target;
  const void* source;
  void* copy;
  int count;
  Kind kind;
};

template <class T>
__device__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

template <class T, class S>
__device__ T average(const Weights& w, T target, S source) {
  float t = to_float(target), s = to_float(source);
  if (w.convex)  // the three roundings stay three: nothing may become a fused multiply-add
    return from_float<T>(__fadd_rn(rounded<T>(__fmul_rn(t, w.momentum)), rounded<S>(__fmul_rn(s, w.weight))));
  float near = w.near_target ? t : s, far = w.near_target ? s : t;
  float moved = fmaf(w.near_target ? w.weight : w.momentum, far - near, near);
  return from_float<T>(w.exact ? near : moved);
}

template <class C, class T, int kCount>
__device__ void put_as(void* copy, int at, const Vector<T, kCount>& values) {
  Vector<C, kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) result.values[i] = from_float<C>(to_float(values.values[i]));
  *reinterpret_cast<Vector<C, kCount>*>(static_cast<C*>(copy) + at) = result;
}

// Elements [begin, end) of a piece, in vectors of kCount.
template <class T, class S, int kCount>
__device__ void sweep(const Piece& piece, int begin, int end, const Weights& w) {
  constexpr int kStep = kThreads * kCount;
  T* target = static_cast<T*>(piece.target);
  const S* source = static_cast<const S*>(piece.source);
#pragma unroll 1
  for (int first = begin + int(threadIdx.x) * kCount; first < end; first += kDepth * kStep) {
    Vector<T, kCount> t[kDepth];
    Vector<S, kCount> s[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      int at = first + d * kStep;
      if (at >= end) continue;
      t[d] = *reinterpret_cast<const Vector<T, kCount>*>(target + at);
      s[d] = *reinterpret_cast<const Vector<S, kCount>*>(source + at);
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      int at = first + d * kStep;
      if (at >= end) continue;
#pragma unroll
      for (int i = 0; i < kCount; ++i) t[d].values[i] = average(w, t[d].values[i], s[d].values[i]);
      *reinterpret_cast<Vector<T, kCount>*>(target + at) = t[d];
      if (!piece.copy) continue;
      switch (Dtype(piece.kind.copy)) {
        case Dtype::float32: put_as<float>(piece.copy, at, t[d]); break;
        case Dtype::bfloat16: put_as<__nv_bfloat16>(piece.copy, at, t[d]); break;
        default: put_as<__half>(piece.copy, at, t[d]);
      }
    }
  }
}

template <class T, class S>
__device__ void sweep(const Piece& piece, const Weights& w) {
  constexpr int n = 16 / (sizeof(T) > sizeof(S) ? sizeof(T) : sizeof(S));
  int whole = piece.kind.vectors ? piece.count / n * n : 0;
  sweep<T, S, n>(piece, 0, whole, w);
  sweep<T, S, 1>(piece, whole, piece.count, w);
}

template <class T>
__device__ void sweep(const Piece& piece, const Weights& w) {
  switch (Dtype(piece.kind.source)) {
    case Dtype::float32: sweep<T, float>(piece, w); break;
    case Dtype::bfloat16: sweep<T, __nv_bfloat16>(piece, w); break;
    default: sweep<T, __half>(piece, w);
  }
}

__host__ __device__ constexpr int64_t size_of(Dtype type) { return type == Dtype::float32 ? 4 : 2; }

template <class Table>
__global__ void __launch_bounds__(kThreads, 3)
    momentum_update_kernel(const __grid_constant__ Table table, Weights w, const void* momentum, bool is_double) {
  // 1. The weights, where the device holds them.
  if (momentum) {
    double m = is_double ? *static_cast<const double*>(momentum) : *static_cast<const float*>(momentum);
    w = weights_of(float(m), float(1.0 - m), w.convex);
  }
  // 2. The tensor: the last one that begins at this chunk or before.
  int i = 0, after = table.used;
  while (after - i > 1) {
    int middle = (i + after) / 2;
    (table.first_chunk[middle] <= blockIdx.x ? i : after) = middle;
  }
  // 3. Its piece.
  Kind kind = table.kind[i];
  int64_t begin = int64_t(blockIdx.x - table.first_chunk[i]) * table.chunk, rest = table.count[i] - begin;
  char* copy = static_cast<char*>(table.copy[i]);
  Piece piece{static_cast<char*>(table.target[i]) + begin * size_of(Dtype(kind.target)),
              static_cast<const char*>(table.source[i]) + begin * size_of(Dtype(kind.source)),
              copy ? copy + begin * size_of(Dtype(kind.copy)) : nullptr, rest < table.chunk ? int(rest) : table.chunk,
              kind};
  switch (Dtype(kind.target)) {
    case Dtype::float32: sweep<float>(piece, w); break;
    case Dtype::bfloat16: sweep<__nv_bfloat16>(piece, w); break;
    default: sweep<__half>(piece, w);
  }
}

template <int kCapacity>
int run(const MomentumPair* pairs, int count, const MomentumWeights& weights, void* stream) {
  Table<kCapacity> table;
  int64_t total = 0, chunk = kSmallestChunk, chunks = 0;
  for (int i = 0; i < count; ++i) total += pairs[i].count;
  while (chunk < kLargestChunk && total / chunk > kBlocks) chunk *= 2;
  table.chunk = int32_t(chunk), table.used = count;
  for (int i = 0; i < count; ++i) {
    const MomentumPair& p = pairs[i];
    table.target[i] = p.target, table.source[i] = p.source, table.copy[i] = p.copy, table.count[i] = p.count;
    bool vectors = aligned(p.target, 16) && aligned(p.source, 16) && aligned(p.copy, 16);
    table.kind[i] = {uint8_t(p.target_dtype), uint8_t(p.source_dtype), uint8_t(p.copy_dtype), vectors};
    table.first_chunk[i] = uint32_t(chunks);
    chunks += ceil_div(p.count, chunk);  // of an empty tensor there is none: no block finds it
  }
  if (chunks == 0) return 0;
  Weights w = weights_of(float(weights.momentum), float(1.0 - weights.momentum), weights.convex);
  return launch(momentum_update_kernel<Table<kCapacity>>, dim3(unsigned(chunks)), dim3(kThreads), 0, stream, table, w,
                weights.tensor, weights.tensor_is_double);
}

}  // namespace

int momentum_update(const MomentumPair* pairs, int64_t count, const MomentumWeights& weights, void* stream) {
  if (count <= kSmallTable) return run<kSmallTable>(pairs, int(count), weights, stream);
  for (int64_t first = 0; first < count; first += kLargeTable) {
    int used = int(std::min<int64_t>(kLargeTable, count - first));
    if (int error = run<kLargeTable>(pairs + first, used, weights, stream)) return error;
  }
  return 0;
}

}  // namespace perfvl::cuda
