// The CPU kernels of every ISA level on numpy arrays, with a host that is as plain as can be.
#include <thread>

#include "color.h"
#include "condition.h"
#include "convolution.h"
#include "cpu/isa.h"
#include "heads.h"
#include "in_place.h"
#include "norms.h"
#include "pools.h"
#include "selection.h"
#include "units.h"

namespace {

using namespace native_tests;
using namespace perfvl;

struct Schedule {
  int64_t threads;
  bool reverse;  // last index first: a result that depends on the order of tasks changes
};

Schedule schedule{1, false};

void parallel_for(int64_t n, void* state, void (*body)(void*, int64_t)) {
  Schedule s = schedule;
  auto work = [=](int64_t worker) {
    for (int64_t i = worker; i < n; i += s.threads) body(state, s.reverse ? n - 1 - i : i);
  };
  std::vector<std::thread> others;
  for (int64_t worker = 1; worker < std::min(s.threads, n); ++worker) others.emplace_back(work, worker);
  work(0);
  for (std::thread& thread : others) thread.join();
}

// Four columns at a time, so that the compiler need not: any strides, sums in float64. Left to the guard pages, for
// under the sanitizers it would take nearly all of the time.
[[gnu::no_sanitize("address", "undefined"), gnu::optimize("O2")]]
void gemm(void*, int64_t m, int64_t n, int64_t k, Operand a, Operand b, float* c, int64_t c_stride, bool accumulate) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; j += 4) {
      double sums[4] = {};
      int64_t width = std::min<int64_t>(4, n - j);
      for (int64_t t = 0; t < k; ++t) {
        double left = a.data[i * a.row_stride + t * a.col_stride];
        const float* right = b.data + t * b.row_stride + j * b.col_stride;
        for (int64_t w = 0; w < width; ++w) sums[w] += left * right[w * b.col_stride];
      }
      float* out = c + i * c_stride + j;
      for (int64_t w = 0; w < width; ++w) out[w] = float(sums[w] + (accumulate ? out[w] : 0.f));
    }
  }
}

const Level& level_named(const std::string& name) {
  const Level* found = find_level(name.c_str());
  if (!found) throw std::invalid_argument("this machine has no level " + name);
  return *found;
}

Host host(int64_t threads, bool reverse) {
  schedule = {threads, reverse};
  return {nullptr, threads, parallel_for, gemm};
}

py::dict info_nce(const std::string& level, const py::array& query, const py::array& positive, const py::array& queue,
                  double scale, bool bfloat16_products, double row_factor, bool with_rank, bool with_grad,
                  int64_t threads, bool reverse) {
  const Level* found = &level_named(level);
  GuardedInput queries(query), positives(positive), keys(queue);
  int64_t rows = query.shape(0), dim = query.shape(1), graded = with_grad ? rows : 0;
  Guarded loss(4 * rows), lse(4 * rows), positive_logit(4 * rows), rank(with_rank ? 4 * rows : 0);
  Guarded grad_query(4 * graded * dim), positive_weight(4 * graded);

  InfoNceArgs args{};
  args.query = queries.matrix(), args.positive = positives.matrix(), args.queue = keys.matrix();
  args.scale = float(scale), args.row_factor = float(row_factor), args.bfloat16_products = bfloat16_products;
  args.loss = loss.data<float>(), args.lse = lse.data<float>(), args.positive_logit = positive_logit.data<float>();
  if (with_rank) args.rank = rank.data<int32_t>();
  if (with_grad) args.grad_query = grad_query.data<float>(), args.positive_weight = positive_weight.data<float>();
  args.host = host(threads, reverse);

  Guarded scratch(found->info_nce->scratch_bytes(args));
  if (reinterpret_cast<uintptr_t>(scratch.data()) % 64)
    throw std::runtime_error("scratch is not a multiple of 64 bytes");
  found->info_nce->run(args, scratch.data());
  scratch.check("scratch");

  py::dict out;
  py::dtype floats = py::dtype::of<float>();
  out["loss"] = loss.array(floats, {rows}, "loss");
  out["lse"] = lse.array(floats, {rows}, "lse");
  out["positive_logit"] = positive_logit.array(floats, {rows}, "positive_logit");
  if (with_rank) out["rank"] = rank.array(py::dtype::of<int32_t>(), {rows}, "rank");
  if (with_grad) {
    out["grad_query"] = grad_query.array(floats, {rows, dim}, "grad_query");
    out["positive_weight"] = positive_weight.array(floats, {rows}, "positive_weight");
  }
  return out;
}

