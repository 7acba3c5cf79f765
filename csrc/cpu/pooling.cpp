// Maximum + average pooling, stochastic pooling, and the gradient of both.
//
// Forward reads the image once and writes a number and a byte for each window, where PyTorch's two functions read it
// twice and leave two outputs and 64-bit indices. Backward reads the gradients and bytes of the windows over a pixel
// (1, 2 or 4 with 3x3 windows 2 apart) and writes each pixel once: no zeros to add to, no order to keep. Both work on
// vectors of channels: a channels_last image is taken as it lies, of any other some rows at a time are turned
// (pooling_blocks.h), which the caches hold and whose cost the pass over memory hides.
#include "cpu/pooling.h"

#include "cpu/pooling_windows.h"

namespace perfvl {
namespace PVL_ISA {
namespace {

constexpr int64_t kPixels = 2048;  // of a block, at most, but for long rows: 128 KB with sixteen lanes
constexpr int64_t kMostVisits = 256;

// Tasks of a problem whose images are turned: blocks of channels of a sample, by bands of rows.
struct Bands {
  int64_t batch, channels, rows, band;  // rows: of all bands; band: rows of one
  int64_t blocks() const { return ceil_div(channels, kLanes); }
  int64_t count() const { return ceil_div(rows, band); }
  int64_t tasks() const { return batch * blocks() * count(); }
  // f(sample, first channel, lanes, first row, one past the last row)
  template <class F>
  void task(int64_t i, const F& f) const {
    int64_t row = i % count() * band, c = i / count() % blocks() * kLanes;
    f(i / count() / blocks(), c, std::min<int64_t>(kLanes, channels - c), row, std::min(row + band, rows));
  }
};

// Forward
// --------------------------------------------------------------------------------------------------------------

// Bands of windows: as many rows of them as lie over so many pixels.
Bands bands(const Pool& p) {
  int64_t rows = (kPixels / std::max(p.w.in, p.w.out) - p.h.kernel) / p.h.stride + 1;
  return {p.batch, p.channels, p.h.out, std::clamp<int64_t>(rows, 1, p.h.out)};
}
int64_t elements(const Pool& p) { return p.batch * p.channels * p.h.in * p.w.in; }

bool is_direct(const Pool& p) {
  return p.input.c_stride == 1 && p.output.c_stride == 1 && (!p.positions.data || p.positions.c_stride == 1);
}

// What a share has of the scratch: a block of pixels, one of windows, one of positions.
struct Blocks {
  float *pixels, *windows, *positions;
  int64_t bytes;
  Blocks(const Pool& p, void* scratch, int64_t share) {
    int64_t band = bands(p).band, rows = std::min((band - 1) * p.h.stride + p.h.kernel, p.h.in);
    int64_t in = rows * p.w.in * kLanes, out = band * p.w.out * kLanes;
    bytes = round_up((in + 2 * out) * int64_t(sizeof(float)), 64);
    pixels = reinterpret_cast<float*>(static_cast<char*>(scratch) + share * bytes);
    windows = pixels + in, positions = windows + out;
  }
};

int64_t scratch_bytes(const Pool& p, const Host& host) {
  return is_direct(p) ? 0 : Blocks(p, nullptr, 0).bytes * share_count(host, bands(p).tasks(), elements(p));
}

// f<T, P>(input, output, positions, first row of windows, one past the last, channels, sample, first channel): on
// images whose channels lie behind one another, as numbers T and positions P.
template <class F>
void by_rows(const Pool& p, void* scratch, const Host& host, const F& f) {
  with_floats(p.input.dtype, [&]<class T>(T) {
    if (is_direct(p))
      return by_task(host, p.batch * p.h.out, elements(p), [&](int64_t i, int64_t) {
        int64_t n = i / p.h.out, oh = i % p.h.out;
        f.template operator()<T, Bytes>(plane(p.input, n, 0), plane(p.output, n, 0), plane(p.positions, n, 0), oh,
                                        oh + 1, p.channels, n, 0);
      });
    Bands all = bands(p);
    by_task(host, all.tasks(), elements(p), [&](int64_t i, int64_t share) {
      Blocks own(p, scratch, share);
      all.task(i, [&](int64_t n, int64_t c, int64_t lanes, int64_t oh, int64_t end) {
        int64_t h = p.h.first(oh), rows = p.h.last(end - 1) - h;
        stage<T>(plane(p.input, n, c), lanes, h, rows, p.w.in, own.pixels);
        Plane positions = p.positions.data ? block(own.positions, oh, p.w.out) : Plane{};
        f.template operator()<Words, Words>(block(own.pixels, h, p.w.in), block(own.windows, oh, p.w.out), positions,
                                            oh, end, kLanes, n, c);
        unstage<T>(own.windows, plane(p.output, n, c), lanes, oh, end - oh, p.w.out);
        if (p.positions.data) unstage<Bytes>(own.positions, plane(p.positions, n, c), lanes, oh, end - oh, p.w.out);
      });
    });
  });
}

// f(window, oh, ow) for every window of these rows, as far as it is in rows [top, bottom) of the image.
template <class F>
void by_window(const PoolSide h, const PoolSide w, const Plane in, int64_t top, int64_t bottom, const Plane out,
               const Plane positions, int64_t oh, int64_t end, const F& f) {
  for (; oh < end; ++oh) {
    int64_t h0 = std::max(h.first(oh), top), rows = std::min(h.last(oh), bottom) - h0;
    int64_t height = h.extent(oh), above = h0 - h.begin(oh);
    for (int64_t ow = 0; ow < w.out; ++ow) {
      int64_t w0 = w.first(ow), position = above * w.kernel + w0 - w.begin(ow);
      f(Window{in.at(h0, w0), in.h_step, in.w_step, rows, w.last(ow) - w0, int32_t(position), int32_t(w.kernel),
               float(height * w.extent(ow)), out.at(oh, ow), positions.at(oh, ow)},
        oh, ow);
    }
  }
}

template <class T, class P, bool kPositions>
void max_average_rows(const Pool& p, const Plane& in, const Plane& out, const Plane& positions, int64_t oh, int64_t end,
                      int64_t channels) {
  by_window(p.h, p.w, in, 0, p.h.in, out, positions, oh, end, [&](const Window& w, int64_t, int64_t) {
    if (w.rows == 3 && w.cols == 3) return max_average_window<T, P, kPositions, 3>(w, channels);
    if (w.rows == 2 && w.cols == 2) return max_average_window<T, P, kPositions, 2>(w, channels);
    max_average_window<T, P, kPositions, 0>(w, channels);
  });
}

void max_average(const Pool& p, void* scratch, const Host& host) {
  by_rows(p, scratch, host,
          [&]<class T, class P>(const Plane& in, const Plane& out, const Plane& positions, int64_t oh, int64_t end,
                                int64_t channels, int64_t, int64_t) {
            if (p.positions.data) return max_average_rows<T, P, true>(p, in, out, positions, oh, end, channels);
            max_average_rows<T, P, false>(p, in, out, positions, oh, end, channels);
          });
}

void stochastic(const StochasticPool& s, void* scratch, const Host& host) {
  const Pool& p = s.pool;
  by_rows(p, scratch, host,
          [&]<class T, class P>(const Plane& in, const Plane& out, const Plane& positions, int64_t oh, int64_t end,
                                int64_t channels, int64_t n, int64_t c) {
            Plane uniform = s.uniform.data ? plane(s.uniform, n, c) : Plane{};
            int64_t drawn = std::min(channels, p.channels - c);  // a block may have lanes without a channel
            by_window(p.h, p.w, in, 0, p.h.in, out, positions, oh, end, [&](const Window& w, int64_t i, int64_t j) {
              stochastic_window<T, P>(w, channels, uniform.at(i, j), uniform.c_step, drawn);
            });
          });
}

// Backward
// -------------------------------------------------------------------------------------------------------------

Bands bands(const PoolBackward& b) {
  int64_t rows = kPixels / std::max(b.w.in, b.w.out);
  return {b.batch, b.channels, b.h.in, std::clamp<int64_t>(rows, 1, b.h.in)};
}
int64_t elements(const PoolBackward& b) { return b.batch * b.channels * b.h.in * b.w.in; }

bool is_direct(const PoolBackward& b) {
  return b.grad_output.c_stride == 1 && b.positions.c_stride == 1 && b.grad_input.c_stride == 1;
}

struct BackwardBlocks {
  float *pixels, *windows, *positions;
  int64_t bytes;
  BackwardBlocks(const PoolBackward& b, void* scratch, int64_t share) {
    int64_t band = bands(b).band, rows = std::min((band + b.h.kernel - 2) / b.h.stride + 1, b.h.out);
    int64_t in = band * b.w.in * kLanes, out = rows * b.w.out * kLanes;
    bytes = round_up((in + 2 * out) * int64_t(sizeof(float)), 64);
    pixels = reinterpret_cast<float*>(static_cast<char*>(scratch) + share * bytes);
    windows = pixels + in, positions = windows + out;
  }
};

int64_t backward_scratch_bytes(const PoolBackward& b, const Host& host) {
  return is_direct(b) ? 0 : BackwardBlocks(b, nullptr, 0).bytes * share_count(host, bands(b).tasks(), elements(b));
}

// The windows over pixel after pixel of an axis, [from, to).
struct Over {
  explicit Over(const PoolSide& side, int64_t i) : side_(side), from(side.first_over(i)), to(side.last_over(i)) {}
  void step(int64_t i) {  // on to pixel `i`, the next one
    while (to < side_.out && side_.begin(to) <= i) ++to;
    while (from < to && side_.begin(from) + side_.kernel <= i) ++from;
  }

