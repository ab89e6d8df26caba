// A few new tokens through the whole language model, in one call: what decoding on a CPU runs.
//
//   x (rows, dim) -> layer 0 .. n -> norm -> lm_head -> logits (rows, vocab)
//
// The same numbers as lm/model.py in its absorbed form, with the weights where torch holds them: nothing is copied or
// laid out anew. One team of threads walks all layers together; between two products it meets at a barrier of a
// microsecond, where separate calls would cost ten each. Activations are float32 throughout, so less is rounded than
// in the layer-by-layer form. Products of bfloat16 and INT4 weights with several tokens run on AMX where there is
// any; there, activations are rounded to bfloat16 on the way in, as they are in torch.
//
// Weights: float32, bfloat16, or INT4 in groups of 32 (lm/int4.py has the format). The structures have their twins in lm/step.py.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "amx.h"
#include "team.h"

enum Kind : int64_t { NONE = -1, F32 = 0, BF16 = 1, INT4 = 2 };

struct Matrix {  // row-major (out, in)
  const void *data;
  const uint16_t *scale;  // bfloat16 (out, in / 32), of INT4
  int64_t out, in, kind;
};

struct Expert {
  Matrix gate, up, down;
};

struct Layer {
  const void *input_norm, *post_norm, *q_norm, *kv_norm;  // of Model::norm_kind
  Matrix q_a, q_b, kv_a, kv_b, o;  // q_a NONE: q_b takes x itself
  Matrix router;                   // NONE: a dense layer, whose MLP is `shared`
  const float *bias;
  const Expert *experts;
  Expert shared;
};

struct Model {
  int64_t dim, heads, latent, rope, nope, value, experts, chosen, normalize, layers, vocab, norm_kind;
  double eps, latent_eps, softmax_scale, routed_scale;
  const Layer *layer;
  const void *norm;
  Matrix head;
};

// A row is one new token. Rows may belong to one sequence: all latents of a layer are in the cache before any row
// attends, and a row sees what stands at or before its own place.
struct Step {
  int64_t rows, answered, capacity, threads, cache_kind;
  const float *x;          // (rows, dim)
  const float *cos, *sin;  // (rows, rope / 2)
  const int64_t *slots;    // (rows): which sequence of the caches
  const int64_t *places;   // (rows): its place in that sequence
  void *const *caches;     // of each layer: (sequences, capacity, latent + rope), written at `places`
  float *logits;           // of the first `answered` rows: (answered, vocab)
};

namespace {

// ---- numbers

inline float sigmoid(float v) { return 1.0f / (1.0f + std::exp(-v)); }

#ifdef AVX512
inline __m512 rounded(__m512 f) {  // to bfloat16 and back
  __m512i bits = _mm512_castps_si512(f), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000))));
}
#endif
inline float one(const float *p) { return *p; }
inline float one(const uint16_t *p) { return widen(*p); }

// R rows of a matrix times N vectors: out[n][r]
template <int R, int N, typename W>
inline void dots(const W *w, int64_t stride, const float *const *x, int64_t in, float out[N][R]) {
#ifdef AVX512
  __m512 sum[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) sum[r][n] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 16 <= in; k += 16) {
    __m512 xs[N];
    for (int n = 0; n < N; n++) xs[n] = lanes(x[n] + k);
    for (int r = 0; r < R; r++) {
      __m512 ws = lanes(w + r * stride + k);
      for (int n = 0; n < N; n++) sum[r][n] = _mm512_fmadd_ps(ws, xs[n], sum[r][n]);
    }
  }
  if (k < in) {
    __mmask16 m = __mmask16((1u << (in - k)) - 1);
    for (int r = 0; r < R; r++) {
      __m512 ws = lanes(w + r * stride + k, m);
      for (int n = 0; n < N; n++) sum[r][n] = _mm512_fmadd_ps(ws, lanes(x[n] + k, m), sum[r][n]);
    }
  }
  for (int n = 0; n < N; n++)
    for (int r = 0; r < R; r++) out[n][r] = _mm512_reduce_add_ps(sum[r][n]);
#else
  for (int n = 0; n < N; n++)
    for (int r = 0; r < R; r++) {
      const W *row = w + r * stride;
      const float *xs = x[n];
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < in; k++) sum += one(row + k) * xs[k];
      out[n][r] = sum;
    }
#endif
}

// acc[0..n) += a * w[0..n)
template <typename W>
inline void axpy(float *acc, const W *w, float a, int64_t n) {
  int64_t k = 0;
#ifdef AVX512
  __m512 f = _mm512_set1_ps(a);
  for (; k + 16 <= n; k += 16) _mm512_storeu_ps(acc + k, _mm512_fmadd_ps(f, lanes(w + k), _mm512_loadu_ps(acc + k)));
#endif
  for (; k < n; k++) acc[k] += a * one(w + k);
}

void rms_norm(const float *x, const void *weight, int64_t kind, float *out, int64_t n, double eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
  float scale = 1.0f / std::sqrt(sum / float(n) + float(eps));
  if (kind == F32)
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * ((const float *)weight)[i];
  else
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * widen(((const uint16_t *)weight)[i]);
}

// pairs (x[2i], x[2i+1]) turned; even slots first, then odd ones (lm/rope.py)
void rotate(const float *x, const float *cos, const float *sin, float *out, int64_t rope) {
  int64_t half = rope / 2;
  for (int64_t i = 0; i < half; i++) {
    float a = x[2 * i], b = x[2 * i + 1];
    out[i] = a * cos[i] - b * sin[i];
    out[half + i] = b * cos[i] + a * sin[i];
  }
}

// ---- the team

