/* A pass over beams on a CPU as one call: which nodes it reads, the target's pass, and how far the beams walk then.
 *
 * What is answered is what model/decoding/beam_decoder.py's tensors answer (they are the twin, and search on GPUs and in
 * bf16). Rows are changed in place; what the host has to know of a row comes back as a few
 * numbers. Knows no requests.
 *
 * Words as in model/decoding: a row keeps every node it has passed over, with its hidden state, at a `place` behind its
 * prompt; a beam is settled when one item is left below it.
 */
#include "relaxed.h"

/* What is asked of a row. Its `beams` have `level` codes, `settled` if no pass was needed for that. At most `limit` new
 * nodes are read: the beams, whole sub-trees if `whole`, and `guessed` nodes, with the sub-trees below the last `deepest`
 * of them; with a `prompt` of so many tokens, that, and instead of beams all first codes if `whole`. At the levels
 * `drafted` verification is relaxed, by luck from the `seed`, with `replacement` or without. */
struct Ask {
    int64_t row, wanted, level, beams, settled, limit, whole, prompt, guessed, deepest, levels, seed, replacement;
    const int64_t *guesses;
    const Drafted *drafted;
};

/* What came of it: `read` new nodes, levels `accepted` (that saved a pass) and `forced`; the row's beams now, and nodes
 * to pass over next: `alone`, and with all `below` them; whether a level was `lossy`. */
struct Told {
    int64_t read, accepted, forced, level, beams, settled, alone, below, lossy;
};

/* All rows asked. Prompts lie one after the other, in the order of `ask`; so do their `features`, one array a layer. */
struct BeamPass {
    int64_t asks, num_features;
    const Ask *ask;
    const int64_t *prompts, *feature_layers;
    float **features;
    Told *told;
};

namespace {

/* A node and where it lies. */
struct Place {
    int64_t node, at;
    bool operator<(const Place &other) const { return node < other.node; }
};

/* A row while it is asked. `known` ascends; `path` of fresh node i ends at `path_end[i]`. */
struct Held {
    std::vector<Place> known;
    std::vector<int64_t> fresh, path_end;
    std::vector<int32_t> path;
    int64_t first_token, first_hidden; /* in the pass, and among those whose hidden states it gives */
};

struct Walker {
    const Trie *t;
    const Tree *tree;
    Rows *rows;
    const BeamPass *p;
    int64_t size; /* of a hidden state */

    static const Place *find(const std::vector<Place> &known, int64_t node) {
        const auto found = std::lower_bound(known.begin(), known.end(), Place{node, 0});
        return found == known.end() || found->node != node ? nullptr : &*found;
    }

    /* Adds all decisions at or below a node. */
    void add_below(int64_t node, std::vector<int64_t> *to) const {
        const int64_t *below = tree->decisions + tree->first[node];
        to->insert(to->end(), below, below + tree->below[node]);
    }

    /* Which nodes a row reads: each once, none known, none settled, nearest to the root first where room is short. */
    void gather(const Ask &a, Held *held) const {
        const int64_t r = a.row, used = rows->used[r], *beam = rows->beam + r * rows->width;
        const May can = may_of(t, rows, r);
        std::vector<int64_t> &fresh = held->fresh;
        for (int64_t i = 0; i < used; i++) held->known.push_back({rows->nodes[r * rows->room + i], i});
        std::sort(held->known.begin(), held->known.end());
        if (a.prompt && a.whole) fresh.assign(tree->first_codes, tree->first_codes + tree->num_first_codes);
        for (int64_t i = 0; !a.prompt && i < a.beams; i++) {
            fresh.push_back(beam[i]);
            /* Through single children to the next decision: it rides for free. */
            for (int64_t node = beam[i], up = a.level; tree->chains && up < t->levels - 1; up++)
                fresh.push_back(node = tree->only_child[node]);
            if (a.whole) add_below(beam[i], &fresh);
        }
        fresh.insert(fresh.end(), a.guesses, a.guesses + a.guessed);
        for (int64_t i = a.guessed - a.deepest; i < a.guessed; i++) add_below(a.guesses[i], &fresh);
        std::sort(fresh.begin(), fresh.end());
        fresh.erase(std::unique(fresh.begin(), fresh.end()), fresh.end());
        fresh.erase(std::remove_if(fresh.begin(), fresh.end(),
                                   [&](int64_t node) {
                                       return node == tree->nowhere || available(t, can, node) <= 1 ||
                                              find(held->known, node);
                                   }),
                    fresh.end());
        if ((int64_t)fresh.size() > a.limit) fresh.resize(std::max<int64_t>(a.limit, 0));
        const int64_t count = fresh.size(), before = held->known.size();
        for (int64_t i = 0; i < count; i++) held->known.push_back({fresh[i], used + i});
        std::inplace_merge(held->known.begin(), held->known.begin() + before, held->known.end());
        for (int64_t i = 0; i < count; i++) {
            const int64_t begin = held->path.size();
            for (int64_t node = fresh[i]; t->depth[node] > 0; node = tree->parent[node])
                if (const Place *place = find(held->known, node)) held->path.push_back(place->at);
            std::reverse(held->path.begin() + begin, held->path.end());
            held->path_end.push_back(held->path.size());
            rows->nodes[r * rows->room + used + i] = fresh[i];
        }
        rows->used[r] = used + count;
    }

