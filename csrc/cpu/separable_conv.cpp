// Depthwise and pointwise convolution of a band of rows at a time. The depthwise result of a band, some hundred
// kilobytes, is the left operand of the product while it is in the core's own cache: it never reaches memory.
// Cost: 2 P C m (O + kh kw) FLOP for P output pixels, of which the product's 2 P C m O run at nearly the processor's
// peak; input and output move once, the pointwise weights once per band.
#include "cpu/separable_conv.h"

#include <algorithm>
#include <vector>

#include "cpu/separable_conv_backward.h"
#include "cpu/separable_conv_plan.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

// Mean and sum of squared distances, for every output channel (Chan et al. 1979): of a band in float32, as distances
// from its first pixel, of all bands before it in float64, so that neither a long sum nor a large mean loses digits.
struct Statistics {
  float *first, *mean, *squares;
  double *total_mean, *total_squares;
  int64_t pixels;
};

// (mean, squares) of `before` values, joined with those of `more` others.
void join(double before, double& mean, double& squares, double more, double other_mean, double other_squares) {
  double delta = other_mean - mean, share = more / (before + more);
  mean += delta * share;
  squares += other_squares + delta * delta * before * share;
}

struct ForwardScratch {
  void* panels;
  float* weights;  // [tap][inner]; both shared where they are large
  Statistics statistics;
  float* staged;
  const float** rows;
  void* left;  // the band's depthwise result
};

template <class Product>
int64_t left_stride(const Plan& plan) {
  return plan.inner / Product::kValues;
}

template <class Product>
class Forward {
 public:
  Forward(const SeparableConv& conv, const Host& host)
      : conv_(conv), plan_(make_plan(conv, conv.w.out * staged_channels(conv.inner()))), host_(host) {
    bands_ = conv.batch * ceil_div(conv.h.out, plan_.band);
    workers_ = std::min(host.threads, bands_);
    // Small weights every worker packs for itself: sooner than all have waited for each other and fetched from each
    // other's caches what each has packed.
    constexpr int64_t kSmall = 256 << 10;
    PanelShape panels = panel_shape(conv, true);
    packs_alone_ = panels.panels() * panels.panel<Product>() * int64_t(sizeof(typename Product::Element)) <= kSmall;
    constexpr int64_t kLarge = 4 << 20;  // more than the caches near the cores hold
    const Image& out = conv.output;
    streams_ = out.c_stride == 1 && conv.pixels() * conv.outputs * element_bytes(out.dtype) > kLarge;
  }

  int64_t scratch_bytes() const {
    int64_t bytes;
    scratch(nullptr, workers_ - 1, &bytes);
    return bytes;
  }

  void run(void* base) const {
    PanelShape panels = panel_shape(conv_, true);
    ForwardScratch shared = scratch(base, 0);
    auto pack = [&](const ForwardScratch& s, int64_t i) {
      auto* packed = static_cast<typename Product::Element*>(s.panels);
      pack_panel<Product>(conv_, true, i, packed + i * panels.panel<Product>());
    };
    if (!packs_alone_) {
      host_.parallel(panels.panels(), [&](int64_t i) { pack(shared, i); });
      pack_depthwise(conv_, plan_.inner, false, shared.weights);
    }
    std::vector<Statistics> statistics(workers_);
    host_.parallel(workers_, [&](int64_t worker) {
      ForwardScratch s = scratch(base, worker);
      if (packs_alone_) {
        for (int64_t i = 0; i < panels.panels(); ++i) pack(s, i);
        pack_depthwise(conv_, plan_.inner, false, s.weights);
      }
      StagedRows staged(conv_, plan_, s.staged, s.rows);
      for (int64_t i = bands_ * worker / workers_; i < bands_ * (worker + 1) / workers_; ++i) {
        int64_t per_image = ceil_div(conv_.h.out, plan_.band), first = i % per_image * plan_.band;
        int64_t count = std::min(plan_.band, conv_.h.out - first);
        band(i / per_image, first, count, staged, s);
        if (conv_.mean) total(count * conv_.w.out, s.statistics);
      }
      statistics[worker] = s.statistics;
    });
    if (conv_.mean) merge(statistics);
  }

 private:
  ForwardScratch scratch(void* base, int64_t worker, int64_t* bytes = nullptr) const {
    Arena arena(base);
    ForwardScratch s{};
    PanelShape panels = panel_shape(conv_, true);
    int64_t columns = conv_.mean ? panels.panels() * kPanel : 0;
    for (int64_t i = 0; i <= worker; ++i) {
      if (i == 0 || packs_alone_) {
        s.panels = arena.take<typename Product::Element>(panels.panels() * panels.panel<Product>());
        s.weights = arena.take<float>(conv_.h.kernel * conv_.w.kernel * plan_.inner);
      }
      s.statistics.first = arena.take<float>(columns);
      s.statistics.mean = arena.take<float>(columns);
      s.statistics.squares = arena.take<float>(columns);
      s.statistics.total_mean = arena.take<double>(columns);
      s.statistics.total_squares = arena.take<double>(columns);
      s.staged = arena.take<float>(plan_.staged_rows * plan_.staged_width * plan_.inner);
      s.rows = arena.take<const float*>(plan_.band * conv_.h.kernel);
      s.left = arena.take<typename Product::Element>(plan_.band * conv_.w.out * left_stride<Product>(plan_));
    }
    if (bytes) *bytes = arena.used();
    return s;
  }