struct Team {
  int size = 1;
  std::atomic<int> arrived{0};
  std::atomic<int> turn{0};
  std::vector<std::atomic<int64_t>> taken;
  explicit Team(size_t phases) : taken(phases) {
    for (auto &each : taken) each.store(0, std::memory_order_relaxed);
  }
};

struct Member {
  Team &team;
  int index;
  int phase = 0;

  void meet() {
    phase++;
    if (team.size == 1) return;
    int turn = team.turn.load(std::memory_order_acquire);
    if (team.arrived.fetch_add(1, std::memory_order_acq_rel) == team.size - 1) {
      team.arrived.store(0, std::memory_order_relaxed);
      team.turn.store(turn + 1, std::memory_order_release);
      team.turn.notify_all();
    } else {
      await_change(team.turn, turn);
    }
  }
  int64_t take() { return team.taken[phase].fetch_add(1, std::memory_order_relaxed); }
};

bool use_amx = false;

// ---- products

// `tokens` vectors times one matrix, or times two whose results become silu(first) * second
struct Product {
  const Matrix *w, *w2;
  const float *const *x;  // a pointer to each vector
  float *const *out;      // to each result
  int64_t tokens;
  bool whole;  // a float32 model: activations are never rounded, INT4 weights are rounded as when dequantised
};

constexpr int64_t ROWS = 16;

struct Scratch {
  const Product *ready = nullptr;  // whose vectors `packed` or `spread` hold
  // bfloat16 pairs, as AMX wants its right side: (tiles of tokens, in / 32, 16 pairs, tokens, 2), where tokens are 16, or
  // as many as there are: the vectors of one token are then 64 bytes a step and stay in the first cache
  std::vector<uint16_t> packed;
  std::vector<float> scales;       // of 16 rows of INT4, widened
  std::vector<float> spread;       // for INT4: each 128 numbers as 8 x 16, so that lane l of j holds number 8 l + j
};

#ifdef AMX
// the number of tokens plays no part: a sequence gives in a batch, to the last bit, what it gives alone
bool fits_amx(const Matrix &w, bool whole) { return use_amx && !whole && w.kind != F32 && w.in % 32 == 0 && w.out >= 16; }

// tiles whose right-hand side has so many columns; 0 gives them back
void shape_tiles(int columns) {
  static thread_local int now = 0;
  if (now == columns) return;
  now = columns;
  if (columns) open_tiles(columns);
  else _tile_release();
}

void pack_vectors(const Product &job, Scratch &scratch) {
  int64_t in = job.w->in, steps = in / 32, tiles = (job.tokens + 15) / 16, columns = std::min<int64_t>(job.tokens, 16);
  scratch.packed.resize(size_t(tiles * steps * 32 * columns));
  uint32_t *to = (uint32_t *)scratch.packed.data();
  if (job.tokens % columns) std::memset(to + (tiles - 1) * steps * 16 * columns, 0, size_t(steps * 64 * columns));
  for (int64_t t = 0; t < job.tokens; t++) {
    const float *x = job.x[t];
    uint32_t *column = to + (t / 16) * steps * 256 + t % 16;
    alignas(64) uint32_t pairs[16];
    for (int64_t s = 0; s < steps; s++) {
      _mm512_store_si512(pairs, two_to_bf16(_mm512_loadu_ps(x + 32 * s), _mm512_loadu_ps(x + 32 * s + 16)));
      for (int p = 0; p < 16; p++) column[(s * 16 + p) * columns] = pairs[p];
    }
  }
}

// 32 weights of each of two rows of INT4, times their scales and rounded to bfloat16: what dequantize_int4 gives
inline void int4_to_bf16(const uint8_t *one, const uint8_t *two, float scale1, float scale2, uint16_t *to) {
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  // a table of 16 values for each row
  __m512i table = two_to_bf16(_mm512_mul_ps(values, _mm512_set1_ps(scale1)), _mm512_mul_ps(values, _mm512_set1_ps(scale2)));
  __m512i a = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)one)), b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)two));
  const __m512i low = _mm512_set1_epi32(0x000F000F), second = _mm512_set1_epi32(0x00100010);
  a = _mm512_and_si512(_mm512_or_si512(a, _mm512_slli_epi32(a, 12)), low);
  b = _mm512_or_si512(_mm512_and_si512(_mm512_or_si512(b, _mm512_slli_epi32(b, 12)), low), second);
  _mm512_store_si512(to, _mm512_permutexvar_epi16(a, table));
  _mm512_store_si512(to + 32, _mm512_permutexvar_epi16(b, table));
}

// the tile of 16 rows in register 4 times 32 numbers of each vector; `next`: from one tile of tokens to the next
inline void times_vectors(const uint16_t *right, int64_t stride, int64_t next, int64_t tiles) {
  _tile_loadd(5, right, stride);
  _tile_dpbf16ps(0, 4, 5);
  if (tiles > 1) {
    _tile_loadd(6, right + next, stride);
    _tile_dpbf16ps(1, 4, 6);
  }
  if (tiles > 2) {
    _tile_loadd(5, right + 2 * next, stride);
    _tile_dpbf16ps(2, 4, 5);
  }
  if (tiles > 3) {
    _tile_loadd(6, right + 3 * next, stride);
    _tile_dpbf16ps(3, 4, 6);
  }
}

