/* What the compiled code shares: sixteen floats at a time, packed weights, and the shapes of a pass and a reading.
 *
 * Weights are packed in panels of PANEL output columns: panel p holds w[p * PANEL + c][k] at [k][c]. They are fp32, or
 * bf16 two by two (see `pair`); whatever is not a weight is fp32, and bf16 only where it meets a bf16 weight.
 */
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <omp.h>
#include <type_traits>
#include <vector>

#define PANEL 64
#define ROWS 6
#define SHARING 16
#define AHEAD 32
#define INLINE static inline __attribute__((always_inline))
typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));

/* Two neighbouring inputs as bf16, the first in the low half. Of a weight: at [k / 2][c], a zero behind an odd last one. */
typedef uint32_t pair;

/* The matrices are of floats or of pairs. */
struct Layer {
    const void *qkv;
    const float *qkv_bias, *qk_scale;
    const void *output;
    const float *output_bias;
    const void *gate_up, *down;
};

/* `paired`: whether the layers' matrices are of pairs, and the embedding of bf16. */
struct Model {
    int64_t vocabulary, layers, size, heads, kv_heads, head_size, feed, paired;
    float norm_floor, head_floor;
    const Layer *layer;
    const void *embedding;
    const float *norm_scale;
};

/* Tokens of one pass over a cache of `rows` rows of `positions`. Hidden states are wanted of the `asking` ones `asked`,
 * ascending (null: of all), and what no other layer reads is computed for them alone. `row`, `at`: where each is stored; `position`: its
 * rotary position, below `turns`. It sees positions 0..committed-1 of its row, and committed + seen[i] for the first `seeing` (at most
 * `extra`) entries of its line of `seen`, which begins `stride` entries after the line before. */
struct Pass {
    int64_t tokens, rows, positions, turns, extra, stride, num_features, asking;
    const int64_t *token, *row, *at, *position, *committed, *seeing, *feature_layers, *asked;
    const int32_t *seen;
    const float *rotations;
    float *cache, *hidden;
    float **features;
};

/* A draft: one layer on a fused input, token_part[token] + feature_part * feature. Matrices as in a model. */
struct Draft {
    int64_t vocabulary, size, heads, head_size, feed, paired;
    float norm_floor;
    const float *token_part;
    const void *feature_part, *qkv, *output, *gate_up, *down;
    const float *last_scale;
};

/* Tokens read by a draft, and the `asking` ones among them (`asked`) whose output is wanted; `committed`, `seeing` and
 * `seen` are those of the asking ones. `step`: what the draft step adds (may be null), times the gate
 * sigmoid(context . z + gate) (context may be null: times 1). */
struct Reading {
    int64_t tokens, asking, rows, positions, turns, extra, stride;
    const int64_t *token, *row, *at, *position, *asked, *committed, *seeing;
    const int32_t *seen;
    const float *features, *rotations, *step, *context;
    float gate;
    float *cache, *out;
};

enum Mode { STORE, ADD, GATE };

INLINE v16 load(const float *p) { return *(const v16 *)p; }
INLINE void store(float *p, v16 v) { *(v16 *)p = v; }
INLINE v16 splat(float x) { return x - v16{}; }

/* e^x by Cephes' polynomial, relative error below 2e-7. */
INLINE v16 exp16(v16 x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
    x = x < splat(-87.0f) ? splat(-87.0f) : x;
    x = x > splat(88.0f) ? splat(88.0f) : x;
    v16 t = x * splat(1.44269504f) + splat(shift);
    v16 n = t - splat(shift);
    v16 r = x - n * splat(0.693359375f) - n * splat(-2.12194440e-4f);
    v16 p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    i16 power = ((i16)t - (i16)splat(shift)) << 23;
    return (v16)((i16)p + power);
}

INLINE float sum16(v16 v) {
    float lanes[16], s[4];
    store(lanes, v);
    for (int i = 0; i < 4; i++) s[i] = (lanes[i] + lanes[i + 4]) + (lanes[i + 8] + lanes[i + 12]);
    return (s[0] + s[1]) + (s[2] + s[3]);
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    v16 s = load(a) * load(b);
    for (int64_t i = 16; i < n; i += 16) s += load(a + i) * load(b + i);
    return sum16(s);
}

