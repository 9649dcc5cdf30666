/* The target's pass, the draft's chain and the choice among legal children on a CPU: one call each instead of hundreds.
 *
 * At the sizes served here a tensor operation costs as much as its arithmetic, and a pass of a few tokens is made of
 * hundreds. Here the same layers (see model/layer.py, the twin this is tested against) run as loops over packed weights.
 * Every sum is taken in an order that depends on the token alone: its own inputs, and the tokens it sees, in their
 * order. So a token's result is the same to the last bit whatever else is in the pass: alone, in a batch, guessed or
 * written. Knows no requests and no files: pointers and sizes.
 *
 * fp32. Weights are packed in panels of PANEL output columns: panel p holds w[p * PANEL + c][k] at [k][c].
 */
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <vector>

#define PANEL 64
#define ROWS 6
#define INLINE static inline __attribute__((always_inline))
typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));

struct Layer {
    const float *qkv, *qkv_bias, *qk_scale, *output, *output_bias, *gate_up, *down;
};

struct Model {
    int64_t vocabulary, layers, size, heads, kv_heads, head_size, feed;
    float norm_floor, head_floor;
    const Layer *layer;
    const float *embedding, *norm_scale;
};

/* Tokens of one pass over a cache of `rows` rows of `positions`. `row`, `at`: where each is stored; `position`: its
 * rotary position, below `turns`. It sees positions 0..committed-1 of its row, and committed + seen[i] for the first `seeing` (at most
 * `extra`) entries of its line of `seen`, which begins `stride` entries after the line before. */
struct Pass {
    int64_t tokens, rows, positions, turns, extra, stride, num_features;
    const int64_t *token, *row, *at, *position, *committed, *seeing, *feature_layers;
    const int32_t *seen;
    const float *rotations;
    float *cache, *hidden;
    float **features;
};

