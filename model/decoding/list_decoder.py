"""ListDecoder: writes lists for many requests at once, round by round, over fixed rows.

A round drafts a tree, verifies it in one target pass, accepts, moves the accepted keys/values into place and hands
back what each row gained. Without a draft a round is one pass over the pending run (forced runs), or over one token
(`forced=False`). Greedy rows and rows that sample share rounds. Whatever the mode and the company, a row's list is the
one `plain.PlainTwin` writes.
Knows nothing of queues, deadlines or sockets.

Shapes: B rows 0..highest in use, J steps, W width, G = 1 + J W groups, K = J + 1 decisions, Q = L + 1 tokens a run at
most, C the largest codebook, n packed tokens, d hidden size.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from model.catalog import Catalog
from model.decoding.draft_tree import (
    DraftTree,
    Packing,
    Root,
    grow,
    grow_chain,
    legal_logits,
    pack,
    pick,
    write_at,
)
from model.decoding.filters import Attributes, FilterTable
from model.decoding.request import InvalidRequest, ListRequest, ListResult, RoundStats
from model.decoding.rows import Gain, Rows, account
from model.decoding.sampling import MAX_SEED, MAX_TEMPERATURE, Sampling, noise, perturbed
from model.decoding.verify import Verdict, accept
from model.draft.draft import Draft
from model.item_trie import Children, ItemTrie, Run
from model.kv_cache import Sight, Write
from model.native.kernel import ChainRoot, NativeChoices, NativeLinear
from model.target import Target

Tensor = torch.Tensor


class Budget(NamedTuple):
    """Draft nodes of a round: `steps` choices deep, `width` nodes a step. Zero steps: no speculation."""

    steps: int
    width: int = 1


class Choice(NamedTuple):
    """The target's choice at every group, the best legal child or the one drawn: `best` [B, G] among the children,
    `node` [B, G] stepped into, `score` [B, G] its log-probability in nats, without temperature and cut."""

    best: Tensor
    node: Tensor
    score: Tensor


Record = Callable[[Sequence[int], Tensor, Tensor, Children], None]


class ListDecoder:
    """Rows of requests being decoded. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        target: Target,
        draft: Draft | None,
        trie: ItemTrie,
        catalog: Catalog | Attributes,
        *,
        num_rows: int,
        max_history_items: int,
        max_k: int,
        budget: Callable[[int], Budget],
        max_steps: int = 8,
        max_nodes: int = 16,
        forced: bool = True,
        record: Record | None = None,
    ) -> None:
        """`budget(rows in use)` decides how much a round drafts, within `max_steps` and `max_nodes`; `forced=False` is
        plain decoding, a token a pass. `record(rows, nodes [B], log_probs [B, G, C], children)` sees every choice made
        without a draft. `learn`, when set, is told of every round."""
        self.target, self.draft, self.trie, self.max_k = target, draft, trie, max_k
        self.budget, self.max_steps, self.max_nodes = budget, max_steps, max_nodes
        self.forced, self.record = forced, record
        self.learn: Callable[[RoundStats], None] | None = None
        vocabulary = target.vocabulary
        self.places = vocabulary.tokens_per_item
        prompt = len(vocabulary.list_prompt(())) + max_history_items * self.places
        positions = prompt + (max_k + 1 + max_nodes) * self.places
        target.reserve_positions(positions)
        self.cache = target.new_cache(num_rows, positions)
        self.draft_cache = draft.new_cache(num_rows, positions) if draft else None
        filters = FilterTable(catalog, trie, num_rows)
        self.choices: NativeChoices | None = None
        if isinstance(target.head, NativeLinear) and (draft is None or draft.native is not None):
            self.choices = NativeChoices(trie, target.head)
        self.rows = Rows(num_rows, trie, filters, max_history_items, max_steps + 1, target.hidden_size)

    def validate(self, request: ListRequest) -> None:
        """Raises InvalidRequest for content this decoder cannot decode."""
        if not 1 <= request.k <= self.max_k:
            raise InvalidRequest("/k", f"must lie between 1 and {self.max_k}")
        if not request.history:
            raise InvalidRequest("/history", "needs at least one item")
        for name, items in (("history", request.history), ("exclude", request.exclude)):
            if any(self.trie.leaf(codes) is None for codes in items):
                raise InvalidRequest(f"/{name}", "names an item that is not in this catalog version")
        if not 0 <= request.temperature <= MAX_TEMPERATURE:
            raise InvalidRequest("/temperature", f"must lie between 0 and {MAX_TEMPERATURE:g}")
        if not 0 < request.top_p <= 1:
            raise InvalidRequest("/top_p", "must be above 0 and at most 1")
        if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
            raise InvalidRequest("/seed", f"must lie between 0 and {MAX_SEED}")
        self.rows.filters.check(request.filters)

    def cancel(self, request_id: str) -> bool:
        """Free the row of a request; whether there was one."""
        for index in self.rows.in_use:
            if self.rows.row(index).request.request_id == request_id:
                self.rows.free(index)
                return True
        return False

    # ---- prompts ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def admit(self, requests: Sequence[ListRequest]) -> list[ListResult]:
        """Give each (validated) request a row and read its prompt. Returns the lists that are complete already."""
        assert len(requests) <= self.rows.num_free, f"{len(requests)} requests for {self.rows.num_free} free rows"
        started = time.perf_counter()
        placed = [self.rows.place(request, self.max_steps + 2) for request in requests]
        finished = [self.rows.finish(i) for i in placed if not self.rows.row(i).wanted]
        indices = [i for i in placed if self.rows.held[i] is not None]
        if indices:
            self._prefill(indices)
        for index in indices:
            row = self.rows.row(index)
            row.prefill_seconds = time.perf_counter() - started
            if row.done:
                finished.append(self.rows.finish(index))
        return finished

    def _prefill(self, indices: list[int]) -> None:
        """Read the prompts of newly placed rows in one pass and make the first choice of each."""
        device, held = self.target.device, [self.rows.row(i) for i in indices]
        prompts = [self.target.vocabulary.list_prompt(row.request.history[-row.history_used :]) for row in held]
        longest = max(map(len, prompts))
        tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)
        length = torch.tensor([len(p) for p in prompts], device=device)
        rows = torch.tensor(indices, device=device)
        positions = torch.arange(longest, device=device).expand(len(indices), -1)
        at = Write(rows[:, None], positions, indices[0], 0 if len(indices) == 1 else None)
        draft_at, at = at, self._packed(at, positions < length[:, None])
        layers = self.draft.feature_layers if self.draft else ()
        output = self.target(tokens, positions, self.cache, at, Sight(None, None, longest), layers)
        last = (length - 1)[:, None]
        feature = None
        if self.draft and self.draft_cache:
            fused = self.draft.fuse_features(output.features)
            # A token's partner is the feature before it; the first token has none.
            before = torch.cat([torch.zeros_like(fused[:, :1]), fused[:, :-1]], dim=1)
            self.draft.read(tokens, before, positions, 0, self.draft_cache, draft_at)
            feature = pick(fused, last)
        root = torch.zeros_like(last)
        children, sampling = self.trie.children(root, self.rows.may(rows)), self.rows.sampling(rows)
        nothing = root.new_empty(*root.shape, 0)
        drawn_with = noise(sampling, self.trie, root, children, nothing) if sampling else None
        choice, log_probs = self._choose(pick(output.hidden, last), children, sampling, drawn_with)
        if self.record:
            self.record(indices, root[:, 0], log_probs, children)
        run = self._step_into(root, choice.node)
        gain = Gain(run.tokens, run.length, run.leaf, feature, torch.zeros_like(length), run.node[:, 0])
        self.rows.advance(rows, length, gain)
        self._account(indices, choice.score, gain)

    # ---- rounds -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def round(self) -> tuple[list[ListResult], RoundStats]:
        """Advance every row in use by one round. Returns the lists it completed, and what it did."""
        started = time.perf_counter()
        indices = self.rows.in_use
        count = indices[-1] + 1
        budget = self._budget(indices)
        sampling = self.rows.sampling(slice(count))
        tree = self._draft_tree(count, sampling, budget)
        drafted = time.perf_counter()
        length = torch.cat([self.rows.pending_length[:count], tree.length], dim=1)
        packing = None if tree.children is None else pack(length, self.places)
        hidden, feature = self._verify(count, tree, length, packing, budget)
        nodes = torch.cat([self.rows.node[:count, None], tree.node], dim=1)
        if tree.children is None:
            assert self.choices is not None, "only the kernel leaves children to itself"
            may = self.rows.may(slice(count))
            choice = Choice(*self.choices.best(hidden, nodes, may, tree.leaf, tree.length))
        else:
            choice, log_probs = self._choose(hidden, tree.children, sampling, tree.noise)
            if self.record and not budget.steps:
                self.record(range(count), nodes[:, 0], log_probs, tree.children)
        verdict = accept(tree, choice.best, budget.steps, budget.width)
        gain = self._gain(tree, nodes, choice, verdict, feature)
        base = self._settle(count, tree, packing, verdict, gain, budget)
        self.rows.advance(torch.arange(count, device=base.device), base, gain)
        self._account(indices, choice.score.gather(1, verdict.path)[indices], _rows_of(gain, indices))
        ended = time.perf_counter()
        stats = self._book(indices, tree, verdict, int(length.sum()), (drafted - started, ended - drafted), budget)
        if self.learn:
            self.learn(stats)
        return [self.rows.finish(i) for i in indices if self.rows.row(i).done], stats

    def _budget(self, indices: list[int]) -> Budget:
        """The round's budget. Rows of a round without speculation lose touch with the draft's cache: they finish
        without it (a short list), so that a round that drafts nothing also costs nothing."""
        willing = self.draft is not None and bool((self.rows.draftable[indices] > 0).any())
        budget = self.budget(len(indices)) if willing else Budget(0)
        if not budget.steps:
            self.rows.draftable.zero_()
            return Budget(0)
        assert budget.steps <= self.max_steps and budget.steps * budget.width <= self.max_nodes, budget
        return budget

    def _draft_tree(self, count: int, sampling: Sampling | None, budget: Budget) -> DraftTree:
        rows = self.rows
        position = rows.base[:count] + rows.pending_length[:count, 0]
        node, remaining, may = rows.node[:count], rows.draftable[:count], rows.may(slice(count))
        if self.choices is not None and sampling is None and self.record is None and budget.width == 1:
            fresh = (rows.fresh_tokens[:count], rows.fresh_length[:count], rows.fresh_feature[:count])
            start = ChainRoot(node, position, remaining, *fresh)
            return grow_chain(self.choices, self.draft, may, self.draft_cache, start, budget.steps)
        root = Root(rows.fresh_feature[:count, 0], node, position, remaining, sampling)
        if budget.steps and self.draft and self.draft_cache:
            root = root._replace(feature=self._read_fresh(count, position))
        return grow(self.draft, self.target, self.trie, may, self.draft_cache, root, *budget)

    def _read_fresh(self, count: int, position: Tensor) -> Tensor:
        """Draft step 0: read the runs gained since the last draft, with the target's features; [B, d] at the last."""
        assert self.draft and self.draft_cache
        rows = self.rows
        packing = pack(rows.fresh_length[:count], self.places)
        tokens = rows.fresh_tokens[:count].flatten(1).gather(1, packing.source)
        feature = pick(rows.fresh_feature[:count], packing.source // self.places)
        order = torch.arange(packing.source.shape[1], device=position.device)
        stored = (position - packing.total)[:, None] + order
        last = (packing.total - 1).clamp(min=0)[:, None]
        reach = self.draft_cache.num_positions if position.is_cuda else int(position.max())
        at, sight = write_at(stored), Sight(position, None, reach)
        return self.draft.ask(tokens, feature, stored, 0, self.draft_cache, at, last, sight)[:, 0]

    def _verify(
        self, count: int, tree: DraftTree, length: Tensor, packing: Packing | None, budget: Budget
    ) -> tuple[Tensor, Tensor | None]:
        """The target's pass over pending run and tree, runs of `length` [B, G]: hidden states and fused features
        [B, G, d] at group ends. Without a `packing` the kernel takes the runs as they are."""
        rows, base = self.rows, self.rows.base[:count]
        tokens = torch.cat([rows.pending_tokens[:count], tree.tokens], dim=1)
        layers = self.draft.feature_layers if self.draft else ()
        if packing is None:
            output = self.target.runs(tokens, length, base, self.cache, layers)
            return output.hidden, self.draft.fuse_features(output.features) if self.draft else None
        tokens = tokens.flatten(1).gather(1, packing.source)
        group, place = packing.source // self.places, packing.source % self.places
        positions = torch.cat([base[:, None], tree.start], dim=1).gather(1, group) + place
        width = packing.source.shape[1]
        own = None
        if budget.width > 1:
            order = torch.ones(width, width, dtype=torch.bool, device=base.device).tril()
            own = order & pick(tree.sees, group).gather(2, group.unsqueeze(1).expand(-1, width, -1))
        stored = base[:, None] + torch.arange(width, device=base.device)
        reach = self.cache.num_positions if base.is_cuda else int(base.max()) + width
        at = self._packed(write_at(stored), packing.valid)
        output = self.target(tokens, positions, self.cache, at, Sight(base, own, reach), layers)
        if self.draft is None:
            return pick(output.hidden, packing.end), None
        feature = self.draft.fuse_features(tuple(pick(f, packing.end) for f in output.features))
        return pick(output.hidden, packing.end), feature

    @staticmethod
    def _packed(at: Write, valid: Tensor) -> Write:
        """Leave the padding of rows of different lengths out of the target's pass: on a CPU every token costs. On a
        GPU shapes stay what they are."""
        return at if at.start is not None or valid.is_cuda else at.without(~valid)

    def _choose(
        self, hidden: Tensor, children: Children, sampling: Sampling | None, drawn_with: Tensor | None
    ) -> tuple[Choice, Tensor]:
        """The choice, and the log-probabilities [B, G, C] it was made from. Ties go to the lowest token: children
        ascend by code and `max` names the first. A token without an alternative scores exactly 0."""
        log_probs = torch.log_softmax(legal_logits(self.target, self.trie, hidden, children), dim=-1)
        wanted = log_probs if sampling is None or drawn_with is None else perturbed(log_probs, drawn_with, sampling)
        best = wanted.max(-1).indices.unsqueeze(-1)
        node, score = children.nodes.gather(-1, best).squeeze(-1), log_probs.gather(-1, best).squeeze(-1)
        # Where nothing is legal (a finished row, a leaf in plain decoding) everything is NaN, and nothing is scored.
        return Choice(best.squeeze(-1), node, score.nan_to_num(0.0)), log_probs

    def _step_into(self, nodes: Tensor, chosen: Tensor) -> Run:
        """The run that starts with each choice; without forced runs, a token alone, the separator one of its own."""
        if self.forced:
            return self.trie.run(chosen)
        at_leaf = self.trie.depth[nodes] == self.trie.num_levels
        run = self.trie.run(torch.where(at_leaf, nodes, chosen), forced=False)
        return Run(
            run.tokens.masked_fill(at_leaf.unsqueeze(-1), self.target.vocabulary.list_separator),
            run.length.masked_fill(at_leaf, 1),
            run.node.masked_fill(at_leaf, 0),
            run.leaf.masked_fill(at_leaf, self.trie.num_items),
        )

    def _gain(self, tree: DraftTree, nodes: Tensor, choice: Choice, verdict: Verdict, feature: Tensor | None) -> Gain:
        """Accepted runs, then the run of the target's own choice after them."""
        current = verdict.path[:, -1:]
        bonus = self._step_into(nodes.gather(1, current), choice.node.gather(1, current))
        steps = torch.arange(verdict.path.shape[1], device=current.device)
        last = verdict.accepted[:, None]
        following = torch.cat([verdict.path[:, 1:] - 1, current], dim=1)
        index = torch.where(steps < last, following, tree.length.shape[1]).clamp_(min=0)
        # An idle row has no pending run, and gains nothing.
        kept = (steps <= last) & (self.rows.pending_length[: len(last)] > 0)
        length = torch.cat([tree.length, bonus.length], dim=1).gather(1, index) * kept
        leaf = torch.cat([tree.leaf, bonus.leaf], dim=1).gather(1, index)
        return Gain(
            pick(torch.cat([tree.tokens, bonus.tokens], dim=1), index),
            length,
            torch.where(kept, leaf, self.trie.num_items),
            None if feature is None else pick(feature, verdict.path),
            verdict.accepted,
            bonus.node[:, 0],
        )

    def _settle(
        self, count: int, tree: DraftTree, packing: Packing | None, verdict: Verdict, gain: Gain, budget: Budget
    ) -> Tensor:
        """Move accepted keys/values into place; the target's cache then holds [B] tokens a row."""
        base, pending = self.rows.base[:count], self.rows.pending_length[:count, 0]
        grown = pending + gain.length.sum(1) - gain.length.gather(1, gain.last[:, None])[:, 0]
        if packing is not None and budget.width > 1:  # a chain's accepted tokens are in place already
            group = packing.source // self.places
            on_path = (group.unsqueeze(-1) == verdict.path.unsqueeze(1)).any(-1) & packing.valid
            picked = (~on_path).long().argsort(dim=1, stable=True)
            self.cache.keep(base, picked if base.is_cuda else picked[:, : int(grown.max())])
        return base + grown

    # ---- host -------------------------------------------------------------------------------------------------

    def _account(self, indices: Sequence[int], scores: Tensor, gain: Gain) -> None:
        decisions = (gain.last + 1).tolist()
        told = zip(indices, decisions, scores.tolist(), gain.leaf.tolist(), gain.length.tolist(), strict=True)
        for index, taken, score, leaf, length in told:
            account(self.rows.row(index), score[:taken], leaf[:taken], length[:taken], self.trie.num_items)

    def _book(
        self,
        indices: list[int],
        tree: DraftTree,
        verdict: Verdict,
        target_tokens: int,
        seconds: tuple[float, float],
        budget: Budget,
    ) -> RoundStats:
        """Count the round, per row and in all. On the host: there is little to count, and many ways to count it."""
        lengths, slots, paths = tree.length.tolist(), tree.slot.tolist(), verdict.path.tolist()
        kept, pending = verdict.accepted.tolist(), self.rows.pending_length[:, 0].tolist()
        drafted_by_step, accepted_by_step = [0] * budget.steps, [0] * budget.steps
        drafted_by_slot, accepted_by_slot = [0] * self.trie.num_levels, [0] * self.trie.num_levels
        for index in indices:
            row, accepted = self.rows.row(index), kept[index]
            drafted = [node for node, length in enumerate(lengths[index]) if length]
            for node in drafted:
                drafted_by_step[node // budget.width] += 1
                drafted_by_slot[slots[index][node]] += 1
            for step, group in enumerate(paths[index][1 : 1 + accepted]):
                accepted_by_step[step] += 1
                accepted_by_slot[slots[index][group - 1]] += 1
            row.rounds += 1
            row.draft_tokens += len(drafted)
            row.accepted_tokens += accepted
            row.decode_seconds += sum(seconds)
        return RoundStats(
            rows=len(indices),
            draft_seconds=seconds[0],
            verify_seconds=seconds[1],
            target_tokens=target_tokens,
            draft_tokens=sum(drafted_by_step),
            accepted_tokens=sum(accepted_by_step),
            forced_tokens=sum(max(0, pending[index] - 1) for index in indices),
            drafted_by_step=tuple(drafted_by_step),
            accepted_by_step=tuple(accepted_by_step),
            drafted_by_slot=tuple(drafted_by_slot),
            accepted_by_slot=tuple(accepted_by_slot),
        )


def _rows_of(gain: Gain, indices: list[int]) -> Gain:
    return gain._replace(last=gain.last[indices], leaf=gain.leaf[indices], length=gain.length[indices])
