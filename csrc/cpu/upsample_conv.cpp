// Nearest x2 and 3x3 convolution as nine products of tiles that stay in a core's cache: a tile of input pixels is
// staged with its neighbours, three planes at a time are operand A, the nine results become four outputs per pixel on
// their way out. No upsampled tensor anywhere.
// Cost: 18 N H W C O FLOP at nearly the processor's peak, a quarter of the convolution's on the upsampled tensor; twice
// that backward. Input and output move once for every kColumns outputs, the weights once per thread.
#include "cpu/upsample_conv.h"

#include <algorithm>

#include "cpu/upsample_conv_tiles.h"
#include "cpu/upsample_conv_weights.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

constexpr int64_t kPixels = 128;  // of a tile, about

// Equal runs of `tasks` for the workers.
template <class F>
void share(const Host& host, int64_t tasks, const F& f) {
  int64_t workers = std::min(host.threads, tasks);
  host.parallel(workers, [&](int64_t worker) { f(worker, tasks * worker / workers, tasks * (worker + 1) / workers); });
}

// What the output and the gradient of the input share: tiles times runs of columns, with the weights in panels.
class PanelProducts {
 protected:
  PanelProducts(const UpsampleConv& conv, bool across, int64_t depth, int64_t columns, const Host& host)
      : conv_(conv), host_(host), across_(across), tiling_(conv, kPixels), panels_(conv, across) {
    depth_ = std::min(depth, panels_.depth), stride_ = staged_channels(depth_);
    chunk_ = columns;  // fewer where there would not be work for every thread
    while (chunk_ > kPanel && tasks() < 4 * host.threads) chunk_ /= 2;
  }

  int64_t tasks() const { return ceil_div(panels_.columns, chunk_) * tiling_.count(); }
  int64_t workers() const { return std::min(host_.threads, tasks()); }

  // f(worker, tile, column, columns) for all.
  template <class F>
  void run_tiles(float* panels, const F& f) const {
    host_.parallel(panels_.panels(), [&](int64_t i) { pack_weights(conv_, across_, i, panels + i * panels_.panel()); });
    share(host_, tasks(), [&](int64_t worker, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t column = i / tiling_.count() * chunk_;
        f(worker, tiling_[i % tiling_.count()], column, std::min(chunk_, panels_.columns - column));
      }
    });
  }

  const UpsampleConv& conv_;
  const Host& host_;
  bool across_;
  Tiling tiling_;
  WeightPanels panels_;
  int64_t depth_, stride_, chunk_;
};

class Forward : PanelProducts {
  static constexpr int64_t kDepth = 128, kColumns = 64;  // channels staged, outputs summed at once

  struct Scratch {
    float* panels;  // shared
    float *patch, *planes, *sums, *rows;
  };

 public:
  Forward(const UpsampleConv& conv, const Host& host) : PanelProducts(conv, false, kDepth, kColumns, host) {}

  int64_t scratch_bytes() const {
    int64_t bytes;
    scratch(nullptr, workers() - 1, &bytes);
    return bytes;
  }

  void run(void* base) const {
    run_tiles(scratch(base, 0).panels, [&](int64_t worker, const Tile& t, int64_t column, int64_t columns) {
      tile(t, column, columns, scratch(base, worker));
    });
  }

 private:
  Scratch scratch(void* base, int64_t worker, int64_t* bytes = nullptr) const {
    Arena arena(base);
    Scratch s{};
    s.panels = arena.take<float>(panels_.panels() * panels_.panel());
    for (int64_t i = 0; i <= worker; ++i) {
      s.patch = arena.take<float>(input_patch(tiling_) * stride_);
      s.planes = arena.take<float>(3 * tiling_.pixels() * stride_);
      s.sums = arena.take<float>(kPlanes * tiling_.pixels() * chunk_);
      s.rows = arena.take<float>(4 * tiling_.columns * kPanel);
    }
    if (bytes) *bytes = arena.used();
    return s;
  }

