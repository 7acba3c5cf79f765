// InfoNCE over a queue of keys, with the gradient, in one pass over the queue.
//
// Per query row: loss = log(1 + sum_j exp(l_j - l_0)), l = logits; the same sweep carries sum_j exp(l_j) N_j, which is
// the gradient, so nothing of size B x K exists at any time. Tasks are (row block) x (key range); each has a softmax
// state of its own, and merge_row joins the key ranges of a row in fixed order: the result depends on the number of
// threads, never on their timing.
#include "cpu/info_nce.h"

#include "cpu/info_nce_gemm.h"
#include "cpu/info_nce_tiles.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

bool use_tiles([[maybe_unused]] const InfoNceArgs& a) {
#if defined(__AVX512BF16__)
  return a.bfloat16_products;
#else
  return false;
#endif
}

Problem lay_out(const InfoNceArgs& a, void* base, int64_t* bytes) {
  auto worker_bytes = [](const Problem& p) {
    Arena arena(nullptr);
#if defined(__AVX512BF16__)
    if (p.plan.tiles) tile_buffers(p, arena);
#endif
    if (!p.plan.tiles) gemm_buffers(p, arena);
    return arena.used();
  };
  return lay_out(a, make_plan(a, use_tiles(a)), worker_bytes, base, bytes);
}

int64_t scratch_bytes(const InfoNceArgs& a) {
  int64_t bytes = 0;
  lay_out(a, nullptr, &bytes);
  return bytes;
}

void sweep(const Problem& p, int64_t worker) {
  Arena arena(p.worker_scratch + worker * p.worker_bytes);
  int64_t begin = p.plan.tasks() * worker / p.plan.workers, end = p.plan.tasks() * (worker + 1) / p.plan.workers;
#if defined(__AVX512BF16__)
  if (p.plan.tiles) {
    TileBuffers buffers = tile_buffers(p, arena);
    for (int64_t task = begin; task < end; ++task) start_state(p, task), sweep_tiles(p, task, buffers);
    return;
  }
#endif
  GemmBuffers buffers = gemm_buffers(p, arena);
  for (int64_t task = begin; task < end; ++task) start_state(p, task), sweep_gemm(p, task, buffers);
}

void run(const InfoNceArgs& a, void* scratch) {
  int64_t bytes;
  Problem p = lay_out(a, scratch, &bytes);
  auto rows_in_groups = [&](auto&& f) {
    constexpr int64_t group = 32;
    auto body = [&](int64_t g) { f(g * group, std::min((g + 1) * group, p.rows)); };
    if (p.plan.workers > 1)
      a.host.parallel(ceil_div(p.rows, group), body);
    else
      for (int64_t g = 0; g < ceil_div(p.rows, group); ++g) body(g);
  };
  // 1. Positive logits; queries in the form the products want.
  rows_in_groups([&](int64_t begin, int64_t end) {
    prepare_rows(p, begin, end);
#if defined(__AVX512BF16__)
    if (p.plan.tiles) pack_queries(p, begin, p.packed_query + begin * p.plan.width);
#endif
  });
  // 2. One pass over the keys.
  if (p.plan.workers > 1)
    a.host.parallel(p.plan.workers, [&](int64_t worker) { sweep(p, worker); });
  else
    sweep(p, 0);
  // 3. Key ranges of a row joined; loss and gradient.
  rows_in_groups([&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) merge_row(p, i);
  });
}

}  // namespace

extern const InfoNceKernel info_nce{scratch_bytes, run};

}  // namespace PVL_ISA
}  // namespace perfvl