/* A draft: one layer on a fused input, token_part[token] + feature_part * feature. */
struct Draft {
    int64_t vocabulary, size, heads, head_size, feed;
    float norm_floor;
    const float *token_part, *feature_part, *qkv, *output, *gate_up, *down, *last_scale;
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

/* The tables of an item trie (model/item_trie.py), and the target's head over item tokens: level l's columns begin at
 * `level_columns[l]`, a node's is `column`. */
struct Trie {
    int64_t items, levels, nodes, first_leaf, size;
    const int64_t *leaf_start, *first_child, *column, *level_columns;
    const int32_t *run_end, *item_tokens;
    const int8_t *depth;
    const float *head;
};

/* What rows may emit: `passing` [., nodes] counts of filters, `filter_slot` [rows] (0: no filter), `excluded` [rows,
 * width] ascending leaves. */
struct May {
    int64_t width;
    const int32_t *passing;
    const int64_t *filter_slot, *excluded;
};

/* Groups whose best legal child is wanted: group g of a row lies at `node`, behind its row's first g drafted runs, which
 * completed the leaves `leaf` [rows, groups - 1] (items: none). `length` 0: there is no such run. */
struct Groups {
    int64_t rows, groups;
    const int64_t *node, *leaf, *length;
    const float *hidden;
    int64_t *best, *child;
    float *score;
};

/* A chain of draft choices for each row: it starts at `node`, may complete `remaining` items; `position` is that of its
 * first token. Before it the draft reads the row's `gains` fresh runs, `fresh_tokens` [rows, gains, levels + 1] of
 * `fresh_length` [rows, gains], each with its `fresh_feature` [rows, gains, size]. Entry j of `step`, `context` and
 * `gate` belongs to draft step j; step 0 reads the fresh runs. The rest is written, [rows, steps] each, `tokens` [rows,
 * steps, levels + 1]; `length` 0: no choice. */
struct Chain {
    int64_t rows, steps, gains, cache_rows, positions, turns;
    const int64_t *node, *position, *remaining, *fresh_tokens, *fresh_length;
    const float *fresh_feature, *rotations;
    const float *const *step;
    const float *const *context;
    const float *gate;
    float *cache;
    int64_t *tokens, *length, *leaf, *end, *choice, *slot, *start;
};

/* A pass over each row's pending run and the chain of drafted runs behind it, [rows, groups, places] `tokens` of
 * `length` [rows, groups] (group 0: pending; rows of length 0 are idle), stored from `base` [rows] on. `hidden` and
 * `features` [rows, groups, size] are those of each group's last token (an absent group's: the one before it). */
struct Runs {
    int64_t rows, groups, places, cache_rows, positions, turns, num_features;
    const int64_t *tokens, *length, *base, *feature_layers;
    const float *rotations;
    float *cache, *hidden;
    float **features;
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

/* `count` rows of x [., in] times one panel of w; `mode` says what becomes of the `columns` results. */
template <Mode mode, int count>
INLINE void panel_rows(const float *x, int64_t ldx, const float *w, int64_t in, float *y, int64_t ldy, int64_t columns,
                       const float *bias) {
    v16 acc[count][4];
#pragma GCC unroll 6
    for (int r = 0; r < count; r++)
        for (int c = 0; c < 4; c++) acc[r][c] = v16{};
    for (int64_t k = 0; k < in; k++, w += PANEL) {
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

/* y [n, out] (or its sum with y, or the gated product of it) of x [n, in]. Work-shared over panels and row blocks. */
template <Mode mode>
static void linear(const float *x, int64_t ldx, const float *w, int64_t in, float *y, int64_t ldy, int64_t out,
                   const float *bias, int64_t n) {
    const int64_t panels = (out + PANEL - 1) / PANEL, block = 24 * ROWS, blocks = (n + block - 1) / block;
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t p = 0; p < panels; p++) {
            const int64_t end = (b + 1) * block < n ? (b + 1) * block : n;
            const float *panel = w + p * PANEL * in;
            const float *own_bias = bias ? bias + p * PANEL : 0;
            float *to = y + p * (mode == GATE ? PANEL / 2 : PANEL);
            const int64_t left = out - p * PANEL;
            int64_t r = b * block;
#define BLOCK(count) \
    panel_rows<mode, count>(x + r * ldx, ldx, panel, in, to + r * ldy, ldy, left, own_bias)
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

/* y = x / hypot(|x|, floor): RMSNorm with its scale folded into whatever reads y. */
INLINE void unit(const float *x, float *y, int64_t n, float floor_, const float *scale) {
    const v16 f = splat(1.0f / sqrtf(dot(x, x, n) + floor_ * floor_));
    for (int64_t i = 0; i < n; i += 16) store(y + i, scale ? load(x + i) * f * load(scale + i) : load(x + i) * f);
}

INLINE void rotate(float *x, const float *rotation, int64_t n) {
    for (int64_t i = 0; i < n; i += 2) {
        const float a = x[i], b = x[i + 1], c = rotation[i], s = rotation[i + 1];
        x[i] = a * c - b * s;
        x[i + 1] = a * s + b * c;
    }
}

INLINE v16 halves(const v16 *pair, i16 low, i16 high) {
    return __builtin_shuffle(pair[0], pair[1], low) + __builtin_shuffle(pair[0], pair[1], high);
}

/* The sums of sixteen vectors' lanes. Every one is added up in the same order, wherever it lies among the sixteen. */
INLINE v16 sums16(v16 *v) {
    const i16 low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, high8 = low8 + 8;
    const i16 low4 = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}, high4 = low4 + 4;
    const i16 low2 = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}, high2 = low2 + 2;
    const i16 low1 = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, high1 = low1 + 1;
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) v[i] = halves(v + 2 * i, low8, high8);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) v[i] = halves(v + 2 * i, low4, high4);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) v[i] = halves(v + 2 * i, low2, high2);
    return halves(v, low1, high1);
}

