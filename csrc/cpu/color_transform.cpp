// Two 1x1 convolutions on every pixel of an image, with what is before, between and behind them, in one pass.
//
// A block of pixels is read once, becomes planes in the first-level cache, and is written once: 24 bytes a pixel for
// three channels of float32, 15 where the image is bytes, of some 300 that eager PyTorch moves. That leaves the
// arithmetic: for 3-10-3 channels 60 multiply-adds and 26 operations of activations a pixel, a vector of pixels at a
// time. Backward computes the hidden layer again, three times the work in all.
#include "cpu/color_transform.h"

#include <type_traits>

#include "cpu/color_transform_planes.h"
#include "cpu/convert.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

constexpr int64_t kMost = kMostColors;
constexpr int kVecs = kLanes == 16 ? 4 : 2;  // vectors of pixels beside one another in a product
constexpr int64_t kStep = kVecs * kLanes;    // pixels
constexpr int kMostRows = 5;                 // of a product at once
constexpr int kSumRows = 3, kSumColumns = kLanes == 16 ? 5 : 3;
static_assert(kPixels % kStep == 0);

// f(constant, first) for tiles of at most `Most` of `count` rows, as equal as they can be.
template <int Most, class F>
void with_constant(int64_t n, const F& f) {
  if (n == Most) return f(std::integral_constant<int, Most>());
  if constexpr (Most > 1) with_constant<Most - 1>(n, f);
}
template <int Most, class F>
void in_tiles(int64_t count, const F& f) {
  int64_t first = 0;
  for (int64_t left = ceil_div(count, Most); left > 0; --left) {
    int64_t rows = ceil_div(count - first, left);
    with_constant<Most>(rows, [&](auto constant) { f(constant, first); });
    first += rows;
  }
}

// The parameters in float32.
struct Parameters {
  explicit Parameters(const ColorTransform& t) {
    copy_rows(t.weight1, 0, t.hidden, weight1, t.channels);
    copy_rows(t.weight2, 0, t.outputs, weight2, t.hidden);
    if (t.bias1.data) copy_rows(t.bias1, 0, 1, bias1, t.hidden);
    if (t.bias2.data) copy_rows(t.bias2, 0, 1, bias2, t.outputs);
    if (t.mean.data) copy_rows(t.mean, 0, 1, mean, t.channels);
  }
  float weight1[kMost * kMost], weight2[kMost * kMost];  // [hidden][channels], [outputs][hidden]
  float bias1[kMost] = {}, bias2[kMost] = {}, mean[kMost] = {};
};

// A matrix to multiply planes with.
struct Linear {
  const float* weight;
  int64_t row_stride, column_stride;
  const float* bias;  // null: 0
  int64_t rows, columns;
};

// f(row, pixel, sum): sum[r][i] = bias[r] + sum_c weight[r][c] planes[c][i], a vector of pixels at a time.
template <class F>
void multiply(const Linear& m, const float* planes, int64_t pixels, const F& f) {
  in_tiles<kMostRows>(m.rows, [&](auto rows, int64_t first) {
    constexpr int kRows = rows;
    const float* weight = m.weight + first * m.row_stride;
    for (int64_t i = 0; i < pixels; i += kStep) {
      Vec sums[kRows][kVecs];
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVecs; ++v) sums[r][v] = broadcast(m.bias ? m.bias[first + r] : 0.f);
      for (int64_t c = 0; c < m.columns; ++c) {
        Vec x[kVecs];
        for (int v = 0; v < kVecs; ++v) x[v] = load<Vec>(planes + c * kPixels + i + v * kLanes);
        for (int r = 0; r < kRows; ++r) {
          Vec w = broadcast(weight[r * m.row_stride + c * m.column_stride]);
          for (int v = 0; v < kVecs; ++v) sums[r][v] = fma(w, x[v], sums[r][v]);
        }
      }
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVecs; ++v) f(first + r, i + v * kLanes, sums[r][v]);
    }
  });
}

