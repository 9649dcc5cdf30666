/* The target's pass and the draft's reading on a CPU: one call each instead of hundreds.
 *
 * At the sizes served here a tensor operation costs as much as its arithmetic, and a pass of a few tokens is made of
 * hundreds. Here the same layers (see model/layer.py, the twin this is tested against) run as loops over packed weights.
 * Every sum is taken in an order that depends on the token alone: its own inputs, and the tokens it sees, in their
 * order. So a token's result is the same to the last bit whatever else is in the pass: alone, in a batch, guessed or
 * written. Knows no requests and no files: pointers and sizes.
 */
#include "layers.h"

/* y = x / hypot(|x|, floor): RMSNorm with its scale folded into whatever reads y. */
INLINE void unit(const float *x, float *y, int64_t n, float floor_, const float *scale) {
    const v16 f = splat(1.0f / sqrtf(dot(x, x, n) + floor_ * floor_));
    for (int64_t i = 0; i < n; i += 16) store(y + i, scale ? load(x + i) * f * load(scale + i) : load(x + i) * f);
}

/* x [n] times the complex numbers of `rotation`, pair by pair. */
INLINE void rotate(float *x, const float *rotation, int64_t n) {
    const i16 real = {0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14}, other = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
    const v16 sign = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
    for (int64_t i = 0; i < n; i += 16) {
        const v16 own = load(x + i), turn = load(rotation + i);
        store(x + i, own * __builtin_shuffle(turn, real) + __builtin_shuffle(own, other) * __builtin_shuffle(turn, real + 1) * sign);
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

/* One query over the keys and values [T, 16 V] it sees: positions 0..committed-1, then committed + seen[i]. What is summed
 * is split by a key's place among those seen, which company does not change. */
template <int V>
static void attend(const float *query, const float *keys, const float *values, int64_t committed, const int32_t *seen,
                   int64_t seeing, float *score, float *out) {
    const int64_t count = committed + seeing, n = 16 * V;
    const v16 scale = splat(1.0f / sqrtf((float)n));
    v16 own[V], highest = splat(-INFINITY), total = v16{}, mixed[4][V];
    for (int c = 0; c < V; c++) own[c] = load(query + 16 * c);
    for (int64_t j = 0; j < count; j += 16) {
        v16 products[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const int64_t k = j + i < count ? j + i : count - 1; /* whole vectors: the last one again, unused */
            const int64_t at = (k < committed ? k : committed + seen[k - committed]) * n;
            const float *key = keys + at;
#pragma GCC unroll 4
            for (int c = 0; c < V; c += 1) __builtin_prefetch(values + at + 16 * c);
            products[i] = own[0] * load(key);
#pragma GCC unroll 8
            for (int c = 1; c < V; c++) products[i] += own[c] * load(key + 16 * c);
        }
        const v16 sums = sums16(products) * scale;
        highest = sums > highest ? sums : highest;
        store(score + j, sums);
    }
    float lanes[16];
    store(lanes, highest);
    for (int i = 1; i < 16; i++) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    for (int64_t j = count; j % 16; j++) score[j] = -INFINITY;
    for (int64_t j = 0; j < count; j += 16) {
        const v16 share = exp16(load(score + j) - splat(lanes[0])); /* e^-87 where there is none: less than a rounding */
        total += share;
        store(score + j, share);
    }
    for (int part = 0; part < 4; part++)
        for (int c = 0; c < V; c++) mixed[part][c] = v16{};
    int64_t j = 0;
    for (; j + 4 <= committed; j += 4)
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) {
            const v16 share = splat(score[j + part]);
#pragma GCC unroll 8
            for (int c = 0; c < V; c++) mixed[part][c] += share * load(values + (j + part) * n + 16 * c);
        }
    for (; j < count; j++) {
        const v16 share = splat(score[j]);
        const float *value = values + (j < committed ? j : committed + seen[j - committed]) * n;
        for (int c = 0; c < V; c++) mixed[j % 4][c] += share * load(value + 16 * c);
    }
    const v16 whole = splat(sum16(total));
    for (int c = 0; c < V; c++) store(out + 16 * c, ((mixed[0][c] + mixed[1][c]) + (mixed[2][c] + mixed[3][c])) / whole);
}

/* By the head size n, a multiple of 16 up to 256. */
INLINE void attend(const float *query, const float *keys, const float *values, int64_t n, int64_t committed,
                   const int32_t *seen, int64_t seeing, float *score, float *out) {
#define SIZE(v) case v: return attend<v>(query, keys, values, committed, seen, seeing, score, out);
    switch (n / 16) { SIZE(1) SIZE(2) SIZE(3) SIZE(4) SIZE(5) SIZE(6) SIZE(7) SIZE(8) SIZE(12) SIZE(16) }
#undef SIZE
}

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

/* The tokens asked, in parts: those of one row, side by side, read the same keys and share what is in the cache. */
static std::vector<int64_t> in_parts(const Pass *p, const int64_t *asked, int64_t asking) {
    std::vector<int64_t> part;
    for (int64_t a = 0; a < asking; a++) {
        const int64_t t = asked ? asked[a] : a, before = a && asked ? asked[a - 1] : t - 1;
        if (!a || p->row[t] != p->row[before] || a - part.back() == SHARING) part.push_back(a);
    }
    part.push_back(asking);
    return part;
}

INLINE void embed(const Model *m, int64_t token, float *x, float) {
    memcpy(x, (const float *)m->embedding + token * m->size, m->size * sizeof(float));
}
INLINE void embed(const Model *m, int64_t token, float *x, pair) {
    const uint16_t *own = (const uint16_t *)m->embedding + token * m->size;
    for (int64_t i = 0; i < m->size; i++) {
        const uint32_t bits = (uint32_t)own[i] << 16;
        memcpy(x + i, &bits, sizeof bits);
    }
}

/* A pass over layers whose matrices are of `Weight`; nothing points outside. */
template <class Weight> static void pass(const Model *m, const Pass *p, int threads) {
    const int64_t n = p->tokens, d = m->size, s = m->head_size, q = m->heads, g = m->kv_heads;
    const int64_t width = (q + 2 * g) * s, wide = padded(width, PANEL), mix = q * s, feed = padded(m->feed, PANEL / 2);
    const int64_t per_row = g * p->positions * s, per_kind = p->rows * per_row;
    const int64_t sight = p->positions + p->extra + 16;
    const std::vector<int64_t> all = in_parts(p, 0, n), some = in_parts(p, p->asked, p->asked ? p->asking : 0);
    float *x = room(n * (2 * d + wide + mix + feed) + threads * sight), *y = x + n * d, *qkv = y + n * d, *mixed = qkv + n * wide, *h = mixed + n * mix;
    float *scores = h + n * feed;
#pragma omp parallel num_threads(threads)
    {
        float *score = scores + omp_get_thread_num() * sight, *own_x = x, *own_y = y; /* of the tokens read on */
        int64_t count = n;
        const std::vector<int64_t> *part = &all;
        const int64_t *asked = 0;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n; t++) embed(m, p->token[t], x + t * d, Weight{});
        for (int64_t l = 0; l < m->layers; l++) {
            const Layer *w = m->layer + l;
            float *keys = p->cache + l * 2 * per_kind, *values = keys + per_kind;
#pragma omp for schedule(static)
            for (int64_t t = 0; t < n; t++) unit(x + t * d, y + t * d, d, m->norm_floor, 0);
            linear<STORE>(y, d, (const Weight *)w->qkv, d, qkv, wide, width, w->qkv_bias, n);
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
            if (l == m->layers - 1 && p->asked) { /* keys and values are there: nobody reads the rest of the others */
                asked = p->asked, count = p->asking, part = &some, own_x = y, own_y = x;
#pragma omp for schedule(static)
                for (int64_t a = 0; a < count; a++) memcpy(own_x + a * d, x + asked[a] * d, d * sizeof(float));
            }
            const int64_t parts = (int64_t)part->size() - 1;
#pragma omp for collapse(2) schedule(static, 1) /* later tokens of a prompt see more: in turn */
            for (int64_t k = 0; k < parts; k++)
                for (int64_t i = 0; i < q; i++)
                    for (int64_t a = (*part)[k]; a < (*part)[k + 1]; a++) {
                    const int64_t t = asked ? asked[a] : a;
                    const int64_t from = p->row[t] * per_row + i / (q / g) * p->positions * s;
                    attend(qkv + t * wide + i * s, keys + from, values + from, s, p->committed[t],
                           p->seen + t * p->stride, p->seeing[t], score, mixed + a * mix + i * s);
                }
            linear<ADD>(mixed, mix, (const Weight *)w->output, mix, own_x, d, d, w->output_bias, count);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < count; t++) unit(own_x + t * d, own_y + t * d, d, m->norm_floor, 0);
            linear<GATE>(own_y, d, (const Weight *)w->gate_up, d, h, feed, 2 * feed, 0, count);
            linear<ADD>(h, feed, (const Weight *)w->down, m->feed, own_x, d, d, 0, count);
            for (int64_t f = 0; f < p->num_features; f++)
                if (p->feature_layers[f] == l && l < m->layers - 1) {
#pragma omp for schedule(static)
                    for (int64_t t = 0; t < n; t++) memcpy(p->features[f] + t * d, x + t * d, d * sizeof(float));
                }
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < count; t++) {
            unit(own_x + t * d, p->hidden + t * d, d, m->norm_floor, m->norm_scale);
            for (int64_t f = 0; f < p->num_features; f++)
                if (p->feature_layers[f] == m->layers - 1)
                    memcpy(p->features[f] + t * d, p->hidden + t * d, d * sizeof(float));
        }
    }
}

