// Binary cross-entropies of several discriminator heads, their weighted sum, and its gradient.
//
// A step of StackGAN has 3 to 5 heads of 64 logits, 1 kB: launches are the whole cost, and PyTorch has 4 for each head
// and again in backward. Here it is one block and one launch: every head has warps of its own, a thread takes a row,
// and the gradient is written beside the loss. Heads of thousands of rows take more turns of the same block.
#include <algorithm>
#include <cmath>

#include "cuda/gan_loss.h"
#include "cuda/reduce.cuh"

namespace perfvl::cuda {
namespace {

constexpr unsigned kThreads = 1024;

struct Row {
  float loss, grad;  // grad: of the head's weighted mean
};

// Keeps NaN in x, as fmaxf does not.
__device__ float at_least(float x, float least) { return x < least ? least : x; }

// On the logits: -y log sigmoid(x) - (1 - y) log sigmoid(-x). Of an infinite logit, a term with the factor 0 is 0.
__device__ Row stable(const GanHead& h, float factor, float x) {
  float size = fabsf(x), e = expf(-size), near = 1.f / (1.f + e), far = e * near;  // sigmoid(|x|), sigmoid(-|x|)
  bool positive = x > 0.f;
  float wrong = positive ? h.complement : h.target;
  float grad = (positive ? near : far) * h.complement - (positive ? far : near) * h.target;
  return {(wrong != 0.f ? wrong * size : 0.f) + log1pf(e), grad * factor};
}

// As BCELoss after Sigmoid: from a rounded probability, with the clamps of either.
__device__ Row exact(const GanHead& h, float factor, float x) {
  float p = 1.f / (1.f + expf(-x)), q = 1.f - p;
  float loss = p - p;  // NaN where p is
  if (h.target != 0.f) loss -= at_least(logf(p), -100.f) * h.target;
  if (h.complement != 0.f) loss -= at_least(log1pf(-p), -100.f) * h.complement;
  return {loss, (p - h.target) * factor / at_least(q * p, 1e-12f) * q * p};
}

// One block: threadIdx.y is the head, whole warps of threadIdx.x its rows.
template <class T, bool kExact>
__global__ void __launch_bounds__(kThreads) gan_loss_kernel(const __grid_constant__ GanLoss g) {
  __shared__ float sums[kThreads / 32];
  unsigned head = threadIdx.y, warps = blockDim.x / 32;
  const GanHead& h = g.heads[head];
  // 1. Rows.
  float* grad = g.grad;
  if (grad)
    for (unsigned k = 0; k < head; ++k) grad += g.heads[k].rows;
  float factor = h.weight / float(h.rows), total = 0.f;
  for (int64_t row = threadIdx.x; row < h.rows; row += blockDim.x) {
    float x = to_float(static_cast<const T*>(h.logits)[row * h.stride]);
    Row out = kExact ? exact(h, factor, x) : stable(h, factor, x);
    total += out.loss;
    if (grad) grad[row] = out.grad;
  }
  // 2. Sums of warps.
  total = warp_sum(total);
  if (threadIdx.x % 32 == 0) sums[head * warps + threadIdx.x / 32] = total;
  __syncthreads();
  // 3. By the first warp: a head's mean in each lane, then their weighted sum.
  if (head > 0 || threadIdx.x >= 32) return;
  unsigned k = threadIdx.x;
  float weighted = 0.f;
  if (k < unsigned(g.count)) {
    float sum = 0.f;
    for (unsigned i = 0; i < warps; ++i) sum += sums[k * warps + i];
    float mean = sum / float(g.heads[k].rows);
    g.means[k] = mean;
    weighted = g.heads[k].weight * mean;
  }
  weighted = warp_sum(weighted);
  if (k == 0) *g.total = weighted;
}

template <class T>
int run(const GanLoss& g, void* stream) {
  int64_t rows = 1;
  for (int k = 0; k < g.count; ++k) rows = std::max(rows, g.heads[k].rows);
  unsigned most = kThreads / unsigned(g.count) / 32 * 32;
  dim3 block(unsigned(std::min<int64_t>(round_up(rows, 32), most)), unsigned(g.count));
  return g.exact ? launch(gan_loss_kernel<T, true>, dim3(1), block, 0, stream, g)
                 : launch(gan_loss_kernel<T, false>, dim3(1), block, 0, stream, g);
}

}  // namespace

int gan_loss(const GanLoss& loss, void* stream) {
  switch (loss.dtype) {
    case Dtype::float32: return run<float>(loss, stream);
    case Dtype::bfloat16: return run<__nv_bfloat16>(loss, stream);
    default: return run<__half>(loss, stream);
  }
}

}  // namespace perfvl::cuda
