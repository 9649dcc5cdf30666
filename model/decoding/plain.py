"""The slow twin of every decoder: one token per pass, one request at a time, legality by looking at every item.

No draft, no forced runs, no trie, no batch. What it writes is by definition the right answer.
"""

import math
from collections.abc import Sequence

import torch

from model.decoding.request import ListRequest, ListResult, ScoredItem, SpeculationStats
from model.decoding.sampling import fresh_seed, gumbel
from model.item_trie import legal_codes_by_search
from model.kv_cache import KVCache, Sight, Write
from model.semantic_id import Codes
from model.target import Target


class PlainTwin:
    """List decoding, greedy and sampled, as plainly as it can be said."""

    def __init__(self, target: Target, items: list[Codes], max_history_items: int) -> None:
        self.target, self.items, self.max_history_items = target, items, max_history_items
        self.margins: list[float] = []

    @torch.no_grad()
    def decode(self, request: ListRequest, allowed: set[Codes] | None = None) -> ListResult:
        """The list for `request`; `allowed` are the items that pass its filters (None: all). `margins` then holds, for
        each code, the distance in nats between the two best legal tokens (if sampled: see `draw`), inf where there was
        no choice."""
        vocabulary, self.margins = self.target.vocabulary, []
        banned = set(request.exclude) | (set(request.history) if request.exclude_history else set())
        if allowed is not None:
            banned |= set(self.items) - allowed
        used = request.history[-self.max_history_items :]
        tokens = vocabulary.list_prompt(used)
        cache = self.target.new_cache(1, len(tokens) + request.k * vocabulary.tokens_per_item)
        logits = self._pass(tokens, 0, cache)
        length = len(tokens)
        seed = fresh_seed() if request.seed is None else request.seed
        found: list[ScoredItem] = []
        while len(found) < request.k and len(set(self.items) - banned):
            codes: Codes = ()
            score = 0.0
            for level in range(vocabulary.num_levels):
                legal = legal_codes_by_search(self.items, codes, banned)
                column = int(self.target.head_columns[level])
                log_probs = torch.log_softmax(logits[[column + c for c in legal]], dim=0)
                best = int(log_probs.argmax())
                self.margins.append(math.inf)
                if len(legal) > 1 and request.temperature > 0:
                    decision = torch.tensor(len(found) * vocabulary.num_levels + level)
                    noise = gumbel(torch.tensor(seed), decision, torch.tensor(legal)).tolist()
                    best, margin = draw(log_probs.tolist(), noise, request.temperature, request.top_p)
                    self.margins[-1] = margin
                elif len(legal) > 1:
                    first, second = log_probs.topk(2).values.tolist()
                    self.margins[-1] = first - second
                codes, score = (*codes, legal[best]), score + float(log_probs[best])
                logits = self._pass([vocabulary.level_offsets[level] + legal[best]], length, cache)
                length += 1
            logits = self._pass([vocabulary.list_separator], length, cache)
            length += 1
            found.append(ScoredItem(codes, score))
            banned.add(codes)
        return ListResult(request.request_id, tuple(found), SpeculationStats(), len(used))

    def _pass(self, tokens: list[int], start: int, cache: KVCache) -> torch.Tensor:
        """Item logits [S] after `tokens`, which go to positions start, start+1, ..."""
        length = start + len(tokens)
        positions = torch.arange(start, length)[None].to(self.target.device)
        at = Write(torch.zeros(1, 1, dtype=torch.int64), positions, 0, start)
        inputs = torch.tensor([tokens], device=self.target.device)
        committed = torch.tensor([start], device=self.target.device)
        output = self.target(inputs, positions, cache, at, Sight(committed, None, length))
        return self.target.item_logits(output.hidden[0, -1:])[0]


def draw(log_probs: Sequence[float], noise: Sequence[float], temperature: float, top_p: float) -> tuple[int, float]:
    """Place of the token drawn, and how near the draw was to another: the least of the distance to the second best
    with its noise, and, where tokens are cut, of the cut to another set of tokens (in mass, or in nats between the
    last kept and the first cut)."""
    best = max(log_probs)
    tempered = [(log_prob - best) / temperature for log_prob in log_probs]
    total = math.fsum(math.exp(t) for t in tempered)
    order = sorted(range(len(tempered)), key=lambda place: -tempered[place])
    kept, mass = order[:1], math.exp(tempered[order[0]]) / total
    margins = []
    for place in order[1:]:
        if top_p < 1:
            margins.append(abs(mass - top_p))
        if mass >= top_p and top_p < 1:
            margins.append(tempered[kept[-1]] - tempered[place])
            break
        kept.append(place)
        mass += math.exp(tempered[place]) / total
    ranked = sorted(kept, key=lambda place: (-(tempered[place] + noise[place]), place))
    if len(ranked) > 1:
        first, second = (tempered[place] + noise[place] for place in ranked[:2])
        margins.append(first - second)
    return ranked[0], min(margins, default=math.inf)