  void band(int64_t n, int64_t first, int64_t count, StagedRows& staged, const ForwardScratch& s) const {
    // 1. The input rows, with everything that comes before the convolution.
    Taps taps{staged(n, first, count),
              count,
              conv_.w.out,
              conv_.h.kernel,
              conv_.w.kernel,
              conv_.w.stride,
              conv_.w.dilation,
              ceil_div(conv_.inner(), kLanes),
              plan_.inner};
    // 2. The depthwise convolution, rounded as if it were stored, as operand A.
    typedef typename Product::Element Element;
    auto* left = static_cast<Element*>(s.left);
    int64_t stride = left_stride<Product>(plan_);
    auto keep = [left, stride, dtype = conv_.input.dtype](int64_t pixel, int64_t c, Vec x) {
      if constexpr (Product::kValues == 1)
        store(left + pixel * stride + c, rounded(dtype, x));
      else
        store(left + pixel * stride + c / 2, narrow(Dtype::bfloat16, x));
    };
    Pointwise between{conv_.mid_scale, conv_.mid_shift, conv_.mid};
    if (!between.scale && !between.shift && between.activation == Activation::none)
      depthwise(taps, s.weights, keep);
    else
      depthwise(taps, s.weights, [keep, between, inner = conv_.inner()](int64_t pixel, int64_t c, Vec x) {
        keep(pixel, c, between(x, c, std::min<int64_t>(kLanes, inner - c)));
      });
    // 3. The product, finished and stored tile by tile.
    PanelShape panels = panel_shape(conv_, true);
    Left<Product> a{left, stride, 1};
    Right<Product> b{static_cast<const Element*>(s.panels), panels.panel<Product>(), kPanel};
    multiply(a, b, count * conv_.w.out, conv_.outputs, panels.steps<Product>(),
             [&](TileRows rows, int64_t column, int64_t columns, float* tile) {
               finish(n, first, rows, column, columns, tile);
               if (conv_.mean) add_statistics(rows, column, columns, tile, s.statistics);
             });
    if (streams_) stream_fence();
  }

