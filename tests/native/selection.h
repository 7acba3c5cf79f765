// The small_loss kernels on numpy arrays in guarded memory: what is the same for the CPU and for CUDA.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <deque>
#include <optional>
#include <vector>

#include "guarded.h"
#include "small_loss.h"

namespace native_tests {

// A numpy array of any number of dimensions, element by element in guarded memory; NaN between the elements.
class GuardedArray {
 public:
  explicit GuardedArray(const py::array& a) : memory_(span(a)), array_(a) { copy(0, 0); }
  template <class T>
  const T* data() const {
    return memory_.data<const T>();
  }
  int64_t stride(int axis) const { return array_.strides(axis) / array_.itemsize(); }

 private:
  void copy(int axis, int64_t at) {
    if (axis == array_.ndim())
      return void(std::memcpy(memory_.data<char>() + at, static_cast<const char*>(array_.data()) + at,
                              size_t(array_.itemsize())));
    for (int64_t i = 0; i < array_.shape(axis); ++i) copy(axis + 1, at + i * array_.strides(axis));
  }

  Guarded memory_;
  py::array array_;
};

using Optional = std::optional<py::array>;

// Copies of the inputs of one call, alive as long as this.
class Inputs {
 public:
  const GuardedArray& add(const py::array& a) { return arrays_.emplace_back(a); }
  perfvl::Scalars scalars(double value, const Optional& a) {
    if (!a) return {value, nullptr, 0, false};
    const GuardedArray& numbers = add(*a);
    return {value, numbers.data<void>(), a->size() == 1 ? 0 : numbers.stride(0), a->itemsize() == 8};
  }
  perfvl::Logits logits(const Optional& a) {
    if (!a) return {};
    const GuardedArray& z = add(*a);
    return {z.data<void>(), z.stride(0), z.stride(1), z.stride(2)};
  }