/* What padrec_read does, of a draft whose matrices are of `Weight`; nothing points outside. */
template <class Weight> static void read(const Draft *m, const Reading *p, int threads) {
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
        linear<ADD>(p->features, d, (const Weight *)m->feature_part, d, z, d, d, 0, n);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n; t++) {
            float *own = z + t * d;
            if (p->step) {
                const float open = p->context ? 1.0f / (1.0f + expf(-(dot(own, p->context, d) + p->gate))) : 1.0f;
                for (int64_t i = 0; i < d; i += 16) store(own + i, load(own + i) + splat(open) * load(p->step + i));
            }
            unit(own, y + t * d, d, m->norm_floor, 0);
        }
        linear<STORE>(y, d, (const Weight *)m->qkv, d, qkv, wide, 3 * mix, 0, n);
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
        linear<ADD>(mixed, mix, (const Weight *)m->output, mix, x, d, d, 0, asking);
#pragma omp for schedule(static)
        for (int64_t a = 0; a < asking; a++) unit(x + a * d, y + a * d, d, m->norm_floor, 0);
        linear<GATE>(y, d, (const Weight *)m->gate_up, d, h, feed, 2 * feed, 0, asking);
        linear<ADD>(h, feed, (const Weight *)m->down, m->feed, x, d, d, 0, asking);
