/* A draft's search of beams of its own on a CPU as one call: level by level, all rows at once.
 *
 * What is drafted is what model/decoding/beam_draft.py's tensors draft (they are the twin, and search on GPUs and in bf16).
 * Nothing of a row is changed; the draft's cache holds nothing between two searches. Knows no requests.
 */
#include "relaxed.h"

/* A row to search for: from the so many `beams` it has, with a `prompt` of so many tokens; `width` beams are kept a level, the best or,
 * of a `relaxed` row, those drawn by luck from the `seed`, with `replacement` or without. */
struct SearchAsk {
    int64_t row, width, beams, prompt, relaxed, replacement, seed;
};

/* All rows asked, `levels` levels from `level` on (0: from the root, which is one beam). Prompts lie one after the other, in
 * the order of `ask`; `features` [asks, num_features] points at the target's layers over each prompt. `step`,
 * `context`, `gate`: what the draft's step of a level adds (see Reading); `fuse` is its map from the target's features, packed.
 *
 * What comes of it, for each row and level [asks, levels]: how many nodes it `draws` (`drawn` [asks, levels * most], level
 * after level), and of relaxed rows all `count` continuations, `nodes` and `joint` scores [asks, levels, room]. */
struct SearchPass {
    int64_t asks, levels, level, most, room, num_features;
    const SearchAsk *ask;
    const int64_t *prompts;
    const float *const *features, *const *step, *const *context, *gate, *fuse;
    int64_t *draws, *drawn, *count, *nodes;
    float *joint;
};

namespace {

/* A row while it is searched for: `beams` ascending, their `path` behind the prompt and what chose each, `hidden` [beams,
 * size]; how many places behind the prompt are `used`, where the beams begin among those `asked` in a pass, nodes `drawn`. */
struct Front {
    std::vector<Scored> beams;
    std::vector<std::vector<int32_t>> path;
    int64_t used = 0, asked = 0, drawn = 0;
    std::vector<float> hidden;
};

struct Searcher {
    const Trie *t;
    const Tree *tree;
    const Draft *draft; /* or: */
    const Model *model;
    const Rows *rows;
    const SearchPass *p;
    const Cache *cache;
    int threads;
    int64_t size;

    /* The draft's own features of all prompts, one behind the other. */
    void fuse(const std::vector<int64_t> &begins, std::vector<float> *fused) const {
        const int64_t n = begins.back(), wide = p->num_features * size;
        std::vector<float> all(n * wide);
        fused->resize(n * size);
        for (int64_t i = 0; i < p->asks; i++)
            for (int64_t f = 0; f < p->num_features; f++)
                for (int64_t j = 0; j < p->ask[i].prompt; j++)
                    memcpy(all.data() + (begins[i] + j) * wide + f * size, p->features[i * p->num_features + f] + j * size,
                           size * sizeof(float));
#pragma omp parallel num_threads(threads)
        linear_of(draft->paired, all.data(), p->fuse, wide, fused->data(), size, nullptr, n);
    }

    /* Of a level's continuations those drawn and those to go on from. */
    void choose(int64_t i, int64_t l, std::vector<Scored> *found, Front *front) const {
        const SearchAsk &a = p->ask[i];
        int64_t *const drawn = p->drawn + i * p->levels * p->most;
        const int64_t at = i * p->levels + l;
        p->count[at] = a.relaxed ? found->size() : 0;
        if (!a.relaxed || found->empty() || p->count[at] > p->room) {
            keep_best(found, a.width);
            p->draws[at] = found->size();
            for (const Scored &one : *found) drawn[front->drawn++] = one.node;
            return;
        }
        for (size_t k = 0; k < found->size(); k++)
            p->nodes[at * p->room + k] = (*found)[k].node, p->joint[at * p->room + k] = (*found)[k].score;
        std::vector<int64_t> places;
        std::vector<Scored> stay;
        draw(*found, a.width, a.replacement, {a.seed, p->level + l}, &places);
        p->draws[at] = places.size();
        for (const int64_t place : places) drawn[front->drawn++] = (*found)[place].node;
        std::sort(places.begin(), places.end());
        places.erase(std::unique(places.begin(), places.end()), places.end());
        for (const int64_t place : places) stay.push_back((*found)[place]);
        found->swap(stay);
    }

    /* Moves a row down a level by the outputs of its beams. */
    void step(int64_t i, int64_t l, const float *out, Front *front) const {
        static thread_local Legal legal;
        static thread_local std::vector<Scored> found;
        const May can = may_of(t, rows, p->ask[i].row);
        std::vector<Scored> &beams = front->beams;
        found.clear();
        for (size_t w = 0; w < beams.size(); w++)
            expand(t, can, beams[w].node, beams[w].score, out + (front->asked + w) * size, &legal, &found);
        choose(i, l, &found, front);
        std::vector<std::vector<int32_t>> path;
        front->hidden.resize(found.size() * size);
        for (size_t k = 0; k < found.size(); k++) {
            const int64_t above = tree->parent[found[k].node];
            const int64_t w = std::lower_bound(beams.begin(), beams.end(), above,
                                               [](const Scored &one, int64_t node) { return one.node < node; }) -
                              beams.begin();
            path.push_back(front->path[w]);
            memcpy(front->hidden.data() + k * size, out + (front->asked + w) * size, size * sizeof(float));
        }
        beams = found, front->path.swap(path);
    }