/* One query over the keys and values [T, n] it sees. */
INLINE void attend(const float *query, const float *keys, const float *values, int64_t n, int64_t committed,
                   const int32_t *seen, int64_t seeing, float *score, float *out) {
    const int64_t count = committed + seeing;
    const v16 scale = splat(1.0f / sqrtf((float)n));
    float highest = -INFINITY, total = 0.0f;
    for (int64_t j = 0; j < count; j += 16) {
        v16 products[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const int64_t k = j + i < count ? j + i : count - 1; /* whole vectors: the last one again, unused */
            const float *key = keys + (k < committed ? k : committed + seen[k - committed]) * n;
            products[i] = load(query) * load(key);
            for (int64_t c = 16; c < n; c += 16) products[i] += load(query + c) * load(key + c);
        }
        store(score + j, sums16(products) * scale);
    }
    for (int64_t j = 0; j < count; j++)
        if (score[j] > highest) highest = score[j];
    for (int64_t j = 0; j < count; j += 16) store(score + j, exp16(load(score + j) - splat(highest)));
    v16 mixed[16];
    for (int64_t c = 0; c < n / 16; c++) mixed[c] = v16{};
    for (int64_t j = 0; j < count; j++) {
        const int64_t place = j < committed ? j : committed + seen[j - committed];
        const v16 share = splat(score[j]);
        total += score[j];
        for (int64_t c = 0; c < n / 16; c++) mixed[c] += share * load(values + place * n + 16 * c);
    }
    for (int64_t c = 0; c < n / 16; c++) store(out + 16 * c, mixed[c] / splat(total));
}

INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* Room for a pass. Each calling thread has its own: two may run passes of one model at once. */
static float *room(int64_t floats) {
    static thread_local std::vector<float> kept;
    if ((int64_t)kept.size() < floats) kept.resize(floats);
    return kept.data();
}

/* Whether any of n numbers lies outside 0..end-1. */
INLINE bool outside(const int64_t *numbers, int64_t n, int64_t end) {
    for (int64_t t = 0; t < n; t++)
        if (numbers[t] < 0 || numbers[t] >= end) return true;
    return false;
}

template <class Work> INLINE bool impossible(const Work *p, int64_t asking, int64_t vocabulary) {
    const int64_t n = p->tokens;
    if (outside(p->token, n, vocabulary) || outside(p->row, n, p->rows) || outside(p->at, n, p->positions)) return true;
    if (outside(p->position, n, p->turns) || outside(p->seeing, asking, p->extra + 1)) return true;
    for (int64_t a = 0; a < asking; a++) {
        if (p->committed[a] < 0 || p->committed[a] > p->positions) return true;
        for (int64_t i = 0; i < p->seeing[a]; i++) {
            const int64_t place = p->committed[a] + p->seen[a * p->stride + i];
            if (place < 0 || place >= p->positions) return true;
        }
    }
    return false;
}

const int64_t ANY_NODE = 2; /* the root's first child: what nobody looks at */

struct Chosen {
    int64_t index, node;
    float score;
};

/* The best legal child of `node` for a row that has emitted the first `emitted` of `path` besides what it may not emit.
 * Ties go to the lowest token. False: there is none. */
INLINE bool best_child(const Trie *t, const May *may, int64_t row, int64_t node, const float *hidden,
                       const int64_t *path, int64_t emitted, bool scored, Chosen *chosen) {
    const int64_t first = t->first_child[node], last = t->first_child[node + 1], level = t->depth[node];
    if (level >= t->levels || first >= last) return false;
    static thread_local std::vector<float> logit;
    const int64_t columns = t->level_columns[t->levels], children = padded(last - first, 16);
    if ((int64_t)logit.size() < columns + 2 * PANEL + children) logit.resize(columns + 2 * PANEL + children);
    float *logits = logit.data(), *legal = logits + padded(columns, PANEL);
    /* Only the panels that hold a child's column; each sums as the whole head does. */
    for (int64_t p = t->column[first] / PANEL; p <= t->column[last - 1] / PANEL; p++)
        panel_rows<STORE, 1>(hidden, t->size, t->head + p * PANEL * t->size, t->size, logits + p * PANEL, 0, PANEL, 0);
    const int32_t *passing = may->filter_slot[row] ? may->passing + may->filter_slot[row] * t->nodes : nullptr;
    const int64_t *excluded = may->excluded + row * may->width, *end = excluded + may->width;
    for (int64_t step = may->width; step > 0; step /= 2) /* to the first exclusion among these children */
        while (end - excluded >= step && excluded[step - 1] < t->leaf_start[first]) excluded += step;
    int64_t best = -1, count = 0;
    for (int64_t c = first; c < last; c++) {
        const int64_t low = t->leaf_start[c], high = t->leaf_start[c + 1];
        int64_t available = passing ? passing[c + 1] - passing[c] : high - low;
        for (; excluded < end && *excluded < high; excluded++) available--;
        for (int64_t i = 0; i < emitted; i++) available -= low <= path[i] && path[i] < high;
        if (available <= 0) continue;
        legal[count++] = logits[t->column[c]];
        if (best < 0 || logits[t->column[c]] > logits[t->column[best]]) best = c;
    }
    if (best < 0) return false;
    *chosen = {best - first, best, 0.0f};
    if (scored && count > 1) {
        const v16 highest = splat(logits[t->column[best]]);
        float total = 0.0f;
        for (int64_t i = 0; i < count; i += 16) store(legal + i, exp16(load(legal + i) - highest));
        for (int64_t i = 0; i < count; i++) total += legal[i];
        chosen->score = -logf(total);
    }
    return true;
}

