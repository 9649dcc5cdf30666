"""BeamDecoder: the K most likely next items of many requests at once, pass by pass, over fixed rows.

A pass reads new nodes of each row's trie under a tree mask: the beams, and what the row's plan lets ride along. Then
every row walks: as long as the hidden states of all its beams are known, the target's own K best continuations become
the beams of the next level. So a level is accepted exactly when all K were there (AtSpeed's strict verification), and
what was there in part is not computed again. Beams with one item left below them are settled: forced codes have
log-probability 0 and need no pass. Strict rows return what `beam_twin.BeamTwin` returns, whatever rides along.
Knows nothing of queues, deadlines or sockets.

Shapes: B rows of a pass, P prompt tokens at most, n new nodes a row, W beams, C children, d hidden size.
"""

import time
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from model.catalog import Catalog
from model.decoding.beam_choice import Beams, ascending, best, joint_scores
from model.decoding.beam_draft import HeadDraft, LevelHeads, Lot, ModelDraft, Search
from model.decoding.beam_plan import Ahead, Plan, Question, Seen, draft_beams
from model.decoding.beam_relaxed import Luck, keep
from model.decoding.beam_request import MAX_BEAMS, BeamRequest, BeamResult, BeamStats
from model.decoding.beam_rows import BeamRow, BeamRows, Known
from model.decoding.beam_tree import BeamTree
from model.decoding.filters import Attributes, FilterTable, Stock
from model.decoding.request import InvalidRequest
from model.draft.draft import Draft
from model.item_trie import Children, ItemTrie
from model.kv_cache import Sight, TreeSight, Write
from model.native.beams import Asked, NativeBeams, NativeRows
from model.native.kernel import NativeLinear
from model.native.search import NativeSearch, SearchAsked
from model.native.tables import NativeCache, NativeTrie
from model.target import Target

Tensor = torch.Tensor


