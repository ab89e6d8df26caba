// What both kernels share: which instructions there are, numbers, tiles.
//
// A tile is 16 rows of 64 bytes. _tile_dpbf16ps(C, A, B): C (16 x 16 float32) += A (16 rows x 32 bfloat16) times B, in
// which row p holds numbers 2p and 2p + 1 of each of 16 columns, side by side.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define AVX512 1
#endif
#if defined(AVX512) && defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define AMX 1
#endif

namespace {

inline float widen(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t narrow(float f) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 64;  // a NaN stays one
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#ifdef AVX512
inline __m512 lanes(const float *p) { return _mm512_loadu_ps(p); }
inline __m512 lanes(const uint16_t *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
inline __m512 lanes(const float *p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
inline __m512 lanes(const uint16_t *p, __mmask16 m) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}
#endif

#ifdef AMX
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// columns: of the right-hand tiles 5 and 6, and of the sums 0 to 3
inline void open_tiles(int columns = 16) {
  TileShapes shapes;
  for (int t = 0; t < 8; t++) shapes.bytes[t] = uint16_t(t == 4 || t == 7 ? 64 : 4 * columns), shapes.rows[t] = 16;
  // a memory operand of the full 64 bytes: gcc 12's own intrinsic names 8 of them and the rest may not be written yet
  asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
}

// tiles read and write memory that the compiler does not see
inline void settle() { asm volatile("" ::: "memory"); }

inline bool amx_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return allowed;
}

// 16 values and the 16 after them, as 32 of bfloat16
inline __m512i two_to_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// 16 rows of 16 numbers of 32 bits, turned
inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 4; j++) {
      t[8 * i + j] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + j + 4], 0x88);
      t[8 * i + j + 4] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

// 2 rows of 32 numbers of 16 bits, interleaved: a0 b0 a1 b1 ... as two registers
inline void interleave(__m512i a, __m512i b, __m512i &first, __m512i &second) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  first = _mm512_permutex2var_epi16(a, low, b);
  second = _mm512_permutex2var_epi16(a, _mm512_add_epi16(low, _mm512_set1_epi16(16)), b);
}

// e^x to 3e-7. x at most 88; below -87 it is e^-87
inline __m512 exp16(__m512 x) {
  const __m512 whole = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to an integer
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  __m512 n = _mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504f), whole), k = _mm512_sub_ps(n, whole);
  __m512 r = _mm512_fnmadd_ps(k, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(k, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}

// x / (1 + e^-y), to 4e-7; y below -80 counts as -80, since numbers too small for a normal float cost a trap each
inline __m512 times_sigmoid(__m512 x, __m512 y) {
  __m512 d = _mm512_add_ps(_mm512_set1_ps(1.0f), exp16(_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), y), _mm512_set1_ps(80.0f))));
  __m512 r = _mm512_rcp14_ps(d);
  return _mm512_mul_ps(x, _mm512_fmadd_ps(r, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(1.0f)), r));
}

// 2^x to 8e-5: what is then rounded to bfloat16 needs no more. x at most 127; below -126 it is 2^-126
inline __m512 exp2_16(__m512 x) {
  const __m512 whole = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to an integer
  x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
  __m512 n = _mm512_add_ps(x, whole), f = _mm512_sub_ps(x, _mm512_sub_ps(n, whole));
  __m512 p = _mm512_set1_ps(5.517167e-2f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4261113e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9326099e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.9992807e-1f));
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}
#endif

}  // namespace