// sums[r][c] += a[r][i] b[c][i] over pixels i, lane by lane.
void add_products(const float* a, int64_t rows, const float* b, int64_t columns, int64_t pixels, float* sums) {
  in_tiles<kSumRows>(rows, [&](auto tile_rows, int64_t row) {
    in_tiles<kSumColumns>(columns, [&](auto tile_columns, int64_t column) {
      constexpr int kRows = tile_rows, kColumns = tile_columns;
      Vec tile[kRows][kColumns] = {};
      for (int64_t i = 0; i < pixels; i += kLanes) {
        Vec y[kColumns];
        for (int c = 0; c < kColumns; ++c) y[c] = load<Vec>(b + (column + c) * kPixels + i);
        for (int r = 0; r < kRows; ++r) {
          Vec x = load<Vec>(a + (row + r) * kPixels + i);
          for (int c = 0; c < kColumns; ++c) tile[r][c] = fma(x, y[c], tile[r][c]);
        }
      }
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kColumns; ++c) {
          float* sum = sums + ((row + r) * columns + column + c) * kLanes;
          store(sum, load<Vec>(sum) + tile[r][c]);
        }
    });
  });
}

// A block of pixels between the image and the output.
struct Planes {
  explicit Planes(const ColorTransform& transform, const Parameters& parameters) : t(transform), p(parameters) {
    std::fill_n(image + t.channels * kPixels, kPixels, 1.f);
    std::fill_n(hidden + t.hidden * kPixels, kPixels, 1.f);
  }

  // x, and the hidden layer. What is behind the last pixel is 0, as far as products go.
  void read(const Run& from, int64_t count) {
    pixels = round_up(count, kStep);
    read_planes(from, t.channels, count, image);
    for (int64_t c = 0; c < t.channels; ++c) {
      float *plane = image + c * kPixels, mean = p.mean[c], scale = t.scale;
      if (t.mean.data || scale != 1.f)
        for (int64_t i = 0; i < count; ++i) plane[i] = (plane[i] - mean) * scale;
      std::fill(plane + count, plane + pixels, 0.f);
    }
    multiply({p.weight1, t.channels, 1, p.bias1, t.hidden, t.channels}, image, pixels,
             [&](int64_t m, int64_t i, Vec z) { store(hidden + m * kPixels + i, leaky(z > 0.f, z)); });
  }

  // f(output, pixel, z): before the second activation.
  template <class F>
  void outputs(const F& f) const {
    multiply({p.weight2, t.hidden, 1, p.bias2, t.outputs, t.hidden}, hidden, pixels,
             [&](int64_t o, int64_t i, Vec z) { f(o, i, t.residual ? z + load<Vec>(image + o * kPixels + i) : z); });
  }

  // The activation or, of a gradient, its derivative.
  Vec leaky(IntVec positive, Vec x) const { return select(positive, x, x * t.negative_slope); }

  const ColorTransform& t;
  const Parameters& p;
  int64_t pixels = 0;  // in whole steps
  // A plane of ones follows the last: the gradients of biases are a column of those of weights.
  alignas(64) float image[(kMost + 1) * kPixels];
  alignas(64) float hidden[(kMost + 1) * kPixels];
  alignas(64) float output[kMost * kPixels];  // or its gradient
};

constexpr int64_t kPart = 16;  // blocks of a task, if that does not make too many

int64_t part_count(int64_t blocks) { return std::clamp<int64_t>(blocks / kPart, 1, 256); }

// f(part, first, last) for runs of blocks: the same ones on any number of threads.
template <class F>
void in_parts(const Host& host, int64_t blocks, const F& f) {
  int64_t parts = part_count(blocks);
  host.parallel(parts, [&](int64_t part) { f(part, blocks * part / parts, blocks * (part + 1) / parts); });
}

void run(const ColorTransform& t, const Host& host) {
  Parameters parameters(t);
  Blocks blocks(t.batch, t.height, t.width, {t.image, t.output});
  in_parts(host, blocks.count(), [&](int64_t, int64_t first, int64_t last) {
    Planes s(t, parameters);
    for (int64_t i = first; i < last; ++i) {
      Blocks::Block block = blocks[i];
      s.read(blocks.run(t.image, block, t.bytes), block.pixels);
      s.outputs([&](int64_t o, int64_t i, Vec z) { store(s.output + o * kPixels + i, s.leaky(z > 0.f, z)); });
      write_planes(s.output, t.outputs, block.pixels, blocks.run(t.output, block));
    }
  });
}

class Backward {
 public:
  explicit Backward(const ColorTransformBackward& backward)
      : b_(backward),
        t_(backward.forward),
        p_(backward.forward),
        blocks_(t_.batch, t_.height, t_.width, {t_.image, b_.grad_output, b_.grad_image}),
        sums1_(t_.hidden * (t_.channels + 1)),
        sums_(b_.grad_weight1 ? sums1_ + t_.outputs * (t_.hidden + 1) : 0) {}

