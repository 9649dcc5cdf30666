/* A round of list decoding on a CPU as one call: draft a tree, verify it in one pass, accept, and move the rows on.
 *
 * What is written is what model/decoding's tensors write (they are the twin, and run rounds on GPUs and in bf16). Rows
 * are changed in place; what the host has to know of a round comes back as a few small arrays. Knows no requests.
 *
 * Words as in model/decoding: a node of the draft tree is one choice and the forced run behind it; group 0 of a row is its
 * pending run, group 1 + j * width + i is node i of draft step j.
 */
#include "noise.h"
#include "tables.h"
#include <chrono>

/* The rows being decoded (model/decoding/rows.py), `rows` of them. `excluded` [rows, width] ascends and is padded with
 * `items`; `fresh_*` hold `gains` runs a row. `passing` [., nodes]: counts of filters (slot 0: no filter). */
struct State {
    int64_t rows, gains, width;
    int64_t *base, *node, *remaining, *draftable, *written, *pending_tokens, *pending_length, *fresh_tokens, *fresh_length,
        *excluded;
    float *fresh_feature;
    const int64_t *filter_slot, *seed;
    const double *temperature, *top_p;
    const int32_t *passing;
};

/* What a round is to do. Node i of step j of a row that begins at slot s hangs on node `parent[s, j, i]` of the step
 * before and is its child of rank `rank[s, j, i]` (-1: there is none). Draft step j adds `step[j]` (see Reading); `fuse`
 * is the draft's map from the target's features, packed. A draft that is no network guesses by the logits `by_node` of the
 * trie's nodes. Without `forced`, a token a round. */
struct Plan {
    int64_t steps, width, forced, num_features;
    const int32_t *parent, *rank;
    const int64_t *feature_layers;
    const float *const *step;
    const float *const *context;
    const float *gate;
    const void *fuse;
    const float *by_node;
};

/* A prompt to read, or a piece of one: so many `tokens` of a row that has read `start` before. Where the prompt `ends`, the first
 * choice is made. With a `feature` [size] the draft reads along: it is that of the token before (at the start: none), and
 * then that of the last one; `draftable` items may be drafted then. */
struct Prompt {
    int64_t row, start, tokens, ends, draftable;
    float *feature;
};

/* Prompts, their tokens one behind the other. */
struct Prompts {
    int64_t count;
    const Prompt *prompt;
    const int64_t *token;
};

/* What was done. Per row: `accepted` nodes, and of each decision (accepted + 1 of steps + 1) the run's `length`, the
 * `leaf` it completed (items: none) and its `score` in nats; `drafted` nodes. In all: nodes by step and by slot, and how
 * often rows that began at a slot came to a step of their tree and passed it, [levels, steps]. */
struct Report {
    int64_t *accepted, *length, *leaf, *drafted;
    float *score;
    int64_t *drafted_by_step, *accepted_by_step, *drafted_by_slot, *accepted_by_slot, *tried, *passed;
    int64_t target_tokens;
    double draft_seconds, verify_seconds;
};

namespace {

const int MOST_RANKS = 8;

struct Run {
    int64_t place, length, leaf, end; /* place among the trie's item tokens */
};

/* Node or pending run of a row. `first` is where its tokens begin among the row's new ones. */
struct Group {
    int64_t above, child, slot, start, first, remaining, items_on_path;
    Run run;
};

struct Choice {
    int64_t child[MOST_RANKS];
    int64_t found;
    float score;
};

Run run_of(const Trie *t, int64_t child, bool forced) {
    const int64_t end = forced ? t->run_end[child] : child, leaf = t->leaf_start[end], depth = t->depth[child];
    const bool done = end >= t->first_leaf;
    return {leaf * (t->levels + 1) + depth - 1, t->depth[end] - depth + 1 + (forced && done), done ? leaf : t->items,
            forced && done ? 0 : end};
}

/* Standard Gumbel noise, as model/decoding/sampling.py makes it. */
double gumbel(uint64_t seed, uint64_t decision, uint64_t code) { return -log(-log(uniform(seed, decision, code))); }

/* Room for one choice. */
struct Wanted {
    Legal legal;
    std::vector<double> wanted;
    std::vector<int64_t> order;
};

/* Keeps the smallest set of most likely ones whose mass reaches `top_p`; the others become -inf. Ties go to the first. */
void cut(Wanted *choice, double top_p) {
    std::vector<double> &wanted = choice->wanted;
    std::vector<int64_t> &order = choice->order;
    double total = 0, before = 0;
    order.resize(wanted.size());
    for (size_t i = 0; i < wanted.size(); i++) order[i] = i, total += exp(wanted[i]);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return wanted[a] > wanted[b]; });
    for (const int64_t i : order) {
        const double share = exp(wanted[i]) / total;
        if (before >= top_p) wanted[i] = -INFINITY;
        before += share;
    }
}

