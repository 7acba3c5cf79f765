// All gradients of a separable convolution in one walk over bands of rows: the depthwise result is computed again, and
// its gradient lives in a ring of rows just long enough for the kernel's height.
// Cost: the products 4 P C m O FLOP (gradients of input and weights), three times the depthwise part.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/bfloat16_tiles.h"
#include "cpu/separable_conv_plan.h"

namespace perfvl {
namespace PVL_ISA {

// Memory of one worker, and what all share.
template <class Product>
struct BackwardScratch {
  typedef typename Product::Element Element;
  Element* panels;           // shared: pointwise weights
  float *weights, *flipped;  // shared: depthwise weights [tap][inner]
  float* staged;             // input rows
  const float** rows;
  Element* depthwise;     // [panel][step][kPanel]: the depthwise result, operand B of the weights' gradient
  Element* upstream;      // [pixel][outputs]: the gradient of the output, operand A of the depthwise gradient
  Element* across;        // [tile][step][kSlot]: the same as operand A of the weights' gradient
  float* pixel_row;       // pixels on their way
  float *ring, *nothing;  // rows of the depthwise gradient with zeros around; a row of zeros
  float* pointwise_sums;
  int64_t pointwise_row;
  float* depthwise_sums;
  double *bias_sums, *shift_sums, *scale_sums;  // over all pixels
};

template <class Product>
class Backward {
  typedef typename Product::Element Element;
  static constexpr int64_t kValues = Product::kValues;

 public:
  Backward(const SeparableConvBackward& backward, const Host& host) : b_(backward), f_(backward.forward), host_(host) {
    const Side& w = f_.w;
    lead_ = std::max<int64_t>(0, w.reach() - w.pad), skip_ = std::max<int64_t>(0, w.pad - w.reach());
    ring_width_ = std::max(lead_ + (w.out - 1) * w.stride + 1, skip_ + w.in + w.reach());
    int64_t inner = staged_channels(f_.inner()), outputs = staged_channels(f_.outputs);
    plan_ = make_plan(f_, w.out * (inner + outputs) + ring_width_ * inner);
    ring_rows_ = plan_.band + f_.h.reach() / f_.h.stride + 2;
    pixel_width_ = std::max(w.in, w.out);
    input_ = b_.grad_input.data || b_.grad_shift;
    // A worker's share of the pixels must be worth its own sums of the weights' gradient.
    int64_t most = std::max<int64_t>(1, f_.pixels() / 64);
    int64_t memory = std::max<int64_t>(1, (int64_t(1) << 29) / (f_.outputs * f_.inner() * 4));
    workers_ = std::min({host.threads, f_.batch * f_.h.in, most, memory});
    // The first worker sums where the result belongs, where that is possible.
    const Image& result = b_.grad_pointwise;
    in_place_ = result.data && result.dtype == Dtype::float32;
  }

  int64_t scratch_bytes() const {
    int64_t bytes;
    scratch(nullptr, workers_ - 1, &bytes);
    return bytes;
  }

  void run(void* base) const {
    // 1. Weights as the loops read them.
    PanelShape panels = panel_shape(f_, false);
    BackwardScratch<Product> shared = scratch(base, 0);
    host_.parallel(panels.panels(),
                   [&](int64_t i) { pack_panel<Product>(f_, false, i, shared.panels + i * panels.panel<Product>()); });
    pack_depthwise(f_, plan_.inner, false, shared.weights);
    pack_depthwise(f_, plan_.inner, true, shared.flipped);
    // 2. Every worker its run of input rows, whole images but at its ends.
    host_.parallel(workers_, [&](int64_t worker) {
      BackwardScratch<Product> s = scratch(base, worker);
      std::fill_n(s.depthwise_sums, taps() * plan_.inner, 0.f);
      std::fill_n(s.bias_sums, plan_.outputs, 0.);
      std::fill_n(s.shift_sums, plan_.inner, 0.);
      std::fill_n(s.scale_sums, plan_.inner, 0.);
      std::fill_n(s.nothing, ring_width_ * plan_.inner, 0.f);
      StagedRows staged(f_, plan_, s.staged, s.rows);
      bool add = false;
      int64_t rows = f_.batch * f_.h.in, end = rows * (worker + 1) / workers_;
      for (int64_t row = rows * worker / workers_; row < end;) {
        int64_t n = row / f_.h.in, first = row % f_.h.in, last = std::min(f_.h.in, first + end - row);
        segment(n, first, last, staged, s, add);
        row += last - first;
      }
      if (!add && b_.grad_pointwise.data)
        for (int64_t o = 0; o < f_.outputs; ++o) std::fill_n(s.pointwise_sums + o * s.pointwise_row, f_.inner(), 0.f);
    });
    // 3. The workers' sums, in their order.
    reduce(base);
  }