    int run() const {
        std::vector<Front> fronts(p->asks);
        std::vector<int64_t> begins(p->asks + 1), token, row, at, position, committed, seeing, asked;
        std::vector<int32_t> seen;
        std::vector<float> fused, feature, out;
        for (int64_t i = 0; i < p->asks; i++) {
            const int64_t beams = p->level ? p->ask[i].beams : 1, from = p->ask[i].row * rows->width;
            begins[i + 1] = begins[i] + p->ask[i].prompt;
            fronts[i].path.resize(beams);
            if (!p->level) fronts[i].beams.push_back({0, 0});
            for (int64_t w = 0; p->level && w < beams; w++)
                fronts[i].beams.push_back({rows->score[from + w], rows->beam[from + w]});
        }
        if (draft) fuse(begins, &fused);
        for (int64_t i = 0; i < p->asks && draft; i++)
            for (size_t w = 0; w < fronts[i].beams.size(); w++) {
                const float *last = fused.data() + (begins[i + 1] - 1) * size;
                fronts[i].hidden.insert(fronts[i].hidden.end(), last, last + size);
            }
        for (int64_t l = 0; l < p->levels; l++) {
            token.clear(), row.clear(), at.clear(), position.clear(), committed.clear(), seeing.clear(), asked.clear();
            seen.clear(), feature.clear();
            const int64_t extra = l + 1, deep = p->level + l;
            /* A pass is told what every token sees, a reading what those see of which an output is asked. */
            const auto see = [&](int64_t before, const std::vector<int32_t> &behind) {
                committed.push_back(before), seeing.push_back(behind.size());
                seen.insert(seen.end(), behind.begin(), behind.end());
                seen.resize(committed.size() * extra);
            };
            for (int64_t i = 0; i < p->asks; i++) {
                Front &front = fronts[i];
                const int64_t prompt = p->ask[i].prompt, r = p->ask[i].row;
                front.asked = asked.size();
                for (int64_t j = 0; !l && j < prompt; j++) {
                    token.push_back(p->prompts[begins[i] + j]), row.push_back(r), at.push_back(j), position.push_back(j);
                    if (model) see(j + 1, {});
                    if (!draft) continue;
                    feature.resize(token.size() * size); /* that of the token before; the first has none */
                    if (j) memcpy(&feature[(token.size() - 1) * size], &fused[(begins[i] + j - 1) * size], size * sizeof(float));
                }
                if (!deep) { /* the root's output is that of the prompt's last token */
                    asked.push_back((int64_t)token.size() - 1);
                    continue;
                }
                for (size_t w = 0; w < front.beams.size(); w++) {
                    asked.push_back(token.size());
                    token.push_back(tree->token[front.beams[w].node]), row.push_back(r);
                    at.push_back(prompt + front.used), position.push_back(prompt + deep - 1);
                    front.path[w].push_back(front.used++);
                    see(prompt, front.path[w]);
                }
                feature.insert(feature.end(), front.hidden.begin(), front.hidden.end());
            }
            const int64_t n = token.size(), asking = asked.size();
            out.resize(asking * size);
            if (draft && n) {
                const Reading reading = {n, asking, cache->rows, cache->positions, cache->turns, extra, extra, token.data(),
                                         row.data(), at.data(), position.data(), asked.data(), committed.data(),
                                         seeing.data(), seen.data(), feature.data(), cache->rotations, p->step[l],
                                         p->context[l], p->gate[l], cache->data, out.data()};
                if (padrec_read(draft, &reading, threads)) return 1;
            } else if (n) {
                const Pass pass = {n, cache->rows, cache->positions, cache->turns, extra, extra, 0, asking, token.data(),
                                   row.data(), at.data(), position.data(), committed.data(), seeing.data(), nullptr,
                                   asked.data(), seen.data(), cache->rotations, cache->data, out.data(), nullptr};
                if (padrec_pass(model, &pass, threads)) return 1;
            }
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (p->asks > 1)
            for (int64_t i = 0; i < p->asks; i++) step(i, l, out.data(), &fronts[i]);
        }
        for (int64_t i = 0; i < p->asks * p->levels; i++)
            if (p->count[i] > p->room) return 1;
        return 0;
    }

    bool impossible() const {
        for (int64_t i = 0; i < p->asks; i++) {
            const SearchAsk &a = p->ask[i];
            if (a.row < 0 || a.row >= rows->rows || rows->filter_slot[a.row] < 0 || a.width < 1 || a.width > p->most) return true;
            if (a.prompt < 1 || a.prompt > cache->positions || a.beams < 0 || a.beams > rows->width) return true;
            for (int64_t w = 0; p->level && w < a.beams; w++) {
                const int64_t node = rows->beam[a.row * rows->width + w];
                if (node < 0 || node > tree->nowhere || t->depth[node] != p->level) return true;
            }
        }
        return p->level < 0 || p->levels < 1 || p->level + p->levels > t->levels;
    }
};

} // namespace

extern "C" {

/* Searches for every row asked, with the `draft` or, where there is none, the `model`. Returns 1 when a number points
 * outside a table or the cache. */
int padrec_search(const Trie *t, const Tree *tree, const Draft *draft, const Model *model, const Rows *rows,
                  const SearchPass *p, const Cache *cache, int threads) {
    const Searcher searcher = {t, tree, draft, model, rows, p, cache, threads, draft ? draft->size : model->size};
    return searcher.impossible() || searcher.run();
}
}