// 16 rows from `row` on, times all vectors (at most 64): result[row][token]
void sixteen_rows(const Matrix &w, int64_t row, Scratch &scratch, int64_t tokens, float *result) {
  int64_t steps = w.in / 32, tiles = (tokens + 15) / 16, columns = std::min<int64_t>(tokens, 16);
  int64_t each = 32 * columns, next = steps * each, stride = 4 * columns;
  const uint16_t *packed = scratch.packed.data();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (w.kind == BF16) {
    for (int64_t s = 0; s < steps; s++) {
      const uint16_t *at = (const uint16_t *)w.data + row * w.in + s * 32;
      // what comes 8 steps later; towards the end of the rows that is the start of the next 16
      const uint16_t *ahead = at + 256 + (s + 8 < steps ? 0 : 15 * w.in);
      for (int r = 0; r < 16; r++) _mm_prefetch((const char *)(ahead + r * w.in), _MM_HINT_T0);
      _tile_loadd(4, at, w.in * 2);
      times_vectors(packed + s * each, stride, next, tiles);
    }
  } else {
    const int64_t length = w.in / 2;  // bytes of a row
    const uint16_t *scale = w.scale + row * steps;
    scratch.scales.resize(size_t(16 * steps + 16));
    float *scales = scratch.scales.data();
    for (int64_t i = 0; i < 16 * steps; i += 16) {
      _mm512_storeu_ps(scales + i, lanes(scale + i));
      if (i % 32 == 0) _mm_prefetch((const char *)(scale + 16 * steps + i), _MM_HINT_T0);  // of the next 16 rows
    }
    // a tile is loaded a step after it was written: its load has to wait until the writes have left the core's queue
    alignas(64) uint16_t dense[2][512];
    for (int64_t s = 0; s <= steps; s++) {
      if (s < steps) {
        const uint8_t *at = (const uint8_t *)w.data + row * length + s * 16;
        // a line holds four steps: each calls in those of four rows, 16 steps before they are wanted
        const uint8_t *ahead = at + 256 + (s + 16 < steps ? 0 : 15 * length) + s % 4 * 4 * length;
        uint16_t *to = dense[s & 1];
        for (int r = 0; r < 4; r++) _mm_prefetch((const char *)(ahead + r * length), _MM_HINT_T0);
#pragma GCC unroll 8
        for (int r = 0; r < 16; r += 2)
          int4_to_bf16(at + r * length, at + (r + 1) * length, scales[r * steps + s], scales[(r + 1) * steps + s], to + r * 32);
      }
      settle();
      if (s == 0) continue;
      _tile_loadd(4, dense[(s - 1) & 1], 64);
      times_vectors(packed + (s - 1) * each, stride, next, tiles);
    }
  }
  _tile_stored(0, result, 256);  // result[16][64]
  _tile_stored(1, result + 16, 256);
  if (tiles > 2) {
    _tile_stored(2, result + 32, 256);
    _tile_stored(3, result + 48, 256);
  }
  settle();
}
#endif

void spread_vectors(const Product &job, Scratch &scratch) {
  int64_t in = job.w->in, blocks = (in + 127) / 128;
  scratch.spread.assign(size_t(job.tokens * blocks * 128), 0.0f);
  for (int64_t t = 0; t < job.tokens; t++) {
    float *to = scratch.spread.data() + t * blocks * 128;
    const float *x = job.x[t];
    for (int64_t k = 0; k < in; k++) to[k / 128 * 128 + (k % 8) * 16 + (k % 128) / 8] = x[k];
  }
}