 private:
  int64_t taps() const { return f_.h.kernel * f_.w.kernel; }

  BackwardScratch<Product> scratch(void* base, int64_t worker, int64_t* bytes = nullptr) const {
    Arena arena(base);
    BackwardScratch<Product> s{};
    PanelShape panels = panel_shape(f_, false);
    int64_t pixels = round_up(plan_.band * f_.w.out, kValues), steps = pixels / kValues;
    s.panels = arena.take<Element>(panels.panels() * panels.panel<Product>());
    s.weights = arena.take<float>(taps() * plan_.inner);
    s.flipped = arena.take<float>(taps() * plan_.inner);
    for (int64_t i = 0; i <= worker; ++i) {
      s.staged = arena.take<float>(plan_.staged_rows * plan_.staged_width * plan_.inner);
      s.rows = arena.take<const float*>(plan_.band * f_.h.kernel);
      s.depthwise = arena.take<Element>(panels.panels() * steps * kPanel);
      s.upstream = arena.take<Element>(pixels * plan_.outputs / kValues + kSlot);
      s.across = arena.take<Element>(ceil_div(f_.outputs, kTileRows) * steps * kSlot);
      s.pixel_row = arena.take<float>(std::max(pixel_width_ * std::max(plan_.inner, plan_.outputs),
                                               kValues == 1 ? 0 : pixels * std::max(plan_.inner, plan_.outputs)) *
                                          2 +
                                      kSlot);
      s.ring = arena.take<float>(ring_rows_ * ring_width_ * plan_.inner);
      s.nothing = arena.take<float>(ring_width_ * plan_.inner);
      bool direct = i == 0 && in_place_;
      s.pointwise_row = direct ? b_.grad_pointwise.n_stride : f_.inner();
      s.pointwise_sums = direct                   ? static_cast<float*>(b_.grad_pointwise.data)
                         : b_.grad_pointwise.data ? arena.take<float>(f_.outputs * f_.inner())
                                                  : nullptr;
      s.depthwise_sums = arena.take<float>(taps() * plan_.inner);
      s.bias_sums = arena.take<double>(plan_.outputs);
      s.shift_sums = arena.take<double>(plan_.inner);
      s.scale_sums = arena.take<double>(plan_.inner);
    }
    if (bytes) *bytes = arena.used();
    return s;
  }

