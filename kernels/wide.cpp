// Products and attention of many rows in bfloat16 on AMX: what the vision tower and long prompts run.
//
//   moonkit_linear      y (rows, out) = act(x (rows, in) w^T + bias) + residual; a SwiGLU pair in one pass
//   moonkit_weigh       y = the sum of a few rows of x, each times its weight: what experts give to their tokens
//   moonkit_attention   softmax(q k^T scale) v inside each item or causally, with the rotation of q and k on the way
//
// Sums are float32; what is stored is rounded once. torch's own products reach a third of what the tiles can do, and
// its attention an eighth; here the weights are laid out for the tiles on the way, panel by panel, since that costs
// a hundredth of their product with a thousand rows.

#include <algorithm>
#include <atomic>
#include <vector>

#include "amx.h"
#include "team.h"

enum Act : int64_t { PLAIN = 0, GELU = 1, SWIGLU = 2 };

struct Linear {
  const uint16_t *x, *w, *w2, *residual;  // (rows, in), (out, in), the second weight of SWIGLU, (rows, out) or null
  const uint16_t *bias;                   // (out) or null
  const int64_t *which;                   // (rows): the row of x that each row is; null: its own
  void *y;                                // (rows, out)
  int64_t rows, in, out, x_stride, y_stride, act, y_float;
};

struct Attention {
  const uint16_t *q, *k, *v;  // (tokens, heads, wide), (tokens, heads, wide), (tokens, heads, value)
  const float *cos, *sin;     // (tokens, wide / 2), of pairs side by side; null: no rotation
  uint16_t *y;                // (tokens, heads, value)
  const int64_t *lengths;     // of the items; with a past, one item
  int64_t items, heads, wide, value, q_stride, k_stride, v_stride, y_stride;  // strides of a token; heads lie together
  int64_t q_head, k_head, v_head;                                            // strides of a head
  int64_t causal, past;  // past: keys before the first query; keys are past + tokens
  double scale;
};

#ifdef AMX
namespace {

// ---- products
//
// x is laid out as left-hand tiles first, by all threads, and shared. Then each thread takes panels of columns: it lays
// the panel's part of w out as right-hand tiles, which stay in its second cache, and passes all rows by them:
//
//   32 rows of x, CHUNK steps of 32 numbers        stay in the first cache while
//   CHUNK steps of each pair of column tiles       come in from the second, one pair after the other
//
// Laying w out pays for itself by the rows that pass. Where they are few, as those of an expert in a short prompt, w is
// the left-hand side as it lies in memory, x is laid out as the right-hand one, and results are turned at the end.

constexpr int64_t BLOCK = 32;      // rows of x that run together, and columns of a pair of tiles
constexpr int64_t CHUNK = 9;       // steps: x, a pair and its sums fill the first cache
constexpr int64_t PANEL = 1200000; // bytes of w that are laid out together
constexpr int64_t LEFT = 32 << 20; // bytes of x that are laid out together

constexpr int64_t FEW = 128;       // rows up to which w is taken as it lies

inline int64_t steps_of(const Linear &job) { return (job.in + 31) / 32; }

// Steps that are laid out together. Where rows are long, panels of all of them would be narrow and x would come in too
// often: then a panel takes a part of the steps after the other, and the sums are kept in between.
inline int64_t part_of(const Linear &job) {
  int64_t steps = steps_of(job), parts = (steps + 71) / 72;
  return (steps + parts - 1) / parts;
}

// columns of w that are laid out together, a multiple of 32: all panels alike, and as many for each thread
inline int64_t panel_of(const Linear &job, int64_t threads) {
  int64_t most = std::clamp<int64_t>(PANEL / 64 / part_of(job) / 32 * 32, 32, 512) / (job.act == SWIGLU ? 2 : 1);
  int64_t panels = ((job.out + most - 1) / most + threads - 1) / threads * threads;
  return std::min(most, ((job.out + panels - 1) / panels + 31) / 32 * 32);
}

// numbers 0..in of 16 rows of w from `row` on as right-hand tiles: to[step * stride] is that of 32 step..32 step + 31
void lay_out(const uint16_t *w, int64_t row, int64_t rows, int64_t in, int64_t w_stride, uint16_t *to, int64_t stride) {
  for (int64_t k = 0; k < in; k += 32) {
    __m512i r[16];
    __mmask32 mask = in - k >= 32 ? __mmask32(-1) : __mmask32((1u << (in - k)) - 1);
    for (int64_t i = 0; i < 16; i++)
      r[i] = row + i < rows ? _mm512_maskz_loadu_epi16(mask, w + (row + i) * w_stride + k) : _mm512_setzero_si512();
    transpose16(r);
    uint16_t *at = to + k / 32 * stride;
    for (int i = 0; i < 16; i++) _mm512_store_si512(at + i * 32, r[i]);
  }
}

inline uint16_t *aligned(std::vector<uint16_t> &room, int64_t size) {
  if (int64_t(room.size()) < size + 32) room.resize(size_t(size) + 32);
  return (uint16_t *)((uintptr_t(room.data()) + 63) & ~uintptr_t(63));
}
inline float *aligned(std::vector<float> &room, int64_t size) {
  if (int64_t(room.size()) < size + 16) room.resize(size_t(size) + 16);
  return (float *)((uintptr_t(room.data()) + 63) & ~uintptr_t(63));
}

inline __m512 gelu(__m512 v) {  // tanh form: v * sigmoid(2 sqrt(2 / pi) (v + 0.044715 v^3))
  __m512 u = _mm512_fmadd_ps(_mm512_mul_ps(v, v), _mm512_set1_ps(0.07135481283f), _mm512_set1_ps(1.5957691216f));
  return times_sigmoid(v, _mm512_mul_ps(u, v));
}

inline __m512 silu(__m512 v) { return times_sigmoid(v, v); }

inline void store16(const Linear &job, int64_t row, int64_t column, __mmask16 mask, __m512 v) {
  if (job.bias) v = _mm512_add_ps(v, lanes(job.bias + column, mask));
  if (job.act == GELU) v = gelu(v);
  if (job.residual) {
    // rounded before the sum, as two operations in bfloat16 would
    v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)), 16));
    v = _mm512_add_ps(v, lanes(job.residual + row * job.y_stride + column, mask));
  }
  if (job.y_float) _mm512_mask_storeu_ps((float *)job.y + row * job.y_stride + column, mask, v);
  else _mm256_mask_storeu_epi16((uint16_t *)job.y + row * job.y_stride + column, mask, (__m256i)_mm512_cvtneps_pbh(v));
}

