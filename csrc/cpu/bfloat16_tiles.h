// Products of bfloat16 tiles with float32 sums: AMX where compiled for it, else AVX-512's dot-product instruction.
// Both read the same operand layouts:
//   "rows"   A: [16][32], 16 rows of 32 values
//   "pairs"  B: [16][16][2], values 2j and 2j+1 of column c beside each other at [j][c]
// Either is one dense kilobyte, so that a tile load touches 16 neighbouring cache lines.
#pragma once

#include "common.h"
#include "cpu/vec.h"

#if defined(__AVX512BF16__)
namespace perfvl {
namespace PVL_ISA {

constexpr int64_t kTile = 16 * 32;  // bfloat16 values in a tile

#if defined(__AMX_BF16__)

// Tile registers of the calling thread, all 16 x 64 bytes, for as long as this lives.
class TileScope {
 public:
  TileScope() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
};

// Some compilers' tile loads are assembly that does not say it reads memory: keep earlier stores before them.
inline void memory_barrier() { __asm__ volatile("" ::: "memory"); }

// out[32, 32] (dense) = or += a b. a: two rows of `steps` tiles, a_stride values apart; b: steps x 2 tiles of pairs.
inline void tile_product(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t steps, float* out, bool add) {
  memory_barrier();
  if (add) {
    _tile_loadd(0, out, 128);
    _tile_loadd(1, out + 16, 128);
    _tile_loadd(2, out + 16 * 32, 128);
    _tile_loadd(3, out + 16 * 32 + 16, 128);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, a + s * kTile, 64);
    _tile_loadd(5, a + a_stride + s * kTile, 64);
    _tile_loadd(6, b + s * 2 * kTile, 64);
    _tile_loadd(7, b + s * 2 * kTile + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 128);
  _tile_stored(1, out + 16, 128);
  _tile_stored(2, out + 16 * 32, 128);
  _tile_stored(3, out + 16 * 32 + 16, 128);
}

// out[32, 32] += a b. a: [2][steps] dense tiles of rows; b: steps x 2 tiles of pairs.
inline void tile_accumulate(const uint16_t* a, const uint16_t* b, int64_t steps, float* out, int64_t out_stride) {
  int64_t bytes = out_stride * 4;
  float* low = out + 16 * out_stride;
  memory_barrier();
  _tile_loadd(0, out, bytes);
  _tile_loadd(1, out + 16, bytes);
  _tile_loadd(2, low, bytes);
  _tile_loadd(3, low + 16, bytes);
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, a + s * kTile, 64);
    _tile_loadd(5, a + (steps + s) * kTile, 64);
    _tile_loadd(6, b + s * 2 * kTile, 64);
    _tile_loadd(7, b + s * 2 * kTile + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, bytes);
  _tile_stored(1, out + 16, bytes);
  _tile_stored(2, low, bytes);
  _tile_stored(3, low + 16, bytes);
}

#else

struct TileScope {
  TileScope() {}
  ~TileScope() {}
};

// sums[8][2] += 8 rows of a tile times two tiles of pairs.
inline void dot_step(__m512 (&sums)[8][2], const uint16_t* a, const uint16_t* b) {
  for (int j = 0; j < 16; ++j) {
    __m512bh left = (__m512bh)_mm512_loadu_si512(b + j * 32), right = (__m512bh)_mm512_loadu_si512(b + kTile + j * 32);
    for (int r = 0; r < 8; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * 32 + j * 2, 4);
      __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, left);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, right);
    }
  }
}

inline void tile_product(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t steps, float* out, bool add) {
  for (int64_t r0 = 0; r0 < 32; r0 += 8) {
    __m512 sums[8][2] = {};
    for (int r = 0; add && r < 8; ++r)
      for (int h = 0; h < 2; ++h) sums[r][h] = _mm512_loadu_ps(out + (r0 + r) * 32 + h * 16);
    const uint16_t* rows = a + r0 / 16 * a_stride + r0 % 16 * 32;
    for (int64_t s = 0; s < steps; ++s) dot_step(sums, rows + s * kTile, b + s * 2 * kTile);
    for (int r = 0; r < 8; ++r)
      for (int h = 0; h < 2; ++h) _mm512_storeu_ps(out + (r0 + r) * 32 + h * 16, sums[r][h]);
  }
}

inline void tile_accumulate(const uint16_t* a, const uint16_t* b, int64_t steps, float* out, int64_t out_stride) {
  for (int64_t r0 = 0; r0 < 32; r0 += 8) {
    float* rows = out + r0 * out_stride;
    __m512 sums[8][2];
    for (int r = 0; r < 8; ++r)
      for (int h = 0; h < 2; ++h) sums[r][h] = _mm512_loadu_ps(rows + r * out_stride + h * 16);
    for (int64_t s = 0; s < steps; ++s)
      dot_step(sums, a + (r0 / 16 * steps + s) * kTile + r0 % 16 * 32, b + s * 2 * kTile);
    for (int r = 0; r < 8; ++r)
      for (int h = 0; h < 2; ++h) _mm512_storeu_ps(rows + r * out_stride + h * 16, sums[r][h]);
  }
}

#endif

// Two rows of 32 values, interleaved: row j of two tiles of pairs.
inline void interleave(__m512i even, __m512i odd, uint16_t* left, uint16_t* right) {
  alignas(64) static constexpr uint16_t order[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                                     16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                     24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  _mm512_store_si512(left, _mm512_permutex2var_epi16(even, _mm512_load_si512(order), odd));
  _mm512_store_si512(right, _mm512_permutex2var_epi16(even, _mm512_load_si512(order + 32), odd));
}

// Lanes of two float vectors as bfloat16 pairs: lane i holds (low[i], high[i]).
inline __m512i make_pairs(Vec low, Vec high) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

}  // namespace PVL_ISA
}  // namespace perfvl
#endif
