// out[i, c] = dtype(scale[i] * rows[i, c]): what backward makes of a gradient that forward saved in float32.
//
// One multiplication per element, so memory is the whole cost: rows read once, out written once, 2 to 8 bytes per
// element where torch's widen, multiply and round move up to 24 in three launches. At the sizes of a loss (256 x 128,
// 0.2 MB) the launch itself is the cost: one vector per thread, every SM at work, no integer division to find the row.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/scale_rows.h"

namespace perfvl::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kBlocks = 16384;  // several waves of the largest GPU; beyond, a block takes more than one piece

// Both sides coalesced and the wider one moved in 16 bytes: four elements where either is float32, else eight.
template <class In, class Out>
constexpr int kVector = 16 / (sizeof(In) > sizeof(Out) ? sizeof(In) : sizeof(Out));

// threadIdx.y and blockIdx.x run over rows, threadIdx.x and blockIdx.y over `pieces` of kCount columns.
template <class In, class Out, int kCount>
__global__ void __launch_bounds__(kThreads)
    scale_rows_kernel(const In* __restrict__ rows, int64_t row_stride, int64_t col_stride,
                      const float* __restrict__ scale, int64_t scale_stride, Out* __restrict__ out, int64_t count,
                      int64_t pieces) {
  using InVector = Vector<In, kCount>;
  using OutVector = Vector<Out, kCount>;
  int64_t row_step = int64_t(gridDim.x) * blockDim.y, piece_step = int64_t(gridDim.y) * blockDim.x;
  // Unrolled, either loop would begin with a 64-bit division for its trip count: longer than all the rest at small
  // sizes.
#pragma unroll 1
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < count; row += row_step) {
    float factor = scale[row * scale_stride];
#pragma unroll 1
    for (int64_t piece = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; piece < pieces; piece += piece_step) {
      const In* from = rows + row * row_stride + piece * kCount * col_stride;
      InVector in = *reinterpret_cast<const InVector*>(from);
      OutVector result;
#pragma unroll
      for (int i = 0; i < kCount; ++i) result.values[i] = from_float<Out>(factor * to_float(in.values[i]));
      *reinterpret_cast<OutVector*>(out + (row * pieces + piece) * kCount) = result;
    }
  }
}

template <class In, class Out, int kCount>
int run(const Matrix& m, const float* scale, int64_t scale_stride, void* out, void* stream) {
  int64_t pieces = m.cols / kCount;
  unsigned lanes = 1;  // threads per row
  while (lanes < kThreads && lanes < pieces) lanes *= 2;
  dim3 block(lanes, kThreads / lanes);
  int64_t across = std::min(ceil_div(pieces, lanes), kBlocks);
  int64_t down = std::min(ceil_div(m.rows, block.y), ceil_div(kBlocks, across));
  return launch(scale_rows_kernel<In, Out, kCount>, dim3(unsigned(down), unsigned(across)), block, 0, stream,
                static_cast<const In*>(m.data), m.row_stride, m.col_stride, scale, scale_stride, static_cast<Out*>(out),
                m.rows, pieces);
}

template <class In, class Out>
int run(const Matrix& m, const float* scale, int64_t scale_stride, void* out, void* stream) {
  constexpr int n = kVector<In, Out>;
  bool whole = m.col_stride == 1 && m.cols % n == 0 && (m.row_stride % n == 0 || m.rows == 1);
  if (whole && aligned(m.data, n * sizeof(In)) && aligned(out, n * sizeof(Out)))
    return run<In, Out, n>(m, scale, scale_stride, out, stream);
  return run<In, Out, 1>(m, scale, scale_stride, out, stream);
}

template <class In>
int run(const Matrix& m, const float* scale, int64_t scale_stride, Dtype dtype, void* out, void* stream) {
  switch (dtype) {
    case Dtype::float32: return run<In, float>(m, scale, scale_stride, out, stream);
    case Dtype::bfloat16: return run<In, __nv_bfloat16>(m, scale, scale_stride, out, stream);
    default: return run<In, __half>(m, scale, scale_stride, out, stream);
  }
}

}  // namespace

int scale_rows(const Matrix& rows, const float* scale, int64_t scale_stride, Dtype dtype, void* out, void* stream) {
  switch (rows.dtype) {
    case Dtype::float32: return run<float>(rows, scale, scale_stride, dtype, out, stream);
    case Dtype::bfloat16: return run<__nv_bfloat16>(rows, scale, scale_stride, dtype, out, stream);
    default: return run<__half>(rows, scale, scale_stride, dtype, out, stream);
  }
}

}  // namespace perfvl::cuda
