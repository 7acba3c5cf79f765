// perfvl's CUDA kernels and the emulator's own test kernels, on numpy arrays.
#include "condition.h"
#include "cuda/conditioning.h"
#include "cuda/gan_loss.h"
#include "cuda/key_queue.h"
#include "cuda/momentum_update.h"
#include "cuda/scale_rows.h"
#include "cuda/small_loss.h"
#include "cuda/upsample_conv.h"
#include "cuda_emulator.h"
#include "depthwise.h"
#include "emulator_kernels.h"
#include "heads.h"
#include "in_place.h"
#include "selection.h"

namespace {

using namespace native_tests;
namespace ek = emulator_kernels;

py::array scale_rows(const py::array& rows, const py::array& scale, const py::dtype& dtype, int64_t row_shift,
                     int64_t scale_shift) {
  GuardedInput from(rows, row_shift), factors(scale, scale_shift);
  Dtype out_dtype = dtype_of(dtype);
  Guarded out(rows.size() * item_size(out_dtype));
  expect_success(perfvl::cuda::scale_rows(from.matrix(), factors.data<float>(), scale.strides(0) / 4, out_dtype,
                                          out.data(), nullptr));
  return out.array(dtype, {rows.shape(0), rows.shape(1)}, "out");
}

py::object upsample_weight(const py::array& weight, const Optional& scale, bool channels_last) {
  Inputs inputs;
  Result kernel(weight.dtype(), channels_last, weight.shape(1), weight.shape(0), 4, 4);
  const float* factors = scale ? inputs.add(*scale).data<float>() : nullptr;
  expect_success(perfvl::cuda::upsample_weight(image(inputs.add(weight), dtype_of(weight.dtype())), factors,
                                               weight.shape(0), weight.shape(1), kernel.image(), nullptr));
  return kernel.array("kernel");
}

py::object upsample_weight_backward(const py::array& grad_kernel, bool channels_last) {
  Inputs inputs;
  int64_t outputs = grad_kernel.shape(1), channels = grad_kernel.shape(0);
  Result grad(grad_kernel.dtype(), channels_last, outputs, channels, 3, 3);
  expect_success(perfvl::cuda::upsample_weight_backward(image(inputs.add(grad_kernel), dtype_of(grad_kernel.dtype())),
                                                        outputs, channels, grad.image(), nullptr));
  return grad.array("grad_weight");
}

py::array add_taps(const py::array& x, const py::array& taps, bool channels_last) {
  return with_taps(x, taps, channels_last,
                   [](const perfvl::AddTaps& problem) { expect_success(perfvl::cuda::add_taps(problem, nullptr)); });
}

py::array tap_sums(const py::array& grad) {
  return sums_of_taps(grad,
                      [](const perfvl::TapSums& problem) { expect_success(perfvl::cuda::tap_sums(problem, nullptr)); });
}

py::tuple augment(const py::array& projected, const py::array& eps, int activation) {
  return augmented(projected, eps, activation, [](const perfvl::Augmentation& problem) {
    with_scratch(perfvl::cuda::augment_scratch_bytes(problem),
                 [&](void* scratch) { expect_success(perfvl::cuda::augment(problem, scratch, nullptr)); });
  });
}

py::array augment_backward(const std::array<Optional, 4>& upstream, const py::array& mu, const py::array& logvar,
                           const py::array& eps, const Optional& projected, int activation) {
  return differentiate_augmentation(upstream, mu, logvar, eps, projected, activation,
                                    [](const perfvl::AugmentationBackward& problem) {
                                      expect_success(perfvl::cuda::augment_backward(problem, nullptr));
                                    });
}

py::tuple gan_loss(const std::vector<py::array>& logits, const std::vector<double>& targets,
                   const std::vector<double>& weights, bool exact, bool with_grad) {
  return lose_heads(logits, targets, weights, exact, with_grad,
                    [](const perfvl::GanLoss& loss) { expect_success(perfvl::cuda::gan_loss(loss, nullptr)); });
}

void momentum_update(const Arrays& targets, const Arrays& sources, const Arrays& copies, double momentum,
                     const std::optional<py::array>& tensor, bool convex, std::array<int64_t, 3> offsets) {
  update_momentum(targets, sources, copies, momentum, tensor, convex, offsets, [](auto& pairs, auto& weights) {
    expect_success(perfvl::cuda::momentum_update(pairs.data(), int64_t(pairs.size()), weights, nullptr));
  });
}

void key_queue(const py::array& ring, const py::array& cursor, const py::array& keys,
               const std::optional<py::array>& valid, const std::optional<py::array>& mask, const Arrays& payload_rings,
               const Arrays& payloads, bool normalize, bool drop_tail, int64_t ring_offset, int64_t key_offset) {
  write_ring(ring, cursor, keys, valid, mask, payload_rings, payloads, normalize, drop_tail, ring_offset, key_offset,
             [](const perfvl::RingWrite& write) { expect_success(perfvl::cuda::key_queue(write, nullptr)); });
}

py::array small_loss_mask(const py::array& losses, double keep_rate, const Optional& keep_rates,
                          const Optional& candidates) {
  return select_smallest(losses, keep_rate, keep_rates, candidates, [](const perfvl::SmallLossMask& m) {
    with_scratch(perfvl::cuda::mask_scratch_bytes(m),
                 [&](void* scratch) { expect_success(perfvl::cuda::small_loss_mask(m, scratch, nullptr)); });
  });
}

py::dict twin_loss(const py::array& logits1, const py::array& logits2, const py::array& labels, int method,
                   bool released, double parameter, double forget_rate, const Optional& forget_rates, int64_t step,
                   const Optional& step_tensor, const Optional& sample_ids) {
  return lose_twice(logits1, logits2, labels, {method, released, parameter}, forget_rate, forget_rates, step,
                    step_tensor, sample_ids, [](const perfvl::TwinLoss& w) {
                      with_scratch(perfvl::cuda::twin_scratch_bytes(w), [&](void* scratch) {
                        expect_success(perfvl::cuda::twin_loss(w, scratch, nullptr));
                      });
                    });
}

py::tuple twin_loss_backward(const Optional& logits1, const Optional& logits2, const py::array& labels,
                             const py::array& coefficients, const py::array& stats, const Optional& upstream1,
                             const Optional& upstream2, std::array<bool, 2> needed, int method, bool released,
                             double parameter) {
  return differentiate_twins(
      logits1, logits2, labels, coefficients, stats, upstream1, upstream2, needed, {method, released, parameter},
      [](const perfvl::TwinLossBackward& b) { expect_success(perfvl::cuda::twin_loss_backward(b, nullptr)); });
}

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

// Runs f(in, n, out) from guarded memory to guarded memory.
template <class F>
py::array map_floats(const Floats& in, int64_t count, F f) {
  GuardedInput from(in);
  Guarded out(count * 4);
  expect_success(f(from.data<float>(), in.size(), out.data<float>()));
  return out.array(py::dtype::of<float>(), {count}, "out");
}

template <class F>
py::array make_ints(int64_t count, F f) {
  Guarded out(count * 4);
  expect_success(f(out.data<int>()));
  return out.array(py::dtype::of<int>(), {count}, "out");
}

}  // namespace