  int64_t scratch_bytes() const { return round_up(part_count(blocks_.count()) * sums_ * int64_t(sizeof(double)), 64); }

  void run(void* scratch, const Host& host) const {
    double* parts = static_cast<double*>(scratch);
    in_parts(host, blocks_.count(), [&](int64_t part, int64_t first, int64_t last) {
      Planes s(t_, p_);
      alignas(64) float grad_hidden[kMost * kPixels];
      alignas(64) float sums[2 * kMost * (kMost + 1) * kLanes];
      std::fill_n(sums, sums_ * kLanes, 0.f);
      for (int64_t i = first; i < last; ++i) block(blocks_[i], s, grad_hidden, sums);
      for (int64_t j = 0; j < sums_; ++j) {
        double total = 0;
        for (int lane = 0; lane < kLanes; ++lane) total += double(sums[j * kLanes + lane]);
        parts[part * sums_ + j] = total;
      }
    });
    if (sums_ == 0) return;
    write(parts, t_.hidden, t_.channels, b_.grad_weight1, b_.grad_bias1);
    write(parts + sums1_, t_.outputs, t_.hidden, b_.grad_weight2, b_.grad_bias2);
  }

 private:
  void block(const Blocks::Block& block, Planes& s, float* grad_hidden, float* sums) const {
    // 1. The pixels, the hidden layer, and the gradient before the second activation.
    s.read(blocks_.run(t_.image, block, t_.bytes), block.pixels);
    read_planes(blocks_.run(b_.grad_output, block), t_.outputs, block.pixels, s.output);
    for (int64_t o = 0; o < t_.outputs; ++o)
      std::fill(s.output + o * kPixels + block.pixels, s.output + o * kPixels + s.pixels, 0.f);
    s.outputs([&](int64_t o, int64_t i, Vec z) {
      float* gradient = s.output + o * kPixels + i;
      store(gradient, s.leaky(z > 0.f, load<Vec>(gradient)));
    });
    // 2. Before the first; a hidden unit is positive where it was before its activation.
    multiply({p_.weight2, 1, t_.hidden, nullptr, t_.hidden, t_.outputs}, s.output, s.pixels,
             [&](int64_t m, int64_t i, Vec g) {
               store(grad_hidden + m * kPixels + i, s.leaky(load<Vec>(s.hidden + m * kPixels + i) > 0.f, g));
             });
    // 3. Sums over pixels.
    if (sums_ > 0) {
      add_products(grad_hidden, t_.hidden, s.image, t_.channels + 1, s.pixels, sums);
      add_products(s.output, t_.outputs, s.hidden, t_.hidden + 1, s.pixels, sums + sums1_ * kLanes);
    }
    // 4. The image's gradient, in the place of the image.
    if (!b_.grad_image.data) return;
    multiply({p_.weight1, 1, t_.channels, nullptr, t_.channels, t_.hidden}, grad_hidden, s.pixels,
             [&](int64_t c, int64_t i, Vec g) {
               if (t_.residual) g += load<Vec>(s.output + c * kPixels + i);
               store(s.image + c * kPixels + i, g * t_.scale);
             });
    write_planes(s.image, t_.channels, block.pixels, blocks_.run(b_.grad_image, block));
  }

  // Sums of all parts, in their order; the last of a row is that of the bias.
  void write(const double* parts, int64_t rows, int64_t columns, float* weight, float* bias) const {
    int64_t count = part_count(blocks_.count());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c <= columns; ++c) {
        double total = 0;
        for (int64_t part = 0; part < count; ++part) total += parts[part * sums_ + r * (columns + 1) + c];
        if (c < columns)
          weight[r * columns + c] = float(total);
        else if (bias)
          bias[r] = float(total);
      }
  }

  const ColorTransformBackward& b_;
  const ColorTransform& t_;
  Parameters p_;
  Blocks blocks_;
  int64_t sums1_, sums_;  // of the first layer's gradients, and of both where they are wanted
};

int64_t backward_scratch_bytes(const ColorTransformBackward& b) { return Backward(b).scratch_bytes(); }
void backward(const ColorTransformBackward& b, void* scratch, const Host& host) { Backward(b).run(scratch, host); }

}  // namespace

extern const ColorTransformKernel color_transform;
const ColorTransformKernel color_transform = {run, backward_scratch_bytes, backward};

}  // namespace PVL_ISA
}  // namespace perfvl
