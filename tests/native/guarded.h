// Memory that ends at a page nobody may touch, and numpy arrays copied into such memory: one element read or written
// too far is a segmentation fault, also where AddressSanitizer does not look (AMX tile loads, uninstrumented code).
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "common.h"

namespace native_tests {

namespace py = pybind11;
using perfvl::Dtype;
using perfvl::Matrix;

// `bytes` of 0xff (NaN in every float type). They end at the page, or `shift` bytes before it, to set the alignment.
// Beyond a gigabyte, for rows far apart, untouched bytes are zero instead and cost no memory.
class Guarded {
 public:
  explicit Guarded(int64_t bytes, int64_t shift = 0) : bytes_(bytes), page_(sysconf(_SC_PAGESIZE)) {
    usable_ = perfvl::round_up(bytes + shift, page_);
    base_ = static_cast<char*>(
        mmap(nullptr, usable_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + page_, usable_, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
    if (usable_ < int64_t(1) << 30) std::memset(base_ + page_, 0xff, usable_);
    data_ = base_ + page_ + usable_ - bytes - shift;
  }
  ~Guarded() { munmap(base_, usable_ + 2 * page_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }

  // Whoever wrote before or after the data, on the pages it shares, is found here.
  void check(const char* name) const {
    auto untouched = [](const char* from, const char* to) {
      return std::all_of(from, to, [](char c) { return c == char(0xff); });
    };
    if (!untouched(base_ + page_, data_) || !untouched(data_ + bytes_, base_ + page_ + usable_))
      throw std::runtime_error(std::string(name) + ": bytes outside the array were written");
  }

  // A new numpy array with what is in the memory now.
  py::array array(const py::dtype& dtype, std::vector<py::ssize_t> shape, const char* name) const {
    check(name);
    py::array out(dtype, std::move(shape));
    if (out.nbytes() != bytes_) throw std::runtime_error(std::string(name) + ": size mismatch");
    std::memcpy(out.mutable_data(), data_, size_t(bytes_));
    return out;
  }

 private:
  int64_t bytes_, page_, usable_;
  char *base_, *data_;
};

inline int64_t item_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// float32 and float16 are themselves; uint16 holds the bits of bfloat16, which numpy does not know.
inline Dtype dtype_of(const py::dtype& dtype) {
  if (dtype.is(py::dtype::of<float>())) return Dtype::float32;
  if (dtype.is(py::dtype::of<uint16_t>())) return Dtype::bfloat16;
  if (dtype.is(py::dtype("e"))) return Dtype::float16;
  throw std::invalid_argument("float32, float16 or uint16 (bfloat16) expected");
}
inline py::dtype dtype_of(Dtype dtype) {
  return dtype == Dtype::float32    ? py::dtype::of<float>()
         : dtype == Dtype::bfloat16 ? py::dtype::of<uint16_t>()
                                    : py::dtype("e");
}

inline int64_t span(const py::array& a) {
  int64_t last = 0;
  for (py::ssize_t i = 0; i < a.ndim(); ++i) {
    if (a.strides(i) < 0) throw std::invalid_argument("torch has no negative strides");
    last += (a.shape(i) - 1) * a.strides(i);
  }
  return a.size() ? last + a.itemsize() : 0;
}

// A numpy matrix or vector with its strides, its first to its last element, in guarded memory. What lies between the
// elements stays NaN.
class GuardedInput {
 public:
  explicit GuardedInput(const py::array& a, int64_t shift = 0) : memory_(span(a), shift * a.itemsize()), array_(a) {
    int64_t rows = a.ndim() > 1 ? a.shape(0) : 1, cols = a.shape(a.ndim() - 1);
    int64_t row_stride = a.ndim() > 1 ? a.strides(0) : 0, col_stride = a.strides(a.ndim() - 1);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) {
        int64_t at = r * row_stride + c * col_stride;
        std::memcpy(memory_.data<char>() + at, static_cast<const char*>(a.data()) + at, size_t(a.itemsize()));
      }
  }
  Matrix matrix() const {
    int64_t item = array_.itemsize();
    return {memory_.data(),           array_.shape(0),          array_.shape(1),
            array_.strides(0) / item, array_.strides(1) / item, dtype_of(array_.dtype())};
  }
  template <class T>
  const T* data() const {
    return memory_.data<const T>();
  }

 private:
  Guarded memory_;
  py::array array_;
};

}  // namespace native_tests