py::tuple gan_loss(const std::string& level, const std::vector<py::array>& logits, const std::vector<double>& targets,
                   const std::vector<double>& weights, bool exact, bool with_grad) {
  return lose_heads(logits, targets, weights, exact, with_grad,
                    [&](const GanLoss& loss) { (*level_named(level).gan_loss)(loss); });
}

void momentum_update(const std::string& level, int64_t threads, bool reverse, const Arrays& targets,
                     const Arrays& sources, const Arrays& copies, double momentum,
                     const std::optional<py::array>& tensor, bool convex, std::array<int64_t, 3> offsets) {
  update_momentum(targets, sources, copies, momentum, tensor, convex, offsets, [&](auto& pairs, auto& weights) {
    (*level_named(level).momentum_update)(pairs.data(), int64_t(pairs.size()), weights, host(threads, reverse));
  });
}

void key_queue(const std::string& level, int64_t threads, bool reverse, const py::array& ring, const py::array& cursor,
               const py::array& keys, const std::optional<py::array>& valid, const std::optional<py::array>& mask,
               const Arrays& payload_rings, const Arrays& payloads, bool normalize, bool drop_tail, int64_t ring_offset,
               int64_t key_offset) {
  write_ring(ring, cursor, keys, valid, mask, payload_rings, payloads, normalize, drop_tail, ring_offset, key_offset,
             [&](const RingWrite& write) { (*level_named(level).key_queue)(write, host(threads, reverse)); });
}

py::array small_loss_mask(const std::string& level, int64_t threads, bool reverse, const py::array& losses,
                          double keep_rate, const Optional& keep_rates, const Optional& candidates) {
  const SmallLossKernel& kernel = *level_named(level).small_loss;
  return select_smallest(losses, keep_rate, keep_rates, candidates, [&](const SmallLossMask& m) {
    with_scratch(kernel.mask_scratch_bytes(m), [&](void* scratch) { kernel.mask(m, scratch, host(threads, reverse)); });
  });
}

py::dict twin_loss(const std::string& level, int64_t threads, bool reverse, const py::array& logits1,
                   const py::array& logits2, const py::array& labels, int method, bool released, double parameter,
                   double forget_rate, const Optional& forget_rates, int64_t step, const Optional& step_tensor,
                   const Optional& sample_ids) {
  const SmallLossKernel& kernel = *level_named(level).small_loss;
  return lose_twice(logits1, logits2, labels, {method, released, parameter}, forget_rate, forget_rates, step,
                    step_tensor, sample_ids, [&](const TwinLoss& w) {
                      Host services = host(threads, reverse);
                      with_scratch(kernel.twin_scratch_bytes(w, services), [&](void* scratch) {
                        if (!kernel.twin(w, scratch, services)) throw std::invalid_argument("a label is not a class");
                      });
                    });
}

py::tuple twin_loss_backward(const std::string& level, int64_t threads, bool reverse, const Optional& logits1,
                             const Optional& logits2, const py::array& labels, const py::array& coefficients,
                             const py::array& stats, const Optional& upstream1, const Optional& upstream2,
                             std::array<bool, 2> needed, int method, bool released, double parameter) {
  const SmallLossKernel& kernel = *level_named(level).small_loss;
  return differentiate_twins(logits1, logits2, labels, coefficients, stats, upstream1, upstream2, needed,
                             {method, released, parameter}, [&](const TwinLossBackward& b) {
                               Host services = host(threads, reverse);
                               with_scratch(kernel.backward_scratch_bytes(b, services),
                                            [&](void* scratch) { kernel.backward(b, scratch, services); });
                             });
}