  void tile(const Tile& t, int64_t column, int64_t columns, const Scratch& s) const {
    int64_t pixels = t.pixels();
    for (int64_t c = 0; c < conv_.channels; c += depth_) {
      // 1. The pixels and their neighbours, as three planes at a time.
      int64_t depth = std::min(depth_, conv_.channels - c);
      stage_input(conv_, t, c, depth, s.patch, stride_);
      for_rows([&](auto a) {
        input_planes<a()>(t, s.patch, depth, {s.planes, pixels * stride_, stride_});
        // 2. The products, summed over channels.
        for (int64_t b = 0; b < 3; ++b) {
          Left<Floats> left{s.planes + b * pixels * stride_, stride_, 1};
          for (int64_t j = 0; j < columns; j += kPanel) {
            int64_t q = 3 * a + b;
            const float* panel =
                s.panels + (column + j) / kPanel * panels_.panel() + q * panels_.product() + c * kPanel;
            multiply_into<Floats>(left, {panel, 0, kPanel}, pixels, kPanel, depth, sums(s, t, j, q), kPanel, c > 0);
          }
        }
      });
    }
    // 3. Four outputs of nine sums.
    for (int64_t j = 0; j < columns; j += kPanel) finish(t, column + j, std::min<int64_t>(kPanel, columns - j), j, s);
  }

  // [panel][product][pixel][kPanel]
  static float* sums(const Scratch& s, const Tile& t, int64_t j, int64_t q) {
    return s.sums + (j / kPanel * kPlanes + q) * t.pixels() * kPanel;
  }

  void finish(const Tile& t, int64_t column, int64_t columns, int64_t j, const Scratch& s) const {
    Pointwise after{conv_.scale, conv_.shift, conv_.activation};
    int64_t plane = t.pixels() * kPanel, row = 2 * t.width * kPanel, pixel = 0;
    for (int64_t g = 0; g < t.images; ++g)
      for (int64_t r = 0; r < t.rows; ++r) {
        for (int64_t w = 0; w < t.width; ++w, ++pixel)
          for (int64_t c = 0; c < columns; c += kLanes) {
            const float* sum = sums(s, t, j, 0) + pixel * kPanel + c;
            Vec across[3][2];  // the vertical operands' even and odd columns
            for (int a = 0; a < 3; ++a, sum += 3 * plane) {
              Vec middle = load<Vec>(sum + plane);
              across[a][0] = load<Vec>(sum) + middle, across[a][1] = middle + load<Vec>(sum + 2 * plane);
            }
            int64_t lanes = std::min<int64_t>(kLanes, columns - c);
            for (int b = 0; b < 2; ++b) {
              float* to = s.rows + (2 * w + b) * kPanel + c;
              store(to, after(across[0][b] + across[1][b], column + c, lanes));
              store(to + row, after(across[1][b] + across[2][b], column + c, lanes));
            }
          }
        for (int64_t a = 0; a < 2; ++a)
          write_pixels(conv_.output, t.n + g, 2 * (t.h + r) + a, 2 * t.w, 2 * t.width, column, columns,
                       s.rows + a * row, kPanel);
      }
  }
};

// The gradient of the input: nine products of the gradient's planes, all summed in one place.
class InputGradient : PanelProducts {
  static constexpr int64_t kDepth = 64, kColumns = 256;

  struct Scratch {
    float* panels;  // shared
    float *patch, *planes, *sums;
  };

 public:
  InputGradient(const UpsampleConvBackward& backward, const Host& host)
      : PanelProducts(backward.forward, true, kDepth, kColumns, host), b_(backward) {}

  int64_t scratch_bytes() const {
    int64_t bytes;
    scratch(nullptr, workers() - 1, &bytes);
    return bytes;
  }

  void run(void* base) const {
    run_tiles(scratch(base, 0).panels, [&](int64_t worker, const Tile& t, int64_t column, int64_t columns) {
      tile(t, column, columns, scratch(base, worker));
    });
  }

 private:
  Scratch scratch(void* base, int64_t worker, int64_t* bytes = nullptr) const {
    Arena arena(base);
    Scratch s{};
    s.panels = arena.take<float>(panels_.panels() * panels_.panel());
    for (int64_t i = 0; i <= worker; ++i) {
      s.patch = arena.take<float>(output_patch(tiling_, 1) * stride_);
      s.planes = arena.take<float>(3 * tiling_.pixels() * stride_);
      s.sums = arena.take<float>(tiling_.pixels() * chunk_);
    }
    if (bytes) *bytes = arena.used();
    return s;
  }