PYBIND11_MODULE(native_cuda, m) {
  m.def("set_order", [](bool reverse) { cuda_emulator::reverse = reverse; });
  m.def("set_grid_limit", [](unsigned blocks) { cuda_emulator::grid_limit = blocks; });

  m.def("launches", [] { return cuda_emulator::launches; });
  m.def("last_launch", [] {
    return py::make_tuple(py::make_tuple(gridDim.x, gridDim.y, gridDim.z),
                          py::make_tuple(blockDim.x, blockDim.y, blockDim.z));
  });

  m.def("scale_rows", scale_rows, py::arg("rows"), py::arg("scale"), py::arg("dtype"), py::arg("row_shift") = 0,
        py::arg("scale_shift") = 0);

  m.def("add_taps", add_taps);
  m.def("tap_sums", tap_sums);
  m.def("augment", augment);
  m.def("augment_backward", augment_backward);

  m.def("upsample_weight", upsample_weight);
  m.def("upsample_weight_backward", upsample_weight_backward);

  m.def("gan_loss", gan_loss, py::arg("logits"), py::arg("targets"), py::arg("weights"), py::arg("exact"),
        py::arg("with_grad") = true);

  m.def("momentum_update", momentum_update, py::arg("targets"), py::arg("sources"), py::arg("copies") = Arrays(),
        py::kw_only(), py::arg("momentum") = 0.0, py::arg("tensor") = py::none(), py::arg("convex") = false,
        py::arg("offsets") = std::array<int64_t, 3>{-1, -1, -1});
  m.def("key_queue", key_queue, py::arg("ring"), py::arg("cursor"), py::arg("keys"), py::kw_only(),
        py::arg("valid") = py::none(), py::arg("mask") = py::none(), py::arg("payload_rings") = Arrays(),
        py::arg("payloads") = Arrays(), py::arg("normalize") = false, py::arg("drop_tail") = false,
        py::arg("ring_offset") = -1, py::arg("key_offset") = -1);

  m.def("small_loss_mask", small_loss_mask, py::arg("losses"), py::arg("keep_rate"), py::kw_only(),
        py::arg("keep_rates") = py::none(), py::arg("candidates") = py::none());
  m.def("twin_loss", twin_loss, py::arg("logits1"), py::arg("logits2"), py::arg("labels"), py::arg("method"),
        py::arg("released"), py::arg("parameter"), py::kw_only(), py::arg("forget_rate") = 0.0,
        py::arg("forget_rates") = py::none(), py::arg("step") = 0, py::arg("step_tensor") = py::none(),
        py::arg("sample_ids") = py::none());
  m.def("twin_loss_backward", twin_loss_backward, py::arg("logits1"), py::arg("logits2"), py::arg("labels"),
        py::arg("coefficients"), py::arg("stats"), py::arg("upstream1"), py::arg("upstream2"), py::arg("needed"),
        py::arg("method"), py::arg("released"), py::arg("parameter"));

  m.def("depthwise_conv", depthwise_conv, py::arg("input"), py::arg("weight"), py::kw_only(),
        py::arg("scale") = py::none(), py::arg("shift") = py::none(), py::arg("bias") = py::none(), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("pre") = 0, py::arg("post") = 0,
        py::arg("statistics") = false);
  m.def("depthwise_conv_backward", depthwise_conv_backward, py::arg("grad_output"), py::arg("input"), py::arg("weight"),
        py::kw_only(), py::arg("scale") = py::none(), py::arg("shift") = py::none(), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("pre") = 0,
        py::arg("needed") = std::array<bool, 3>{true, true, true});

  m.def("block_sums", [](const Floats& in, int blocks, int threads) {
    return map_floats(in, blocks, [=](const float* from, int64_t n, float* out) {
      return ek::block_sums(from, n, out, blocks, threads);
    });
  });
  m.def("reversed", [](const Floats& in, bool barrier) {
    return map_floats(in, in.size(), [=](const float* from, int64_t n, float* out) {
      return ek::reversed(from, int(n), out, barrier);
    });
  });
  m.def("shared_at_start", [](int blocks) {
    return map_floats(Floats(0), 2 * blocks,
                      [=](const float*, int64_t, float* out) { return ek::shared_at_start(out, blocks); });
  });
  m.def("kept_positive", [](const Floats& in) {
    int count = 0;
    py::array out = map_floats(
        in, 32, [&](const float* from, int64_t n, float* to) { return ek::kept_positive(from, int(n), to, &count); });
    return py::make_tuple(out, count);
  });
  m.def("scaled_by_four", [](const Floats& in) {
    return map_floats(in, in.size(),
                      [](const float* from, int64_t n, float* out) { return ek::scaled_by_four(from, int(n), out); });
  });
  m.def("misaligned_vector", [](const Floats& in) {
    return map_floats(in, 4, [](const float* from, int64_t, float* out) { return ek::misaligned_vector(from, out); });
  });
  m.def("shuffles", [] { return make_ints(5 * 32, ek::shuffles); });
  m.def("two_groups", [] { return make_ints(32, ek::two_groups); });
  m.def("to_half_and_back", [](const Floats& in) {
    int64_t n = in.size();
    GuardedInput from(in);
    Guarded half(2 * n), bfloat(2 * n), from_half(4 * n), from_bfloat(4 * n);
    expect_success(ek::to_half_and_back(from.data<float>(), int(n), half.data<uint16_t>(), bfloat.data<uint16_t>(),
                                        from_half.data<float>(), from_bfloat.data<float>()));
    return py::make_tuple(half.array(py::dtype("e"), {n}, "half"),
                          bfloat.array(py::dtype::of<uint16_t>(), {n}, "bfloat"),
                          from_half.array(py::dtype::of<float>(), {n}, "from_half"),
                          from_bfloat.array(py::dtype::of<float>(), {n}, "from_bfloat"));
  });
  m.def("barrier_in_a_branch", ek::barrier_in_a_branch);
  m.def("different_barriers", ek::different_barriers);
  m.def("shuffle_without_everybody", ek::shuffle_without_everybody);
  m.def("shuffle_from_outside_the_mask", ek::shuffle_from_outside_the_mask);
  m.def("one_past_shared", ek::one_past_shared);
  m.def("launch_only", ek::launch_only);
}