py::tuple separable_conv(const std::string& level, int64_t threads, bool reverse, const py::array& input,
                         const py::array& depthwise, const py::array& pointwise, std::array<int64_t, 2> stride,
                         std::array<int64_t, 4> padding, std::array<int64_t, 2> dilation,
                         std::array<int, 3> activations, const std::array<Optional, 6>& affine,
                         const Optional& residual, bool statistics, bool channels_last) {
  const SeparableConvKernel& kernel = *level_named(level).separable_conv;
  Inputs inputs;
  SeparableConv conv =
      problem(inputs, input, affine[0], affine[1], depthwise, pointwise, {stride, padding, dilation}, activations[0]);
  conv.mid_scale = floats(inputs, affine[2]), conv.mid_shift = floats(inputs, affine[3]);
  conv.output_scale = floats(inputs, affine[4]), conv.output_shift = floats(inputs, affine[5]);
  conv.mid = Activation(activations[1]), conv.post = Activation(activations[2]);
  if (residual) conv.residual = image(inputs.add(*residual), *residual);
  Written output({conv.batch, conv.outputs, conv.h.out, conv.w.out}, dtype_of(input.dtype()), channels_last);
  conv.output = output.image();
  int64_t counted = statistics ? conv.outputs : 0;
  Guarded mean(4 * counted), variance(4 * counted);
  if (statistics) conv.mean = mean.data<float>(), conv.variance = variance.data<float>();
  Host services = host(threads, reverse);
  with_scratch(kernel.scratch_bytes(conv, services), [&](void* scratch) { kernel.run(conv, scratch, services); });
  auto floats32 = py::dtype::of<float>();
  return py::make_tuple(output.array("output"), mean.array(floats32, {counted}, "mean"),
                        variance.array(floats32, {counted}, "variance"));
}

py::dict separable_conv_backward(const std::string& level, int64_t threads, bool reverse, const py::array& grad_output,
                                 const py::array& input, const py::array& depthwise, const py::array& pointwise,
                                 std::array<int64_t, 2> stride, std::array<int64_t, 4> padding,
                                 std::array<int64_t, 2> dilation, int pre, const std::array<Optional, 2>& affine,
                                 const Optional& output, const std::array<Optional, 2>& line,
                                 std::array<bool, 5> needed, bool channels_last) {
  const SeparableConvKernel& kernel = *level_named(level).separable_conv;
  Inputs inputs;
  SeparableConvBackward b{};
  b.forward = problem(inputs, input, affine[0], affine[1], depthwise, pointwise, {stride, padding, dilation}, pre);
  if (output) b.forward.output = image(inputs.add(*output), *output);
  b.grad_output = image(inputs.add(grad_output), grad_output);
  b.slope = floats(inputs, line[0]), b.offset = floats(inputs, line[1]);
  auto shape = [](const py::array& a) {
    return std::array<int64_t, 4>{a.shape(0), a.shape(1), a.shape(2), a.shape(3)};
  };
  Dtype dtype = dtype_of(input.dtype());
  Written grad_input(shape(input), dtype, channels_last, needed[0]);
  Written grad_depthwise(shape(depthwise), dtype, false, needed[2]);
  Written grad_pointwise(shape(pointwise), dtype, false, needed[3]);
  int64_t channels = needed[1] ? b.forward.channels : 0, outputs = needed[4] ? b.forward.outputs : 0;
  Guarded scale(4 * channels), shift(4 * channels), bias(4 * outputs);
  b.grad_input = grad_input.image(), b.grad_depthwise = grad_depthwise.image();
  b.grad_pointwise = grad_pointwise.image();
  if (needed[1]) b.grad_scale = scale.data<float>(), b.grad_shift = shift.data<float>();
  if (needed[4]) b.grad_bias = bias.data<float>();
  Host services = host(threads, reverse);
  with_scratch(kernel.backward_scratch_bytes(b, services),
               [&](void* scratch) { kernel.backward(b, scratch, services); });
  py::dict found;
  auto floats32 = py::dtype::of<float>();
  found["input"] = grad_input.array("input");
  found["scale"] = scale.array(floats32, {channels}, "scale");
  found["shift"] = shift.array(floats32, {channels}, "shift");
  found["depthwise"] = grad_depthwise.array("depthwise");
  found["pointwise"] = grad_pointwise.array("pointwise");
  found["bias"] = bias.array(floats32, {outputs}, "bias");
  return found;
}

