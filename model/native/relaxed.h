/* Which continuations of a level a relaxed request draws and keeps: AtSpeed-R, as model/decoding/beam_relaxed.py has it,
 * which is the twin and says what is computed. Places are those among the continuations of a level, ascending by node.
 */
#pragma once
#include "beams.h"
#include "noise.h"

/* What was drafted for a row at a level: all `count` continuations, ascending, with their joint scores, and the nodes
 * drawn, in order. */
struct Drafted {
    int64_t level, count;
    const int64_t *nodes;
    const float *joint;
    int64_t draws;
    const int64_t *drawn;
};

enum Use { DRAW, VERDICT, RESIDUAL, REST };

struct Luck {
    int64_t seed, level;
    double of(Use use, int64_t number) const { return uniform(seed, level * 4 + use, number); }
};

INLINE void softmax(std::vector<double> *log_probs) {
    double highest = -INFINITY, total = 0;
    for (const double x : *log_probs) highest = std::max(highest, x);
    for (double &x : *log_probs) total += x = exp(x - highest);
    for (double &x : *log_probs) x /= total;
}

/* Adds a place drawn from `weights` for each of `count` numbers. */
INLINE void draw_independent(const std::vector<double> &weights, int64_t count, Use use, const Luck &luck,
                             std::vector<int64_t> *drawn) {
    std::vector<double> below;
    double total = 0;
    for (const double weight : weights) below.push_back(total += weight);
    for (int64_t i = 0; i < count; i++)
        drawn->push_back(std::upper_bound(below.begin(), below.end(), luck.of(use, i) * total) - below.begin());
}

/* Adds at most `count` places drawn from `weights` without replacement, in the order they are drawn. */
INLINE void draw_ordered(const std::vector<double> &weights, const std::vector<Scored> &of, int64_t count, Use use,
                         const Luck &luck, std::vector<int64_t> *drawn) {
    std::vector<std::pair<double, int64_t>> clocks;
    if (count <= 0) return;
    for (size_t i = 0; i < weights.size(); i++)
        if (weights[i] > 0) clocks.push_back({-log(luck.of(use, of[i].node)) / weights[i], i});
    count = std::min<int64_t>(count, clocks.size());
    std::partial_sort(clocks.begin(), clocks.begin() + count, clocks.end());
    for (int64_t i = 0; i < count; i++) drawn->push_back(clocks[i].second);
}

/* The places that a draft draws of its continuations. */
INLINE void draw(const std::vector<Scored> &found, int64_t count, bool replacement, const Luck &luck,
                 std::vector<int64_t> *drawn) {
    std::vector<double> shares;
    for (const Scored &one : found) shares.push_back(one.score);
    softmax(&shares);
    if (replacement) draw_independent(shares, count, DRAW, luck, drawn);
    else draw_ordered(shares, found, count, DRAW, luck, drawn);
}

/* The places kept of the target's continuations, at most `width` distinct ones. False: none of them was drafted. */
INLINE bool keep_relaxed(const std::vector<Scored> &found, const Drafted &drafted, int64_t width, bool replacement,
                         const Luck &luck, std::vector<int64_t> *kept) {
    std::vector<double> p, q, residual;
    bool any = false;
    for (const Scored &one : found) {
        const int64_t at = std::lower_bound(drafted.nodes, drafted.nodes + drafted.count, one.node) - drafted.nodes;
        const bool there = at < drafted.count && drafted.nodes[at] == one.node;
        p.push_back(one.score), q.push_back(there ? drafted.joint[at] : -INFINITY);
        any |= there;
    }
    if (!any) return false;
    softmax(&p), softmax(&q);
    int64_t possible = 0;
    for (size_t i = 0; i < p.size(); i++) residual.push_back(std::max(p[i] - q[i], 0.0)), possible += p[i] > 0;
    width = std::min(width, possible);
    std::vector<int64_t> drawn;
    for (int64_t i = 0; i < drafted.draws; i++) {
        const auto at = std::lower_bound(found.begin(), found.end(), drafted.drawn[i],
                                         [](const Scored &one, int64_t node) { return one.node < node; });
        if (at != found.end() && at->node == drafted.drawn[i]) drawn.push_back(at - found.begin());
    }
    const auto without = [&](std::vector<double> weights) {
        for (const int64_t i : *kept) weights[i] = 0;
        return weights;
    };
    std::vector<int64_t> instead = drawn;
    if (replacement && std::any_of(residual.begin(), residual.end(), [](double weight) { return weight > 0; }))
        instead.clear(), draw_independent(residual, drawn.size(), RESIDUAL, luck, &instead);
    for (size_t i = 0; i < drawn.size(); i++) {
        const bool accepted = luck.of(VERDICT, i) * q[drawn[i]] < p[drawn[i]];
        const int64_t place = accepted ? drawn[i] : instead[i];
        if (replacement ? (int64_t)kept->size() == width : !accepted) continue;
        if (std::find(kept->begin(), kept->end(), place) == kept->end()) kept->push_back(place);
    }
    if ((int64_t)kept->size() >= width) {
        std::stable_sort(kept->begin(), kept->end(), [&](int64_t a, int64_t b) { return p[a] > p[b]; });
        kept->resize(width);
        return true;
    }
    if (!replacement) draw_ordered(without(residual), found, width - kept->size(), RESIDUAL, luck, kept);
    draw_ordered(without(p), found, width - kept->size(), REST, luck, kept);
    return true;
}