// R rows of INT4 times N spread vectors. ROUND: each weight is rounded to bfloat16 first, as dequantize_int4 does;
// without it a value times its scale stays exact
template <bool ROUND, int R, int N>
inline void int4_dots(const Matrix &w, int64_t row, const float *spread, float out[N][R]) {
  int64_t blocks = (w.in + 127) / 128, groups = w.in / 32;
  const uint32_t *words = (const uint32_t *)w.data + row * (w.in / 8);
  const uint16_t *scales = w.scale + row * groups;
#ifdef AVX512
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  __m512 total[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) total[r][n] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; b++) {
    int64_t left = std::min<int64_t>(4, groups - 4 * b);
    __mmask16 mask = __mmask16((1u << (4 * left)) - 1);
    __m512i v[R];
    __m512 sum[R][N], s[R];
    for (int r = 0; r < R; r++) {
      const uint32_t *at = words + r * (w.in / 8) + b * 16;
      _mm_prefetch((const char *)(at + 256), _MM_HINT_T0);
      v[r] = _mm512_maskz_loadu_epi32(mask, at);
      __m128i four = _mm_maskz_loadu_epi16(__mmask8((1u << left) - 1), scales + r * groups + 4 * b);
      __m512i wide = _mm512_castsi128_si512(_mm_slli_epi32(_mm_cvtepu16_epi32(four), 16));
      s[r] = _mm512_castsi512_ps(_mm512_permutexvar_epi32(quarters, wide));
      for (int n = 0; n < N; n++) sum[r][n] = _mm512_setzero_ps();
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
      for (int r = 0; r < R; r++) {
        __m512 f = _mm512_permutexvar_ps(_mm512_srli_epi32(v[r], 4 * j), values);
        if (ROUND) f = rounded(_mm512_mul_ps(f, s[r]));
        for (int n = 0; n < N; n++)
          sum[r][n] = _mm512_fmadd_ps(f, lanes(spread + (n * blocks + b) * 128 + 16 * j), sum[r][n]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++)
        total[r][n] = ROUND ? _mm512_add_ps(sum[r][n], total[r][n]) : _mm512_fmadd_ps(sum[r][n], s[r], total[r][n]);
  }
  for (int n = 0; n < N; n++)
    for (int r = 0; r < R; r++) out[n][r] = _mm512_reduce_add_ps(total[r][n]);
#else
  for (int n = 0; n < N; n++)
    for (int r = 0; r < R; r++) {
      float total = 0;
      for (int64_t g = 0; g < groups; g++) {
        float sum = 0;
        for (int64_t k = g * 32; k < g * 32 + 32; k++) {
          uint32_t word = words[r * (w.in / 8) + k / 8];
          float value = float(int((word >> (4 * (k % 8))) & 15) - 8);
          if (ROUND) value = widen(narrow(value * widen(scales[r * groups + g])));
          sum += value * spread[n * blocks * 128 + k / 128 * 128 + (k % 8) * 16 + (k % 128) / 8];
        }
        total += ROUND ? sum : sum * widen(scales[r * groups + g]);
      }
      out[n][r] = total;
    }
#endif
}

template <int R, int N>
inline void some_dots(const Matrix &w, bool whole, int64_t row, const float *const *x, const float *spread, float out[N][R]) {
  if (w.kind == INT4) return whole ? int4_dots<true, R, N>(w, row, spread, out) : int4_dots<false, R, N>(w, row, spread, out);
  if (w.kind == BF16) return dots<R, N>((const uint16_t *)w.data + row * w.in, w.in, x, w.in, out);
  dots<R, N>((const float *)w.data + row * w.in, w.in, x, w.in, out);
}

// rows from..to of one matrix times all vectors, into result[row - from][token] (rows of 64)
template <int R>
inline void plain_rows(const Matrix &w, int64_t row, const Product &job, const float *spread, float *result) {
  int64_t stride = (w.in + 127) / 128 * 128;
  int64_t t = 0;
  for (; t + 4 <= job.tokens; t += 4) {
    float out[4][R];
    some_dots<R, 4>(w, job.whole, row, job.x + t, spread + t * stride, out);
    for (int n = 0; n < 4; n++)
      for (int r = 0; r < R; r++) result[r * 64 + t + n] = out[n][r];
  }
  for (; t < job.tokens; t++) {
    float out[1][R];
    some_dots<R, 1>(w, job.whole, row, job.x + t, spread + t * stride, out);
    for (int r = 0; r < R; r++) result[r * 64 + t] = out[0][r];
  }
}

void rows_of(const Matrix &w, int64_t from, int64_t to, const Product &job, Scratch &scratch, float *result) {
#ifdef AMX
  if (to - from == 16 && fits_amx(w, job.whole)) return sixteen_rows(w, from, scratch, job.tokens, result);
#endif
  const float *spread = scratch.spread.data();
  int64_t r = from;
  for (; r + 4 <= to; r += 4) plain_rows<4>(w, r, job, spread, result + (r - from) * 64);
  for (; r < to; r++) plain_rows<1>(w, r, job, spread, result + (r - from) * 64);
}

void block(const Product &job, int64_t from, Scratch &scratch) {
  int64_t to = std::min(from + ROWS, job.w->out);
  if (scratch.ready != &job) {
    scratch.ready = &job;
    bool amx = false;
#ifdef AMX
    amx = fits_amx(*job.w, job.whole);
    if (amx) pack_vectors(job, scratch), shape_tiles(int(std::min<int64_t>(job.tokens, 16)));
#endif
    if (job.w->kind == INT4 && (!amx || job.w->out % 16)) spread_vectors(job, scratch);
  }
  alignas(64) float first[16 * 64], second[16 * 64];
  rows_of(*job.w, from, to, job, scratch, first);
  if (job.w2) rows_of(*job.w2, from, to, job, scratch, second);
  for (int64_t t = 0; t < job.tokens; t++) {
    float *out = job.out[t] + from;
    if (job.w2)
      for (int64_t r = 0; r < to - from; r++) {
        float gate = first[r * 64 + t];
        out[r] = gate * sigmoid(gate) * second[r * 64 + t];
      }
    else
      for (int64_t r = 0; r < to - from; r++) out[r] = first[r * 64 + t];
  }
}

void run(Member &me, const std::vector<Product> &jobs, Scratch &scratch) {
  scratch.ready = nullptr;
  // blocks are taken a few at a time: enough bytes for the hardware to stream, few enough to share out evenly
  std::vector<int64_t> ends(jobs.size());
  int64_t total = 0;
  for (size_t j = 0; j < jobs.size(); j++) ends[j] = total += (jobs[j].w->out + ROWS - 1) / ROWS;
  int64_t each = std::clamp<int64_t>(total / (me.team.size * 16), 1, 16);
  size_t j = 0;
  for (int64_t b; (b = me.take() * each) < total;)
    for (int64_t end = std::min(b + each, total); b < end; b++) {
      while (b >= ends[j]) j++;
      int64_t start = j ? ends[j - 1] : 0;
      block(jobs[j], (b - start) * ROWS, scratch);
    }
}

// ---- attention to the latents themselves

// One sequence, all heads, keys from..to: the largest logit and the sum of exp per head, and the sum of latents
struct Part {
  std::vector<float> peak, sum, mixed;  // (heads), (heads), (heads, latent)
};

template <typename C>
void attend_plain(const Model &m, const float *q, const C *cache, int64_t from, int64_t to, Part &part) {
  int64_t width = m.latent + m.rope;
  float scores[64];
  for (int64_t at = from; at < to; at += 64) {
    int64_t keys = std::min<int64_t>(64, to - at);
    for (int64_t h = 0; h < m.heads; h++) {
      const float *qh[1] = {q + h * width};
      float top = -INFINITY;
      for (int64_t k = 0; k < keys; k++) {
        float s[1][1];
        dots<1, 1>(cache + (at + k) * width, width, qh, width, s);
        scores[k] = s[0][0];
        top = std::max(top, s[0][0]);
      }
      float peak = std::max(part.peak[h], top), keep = std::exp(part.peak[h] - peak);
      float *mixed = part.mixed.data() + h * m.latent;
      if (keep != 1)
        for (int64_t l = 0; l < m.latent; l++) mixed[l] *= keep;
      float sum = part.sum[h] * keep;
      for (int64_t k = 0; k < keys; k++) {
        float share = std::exp(scores[k] - peak);
        sum += share;
        axpy(mixed, cache + (at + k) * width, share, m.latent);
      }
      part.peak[h] = peak, part.sum[h] = sum;
    }
  }
}

#ifdef AMX
constexpr int64_t KEYS = 256;  // keys whose logits are held at once

// bfloat16 cache, latent and rope multiples of 32: logits as keys x heads, then heads x latents, both on AMX
void attend_amx(const Model &m, const float *q, const uint16_t *cache, int64_t from, int64_t to, Part &part) {
  int64_t width = m.latent + m.rope, steps = width / 32;
  shape_tiles(16);
  std::vector<uint16_t> query(size_t(steps * 512));
  alignas(64) static thread_local float logits[KEYS * 16];
  alignas(64) static thread_local uint16_t shares[KEYS / 32][16 * 32];  // (keys / 32, heads, 32 keys)
  alignas(64) static thread_local uint16_t pairs[32 * 32];              // one 32 x 32 piece of latents, two keys a word
  std::vector<uint16_t> tail;
  for (int64_t group = 0; group < m.heads; group += 16) {
    int64_t heads = std::min<int64_t>(16, m.heads - group);
    std::fill(query.begin(), query.end(), 0);
    for (int64_t h = 0; h < heads; h++) {
      const float *x = q + (group + h) * width;
      for (int64_t k = 0; k < width; k++) query[size_t(k / 32 * 512 + k % 32 / 2 * 32 + h * 2 + k % 2)] = narrow(x[k]);
    }
    alignas(64) float peaks[16], sums[16];
    for (int h = 0; h < 16; h++) peaks[h] = h < heads ? part.peak[group + h] : -INFINITY, sums[h] = h < heads ? part.sum[group + h] : 0;
    std::vector<float> mixed(size_t(16 * m.latent), 0.0f);  // of this range; heads x latent
    for (int64_t at = from; at < to; at += KEYS) {
      int64_t keys = std::min(KEYS, to - at), padded = (keys + 31) / 32 * 32;
      const uint16_t *rows = cache + at * width;
      if (padded != keys) {  // what lies behind the last key may be anything, or not ours
        tail.assign(size_t(padded * width), 0);
        std::memcpy(tail.data(), rows, size_t(keys * width) * 2);
        rows = tail.data();
      }
      for (int64_t k = 0; k < padded; k += 32) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t s = 0; s < steps; s++) {
          _tile_loadd(4, rows + k * width + s * 32, width * 2);
          _tile_loadd(5, rows + (k + 16) * width + s * 32, width * 2);
          _tile_loadd(6, query.data() + s * 512, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, logits + k * 16, 64);
        _tile_stored(1, logits + (k + 16) * 16, 64);
      }
      settle();
      __m512 old = _mm512_load_ps(peaks), peak = old, sum = _mm512_load_ps(sums);
      for (int64_t k = 0; k < keys; k++) peak = _mm512_max_ps(peak, _mm512_load_ps(logits + k * 16));
      __m512 keep = exp16(_mm512_sub_ps(old, peak));
      keep = _mm512_mask_mov_ps(keep, _mm512_cmp_ps_mask(old, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ), _mm512_setzero_ps());
      sum = _mm512_mul_ps(sum, keep);
      for (int64_t k = 0; k < padded; k += 32) {
        __m512i words[16];
        for (int p = 0; p < 16; p++) {
          __m512 a = _mm512_setzero_ps(), b = a;
          if (k + 2 * p < keys) a = exp16(_mm512_sub_ps(_mm512_load_ps(logits + (k + 2 * p) * 16), peak));
          if (k + 2 * p + 1 < keys) b = exp16(_mm512_sub_ps(_mm512_load_ps(logits + (k + 2 * p + 1) * 16), peak));
          sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
          // two keys of a head in one word, the earlier one below
          __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
          __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
          words[p] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        }
        transpose16(words);
        for (int h = 0; h < 16; h++) _mm512_store_si512(shares[k / 32] + h * 32, words[h]);
      }
      alignas(64) float keeps[16];
      _mm512_store_ps(keeps, keep), _mm512_store_ps(peaks, peak), _mm512_store_ps(sums, sum);
      if (_mm512_cmp_ps_mask(old, peak, _CMP_NEQ_UQ))
        for (int h = 0; h < heads; h++)
          for (int64_t l = 0; l < m.latent; l += 16) _mm512_storeu_ps(&mixed[h * m.latent + l], _mm512_mul_ps(_mm512_set1_ps(keeps[h]), _mm512_loadu_ps(&mixed[h * m.latent + l])));
      for (int64_t l = 0; l < m.latent; l += 32) {
        _tile_loadd(0, &mixed[l], m.latent * 4);
        _tile_loadd(1, &mixed[l + 16], m.latent * 4);
        for (int64_t k = 0; k < padded; k += 32) {
          for (int p = 0; p < 16; p++) {
            __m512i a = _mm512_loadu_si512(rows + (k + 2 * p) * width + l), b = _mm512_loadu_si512(rows + (k + 2 * p + 1) * width + l);
            __m512i first, second;
            interleave(a, b, first, second);
            _mm512_store_si512(pairs + p * 32, first);
            _mm512_store_si512(pairs + 512 + p * 32, second);
          }
          settle();
          _tile_loadd(4, shares[k / 32], 64);
          _tile_loadd(5, pairs, 64);
          _tile_loadd(6, pairs + 512, 64);
          _tile_dpbf16ps(0, 4, 5);
          _tile_dpbf16ps(1, 4, 6);
        }
        _tile_stored(0, &mixed[l], m.latent * 4);
        _tile_stored(1, &mixed[l + 16], m.latent * 4);
      }
      settle();
    }
    for (int64_t h = 0; h < heads; h++) {
      part.peak[group + h] = peaks[h], part.sum[group + h] = sums[h];
      std::memcpy(part.mixed.data() + (group + h) * m.latent, &mixed[h * m.latent], size_t(m.latent) * 4);
    }
  }
}
#endif