struct Room {
  std::vector<uint16_t> panel;
  std::vector<float> sums;
};

// sums 0 to 3 += 32 left-hand rows, `stride` bytes apart, times a pair of right-hand tiles
inline void four_products(const uint16_t *above, const uint16_t *below, int64_t stride, const uint16_t *first, const uint16_t *second) {
  _tile_loadd(4, above, stride);
  _tile_loadd(6, first, 64);
  _tile_loadd(7, second, 64);
  _tile_loadd(5, below, stride);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// 32 rows of x (as tiles: two to a step) times one pair of column tiles, on top of `sums` unless it is the first chunk
inline void pair(const uint16_t *x, const uint16_t *w, int64_t steps, float *sums, bool first) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
  }
  for (int64_t s = 0; s < steps; s++, x += 1024, w += 1024) four_products(x, x + 512, 64, w, w + 512);
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

inline bool as_it_lies(const Linear &job) { return job.rows <= FEW && job.in % 32 == 0; }

// where row `row` of the product's left-hand side begins, or null behind its end
inline const uint16_t *row_of(const Linear &job, int64_t row) {
  return row < job.rows ? job.x + (job.which ? job.which[row] : row) * job.x_stride : nullptr;
}

// rows row..row + 31 of x as right-hand tiles: (2, steps, 16 pairs, 16 rows, 2)
void lay_right(const Linear &job, int64_t row, uint16_t *to) {
  int64_t steps = steps_of(job);
  for (int64_t half = 0; half < 2; half++, row += 16)
    for (int64_t s = 0; s < steps; s++, to += 512) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; i++) {
        const uint16_t *from = row_of(job, row + i);
        r[i] = from ? _mm512_loadu_si512(from + s * 32) : _mm512_setzero_si512();
      }
      transpose16(r);
      for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * 32, r[i]);
    }
}

// rows row..row + 31 of x as left-hand tiles: (steps, 2, 16, 32)
void lay_left(const Linear &job, int64_t row, uint16_t *to) {
  int64_t steps = steps_of(job);
  for (int64_t some = 0; some < steps; some += 8)  // few rows' lines at a time: what is written lies together
    for (int64_t r = 0; r < BLOCK; r++) {
      const uint16_t *from = row_of(job, row + r);
      for (int64_t s = some; s < std::min(steps, some + 8); s++) {
        int64_t left = from ? job.in - s * 32 : 0;
        __mmask32 mask = left >= 32 ? __mmask32(-1) : __mmask32((1u << left) - 1);
        _mm512_store_si512(to + s * 1024 + r * 32, _mm512_maskz_loadu_epi16(mask, from + s * 32));
      }
    }
}