/* The `ranks` best legal children of `node` for a row that has emitted the leaves of `path` besides what it may not emit:
 * by the head's logits of `hidden` (or those `by_node`), or where the row draws by what it draws. Ties go to the lowest
 * token. */
void choose(const Trie *t, const State *s, int64_t row, int64_t node, const float *hidden, const float *by_node,
            const int64_t *path, int64_t emitted, int ranks, bool scored, Choice *chosen) {
    static thread_local Wanted choice;
    Legal &legal = choice.legal;
    std::vector<double> &wanted = choice.wanted;
    const int64_t *excluded = s->excluded + row * s->width;
    const int32_t *passing = s->filter_slot[row] ? s->passing + s->filter_slot[row] * t->nodes : nullptr;
    chosen->found = 0, chosen->score = 0;
    find_legal(t, {passing, excluded, excluded + s->width}, node, path, emitted, &legal);
    const int64_t count = legal.child.size();
    if (!count) return;
    read_logits(t, hidden, by_node, &legal);
    const double temperature = s->temperature[row];
    wanted.resize(count);
    for (int64_t i = 0; i < count; i++)
        wanted[i] = temperature > 0 ? ((double)legal.logit[i] - (double)legal.highest) / temperature : legal.logit[i];
    if (temperature > 0) {
        if (s->top_p[row] < 1) cut(&choice, s->top_p[row]);
        const int64_t decision = (s->written[row] + emitted) * t->levels + t->depth[node];
        for (int64_t i = 0; i < count; i++) wanted[i] += gumbel(s->seed[row], decision, t->code[legal.child[i]]);
    }
    int64_t place[MOST_RANKS];
    for (int64_t i = 0; i < count; i++) {
        if (wanted[i] == -INFINITY) continue;
        int64_t at = chosen->found;
        if (at == ranks && wanted[i] <= wanted[place[ranks - 1]]) continue;
        if (at < ranks) chosen->found++;
        else at = ranks - 1;
        for (; at > 0 && wanted[i] > wanted[place[at - 1]]; at--) place[at] = place[at - 1];
        place[at] = i;
    }
    for (int64_t i = 0; i < chosen->found; i++) chosen->child[i] = legal.child[place[i]];
    if (scored && count > 1) chosen->score = legal.logit[place[0]] - log_total(&legal);
}

/* Tokens of one pass or reading, and what each sees behind what its row has committed. */
struct Tokens {
    std::vector<int64_t> token, row, at, position, committed, seeing, asked;
    std::vector<int32_t> seen;
    std::vector<float> features;
    int64_t extra = 0;

    void clear() {
        token.clear(), row.clear(), at.clear(), position.clear(), committed.clear(), seeing.clear(), asked.clear();
        seen.clear(), features.clear();
    }
    void add(int64_t row_, int64_t token_, int64_t at_, int64_t position_) {
        row.push_back(row_), token.push_back(token_), at.push_back(at_), position.push_back(position_);
    }
    void see(int64_t before, const std::vector<int32_t> &behind) {
        committed.push_back(before), seeing.push_back(behind.size());
        seen.insert(seen.end(), behind.begin(), behind.end());
        seen.resize(committed.size() * extra);
    }
};

struct Round {
    const Trie *t;
    const Model *m;
    const Draft *draft;
    State *s;
    const Plan *p;
    Report *out;
    int threads;
    int64_t places, nodes, groups;
    std::vector<Group> group; /* [rows, groups] */

    Group *of(int64_t row) { return group.data() + row * groups; }

    /* Leaves completed on the way to a group, itself included. */
    int64_t path(const Group *g, int64_t at, int64_t *leaves) const {
        int64_t count = 0;
        for (; at > 0; at = g[at].above)
            if (g[at].run.leaf < t->items) leaves[count++] = g[at].run.leaf;
        return count;
    }