  // Input rows [first, last) of an image: their gradients, from all output rows that read them; and the share of the
  // weights' gradients of those output rows whose middle lies among them.
  void segment(int64_t n, int64_t first, int64_t last, StagedRows& staged, const BackwardScratch<Product>& s,
               bool& add) const {
    const Side& h = f_.h;
    auto clamp = [&](int64_t q) { return std::clamp<int64_t>(q, 0, h.out); };
    auto reaching = [&](int64_t offset) { return clamp(offset <= 0 ? 0 : ceil_div(offset, h.stride)); };
    int64_t middle = h.pad - h.reach() / 2;
    int64_t own = first == 0 ? 0 : reaching(first + middle), own_end = last == h.in ? h.out : reaching(last + middle);
    int64_t begin = own, end = own_end;
    if (input_) {
      int64_t low = reaching(first + h.pad - h.reach()), high = clamp((last - 1 + h.pad) / h.stride + 1);
      begin = own < own_end ? std::min(own, low) : low, end = own < own_end ? std::max(own_end, high) : high;
    }
    bool weights = b_.grad_pointwise.data || b_.grad_depthwise.data;
    bool gradient = input_ || b_.grad_depthwise.data;  // of the depthwise result
    int64_t ring_first = begin, done = first;
    for (int64_t q = begin; q < end;) {
      int64_t next = std::min(q + plan_.band, end);
      for (int64_t boundary : {own, own_end})
        if (q < boundary && boundary < next) next = boundary;
      int64_t count = next - q;
      bool owned = q >= own && q < own_end;
      if (owned || gradient) load_upstream(n, q, count, owned, s);
      if (gradient) depthwise_gradient(q - ring_first, count, s);
      if (owned && weights) {
        weight_gradients(staged(n, q, count), count, q - ring_first, s, add);
        add = true;
      }
      if (input_) {
        int64_t ready = next == end ? last : std::clamp(next * h.stride - h.pad, done, last);
        for (; done < ready; ++done) input_row(n, done, ring_first, next, s);
      }
      // Rows that the next ones still need move to the front.
      int64_t keep = std::clamp(reaching(done + h.pad - h.reach()), ring_first, next);
      if (!input_) keep = next;
      int64_t row = ring_width_ * plan_.inner;
      std::memmove(s.ring, s.ring + (keep - ring_first) * row, (next - keep) * row * sizeof(float));
      ring_first = keep, q = next;
    }
    if (input_)
      for (; done < last; ++done) input_row(n, done, ring_first, ring_first, s);  // rows that no output reads
  }

  // The gradient of the output of rows [q, q + count) as operand A of both products.
  void load_upstream(int64_t n, int64_t q, int64_t count, bool owned, const BackwardScratch<Product>& s) const {
    int64_t stride = plan_.outputs, width = f_.w.out, total = count * width;
    float* rows = kValues == 1 ? reinterpret_cast<float*>(s.upstream) : s.pixel_row;
    float* other = kValues == 1 ? s.pixel_row : s.pixel_row + round_up(plan_.band * width, kValues) * stride;
    Pointwise plain{nullptr, nullptr, Activation::none};
    for (int64_t r = 0; r < count; ++r) {
      float* row = rows + r * width * stride;
      stage_pixels(b_.grad_output, n, q + r, 0, width, f_.outputs, 1, plain, row, stride);
      if (b_.slope) {
        stage_pixels(f_.output, n, q + r, 0, width, f_.outputs, 1, plain, other, stride);
        for (int64_t c = 0; c < f_.outputs; c += kLanes) {
          int64_t lanes = std::min<int64_t>(kLanes, f_.outputs - c);
          Vec slope = read_lanes(Dtype::float32, b_.slope + c, lanes);
          Vec offset = read_lanes(Dtype::float32, b_.offset + c, lanes);
          for (int64_t w = 0; w < width; ++w) {
            float* x = row + w * stride + c;
            store(x, load<Vec>(x) + fma(slope, load<Vec>(other + w * stride + c), offset));
          }
        }
      }
    }
    if (owned && b_.grad_bias)
      for (int64_t c = 0; c < f_.outputs; c += kLanes) {
        Vec sum{};
        for (int64_t p = 0; p < total; ++p) sum += load<Vec>(rows + p * stride + c);
        add_lanes(sum, s.bias_sums + c);
      }
#if defined(__AVX512BF16__)
    if constexpr (kValues == 2) {
      auto* narrowed = reinterpret_cast<uint16_t*>(s.upstream);
      for (int64_t p = 0; p < total; ++p)
        for (int64_t c = 0; c < f_.outputs; c += kLanes)
          store(narrowed + p * stride + c, narrow(Dtype::bfloat16, load<Vec>(rows + p * stride + c)));
    }
#endif
    if (!owned || !b_.grad_pointwise.data) return;
    // The same for the weights' gradient, in the order in which its tiles read it.
    int64_t steps = ceil_div(total, kValues), blocks = ceil_div(f_.outputs, kTileRows);
    for (int64_t i = 0; i < blocks; ++i) {
      Element* to = s.across + i * steps * kSlot;
      const float* from = rows + tile_rows(f_.outputs, blocks, i).first;
      for (int64_t p = 0; p < total; p += kValues, to += kSlot)
        for (int64_t c = 0; c < kSlot; c += kLanes) store_step(from + p * stride + c, stride, p + 1 < total, to + c);
    }
  }