// one pair's sums, (2, 2, 16, 16) of rows and columns, to y
inline void finish(const Linear &job, const float *sums, int64_t row, int64_t count, int64_t column, bool two) {
  for (int64_t half = 0; half < (two ? 1 : 2); half++) {
    int64_t at = column + half * 16, left = job.out - at;
    if (left <= 0) continue;
    __mmask16 mask = left >= 16 ? __mmask16(-1) : __mmask16((1u << left) - 1);
    for (int64_t r = 0; r < count; r++) {
      const float *from = sums + r / 16 * 512 + half * 256 + r % 16 * 16;
      __m512 v = _mm512_load_ps(from);
      if (two) v = _mm512_mul_ps(silu(v), _mm512_load_ps(from + 256));
      store16(job, row + r, at, mask, v);
    }
  }
}

// what `finish` will write, and add
inline void expect(const Linear &job, int64_t row, int64_t count, int64_t column) {
  if (column >= job.out) return;
  for (int64_t r = 0; r < count; r++) {
    int64_t at = (row + r) * job.y_stride + column;
    __builtin_prefetch((char *)job.y + at * (job.y_float ? 4 : 2), 1, 3);
    if (job.residual) __builtin_prefetch(job.residual + at, 0, 3);
  }
}

// columns of one panel, rows first..last, of which `x` holds the tiles
void linear_piece(const Linear &job, int64_t column, int64_t width, int64_t first, int64_t last, const uint16_t *x, Room &room) {
  int64_t steps = steps_of(job), part = part_of(job);
  bool two = job.act == SWIGLU;
  int64_t columns = std::min(width, job.out - column), tiles = (columns + 15) / 16;
  int64_t pairs = two ? tiles : (tiles + 1) / 2;
  int64_t length = part * 1024, block = pairs * 1024;  // of a pair in the panel; of 32 rows' sums
  int64_t blocks = (last - first + BLOCK - 1) / BLOCK;
  uint16_t *panel = aligned(room.panel, pairs * length);
  float *kept = aligned(room.sums, part < steps ? blocks * block : block);
  for (int64_t from = 0; from < steps; from += part) {
    int64_t to = std::min(steps, from + part), numbers = std::min(job.in, to * 32) - from * 32;
    for (int64_t t = 0; t < 2 * pairs; t++) {
      uint16_t *at = panel + t / 2 * length + t % 2 * 512;
      const uint16_t *w = two && t % 2 ? job.w2 : job.w;
      lay_out(w + from * 32, column + (two ? t / 2 : t) * 16, job.out, numbers, job.in, at, 1024);
    }
    settle();
    int64_t chunks = (to - from + CHUNK - 1) / CHUNK, each = (to - from + chunks - 1) / chunks;
    for (int64_t b = 0; b < blocks; b++) {
      int64_t row = first + b * BLOCK, count = std::min(BLOCK, last - row);
      const uint16_t *left = x + b * steps * 1024;
      float *sums = part < steps ? kept + b * block : kept;
      for (int64_t chunk = from; chunk < to; chunk += each) {
        int64_t some = std::min(each, to - chunk);
        bool end = chunk + some == steps;
        for (int64_t p = 0; p < pairs; p++) {
          int64_t at = column + (two ? p : 2 * p) * 16;
          if (end) expect(job, row, count, at);
          pair(left + chunk * 1024, panel + p * length + (chunk - from) * 1024, some, sums + p * 1024, chunk == 0);
          if (!end) continue;
          settle();
          finish(job, sums + p * 1024, row, count, at, two);
        }
      }
    }
  }
}

// 16 results of 16 rows, (columns, rows), turned and written
inline void finish_turned(const Linear &job, const float *sums, const float *second, int64_t row, int64_t column) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = _mm512_load_si512(sums + i * 16);
  transpose16(a);
  if (second) {
    for (int i = 0; i < 16; i++) b[i] = _mm512_load_si512(second + i * 16);
    transpose16(b);
  }
  __mmask16 mask = job.out - column >= 16 ? __mmask16(-1) : __mmask16((1u << (job.out - column)) - 1);
  for (int64_t r = 0; r < std::min<int64_t>(16, job.rows - row); r++) {
    __m512 v = _mm512_castsi512_ps(a[r]);
    if (second) v = _mm512_mul_ps(silu(v), _mm512_castsi512_ps(b[r]));
    store16(job, row + r, column, mask, v);
  }
}