  void tile(const Tile& t, int64_t column, int64_t columns, const Scratch& s) const {
    int64_t pixels = t.pixels(), row = round_up(columns, kPanel);
    for (int64_t o = 0; o < conv_.outputs; o += depth_) {
      int64_t depth = std::min(depth_, conv_.outputs - o);
      stage_gradient(conv_, b_.grad_output, t, 1, o, depth, s.patch, stride_);
      for_rows([&](auto a) {
        gradient_planes<a()>(t, s.patch, depth, {s.planes, pixels * stride_, stride_});
        for (int64_t b = 0; b < 3; ++b) {
          int64_t q = 3 * a + b;
          const float* first = s.panels + column / kPanel * panels_.panel() + q * panels_.product() + o * kPanel;
          multiply_into<Floats>({s.planes + b * pixels * stride_, stride_, 1}, {first, panels_.panel(), kPanel}, pixels,
                                row, depth, s.sums, row, o + q > 0);
        }
      });
    }
    const float* from = s.sums;
    for (int64_t g = 0; g < t.images; ++g)
      for (int64_t r = 0; r < t.rows; ++r, from += t.width * row)
        write_pixels(b_.grad_input, t.n + g, t.h + r, t.w, t.width, column, columns, from, row);
  }

  const UpsampleConvBackward& b_;
};

// The gradient of the weights: a block of inputs times outputs at a time, over all pixels.
class WeightGradient {
  static constexpr int64_t kRows = 128, kColumns = 64;

  struct Scratch {
    float* sums;  // shared: [part][block] where the pixels are shared out, else the worker's own block
    float *input_patch, *output_patch, *input, *output;
  };

 public:
  WeightGradient(const UpsampleConvBackward& backward, const Host& host)
      : b_(backward), conv_(backward.forward), host_(host), tiling_(conv_, kPixels) {
    rows_ = std::min(kRows, conv_.channels), columns_ = std::min(kColumns, conv_.outputs);
    blocks_ = ceil_div(conv_.channels, rows_) * ceil_div(conv_.outputs, columns_);
    // Pixels are shared out where there are too few blocks to keep the threads equally busy.
    for (parts_ = 1; parts_ < tiling_.count(); ++parts_)
      if (blocks_ * parts_ % host.threads == 0 || blocks_ * parts_ >= 4 * host.threads) break;
  }

  int64_t scratch_bytes() const {
    int64_t bytes;
    scratch(nullptr, std::min(host_.threads, blocks_ * parts_) - 1, &bytes);
    return bytes;
  }

  void run(void* base) const {
    share(host_, blocks_ * parts_, [&](int64_t worker, int64_t begin, int64_t end) {
      Scratch s = scratch(base, worker);
      for (int64_t i = begin; i < end; ++i) {
        int64_t block = i / parts_, part = i % parts_, tiles = tiling_.count();
        float* sums = parts_ > 1 ? s.sums + i * block_floats() : s.sums;
        for (int64_t j = tiles * part / parts_; j < tiles * (part + 1) / parts_; ++j)
          tile(tiling_[j], block, j > tiles * part / parts_, s, sums);
        if (parts_ == 1) unpack(block, sums);
      }
    });
    if (parts_ > 1) {
      const float* sums = scratch(base, 0).sums;
      host_.parallel(blocks_, [&](int64_t block) { unpack(block, sums + block * parts_ * block_floats()); });
    }
  }

 private:
  struct Block {
    int64_t c, channels, o, outputs;
  };
  Block block(int64_t i) const {
    int64_t across = ceil_div(conv_.outputs, columns_), c = i / across * rows_, o = i % across * columns_;
    return {c, std::min(rows_, conv_.channels - c), o, std::min(columns_, conv_.outputs - o)};
  }
  int64_t row() const { return round_up(columns_, kLanes); }
  int64_t block_floats() const { return round_up(kPlanes * rows_ * row(), kLanes); }
  void unpack(int64_t i, const float* sums) const {
    Block k = block(i);
    unpack_weights(b_.grad_weight, k.o, k.outputs, k.c, k.channels, sums, row(), parts_, block_floats());
  }

