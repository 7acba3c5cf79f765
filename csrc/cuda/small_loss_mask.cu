// Which rows of a batch have the smallest losses.
//
// The losses are read once where one block holds their keys: 4 bytes per row and a launch, where a sort takes several
// and moves keys and indices. Beyond kOneBlock rows every pass reads them again, from the cache as long as it holds
// them, and nothing but counts is written until the mask: five launches, whatever the number of groups.
#include "cuda/small_loss.h"
#include "cuda/small_loss_select.cuh"

namespace perfvl::cuda {
namespace {

struct MaskSource {
  static constexpr int kCount = 1;
  SmallLossMask mask;

  __device__ void keys(int64_t group, int64_t row, uint32_t (&keys)[1]) const {
    int64_t at = group * mask.group_stride + row * mask.row_stride;
    bool counts =
        !mask.candidates || mask.candidates[group * mask.candidate_group_stride + row * mask.candidate_row_stride];
    float loss = 0.f;
    switch (mask.dtype) {
      case Dtype::float32: loss = static_cast<const float*>(mask.losses)[at]; break;
      case Dtype::bfloat16: loss = to_float(static_cast<const __nv_bfloat16*>(mask.losses)[at]); break;
      default: loss = to_float(static_cast<const __half*>(mask.losses)[at]);
    }
    keys[0] = counts ? key_of(loss) : kNoCandidate;
  }
  __device__ Choice choice(int64_t group, int64_t candidates) const {
    return smallest(share_of(number(mask.keep_rate, group), candidates), candidates);
  }
};

__device__ void mask_rows(const MaskSource& source, int64_t group, int64_t begin, int64_t end, Border (&border)[1]) {
  for (int64_t first = begin; first < end; first += blockDim.x) {
    int64_t row = first + threadIdx.x;
    uint32_t key[1] = {kNoCandidate};
    if (row < end) source.keys(group, row, key);
    bool kept[1];
    keep_in_order(key, border, kept);
    if (row < end) source.mask.mask[group * source.mask.rows + row] = kept[0];
  }
}

// At most kOneBlock rows: a block for each group.
__global__ void __launch_bounds__(1024) mask_kernel(const __grid_constant__ MaskSource source) {
  uint32_t* keys = dynamic_shared<uint32_t>();
  int rows = int(source.mask.rows);
  for (int64_t group = blockIdx.y; group < source.mask.groups; group += gridDim.y) {
    int candidates = 0;
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
      uint32_t key[1];
      source.keys(group, row, key);
      keys[row] = key[0], candidates += key[0] != kNoCandidate;
    }
    candidates = block_sum(candidates);
    Choice choice = source.choice(group, candidates);
    Border border[1] = {choice.border};
    if (choice.searches) search(keys, rows, choice.k, border);
    mask_rows(source, group, 0, rows, border);
  }
}

__global__ void __launch_bounds__(kTileThreads, 3)
    mask_tiles_kernel(const __grid_constant__ MaskSource source, const __grid_constant__ Survey survey) {
  for (int64_t group = blockIdx.y; group < source.mask.groups; group += gridDim.y) {
    Choice choice = source.choice(group, int64_t(survey.candidates[group]));
    Border border[1] = {choice.border};
    if (choice.searches) recall(survey, group, kPasses, choice.k, border);
    Tile tile(survey.rows);
    mask_rows(source, group, tile.begin, tile.end, border);
  }
}

}  // namespace

int64_t mask_scratch_bytes(const SmallLossMask& mask) {
  if (mask.rows <= kOneBlock) return 0;
  Survey survey{};
  survey.rows = mask.rows;
  Arena arena(nullptr);
  survey.take_zeroed(arena, mask.groups, 1), survey.take_others(arena, mask.groups, 1);
  return arena.used();
}

int small_loss_mask(const SmallLossMask& mask, void* scratch, void* stream) {
  MaskSource source{mask};
  if (mask.rows <= kOneBlock)
    return launch(mask_kernel, grid_of(1, mask.groups), dim3(threads_for(mask.rows, 1024)),
                  size_t(mask.rows) * sizeof(uint32_t), stream, source);
  Survey survey{};
  survey.rows = mask.rows;
  Arena arena(scratch);
  survey.take_zeroed(arena, mask.groups, 1);
  int64_t zeroed = arena.used();
  survey.take_others(arena, mask.groups, 1);
  if (int error = zero(scratch, zeroed, stream)) return error;
  if (int error = count_all(source, survey, mask.groups, kPasses, stream)) return error;
  return launch(mask_tiles_kernel, grid_of(survey.tiles(), mask.groups), dim3(kTileThreads), 0, stream, source, survey);
}

}  // namespace perfvl::cuda