// Columns from..to of a product with few rows, all of them; from is a multiple of 16. Two tiles of w's rows (or one of
// each w) times two of x's; a ragged end of w is taken from a copy.
void few_rows(const Linear &job, int64_t from, int64_t to, const uint16_t *x, Room &room) {
  int64_t steps = steps_of(job), tiles = (job.rows + 15) / 16;
  bool two = job.act == SWIGLU;
  alignas(64) float sums[4][256];
  for (int64_t column = from; column < to; column += two ? 16 : 32) {
    const uint16_t *w[2] = {job.w + column * job.in, two ? job.w2 + column * job.in : job.w + (column + 16) * job.in};
    for (int64_t half = 0; half < 2; half++) {
      int64_t first = column + (two ? 0 : half * 16), there = std::clamp<int64_t>(job.out - first, 0, 16);
      if (there == 16) continue;
      uint16_t *copy = aligned(room.panel, 2 * 16 * job.in) + half * 16 * job.in;
      std::fill(copy, copy + 16 * job.in, 0);
      if (there) std::memcpy(copy, w[half], size_t(there * job.in) * 2);
      w[half] = copy;
    }
    for (int64_t t = 0; t < tiles; t += 2) {
      const uint16_t *right = x + t * steps * 512;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      settle();
      for (int64_t s = 0; s < steps; s++) {
        if (t == 0)  // what comes 32 steps later, at the end of the rows the start of those below
          for (int half = 0; half < 2; half++) {
            const uint16_t *ahead = w[half] + (s + 32) * 32 + (s + 32 < steps ? 0 : (two ? 15 : 31) * job.in);
            for (int r = 0; r < 16; r++) _mm_prefetch((const char *)(ahead + r * job.in), _MM_HINT_T1);
          }
        _tile_loadd(4, w[0] + s * 32, job.in * 2);
        _tile_loadd(6, right + s * 512, 64);
        _tile_loadd(5, w[1] + s * 32, job.in * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (t + 1 == tiles) continue;
        _tile_loadd(7, right + (steps + s) * 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
      settle();
      for (int64_t right_half = 0; right_half < std::min<int64_t>(2, tiles - t); right_half++) {
        int64_t row = (t + right_half) * 16;
        finish_turned(job, sums[right_half], two ? sums[2 + right_half] : nullptr, row, column);
        if (!two && column + 16 < job.out) finish_turned(job, sums[2 + right_half], nullptr, row, column + 16);
      }
    }
  }
}

// ---- attention
//
// A block is 32 queries against KEYS keys: its logits (tiles), their shares in their place (vectors), the shares times
// the values (tiles). The first cache holds the queries, a block's logits and the sums. Keys and values pass through it,
// and are called in while the vectors are at work, which touch nothing else. The vectors' floating point and the tiles
// share a port, so doing both at once gains nothing (measured: 345 ns beside each other, 320 in turn).

constexpr int64_t QUERIES = 32, KEYS = 64;
constexpr int64_t SPAN = 1200000;  // bytes of keys and values that stay in the second cache while all queries pass
constexpr int64_t AHEAD = 16;      // rows that are called in before they are wanted
constexpr float NEVER = -1e30f;    // the logit of a key that is not seen

struct Space {
  std::vector<uint16_t> keys, values, queries;
  std::vector<float> logits, state;
  alignas(64) uint16_t piece[16 * 512];
};

// one head's row, turned and padded with zeros to `padded`
inline void load_row(const uint16_t *from, const float *cos, const float *sin, int64_t wide, int64_t padded, float factor, uint16_t *to) {
  for (int64_t i = 0; i < padded; i += 16) {
    int64_t left = wide - i;
    __mmask16 mask = left >= 16 ? __mmask16(-1) : left <= 0 ? 0 : __mmask16((1u << left) - 1);
    __m512 v = lanes(from + i, mask);
    if (cos && left > 0) {
      // each angle serves a pair: a cos - b sin, then b cos + a sin
      __mmask8 half = __mmask8((1u << std::min<int64_t>(8, left / 2)) - 1);
      const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
      __m512 c = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_maskz_loadu_ps(half, cos + i / 2)));
      __m512 s = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_maskz_loadu_ps(half, sin + i / 2)));
      __m512 swapped = _mm512_permute_ps(v, 0xb1);
      v = _mm512_fmaddsub_ps(v, c, _mm512_mul_ps(swapped, s));
      // rounded as the turned keys are in the plain form, before the factor
      v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)), 16));
    }
    v = _mm512_mul_ps(v, _mm512_set1_ps(factor));
    _mm256_storeu_si256((__m256i *)(to + i), (__m256i)_mm512_cvtneps_pbh(v));
  }
}

inline void fetch(const uint16_t *from, int64_t lines) {
  for (int64_t i = 0; i < lines; i++) _mm_prefetch((const char *)from + i * 64, _MM_HINT_T0);
}

// a row of one head, which is far from the next one's: no prefetcher of the machine finds it
inline void call_in(const uint16_t *row, int64_t wide) {
  for (int64_t i = 0; i < wide; i += 32) _mm_prefetch((const char *)(row + i), _MM_HINT_T1);
  _mm_prefetch((const char *)(row + wide - 1), _MM_HINT_T1);
}