    /* Places among the row's new tokens of a group's run and all runs on the way to it, in order. */
    void behind(const Group *g, int64_t at, std::vector<int32_t> *seen) const {
        seen->clear();
        for (;; at = g[at].above) {
            for (int64_t c = g[at].run.length; c-- > 0;) seen->push_back(g[at].first + c);
            if (!at) break;
        }
        std::reverse(seen->begin(), seen->end());
    }

    /* Reads what was added, at draft step j; outputs go to `feature` at `to`. */
    int read(Tokens *tokens, const Cache *cache, int64_t j, float *feature, const std::vector<int64_t> &to) {
        const int64_t asking = tokens->asked.size(), d = draft->size;
        std::vector<float> into(asking * d);
        const Reading reading = {(int64_t)tokens->token.size(), asking, cache->rows, cache->positions, cache->turns,
                                 tokens->extra, tokens->extra, tokens->token.data(), tokens->row.data(),
                                 tokens->at.data(), tokens->position.data(), tokens->asked.data(),
                                 tokens->committed.data(), tokens->seeing.data(), tokens->seen.data(),
                                 tokens->features.data(), cache->rotations, p->step[j], p->context[j], p->gate[j],
                                 cache->data, into.data()};
        if (padrec_read(draft, &reading, threads)) return 1;
        for (int64_t a = 0; a < asking; a++) memcpy(feature + to[a] * d, into.data() + a * d, d * sizeof(float));
        tokens->clear();
        return 0;
    }

    /* Draft step j: the nodes of a row whose parents have their outputs. */
    void guess(int64_t b, int64_t j, const float *feature) {
        Group *g = of(b);
        const int64_t slot = t->depth[s->node[b]], begin = 1 + j * p->width;
        const int32_t *parent = p->parent + (slot * p->steps + j) * p->width;
        const int32_t *rank = p->rank + (slot * p->steps + j) * p->width;
        std::vector<int64_t> leaves(groups);
        for (int64_t i = 0; i < p->width; i++) {
            if (rank[i] < 0 || g[begin + i].run.length) continue;
            const int64_t above = j ? begin - p->width + parent[i] : 0;
            if (g[above].remaining <= 0 || (above && !g[above].run.length)) continue;
            int ranks = 0;
            for (int64_t k = i; k < p->width; k++)
                if (rank[k] >= ranks && (!j || parent[k] == parent[i])) ranks = rank[k] + 1;
            Choice best;
            const int64_t node = above ? g[above].run.end : s->node[b];
            const float *own = draft ? feature + (b * groups + above) * draft->size : nullptr;
            choose(t, s, b, node, own, p->by_node, leaves.data(), path(g, above, leaves.data()), ranks, false, &best);
            for (int64_t k = i; k < p->width; k++) {
                if (rank[k] < 0 || (j && parent[k] != parent[i]) || rank[k] >= best.found) continue;
                const Run run = run_of(t, best.child[rank[k]], true);
                const bool done = run.leaf < t->items;
                g[begin + k] = {above, best.child[rank[k]], t->depth[node], g[above].start + g[above].run.length, 0,
                                g[above].remaining - done, 0, run};
            }
        }
    }

