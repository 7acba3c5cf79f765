// The losses of two networks that teach one another by the rows of smallest loss.
//
// A batch of 128 rows and 10 classes is 10 kB: launches are the whole cost, where PyTorch takes 20 to 31 of them
// forward and two stops for the host. Here it is one block and one launch: a row of few classes takes half a warp, then
// the block looks for the k smallest losses in its shared memory. Larger batches (1,024 x 1,000: 8 MB, 3 us of an H100)
// are spread over the GPU, and whichever block finishes its rows last does the rest, still in the same launch. Beyond
// 2,048 rows the search is spread too: a launch for the rows, four for digits, one for masks and losses. Backward reads
// what is kept again, recomputes its softmax from two numbers per row, and writes every gradient, in one launch.
//
// Nothing is read by the host, no order of atomics matters, and sums are in an order that the sizes alone decide.
#include "cuda/small_loss.h"
#include "cuda/small_loss_rows.cuh"

namespace perfvl::cuda {
namespace {

constexpr int kBackwardThreads = 256;
constexpr int64_t kAloneGroups = 128;  // as many blocks of their own fill the GPU
constexpr int64_t kAloneWork = 400;    // of about 50 instructions of a warp: a few us of one block

__device__ Border all_rows(int64_t rows) { return {kNoCandidate, rows}; }

// Key s is that of the loss in network s: the other one learns from the choice by it. JoCoR's two are equal.
struct TwinSource {
  static constexpr int kCount = 2;
  TwinTask task;