// logits (pairs, 32, 32) of 32 queries (32, wide) and pairs of tiles of 16 keys
inline void queries_times_keys(const uint16_t *queries, const uint16_t *keys, int64_t wide, int64_t pairs, float *logits) {
  for (int64_t p = 0; p < pairs; p++, keys += 32 * wide, logits += 1024) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < wide; s += 32)
      four_products(queries + s, queries + 16 * wide + s, wide * 2, keys + s * 16, keys + 16 * (wide + s));
    _tile_stored(0, logits, 128);
    _tile_stored(1, logits + 16, 128);
    _tile_stored(2, logits + 512, 128);
    _tile_stored(3, logits + 528, 128);
  }
  settle();
}

// sums (2, columns, 16, 16) += shares, bfloat16 at the start of each row of (pairs, 32, 32), times values in tiles
inline void shares_times_values(const float *shares, const uint16_t *values, int64_t columns, int64_t pairs, float *sums) {
  for (int64_t c = 0; c < columns; c += 2) {
    float *above = sums + c * 256, *below = above + columns * 256;
    bool both = c + 1 < columns;
    _tile_loadd(0, above, 64);
    _tile_loadd(2, below, 64);
    if (both) {
      _tile_loadd(1, above + 256, 64);
      _tile_loadd(3, below + 256, 64);
    }
    for (int64_t p = 0; p < pairs; p++) {
      const uint16_t *right = values + (p * columns + c) * 512;
      _tile_loadd(4, shares + p * 1024, 128);
      _tile_loadd(6, right, 64);
      _tile_loadd(5, shares + p * 1024 + 512, 128);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      if (both) {
        _tile_loadd(7, right + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, above, 64);
    _tile_stored(2, below, 64);
    if (both) {
      _tile_stored(1, above + 256, 64);
      _tile_stored(3, below + 256, 64);
    }
  }
  settle();
}

// the largest of each of 16 rows, from the largest of each lane of it
inline __m512 largest16(__m512 r[16]) {
  for (int i = 0; i < 8; i++) r[i] = _mm512_max_ps(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    __m512d a = (__m512d)r[2 * i], b = (__m512d)r[2 * i + 1];
    r[i] = _mm512_max_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
  }
  for (int n = 2; n; n /= 2)
    for (int i = 0; i < n; i++)
      r[i] = _mm512_max_ps(_mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0x88), _mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0xdd));
  return r[0];
}

// What is known of 32 queries between two spans of keys.
struct State {
  float *sums, *totals, *peaks;  // (2, columns, 16, 16); (32, 16), lane by lane; (32)
  static int64_t size(int64_t columns) { return 32 * (columns * 16 + 16 + 1) + 32; }
  State(float *at, int64_t columns) : sums(at), totals(at + columns * 512), peaks(totals + 512) {}
};

// Logits of a block, (pairs, 32, 32), to shares in bfloat16 in their place; the first rows of `values` and `keys` come
// in meanwhile. True when a peak moved: then `keep` holds by how much each row's older sums shrink.
template <bool whole>
inline bool share_out(float *logits, int64_t pairs, State &state, float *keep, const uint16_t *values, int64_t v_lines, const uint16_t *keys,
                      int64_t k_lines) {
  int64_t count = whole ? KEYS / 32 : pairs;
  __mmask16 grew = 0;
  for (int64_t first = 0; first < 32; first += 16) {
    __m512 top[16];
    for (int64_t i = 0; i < 16; i++) {
      const float *row = logits + (first + i) * 32;
      top[i] = _mm512_max_ps(_mm512_load_ps(row), _mm512_load_ps(row + 16));
      for (int64_t p = 1; p < count; p++)
        top[i] = _mm512_max_ps(top[i], _mm512_max_ps(_mm512_load_ps(row + p * 1024), _mm512_load_ps(row + p * 1024 + 16)));
    }
    // shares are 2^(logit - peak), for any peak that keeps them in range: it moves only when a row outgrows it
    __m512 before = _mm512_load_ps(state.peaks + first), now = largest16(top);
    __mmask16 up = _mm512_cmp_ps_mask(now, _mm512_add_ps(before, _mm512_set1_ps(8.0f)), _CMP_GT_OQ);
    now = _mm512_mask_mov_ps(before, up, now);
    _mm512_store_ps(keep + first, _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), up, exp2_16(_mm512_sub_ps(before, now))));
    grew |= up;
    _mm512_store_ps(state.peaks + first, now);
  }
  for (int64_t i = 0; i < 32; i++) {
    fetch(values + i * v_lines * 32, v_lines);
    fetch(keys + i * k_lines * 32, k_lines);
    __m512 peak = _mm512_set1_ps(state.peaks[i]), sum = _mm512_setzero_ps();
    for (int64_t p = 0; p < count; p++) {
      float *at = logits + p * 1024 + i * 32;
      __m512 a = exp2_16(_mm512_sub_ps(_mm512_load_ps(at), peak)), b = exp2_16(_mm512_sub_ps(_mm512_load_ps(at + 16), peak));
      sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
      _mm512_store_si512(at, two_to_bf16(a, b));
    }
    float *total = state.totals + i * 16;
    _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_load_ps(total), _mm512_set1_ps(keep[i]), sum));
  }
  settle();
  return grew;
}