UpsampleConv upsampling(Inputs& inputs, const py::array& input, const py::array& weight) {
  UpsampleConv conv{};
  conv.input = image(inputs.add(input), input), conv.weight = image(inputs.add(weight), weight);
  conv.batch = input.shape(0), conv.channels = input.shape(1), conv.outputs = weight.shape(0);
  conv.height = input.shape(2), conv.width = input.shape(3);
  return conv;
}

py::array upsample_conv(const std::string& level, int64_t threads, bool reverse, const py::array& input,
                        const py::array& weight, const Optional& scale, const Optional& shift, int activation,
                        bool channels_last) {
  const UpsampleConvKernel& kernel = *level_named(level).upsample_conv;
  Inputs inputs;
  UpsampleConv conv = upsampling(inputs, input, weight);
  conv.scale = floats(inputs, scale), conv.shift = floats(inputs, shift), conv.activation = Activation(activation);
  Written output({conv.batch, conv.outputs, 2 * conv.height, 2 * conv.width}, dtype_of(input.dtype()), channels_last);
  conv.output = output.image();
  Host services = host(threads, reverse);
  with_scratch(kernel.scratch_bytes(conv, services), [&](void* scratch) { kernel.run(conv, scratch, services); });
  return output.array("output");
}

py::dict upsample_conv_backward(const std::string& level, int64_t threads, bool reverse, const py::array& grad_output,
                                const py::array& input, const py::array& weight, std::array<bool, 3> needed,
                                bool channels_last) {
  const UpsampleConvKernel& kernel = *level_named(level).upsample_conv;
  Inputs inputs;
  UpsampleConvBackward b{};
  b.forward = upsampling(inputs, input, weight);
  const UpsampleConv& conv = b.forward;
  b.grad_output = image(inputs.add(grad_output), grad_output);
  Dtype dtype = dtype_of(input.dtype());
  Written grad_input({conv.batch, conv.channels, conv.height, conv.width}, dtype, channels_last, needed[0]);
  Written grad_weight({conv.outputs, conv.channels, 3, 3}, dtype, false, needed[1]);
  int64_t outputs = needed[2] ? conv.outputs : 0;
  Guarded bias(4 * outputs);
  b.grad_input = grad_input.image(), b.grad_weight = grad_weight.image();
  if (needed[2]) b.grad_bias = bias.data<float>();
  Host services = host(threads, reverse);
  with_scratch(kernel.backward_scratch_bytes(b, services),
               [&](void* scratch) { kernel.backward(b, scratch, services); });
  py::dict found;
  found["input"] = grad_input.array("input"), found["weight"] = grad_weight.array("weight");
  found["bias"] = bias.array(py::dtype::of<float>(), {outputs}, "bias");
  return found;
}

py::tuple maxout(const std::string& level, int64_t threads, bool reverse, const py::array& input, bool with_winner) {
  return largest_pieces(input, with_winner,
                        [&](const Maxout& m) { level_named(level).activation->maxout(m, host(threads, reverse)); });
}