class BeamDecoder:
    """Rows of beam requests being decoded. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        target: Target,
        trie: ItemTrie,
        catalog: Catalog | Attributes,
        *,
        num_rows: int,
        max_history_items: int,
        max_k: int,
        plan: Plan,
        draft: Draft | Target | None = None,
        draft_width: int = 128,
        max_nodes: int = 256,
        tree: BeamTree | None = None,
    ) -> None:
        """`plan` decides what rides along; `draft` is a PAD-Rec draft or a small language model of the target's
        vocabulary, which searches at most `draft_width` beams, or `k` if that is more. `max_nodes`: what may ride along
        during a whole request. `tree`: what beams know of the trie, where it has been made already."""
        self.target, self.trie, self.plan = target, trie, plan
        self.max_k, self.max_nodes, self.draft_width = min(max_k, MAX_BEAMS), max_nodes, draft_width
        vocabulary, self.tree = target.vocabulary, tree or BeamTree(trie)
        prompt = len(vocabulary.prompt(())) + max_history_items * vocabulary.tokens_per_item
        room = (trie.num_levels - 1) * self.max_k + max_nodes
        target.reserve_positions(prompt + room)
        self.cache = target.new_cache(num_rows, prompt + room)
        self.heads = LevelHeads(target)
        self.draft: HeadDraft | ModelDraft | None = None
        widest = max(draft_width, self.max_k)
        if isinstance(draft, Draft):
            self.draft = HeadDraft(draft, target, self.tree, num_rows, prompt, widest)
        elif draft is not None:
            self.draft = ModelDraft(draft, self.tree, num_rows, prompt, widest)
        self._draft_seconds, self._prompts_read = 0.0, 0  # since the last pass
        filters = FilterTable(catalog, trie, num_rows)
        self.rows = BeamRows(num_rows, self.tree, filters, max_history_items, room, target.hidden_size, self.max_k)
        self._native_rows = NativeRows(self.tree.tables(), self.tree.nowhere, self.tree.has_chains)
        self.native, self.native_search = self._native(), self._native_search()

    def validate(self, request: BeamRequest) -> None:
        """Raises InvalidRequest for content this decoder cannot decode."""
        if not 1 <= request.k <= self.max_k:
            raise InvalidRequest("/k", f"must lie between 1 and {self.max_k} for beam search")
        self.rows.check_items(request)
        self.rows.check_lot(request)

    def set_stock(self, stock: Stock | None) -> None:
        """What requests that get a row from now on may be given; None: everything."""
        self.rows.filters.set_stock(stock)

    def cancel(self, request_id: str) -> bool:
        """Free the row of a request; whether there was one."""
        return self.rows.cancel(request_id)

    # ---- prompts ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def admit(self, requests: Sequence[BeamRequest]) -> list[BeamResult]:
        """Give each (validated) request a row and read its prompt. Returns the answers that are complete already."""
        assert len(requests) <= self.rows.num_free, f"{len(requests)} requests for {self.rows.num_free} free rows"
        started = time.perf_counter()
        placed = [self.rows.place(request) for request in requests]
        finished = [self.rows.finish(i) for i in placed if not self.rows.row(i).wanted]
        indices = [i for i in placed if self.rows.held[i] is not None]
        if indices:
            self._prompts_read += len(indices)
            self._prefill(indices)
        for index in indices:
            self.rows.row(index).prefill_seconds = time.perf_counter() - started
            if self._done(index):
                finished.append(self.rows.finish(index))
        return finished

    def _prefill(self, indices: list[int]) -> None:
        """Read the prompts of newly placed rows in one pass, with what rides along, and walk."""
        held, vocabulary = [self.rows.row(i) for i in indices], self.target.vocabulary
        prompts = [vocabulary.prompt(row.request.history[-row.history_used :]) for row in held]
        for row, prompt in zip(held, prompts, strict=True):
            row.prompt, row.whole = len(prompt), len(self.tree.first_codes)
        ways = [self._ahead(row, len(indices), True) for row in held]
        before = [place for place, way in enumerate(ways) if way is Ahead.DRAFT]
        after = [place for place, row in enumerate(held) if self._drafts_after(row, len(indices))]
        if before:
            self._search([indices[place] for place in before], [prompts[place] for place in before], 0, ())
        layers = self.draft.feature_layers if after and self.draft is not None else ()
        features = self._advance(indices, held, ways, prompts, layers)
        for place in before:
            self.plan.observe(Seen(held[place].wanted, held[place].draft_tokens, self._done(indices[place])))
        after = [place for place in after if held[place].level == 1]
        if after:
            of = [features[place] for place in after]
            self._search([indices[place] for place in after], [prompts[place] for place in after], 1, of)

    def _drafts_after(self, row: BeamRow, rows: int) -> bool:
        """Whether to draft for a row from the first codes its prompt's pass will choose. Asked before that pass, which
        need not keep features otherwise: so by what the catalog's beams have below them on average."""
        draft = self.draft
        if draft is None or draft.rides_with_prompt or self._draft_to <= 1 or not row.request.speculation:
            return False
        alone, below = (round(row.wanted * of[1]) for of in (self.tree.deciding, self.tree.whole))
        whole = below if below <= self._limit(row) else None
        return self.plan.ahead(Question(rows, 1, row.wanted, alone, whole, True)) is Ahead.DRAFT

    def _search(
        self,
        indices: list[int],
        prompts: Sequence[Sequence[int]],
        level: int,
        features: Sequence[Sequence[Tensor]],
    ) -> None:
        """Let the draft search from the beams the rows have at `level` (0: from the root); what it proposes waits in
        the rows for their next pass."""
        assert self.draft is not None
        started, held = time.perf_counter(), [self.rows.row(i) for i in indices]
        lots = [
            Lot(row.seed, row.request.replacement) if row.request.verification == "relaxed" else None for row in held
        ]
        widths = [draft_beams(row.wanted, self.draft_width) for row in held]
        if self.native_search is None:
            tokens, length = self._padded(prompts)
            rows = torch.tensor(indices, device=tokens.device)
            search = Search(tokens, length, self.rows.may(rows), self._start(rows, level), level, widths, lots)
            found = self.draft.search(search, self._draft_to - level, features)
        else:
            asked = []
            for place, (index, lot) in enumerate(zip(indices, lots, strict=True)):
                of = features[place] if features else ()
                asked.append(
                    SearchAsked(index, prompts[place], held[place].beams, widths[place], of, *(lot or (None, False)))
                )
            found = self.native_search(asked, self.rows.state(), level, self._draft_to - level)
        for row, guess in zip(held, found, strict=True):
            row.guessed, row.drafted = guess.nodes, dict(enumerate(guess.levels, start=level))
            row.deepest = guess.last if self.plan.below else 0
        self._draft_seconds += time.perf_counter() - started

    def _start(self, rows: Tensor, level: int) -> Beams:
        """The beams that `rows` have at `level`."""
        if not level:
            root = torch.zeros_like(rows)[:, None]
            return Beams(root, torch.zeros(root.shape, device=rows.device))
        width = max(self.rows.row(i).beams for i in rows.tolist())
        nodes, scores = self.rows.beam[rows, :width], self.rows.score[rows, :width]
        return Beams(nodes, scores.masked_fill(nodes == self.tree.nowhere, float("-inf")))

    # ---- passes -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def round(self) -> tuple[list[BeamResult], BeamStats]:
        """Advance every row in use by one pass. Returns the answers it completed, and what it did."""
        started = time.perf_counter()
        indices = self.rows.in_use
        held = [self.rows.row(i) for i in indices]
        before = [(row.accepted, row.forced, row.draft_tokens, row.used) for row in held]
        guessed = [row.guessed is not None for row in held]
        self._advance(indices, held, [self._ahead(row, len(indices)) for row in held])
        seconds = time.perf_counter() - started
        for index, row, was in zip(indices, held, guessed, strict=True):
            row.rounds += 1
            row.decode_seconds += seconds
            if was:
                self.plan.observe(Seen(row.wanted, row.draft_tokens, self._done(index)))
        told = [(row.accepted, row.forced, row.draft_tokens, row.used) for row in held]
        accepted, forced, drafted, passed = (
            sum(b - a for a, b in zip(*column, strict=True))
            for column in zip(zip(*before, strict=True), zip(*told, strict=True), strict=True)
        )
        lossy = sum(row.lossy for row in held)
        stats = BeamStats(
            rows=len(indices),
            draft_seconds=self._draft_seconds,
            verify_seconds=seconds,
            target_tokens=passed,
            draft_tokens=drafted,
            accepted_levels=accepted,
            forced_levels=forced,
            lossy_rows=lossy,
            prompts_read=self._prompts_read,
        )
        self._draft_seconds, self._prompts_read = 0.0, 0
        return [self.rows.finish(i) for i in indices if self._done(i)], stats

    def _ahead(self, row: BeamRow, rows: int, fresh: bool = False) -> Ahead:
        """What rides along with a row; a draft that rides with the prompt can be asked while the row is `fresh`."""
        if row.level == self.trie.num_levels or not row.request.speculation:
            return Ahead.NOTHING
        if row.guessed is not None:
            return Ahead.DRAFT
        whole = row.whole if row.whole <= self._limit(row) else None
        can = fresh and self.draft is not None and self.draft.rides_with_prompt and self._draft_to > 0
        return self.plan.ahead(Question(rows, row.level, row.wanted, row.alone, whole, can))

    @property
    def _draft_to(self) -> int:
        """Leaves need no hidden state: at the last level there is nothing to guess."""
        return min(self.plan.draft_to, self.trie.num_levels - 1)

    def _limit(self, row: BeamRow) -> int:
        """Nodes a row may pass over now, so that there is room left for its beams alone at every level to come."""
        return self.rows.room - row.used - row.wanted * max(0, self.trie.num_levels - 2 - row.level)

    def _advance(
        self,
        indices: list[int],
        held: list[BeamRow],
        ways: list[Ahead],
        prompts: Sequence[Sequence[int]] = (),
        layers: Sequence[int] = (),
    ) -> list[list[Tensor]]:
        """A pass over the rows, after their `prompts` if these are new, and as far as they walk then. Returns, by
        prompt, the outputs [its tokens, d] of `layers` over it."""
        if self.native is None:
            rows = torch.tensor(indices, device=self.target.device)
            nodes = self._wanted(rows, held, ways, bool(prompts))
            features = self._read(indices, rows, nodes, prompts, layers)
            self._walk(indices, rows)
            return [[feature[i, : len(prompt)] for feature in features] for i, prompt in enumerate(prompts)]
        asked = []
        for place, (index, row, way) in enumerate(zip(indices, held, ways, strict=True)):
            given = (way is Ahead.WHOLE, prompts[place] if prompts else (), row.guessed, row.deepest)
            limit, lot = self._limit(row), (row.seed, row.request.replacement, row.drafted)
            asked.append(Asked(index, row.wanted, row.level, row.beams, row.settled, limit, *given, *lot))
        told, outputs = self.native(asked, self.rows.state(), layers)
        for row, one in zip(held, told, strict=True):
            row.guessed, row.deepest = None, 0
            row.drafted = {}  # what was not reached was drafted from other beams
            row.used += one.read
            row.draft_tokens += max(0, one.read - row.alone)
            row.accepted += one.accepted
            row.forced += one.forced
            row.level, row.beams, row.settled = one.level, one.beams, bool(one.settled)
            row.alone, row.whole = one.alone, one.below
            row.lossy |= bool(one.lossy)
        ends = list(accumulate(map(len, prompts), initial=0))
        return [[output[begin:end] for output in outputs] for begin, end in pairwise(ends)]

    def _native(self) -> NativeBeams | None:
        """The compiled pass, where it can run the target."""
        target = self.target
        if target.native is None or not isinstance(target.head, NativeLinear):
            return None
        trie, cache = NativeTrie(self.trie, target.head), NativeCache(self.cache, target.rotations)
        return NativeBeams(trie, self._native_rows, target.native, cache)

    def _native_search(self) -> NativeSearch | None:
        """The compiled search, where it can run the draft."""
        if self.draft is None:
            return None
        own = self.draft.native(self.target)
        return own and NativeSearch(self.trie, self._native_rows, self.tree.widest, own)

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The tokens [B, P] and the length [B] of prompts."""
        longest = max(map(len, prompts))
        tokens = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=self.target.device)
        return tokens, torch.tensor([len(p) for p in prompts], device=self.target.device)

    def _wanted(self, rows: Tensor, held: list[BeamRow], ways: list[Ahead], fresh: bool) -> Tensor:
        """Nodes [B, n] of the next pass: every row's beams (`fresh` rows have none), and what rides along. May name a
        node twice."""
        whole = torch.tensor([way is Ahead.WHOLE for way in ways], device=rows.device)[:, None]
        if fresh:
            parts = [rows.new_empty(len(rows), 0)]
            if Ahead.WHOLE in ways:
                parts.append(torch.where(whole, self.tree.first_codes, self.tree.nowhere))
        else:
            beams = self.rows.beam[rows, : max(row.beams for row in held)]
            parts = [beams]
            if self.tree.has_chains:  # through single children to the next decision: it rides for free
                chain = beams
                for _ in range(self.trie.num_levels - 2):
                    chain = self.tree.only_child.take(chain)
                    parts.append(chain)
            if Ahead.WHOLE in ways:
                parts.append(self.tree.decisions_below(beams.masked_fill(~whole, self.tree.nowhere)))
        if Ahead.DRAFT in ways:
            parts.append(self._guessed(held))
        return torch.cat(parts, dim=1)

    def _guessed(self, held: list[BeamRow]) -> Tensor:
        """What drafts proposed for the rows, [B, n]; they do so once."""
        none = self.rows.beam.new_empty(0)
        found = [none if row.guessed is None else row.guessed for row in held]
        deepest = [of[len(of) - row.deepest :] for of, row in zip(found, held, strict=True)]
        for row in held:
            row.guessed, row.deepest = None, 0
        guessed, above = (
            torch.nn.utils.rnn.pad_sequence(of, batch_first=True, padding_value=self.tree.nowhere)
            for of in (found, deepest)
        )
        return torch.cat([guessed, self.tree.decisions_below(above)], dim=1) if above.shape[1] else guessed

    def _read(
        self,
        indices: list[int],
        rows: Tensor,
        nodes: Tensor,
        prompts: Sequence[Sequence[int]] = (),
        layers: Sequence[int] = (),
    ) -> tuple[Tensor, ...]:
        """The target's pass over `nodes` [B, n] (what is known, settled or too much left out), with the rows' `prompts`
        before them. Returns the outputs [B, P, d] of `layers` over the prompts."""
        held = [self.rows.row(i) for i in indices]
        prompt = self._padded(prompts) if prompts else None
        if prompt is not None:
            self.rows.prompt[rows] = prompt[1]
        nodes, counts = self._fresh(indices, rows, nodes, held)
        base, used = self.rows.prompt[rows], self.rows.used[rows]
        order = torch.arange(nodes.shape[1], device=rows.device)
        places, valid = used[:, None] + order, nodes != self.tree.nowhere
        where = (rows[:, None] * self.rows.room + places)[valid]
        self.rows.nodes.view(-1)[where] = nodes[valid]
        self.rows.used[rows] = used + counts
        for row, count in zip(held, counts.tolist(), strict=True):
            row.used += count
            row.draft_tokens += max(0, count - row.alone)
        depth = self.trie.depth.take(nodes).long()
        tokens, rotary, stored = self.tree.token.take(nodes), base[:, None] + depth - 1, base[:, None] + places
        committed, paths = base[:, None].expand_as(nodes), self._paths(indices, rows, nodes, depth)
        before = 0
        if prompt is not None:
            before = prompt[0].shape[1]
            along = torch.arange(before, device=rows.device).expand(len(rows), -1)
            none = paths.new_full((len(rows), before, paths.shape[2]), -1)
            tokens, rotary = torch.cat([prompt[0], tokens], 1), torch.cat([along, rotary], 1)
            stored, committed = torch.cat([along, stored], 1), torch.cat([along + 1, committed], 1)
            paths, valid = torch.cat([none, paths], 1), torch.cat([along < prompt[1][:, None], valid], 1)
        if prompt is not None and not nodes.shape[1]:
            # Nothing rides: an ordinary prompt, which attention knows without a mask.
            at = Write(rows[:, None], stored, indices[0], 0 if len(indices) == 1 else None)
            at = at if len(indices) == 1 or valid.is_cuda else at.without(~valid)
            output = self.target(tokens, rotary, self.cache, at, Sight(None, None, before), layers)
            hidden, features = output.hidden, output.features
        else:
            reach = int((base + self.rows.used[rows]).max())
            told = (tokens, rotary, stored, committed, paths, valid)
            hidden, features = self._pass(indices, rows, told, reach, layers)
        if prompt is not None:
            last = (prompt[1] - 1).view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
            self.rows.last[rows] = hidden.gather(1, last)[:, 0].float()
        self.rows.hidden.flatten(0, 1)[where] = hidden[:, before:][valid[:, before:]].float()
        return tuple(feature[:, :before] for feature in features)

    def _pass(
        self, indices: list[int], rows: Tensor, told: tuple[Tensor, ...], reach: int, layers: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The target's pass over the `rows` alone. Where torch runs the layers it reads rows 0..highest of the cache:
        the rows between are padding then."""
        if self.target.native is None:
            highest = max(indices) + 1
            spread = [tensor.new_zeros(highest, *tensor.shape[1:]) for tensor in told]
            for whole, tensor in zip(spread, told, strict=True):
                whole[rows] = tensor
            told, rows = tuple(spread), torch.arange(highest, device=rows.device)
        tokens, rotary, stored, committed, paths, valid = told
        at = Write(rows[:, None], stored)
        if not bool(valid.all()):
            at = at.without(~valid)
        output = self.target(tokens, rotary, self.cache, at, TreeSight(committed, paths, reach), layers)
        if self.target.native is None:
            picked = torch.tensor(indices, device=rows.device)
            return output.hidden[picked], tuple(feature[picked] for feature in output.features)
        return output.hidden, output.features

    def _fresh(self, indices: list[int], rows: Tensor, nodes: Tensor, held: list[BeamRow]) -> tuple[Tensor, Tensor]:
        """Of `nodes` those to pass over: each once, none known already, none settled, not more than there is room for.
        Ascending, [B, n], and how many [B]. Nodes nearer to the root come first: a parent is never without room."""
        if not nodes.shape[1]:
            return nodes, torch.zeros_like(rows)
        nodes = nodes.sort(dim=1).values
        drop = self.tree.available(nodes, self.rows.may(rows)) <= 1
        drop[:, 1:] |= nodes[:, 1:] == nodes[:, :-1]
        drop |= self.rows.known(rows, indices).find(nodes)[1]
        nodes = nodes.masked_fill(drop | (nodes == self.tree.nowhere), self.tree.nowhere).sort(dim=1).values
        limit = torch.tensor([self._limit(row) for row in held], device=rows.device)[:, None]
        nodes = nodes.masked_fill(torch.arange(nodes.shape[1], device=rows.device) >= limit, self.tree.nowhere)
        counts = (nodes != self.tree.nowhere).sum(1)
        return nodes[:, : int(counts.max())], counts

    def _paths(self, indices: list[int], rows: Tensor, nodes: Tensor, depth: Tensor) -> Tensor:
        """Where the ancestors of `nodes` [B, n] at `depth`, and they themselves, lie behind the prompt: [B, n, A] from
        the first code on, padded with -1."""
        deepest = int(depth.masked_fill(nodes == self.tree.nowhere, 0).max()) if nodes.shape[1] else 0
        paths = nodes.new_full((*nodes.shape, deepest + 1), -1)
        if deepest:
            known, current = self.rows.known(rows, indices), nodes
            for above in range(deepest):
                places, found = known.find(current)
                # What is not there (above the root, padding) lands in a column nobody reads.
                column = (depth - 1 - above).masked_fill(~found, deepest)
                paths.scatter_(2, column.unsqueeze(-1), places.unsqueeze(-1))
                current = self.tree.parent.take(current)
        return paths[..., :deepest].contiguous()

    # ---- choices ----------------------------------------------------------------------------------------------

    def _walk(self, indices: list[int], rows: Tensor) -> None:
        """Move every row's beams down as far as hidden states are known."""
        known, gained = self.rows.known(rows, indices), dict.fromkeys(indices, 0)
        moving = set(indices)
        for level in range(self.trie.num_levels):
            here = [place for place, i in enumerate(indices) if i in moving and self.rows.row(i).level == level]
            if not here:
                continue
            if len(here) == len(indices):
                picked, of = rows, known
            else:
                picked = rows[here]
                of = self.rows.known(picked, [indices[place] for place in here])
            for index in self._step([indices[place] for place in here], picked, of, level, gained):
                moving.discard(index)

    def _step(self, indices: list[int], rows: Tensor, known: Known, level: int, gained: dict[int, int]) -> list[int]:
        """One level: choose the next beams of `rows`. Returns the rows that need a pass to go on, or are done."""
        held, tree = [self.rows.row(i) for i in indices], self.tree
        may = self.rows.may(rows)
        if level == 0:
            nodes, scores = torch.zeros_like(rows)[:, None], torch.zeros(len(rows), 1, device=rows.device)
            hidden = self.rows.last[rows].unsqueeze(1)
        else:
            width = max(row.beams for row in held)
            nodes, scores = self.rows.beam[rows, :width], self.rows.score[rows, :width]
            # A settled beam has one legal child, whatever is said of it.
            hidden = self.rows.hidden_at(rows, known.find(nodes)[0])
        children = self.trie.children(nodes, may, widest=tree.widest[level])
        logits = self.heads(level, hidden, children, self.trie.code)
        joint = joint_scores(logits, children, scores)
        flat = children.nodes.flatten(1)
        beams = best(joint.flatten(1), flat, [row.wanted for row in held], tree)
        for place, row in enumerate(held):
            if level in row.drafted:
                row.lossy = True
                beams = self._relax(place, row, level, children, joint, beams)
        self.rows.move(rows, beams)
        chosen = beams.nodes
        settled = (tree.available(chosen, may) <= 1) | (chosen == tree.nowhere)
        going = settled | known.find(chosen)[1]
        # Statically forced to the end: no need to look at the levels between.
        end = self.trie.run_end.take(chosen).long()
        over = (end >= self.trie.first_leaf).all(1)
        self.rows.beam[rows, : chosen.shape[1]] = torch.where(over[:, None], end, chosen)
        whole = tree.below.take(chosen.masked_fill(settled, tree.nowhere)).sum(1)
        facts = (over, going.all(1), settled.all(1), (~going).sum(1), whole, (chosen != tree.nowhere).sum(1))
        stopped = []
        told = torch.stack([fact.long() for fact in facts], dim=1).tolist()
        for index, row, (done, goes_on, free, alone, below, count) in zip(indices, held, told, strict=True):
            # The first level of a walk is what its pass was for; the rest it saved passes for.
            if row.settled:
                row.forced += 1
            else:
                row.accepted += gained[index]
            gained[index] = 1
            row.level, row.beams, row.settled = level + 1, count, bool(free)
            row.alone, row.whole = alone, below
            if done:
                row.forced += self.trie.num_levels - row.level
                row.level = self.trie.num_levels
            if done or not goes_on:
                row.drafted = {}  # what was drafted below was drafted from other beams
                stopped.append(index)
        return stopped

    def _relax(self, place: int, row: BeamRow, level: int, children: Children, joint: Tensor, beams: Beams) -> Beams:
        """The row at `place` keeps what relaxed verification keeps instead of its K best."""
        drafted, q, drawn = (tensor.cpu() for tensor in row.drafted[level])
        legal = joint[place].isfinite().cpu()
        mine, p = children.nodes[place].cpu()[legal], joint[place].cpu()[legal]
        if not len(drafted):
            return beams
        at = torch.searchsorted(drafted, mine).clamp(max=len(drafted) - 1)
        q = q[at].masked_fill(drafted[at] != mine, float("-inf"))
        if not bool(q.isfinite().any()):
            return beams
        found = torch.searchsorted(mine, drawn).clamp(max=len(mine) - 1)
        found = found[mine[found] == drawn]
        shares = (torch.softmax(p.double(), 0), torch.softmax(q.double(), 0))
        kept = keep(*shares, mine, found, row.wanted, row.request.replacement, Luck(row.seed, level))
        stay, scores = beams.nodes.clone(), beams.scores.clone()
        stay[place], scores[place] = self.tree.nowhere, float("-inf")
        stay[place, : len(kept)], scores[place, : len(kept)] = mine[kept].to(stay.device), p[kept].to(stay.device)
        return ascending(stay, scores, self.tree)

    # ---- host -------------------------------------------------------------------------------------------------

    def _done(self, index: int) -> bool:
        return self.rows.row(index).level == self.trie.num_levels