// 32 queries against a span of `keys` keys, of which query i sees the first `sees` + i, or all where not causal
void pass(const uint16_t *queries, const uint16_t *k_tiles, const uint16_t *v_tiles, int64_t wide, int64_t columns, int64_t keys,
          int64_t sees, bool causal, State &state, float *logits) {
  alignas(64) float keep[32];
  // a row of shares calls in a 32nd of what comes next: KEYS * columns * 16 and KEYS * wide numbers, 32 to a line
  const int64_t v_lines = KEYS * columns / 64, k_lines = KEYS * wide / 1024;
  for (int64_t k = 0; k < keys; k += KEYS) {
    int64_t width = std::min(KEYS, (keys - k + 31) / 32 * 32), seen = std::min(causal ? sees : keys, keys) - k;
    const uint16_t *k_here = k_tiles + k * wide, *v_here = v_tiles + k * columns * 16;
    queries_times_keys(queries, k_here, wide, width / 32, logits);
    if (seen < width)
      for (int64_t i = 0; i < 32; i++) {
        int64_t last = std::max<int64_t>(0, std::min(causal ? seen + i : seen, keys - k));
        for (int64_t c = last; c < width; c++) logits[c / 32 * 1024 + i * 32 + c % 32] = NEVER;
      }
    bool grew = width == KEYS ? share_out<true>(logits, KEYS / 32, state, keep, v_here, v_lines, k_here + KEYS * wide, k_lines)
                              : share_out<false>(logits, width / 32, state, keep, v_here, v_lines, k_here, 0);
    if (grew) {
      for (int64_t c = 0; c < 2 * columns; c++)
        for (int64_t i = 0; i < 16; i++) {
          float *at = state.sums + c * 256 + i * 16;
          _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(keep[c / columns * 16 + i])));
        }
      settle();
    }
    shares_times_values(logits, v_here, columns, width / 32, state.sums);
  }
}