    /* Of a level's continuations those that stay as beams, ascending. */
    void choose(const Ask &a, int64_t level, std::vector<Scored> *found, Told *o) const {
        for (int64_t i = 0; i < a.levels; i++) {
            if (a.drafted[i].level != level) continue;
            std::vector<int64_t> kept;
            std::vector<Scored> stay;
            o->lossy = 1;
            if (!keep_relaxed(*found, a.drafted[i], a.wanted, a.replacement, {a.seed, level}, &kept)) continue;
            std::sort(kept.begin(), kept.end());
            for (const int64_t place : kept) stay.push_back((*found)[place]);
            found->swap(stay);
            return;
        }
        keep_best(found, a.wanted);
    }

    /* Moves a row's beams down as far as hidden states are known. */
    void walk(const Ask &a, const Held &held, Told *o) const {
        static thread_local Legal legal;
        static thread_local std::vector<Scored> found;
        const int64_t r = a.row;
        const May can = may_of(t, rows, r);
        int64_t *const beam = rows->beam + r * rows->width;
        float *const score = rows->score + r * rows->width;
        for (bool on = true, first = true; on && o->level < t->levels; first = false) {
            found.clear();
            if (!o->level) expand(t, can, 0, 0, rows->last + r * size, &legal, &found);
            for (int64_t i = 0; o->level && i < o->beams; i++) {
                const Place *place = find(held.known, beam[i]);
                const float *hidden = place ? rows->hidden + (r * rows->room + place->at) * size : nullptr;
                /* Only a settled beam is not known, and nothing is asked of its hidden state. */
                expand(t, can, beam[i], score[i], hidden ? hidden : rows->last + r * size, &legal, &found);
            }
            choose(a, o->level, &found, o);
            const int64_t count = found.size();
            bool over = true, going = true, free = true;
            int64_t alone = 0, below = 0;
            for (int64_t i = 0; i < count; i++) {
                const int64_t node = found[i].node;
                const bool settled = available(t, can, node) <= 1, known = find(held.known, node);
                over &= t->run_end[node] >= t->first_leaf, going &= settled || known, free &= settled;
                alone += !settled && !known, below += settled ? 0 : tree->below[node];
            }
            for (int64_t i = 0; i < rows->width; i++) {
                const int64_t node = i < count ? found[i].node : tree->nowhere;
                /* Statically forced to the end: no need to look at the levels between. */
                beam[i] = i < count && over ? t->run_end[node] : node;
                if (i < count) score[i] = found[i].score;
            }
            /* The first level of a walk is what its pass was for; the rest it saved passes for. */
            if (o->settled) o->forced++;
            else o->accepted += !first;
            o->level++, o->beams = count, o->settled = free, o->alone = alone, o->below = below;
            if (over) o->forced += t->levels - o->level, o->level = t->levels;
            on = !over && going;
        }
    }
};

bool impossible(const Walker &s, int64_t positions) {
    for (int64_t i = 0; i < s.p->asks; i++) {
        const Ask &a = s.p->ask[i];
        if (a.row < 0 || a.row >= s.rows->rows || a.wanted < 1 || a.wanted > s.rows->width) return true;
        if (a.level < 0 || a.level > s.t->levels || a.beams < 0 || a.beams > s.rows->width) return true;
        if (a.prompt < 0 || a.prompt > positions || s.rows->filter_slot[a.row] < 0) return true;
        if (a.limit > s.rows->room - s.rows->used[a.row] || a.deepest < 0 || a.deepest > a.guessed) return true;
        for (int64_t k = 0; k < a.guessed; k++)
            if (a.guesses[k] < 0 || a.guesses[k] > s.tree->nowhere) return true;
    }
    return false;
}

} // namespace