    int grow(const Cache *cache) {
        if (!draft) { /* nothing to read */
            for (int64_t j = 0; j < p->steps; j++)
                for (int64_t b = 0; b < s->rows; b++) guess(b, j, nullptr);
            return 0;
        }
        const int64_t d = draft->size;
        std::vector<float> feature(s->rows * groups * d);
        std::vector<int64_t> written(s->rows), to;
        std::vector<int32_t> seen;
        Tokens tokens;
        for (int64_t b = 0; b < s->rows; b++) {
            const int64_t *length = s->fresh_length + b * s->gains, position = s->base[b] + s->pending_length[b];
            int64_t at = position;
            for (int64_t i = 0; i < s->gains; i++) at -= length[i];
            if (s->draftable[b] <= 0 || at == position) continue;
            for (int64_t i = 0; i < s->gains; i++)
                for (int64_t c = 0; c < length[i]; c++, at++) {
                    const float *own = s->fresh_feature + (b * s->gains + i) * d;
                    tokens.add(b, s->fresh_tokens[(b * s->gains + i) * places + c], at, at);
                    tokens.features.insert(tokens.features.end(), own, own + d);
                }
            tokens.asked.push_back((int64_t)tokens.token.size() - 1);
            tokens.see(position, seen);
            to.push_back(b * groups);
        }
        if (read(&tokens, cache, 0, feature.data(), to)) return 1;
        tokens.extra = nodes * places;
        for (int64_t j = 0; j < p->steps; j++) {
#pragma omp parallel for schedule(static) num_threads(threads) if (s->rows > 8)
            for (int64_t b = 0; b < s->rows; b++) guess(b, j, feature.data());
            if (j + 1 == p->steps) break;
            to.clear();
            for (int64_t b = 0; b < s->rows; b++) {
                Group *g = of(b);
                const int64_t begin = 1 + j * p->width, position = s->base[b] + s->pending_length[b];
                const int64_t next = (t->depth[s->node[b]] * p->steps + j + 1) * p->width;
                for (int64_t i = 0; i < p->width; i++) {
                    Group *own = g + begin + i;
                    bool wanted = false;
                    for (int64_t k = 0; k < p->width; k++) wanted |= p->rank[next + k] >= 0 && p->parent[next + k] == i;
                    if (!own->run.length || own->remaining <= 0 || !wanted) continue;
                    own->first = written[b];
                    for (int64_t c = 0; c < own->run.length; c++) { /* all share the feature that chose the run */
                        const float *from = feature.data() + (b * groups + own->above) * d;
                        tokens.add(b, t->item_tokens[own->run.place + c], position + written[b]++, own->start + c);
                        tokens.features.insert(tokens.features.end(), from, from + d);
                    }
                    seen.clear();
                    for (int64_t at = begin + i; at > 0; at = g[at].above)
                        for (int64_t c = g[at].run.length; c-- > 0;) seen.push_back(g[at].first + c);
                    std::reverse(seen.begin(), seen.end());
                    tokens.asked.push_back((int64_t)tokens.token.size() - 1);
                    tokens.see(position, seen);
                    to.push_back(b * groups + begin + i);
                }
            }
            if (read(&tokens, cache, j + 1, feature.data(), to)) return 1;
        }
        return 0;
    }

    /* A pass over pending runs and trees: which token ends each group, `ends` (-1: there is none). */
    int verify(const Cache *cache, std::vector<float> *hidden, std::vector<float *> *features,
               std::vector<int64_t> *ends) {
        Tokens tokens;
        tokens.extra = groups * places;
        std::vector<int32_t> seen;
        ends->assign(s->rows * groups, -1);
        for (int64_t b = 0; b < s->rows; b++) {
            Group *g = of(b);
            int64_t written = 0;
            if (!s->pending_length[b]) continue;
            for (int64_t k = 0; k < groups; k++) {
                const int64_t length = g[k].run.length;
                if (!length) continue;
                g[k].first = written;
                behind(g, k, &seen);
                const int64_t before = (int64_t)seen.size() - length;
                for (int64_t c = 0; c < length; c++) {
                    const int64_t token = k ? t->item_tokens[g[k].run.place + c] : s->pending_tokens[b * places + c];
                    tokens.add(b, token, s->base[b] + written++, g[k].start + c);
                    tokens.see(s->base[b], seen);
                    tokens.seeing.back() = before + c + 1;
                }
                (*ends)[b * groups + k] = (int64_t)tokens.token.size() - 1;
            }
        }
        const int64_t n = tokens.token.size(), size = n * m->size;
        hidden->resize((1 + p->num_features) * size);
        for (int64_t f = 0; f < p->num_features; f++) features->push_back(hidden->data() + (1 + f) * size);
        out->target_tokens = n;
        const Pass pass = {n, cache->rows, cache->positions, cache->turns, tokens.extra, tokens.extra, p->num_features,
                           n, tokens.token.data(), tokens.row.data(), tokens.at.data(), tokens.position.data(),
                           tokens.committed.data(), tokens.seeing.data(), p->feature_layers, nullptr, tokens.seen.data(),
                           cache->rotations, cache->data, hidden->data(), features->data()};
        return padrec_pass(m, &pass, threads);
    }

    /* Moves the keys and values of the row's tokens `kept` (places among the new ones, ascending) side by side. */
    void settle(int64_t b, const Cache *cache, const std::vector<int32_t> &kept) {
        const int64_t size = m->head_size, per_head = cache->positions * size, from = s->base[b] * size;
        for (size_t i = 0; i < kept.size(); i++) {
            if (kept[i] == (int64_t)i) continue;
            for (int64_t l = 0; l < m->layers * 2; l++)
                for (int64_t h = 0; h < m->kv_heads; h++) {
                    float *head = cache->data + ((l * cache->rows + b) * m->kv_heads + h) * per_head + from;
                    memcpy(head + i * size, head + kept[i] * size, size * sizeof(float));
                }
        }
    }