// queries from..to of one item and head against all its keys
void attend(const Attention &job, int64_t start, int64_t keys, int64_t head, int64_t from, int64_t to, Space &s) {
  int64_t wide = (job.wide + 31) / 32 * 32, columns = (job.value + 15) / 16, value = columns * 16, half = job.wide / 2;
  int64_t visible = job.causal ? std::min(keys, job.past + to) : keys;
  int64_t span = std::min(SPAN / (2 * (wide + value)) / KEYS * KEYS, (visible + KEYS - 1) / KEYS * KEYS);
  uint16_t *k_tiles = aligned(s.keys, span * wide), *v_tiles = aligned(s.values, span * value);
  uint16_t *queries = aligned(s.queries, QUERIES * wide);
  float *logits = aligned(s.logits, 32 * KEYS);
  int64_t groups = (to - from + QUERIES - 1) / QUERIES, size = State::size(columns);
  // where all keys are one span, one group's state after the other serves
  float *states = aligned(s.state, (span < visible ? groups : 1) * size);
  float factor = float(job.scale * 1.4426950408889634);  // 2^x instead of e^x
  for (int64_t base = 0; base < visible; base += span) {
    int64_t here = std::min(span, visible - base), padded = (here + 31) / 32 * 32;
    for (int64_t k = 0; k < padded; k += 16) {
      for (int64_t i = 0; i < 16; i++) {
        int64_t token = start + base + k + i;
        uint16_t *row = s.piece + i * wide;
        if (k + i + AHEAD < here) call_in(job.k + (token + AHEAD) * job.k_stride + head * job.k_head, job.wide);
        if (k + i < here)
          load_row(job.k + token * job.k_stride + head * job.k_head, job.cos ? job.cos + token * half : nullptr,
                   job.cos ? job.sin + token * half : nullptr, job.wide, wide, 1.0f, row);
        else
          std::memset(row, 0, size_t(wide) * 2);
      }
      lay_out(s.piece, 0, 16, wide, wide, k_tiles + k * wide, 512);
    }
    for (int64_t k = 0; k < padded; k += 2) {  // two keys a row, 16 values a tile
      for (int64_t i = k + AHEAD; i < k + AHEAD + 2 && i < here; i++) call_in(job.v + (start + base + i) * job.v_stride + head * job.v_head, job.value);
      for (int64_t c = 0; c < value; c += 32) {
        int64_t left = job.value - c;
        __mmask32 mask = left >= 32 ? __mmask32(-1) : __mmask32((1u << left) - 1);
        const uint16_t *at = job.v + (start + base + k) * job.v_stride + head * job.v_head + c;
        __m512i a = k < here ? _mm512_maskz_loadu_epi16(mask, at) : _mm512_setzero_si512(), first, second;
        __m512i b = k + 1 < here ? _mm512_maskz_loadu_epi16(mask, at + job.v_stride) : _mm512_setzero_si512();
        interleave(a, b, first, second);
        uint16_t *tile = v_tiles + (k / 32 * columns + c / 16) * 512 + k % 32 / 2 * 32;
        _mm512_store_si512(tile, first);
        if (c + 16 < value) _mm512_store_si512(tile + 512, second);
      }
    }
    for (int64_t g = 0; g < groups; g++) {
      int64_t query = from + g * QUERIES, count = std::min(QUERIES, to - query);
      int64_t sees = job.past + query + 1 - base;  // keys of this span that the first of them sees
      int64_t most = job.causal ? std::min(here, sees + count - 1) : here;
      if (most <= 0) continue;
      int64_t own = start + (job.causal ? job.past : 0);  // the rotation of a query is that of its own token
      for (int64_t i = 0; i < QUERIES; i++) {
        if (i >= count) {
          std::memset(queries + i * wide, 0, size_t(wide) * 2);
          continue;
        }
        int64_t token = own + query + i, row = (job.causal ? 0 : start) + query + i;
        load_row(job.q + row * job.q_stride + head * job.q_head, job.cos ? job.cos + token * half : nullptr,
                 job.cos ? job.sin + token * half : nullptr, job.wide, wide, factor, queries + i * wide);
      }
      State state(states + (span < visible ? g * size : 0), columns);
      if (base == 0) {
        std::fill(state.sums, state.peaks, 0.0f);
        std::fill(state.peaks, state.peaks + 32, NEVER);
      }
      for (int64_t row = (job.causal ? 0 : start) + query + QUERIES, i = 0; i < QUERIES && query + QUERIES + i < to; i++)
        call_in(job.q + (row + i) * job.q_stride + head * job.q_head, job.wide);
      settle();
      pass(queries, k_tiles, v_tiles, wide, columns, most, sees, job.causal, state, logits);
      int64_t next = base + span;  // the last span that it sees?
      if (next < visible && (!job.causal || next < job.past + query + count)) continue;
      for (int64_t i = 0; i < count; i++) {
        uint16_t *out = job.y + ((job.causal ? 0 : start) + query + i) * job.y_stride + head * job.value;
        __m512 scale = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(state.totals + i * 16)));
        for (int64_t c = 0; c < columns; c++) {
          int64_t left = job.value - c * 16;
          __mmask16 mask = left >= 16 ? __mmask16(-1) : __mmask16((1u << left) - 1);
          __m512 v = _mm512_mul_ps(scale, _mm512_load_ps(state.sums + (i / 16 * columns + c) * 256 + i % 16 * 16));
          _mm256_mask_storeu_epi16(out + c * 16, mask, (__m256i)_mm512_cvtneps_pbh(v));
        }
      }
    }
  }
}

}  // namespace
#endif