  // A tile of the product becomes one of the output, here and in memory.
  void finish(int64_t n, int64_t first, TileRows rows, int64_t column, int64_t columns, float* tile) const {
    const Image out = conv_.output,
                residual = conv_.residual;  // copies: stores through `char*` might change the others
    Pointwise after{conv_.output_scale, conv_.output_shift, conv_.post};
    int64_t bytes = element_bytes(out.dtype);
    if (after.scale || after.shift || after.activation != Activation::none)
      for (int64_t c = 0; c < columns; c += kLanes) {
        int64_t lanes = std::min<int64_t>(kLanes, columns - c);
        for (int64_t r = 0; r < rows.count; ++r) {
          float* x = tile + r * kPanel + c;
          store(x, after(load<Vec>(x), column + c, lanes));
        }
      }
    if (residual.data) {
      Pixel addend(residual, n, column, first, rows.first, conv_.w.out);
      for (int64_t r = 0; r < rows.count; ++r, addend.next())
        for (int64_t c = 0; c < columns; c += kLanes) {
          float* x = tile + r * kPanel + c;
          store(x, load<Vec>(x) + read_channels(residual, addend.at, c, std::min<int64_t>(kLanes, columns - c)));
        }
    }
    if (out.dtype != Dtype::float32 && conv_.mean)  // what is counted is what is stored
      for (int64_t r = 0; r < rows.count; ++r)
        for (int64_t c = 0; c < columns; c += kLanes) {
          float* x = tile + r * kPanel + c;
          store(x, rounded(out.dtype, load<Vec>(x)));
        }
    Pixel pixel(out, n, column, first, rows.first, conv_.w.out);
    if (out.c_stride == 1) {
      auto each = [&](auto put) {
        for (int64_t r = 0; r < rows.count; ++r, pixel.next())
          for (int64_t c = 0; c < columns; c += kLanes)
            put(pixel.at + c * bytes, load<Vec>(tile + r * kPanel + c), std::min<int64_t>(kLanes, columns - c));
      };
      Dtype dtype = out.dtype;
      if (!streams_)
        each([=](char* to, Vec x, int64_t lanes) { write_lanes(dtype, to, x, lanes); });
      else if (dtype == Dtype::float32)
        each([](char* to, Vec x, int64_t lanes) { write_past(Dtype::float32, to, x, lanes, [](Vec v) { return v; }); });
      else
        each([=](char* to, Vec x, int64_t lanes) {
          write_past(dtype, to, x, lanes, [=](Vec v) { return narrow(dtype, v); });
        });
    } else {
      char* to[kTileRows];
      for (int64_t r = 0; r < rows.count; ++r, pixel.next()) to[r] = pixel.at;
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t r = 0; r < rows.count; ++r)
          write(out.dtype, to[r] + c * out.c_stride * bytes, tile[r * kPanel + c]);
    }
  }

  // Past the caches where a vector lies well, so that what it covers need not be fetched to be overwritten.
  template <class F>
  static void write_past(Dtype dtype, char* to, Vec x, int64_t lanes, const F& narrowed) {
    constexpr size_t kBytes = sizeof(decltype(narrowed(x)));
    if (lanes < kLanes || reinterpret_cast<uintptr_t>(to) % kBytes) return write_lanes(dtype, to, x, lanes);
    stream(to, narrowed(x));
  }

  // Adds the rows of a tile to the statistics of its columns in this band.
  static void add_statistics(TileRows rows, int64_t column, int64_t columns, const float* tile, const Statistics& s) {
    float share = float(rows.count) / float(rows.first + rows.count), weight = share * float(rows.first);
    for (int64_t c = 0; c < columns; c += kLanes) {
      if (rows.first == 0) store(s.first + column + c, load<Vec>(tile + c));
      Vec first = load<Vec>(s.first + column + c), total{}, squares{};
      for (int64_t r = 0; r < rows.count; ++r) total += load<Vec>(tile + r * kPanel + c) - first;
      Vec mean = total * (1.f / float(rows.count));
      for (int64_t r = 0; r < rows.count; ++r) {
        Vec distance = (load<Vec>(tile + r * kPanel + c) - first) - mean;
        squares = fma(distance, distance, squares);
      }
      float *known = s.mean + column + c, *known_squares = s.squares + column + c;
      if (rows.first > 0) {
        Vec delta = mean - load<Vec>(known);
        mean = fma(delta, broadcast(share), load<Vec>(known));
        squares = fma(delta * delta, broadcast(weight), squares + load<Vec>(known_squares));
      }
      store(known, mean);
      store(known_squares, squares);
    }
  }

  // Adds the band to the statistics of the worker's bands before it.
  void total(int64_t pixels, Statistics& s) const {
    for (int64_t c = 0; c < conv_.outputs; ++c) {
      if (s.pixels == 0) s.total_mean[c] = s.total_squares[c] = 0;
      join(double(s.pixels), s.total_mean[c], s.total_squares[c], double(pixels), double(s.first[c]) + s.mean[c],
           s.squares[c]);
    }
    s.pixels += pixels;
  }

  // The workers' statistics, in their order.
  void merge(const std::vector<Statistics>& parts) const {
    for (int64_t c = 0; c < conv_.outputs; ++c) {
      double pixels = 0, mean = 0, squares = 0;
      for (const Statistics& s : parts) {
        join(pixels, mean, squares, double(s.pixels), s.total_mean[c], s.total_squares[c]);
        pixels += double(s.pixels);
      }
      conv_.mean[c] = float(mean), conv_.variance[c] = float(squares / pixels);
    }
  }

  const SeparableConv& conv_;
  Plan plan_;
  const Host& host_;
  int64_t bands_, workers_;
  bool packs_alone_, streams_;
};

// f(Product) for what multiplies the operands of this dtype best.
template <class F>
auto with_product(Dtype dtype, const F& f) {
#if defined(__AVX512BF16__)
  if (dtype == Dtype::bfloat16) return f(Pairs{});
#endif
  (void)dtype;
  return f(Floats{});
}

int64_t scratch_bytes(const SeparableConv& conv, const Host& host) {
  return with_product(conv.input.dtype,
                      [&](auto product) { return Forward<decltype(product)>(conv, host).scratch_bytes(); });
}

void run(const SeparableConv& conv, void* scratch, const Host& host) {
  with_product(conv.input.dtype, [&](auto product) { Forward<decltype(product)>(conv, host).run(scratch); });
}

int64_t backward_scratch_bytes(const SeparableConvBackward& backward, const Host& host) {
  return with_product(backward.forward.input.dtype,
                      [&](auto product) { return Backward<decltype(product)>(backward, host).scratch_bytes(); });
}

void run_backward(const SeparableConvBackward& backward, void* scratch, const Host& host) {
  with_product(backward.forward.input.dtype,
               [&](auto product) { Backward<decltype(product)>(backward, host).run(scratch); });
}

}  // namespace

extern const SeparableConvKernel separable_conv;
const SeparableConvKernel separable_conv = {scratch_bytes, run, backward_scratch_bytes, run_backward};

}  // namespace PVL_ISA
}  // namespace perfvl