    /* The run that begins with a choice; without forced runs the separator is a token of its own. */
    Run step_into(int64_t node, const Choice *choice) const {
        if (!p->forced && t->depth[node] == t->levels) return {t->levels, 1, t->items, 0};
        return run_of(t, choice->child[0], p->forced);
    }

    /* Walks down from the pending run as long as the target's choice was drafted, and moves the row on. */
    void accept(int64_t b, const Cache *cache, const std::vector<Choice> &chosen, const std::vector<float *> &features,
                const std::vector<int64_t> &ends) {
        Group *g = of(b);
        const int64_t slot = t->depth[s->node[b]], decisions = p->steps + 1;
        const Choice *best = chosen.data() + b * groups;
        std::vector<int64_t> way = {0};
        for (int64_t j = 0; j < p->steps; j++) {
            int64_t any = 0, next = 0;
            for (int64_t i = 1 + j * p->width; i < 1 + (j + 1) * p->width; i++) {
                if (!g[i].run.length) continue;
                any++;
                if (!next && g[i].above == way.back() && best[way.back()].found && g[i].child == best[way.back()].child[0])
                    next = i;
            }
            if (any && (int64_t)way.size() == j + 1) out->tried[slot * p->steps + j]++;
            if (!next || (int64_t)way.size() <= j) continue;
            out->passed[slot * p->steps + j]++, out->accepted_by_step[j]++, out->accepted_by_slot[g[next].slot]++;
            way.push_back(next);
        }
        for (int64_t i = 1; i < groups; i++)
            if (g[i].run.length)
                out->drafted[b]++, out->drafted_by_step[(i - 1) / p->width]++, out->drafted_by_slot[g[i].slot]++;
        const int64_t accepted = (int64_t)way.size() - 1, last = way.back();
        const Run bonus = step_into(last ? g[last].run.end : s->node[b], best + last);
        if (p->width > 1) {
            std::vector<int32_t> kept;
            behind(g, last, &kept);
            settle(b, cache, kept);
        }
        out->accepted[b] = accepted;
        int64_t emitted = 0;
        for (int64_t i = 0; i <= accepted; i++) {
            const Run run = i < accepted ? g[way[i + 1]].run : bonus;
            const int64_t at = b * decisions + i;
            out->length[at] = run.length, out->leaf[at] = run.leaf, out->score[at] = best[way[i]].score;
            s->base[b] += g[way[i]].run.length;
            emitted += emit(b, run);
            if (!draft || s->draftable[b] <= 0) continue;
            float *feature = hand_over(b, i, run);
            std::vector<float> all;
            for (const float *f : features) {
                const float *own = f + ends[b * groups + way[i]] * m->size;
                all.insert(all.end(), own, own + m->size);
            }
            row_of(draft->paired, all.data(), p->fuse, all.size(), feature, draft->size);
        }
        go_on(b, bonus, accepted + 1, emitted);
    }

    /* What a run completes is not emitted again; whether it completes anything. */
    bool emit(int64_t b, const Run &run) const {
        if (run.leaf >= t->items) return false;
        int64_t *const excluded = s->excluded + b * s->width, *const end = excluded + s->width;
        int64_t *place = std::lower_bound(excluded, end, run.leaf);
        if (place < end) std::copy_backward(place, end - 1, end), *place = run.leaf;
        return true;
    }

    /* Run i that the draft has yet to read; where the feature it was chosen from goes. */
    float *hand_over(int64_t b, int64_t i, const Run &run) const {
        const int64_t to = b * s->gains + i;
        s->fresh_length[to] = run.length;
        for (int64_t c = 0; c < places; c++) s->fresh_tokens[to * places + c] = token(run, c);
        return s->fresh_feature + to * draft->size;
    }

    /* The row has `gained` runs, the last of which is pending, and `emitted` items. */
    void go_on(int64_t b, const Run &pending, int64_t gained, int64_t emitted) const {
        for (int64_t i = gained; i < s->gains; i++) s->fresh_length[b * s->gains + i] = 0;
        s->node[b] = pending.end;
        for (int64_t c = 0; c < places; c++) s->pending_tokens[b * places + c] = token(pending, c);
        s->pending_length[b] = pending.length;
        s->written[b] += emitted;
        s->remaining[b] = std::max<int64_t>(s->remaining[b] - emitted, 0);
        s->draftable[b] = std::min(s->draftable[b], s->remaining[b]);
    }

