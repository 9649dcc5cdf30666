"""The slow twin of every beam search: one token level a pass, one request at a time, a cache row for every beam,
legality by looking at every item.

No trie, no shared prompt, no forced level, no batch, no draft. What it returns is by definition the right answer.
"""

from itertools import pairwise

import torch

from model.decoding.beam_request import BeamRequest, BeamResult
from model.decoding.request import ScoredItem, SpeculationStats
from model.item_trie import legal_codes_by_search
from model.kv_cache import KVCache, Sight, Write
from model.semantic_id import Codes
from model.target import Target


class BeamTwin:
    """Beam search as plainly as it can be said."""

    def __init__(self, target: Target, items: list[Codes], max_history_items: int) -> None:
        self.target, self.items, self.max_history_items = target, items, max_history_items
        self.margin = float("inf")

    @torch.no_grad()
    def decode(self, request: BeamRequest, allowed: set[Codes] | None = None) -> BeamResult:
        """The `k` best items; `allowed` are the items that pass the filters (None: all). `margin` then holds the least
        distance (nats) between two scores whose order decided something: the last beam kept and the first one dropped
        of a level, or two neighbours in the answer."""
        vocabulary, self.margin = self.target.vocabulary, float("inf")
        banned = set(request.exclude) | (set(request.history) if request.exclude_history else set())
        if allowed is not None:
            banned |= set(self.items) - allowed
        used = request.history[-self.max_history_items :]
        prompt = vocabulary.prompt(used)
        cache = self.target.new_cache(request.k, len(prompt) + vocabulary.num_levels)
        logits = self._pass([prompt], 0, cache)
        beams: list[tuple[Codes, float]] = [((), 0.0)]
        for level in range(vocabulary.num_levels):
            column = int(self.target.head_columns[level])
            found: list[tuple[Codes, float, int]] = []
            for place, (codes, score) in enumerate(beams):
                legal = legal_codes_by_search(self.items, codes, banned)
                if legal:
                    log_probs = torch.log_softmax(logits[place, [column + code for code in legal]], dim=0).tolist()
                    found += [((*codes, c), score + p, place) for c, p in zip(legal, log_probs, strict=True)]
            found.sort(key=lambda beam: (-beam[1], beam[0]))
            if len(found) > request.k:
                self.margin = min(self.margin, found[request.k - 1][1] - found[request.k][1])
            found = found[: request.k]
            beams = [(codes, score) for codes, score, _ in found]
            if not found or level == vocabulary.num_levels - 1:
                break
            # Every beam goes on in a row of its own, which begins as a copy of its parent's.
            cache.data[:, :, : len(found)] = cache.data[:, :, [place for _, _, place in found]]
            tokens = [[vocabulary.level_offsets[level] + codes[-1]] for codes, _ in beams]
            logits = self._pass(tokens, len(prompt) + level, cache)
        gaps = [a[1] - b[1] for a, b in pairwise(beams)]
        self.margin = min([self.margin, *gaps])
        items = tuple(ScoredItem(codes, score) for codes, score in beams)
        return BeamResult(request.request_id, items, SpeculationStats(vocabulary.num_levels - 1), len(used))

    def _pass(self, tokens: list[list[int]], start: int, cache: KVCache) -> torch.Tensor:
        """Item logits [rows, S] after `tokens`, a row each, which go to positions start, start+1, ..."""
        rows, new = len(tokens), len(tokens[0])
        device = self.target.device
        positions = torch.arange(start, start + new, device=device).expand(rows, -1)
        at = Write(torch.arange(rows, device=device)[:, None], positions)
        committed = torch.full((rows,), start, device=device)
        sight = Sight(committed, None, start + new)
        output = self.target(torch.tensor(tokens, device=device), positions, cache, at, sight)
        return self.target.item_logits(output.hidden[:, -1])