py::array maxout_backward(const std::string& level, int64_t threads, bool reverse, const py::array& grad,
                          const py::array& winner, int64_t pieces) {
  return give_to_winners(grad, winner, pieces, [&](const MaxoutBackward& m) {
    level_named(level).activation->maxout_backward(m, host(threads, reverse));
  });
}

py::array apl(const std::string& level, int64_t threads, bool reverse, const py::array& input, const py::array& slope,
              const py::array& hinge) {
  return bend(input, slope, hinge,
              [&](const Apl& a) { level_named(level).activation->apl(a, host(threads, reverse)); });
}

py::tuple apl_backward(const std::string& level, int64_t threads, bool reverse, const py::array& grad,
                       const py::array& input, const py::array& slope, const py::array& hinge) {
  const ActivationKernel& kernel = *level_named(level).activation;
  return differentiate_unit(grad, input, slope, hinge, [&](const AplBackward& b) {
    with_scratch(kernel.apl_backward_scratch_bytes(b),
                 [&](void* scratch) { kernel.apl_backward(b, scratch, host(threads, reverse)); });
  });
}

using NormArguments = std::tuple<bool, bool, int, double, double, double>;
NormSettings norm_settings(const NormArguments& s) {
  auto [training, after, activation, parameter, eps, momentum] = s;
  return {training, after, activation, parameter, eps, momentum};
}

py::tuple norm_act(const std::string& level, int64_t threads, bool reverse, const py::array& input,
                   const Optional& weight, const Optional& bias, const py::array& running_mean,
                   const py::array& running_var, const NormArguments& settings) {
  const NormActKernel& kernel = *level_named(level).norm_act;
  return normalise(input, weight, bias, running_mean, running_var, norm_settings(settings), [&](const NormAct& a) {
    with_scratch(kernel.scratch_bytes(a), [&](void* scratch) { kernel.forward(a, scratch, host(threads, reverse)); });
  });
}

py::tuple norm_act_backward(const std::string& level, int64_t threads, bool reverse, const py::array& grad,
                            const py::array& input, const Optional& weight, const Optional& bias, const py::array& mean,
                            const py::array& variance, const NormArguments& settings, std::array<bool, 2> needed) {
  const NormActKernel& kernel = *level_named(level).norm_act;
  return differentiate_norm(grad, input, weight, bias, mean, variance, norm_settings(settings), needed,
                            [&](const NormActBackward& b) {
                              with_scratch(kernel.backward_scratch_bytes(b),
                                           [&](void* scratch) { kernel.backward(b, scratch, host(threads, reverse)); });
                            });
}

py::array color_transform(const std::string& level, int64_t threads, bool reverse, const py::array& pixels,
                          const std::array<Optional, 5>& parameters, double scale, double negative_slope, bool residual,
                          bool channels_last) {
  return transform_colors(pixels, {parameters, scale, negative_slope, residual}, channels_last,
                          [&](const ColorTransform& transform) {
                            level_named(level).color_transform->run(transform, host(threads, reverse));
                          });
}

py::dict color_transform_backward(const std::string& level, int64_t threads, bool reverse, const py::array& grad_output,
                                  const py::array& pixels, const std::array<Optional, 5>& parameters, double scale,
                                  double negative_slope, bool residual, std::array<bool, 2> needed,
                                  bool channels_last) {
  const ColorTransformKernel& kernel = *level_named(level).color_transform;
  return differentiate_colors(grad_output, pixels, {parameters, scale, negative_slope, residual}, needed, channels_last,
                              [&](const ColorTransformBackward& b) {
                                with_scratch(kernel.backward_scratch_bytes(b), [&](void* scratch) {
                                  kernel.backward(b, scratch, host(threads, reverse));
                                });
                              });
}