/* What becomes of `count` rows of a panel's results, of which `columns` are wanted. */
template <Mode mode, int count>
INLINE void finish(v16 (&acc)[count][4], float *y, int64_t ldy, int64_t columns, const float *bias) {
#pragma GCC unroll 6
    for (int r = 0; r < count; r++) {
        float *out = y + r * ldy;
        if (mode == GATE) { /* 32 gates, then 32 values */
            for (int c = 0; c < 2; c++) {
                v16 g = acc[r][c];
                store(out + 16 * c, g / (splat(1.0f) + exp16(-g)) * acc[r][c + 2]);
            }
            continue;
        }
        if (bias)
            for (int c = 0; c < 4; c++) acc[r][c] += load(bias + 16 * c);
        if (columns >= PANEL) {
            for (int c = 0; c < 4; c++) store(out + 16 * c, mode == ADD ? load(out + 16 * c) + acc[r][c] : acc[r][c]);
        } else {
            float tail[PANEL];
            for (int c = 0; c < 4; c++) store(tail + 16 * c, acc[r][c]);
            for (int64_t c = 0; c < columns; c++) out[c] = mode == ADD ? out[c] + tail[c] : tail[c];
        }
    }
}

/* `count` rows of x [., depth] times one panel of w. */
template <Mode mode, int count>
INLINE void panel_rows(const float *x, int64_t ldx, const float *w, int64_t depth, float *y, int64_t ldy,
                       int64_t columns, const float *bias) {
    v16 acc[count][4];
#pragma GCC unroll 6
    for (int r = 0; r < count; r++)
        for (int c = 0; c < 4; c++) acc[r][c] = v16{};
    for (int64_t k = 0; k < depth; k++, w += PANEL) {
        for (int c = 0; c < 4; c++) __builtin_prefetch(w + AHEAD * PANEL + 16 * c); /* arithmetic hides the way from L3 */
        v16 w0 = load(w), w1 = load(w + 16), w2 = load(w + 32), w3 = load(w + 48);
#pragma GCC unroll 6
        for (int r = 0; r < count; r++) {
            v16 a = splat(x[r * ldx + k]);
            acc[r][0] += a * w0;
            acc[r][1] += a * w1;
            acc[r][2] += a * w2;
            acc[r][3] += a * w3;
        }
    }
    finish<mode, count>(acc, y, ldy, columns, bias);
}

INLINE v16 first_of(i16 pairs) { return (v16)(pairs << 16); }
INLINE v16 second_of(i16 pairs) { return (v16)(pairs & (int32_t)0xffff0000); }

/* The same of pairs: two products at a time, unpacked. */
template <Mode mode, int count>
static void unpacked_rows(const pair *x, int64_t ldx, const pair *w, int64_t depth, float *y, int64_t ldy,
                          int64_t columns, const float *bias) {
    v16 acc[count][4];
#pragma GCC unroll 6
    for (int r = 0; r < count; r++)
        for (int c = 0; c < 4; c++) acc[r][c] = v16{};
    for (int64_t k = 0; k < depth; k++, w += PANEL) {
        for (int c = 0; c < 4; c++) __builtin_prefetch(w + AHEAD * PANEL + 16 * c);
        for (int c = 0; c < 4; c++) {
            const i16 both = *(const i16 *)(w + 16 * c);
            const v16 first = first_of(both), second = second_of(both);
#pragma GCC unroll 6
            for (int r = 0; r < count; r++) {
                const i16 own = (int32_t)x[r * ldx + k] - i16{};
                acc[r][c] += first_of(own) * first;
                acc[r][c] += second_of(own) * second;
            }
        }
    }
    finish<mode, count>(acc, y, ldy, columns, bias);
}

#ifdef __AVX512F__
/* The same by the processor's own product of pairs. */
template <Mode mode, int count>
__attribute__((target("avx512bf16"))) static void dotted_rows(const pair *x, int64_t ldx, const pair *w, int64_t depth,
                                                              float *y, int64_t ldy, int64_t columns, const float *bias) {
    v16 acc[count][4];
#pragma GCC unroll 6
    for (int r = 0; r < count; r++)
        for (int c = 0; c < 4; c++) acc[r][c] = v16{};
    for (int64_t k = 0; k < depth; k++, w += PANEL) {
        for (int c = 0; c < 4; c++) __builtin_prefetch(w + AHEAD * PANEL + 16 * c);
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w), w1 = (__m512bh)_mm512_loadu_si512(w + 16);
        const __m512bh w2 = (__m512bh)_mm512_loadu_si512(w + 32), w3 = (__m512bh)_mm512_loadu_si512(w + 48);
#pragma GCC unroll 6
        for (int r = 0; r < count; r++) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32(x[r * ldx + k]);
            acc[r][0] = (v16)_mm512_dpbf16_ps((__m512)acc[r][0], a, w0);
            acc[r][1] = (v16)_mm512_dpbf16_ps((__m512)acc[r][1], a, w1);
            acc[r][2] = (v16)_mm512_dpbf16_ps((__m512)acc[r][2], a, w2);
            acc[r][3] = (v16)_mm512_dpbf16_ps((__m512)acc[r][3], a, w3);
        }
    }
    finish<mode, count>(acc, y, ldy, columns, bias);
}