extern "C" {

/* `hidden` [n, size] after the last norm; the outputs of `feature_layers`, the last layer's replaced by `hidden`.
 * Returns 1, having done nothing, when a number points outside the cache or a table. */
int padrec_pass(const Model *m, const Pass *p, int threads) {
    if (impossible(p, p->tokens, m->vocabulary)) return 1;
    const int64_t n = p->tokens, d = m->size, s = m->head_size, q = m->heads, g = m->kv_heads;
    const int64_t width = (q + 2 * g) * s, wide = padded(width, PANEL), mix = q * s, feed = padded(m->feed, PANEL / 2);
    const int64_t per_row = g * p->positions * s, per_kind = p->rows * per_row;
    const int64_t sight = p->positions + p->extra + 16;
    float *x = room(n * (2 * d + wide + mix + feed) + threads * sight), *y = x + n * d, *qkv = y + n * d, *mixed = qkv + n * wide, *h = mixed + n * mix;
    float *scores = h + n * feed;
#pragma omp parallel num_threads(threads)
    {
        float *score = scores + omp_get_thread_num() * sight;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n; t++) memcpy(x + t * d, m->embedding + p->token[t] * d, d * sizeof(float));
        for (int64_t l = 0; l < m->layers; l++) {
            const Layer *w = m->layer + l;
            float *keys = p->cache + l * 2 * per_kind, *values = keys + per_kind;
#pragma omp for schedule(static)
            for (int64_t t = 0; t < n; t++) unit(x + t * d, y + t * d, d, m->norm_floor, 0);
            linear<STORE>(y, d, w->qkv, d, qkv, wide, width, w->qkv_bias, n);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < n; t++) {
                float *own = qkv + t * wide;
                const float *rotation = p->rotations + p->position[t] * s;
                const int64_t to = p->row[t] * per_row + p->at[t] * s;
                for (int64_t i = 0; i < q + g; i++) {
                    if (w->qk_scale) unit(own + i * s, own + i * s, s, m->head_floor, w->qk_scale + i * s);
                    rotate(own + i * s, rotation, s);
                }
                for (int64_t i = 0; i < g; i++) {
                    memcpy(keys + to + i * p->positions * s, own + (q + i) * s, s * sizeof(float));
                    memcpy(values + to + i * p->positions * s, own + (q + g + i) * s, s * sizeof(float));
                }
            }
#pragma omp for collapse(2) schedule(static)
            for (int64_t t = 0; t < n; t++)
                for (int64_t i = 0; i < q; i++) {
                    const int64_t from = p->row[t] * per_row + i / (q / g) * p->positions * s;
                    attend(qkv + t * wide + i * s, keys + from, values + from, s, p->committed[t],
                           p->seen + t * p->stride, p->seeing[t], score, mixed + t * mix + i * s);
                }
            linear<ADD>(mixed, mix, w->output, mix, x, d, d, w->output_bias, n);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < n; t++) unit(x + t * d, y + t * d, d, m->norm_floor, 0);
            linear<GATE>(y, d, w->gate_up, d, h, feed, 2 * feed, 0, n);
            linear<ADD>(h, feed, w->down, m->feed, x, d, d, 0, n);
            for (int64_t f = 0; f < p->num_features; f++)
                if (p->feature_layers[f] == l && l < m->layers - 1) {
#pragma omp for schedule(static)
                    for (int64_t t = 0; t < n; t++) memcpy(p->features[f] + t * d, x + t * d, d * sizeof(float));
                }
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n; t++) {
            unit(x + t * d, p->hidden + t * d, d, m->norm_floor, m->norm_scale);
            for (int64_t f = 0; f < p->num_features; f++)
                if (p->feature_layers[f] == m->layers - 1)
                    memcpy(p->features[f] + t * d, p->hidden + t * d, d * sizeof(float));
        }
    }
    return 0;
}