  // An element of a step over pixels: one value, or those of two pixels (`more`: there is a second).
  static void store_step(const float* from, [[maybe_unused]] int64_t stride, [[maybe_unused]] bool more, Element* to) {
    if constexpr (kValues == 1) {
      store(to, load<Vec>(from));
    } else {
#if defined(__AVX512BF16__)
      store(to, make_pairs(load<Vec>(from), more ? load<Vec>(from + stride) : Vec{}));
#endif
    }
  }

  // Rows `at`.. of the ring: the gradient of the depthwise result, pixels `stride` apart with zeros between.
  void depthwise_gradient(int64_t at_row, int64_t count, const BackwardScratch<Product>& s) const {
    int64_t inner = plan_.inner, row = ring_width_ * inner;
    float* rows = s.ring + at_row * row;
    for (int64_t r = 0; r < count; ++r) {
      float* to = rows + r * row;
      int64_t end = lead_ + (f_.w.out - 1) * f_.w.stride + 1;
      if (f_.w.stride == 1) {
        std::memset(to, 0, lead_ * inner * sizeof(float));
      } else {
        std::memset(to, 0, end * inner * sizeof(float));
      }
      std::memset(to + end * inner, 0, (ring_width_ - end) * inner * sizeof(float));
    }
    Image ring{rows + lead_ * inner, 0, 1, row, f_.w.stride * inner, Dtype::float32};
    PanelShape panels = panel_shape(f_, false);
    Left<Product> a{s.upstream, plan_.outputs / kValues, 1};
    Right<Product> b{s.panels, panels.panel<Product>(), kPanel};
    multiply(a, b, count * f_.w.out, f_.inner(), panels.steps<Product>(),
             [&](TileRows tile, int64_t column, int64_t columns, const float* sums) {
               Pixel pixel(ring, 0, column, 0, tile.first, f_.w.out);
               for (int64_t r = 0; r < tile.count; ++r, pixel.next())
                 for (int64_t c = 0; c < columns; c += kLanes)
                   store(reinterpret_cast<float*>(pixel.at) + c, load<Vec>(sums + r * kPanel + c));
             });
  }

  void weight_gradients(const float* const* rows, int64_t count, int64_t at_row, const BackwardScratch<Product>& s,
                        bool add) const {
    Taps t{rows,        count,       f_.w.out,      f_.h.kernel,
           f_.w.kernel, f_.w.stride, f_.w.dilation, ceil_div(f_.inner(), kLanes),
           plan_.inner};
    // 1. Of the depthwise weights.
    if (b_.grad_depthwise.data)
      depthwise_weights(t, s.ring + (at_row * ring_width_ + lead_) * plan_.inner, ring_width_ * plan_.inner,
                        f_.w.stride * plan_.inner, s.depthwise_sums);
    if (!b_.grad_pointwise.data) return;
    // 2. The depthwise result again, as operand B.
    int64_t total = count * f_.w.out, steps = ceil_div(total, kValues), inner = plan_.inner;
    if constexpr (kValues == 1) {
      depthwise(t, s.weights, [panels = s.depthwise, steps, dtype = f_.input.dtype](int64_t pixel, int64_t c, Vec x) {
        store(panels + c / kPanel * steps * kPanel + pixel * kPanel + c % kPanel, rounded(dtype, x));
      });
    } else {
      depthwise(t, s.weights,
                [to = s.pixel_row, inner](int64_t pixel, int64_t c, Vec x) { store(to + pixel * inner + c, x); });
      for (int64_t c = 0; c < f_.inner(); c += kLanes)
        for (int64_t p = 0; p < total; p += kValues)
          store_step(s.pixel_row + p * inner + c, inner, p + 1 < total,
                     s.depthwise + c / kPanel * steps * kPanel + p / kValues * kPanel + c % kPanel);
    }
    // 3. Of the pointwise weights.
    Left<Product> a{s.across, 1, kSlot, steps * kSlot};
    Right<Product> b{s.depthwise, steps * kPanel, kPanel};
    multiply_into(a, b, f_.outputs, f_.inner(), steps, s.pointwise_sums, s.pointwise_row, add);
  }