void attend(const Model &m, const Step &step, const float *q, const void *cache, int64_t from, int64_t to, Part &part) {
  part.peak.assign(m.heads, -INFINITY), part.sum.assign(m.heads, 0), part.mixed.assign(m.heads * m.latent, 0);
  if (step.cache_kind == F32) return attend_plain(m, q, (const float *)cache, from, to, part);
#ifdef AMX
  if (use_amx && m.heads >= 8 && m.latent % 32 == 0 && m.rope % 32 == 0 && to - from >= 16)
    return attend_amx(m, q, (const uint16_t *)cache, from, to, part);
#endif
  attend_plain(m, q, (const uint16_t *)cache, from, to, part);
}

// ---- the walk

struct Buffers {
  int64_t n;
  std::vector<float> x, h, q_low, q, kv, query, mixed, out, inner, slots, scores;
  std::vector<Part> parts;
  std::vector<int64_t> chosen;
  std::vector<float> weights;
  std::vector<Product> jobs;
  std::vector<const float *> from;
  std::vector<float *> to;

  Buffers(const Model &m, const Step &step, int64_t widest, int64_t shared_width) {
    n = step.rows;
    auto room = [&](std::vector<float> &v, int64_t each) { v.assign(size_t(n * each), 0.0f); };
    room(x, m.dim), room(h, m.dim), room(kv, m.latent + m.rope), room(q, m.heads * (m.nope + m.rope));
    room(query, m.heads * (m.latent + m.rope)), room(mixed, m.heads * m.latent), room(out, m.heads * m.value);
    room(q_low, widest), room(scores, std::max<int64_t>(m.experts, 1));
    room(inner, (m.chosen + 1) * std::max(widest, shared_width)), room(slots, (m.chosen + 1) * m.dim);
    chosen.assign(size_t(n * m.chosen), 0), weights.assign(size_t(n * m.chosen), 0);
    std::memcpy(x.data(), step.x, sizeof(float) * size_t(n * m.dim));
  }
};