    /* The target's pass over prompts: its hidden states, those of the prompts' ends alone where no feature is the last
     * layer's (prompt i's is number `last[i]`), and its features where the draft reads along. */
    int read_prompts(const Prompts *prompts, const Cache *cache, bool drafting, std::vector<float> *hidden,
                     std::vector<float *> *features, std::vector<int64_t> *last) {
        Tokens tokens;
        bool whole = false;
        const int64_t *own = prompts->token, num_features = drafting ? p->num_features : 0;
        for (int64_t f = 0; f < num_features; f++) whole |= p->feature_layers[f] == m->layers - 1;
        for (int64_t i = 0; i < prompts->count; i++) {
            const Prompt &one = prompts->prompt[i];
            for (int64_t j = 0; j < one.tokens; j++) {
                tokens.add(one.row, *own++, one.start + j, one.start + j);
                tokens.see(one.start + j + 1, {});
            }
            if (one.ends) tokens.asked.push_back((int64_t)tokens.token.size() - 1);
            last->push_back(whole ? (int64_t)tokens.token.size() - 1 : (int64_t)tokens.asked.size() - 1);
        }
        const int64_t n = tokens.token.size(), size = n * m->size, asking = whole ? n : (int64_t)tokens.asked.size();
        tokens.asked.reserve(1); /* nobody may be asked, which is not everybody */
        hidden->resize((1 + num_features) * size);
        for (int64_t f = 0; f < num_features; f++) features->push_back(hidden->data() + (1 + f) * size);
        out->target_tokens = n;
        const Pass pass = {n, cache->rows, cache->positions, cache->turns, 0, 0, num_features, asking,
                           tokens.token.data(), tokens.row.data(), tokens.at.data(), tokens.position.data(),
                           tokens.committed.data(), tokens.seeing.data(), p->feature_layers,
                           whole ? nullptr : tokens.asked.data(), tokens.seen.data(), cache->rotations, cache->data,
                           hidden->data(), features->data()};
        return padrec_pass(m, &pass, threads);
    }

    /* Lets the draft read the prompts it reads along: each token with the feature of the one before. */
    int draft_prompts(const Prompts *prompts, const Cache *cache, const std::vector<float *> &features) {
        const int64_t d = draft->size, wide = p->num_features * m->size;
        std::vector<float> all, fused;
        Tokens tokens;
        int64_t first = 0;
        for (int64_t i = 0; i < prompts->count; first += prompts->prompt[i++].tokens) {
            const Prompt &one = prompts->prompt[i];
            for (int64_t j = 0; one.feature && j < one.tokens; j++) {
                tokens.add(one.row, prompts->token[first + j], one.start + j, one.start + j);
                for (const float *f : features)
                    all.insert(all.end(), f + (first + j) * m->size, f + (first + j + 1) * m->size);
            }
        }
        const int64_t n = tokens.token.size();
        fused.resize(n * d);
#pragma omp parallel num_threads(threads)
        linear_of(draft->paired, all.data(), p->fuse, wide, fused.data(), d, nullptr, n);
        tokens.features.resize(n * d);
        for (int64_t i = 0, at = 0; i < prompts->count; i++) {
            const Prompt &one = prompts->prompt[i];
            if (!one.feature || !one.tokens) continue;
            if (one.start) memcpy(tokens.features.data() + at * d, one.feature, d * sizeof(float));
            memcpy(tokens.features.data() + (at + 1) * d, fused.data() + at * d, (one.tokens - 1) * d * sizeof(float));
            at += one.tokens;
            memcpy(one.feature, fused.data() + (at - 1) * d, d * sizeof(float));
        }
        return read(&tokens, cache, 0, nullptr, {});
    }

    /* The first choice of a row whose prompt ends. */
    void begin(int64_t i, const Prompt &one, const float *hidden) {
        const int64_t b = one.row;
        Choice choice;
        choose(t, s, b, 0, hidden, nullptr, nullptr, 0, 1, true, &choice);
        out->leaf[i] = t->items;
        if (!choice.found) return;
        const Run run = step_into(0, &choice);
        out->length[i] = run.length, out->leaf[i] = run.leaf, out->score[i] = choice.score;
        s->draftable[b] = one.draftable;
        const bool drafting = one.feature && one.draftable > 0;
        if (drafting) memcpy(hand_over(b, 0, run), one.feature, draft->size * sizeof(float));
        go_on(b, run, drafting, emit(b, run));
    }