  // The gradient of input row `h`, from ring rows [ring_first, ring_end) of output rows.
  void input_row(int64_t n, int64_t h, int64_t ring_first, int64_t ring_end, const BackwardScratch<Product>& s) const {
    int64_t inner = plan_.inner;
    // 1. The convolution with the flipped kernel; rows that are not there are zeros.
    for (int64_t i = 0; i < f_.h.kernel; ++i) {
      int64_t tap = f_.h.kernel - 1 - i, at_stride = h + f_.h.pad - tap * f_.h.dilation, q = at_stride / f_.h.stride;
      bool there = at_stride >= 0 && at_stride % f_.h.stride == 0 && q >= ring_first && q < ring_end;
      s.rows[i] = (there ? s.ring + (q - ring_first) * ring_width_ * inner : s.nothing) + skip_ * inner;
    }
    Taps t{s.rows, 1, f_.w.in, f_.h.kernel, f_.w.kernel, 1, f_.w.dilation, ceil_div(f_.inner(), kLanes), inner};
    float* row = s.pixel_row;
    depthwise(t, s.flipped, [=](int64_t pixel, int64_t c, Vec x) { store(row + pixel * inner + c, x); });
    if (f_.multiplier > 1)
      for (int64_t w = 0; w < f_.w.in; ++w)
        for (int64_t c = 0; c < f_.channels; ++c) {
          float sum = 0;
          for (int64_t j = 0; j < f_.multiplier; ++j) sum += row[w * inner + c * f_.multiplier + j];
          row[w * inner + c] = sum;  // behind everything that is still to be read
        }
    // 2. Through what comes before the convolution.
    if (f_.scale || f_.shift || (f_.pre != Activation::none && !activates_late())) {
      float* x = row + pixel_width_ * inner;
      Pointwise plain{nullptr, nullptr, Activation::none}, before{f_.scale, f_.shift, f_.pre};
      stage_pixels(f_.input, n, h, 0, f_.w.in, f_.channels, 1, plain, x, inner);
      for (int64_t c = 0; c < f_.channels; c += kLanes) {
        int64_t lanes = std::min<int64_t>(kLanes, f_.channels - c);
        Vec shift_sum{}, scale_sum{};
        Vec scale = f_.scale ? read_lanes(Dtype::float32, f_.scale + c, lanes) : broadcast(1.f);
        for (int64_t w = 0; w < f_.w.in; ++w) {
          Vec value = load<Vec>(x + w * inner + c);
          Vec gradient = activate_backward(f_.pre, before.affine(value, c, lanes), load<Vec>(row + w * inner + c));
          shift_sum += gradient;
          scale_sum = fma(gradient, value, scale_sum);
          store(row + w * inner + c, gradient * scale);
        }
        add_lanes(shift_sum, s.shift_sums + c);
        add_lanes(scale_sum, s.scale_sums + c);
      }
    }
    if (b_.grad_input.data) store_row(row, n, h);
  }

  // Whether gradients pass the activation on their way to memory, with the input read where it lies.
  bool activates_late() const {
    return f_.pre != Activation::none && !f_.scale && !f_.shift && f_.input.c_stride == 1 &&
           b_.grad_input.c_stride == 1;
  }