py::array condition_taps(const std::string& level, int64_t threads, bool reverse, const py::array& condition,
                         const py::array& weight) {
  const ConditioningKernel& kernel = *level_named(level).conditioning;
  Inputs inputs;
  int64_t batch = condition.shape(0), outputs = weight.shape(0);
  Guarded taps(4 * batch * 9 * outputs);
  ConditionTaps problem{matrix(inputs, condition), image(inputs.add(weight), weight), outputs, taps.data<float>()};
  with_scratch(kernel.taps_scratch_bytes(problem),
               [&](void* scratch) { kernel.condition_taps(problem, scratch, host(threads, reverse)); });
  return taps.array(py::dtype::of<float>(), {batch, 9, outputs}, "taps");
}

py::array add_taps(const std::string& level, int64_t threads, bool reverse, const py::array& x, const py::array& taps,
                   bool channels_last) {
  return with_taps(x, taps, channels_last, [&](const AddTaps& problem) {
    level_named(level).conditioning->add_taps(problem, host(threads, reverse));
  });
}

py::array tap_sums(const std::string& level, int64_t threads, bool reverse, const py::array& grad) {
  return sums_of_taps(grad, [&](const TapSums& problem) {
    level_named(level).conditioning->tap_sums(problem, host(threads, reverse));
  });
}

py::tuple augment(const std::string& level, const py::array& projected, const py::array& eps, int activation) {
  return augmented(projected, eps, activation,
                   [&](const Augmentation& problem) { level_named(level).conditioning->augment(problem); });
}

py::array augment_backward(const std::string& level, const std::array<Optional, 4>& upstream, const py::array& mu,
                           const py::array& logvar, const py::array& eps, const Optional& projected, int activation) {
  return differentiate_augmentation(
      upstream, mu, logvar, eps, projected, activation,
      [&](const AugmentationBackward& problem) { level_named(level).conditioning->augment_backward(problem); });
}

py::tuple max_avg_pool(const std::string& level, int64_t threads, bool reverse, const py::array& input, Pair kernel,
                       Pair stride, Pair padding, Pair size, bool with_positions, bool channels_last) {
  const PoolingKernel& kernels = *level_named(level).pooling;
  return pooled(input, {kernel, stride, padding, size}, with_positions, channels_last, [&](Inputs&, const Pool& pool) {
    Host services = host(threads, reverse);
    with_scratch(kernels.scratch_bytes(pool, services),
                 [&](void* scratch) { kernels.max_average(pool, scratch, services); });
  });
}

py::tuple stochastic_pool(const std::string& level, int64_t threads, bool reverse, const py::array& input,
                          const Optional& uniform, Pair kernel, Pair stride, Pair padding, Pair size,
                          bool channels_last) {
  const PoolingKernel& kernels = *level_named(level).pooling;
  return pooled(input, {kernel, stride, padding, size}, uniform.has_value(), channels_last,
                [&](Inputs& inputs, const Pool& pool) {
                  StochasticPool problem{pool, uniform ? image(inputs.add(*uniform), *uniform) : Image{}};
                  Host services = host(threads, reverse);
                  with_scratch(kernels.scratch_bytes(pool, services),
                               [&](void* scratch) { kernels.stochastic(problem, scratch, services); });
                });
}

py::array pool_backward(const std::string& level, int64_t threads, bool reverse, const py::array& grad_output,
                        const py::array& positions, Pair kernel, Pair stride, Pair padding, Pair size, bool average,
                        bool channels_last) {
  const PoolingKernel& kernels = *level_named(level).pooling;
  Windows windows{kernel, stride, padding, {grad_output.shape(2), grad_output.shape(3)}};
  return unpooled(grad_output, positions, windows, size, average, channels_last, [&](const PoolBackward& backward) {
    Host services = host(threads, reverse);
    with_scratch(kernels.backward_scratch_bytes(backward, services),
                 [&](void* scratch) { kernels.backward(backward, scratch, services); });
  });
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Level* level = levels_begin(); level->name; ++level)
    if (level->supported()) names.push_back(level->name);
  return names;
}

// Reads one float past an array of n, or writes one, for the test that this harness notices.
void one_past(int64_t n, bool write) {
  Guarded memory(4 * n);
  volatile float* data = memory.data<float>();
  if (write)
    data[n] = 1.f;
  else
    (void)data[n];
}

}  // namespace

