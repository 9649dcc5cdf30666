/* What a pass over beams and a draft's search of its own beams share: the tables, the rows, continuations and the best of
 * them. As model/decoding/beam_choice.py has it, which is the twin.
 */
#pragma once
#include "tables.h"

/* What beams look up besides (model/decoding/beam_tree.py), by node. `decisions` in depth-first order: `below` of them
 * from `first` on lie at or below a node. `nowhere` pads; where there are no `chains`, no decision is an only child. */
struct Tree {
    int64_t nowhere, chains, num_first_codes;
    const int64_t *parent, *token, *only_child, *decisions, *first, *below, *first_codes;
};

/* The rows (model/decoding/beam_rows.py): `room` nodes each, `width` beams, `exclusions` leaves, ascending and padded. */
struct Rows {
    int64_t rows, room, width, exclusions;
    int64_t *prompt, *used, *nodes, *beam;
    float *hidden, *last, *score;
    const int64_t *excluded, *filter_slot;
    const int32_t *passing;
};

struct Scored {
    float score;
    int64_t node;
};

INLINE May may_of(const Trie *t, const Rows *rows, int64_t r) {
    const int64_t *excluded = rows->excluded + r * rows->exclusions;
    const int32_t *passing = rows->filter_slot[r] ? rows->passing + rows->filter_slot[r] * t->nodes : nullptr;
    return {passing, excluded, excluded + rows->exclusions};
}

/* Adds the legal children of a beam. Of one child nothing can be said but that it comes. */
INLINE void expand(const Trie *t, const May &can, int64_t node, float score, const float *hidden, Legal *legal,
                   std::vector<Scored> *found) {
    find_legal(t, can, node, nullptr, 0, legal);
    const int64_t count = legal->child.size();
    if (count == 1) found->push_back({score, legal->child[0]});
    if (count < 2) return;
    read_logits(t, hidden, nullptr, legal);
    const float total = log_total(legal);
    for (int64_t i = 0; i < count; i++) found->push_back({legal->logit[i] - total + score, legal->child[i]});
}

/* Leaves the `wanted` best of `found`, ascending. Ties go to the lowest node. */
INLINE void keep_best(std::vector<Scored> *found, int64_t wanted) {
    const int64_t count = std::min<int64_t>(wanted, found->size());
    std::nth_element(found->begin(), found->begin() + count, found->end(), [](const Scored &x, const Scored &y) {
        return x.score > y.score || (x.score == y.score && x.node < y.node);
    });
    found->resize(count);
    std::sort(found->begin(), found->end(), [](const Scored &x, const Scored &y) { return x.node < y.node; });
}
