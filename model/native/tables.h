/* What compiled decoding shares: the item trie's tables, a row cache, and which children of a node are legal.
 *
 * As model/item_trie.py has it, which is the twin. Knows no requests.
 */
#pragma once
#include "layers.h"
#include <algorithm>

/* The tables of an item trie (model/item_trie.py), and the target's head over item tokens, of which a node's is `column`. */
struct Trie {
    int64_t items, levels, nodes, first_leaf, size;
    const int64_t *leaf_start, *first_child, *column;
    const int32_t *run_end, *item_tokens, *code;
    const int8_t *depth;
    const float *head;
};

/* A row cache of a network, and the rotations of its positions. */
struct Cache {
    int64_t rows, positions, turns;
    const float *rotations;
    float *data;
};

/* What a row may emit: counts `passing` its filter before each node (null: no filter), less the leaves `excluded` up to
 * `end`, ascending. */
struct May {
    const int32_t *passing;
    const int64_t *excluded, *end;
};

/* The legal children of a node, ascending, and their logits. */
struct Legal {
    std::vector<int64_t> child;
    std::vector<float> logit, share, columns;
    float highest;
};

/* How many leaves below `node` may be emitted. */
INLINE int64_t available(const Trie *t, const May &may, int64_t node) {
    const int64_t low = t->leaf_start[node], high = t->leaf_start[node + 1];
    const int64_t *from = std::lower_bound(may.excluded, may.end, low);
    return (may.passing ? may.passing[node + 1] - may.passing[node] : high - low) -
           (std::lower_bound(from, may.end, high) - from);
}

/* Children of `node` (of leaves: none) below which something may be emitted besides the `emitted` leaves of `path`. */
INLINE void find_legal(const Trie *t, const May &may, int64_t node, const int64_t *path, int64_t emitted, Legal *legal) {
    const int64_t first = t->first_child[node], last = t->first_child[node + 1];
    legal->child.clear();
    if (t->depth[node] >= t->levels || first >= last) return;
    const int64_t *excluded = std::lower_bound(may.excluded, may.end, t->leaf_start[first]);
    for (int64_t c = first; c < last; c++) {
        const int64_t low = t->leaf_start[c], high = t->leaf_start[c + 1];
        int64_t left = may.passing ? may.passing[c + 1] - may.passing[c] : high - low;
        for (; excluded < may.end && *excluded < high; excluded++) left--;
        for (int64_t i = 0; i < emitted; i++) left -= low <= path[i] && path[i] < high;
        if (left > 0) legal->child.push_back(c);
    }
}

/* The head's logits of `hidden`, or those `by_node`. Only the panels that hold a child's column are computed; each sums
 * as the whole head does. */
INLINE void read_logits(const Trie *t, const float *hidden, const float *by_node, Legal *legal) {
    const int64_t count = legal->child.size();
    const int64_t first = t->column[legal->child[0]] / PANEL, last = t->column[legal->child[count - 1]] / PANEL;
    if (!by_node) {
        if ((int64_t)legal->columns.size() < (last + 1 - first) * PANEL) legal->columns.resize((last + 1 - first) * PANEL);
        for (int64_t p = first; p <= last; p++)
            panel_rows<STORE, 1>(hidden, t->size, t->head + p * PANEL * t->size, t->size,
                                 legal->columns.data() + (p - first) * PANEL, 0, PANEL, 0);
    }
    legal->logit.resize(count);
    legal->highest = -INFINITY;
    for (int64_t i = 0; i < count; i++) {
        const int64_t child = legal->child[i];
        const float logit = by_node ? by_node[child] : legal->columns[t->column[child] - first * PANEL];
        legal->logit[i] = logit;
        legal->highest = logit > legal->highest ? logit : legal->highest;
    }
}

/* log(sum(exp(logits))) over the legal children. */
INLINE float log_total(Legal *legal) {
    const int64_t count = legal->child.size();
    float total = 0;
    legal->logit.resize(padded(count, 16)); /* whole vectors */
    legal->share.resize(padded(count, 16));
    for (int64_t i = 0; i < count; i += 16)
        store(legal->share.data() + i, exp16(load(legal->logit.data() + i) - splat(legal->highest)));
    for (int64_t i = 0; i < count; i++) total += legal->share[i];
    return legal->highest + logf(total);
}