/* Stores keys and values of all tokens; `out` [asking, size] after the last norm. Returns 1 as padrec_pass does. */
int padrec_read(const Draft *m, const Reading *p, int threads) {
    if (impossible(p, p->asking, m->vocabulary) || outside(p->asked, p->asking, p->tokens)) return 1;
    if (!p->tokens) return 0;
    const int64_t n = p->tokens, asking = p->asking, d = m->size, s = m->head_size, q = m->heads, mix = q * s;
    const int64_t wide = padded(3 * mix, PANEL), feed = padded(m->feed, PANEL / 2);
    const int64_t per_row = q * p->positions * s;
    const int64_t sight = p->positions + p->extra + 16;
    float *z = room(n * (2 * d + wide) + asking * (d + mix + feed) + threads * sight), *y = z + n * d, *qkv = y + n * d, *x = qkv + n * wide, *mixed = x + asking * d;
    float *h = mixed + asking * mix, *scores = h + asking * feed;
    float *keys = p->cache, *values = keys + p->rows * per_row;
#pragma omp parallel num_threads(threads)
    {
        float *score = scores + omp_get_thread_num() * sight;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n; t++) memcpy(z + t * d, m->token_part + p->token[t] * d, d * sizeof(float));
        linear<ADD>(p->features, d, m->feature_part, d, z, d, d, 0, n);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n; t++) {
            float *own = z + t * d;
            if (p->step) {
                const float open = p->context ? 1.0f / (1.0f + expf(-(dot(own, p->context, d) + p->gate))) : 1.0f;
                for (int64_t i = 0; i < d; i += 16) store(own + i, load(own + i) + splat(open) * load(p->step + i));
            }
            unit(own, y + t * d, d, m->norm_floor, 0);
        }
        linear<STORE>(y, d, m->qkv, d, qkv, wide, 3 * mix, 0, n);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n; t++) {
            float *own = qkv + t * wide;
            const int64_t to = p->row[t] * per_row + p->at[t] * s;
            for (int64_t i = 0; i < 2 * q; i++) rotate(own + i * s, p->rotations + p->position[t] * s, s);
            for (int64_t i = 0; i < q; i++) {
                memcpy(keys + to + i * p->positions * s, own + (q + i) * s, s * sizeof(float));
                memcpy(values + to + i * p->positions * s, own + (2 * q + i) * s, s * sizeof(float));
            }
        }
#pragma omp for schedule(static)
        for (int64_t a = 0; a < asking; a++) {
            const int64_t t = p->asked[a];
            memcpy(x + a * d, z + t * d, d * sizeof(float));
            for (int64_t i = 0; i < q; i++) {
                const int64_t from = p->row[t] * per_row + i * p->positions * s;
                attend(qkv + t * wide + i * s, keys + from, values + from, s, p->committed[a], p->seen + a * p->stride,
                       p->seeing[a], score, mixed + a * mix + i * s);
            }
        }
        linear<ADD>(mixed, mix, m->output, mix, x, d, d, 0, asking);
