// Lists of tensors as flat pairs for the kernels of momentum_update_. Whatever a flat pass cannot do is refused here,
// by an exception, before anything is written; perfvl/ops/momentum_update.py then says which argument it was, or takes
// another way.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "momentum_update.h"
#include "tensor.h"

namespace perfvl {

// What a flat pass has to know of a tensor.
struct Flat {
  AtenTensorHandle tensor;
  int64_t dim, count;
  int64_t* sizes;
  int32_t dtype, device_type, device;
  bool contiguous;
};

inline Flat flat(AtenTensorHandle t) {
  Flat f{};
  f.tensor = t;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t, &f.dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(t, &f.count));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t, &f.sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &f.dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t, &f.device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t, &f.device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(t, &f.contiguous));
  return f;
}

// The same shape on the same device, and the same elements at the same places of two blocks of memory without gaps or
// repetition.
inline bool flat_alike(const Flat& a, const Flat& b) {
  if (a.device_type != b.device_type || a.device != b.device || a.dim != b.dim ||
      !std::equal(a.sizes, a.sizes + a.dim, b.sizes))
    return false;
  if (a.contiguous && b.contiguous) return true;
  int64_t *strides, *others;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(a.tensor, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(b.tensor, &others));
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (int64_t i = 0; i < a.dim; ++i) {
    if (a.sizes[i] == 1) continue;
    if (strides[i] != others[i]) return false;
    axes.emplace_back(strides[i], a.sizes[i]);
  }
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (auto [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether no memory is written twice (a tied tensor would be averaged twice).
inline bool apart(const std::vector<MomentumPair>& pairs, void* MomentumPair::* start, Dtype MomentumPair::* type) {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  ranges.reserve(pairs.size());
  for (const MomentumPair& pair : pairs)
    if (auto begin = reinterpret_cast<uintptr_t>(pair.*start))
      ranges.emplace_back(begin, begin + pair.count * (pair.*type == Dtype::float32 ? 4 : 2));
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i)
    if (ranges[i].first < ranges[i - 1].second) return false;
  return true;
}

// Sorting five hundred addresses takes longer than averaging five hundred small tensors, and training brings the same
// list every step: the lists found apart are remembered, by a hash of every address and size.
inline bool written_once(const std::vector<MomentumPair>& pairs) {
  uint64_t hash = pairs.size();
  auto mix = [&](uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  };
  for (const MomentumPair& p : pairs)
    mix(reinterpret_cast<uintptr_t>(p.target)), mix(reinterpret_cast<uintptr_t>(p.copy)), mix(uint64_t(p.count)),
        mix(uint64_t(p.target_dtype) << 8 | uint64_t(p.copy_dtype));
  thread_local std::array<uint64_t, 8> known{};
  thread_local size_t oldest = 0;
  if (std::find(known.begin(), known.end(), hash) != known.end()) return true;
  if (!apart(pairs, &MomentumPair::target, &MomentumPair::target_dtype) ||
      !apart(pairs, &MomentumPair::copy, &MomentumPair::copy_dtype))
    return false;
  known[oldest++ % known.size()] = hash;
  return true;
}

inline std::vector<MomentumPair> momentum_pairs(const TensorList& targets, const TensorList& sources,
                                                const TensorList& copies) {
  size_t count = targets.size(), copied = copies.size();
  STD_TORCH_CHECK(sources.size() == count && (copied == 0 || copied == count),
                  "momentum_update_: lists of different lengths");
  std::vector<MomentumPair> pairs;
  pairs.reserve(count);
  auto write = [](AtenTensorHandle t, void** data) { TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(t, data)); };
  Flat first{};
  for (size_t i = 0; i < count; ++i) {
    Flat target = flat(targets[i]), source = flat(sources[i]);
    if (i == 0) first = target;
    MomentumPair pair{};
    pair.count = target.count;
    pair.target_dtype = dtype_of(target.dtype), pair.source_dtype = dtype_of(source.dtype);
    bool fits = flat_alike(target, source) && target.device_type == first.device_type && target.device == first.device;
    if (copied) {
      Flat copy = flat(copies[i]);
      fits = fits && flat_alike(target, copy);
      pair.copy_dtype = dtype_of(copy.dtype);
    }
    STD_TORCH_CHECK(fits, "momentum_update_: pair ", i, " differs in shape, strides or device, or is not dense");
    if (pair.count == 0) continue;
    write(targets[i], &pair.target);
    if (copied) write(copies[i], &pair.copy);
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(sources[i], &pair.source));
    pairs.push_back(pair);
  }
  STD_TORCH_CHECK(written_once(pairs), "momentum_update_: tensors that are written share memory");
  return pairs;
}

inline MomentumWeights momentum_weights(double momentum, const std::optional<Tensor>& tensor, bool convex) {
  if (!tensor) return {momentum, nullptr, false, convex};
  return {0, tensor->const_data_ptr(), tensor->scalar_type() == ScalarType::Double, convex};
}

}  // namespace perfvl