Matrix rows_from(const Matrix &w, int64_t row, int64_t count) {
  Matrix part = w;
  part.out = count;
  int64_t bytes = w.kind == F32 ? w.in * 4 : w.kind == BF16 ? w.in * 2 : w.in / 2;
  part.data = (const char *)w.data + row * bytes;
  if (w.kind == INT4) part.scale += row * (w.in / 32);
  return part;
}

// the largest of scores + bias, and their shares of the scores without it (lm/moe.py)
void choose(const Model &m, const Layer &layer, float *scores, int64_t *chosen, float *weights) {
  std::vector<float> biased(size_t(m.experts));
  for (int64_t e = 0; e < m.experts; e++) {
    scores[e] = sigmoid(scores[e]);
    biased[e] = scores[e] + layer.bias[e];
  }
  float sum = 0;
  for (int64_t c = 0; c < m.chosen; c++) {
    int64_t best = std::max_element(biased.begin(), biased.end()) - biased.begin();
    biased[best] = -INFINITY;
    chosen[c] = best, weights[c] = scores[best], sum += scores[best];
  }
  for (int64_t c = 0; c < m.chosen; c++) weights[c] *= float(m.routed_scale) / (m.normalize ? sum + 1e-20f : 1.0f);
}

void put(void *cache, int64_t kind, int64_t at, const float *row, int64_t n) {
  if (kind == F32) std::memcpy((float *)cache + at, row, size_t(n) * 4);
  else
    for (int64_t i = 0; i < n; i++) ((uint16_t *)cache)[at + i] = narrow(row[i]);
}

template <typename W>
void absorb(const Model &m, const W *kv_b, int64_t h, const float *q_nope, float *query) {
  std::memset(query, 0, size_t(m.latent) * 4);
  for (int64_t i = 0; i < m.nope; i++) axpy(query, kv_b + (h * (m.nope + m.value) + i) * m.latent, q_nope[i], m.latent);
}

}  // namespace

struct Walk {
  const Model &m;
  const Step &step;
  Buffers b;
  Team team;
  int64_t width, splits;
  static constexpr int64_t SPAN = 512;  // keys of one piece of attention, whoever else is in the batch
  // jobs of the phase that runs; made by the first of the team while the others wait
  std::vector<Product> jobs;
  std::vector<Matrix> pieces;

  Walk(const Model &model, const Step &s, int64_t widest, int64_t shared)
      : m(model), step(s), b(model, s, widest, shared), team(size_t(model.layers * 24 + 16)) {
    width = m.latent + m.rope;
    int64_t longest = 0;
    for (int64_t i = 0; i < s.rows; i++) longest = std::max(longest, s.places[i] + 1);
    splits = (longest + SPAN - 1) / SPAN;
    b.parts.resize(size_t(s.rows * splits));
  }