PYBIND11_MODULE(native_cpu, m) {
  m.def("levels", [] {
    py::list names;
    for (const std::string& name : levels()) names.append(name);
    return names;
  });
  m.def("one_past", one_past);
  m.def("momentum_update", momentum_update, py::arg("level"), py::arg("threads"), py::arg("reverse"),
        py::arg("targets"), py::arg("sources"), py::arg("copies") = Arrays(), py::kw_only(), py::arg("momentum") = 0.0,
        py::arg("tensor") = py::none(), py::arg("convex") = false,
        py::arg("offsets") = std::array<int64_t, 3>{-1, -1, -1});
  m.def("key_queue", key_queue, py::arg("level"), py::arg("threads"), py::arg("reverse"), py::arg("ring"),
        py::arg("cursor"), py::arg("keys"), py::kw_only(), py::arg("valid") = py::none(), py::arg("mask") = py::none(),
        py::arg("payload_rings") = Arrays(), py::arg("payloads") = Arrays(), py::arg("normalize") = false,
        py::arg("drop_tail") = false, py::arg("ring_offset") = -1, py::arg("key_offset") = -1);
  m.def("separable_conv", separable_conv);
  m.def("separable_conv_backward", separable_conv_backward);
  m.def("upsample_conv", upsample_conv);
  m.def("upsample_conv_backward", upsample_conv_backward);
  m.def("maxout", maxout);
  m.def("maxout_backward", maxout_backward);
  m.def("apl", apl);
  m.def("apl_backward", apl_backward);
  m.def("norm_act", norm_act);
  m.def("norm_act_backward", norm_act_backward);
  m.def("color_transform", color_transform);
  m.def("color_transform_backward", color_transform_backward);
  m.def("max_avg_pool", max_avg_pool);
  m.def("stochastic_pool", stochastic_pool);
  m.def("pool_backward", pool_backward);
  m.def("condition_taps", condition_taps);
  m.def("add_taps", add_taps);
  m.def("tap_sums", tap_sums);
  m.def("augment", augment);
  m.def("augment_backward", augment_backward);
  m.def("small_loss_mask", small_loss_mask, py::arg("level"), py::arg("threads"), py::arg("reverse"), py::arg("losses"),
        py::arg("keep_rate"), py::kw_only(), py::arg("keep_rates") = py::none(), py::arg("candidates") = py::none());
  m.def("twin_loss", twin_loss, py::arg("level"), py::arg("threads"), py::arg("reverse"), py::arg("logits1"),
        py::arg("logits2"), py::arg("labels"), py::arg("method"), py::arg("released"), py::arg("parameter"),
        py::kw_only(), py::arg("forget_rate") = 0.0, py::arg("forget_rates") = py::none(), py::arg("step") = 0,
        py::arg("step_tensor") = py::none(), py::arg("sample_ids") = py::none());
  m.def("twin_loss_backward", twin_loss_backward, py::arg("level"), py::arg("threads"), py::arg("reverse"),
        py::arg("logits1"), py::arg("logits2"), py::arg("labels"), py::arg("coefficients"), py::arg("stats"),
        py::arg("upstream1"), py::arg("upstream2"), py::arg("needed"), py::arg("method"), py::arg("released"),
        py::arg("parameter"));
  m.def("gan_loss", gan_loss, py::arg("level"), py::arg("logits"), py::arg("targets"), py::arg("weights"),
        py::arg("exact"), py::arg("with_grad") = true);
  m.def("info_nce", info_nce, py::arg("level"), py::arg("query"), py::arg("positive"), py::arg("queue"), py::kw_only(),
        py::arg("scale"), py::arg("bfloat16_products") = false, py::arg("row_factor") = 1.0,
        py::arg("with_rank") = true, py::arg("with_grad") = true, py::arg("threads") = 1, py::arg("reverse") = false);
}