static const bool has_products_of_pairs = __builtin_cpu_supports("avx512bf16");
#endif

template <Mode mode, int count>
INLINE void panel_rows(const pair *x, int64_t ldx, const pair *w, int64_t depth, float *y, int64_t ldy, int64_t columns,
                       const float *bias) {
#ifdef __AVX512F__
    if (has_products_of_pairs) return dotted_rows<mode, count>(x, ldx, w, depth, y, ldy, columns, bias);
#endif
    unpacked_rows<mode, count>(x, ldx, w, depth, y, ldy, columns, bias);
}

/* The nearest bf16 of finite x, ties to even. */
INLINE uint16_t rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* x [rows, in] as pairs [rows, (in + 1) / 2]; overwritten by the calling thread's next. */
static const pair *as_pairs(const float *x, int64_t ldx, int64_t in, int64_t rows) {
    static thread_local std::vector<pair> kept;
    const int64_t depth = (in + 1) / 2;
    if ((int64_t)kept.size() < rows * depth) kept.resize(rows * depth);
    for (int64_t r = 0; r < rows; r++) {
        uint16_t *out = (uint16_t *)(kept.data() + r * depth);
        for (int64_t k = 0; k < in; k++) out[k] = rounded(x[r * ldx + k]);
        if (in % 2) out[in] = 0;
    }
    return kept.data();
}

/* y [n, out] (or its sum with y, or the gated product of it) of x [n, in]. Work-shared over panels and row blocks: of few
 * rows each thread takes panels, so that weights are read once; of many it takes rows, which it has just written itself. */
template <Mode mode, class Weight>
static void linear(const float *x, int64_t ldx, const Weight *w, int64_t in, float *y, int64_t ldy, int64_t out,
                   const float *bias, int64_t n) {
    constexpr bool paired = std::is_same_v<Weight, pair>;
    const int64_t panels = (out + PANEL - 1) / PANEL, team = omp_get_num_threads(), most = 24 * ROWS;
    const int64_t shares = n < 24 * team ? 1 : team, blocks = shares * ((n + shares * most - 1) / (shares * most));
    const int64_t block = blocks ? (n + blocks - 1) / blocks : 1;
    const int64_t depth = paired ? (in + 1) / 2 : in, stride = paired ? depth : ldx;
    const Weight *rows = 0;
    int64_t held = -1; /* whose rows they are */
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t p = 0; p < panels; p++) {
            const int64_t begin = b * block, end = begin + block < n ? begin + block : n;
            if (held != b) {
                const float *from = x + begin * ldx;
                if constexpr (paired) rows = as_pairs(from, ldx, in, end - begin);
                else rows = from;
                held = b;
            }
            const Weight *panel = w + p * PANEL * depth;
            const float *own_bias = bias ? bias + p * PANEL : 0;
            float *to = y + p * (mode == GATE ? PANEL / 2 : PANEL);
            const int64_t left = out - p * PANEL;
            int64_t r = begin;
#define BLOCK(count) \
    panel_rows<mode, count>(rows + (r - begin) * stride, stride, panel, depth, to + r * ldy, ldy, left, own_bias)
            for (; r + ROWS <= end; r += ROWS) BLOCK(ROWS);
            switch (end - r) {
            case 5: BLOCK(5); break;
            case 4: BLOCK(4); break;
            case 3: BLOCK(3); break;
            case 2: BLOCK(2); break;
            case 1: BLOCK(1); break;
            }
#undef BLOCK
        }
}

/* y [n, out] of x [n, in], of weights of either kind. */
INLINE void linear_of(bool paired, const float *x, const void *w, int64_t in, float *y, int64_t out, const float *bias,
                      int64_t n) {
    if (paired) linear<STORE>(x, in, (const pair *)w, in, y, out, out, bias, n);
    else linear<STORE>(x, in, (const float *)w, in, y, out, out, bias, n);
}

/* The same of one row, not shared. */
template <class Weight> INLINE void row_of(const Weight *x, const Weight *w, int64_t depth, float *y, int64_t out) {
    for (int64_t c = 0; c < out; c += PANEL) panel_rows<STORE, 1>(x, 0, w + c * depth, depth, y + c, 0, out - c, 0);
}
INLINE void row_of(bool paired, const float *x, const void *w, int64_t in, float *y, int64_t out) {
    if (paired) row_of(as_pairs(x, 0, in, 1), (const pair *)w, (in + 1) / 2, y, out);
    else row_of(x, (const float *)w, in, y, out);
}

INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

extern "C" {
int padrec_pass(const Model *m, const Pass *p, int threads);
int padrec_read(const Draft *m, const Reading *p, int threads);
}