  const float *const *from(const float *base, int64_t stride, int64_t n) {
    for (int64_t i = 0; i < n; i++) b.from.push_back(base + i * stride);
    return b.from.data() + b.from.size() - n;
  }
  float *const *to(float *base, int64_t stride, int64_t n) {
    for (int64_t i = 0; i < n; i++) b.to.push_back(base + i * stride);
    return b.to.data() + b.to.size() - n;
  }
  void clear() {
    size_t room = size_t(b.n * (m.chosen + 4) + m.heads * b.n * 2 + 16);
    jobs.clear(), pieces.clear(), b.from.clear(), b.to.clear();
    b.from.reserve(room), b.to.reserve(room);  // pointers into them are handed out
    pieces.reserve(size_t(m.heads)), jobs.reserve(size_t(m.heads + m.experts + 8));
  }
  void add(const Matrix &w, const Matrix *w2, const float *x, int64_t x_stride, float *out, int64_t out_stride, int64_t n) {
    jobs.push_back({&w, w2, from(x, x_stride, n), to(out, out_stride, n), n, m.norm_kind == F32});
  }

  // every chosen expert with its tokens, and the shared one with all
  void expert_jobs(const Layer &layer, bool down) {
    int64_t inner = int64_t(b.inner.size()) / (b.n * (m.chosen + 1));
    if (layer.router.kind != NONE)
      for (int64_t e = 0; e < m.experts; e++) {
        const Expert &expert = layer.experts[e];
        int64_t n = 0;
        for (int64_t s = 0; s < b.n * m.chosen; s++)
          if (b.chosen[s] == e) {
            int64_t token = s / m.chosen, slot = token * (m.chosen + 1) + s % m.chosen;
            b.from.push_back(down ? &b.inner[slot * inner] : &b.h[token * m.dim]);
            b.to.push_back(down ? &b.slots[slot * m.dim] : &b.inner[slot * inner]);
            n++;
          }
        if (!n) continue;
        const float *const *x = b.from.data() + b.from.size() - n;
        float *const *out = b.to.data() + b.to.size() - n;
        jobs.push_back({down ? &expert.down : &expert.gate, down ? nullptr : &expert.up, x, out, n, m.norm_kind == F32});
      }
    if (layer.shared.gate.kind == NONE) return;
    float *mid = &b.inner[m.chosen * inner], *end = &b.slots[m.chosen * m.dim];
    if (down) add(layer.shared.down, nullptr, mid, (m.chosen + 1) * inner, end, (m.chosen + 1) * m.dim, b.n);
    else add(layer.shared.gate, &layer.shared.up, b.h.data(), m.dim, mid, (m.chosen + 1) * inner, b.n);
  }

  // x + what the last product gave: attention's output, or the experts'
  void add_up(const Layer *done, int64_t i) {
    if (!done) return;
    float *x = &b.x[i * m.dim];
    const float *slots = &b.slots[i * (m.chosen + 1) * m.dim];
    if (done->router.kind != NONE)
      for (int64_t c = 0; c < m.chosen; c++) axpy(x, slots + c * m.dim, b.weights[i * m.chosen + c], m.dim);
    if (done->shared.gate.kind != NONE) axpy(x, slots + m.chosen * m.dim, 1.0f, m.dim);
  }

  template <typename F>
  void mine(Member &me, int64_t count, F &&work) {
    for (int64_t i; (i = me.take()) < count;) work(i);
    me.meet();
  }
  template <typename F>
  void together(Member &me, Scratch &scratch, F &&make) {
    if (me.index == 0) clear(), make();
    me.meet();
    run(me, jobs, scratch);
    me.meet();
  }