extern "C" {

// 1 when this machine runs what is here
int moonkit_wide() {
#ifdef AMX
  return amx_allowed();
#else
  return 0;
#endif
}

// Several products: as many jobs as there are experts, or one
int moonkit_linear(const Linear *jobs, int64_t count, int64_t threads) {
#ifdef AMX
  struct Piece {
    const Linear *job;
    int64_t column, width, first, last;
    uint16_t *x;
  };
  static thread_local std::vector<uint16_t> room;
  std::vector<Piece> left, pieces;  // of x to be laid out, and of products
  uint16_t *x = nullptr;
  int64_t used = 0;
  auto run = [&] {
    std::atomic<size_t> next{0};
    pool()->run(int(threads), [&](int) {
      for (size_t p; (p = next.fetch_add(1)) < left.size();)
        (as_it_lies(*left[p].job) ? lay_right : lay_left)(*left[p].job, left[p].first, left[p].x);
    });
    next = 0;
    pool()->run(int(threads), [&](int) {
      open_tiles();
      static thread_local Room own;
      for (size_t p; (p = next.fetch_add(1)) < pieces.size();) {
        const Piece &piece = pieces[p];
        if (as_it_lies(*piece.job)) few_rows(*piece.job, piece.column, std::min(piece.column + piece.width, piece.job->out), piece.x, own);
        else linear_piece(*piece.job, piece.column, piece.width, piece.first, piece.last, piece.x, own);
      }
      _tile_release();
    });
    left.clear(), pieces.clear(), used = 0;
  };
  int64_t total = 0, largest = 0;
  for (int64_t j = 0; j < count; j++) {
    int64_t bytes = (jobs[j].rows + BLOCK - 1) / BLOCK * BLOCK * steps_of(jobs[j]) * 64;
    total += bytes, largest = std::max(largest, std::min((jobs[j].rows + BLOCK - 1) / BLOCK, FEW / BLOCK) * BLOCK * steps_of(jobs[j]) * 64);
  }
  x = aligned(room, std::max(std::min(total, LEFT), largest) / 2);
  int64_t limit = std::max(std::min(total, LEFT), largest);
  for (int64_t j = 0; j < count; j++) {
    const Linear &job = jobs[j];
    int64_t block = BLOCK * steps_of(job) * 64, width = panel_of(job, count == 1 ? threads : 1);
    for (int64_t row = 0; row < job.rows;) {
      bool whole = as_it_lies(job);
      if (used + (whole ? (job.rows + BLOCK - 1) / BLOCK : 1) * block > limit) run();
      int64_t last = whole ? job.rows : std::min(job.rows, row + (limit - used) / block * BLOCK);
      uint16_t *at = x + used / 2;
      for (int64_t column = 0; column < job.out; column += width) pieces.push_back({&job, column, width, row, last, at});
      for (; row < last; row += BLOCK, used += block) left.push_back({&job, 0, 0, row, 0, x + used / 2});
    }
  }
  if (!pieces.empty()) run();
  return 0;
#else
  (void)jobs, (void)count, (void)threads;
  return 1;
#endif
}

// y (tokens, dim) = sum over c of weights[t, c] x[rows[t, c]]; x (anything, dim), rows and weights (tokens, chosen)
int moonkit_weigh(const uint16_t *x, const int64_t *rows, const float *weights, uint16_t *y, int64_t tokens, int64_t chosen, int64_t dim,
                  int64_t threads) {
#ifdef AMX
  std::atomic<int64_t> next{0};
  pool()->run(int(threads), [&](int) {
    for (int64_t first; (first = next.fetch_add(16)) < tokens;)
      for (int64_t t = first; t < std::min(tokens, first + 16); t++)
        for (int64_t d = 0; d < dim; d += 16) {
          int64_t left = dim - d;
          __mmask16 mask = left >= 16 ? __mmask16(-1) : __mmask16((1u << left) - 1);
          __m512 sum = _mm512_setzero_ps();
          for (int64_t c = 0; c < chosen; c++)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[t * chosen + c]), lanes(x + rows[t * chosen + c] * dim + d, mask), sum);
          _mm256_mask_storeu_epi16(y + t * dim + d, mask, (__m256i)_mm512_cvtneps_pbh(sum));
        }
  });
  return 0;
#else
  (void)x, (void)rows, (void)weights, (void)y, (void)tokens, (void)chosen, (void)dim, (void)threads;
  return 1;
#endif
}

int moonkit_attention(const Attention *job, int64_t threads) {
#ifdef AMX
  struct Piece {
    int64_t start, keys, head, from, to;
  };
  std::vector<Piece> pieces;
  int64_t start = 0, longest = 0;
  for (int64_t i = 0; i < job->items; i++) longest = std::max(longest, job->lengths[i]);
  for (int64_t i = 0; i < job->items; i++) {
    int64_t length = job->lengths[i], keys = length + job->past;
    // heads are enough pieces, unless there are more threads; causal rows differ in length, so they are cut too
    int64_t cuts = std::clamp<int64_t>(threads * (job->causal ? 4 : 2) / job->heads, 1, (length + QUERIES - 1) / QUERIES);
    int64_t each = ((length + cuts - 1) / cuts + QUERIES - 1) / QUERIES * QUERIES;
    for (int64_t h = 0; h < job->heads; h++)
      for (int64_t from = 0; from < length; from += each) pieces.push_back({start, keys, h, from, std::min(length, from + each)});
    start += length;
  }
  // the long ones first
  std::stable_sort(pieces.begin(), pieces.end(), [&](const Piece &a, const Piece &b) {
    return (a.to - a.from) * (job->causal ? job->past + a.to : a.keys) > (b.to - b.from) * (job->causal ? job->past + b.to : b.keys);
  });
  std::atomic<size_t> next{0};
  pool()->run(int(threads), [&](int) {
    open_tiles();
    static thread_local Space space;
    for (size_t p; (p = next.fetch_add(1)) < pieces.size();)
      attend(*job, pieces[p].start, pieces[p].keys, pieces[p].head, pieces[p].from, pieces[p].to, space);
    _tile_release();
  });
  return 0;
#else
  (void)job, (void)threads;
  return 1;
#endif
}
}