 private:
  std::deque<GuardedArray> arrays_;
};

// On memory of exactly as many bytes as are asked for.
template <class Run>
void with_scratch(int64_t bytes, Run run) {
  Guarded scratch(bytes);
  if (bytes % 64) throw std::runtime_error("scratch is not a multiple of 64 bytes");
  run(scratch.data());
  scratch.check("scratch");
}

// [groups, rows] of 0 and 1. `run(mask)` on losses[groups, rows].
template <class Run>
py::array select_smallest(const py::array& losses, double keep_rate, const Optional& keep_rates,
                          const Optional& candidates, Run run) {
  Inputs inputs;
  const GuardedArray& from = inputs.add(losses);
  int64_t groups = losses.shape(0), rows = losses.shape(1);
  Guarded mask(groups * rows);
  perfvl::SmallLossMask m{};
  m.losses = from.data<void>(), m.dtype = dtype_of(losses.dtype());
  m.groups = groups, m.rows = rows, m.group_stride = from.stride(0), m.row_stride = from.stride(1);
  m.keep_rate = inputs.scalars(keep_rate, keep_rates);
  if (candidates) {
    const GuardedArray& counted = inputs.add(*candidates);
    m.candidates = counted.data<uint8_t>();
    m.candidate_group_stride = counted.stride(0), m.candidate_row_stride = counted.stride(1);
  }
  m.mask = mask.data<uint8_t>();
  run(m);
  return mask.array(py::dtype::of<uint8_t>(), {groups, rows}, "mask");
}

// How the losses are put together. Everything has groups, if only one.
struct Twins {
  int method = 0;
  bool released = false;
  double parameter = 0.0;  // co_lambda or least_fraction
};

inline perfvl::TwinLoss twin_arguments(Inputs& inputs, const Optional& logits1, const Optional& logits2,
                                       const py::array& labels, const Twins& twins) {
  const py::array& shape = logits1 ? *logits1 : *logits2;
  perfvl::TwinLoss w{};
  w.groups = shape.shape(0), w.rows = shape.shape(1), w.classes = shape.shape(2);
  w.dtype = dtype_of(shape.dtype());
  w.logits[0] = inputs.logits(logits1), w.logits[1] = inputs.logits(logits2);
  const GuardedArray& own = inputs.add(labels);
  w.labels = own.data<int64_t>(), w.label_group_stride = own.stride(0), w.label_row_stride = own.stride(1);
  w.method = perfvl::TwinMethod(twins.method), w.released = twins.released;
  w.co_lambda = float(twins.parameter), w.least_fraction = twins.parameter;
  return w;
}

// {losses[2, groups], kept[2, groups, rows], coefficients[2, groups, rows], stats[2, groups, rows, 3]}, by `run(w)`.
template <class Run>
py::dict lose_twice(const py::array& logits1, const py::array& logits2, const py::array& labels, const Twins& twins,
                    double forget_rate, const Optional& forget_rates, int64_t step, const Optional& step_tensor,
                    const Optional& sample_ids, Run run) {
  Inputs inputs;
  perfvl::TwinLoss w = twin_arguments(inputs, logits1, logits2, labels, twins);
  w.forget_rate = inputs.scalars(forget_rate, forget_rates);
  w.step = step, w.step_tensor = step_tensor ? inputs.add(*step_tensor).data<int64_t>() : nullptr;
  if (sample_ids) {
    const GuardedArray& ids = inputs.add(*sample_ids);
    w.sample_ids = ids.data<int64_t>(), w.id_group_stride = ids.stride(0), w.id_row_stride = ids.stride(1);
  }
  int64_t all = w.groups * w.rows;
  Guarded losses[2]{Guarded(4 * w.groups), Guarded(4 * w.groups)}, kept[2]{Guarded(all), Guarded(all)};
  Guarded coefficients(8 * all), stats(24 * all);
  for (int i = 0; i < 2; ++i) w.losses[i] = losses[i].data<float>(), w.kept[i] = kept[i].data<uint8_t>();
  w.coefficients = coefficients.data<float>(), w.stats = stats.data<perfvl::RowStats>();
  run(w);
  py::dict out;
  py::dtype floats = py::dtype::of<float>(), bytes = py::dtype::of<uint8_t>();
  out["losses"] =
      py::make_tuple(losses[0].array(floats, {w.groups}, "losses"), losses[1].array(floats, {w.groups}, "losses"));
  out["kept"] = py::make_tuple(kept[0].array(bytes, {w.groups, w.rows}, "kept"),
                               kept[1].array(bytes, {w.groups, w.rows}, "kept"));
  out["coefficients"] = coefficients.array(floats, {2, w.groups, w.rows}, "coefficients");
  out["stats"] = stats.array(floats, {2, w.groups, w.rows, 3}, "stats");
  return out;
}

// The two gradients, None where no upstream gradient is given (JoCoR: where it is not `needed`), by `run(backward)`.
template <class Run>
py::tuple differentiate_twins(const Optional& logits1, const Optional& logits2, const py::array& labels,
                              const py::array& coefficients, const py::array& stats, const Optional& upstream1,
                              const Optional& upstream2, std::array<bool, 2> needed, const Twins& twins, Run run) {
  Inputs inputs;
  perfvl::TwinLossBackward b{};
  b.forward = twin_arguments(inputs, logits1, logits2, labels, twins);
  b.forward.coefficients = const_cast<float*>(inputs.add(coefficients).data<float>());
  b.forward.stats = const_cast<perfvl::RowStats*>(inputs.add(stats).data<perfvl::RowStats>());
  const Optional* upstreams[] = {&upstream1, &upstream2};
  const py::array& shape = logits1 ? *logits1 : *logits2;
  std::deque<Guarded> memory;
  for (int i = 0; i < 2; ++i) {
    if (const Optional& upstream = *upstreams[i]) {
      const GuardedArray& own = inputs.add(*upstream);
      b.upstream[i] = own.data<float>(), b.upstream_stride[i] = own.stride(0);
    }
    if (needed[size_t(i)]) b.gradients[i] = memory.emplace_back(shape.size() * shape.itemsize()).data();
  }
  run(b);
  py::tuple out(2);
  size_t next = 0;
  for (size_t i = 0; i < 2; ++i)
    out[i] = needed[i] ? py::object(memory[next++].array(shape.dtype(),
                                                         {shape.shape(0), shape.shape(1), shape.shape(2)}, "gradient"))
                       : py::object(py::none());
  return out;
}

}  // namespace native_tests