  __device__ void losses(int64_t at, float (&losses)[2]) const {
    const TwinLoss& w = task.loss;
    losses[0] = w.coefficients[at], losses[1] = w.coefficients[w.groups * w.rows + at];
  }
  __device__ void keys(int64_t group, int64_t row, uint32_t (&keys)[2]) const {
    int64_t at = group * task.loss.rows + row;
    float own[2];
    losses(at, own);
    bool candidate = task.loss.kept[0][at];
    keys[0] = candidate ? key_of(own[0]) : kNoCandidate, keys[1] = candidate ? key_of(own[1]) : kNoCandidate;
  }
  __device__ Choice choice(int64_t group, int64_t candidates) const {
    const TwinLoss& w = task.loss;
    if (w.method == TwinMethod::decoupling) {
      double least = w.released ? w.least_fraction * double(w.rows) : 1.0;
      return {false, candidates, all_candidates(), least < double(candidates) ? double(candidates) : least, false};
    }
    if (task.of_probabilities && candidates == 0) {
      bool open = (w.step_tensor ? *w.step_tensor : w.step) < 5000;
      return {false, 0, open ? all_rows(w.rows) : no_row(), double(w.rows), false};
    }
    double rate = 1.0 - number(w.forget_rate, group);
    int64_t k = share_of(rate, candidates);
    if (w.released && !task.joint) {
      if (k == 0) k = candidates;
      return smallest(k, candidates, double(k) * double(k), k == 0);
    }
    if (!w.released && k == 0 && rate > 0) k = candidates < 1 ? candidates : 1;
    return smallest(k, candidates, double(k), w.released && k == 0);
  }
};

// As released, Co-teaching+ loses its last candidates, one for each candidate whose id is 0. By all threads of a block.
__device__ void drop_candidates(const TwinLoss& w, int64_t group) {
  uint8_t* candidate = w.kept[0] + group * w.rows;
  int64_t count = 0, lost = 0;
  for (int64_t row = threadIdx.x; row < w.rows; row += blockDim.x) {
    if (!candidate[row]) continue;
    ++count;
    lost += w.sample_ids[group * w.id_group_stride + row * w.id_row_stride] == 0;
  }
  Border border[1] = {{1, block_sum(count) - block_sum(lost)}};
  for (int64_t first = 0; first < w.rows; first += blockDim.x) {
    int64_t row = first + threadIdx.x;
    uint32_t key[1] = {row < w.rows && candidate[row] ? 1u : 2u};
    bool stays[1];
    keep_in_order(key, border, stays);
    if (row < w.rows) candidate[row] = stays[0];
  }
}

// Rows [begin, end): which train the networks, their coefficients, and this thread's share of the losses.
__device__ void settle_rows(const TwinSource& source, int64_t group, int64_t begin, int64_t end, const Choice& choice,
                            Border (&borders)[2], double (&totals)[2]) {
  const TwinTask& task = source.task;
  const TwinLoss& w = task.loss;
  int64_t all = w.groups * w.rows;
  float share = float(1.0 / choice.divisor);
#pragma unroll 1
  for (int64_t first = begin; first < end; first += blockDim.x) {
    int64_t row = first + threadIdx.x, at = group * w.rows + row;
    uint32_t keys[2] = {kNoCandidate, kNoCandidate};
    if (row < end) source.keys(group, row, keys);
    bool chosen[2];
    keep_in_order(keys, borders, chosen);
    if (row >= end) continue;
    float losses[2], coefficient = share;
    source.losses(at, losses);
    if (task.weighs) {
      int64_t label = w.labels[group * w.label_group_stride + row * w.label_row_stride];
      bool is_class = label >= 0 && label < w.classes;
      int count = is_class ? task.class_counts[group * w.classes + label] : 1;
      coefficient = float(double(w.rows) / (double(w.classes) * count) / choice.divisor);
    }
#pragma unroll
    for (int network = 0; network < 2; ++network) {
      bool kept = chosen[1 - network];
      w.kept[network][at] = kept;
      w.coefficients[network * all + at] = kept ? coefficient : 0.f;
      if (kept) totals[network] += double(coefficient) * losses[network];
    }
  }
}

// A group of at most kOneBlock rows, by one block.
__device__ void settle(const TwinSource& source, int64_t group) {
  const TwinLoss& w = source.task.loss;
  if (w.sample_ids) drop_candidates(w, group);
  uint32_t* keys = dynamic_shared<uint32_t>();
  int rows = int(w.rows), candidates = 0;
  for (int row = threadIdx.x; row < rows; row += blockDim.x) {
    uint32_t own[2];
    source.keys(group, row, own);
    keys[row] = own[0], keys[rows + row] = own[1];
    candidates += own[0] != kNoCandidate;
  }
  candidates = block_sum(candidates);
  Choice choice = source.choice(group, candidates);
  Border borders[2] = {choice.border, choice.border};
  if (choice.searches) search(keys, rows, choice.k, borders);
  double totals[2] = {};
  settle_rows(source, group, 0, rows, choice, borders, totals);
#pragma unroll
  for (int network = 0; network < 2; ++network) {
    double total = block_sum(totals[network]);
    if (threadIdx.x == 0) w.losses[network][group] = choice.undefined ? kNotANumber : float(total);
  }
}

// The grid's x runs over rows, its y over groups.
template <class T, int kWidth>
__global__ void __launch_bounds__(1024) twin_kernel(const __grid_constant__ TwinSource source) {
  const TwinTask& task = source.task;
  int64_t rows = task.loss.rows, step = int64_t(gridDim.x) * blockDim.x / kWidth;
  for (int64_t group = blockIdx.y; group < task.loss.groups; group += gridDim.y) {
    // 1. Every row on its own.
    int64_t own = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWidth;
    for (int64_t first = own / (32 / kWidth) * (32 / kWidth); first < rows; first += step, own += step)
      measure_row<kWidth, T>(task, group, own < rows ? own : rows - 1, own < rows);
    // 2. The group as a whole.
    if (!task.settles) continue;
    if (gridDim.x == 1)
      __syncthreads();
    else if (!comes_last(task.tickets + group))
      continue;
    settle(source, group);
  }
}

__global__ void __launch_bounds__(1024) drop_kernel(const __grid_constant__ TwinLoss loss) {
  for (int64_t group = blockIdx.y; group < loss.groups; group += gridDim.y) drop_candidates(loss, group);
}

// The grid's x runs over tiles.
__global__ void __launch_bounds__(kTileThreads, 3)
    settle_kernel(const __grid_constant__ TwinSource source, const __grid_constant__ Survey survey) {
  const TwinTask& task = source.task;
  const TwinLoss& w = task.loss;
  for (int64_t group = blockIdx.y; group < w.groups; group += gridDim.y) {
    // 1. Where the borders are.
    Choice choice = source.choice(group, int64_t(survey.candidates[group]));
    Border borders[2] = {choice.border, choice.border};
    Tile tile(w.rows);
    if (choice.searches)
      recall(survey, group, kPasses, choice.k, borders);
    else
      borders[0].ties -= tile.begin, borders[1].ties -= tile.begin;
    // 2. The rows of this tile.
    double totals[2] = {};
    settle_rows(source, group, tile.begin, tile.end, choice, borders, totals);
    double* tile_losses = task.tile_losses + group * 2 * gridDim.x;
#pragma unroll
    for (int network = 0; network < 2; ++network) {
      double total = block_sum(totals[network]);
      if (threadIdx.x == 0) tile_losses[network * gridDim.x + blockIdx.x] = total;
    }
    // 3. All tiles' losses.
    if (!comes_last(task.tickets + group)) continue;
#pragma unroll
    for (int network = 0; network < 2; ++network) {
      double total = 0;
      for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) total += tile_losses[network * gridDim.x + i];
      total = block_sum(total);
      if (threadIdx.x == 0) w.losses[network][group] = choice.undefined ? kNotANumber : float(total);
    }
  }
}

struct BackwardTask {
  TwinLossBackward backward;
  bool of_probabilities, joint;
};

// The grid's x runs over rows, its y over groups.
template <class T, int kWidth>
__global__ void __launch_bounds__(kBackwardThreads, 3) backward_kernel(const __grid_constant__ BackwardTask task) {
  const TwinLossBackward& b = task.backward;
  const TwinLoss& w = b.forward;
  int64_t all = w.groups * w.rows, step = int64_t(gridDim.x) * blockDim.x / kWidth;
  int classes = int(w.classes);
  for (int64_t group = blockIdx.y; group < w.groups; group += gridDim.y) {
    for (int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWidth; row < w.rows; row += step) {
      // 1. Where its gradients go, and the gradient by its loss.
      int64_t at = group * w.rows + row;
      auto gradient = [&](int network) {
        T* rows = static_cast<T*>(b.gradients[network]);
        return rows ? rows + at * classes : nullptr;
      };
      int64_t label = w.labels[group * w.label_group_stride + row * w.label_row_stride];
      bool is_class = label >= 0 && label < classes;
      auto scale = [&](int network, float coefficient) {
        return is_class ? coefficient * b.upstream[network][group * b.upstream_stride[network]] : kNotANumber;
      };
      // 2. Gradients by the logits, nothing but zeros if it was rejected.
      if (task.joint) {  // of one mind about every row
        float coefficient = w.coefficients[at];
        T *first = gradient(0), *second = gradient(1);
        if (coefficient != 0.f) {
          differentiate_joint<kWidth>(w, group, row, int(label), scale(0, coefficient), w.stats[at], w.stats[all + at],
                                      first, second);
        } else {
          if (first) fill_zeros<kWidth>(first, classes);
          if (second) fill_zeros<kWidth>(second, classes);
        }
        continue;
      }
#pragma unroll 1
      for (int network = 0; network < 2; ++network) {
        T* out = gradient(network);
        if (!out) continue;
        float coefficient = w.coefficients[network * all + at];
        if (coefficient != 0.f)
          differentiate_row<kWidth>(w, network, task.of_probabilities, group, row, int(label),
                                    scale(network, coefficient), w.stats[network * all + at], out);
        else
          fill_zeros<kWidth>(out, classes);
      }
    }
  }
}

bool few(const TwinLoss& w) { return w.classes <= 16; }  // half a warp reads a row

struct TwinPlan {
  TwinTask task{};
  Survey survey{};
  int64_t blocks, zeroed, used;  // blocks: for the rows of a group
  unsigned threads;