  Scratch scratch(void* base, int64_t worker, int64_t* bytes = nullptr) const {
    Arena arena(base);
    Scratch s{};
    if (parts_ > 1) s.sums = arena.take<float>(blocks_ * parts_ * block_floats());
    for (int64_t i = 0; i <= worker; ++i) {
      if (parts_ == 1) s.sums = arena.take<float>(block_floats());
      s.input_patch = arena.take<float>(input_patch(tiling_) * staged_channels(rows_));
      s.output_patch = arena.take<float>(output_patch(tiling_, 0) * staged_channels(columns_));
      s.input = arena.take<float>(3 * tiling_.pixels() * staged_channels(rows_));
      s.output = arena.take<float>(3 * tiling_.pixels() * staged_channels(columns_) + kPanel);
    }
    if (bytes) *bytes = arena.used();
    return s;
  }

  void tile(const Tile& t, int64_t i, bool add, const Scratch& s, float* sums) const {
    Block k = block(i);
    int64_t pixels = t.pixels(), stride = staged_channels(rows_), out_stride = staged_channels(columns_);
    stage_input(conv_, t, k.c, k.channels, s.input_patch, stride);
    stage_gradient(conv_, b_.grad_output, t, 0, k.o, k.outputs, s.output_patch, out_stride);
    for_rows([&](auto a) {
      input_planes<a()>(t, s.input_patch, k.channels, {s.input, pixels * stride, stride});
      output_planes<a()>(t, s.output_patch, k.outputs, {s.output, pixels * out_stride, out_stride});
      for (int64_t b = 0; b < 3; ++b)
        multiply_into<Floats>({s.input + b * pixels * stride, 1, stride},
                              {s.output + b * pixels * out_stride, kPanel, out_stride}, k.channels,
                              round_up(k.outputs, kLanes), pixels, sums + (3 * a + b) * k.channels * row(), row(), add);
    });
  }

  const UpsampleConvBackward& b_;
  const UpsampleConv& conv_;
  const Host& host_;
  Tiling tiling_;
  int64_t rows_, columns_, blocks_, parts_;
};

// The sum of the gradient over all pixels, a vector of channels at a time.
void bias_gradient(const UpsampleConvBackward& b, const Host& host) {
  const UpsampleConv& conv = b.forward;
  host.parallel(ceil_div(conv.outputs, kLanes), [&](int64_t i) {
    int64_t c = i * kLanes, lanes = std::min<int64_t>(kLanes, conv.outputs - c);
    int64_t step = b.grad_output.w_stride * element_bytes(b.grad_output.dtype);
    double total[kLanes] = {};
    for (int64_t n = 0; n < conv.batch; ++n)
      for (int64_t h = 0; h < 2 * conv.height; ++h) {
        const char* pixel = at(b.grad_output, n, c, h, 0);
        Vec sum{};
        for (int64_t w = 0; w < 2 * conv.width; ++w) sum += read_channels(b.grad_output, pixel + w * step, 0, lanes);
        for (int64_t lane = 0; lane < lanes; ++lane) total[lane] += double(sum[lane]);
      }
    for (int64_t lane = 0; lane < lanes; ++lane) b.grad_bias[c + lane] = float(total[lane]);
  });
}

int64_t scratch_bytes(const UpsampleConv& conv, const Host& host) { return Forward(conv, host).scratch_bytes(); }
void run(const UpsampleConv& conv, void* scratch, const Host& host) { Forward(conv, host).run(scratch); }

// One after the other in the same memory.
int64_t backward_scratch_bytes(const UpsampleConvBackward& b, const Host& host) {
  int64_t input = b.grad_input.data ? InputGradient(b, host).scratch_bytes() : 0;
  return std::max(input, b.grad_weight.data ? WeightGradient(b, host).scratch_bytes() : 0);
}
void run_backward(const UpsampleConvBackward& b, void* scratch, const Host& host) {
  if (b.grad_input.data) InputGradient(b, host).run(scratch);
  if (b.grad_weight.data) WeightGradient(b, host).run(scratch);
  if (b.grad_bias) bias_gradient(b, host);
}

}  // namespace

extern const UpsampleConvKernel upsample_conv;
const UpsampleConvKernel upsample_conv = {scratch_bytes, run, backward_scratch_bytes, run_backward};

}  // namespace PVL_ISA
}  // namespace perfvl