#pragma omp for schedule(static)
        for (int64_t a = 0; a < asking; a++) unit(x + a * d, y + a * d, d, m->norm_floor, 0);
        linear<GATE>(y, d, m->gate_up, d, h, feed, 2 * feed, 0, asking);
        linear<ADD>(h, feed, m->down, m->feed, x, d, d, 0, asking);
#pragma omp for schedule(static)
        for (int64_t a = 0; a < asking; a++) unit(x + a * d, p->out + a * d, d, m->norm_floor, m->last_scale);
    }
    return 0;
}

/* The best legal child of every group, its index among the children, and its log-probability among the legal ones. */
int padrec_choose(const Trie *t, const May *may, const Groups *p, int threads) {
    const int64_t count = p->rows * p->groups;
    if (outside(p->node, count, t->nodes - 1)) return 1;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (count > 16)
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = i / p->groups, group = i % p->groups, runs = p->groups - 1;
        Chosen chosen = {0, ANY_NODE, 0.0f};
        if (!group || p->length[row * runs + group - 1])
            best_child(t, may, row, p->node[i], p->hidden + i * t->size, p->leaf + row * runs, group, true, &chosen);
        p->best[i] = chosen.index;
        p->child[i] = chosen.node;
        p->score[i] = chosen.score;
    }
    return 0;
}

/* Tokens for a draft to read, row by row, and whose outputs are wanted. */
struct Reader {
    std::vector<int64_t> token, row, at, asked, committed;
    std::vector<float> features, out;

    void add(int64_t which, int64_t where, int64_t id, const float *feature, int64_t size) {
        token.push_back(id), row.push_back(which), at.push_back(where);
        features.insert(features.end(), feature, feature + size);
    }
    void ask(int64_t seen) { asked.push_back((int64_t)token.size() - 1), committed.push_back(seen); }

    /* Reads everything at draft step j, puts the outputs into `feature` [rows, size], and starts over. */
    int read(const Draft *m, const Chain *p, int64_t j, float *feature, int threads) {
        const int64_t n = token.size(), asking = asked.size(), d = m->size;
        const std::vector<int64_t> none(asking, 0);
        out.resize(asking * d);
        const Reading reading = {n, asking, p->cache_rows, p->positions, p->turns, 0, 0, token.data(), row.data(),
                                 at.data(), at.data(), asked.data(), committed.data(), none.data(), nullptr,
                                 features.data(), p->rotations, p->step[j], p->context[j], p->gate[j], p->cache,
                                 out.data()};
        if (padrec_read(m, &reading, threads)) return 1;
        for (int64_t a = 0; a < asking; a++) memcpy(feature + row[asked[a]] * d, out.data() + a * d, d * sizeof(float));
        token.clear(), row.clear(), at.clear(), asked.clear(), committed.clear(), features.clear();
        return 0;
    }
};