  void walk(Member me) {
    Scratch scratch;
    const Layer *done = nullptr;
    int64_t head_dim = m.nope + m.rope;
    for (int64_t index = 0; index < m.layers; index++) {
      const Layer &layer = m.layer[index];
      void *cache = step.caches[index];
      mine(me, b.n, [&](int64_t i) {
        add_up(done, i);
        rms_norm(&b.x[i * m.dim], layer.input_norm, m.norm_kind, &b.h[i * m.dim], m.dim, m.eps);
      });
      bool low = layer.q_a.kind != NONE;
      together(me, scratch, [&] {
        if (low) add(layer.q_a, nullptr, b.h.data(), m.dim, b.q_low.data(), layer.q_a.out, b.n);
        else add(layer.q_b, nullptr, b.h.data(), m.dim, b.q.data(), layer.q_b.out, b.n);
        add(layer.kv_a, nullptr, b.h.data(), m.dim, b.kv.data(), width, b.n);
      });
      mine(me, b.n, [&](int64_t i) {
        if (low) {
          float *row = &b.q_low[i * layer.q_a.out];
          rms_norm(row, layer.q_norm, m.norm_kind, row, layer.q_a.out, m.latent_eps);
        }
        std::vector<float> entry(static_cast<size_t>(width));
        float *kv = &b.kv[i * width];
        rms_norm(kv, layer.kv_norm, m.norm_kind, entry.data(), m.latent, m.latent_eps);
        rotate(kv + m.latent, step.cos + i * m.rope / 2, step.sin + i * m.rope / 2, &entry[m.latent], m.rope);
        put(cache, step.cache_kind, (step.slots[i] * step.capacity + step.places[i]) * width, entry.data(), width);
      });
      if (low) together(me, scratch, [&] { add(layer.q_b, nullptr, b.q_low.data(), layer.q_a.out, b.q.data(), layer.q_b.out, b.n); });
      mine(me, m.heads, [&](int64_t h) {
        for (int64_t i = 0; i < b.n; i++) {
          const float *q = &b.q[i * m.heads * head_dim + h * head_dim];
          float *query = &b.query[(i * m.heads + h) * width];
          if (layer.kv_b.kind == F32) absorb(m, (const float *)layer.kv_b.data, h, q, query);
          else absorb(m, (const uint16_t *)layer.kv_b.data, h, q, query);
          rotate(q + m.nope, step.cos + i * m.rope / 2, step.sin + i * m.rope / 2, query + m.latent, m.rope);
          for (int64_t k = 0; k < width; k++) query[k] *= float(m.softmax_scale);
        }
      });
      mine(me, b.n * splits, [&](int64_t task) {
        int64_t i = task / splits, first = task % splits * SPAN, last = std::min(first + SPAN, step.places[i] + 1);
        int64_t bytes = step.cache_kind == F32 ? 4 : 2;
        const char *rows = (const char *)cache + step.slots[i] * step.capacity * width * bytes;
        attend(m, step, &b.query[i * m.heads * width], rows, first, std::max(first, last), b.parts[task]);
      });
      mine(me, b.n * m.heads, [&](int64_t task) {  // the pieces become one, and go through the value half of kv_b
        int64_t i = task / m.heads, h = task % m.heads;
        float *mixed = &b.mixed[task * m.latent], peak = -INFINITY, sum = 0;
        for (int64_t s = 0; s < splits; s++) peak = std::max(peak, b.parts[i * splits + s].peak[h]);
        std::memset(mixed, 0, size_t(m.latent) * 4);
        for (int64_t s = 0; s < splits; s++) {
          const Part &part = b.parts[i * splits + s];
          if (part.sum[h] == 0) continue;
          float keep = std::exp(part.peak[h] - peak);
          sum += keep * part.sum[h];
          axpy(mixed, &part.mixed[h * m.latent], keep, m.latent);
        }
        for (int64_t l = 0; l < m.latent; l++) mixed[l] /= sum;
      });
      together(me, scratch, [&] {
        for (int64_t h = 0; h < m.heads; h++) {
          pieces.push_back(rows_from(layer.kv_b, h * (m.nope + m.value) + m.nope, m.value));
          add(pieces.back(), nullptr, &b.mixed[h * m.latent], m.heads * m.latent, &b.out[h * m.value], m.heads * m.value, b.n);
        }
      });
      together(me, scratch, [&] { add(layer.o, nullptr, b.out.data(), m.heads * m.value, b.slots.data(), m.dim, b.n); });
      mine(me, b.n, [&](int64_t i) {
        axpy(&b.x[i * m.dim], &b.slots[i * m.dim], 1.0f, m.dim);
        rms_norm(&b.x[i * m.dim], layer.post_norm, m.norm_kind, &b.h[i * m.dim], m.dim, m.eps);
      });
      if (layer.router.kind != NONE) {
        mine(me, (m.experts + 7) / 8, [&](int64_t block) {  // in float32 whatever the model's dtype
          for (int64_t e = block * 8; e < std::min(m.experts, block * 8 + 8); e++)
            for (int64_t i = 0; i < b.n; i++) {
              const float *x[1] = {&b.h[i * m.dim]};
              float s[1][1];
              if (layer.router.kind == F32) dots<1, 1>((const float *)layer.router.data + e * m.dim, m.dim, x, m.dim, s);
              else dots<1, 1>((const uint16_t *)layer.router.data + e * m.dim, m.dim, x, m.dim, s);
              b.scores[i * m.experts + e] = s[0][0];
            }
        });
        mine(me, b.n, [&](int64_t i) { choose(m, layer, &b.scores[i * m.experts], &b.chosen[i * m.chosen], &b.weights[i * m.chosen]); });
      }
      together(me, scratch, [&] { expert_jobs(layer, false); });
      together(me, scratch, [&] { expert_jobs(layer, true); });
      done = &layer;
    }
    mine(me, b.n, [&](int64_t i) {
      add_up(done, i);
      rms_norm(&b.x[i * m.dim], m.norm, m.norm_kind, &b.h[i * m.dim], m.dim, m.eps);
    });
    if (step.answered) together(me, scratch, [&] { add(m.head, nullptr, b.h.data(), m.dim, step.logits, m.vocab, step.answered); });
  }
};

extern "C" {

// 1: AMX, 2: AVX-512, 0: neither
int moonkit_level(int allow_amx) {
#ifdef AMX
  use_amx = allow_amx && amx_allowed();
  if (use_amx) return 1;
#endif
#ifdef AVX512
  return 2;
#else
  return 0;
#endif
}

// Whether the caller's structures are these: a library from another version must not be called
int moonkit_same(int64_t model, int64_t layer, int64_t step) {
  return model == int64_t(sizeof(Model)) && layer == int64_t(sizeof(Layer)) && step == int64_t(sizeof(Step));
}

// One step; returns 0, or 1 when there are more rows than it takes
int moonkit_decode(const Model *model, const Step *step) {
  if (step->rows < 1 || step->rows > 64) return 1;
  int64_t widest = 1, shared = 1;
  for (int64_t i = 0; i < model->layers; i++) {
    const Layer &layer = model->layer[i];
    if (layer.q_a.kind != NONE) widest = std::max(widest, layer.q_a.out);
    if (layer.router.kind != NONE) widest = std::max(widest, layer.experts[0].gate.out);
    if (layer.shared.gate.kind != NONE) shared = std::max(shared, layer.shared.gate.out);
  }
  Walk walk(*model, *step, widest, shared);
  walk.team.size = int(step->threads);
  pool()->run(walk.team.size, [&](int index) {
#ifdef AMX
    if (use_amx) shape_tiles(16);
#endif
    walk.walk(Member{walk.team, index});
#ifdef AMX
    if (use_amx) shape_tiles(0);
#endif
  });
  return 0;
}
}