    int64_t token(const Run &run, int64_t c) const {
        return c < run.length ? t->item_tokens[run.place + c] : 0;
    }
};

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

} // namespace

extern "C" {

/* Advances every row with a pending run by one round; `draft` may be null where plan.steps is 0 or plan.by_node is not. Returns 1 when a number
 * points outside a table or a cache; rows may have been changed by then. */
int padrec_round(const Trie *t, const Model *m, const Draft *draft, State *s, const Plan *p, const Cache *target_cache,
                 const Cache *draft_cache, Report *out, int threads) {
    Round round = {t, m, draft, s, p, out, threads, t->levels + 1, p->steps * p->width, 1 + p->steps * p->width, {}};
    if (p->steps && !draft && !p->by_node) return 1;
    const int64_t groups = round.groups, slots = t->levels * p->steps * p->width;
    for (int64_t b = 0; b < s->rows; b++)
        if (s->node[b] < 0 || s->node[b] >= t->nodes - 1 || s->pending_length[b] > round.places || s->filter_slot[b] < 0)
            return 1;
    for (int64_t i = 0; i < slots; i++)
        if (p->rank[i] >= MOST_RANKS || p->parent[i] < 0 || p->parent[i] >= p->width) return 1;
    round.group.assign(s->rows * groups, Group{});
    for (int64_t b = 0; b < s->rows; b++)
        round.of(b)[0] = {0, 0, 0, s->base[b], 0, s->draftable[b], 0, {0, s->pending_length[b], t->items, s->node[b]}};
    const double started = now();
    if (p->steps && round.grow(draft_cache)) return 1;
    const double drafted = now();
    std::vector<float> hidden;
    std::vector<float *> features;
    std::vector<int64_t> ends;
    if (round.verify(target_cache, &hidden, &features, &ends)) return 1;
    std::vector<Choice> chosen(s->rows * groups);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (s->rows * groups > 8)
    for (int64_t i = 0; i < s->rows * groups; i++) {
        if (ends[i] < 0) continue;
        const Group *g = round.of(i / groups);
        std::vector<int64_t> leaves(groups);
        const int64_t at = i % groups, emitted = round.path(g, at, leaves.data());
        choose(t, s, i / groups, g[at].run.end, hidden.data() + ends[i] * m->size, nullptr, leaves.data(), emitted, 1,
               true, &chosen[i]);
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (s->rows > 16 && !p->steps)
    for (int64_t b = 0; b < s->rows; b++)
        if (s->pending_length[b]) round.accept(b, target_cache, chosen, features, ends);
    out->draft_seconds = drafted - started, out->verify_seconds = now() - drafted;
    return 0;
}

/* Reads prompts, and makes the first choice of those that end: `out` has one decision of each. The plan is for one step.
 * Returns 1 as padrec_round does. */
int padrec_prompts(const Trie *t, const Model *m, const Draft *draft, State *s, const Plan *p, const Cache *target_cache,
                   const Cache *draft_cache, const Prompts *prompts, Report *out, int threads) {
    Round round = {t, m, draft, s, p, out, threads, t->levels + 1, 0, 1, {}};
    bool drafting = false;
    for (int64_t i = 0; i < prompts->count; i++) {
        const Prompt &one = prompts->prompt[i];
        if (one.row < 0 || one.row >= s->rows || one.tokens < 1 || one.start < 0 || s->filter_slot[one.row] < 0) return 1;
        if (one.feature && !draft) return 1;
        drafting |= one.feature != nullptr;
    }
    std::vector<float> hidden;
    std::vector<float *> features;
    std::vector<int64_t> last;
    if (round.read_prompts(prompts, target_cache, drafting, &hidden, &features, &last)) return 1;
    if (drafting && round.draft_prompts(prompts, draft_cache, features)) return 1;
    for (int64_t i = 0; i < prompts->count; i++) {
        const Prompt &one = prompts->prompt[i];
        s->base[one.row] = one.start + one.tokens; /* what an idle row's padding is written behind */
        s->draftable[one.row] = 0;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (prompts->count > 4)
    for (int64_t i = 0; i < prompts->count; i++)
        if (prompts->prompt[i].ends) round.begin(i, prompts->prompt[i], hidden.data() + last[i] * m->size);
    return 0;
}
}