/* Returns 1 as padrec_pass does; a later step may have written by then. */
int padrec_chain(const Trie *t, const May *may, const Draft *m, const Chain *p, int threads) {
    const int64_t places = t->levels + 1, d = m->size, steps = p->steps;
    if (outside(p->node, p->rows, t->nodes - 1)) return 1;
    std::vector<float> feature(p->rows * d);
    std::vector<int64_t> node(p->node, p->node + p->rows), position(p->position, p->position + p->rows);
    std::vector<int64_t> remaining(p->remaining, p->remaining + p->rows);
    Reader reader;
    for (int64_t b = 0; b < p->rows; b++) {
        const int64_t *length = p->fresh_length + b * p->gains;
        int64_t at = position[b];
        for (int64_t g = 0; g < p->gains; g++) at -= length[g];
        if (at == position[b]) continue;
        for (int64_t g = 0; g < p->gains; g++)
            for (int64_t c = 0; c < length[g]; c++)
                reader.add(b, at++, p->fresh_tokens[(b * p->gains + g) * places + c],
                           p->fresh_feature + (b * p->gains + g) * d, d);
        reader.ask(position[b]);
    }
    if (reader.read(m, p, 0, feature.data(), threads)) return 1;
    for (int64_t j = 0; j < steps; j++) {
#pragma omp parallel for schedule(static) num_threads(threads) if (p->rows > 8)
        for (int64_t b = 0; b < p->rows; b++) {
            const int64_t i = b * steps + j;
            Chosen chosen = {0, ANY_NODE, 0.0f};
            const bool found = remaining[b] > 0 && best_child(t, may, b, node[b], feature.data() + b * d,
                                                              p->leaf + b * steps, j, false, &chosen);
            const int64_t end = t->run_end[chosen.node], leaf = t->leaf_start[end], depth = t->depth[chosen.node];
            const bool done = end >= t->first_leaf;
            for (int64_t c = 0; c < places; c++)
                p->tokens[i * places + c] = t->item_tokens[leaf * places + depth - 1 + c];
            p->choice[i] = chosen.index;
            p->slot[i] = t->depth[node[b]];
            p->start[i] = position[b];
            p->length[i] = found ? t->depth[end] - depth + 1 + done : 0;
            p->leaf[i] = found && done ? leaf : t->items;
            p->end[i] = node[b] = done ? 0 : end;
            position[b] += p->length[i];
            remaining[b] = found ? remaining[b] - done : 0;
        }
        if (j + 1 == steps) break;
        for (int64_t b = 0; b < p->rows; b++) {
            const int64_t i = b * steps + j;
            for (int64_t c = 0; c < p->length[i]; c++) /* all tokens of a run share the feature that chose it */
                reader.add(b, p->start[i] + c, p->tokens[i * places + c], feature.data() + b * d, d);
            if (p->length[i]) reader.ask(position[b]);
        }
        if (reader.read(m, p, j + 1, feature.data(), threads)) return 1;
    }
    return 0;
}

/* Returns 1 as padrec_pass does. */
int padrec_runs(const Model *m, const Runs *p, int threads) {
    const int64_t d = m->size, most = p->groups * p->places;
    std::vector<int64_t> token, row, at, committed, seeing, ends(p->rows * p->groups, -1);
    std::vector<int32_t> seen(most);
    for (int64_t i = 0; i < most; i++) seen[i] = i;
    for (int64_t b = 0; b < p->rows; b++) {
        int64_t written = 0;
        for (int64_t g = 0; g < p->groups; g++) {
            const int64_t i = b * p->groups + g;
            if (p->length[i] < 0 || p->length[i] > p->places) return 1;
            for (int64_t c = 0; c < p->length[i]; c++) {
                token.push_back(p->tokens[i * p->places + c]), row.push_back(b), at.push_back(p->base[b] + written++);
                committed.push_back(p->base[b]), seeing.push_back(written);
            }
            if (written) ends[i] = (int64_t)token.size() - 1;
        }
    }
    const int64_t n = token.size();
    std::vector<float> out((1 + p->num_features) * n * d);
    std::vector<float *> features;
    for (int64_t f = 0; f < p->num_features; f++) features.push_back(out.data() + (1 + f) * n * d);
    const Pass pass = {n, p->cache_rows, p->positions, p->turns, most, 0, p->num_features, token.data(), row.data(),
                       at.data(), at.data(), committed.data(), seeing.data(), p->feature_layers, seen.data(),
                       p->rotations, p->cache, out.data(), features.data()};
    if (padrec_pass(m, &pass, threads)) return 1;
    for (int64_t i = 0; i < p->rows * p->groups; i++)
        for (int64_t f = -1; f < p->num_features; f++) {
            float *to = (f < 0 ? p->hidden : p->features[f]) + i * d;
            if (ends[i] < 0)
                memset(to, 0, d * sizeof(float));
            else
                memcpy(to, out.data() + ((1 + f) * n + ends[i]) * d, d * sizeof(float));
        }
    return 0;
}

/* y [n, out] = x [n, in] times packed w, plus bias (may be null). */
void padrec_linear(const float *x, const float *w, const float *bias, float *y, int64_t n, int64_t in, int64_t out,
                   int threads) {
#pragma omp parallel num_threads(threads)
    linear<STORE>(x, in, w, in, y, out, out, bias, n);
}
}