  TwinPlan(const TwinLoss& w, void* scratch) {
    int64_t width = few(w) ? 16 : 32, work = ceil_div(w.rows * width, 32) * (4 + ceil_div(w.classes, width));
    bool alone = w.rows <= kOneBlock && (w.groups >= kAloneGroups || work <= kAloneWork);
    threads = threads_for(w.rows * width, alone ? 1024 : 256);
    blocks = alone ? 1 : std::min<int64_t>(ceil_div(w.rows * width, threads), 1 << 20);
    task.loss = w;
    task.of_probabilities = w.of_probabilities(), task.looks_at_disagreement = w.looks_at_disagreement();
    task.joint = w.method == TwinMethod::jocor, task.weighs = w.released && w.method == TwinMethod::decoupling;
    task.settles = w.rows <= kOneBlock;
    survey.rows = w.rows;
    Arena arena(scratch);
    if (!alone) task.tickets = arena.take<unsigned>(w.groups);
    if (task.weighs) task.class_counts = arena.take<int>(w.groups * w.classes);
    if (!task.settles) survey.take_zeroed(arena, w.groups, 2);
    zeroed = arena.used();
    if (!task.settles) {
      survey.take_others(arena, w.groups, 2);
      task.tile_losses = arena.take<double>(w.groups * 2 * survey.tiles());
    }
    used = arena.used();
  }
};

template <class T, int kWidth>
int run(const TwinPlan& plan, void* stream) {
  size_t shared = plan.task.settles ? 2 * plan.task.loss.rows * sizeof(uint32_t) : 0;
  return launch(twin_kernel<T, kWidth>, grid_of(plan.blocks, plan.task.loss.groups), dim3(plan.threads), shared, stream,
                TwinSource{plan.task});
}

template <class T, int kWidth>
int run(const BackwardTask& task, void* stream) {
  const TwinLoss& w = task.backward.forward;
  unsigned threads = threads_for(w.rows * kWidth, kBackwardThreads);
  int64_t blocks = std::min<int64_t>(ceil_div(w.rows * kWidth, threads), 1 << 20);
  return launch(backward_kernel<T, kWidth>, grid_of(blocks, w.groups), dim3(threads), 0, stream, task);
}

template <class Task>
int run(const Task& task, const TwinLoss& w, void* stream) {
  switch (w.dtype) {
    case Dtype::float32: return few(w) ? run<float, 16>(task, stream) : run<float, 32>(task, stream);
    case Dtype::bfloat16: return few(w) ? run<__nv_bfloat16, 16>(task, stream) : run<__nv_bfloat16, 32>(task, stream);
    default: return few(w) ? run<__half, 16>(task, stream) : run<__half, 32>(task, stream);
  }
}

}  // namespace

