// The k smallest of n losses without a sort, by counting: the leading digits of 32-bit keys, then those that share the
// digit of the k-th, then bits of the few left.
#pragma once

#include <algorithm>

#include "cpu/convert.h"
#include "cpu/small_loss.h"

namespace perfvl {
namespace PVL_ISA {

// Keys of small_loss.h: the order of unsigned numbers is that of the losses.
inline IntVec keys_of(Vec losses) {
  IntVec b = bits(losses + Vec{});  // -0 becomes 0
  IntVec key = b ^ (b >> 31 | int32_t(0x80000000u));
  return losses == losses ? key : IntVec{} + int32_t(kNanKey);
}
inline uint32_t key_of(float loss) { return uint32_t(keys_of(broadcast(loss))[0]); }

// Rows below `key`, and the first `ties` rows of this key.
struct Threshold {
  uint32_t key;
  int64_t ties;
};

inline int64_t count_below(const uint32_t* keys, int64_t n, uint32_t border) {
  uint32_t count = 0;  // n is below 2^32
  for (int64_t i = 0; i < n; ++i) count += keys[i] < border;
  return count;
}

// Of the k smallest of n keys, k <= n. `work` holds n keys.
inline Threshold smallest(const uint32_t* keys, int64_t n, int64_t k, uint32_t* work) {
  constexpr int64_t kFew = 4096;
  constexpr int kWidth = 11;  // bits of a digit
  constexpr uint32_t kDigits = 1 << kWidth;
  if (k == 0) return {0, 0};
  uint32_t key = 0;
  int open = 32;  // bits of the key that are not known yet
  for (; n > kFew && open > kWidth; open -= kWidth) {
    int shift = open - kWidth;
    auto digit_of = [=](uint32_t key) { return key >> shift & (kDigits - 1); };
    // 1. How many keys have which digit. Two counters each, so that equal digits wait less for one another.
    uint32_t counts[2][kDigits] = {};
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) ++counts[0][digit_of(keys[i])], ++counts[1][digit_of(keys[i + 1])];
    if (i < n) ++counts[0][digit_of(keys[i])];
    // 2. The digit of the k-th.
    uint32_t digit = 0;
    for (;; ++digit) {
      int64_t count = int64_t(counts[0][digit]) + counts[1][digit];
      if (k <= count) break;
      k -= count;
    }
    key |= digit << shift;
    // 3. The keys that share it.
    int64_t left = 0;
    for (i = 0; i < n; ++i) {
      uint32_t candidate = keys[i];
      work[left] = candidate;
      left += digit_of(candidate) == digit;
    }
    keys = work, n = left;
  }
  // 4. Bit by bit, the largest number that has fewer than k keys below it.
  for (int bit = open - 1; bit >= 0; --bit)
    if (uint32_t larger = key | 1u << bit; count_below(keys, n, larger) < k) key = larger;
  return {key, k - count_below(keys, n, key)};
}

inline void write_mask(Threshold border, const uint32_t* keys, int64_t n, uint8_t* mask) {
  for (int64_t i = 0; i < n; ++i) mask[i] = keys[i] < border.key;
  for (int64_t i = 0; border.ties > 0; ++i)
    if (keys[i] == border.key) mask[i] = 1, --border.ties;
}

// Row `group` of the losses as keys; returns how many are candidates.
inline int64_t write_keys(const SmallLossMask& m, int64_t group, uint32_t* keys) {
  Matrix losses{m.losses, m.groups, m.rows, m.group_stride, m.row_stride, m.dtype};
  int64_t i = 0;
  if (m.row_stride == 1)
    for (; i + kLanes <= m.rows; i += kLanes) store(keys + i, keys_of(load_lanes(losses, group * m.group_stride + i)));
  for (; i < m.rows; ++i) keys[i] = key_of(element(losses, group, i));
  if (!m.candidates) return m.rows;
  int64_t count = 0;
  const uint8_t* candidate = m.candidates + group * m.candidate_group_stride;
  for (i = 0; i < m.rows; ++i) {
    bool counts = candidate[i * m.candidate_row_stride];
    keys[i] = counts ? keys[i] : kNoCandidate;
    count += counts;
  }
  return count;
}

}  // namespace PVL_ISA
}  // namespace perfvl