 private:
  const PoolSide side_;

 public:
  int64_t from, to;
};

// Rows [h, end) of pixels of a block, window by window.
template <bool kAverage>
void scatter_rows(const PoolBackward& b, const Plane& gradients, const Plane& positions, const Plane& out, int64_t h,
                  int64_t end) {
  std::memset(out.at(h, 0), 0, size_t((end - h) * out.h_step));
  by_window(b.h, b.w, out, h, end, gradients, positions, b.h.first_over(h), b.h.last_over(end - 1),
            [&](const Window& w, int64_t, int64_t) {
              if (w.rows == 3 && w.cols == 3) return scatter_window<kAverage, 3>(w);
              if (w.rows == 2 && w.cols == 2) return scatter_window<kAverage, 2>(w);
              scatter_window<kAverage, 0>(w);
            });
}

// Rows [h, end) of pixels of a channels_last image, pixel by pixel.
template <class T, class P, bool kAverage>
void gather_rows(const PoolBackward& b, const Plane gradients, const Plane positions, const Plane out, int64_t h,
                 int64_t end, int64_t channels) {
  const PoolSide sh = b.h, sw = b.w;
  const int64_t whole = sh.kernel * sw.kernel;
  const float part = 1.f / float(whole);
  Visit visits[kMostVisits];
  Over rows(sh, h);
  for (; h < end; ++h, rows.step(h)) {
    Over cols(sw, 0);
    for (int64_t w = 0; w < sw.in; ++w, cols.step(w)) {
      int64_t count = 0;
      for (int64_t oh = rows.from; oh < rows.to; ++oh)
        for (int64_t ow = cols.from; ow < cols.to; ++ow) {
          Visit& v = visits[count++];
          v.gradient = gradients.at(oh, ow), v.position = positions.at(oh, ow);
          v.here = int32_t((h - sh.begin(oh)) * sw.kernel + w - sw.begin(ow));
          if constexpr (kAverage) {
            int64_t size = sh.extent(oh) * sw.extent(ow);
            v.share = size == whole ? part : 1.f / float(size);
          }
        }
      char* to = out.at(h, w);
      switch (count) {
        case 1: gather<T, P, kAverage, 1>(visits, count, to, channels); break;
        case 2: gather<T, P, kAverage, 2>(visits, count, to, channels); break;
        case 4: gather<T, P, kAverage, 4>(visits, count, to, channels); break;
        default: gather<T, P, kAverage, 0>(visits, count, to, channels);
      }
    }
  }
}

template <class T, class P>
void gather_rows(const PoolBackward& b, const Plane& gradients, const Plane& positions, const Plane& out, int64_t h,
                 int64_t end, int64_t channels) {
  if (b.average) return gather_rows<T, P, true>(b, gradients, positions, out, h, end, channels);
  gather_rows<T, P, false>(b, gradients, positions, out, h, end, channels);
}

void backward(const PoolBackward& b, void* scratch, const Host& host) {
  with_floats(b.grad_input.dtype, [&]<class T>(T) {
    if (is_direct(b))
      return by_task(host, b.batch * b.h.in, elements(b), [&](int64_t i, int64_t) {
        int64_t n = i / b.h.in, h = i % b.h.in;
        gather_rows<T, Bytes>(b, plane(b.grad_output, n, 0), plane(b.positions, n, 0), plane(b.grad_input, n, 0), h,
                              h + 1, b.channels);
      });
    Bands all = bands(b);
    by_task(host, all.tasks(), elements(b), [&](int64_t i, int64_t share) {
      BackwardBlocks own(b, scratch, share);
      all.task(i, [&](int64_t n, int64_t c, int64_t lanes, int64_t h, int64_t end) {
        int64_t oh = b.h.first_over(h), rows = std::max<int64_t>(b.h.last_over(end - 1) - oh, 0);
        stage<T>(plane(b.grad_output, n, c), lanes, oh, rows, b.w.out, own.windows);
        stage<Bytes>(plane(b.positions, n, c), lanes, oh, rows, b.w.out, own.positions);
        Plane gradients = block(own.windows, oh, b.w.out), positions = block(own.positions, oh, b.w.out);
        Plane pixels = block(own.pixels, h, b.w.in);
        if (b.average)
          scatter_rows<true>(b, gradients, positions, pixels, h, end);
        else
          scatter_rows<false>(b, gradients, positions, pixels, h, end);
        unstage<T>(own.pixels, plane(b.grad_input, n, c), lanes, h, end - h, b.w.in);
      });
    });
  });
}

}  // namespace

extern const PoolingKernel pooling;
const PoolingKernel pooling = {scratch_bytes, max_average, stochastic, backward_scratch_bytes, backward};

}  // namespace PVL_ISA
}  // namespace perfvl