#pragma omp for schedule(static)
        for (int64_t a = 0; a < asking; a++) unit(x + a * d, p->out + a * d, d, m->norm_floor, m->last_scale);
    }
}

extern "C" {

/* `hidden` [asking, size] after the last norm; the outputs [n, size] of `feature_layers`, the last layer's replaced by
 * what would be `hidden` (all must be asked then). Returns 1, having done nothing, when a number points outside the cache or a table. */
int padrec_pass(const Model *m, const Pass *p, int threads) {
    if (impossible(p, p->tokens, m->vocabulary)) return 1;
    if (p->asked && outside(p->asked, p->asking, p->tokens)) return 1;
    for (int64_t f = 0; p->asked && f < p->num_features; f++)
        if (p->feature_layers[f] == m->layers - 1) return 1;
    m->paired ? pass<pair>(m, p, threads) : pass<float>(m, p, threads);
    return 0;
}

/* Stores keys and values of all tokens; `out` [asking, size] after the last norm. Returns 1 as padrec_pass does. */
int padrec_read(const Draft *m, const Reading *p, int threads) {
    if (impossible(p, p->asking, m->vocabulary) || outside(p->asked, p->asking, p->tokens)) return 1;
    if (p->tokens) m->paired ? read<pair>(m, p, threads) : read<float>(m, p, threads);
    return 0;
}

/* y [n, out] = x [n, in] times packed w, of floats or of pairs, plus bias (may be null). */
void padrec_linear(const float *x, const void *w, const float *bias, float *y, int64_t n, int64_t in, int64_t out,
                   int64_t paired, int threads) {
#pragma omp parallel num_threads(threads)
    linear_of(paired, x, w, in, y, out, bias, n);
}
}