int64_t twin_scratch_bytes(const TwinLoss& loss) { return TwinPlan(loss, nullptr).used; }

int twin_loss(const TwinLoss& loss, void* scratch, void* stream) {
  TwinPlan plan(loss, scratch);
  TwinSource source{plan.task};
  // 1. Rows, and all of it where the groups are small.
  if (int error = zero(scratch, plan.zeroed, stream)) return error;
  if (int error = run(plan, loss, stream)) return error;
  if (plan.task.settles) return 0;
  // 2. Candidates, and the borders among them. Decoupling takes all candidates: only their number is wanted.
  dim3 tiles = grid_of(plan.survey.tiles(), loss.groups);
  if (loss.sample_ids)
    if (int error = launch(drop_kernel, grid_of(1, loss.groups), dim3(1024), 0, stream, loss)) return error;
  int passes = loss.method == TwinMethod::decoupling ? 1 : kPasses;
  if (int error = count_all(source, plan.survey, loss.groups, passes, stream)) return error;
  // 3. Masks, coefficients, losses.
  return launch(settle_kernel, tiles, dim3(kTileThreads), 0, stream, source, plan.survey);
}

int twin_loss_backward(const TwinLossBackward& backward, void* stream) {
  BackwardTask task{backward, backward.forward.of_probabilities(), backward.forward.method == TwinMethod::jocor};
  return run(task, backward.forward, stream);
}

}  // namespace perfvl::cuda