  static void add_lanes(Vec sum, double* total) {
    for (int i = 0; i < kLanes; ++i) total[i] += double(sum[i]);
  }

  void store_row(const float* row, int64_t n, int64_t h) const {
    const Image& out = b_.grad_input;
    int64_t inner = plan_.inner, bytes = element_bytes(out.dtype);
    if (out.c_stride == 1) {
      bool late = activates_late();
      for (int64_t w = 0; w < f_.w.in; ++w) {
        char* to = const_cast<char*>(at(out, n, 0, h, w));
        const char* from = at(f_.input, n, 0, h, w);
        for (int64_t c = 0; c < f_.channels; c += kLanes) {
          int64_t lanes = std::min<int64_t>(kLanes, f_.channels - c);
          Vec gradient = load<Vec>(row + w * inner + c);
          if (late) gradient = activate_backward(f_.pre, read_lanes(out.dtype, from + c * bytes, lanes), gradient);
          write_lanes(out.dtype, to + c * bytes, gradient, lanes);
        }
      }
      return;
    }
    constexpr int64_t kBlock = 16;  // channels: both sides stay in cache
    for (int64_t c0 = 0; c0 < f_.channels; c0 += kBlock)
      for (int64_t c = c0; c < std::min(f_.channels, c0 + kBlock); ++c) {
        char* to = const_cast<char*>(at(out, n, c, h, 0));
        for (int64_t w = 0; w < f_.w.in; ++w) write(out.dtype, to + w * out.w_stride * bytes, row[w * inner + c]);
      }
  }

  void reduce(void* base) const {
    std::vector<BackwardScratch<Product>> parts;
    for (int64_t worker = 0; worker < workers_; ++worker) parts.push_back(scratch(base, worker));
    auto total = [&](auto BackwardScratch<Product>::* field, int64_t i) {
      double sum = 0;
      for (const auto& part : parts) sum += (part.*field)[i];
      return float(sum);
    };
    typedef BackwardScratch<Product> S;
    if (const Image& out = b_.grad_pointwise; out.data && !(in_place_ && workers_ == 1))
      host_.parallel(f_.outputs, [&](int64_t o) {
        char* to = const_cast<char*>(at(out, o, 0, 0, 0));
        for (int64_t c = 0; c < f_.inner(); c += kLanes) {
          int64_t lanes = std::min<int64_t>(kLanes, f_.inner() - c);
          Vec sum{};
          for (const auto& part : parts)
            sum += read_lanes(Dtype::float32, part.pointwise_sums + o * part.pointwise_row + c, lanes);
          write_lanes(out.dtype, to + c * element_bytes(out.dtype), sum, lanes);
        }
      });
    if (const Image& out = b_.grad_depthwise; out.data)
      for (int64_t i = 0; i < f_.h.kernel; ++i)
        for (int64_t l = 0; l < f_.w.kernel; ++l)
          for (int64_t c = 0; c < f_.inner(); ++c)
            write(out.dtype, const_cast<char*>(at(out, c, 0, i, l)),
                  total(&S::depthwise_sums, (i * f_.w.kernel + l) * plan_.inner + c));
    if (b_.grad_bias)
      for (int64_t o = 0; o < f_.outputs; ++o) b_.grad_bias[o] = total(&S::bias_sums, o);
    if (b_.grad_shift)
      for (int64_t c = 0; c < f_.channels; ++c) {
        b_.grad_shift[c] = total(&S::shift_sums, c);
        b_.grad_scale[c] = total(&S::scale_sums, c);
      }
  }

  const SeparableConvBackward& b_;
  const SeparableConv& f_;
  const Host& host_;
  Plan plan_;
  int64_t lead_, skip_, ring_width_, ring_rows_, pixel_width_, workers_;
  bool input_, in_place_;
};

}  // namespace PVL_ISA
}  // namespace perfvl