extern "C" {

/* Reads and walks every row asked. Returns 1 when a number points outside a table or a cache; rows may have been changed
 * by then. */
int padrec_beams(const Trie *t, const Tree *tree, const Model *m, Rows *rows, const BeamPass *p, const Cache *cache,
                 int threads) {
    const Walker search = {t, tree, rows, p, m->size};
    const int64_t asks = p->asks;
    if (impossible(search, cache->positions)) return 1;
    std::vector<Held> held(asks);
    std::vector<int64_t> prompts(asks + 1);
    for (int64_t i = 0; i < asks; i++) {
        prompts[i + 1] = prompts[i] + p->ask[i].prompt;
        if (p->ask[i].prompt) rows->prompt[p->ask[i].row] = p->ask[i].prompt;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (asks > 1)
    for (int64_t i = 0; i < asks; i++) search.gather(p->ask[i], &held[i]);

    std::vector<int64_t> token, row, at, position, committed, seeing, asked;
    int64_t extra = 0;
    for (const Held &h : held)
        for (size_t j = 0; j < h.fresh.size(); j++)
            extra = std::max<int64_t>(extra, h.path_end[j] - (j ? h.path_end[j - 1] : 0));
    std::vector<int32_t> seen;
    bool whole = false; /* hidden states of all tokens are wanted */
    for (int64_t f = 0; f < p->num_features; f++) whole |= p->feature_layers[f] == m->layers - 1;
    for (int64_t i = 0; i < asks; i++) {
        const Ask &a = p->ask[i];
        Held &h = held[i];
        const int64_t base = rows->prompt[a.row], used = rows->used[a.row] - (int64_t)h.fresh.size();
        h.first_token = token.size(), h.first_hidden = asked.size();
        for (int64_t j = 0; j < a.prompt; j++) {
            token.push_back(p->prompts[prompts[i] + j]), row.push_back(a.row), at.push_back(j), position.push_back(j);
            committed.push_back(j + 1), seeing.push_back(0);
            if (whole || j + 1 == a.prompt) asked.push_back((int64_t)token.size() - 1);
        }
        seen.resize(token.size() * extra);
        for (size_t j = 0; j < h.fresh.size(); j++) {
            const int64_t begin = j ? h.path_end[j - 1] : 0, node = h.fresh[j];
            asked.push_back(token.size()), token.push_back(tree->token[node]), row.push_back(a.row), at.push_back(base + used + j);
            position.push_back(base + t->depth[node] - 1), committed.push_back(base);
            seeing.push_back(h.path_end[j] - begin);
            seen.insert(seen.end(), h.path.begin() + begin, h.path.begin() + h.path_end[j]);
            seen.resize(token.size() * extra);
        }
    }
    const int64_t n = token.size(), size = m->size;
    static thread_local std::vector<float> outputs;
    if ((int64_t)outputs.size() < (1 + p->num_features) * n * size) outputs.resize((1 + p->num_features) * n * size);
    std::vector<float *> features;
    for (int64_t f = 0; f < p->num_features; f++) features.push_back(outputs.data() + (1 + f) * n * size);
    const Pass pass = {n, cache->rows, cache->positions, cache->turns, extra, extra, p->num_features,
                       (int64_t)asked.size(), token.data(),
                       row.data(), at.data(), position.data(), committed.data(), seeing.data(), p->feature_layers,
                       whole ? nullptr : asked.data(), seen.data(), cache->rotations, cache->data, outputs.data(), features.data()};
    if (n && padrec_pass(m, &pass, threads)) return 1;
    const float *hidden = outputs.data();

#pragma omp parallel for schedule(dynamic) num_threads(threads) if (asks > 1)
    for (int64_t i = 0; i < asks; i++) {
        const Ask &a = p->ask[i];
        const Held &h = held[i];
        const int64_t count = h.fresh.size(), behind = h.first_hidden + (whole ? a.prompt : a.prompt > 0);
        const int64_t to = a.row * rows->room + rows->used[a.row] - count;
        if (a.prompt) memcpy(rows->last + a.row * size, hidden + (behind - 1) * size, size * sizeof(float));
        memcpy(rows->hidden + to * size, hidden + behind * size, count * size * sizeof(float));
        for (int64_t f = 0; f < p->num_features; f++)
            memcpy(p->features[f] + prompts[i] * size, features[f] + h.first_token * size, a.prompt * size * sizeof(float));
        p->told[i] = {count, 0, 0, a.level, a.beams, a.settled, 0, 0, 0};
        search.walk(a, h, p->told + i);
    }
    return 0;
}
}
