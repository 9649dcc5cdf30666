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
from itertools import accumulate
from typing import NamedTuple

import torch

from model.catalog import Catalog
from model.decoding.draft_tree import (
    DraftTree,
    Packing,
    Root,
    grow,
    legal_logits,
    pack,
    pick,
    write_at,
)
from model.decoding.filters import Attributes, FilterTable, Stock
from model.decoding.request import InvalidRequest, ListRequest, ListResult, RoundStats
from model.decoding.rows import Gain, Row, Rows, account
from model.decoding.sampling import MAX_TEMPERATURE, Sampling, noise, perturbed
from model.decoding.static_rounds import MAX_EXCLUDED, StaticRounds, rounded_positions
from model.decoding.topology import Budget, Budgets, table_of
from model.decoding.verify import Verdict, accept
from model.draft.draft import Draft
from model.item_trie import Children, ItemTrie, Run
from model.kv_cache import Sight, Write
from model.native.kernel import NativeLinear
from model.native.round import NativeRound, Prompt, RoundCounts, RowGain, TreeTable
from model.target import Target

Tensor = torch.Tensor


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
        budget: Budgets,
        max_steps: int = 8,
        max_nodes: int = 32,
        forced: bool = True,
        record: Record | None = None,
        static: bool | None = None,
        graphs: bool = True,
        prefill_tokens: int | None = None,
    ) -> None:
        """`budget` decides how much is drafted, within `max_steps` and `max_nodes` a round; `forced=False` is
        plain decoding, a token a pass. Between two rounds at most `prefill_tokens` of prompts are read (None: all; of a
        device's static shapes always all). `record(rows, nodes [B], log_probs [B, G, C], children)` sees every choice
        made without a draft. With `static` shapes rounds and prompts are device programs (see
        `static_rounds`): the rule on a CUDA device, except where choices are recorded, and as CUDA graphs unless
        `graphs` is off; on a CPU they are possible, and no faster."""
        self.target, self.draft, self.trie, self.max_k = target, draft, trie, max_k
        self.budget, self.max_steps, self.max_nodes = budget, max_steps, max_nodes
        self.forced, self.record = forced, record
        vocabulary = target.vocabulary
        self.places = vocabulary.tokens_per_item
        prompt = len(vocabulary.list_prompt(())) + max_history_items * self.places
        positions = prompt + (max_k + 1 + max_nodes) * self.places
        is_static = target.device.type == "cuda" and record is None if static is None else static
        assert not (is_static and record), "a device program records nothing"
        positions = rounded_positions(positions) if is_static else positions
        target.reserve_positions(positions)
        self.cache = target.new_cache(num_rows + is_static, positions)
        self.draft_cache = draft.new_cache(num_rows + is_static, positions) if draft else None
        filters = FilterTable(catalog, trie, num_rows, static=is_static)
        max_excluded = min(trie.num_items, MAX_EXCLUDED) + max_k + max_steps + 2 if is_static else None
        self.rows = Rows(num_rows, trie, filters, max_history_items, max_steps + 1, target.hidden_size, max_excluded)
        self.static = StaticRounds(self, graphs=graphs) if is_static else None

        self.native = None if is_static else self._native()
        self.prefill_tokens = prefill_tokens
        self._unread: list[tuple[int, Row]] = []
        self._has_read = False
        self._prompts_read = 0  # since the last round

    def freeze(self) -> None:
        """End of warm-up, nothing running: make every device program that may be asked for, and no other ever after.
        Nothing to do where shapes are not static."""
        if self.static:
            self.static.freeze()

    def _native(self) -> NativeRound | None:
        """The compiled round, where it can be had for both networks."""
        target, draft, by_node = self.target, None, None
        if target.native is None or not isinstance(target.head, NativeLinear):
            return None
        if self.draft is not None and self.draft_cache is not None:
            by_node = self.draft.by_node
            if self.draft.native is not None:
                network = (self.draft.native, self.draft_cache, self.draft.rotations)
                draft = (*network, self.draft.terms, self.draft.packed_fuse, self.draft.feature_layers)
            elif by_node is None:
                return None
        return NativeRound(self.trie, target.head, target.native, (self.cache, target.rotations), draft, by_node)

    def validate(self, request: ListRequest) -> None:
        """Raises InvalidRequest for content this decoder cannot decode."""
        if not 1 <= request.k <= self.max_k:
            raise InvalidRequest("/k", f"must lie between 1 and {self.max_k}")
        self.rows.check_items(request)
        if self.static and len({*request.history, *request.exclude}) > MAX_EXCLUDED:
            raise InvalidRequest("/exclude", f"with the history more than {MAX_EXCLUDED} items")
        if not 0 <= request.temperature <= MAX_TEMPERATURE:
            raise InvalidRequest("/temperature", f"must lie between 0 and {MAX_TEMPERATURE:g}")
        if not 0 < request.top_p <= 1:
            raise InvalidRequest("/top_p", "must be above 0 and at most 1")
        self.rows.check_lot(request)

    def set_stock(self, stock: Stock | None) -> None:
        """What requests that get a row from now on may be given; None: everything."""
        self.rows.filters.set_stock(stock)

    def cancel(self, request_id: str) -> bool:
        """Free the row of a request; whether there was one."""
        return self.rows.cancel(request_id)

    # ---- prompts ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def admit(self, requests: Sequence[ListRequest]) -> list[ListResult]:
        """Give each (validated) request a row and read prompts, as many tokens as `prefill_tokens` allows between two
        rounds; the rest is read before the rounds that follow. Returns the lists that are complete already."""
        assert len(requests) <= self.rows.num_free, f"{len(requests)} requests for {self.rows.num_free} free rows"
        placed = [self.rows.place(request, self.max_steps + 2) for request in requests]
        finished = [self.rows.finish(i) for i in placed if not self.rows.row(i).wanted]
        for index in placed:
            row = self.rows.held[index]
            if row is not None:
                row.unread = self.target.vocabulary.list_prompt(row.request.history[-row.history_used :])
                self._unread.append((index, row))
                if not self.static:
                    self.rows.draftable[index] = 0  # nothing is drafted behind a prompt that is not read
                    if row.drafts and self.draft is not None:
                        row.drafts = self.budget.drafts(len(self.rows.in_use), row.wanted)
        self._has_read = True
        return finished + self._read_prompts()

    def _read_prompts(self) -> list[ListResult]:
        """Read a share of the prompts that wait, first come first served. Returns the lists completed by that."""
        # Who was cancelled has left the row, and maybe another one has it.
        self._unread = [(i, row) for i, row in self._unread if self.rows.held[i] is row]
        if not self._unread:
            return []
        started, whole = time.perf_counter(), self.prefill_tokens is None or self.static is not None
        share = sum(len(row.unread) for _, row in self._unread) if whole else (self.prefill_tokens or 1)
        index, first = self._unread[0]
        if first.position or len(first.unread) > share:  # a piece of a long one, or what is left of it
            read, size = [index], min(share, len(first.unread))
        else:
            ends = accumulate(len(row.unread) for _, row in self._unread)
            fitting = [i for (i, row), end in zip(self._unread, ends, strict=True) if end <= share and not row.position]
            read, size = fitting, max(len(self.rows.row(i).unread) for i in fitting)
        rows = [self.rows.row(i) for i in read]
        self._prompts_read += len(read)
        self._prefill(read, size)
        self._unread = [(i, row) for i, row in self._unread if row.unread]
        for row in rows:
            row.prefill_seconds += time.perf_counter() - started
        return [self.rows.finish(i) for i, row in zip(read, rows, strict=True) if row.done and not row.unread]

    def _prefill(self, indices: list[int], size: int) -> None:
        """Read prompts up to `size` tokens of each in one pass (of several rows: whole ones), and make the first choice
        of the rows whose prompt ends here."""
        device, held = self.target.device, [self.rows.row(i) for i in indices]
        if self.static:
            told = self.static.prefill(indices)
            for row in held:
                row.unread = []
            gain = told.gain
            self._account_first(indices, told.scores.tolist(), gain.leaf.tolist(), gain.length.tolist())
            return
        # A draft that is no network reads nothing, and a round in tensors wants to be told what it has not read.
        if self.native is not None and self.record is None and (self.draft is None or self.native.drafts):
            self._read_natively(self.native, indices, size)
            return
        pieces, start = [row.unread[:size] for row in held], held[0].position
        longest = max(map(len, pieces))
        tokens = torch.tensor([p + [0] * (longest - len(p)) for p in pieces], device=device)
        length = torch.tensor([len(p) for p in pieces], device=device)
        rows = torch.tensor(indices, device=device)
        positions = start + torch.arange(longest, device=device).expand(len(indices), -1)
        at = Write(rows[:, None], positions, indices[0], start if len(indices) == 1 else None)
        at = self._packed(at, positions < start + length[:, None])
        drafting = [place for place, row in enumerate(held) if row.drafts] if self.draft and self.draft_cache else []
        layers = self.draft.feature_layers if self.draft and drafting else ()
        sight = Sight(torch.tensor([start], device=device) if start else None, None, start + longest)
        output = self.target(tokens, positions, self.cache, at, sight, layers, length - 1)
        feature = self._read_for_draft(drafting, rows, tokens, length, start, output.features, held[0].feature)
        for row, piece in zip(held, pieces, strict=True):
            row.unread, row.position, row.feature = row.unread[len(piece) :], start + len(piece), feature
        self.rows.base[rows] = start + length  # what an idle row's padding is written behind
        if held[0].unread:
            self.rows.draftable[rows] = 0
            return
        for row, index in zip(held, indices, strict=True):
            row.feature = None
            self.rows.draftable[index] = row.wanted if row.drafts else 0
        length = length + start
        root = torch.zeros_like(rows)[:, None]
        children, sampling = self.trie.children(root, self.rows.may(rows)), self.rows.sampling(rows)
        nothing = root.new_empty(*root.shape, 0)
        drawn_with = noise(sampling, self.trie, root, children, nothing) if sampling else None
        choice, log_probs = self._choose(output.hidden, children, sampling, drawn_with)
        if self.record:
            self.record(indices, root[:, 0], log_probs, children)
        run = self._step_into(root, choice.node)
        gain = Gain(run.tokens, run.length, run.leaf, feature, torch.zeros_like(length), run.node[:, 0])
        self.rows.advance(rows, length, gain)
        self._account_first(indices, choice.score.tolist(), gain.leaf.tolist(), gain.length.tolist())

    def _read_natively(self, native: NativeRound, indices: list[int], size: int) -> None:
        """`_prefill` as one call."""
        prompts = []
        for index in indices:
            row = self.rows.row(index)
            piece, ends = row.unread[:size], len(row.unread) <= size
            if row.drafts and row.feature is None and self.draft is not None:
                row.feature = torch.empty(1, 1, self.target.hidden_size)
            draftable = row.wanted if row.drafts and self.draft is not None else 0
            prompts.append(Prompt(index, row.position, piece, ends, draftable, row.feature))
            row.unread, row.position = row.unread[len(piece) :], row.position + len(piece)
        table = table_of(Budget(1), self.trie.num_levels, self.trie.device)
        assert table is not None, "a chain has one"
        firsts = native.read(prompts, self.rows.state(), table, self.forced)
        for index, first in zip(indices, firsts, strict=True):
            if not self.rows.row(index).unread:
                self.rows.row(index).feature = None
                self._account_first([index], [[first.score]], [[first.leaf]], [[first.length]])

    def _read_for_draft(
        self,
        drafting: list[int],
        rows: Tensor,
        tokens: Tensor,
        length: Tensor,
        start: int,
        features: tuple[Tensor, ...],
        first: Tensor | None,
    ) -> Tensor | None:
        """Let the draft read `tokens` [B, P] of `length` [B] behind `start`, of those among the `rows` that are
        `drafting` alone. A token's partner is the feature before it, that of the first token `first` (None: a prompt
        begins). Returns the features [B, 1, d] at the ends: those of other rows are nothing."""
        if self.draft is None or self.draft_cache is None or not drafting:
            return None
        some = torch.tensor(drafting, device=rows.device)
        fused = self.draft.fuse_features(tuple(feature[some] for feature in features))
        before = torch.cat([torch.zeros_like(fused[:, :1]) if first is None else first, fused[:, :-1]], dim=1)
        positions = start + torch.arange(tokens.shape[1], device=rows.device).expand(len(some), -1)
        single = len(rows) == 1
        at = Write(rows[some, None], positions, int(rows[0]) if single else 0, start if single else None)
        self.draft.read(tokens[some], before, positions, 0, self.draft_cache, at)
        ends = fused.new_zeros(len(rows), 1, fused.shape[-1])
        ends[some] = pick(fused, (length[some] - 1)[:, None])
        return ends

    # ---- rounds -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def round(self) -> tuple[list[ListResult], RoundStats]:
        """Read a share of the prompts that wait, unless `admit` has just done so, and advance the rows whose prompts
        are read by one round. Returns the lists completed, and what the round did (of no rows, if all still read)."""
        finished = [] if self._has_read else self._read_prompts()
        self._has_read = False
        indices = self.rows.running
        if not indices:
            none = RoundCounts([], [], [], [], [], [], (0.0, 0.0), 0)
            return finished, self._stats([], none, 0)
        count = indices[-1] + 1
        if self.static:
            gain, counts = self._static_round(self.static, indices)
        else:
            budget = self._budget(indices, len(indices))
            table = table_of(budget, self.trie.num_levels, self.trie.device)
            if self.native is not None and table is not None and self.record is None:
                gain, counts = self.native(count, self.rows.state(), table, self.forced)
            else:
                gain, counts = self._tensor_round(count, budget, table)
        pending = self._account(indices, gain, counts)
        stats = self._stats(indices, counts, pending)
        self.budget.observe(stats)
        return finished + [self.rows.finish(i) for i in indices if self.rows.row(i).done], stats

    def _tensor_round(self, count: int, budget: Budget, table: TreeTable | None) -> tuple[RowGain, RoundCounts]:
        """A round in tensors: what the compiled one does for any device, number format and tree."""
        started = time.perf_counter()
        sampling = self.rows.sampling(slice(count))
        slot, busy = self.trie.depth[self.rows.node[:count]], self.rows.pending_length[:count, 0] > 0
        tree = self._draft_tree(count, sampling, budget, table)
        drafted = time.perf_counter()
        length = torch.cat([self.rows.pending_length[:count], tree.length], dim=1)
        packing = pack(length, self.places)
        hidden, feature = self._verify(count, tree, packing, budget.width)
        nodes = torch.cat([self.rows.node[:count, None], tree.node], dim=1)
        choice, log_probs = self._choose(hidden, tree.children, sampling, tree.noise)
        if self.record and not budget.steps:
            self.record(range(count), nodes[:, 0], log_probs, tree.children)
        verdict = accept(tree, choice.best, budget.steps, budget.width)
        gain = self._gain(tree, nodes, choice, verdict, feature)
        base = self._settle(count, tree, packing, verdict, gain, budget.width)
        self.rows.advance(torch.arange(count, device=base.device), base, gain)
        found = RowGain(
            verdict.accepted.tolist(),
            choice.score.gather(1, verdict.path).tolist(),
            gain.leaf.tolist(),
            gain.length.tolist(),
            (tree.length > 0).sum(1).tolist(),
        )
        seconds = (drafted - started, time.perf_counter() - drafted)
        return found, self._count(tree, verdict, budget, slot.tolist(), busy.tolist(), seconds, int(length.sum()))

    def _static_round(self, static: StaticRounds, indices: list[int]) -> tuple[RowGain, RoundCounts]:
        """A round as one device program. Draft and verification are not told apart: all of the time is the latter's."""
        started = time.perf_counter()
        rows = static.bucket(indices[-1] + 1)
        budget = self._budget(indices, rows)  # it costs what its bucket costs
        told = static.round(indices, rows, budget)
        scores: list[list[float]] = [[] for _ in range(rows)]
        leaves: list[list[int]] = [[] for _ in range(rows)]
        lengths: list[list[int]] = [[] for _ in range(rows)]
        told_of = zip(indices, told.scores.tolist(), told.gain.leaf.tolist(), told.gain.length.tolist(), strict=True)
        for index, score, leaf, length in told_of:
            scores[index], leaves[index], lengths[index] = score, leaf, length
        drafted = (told.tree.length > 0).sum(1).tolist()
        gain = RowGain(told.verdict.accepted.tolist(), scores, leaves, lengths, drafted)
        seconds, busy = (0.0, time.perf_counter() - started), [row in indices for row in range(rows)]
        return gain, self._count(told.tree, told.verdict, budget, told.begun, busy, seconds, told.target_tokens)

    def _budget(self, indices: list[int], load: int) -> Budget:
        """The round's budget at a `load` of so many rows, from what the host knows. Rows of a round without speculation
        lose touch with the draft's cache: they finish without it (a short list), so that a round that drafts nothing
        also costs nothing."""
        held = [self.rows.row(i) for i in indices]
        willing = self.draft is not None and any(row.drafts for row in held)
        budget = self.budget(load) if willing else Budget(0)
        if budget.steps:
            assert budget.steps <= self.max_steps and budget.steps * budget.width <= self.max_nodes, budget
            return budget
        if willing:
            self.rows.draftable.zero_()
        for row in held:
            row.drafts = False
        return Budget(0)

    def _draft_tree(self, count: int, sampling: Sampling | None, budget: Budget, table: TreeTable | None) -> DraftTree:
        rows = self.rows
        position = rows.base[:count] + rows.pending_length[:count, 0]
        node, remaining, may = rows.node[:count], rows.draftable[:count], rows.may(slice(count))
        root = Root(rows.fresh_feature[:count, 0], node, position, remaining, sampling)
        if budget.steps and self.draft and self.draft_cache:
            root = root._replace(feature=self._read_fresh(count, position))
        return grow(self.draft, self.target, self.trie, may, self.draft_cache, root, budget.steps, budget.width, table)

    def _read_fresh(self, count: int, position: Tensor, reach: int | None = None) -> Tensor:
        """Draft step 0: read the runs gained since the last draft, with the target's features; [B, d] at the last.
        `reach`: see `grow`."""
        assert self.draft and self.draft_cache
        rows, static = self.rows, reach is not None
        width = rows.fresh_length.shape[1] * self.places if static else None
        packing = pack(rows.fresh_length[:count], self.places, width)
        tokens = rows.fresh_tokens[:count].flatten(1).gather(1, packing.source)
        feature = pick(rows.fresh_feature[:count], packing.source // self.places)
        order = torch.arange(packing.source.shape[1], device=position.device)
        stored = (position - packing.total)[:, None] + order
        last = (packing.total - 1).clamp(min=0)[:, None]
        at = write_at(stored, static=static)
        sight = Sight(position, None, int(position.max()) if reach is None else reach, static)
        return self.draft.ask(tokens, feature, stored, 0, self.draft_cache, at, last, sight)[:, 0]

    def _verify(
        self, count: int, tree: DraftTree, packing: Packing, tree_width: int, reach: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The target's pass over pending run and tree: hidden states and fused features [B, G, d] at group ends.
        `reach`: see `grow`."""
        rows, base = self.rows, self.rows.base[:count]
        tokens = torch.cat([rows.pending_tokens[:count], tree.tokens], dim=1)
        layers = self.draft.feature_layers if self.draft else ()
        tokens = tokens.flatten(1).gather(1, packing.source)
        group, place = packing.source // self.places, packing.source % self.places
        positions = torch.cat([base[:, None], tree.start], dim=1).gather(1, group) + place
        width = packing.source.shape[1]
        own = None
        if tree_width > 1:
            order = torch.ones(width, width, dtype=torch.bool, device=base.device).tril()
            own = order & pick(tree.sees, group).gather(2, group.unsqueeze(1).expand(-1, width, -1))
        stored = base[:, None] + torch.arange(width, device=base.device)
        static = reach is not None
        at = write_at(stored, static=static)
        if not static:
            at = self._packed(at, packing.valid)
        sight = Sight(base, own, int(base.max()) + width if reach is None else reach, static)
        output = self.target(tokens, positions, self.cache, at, sight, layers)
        if self.draft is None:
            return pick(output.hidden, packing.end), None
        feature = self.draft.fuse_features(tuple(pick(f, packing.end) for f in output.features))
        return pick(output.hidden, packing.end), feature

    @staticmethod
    def _packed(at: Write, valid: Tensor) -> Write:
        """Leave the padding of rows of different lengths out of the target's pass: every token costs."""
        return at if at.start is not None else at.without(~valid)

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
        self, count: int, tree: DraftTree, packing: Packing, verdict: Verdict, gain: Gain, tree_width: int
    ) -> Tensor:
        """Move accepted keys/values into place; the target's cache then holds [B] tokens a row."""
        base, pending = self.rows.base[:count], self.rows.pending_length[:count, 0]
        grown = pending + gain.length.sum(1) - gain.length.gather(1, gain.last[:, None])[:, 0]
        if tree_width > 1:  # a chain's accepted tokens are in place already
            group = packing.source // self.places
            on_path = (group.unsqueeze(-1) == verdict.path.unsqueeze(1)).any(-1) & packing.valid
            picked = (~on_path).long().argsort(dim=1, stable=True)
            self.cache.keep(base, picked if self.static else picked[:, : int(grown.max())])
        return base + grown

    # ---- host -------------------------------------------------------------------------------------------------

    def _account_first(
        self,
        indices: Sequence[int],
        scores: Sequence[Sequence[float]],
        leaves: Sequence[Sequence[int]],
        lengths: Sequence[Sequence[int]],
    ) -> None:
        """Book the first choice of each row."""
        for index, score, leaf, length in zip(indices, scores, leaves, lengths, strict=True):
            account(self.rows.row(index), score, leaf, length, self.trie.num_items)

    def _account(self, indices: Sequence[int], gain: RowGain, counts: RoundCounts) -> int:
        """Book what each row gained; forced tokens in all."""
        forced = 0
        for index in indices:
            row, taken = self.rows.row(index), gain.accepted[index] + 1
            before = row.forced_tokens
            lengths = gain.length[index][:taken]
            account(row, gain.score[index][:taken], gain.leaf[index][:taken], lengths, self.trie.num_items)
            forced += row.forced_tokens - before
            row.rounds += 1
            row.draft_tokens += gain.drafted[index]
            row.accepted_tokens += taken - 1
            row.decode_seconds += sum(counts.seconds)
        return forced

    def _count(
        self,
        tree: DraftTree,
        verdict: Verdict,
        budget: Budget,
        begun: list[int],
        busy: list[bool],
        seconds: tuple[float, float],
        target_tokens: int,
    ) -> RoundCounts:
        """Count the round. On the host: there is little to count, and many ways to count it. `begun`: slots the rows
        stood at, `busy` which of them took part."""
        steps, levels = budget.steps, self.trie.num_levels
        lengths, slots, paths = tree.length.tolist(), tree.slot.tolist(), verdict.path.tolist()
        drafted_by_step, accepted_by_step = [0] * steps, [0] * steps
        drafted_by_slot, accepted_by_slot = [0] * levels, [0] * levels
        tried, passed = ([[0] * steps for _ in range(levels)] for _ in range(2))
        for row, accepted in enumerate(verdict.accepted.tolist()):
            if not busy[row]:
                continue
            drafted = [node for node, length in enumerate(lengths[row]) if length]
            for node in drafted:
                drafted_by_step[node // budget.width] += 1
                drafted_by_slot[slots[row][node]] += 1
            for step in {node // budget.width for node in drafted if node // budget.width <= accepted}:
                tried[begun[row]][step] += 1
            for step, group in enumerate(paths[row][1 : 1 + accepted]):
                passed[begun[row]][step] += 1
                accepted_by_step[step] += 1
                accepted_by_slot[slots[row][group - 1]] += 1
        by_step, by_slot = (drafted_by_step, accepted_by_step), (drafted_by_slot, accepted_by_slot)
        return RoundCounts(*by_step, *by_slot, tried, passed, seconds, target_tokens)

    def _stats(self, indices: list[int], counts: RoundCounts, forced_tokens: int) -> RoundStats:
        prompts_read, self._prompts_read = self._prompts_read, 0
        return RoundStats(
            rows=len(indices),
            draft_seconds=counts.seconds[0],
            verify_seconds=counts.seconds[1],
            target_tokens=counts.target_tokens,
            draft_tokens=sum(counts.drafted_by_step),
            accepted_tokens=sum(counts.accepted_by_step),
            forced_tokens=forced_tokens,
            drafted_by_step=tuple(counts.drafted_by_step),
            accepted_by_step=tuple(counts.accepted_by_step),
            drafted_by_slot=tuple(counts.drafted_by_slot),
            accepted_by_slot=tuple(counts.accepted_by_slot),
            tried=tuple(map(tuple, counts.tried)),
            passed=tuple(map(tuple, counts.passed)),
            prompts_read=prompts_read,
        )
