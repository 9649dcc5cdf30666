"""StaticRounds: a round, and the reading of prompts, as device programs of static shape.

Everything between the first draft step and the advanced rows happens on the device, over tensors that stay in place:
no value is read back, no shape depends on one. Rows 0..B-1 of a bucket take part, idle ones too (they gain nothing).
What a round did comes back as one small tensor, the status. Prompts come in through staging tensors of fixed places,
together with all else that a new row's state holds.

A shape is chosen on the host, from what the host knows: how many rows, what is drafted, whether anybody draws, how far
the rows reach, how much they exclude. Every choice is the smallest of a few that fits (`round_variants`), so there are
few programs, and `freeze` can make all of them. The functions called are those of the eager round; told a `reach`, they
read nothing back. The slow twins are that eager round and, for all of them, `plain.PlainTwin`.

Shapes: B rows of the bucket, J steps, W width, M = J W nodes, K = J + 1 decisions, n tokens a row of the target's pass,
P prompt tokens, E exclusions a row.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from model.decoding.draft_tree import DraftTree, Root, grow, pack, pick
from model.decoding.graph import Programs
from model.decoding.rows import Gain, Placement
from model.decoding.sampling import Sampling, noise
from model.decoding.topology import Budget, table_of
from model.decoding.verify import Verdict, accept
from model.item_trie import Children, ItemTrie
from model.kv_cache import Sight, Write
from model.native.round import TreeTable

if TYPE_CHECKING:
    from model.decoding.list_decoder import ListDecoder

Tensor = torch.Tensor
MAX_EXCLUDED = 20_000  # leaves a request may exclude: more than that is no list of items but a filter
FEW_EXCLUDED = 256  # what nearly all requests stay below
POSITIONS = 64  # reach and caches come in multiples of this: attention kernels want aligned masks
REACHES_FROM = 16  # rows: below, the weights are most of what a pass reads, and reading less cache gains nothing
_STATE = ("row", "prompt length", "items wanted", "items the draft may guess at", "filter slot", "seed")
TOKENS = 8  # n is a multiple of this


class RoundShape(NamedTuple):
    """What a round's program depends on. `reach` bounds positions looked at, `banned` exclusions a row."""

    rows: int
    budget: Budget
    drawing: bool
    reach: int
    banned: int


class PromptShape(NamedTuple):
    """What the program that reads prompts depends on: `rows` prompts of at most `length` tokens."""

    rows: int
    length: int
    banned: int


class Told(NamedTuple):
    """What a program did, on the host. For the rows asked about: `scores` [b, K] of the decisions in nats, the `gain`
    without tokens and features, `pending` tokens of the run each waits with. For rows 0..B-1: what of the `tree` and
    the `verdict` counting needs, and the slots they stood at (`begun`). `target_tokens` that were more than padding."""

    scores: Tensor
    gain: Gain
    pending: list[int]
    tree: DraftTree
    verdict: Verdict
    begun: list[int]
    target_tokens: int


def rounded_positions(count: int) -> int:
    return -(-count // POSITIONS) * POSITIONS


def row_buckets(num_rows: int) -> list[int]:
    """Powers of two, and all rows."""
    return [*(2**i for i in range(num_rows.bit_length()) if 2**i < num_rows), num_rows]


def mean_run(trie: ItemTrie) -> float:
    """Tokens per choice, averaged over the catalog's items: a choice and what it forces."""
    first = trie.first_child
    nodes = torch.arange(trie.first_leaf, device=trie.device)
    below = trie.leaf_start[nodes + 1] - trie.leaf_start[nodes]
    # The sentinel after each depth has no leaves: it counts for nothing whatever its children look like.
    choices = int((below * (first[nodes + 1] - first[nodes] > 1)).sum())
    tokens: int = trie.num_items * (trie.num_levels + 1)
    return tokens / max(1, choices)


class StaticRounds:
    """The programs of one ListDecoder, over its rows and caches."""

    def __init__(self, decoder: "ListDecoder", *, graphs: bool) -> None:
        # A decoder owns its programs, not the other way round: what is dropped frees its recordings there and then.
        self.decoder: ListDecoder = weakref.proxy(decoder)
        rows, device = decoder.rows, decoder.target.device
        self.num_rows, self.max_banned = len(rows.held), rows.excluded.shape[1]
        self.programs = Programs(device, capture=graphs and device.type == "cuda")
        if device.type == "cuda":
            # cuDNN's attention plans anew for every shape, for longer than a recording takes; there are hundreds.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.run_tokens = mean_run(decoder.trie)
        self._tables: list[Tensor] = []
        vocabulary = decoder.target.vocabulary
        prompt = len(vocabulary.list_prompt(())) + rows.max_history_items * decoder.places
        # Staging: what prompts and new rows bring, by place in the batch. Drawing and state go in as they are.
        self.max_prompt = rounded_positions(prompt)
        self._tokens = _Staged(device, torch.int64, self.num_rows * self.max_prompt)
        self._state = _Staged(device, torch.int64, self.num_rows * len(_STATE))
        self._drawing = _Staged(device, torch.float64, self.num_rows * 2)
        self._banned = _Staged(device, torch.int64, self.num_rows * self.max_banned)
        # Four columns for every decision, two for every node, five more: see `_report`.
        columns = 4 * (decoder.max_nodes + 1) + 2 * decoder.max_nodes + 5
        self._status = _Staged(device, torch.float64, self.num_rows * columns)

    # ---- shapes -----------------------------------------------------------------------------------------------

    def bucket(self, count: int) -> int:
        """The rows of the smallest bucket that holds rows 0..count-1."""
        return next(size for size in row_buckets(self.num_rows) if size >= count)

    def tokens(self, budget: Budget) -> int:
        """n: room for the longest pending run and for nodes of ordinary length. Nodes that find none are not drafted,
        which costs a little acceptance where runs are long, and never exactness."""
        if not self.decoder.forced:
            return 1
        places, nodes = self.decoder.places, budget.steps * budget.width
        ordinary = places + nodes * self.run_tokens
        return min((1 + nodes) * places, -(-int(ordinary + 0.5) // TOKENS) * TOKENS)

    def round_shapes(self, rows: int, budget: Budget) -> list[RoundShape]:
        """What rounds of a bucket and a budget come in, cheapest first. The last one serves everything."""
        most, few = self.decoder.cache.num_positions, min(FEW_EXCLUDED, self.max_banned)
        reaches = range(POSITIONS, most, POSITIONS) if rows >= REACHES_FROM else ()
        greedy = [(False, reach, few) for reach in (*reaches, most)]
        variants = dict.fromkeys([*greedy, (True, most, few), (True, most, self.max_banned)])
        return [RoundShape(rows, budget, *variant) for variant in variants]

    def _round_shape(self, rows: int, budget: Budget) -> RoundShape:
        held = [row for row in self.decoder.rows.held if row is not None]
        behind = max(self.tokens(budget), budget.steps * budget.width * self.decoder.places)
        reach = min(max(row.position for row in held) + behind, self.decoder.cache.num_positions)
        drawing, banned = bool(self.decoder.rows.drawing), max(row.banned for row in held)
        return next(
            shape
            for shape in self.round_shapes(rows, budget)
            if shape.drawing >= drawing and shape.reach >= reach and shape.banned >= banned
        )

    def _prompt_shapes(self) -> list[PromptShape]:
        lengths = range(POSITIONS, self.max_prompt + 1, POSITIONS)
        banned = sorted({min(FEW_EXCLUDED, self.max_banned), self.max_banned})
        return [PromptShape(r, length, b) for b in banned for length in lengths for r in row_buckets(self.num_rows)]

    @torch.inference_mode()
    def freeze(self) -> None:
        """Make the programs of every shape that may be asked for: prompts, and in each bucket rounds without a draft
        and with the budgets that rounds had there so far. Then none may be made any more. Nothing may be running."""
        assert not self.decoder.rows.in_use, "a freeze runs programs on rows in use"
        rounds = [key for key in self.programs.keys if isinstance(key, RoundShape)]
        tried: set[Budget] = set()
        for rows in reversed(row_buckets(self.num_rows)):
            # Where no load was tried, budgets are those of the next larger one: `LoadBudget` says so too.
            tried = {shape.budget for shape in rounds if shape.rows == rows} or tried
            for budget in sorted({Budget(0), *tried}, key=repr):
                for shape in self.round_shapes(rows, budget):
                    self._run_round(shape)
        for prompts in self._prompt_shapes():
            self._run_prompts(prompts, [], [])
            self._status.fetch(1, 1)  # wait: the host must not stage the next prompts over those
        self.programs.freeze()

    # ---- rounds -----------------------------------------------------------------------------------------------

    def round(self, indices: Sequence[int], rows: int, budget: Budget) -> Told:
        """A round of the rows of a bucket, `indices` of which are in use."""
        shape = self._round_shape(rows, budget)
        self._run_round(shape)
        return self._told(indices, list(indices), rows, budget.steps + 1, budget.steps * budget.width)

    def _run_round(self, shape: RoundShape) -> None:
        # Made here, not in the program: it is copied to the device, and a recording that reads it must find it there.
        table = table_of(shape.budget, self.decoder.trie.num_levels, self.decoder.target.device)
        if table is not None and not any(table.parent is held for held in self._tables):
            self._tables += table
        self._run(shape, lambda: self._round_program(shape, table))

    def _run(self, shape: RoundShape | PromptShape, program: Callable[[], None]) -> None:
        """A recording knows addresses and owns nothing. All it reads is the decoder's, but for two tables that a
        decoder of longer rows over the same target replaces: those are held here."""
        target, draft = self.decoder.target, self.decoder.draft
        for table in (target.rotations, draft.rotations) if draft else (target.rotations,):
            if not any(table is held for held in self._tables):
                self._tables.append(table)
        self.programs.run(shape, program)

    def _round_program(self, shape: RoundShape, table: TreeTable | None) -> None:
        """`ListDecoder.round` over rows 0..B-1, from the draft to the advanced rows, and the status of it."""
        decoder, rows, count, reach = self.decoder, self.decoder.rows, shape.rows, shape.reach
        budget, within = shape.budget, slice(shape.rows)
        sampling, may = self._sampling(within) if shape.drawing else None, rows.may(within, shape.banned)
        pending, position = rows.pending_length[:count], rows.base[:count] + rows.pending_length[:count, 0]
        root = Root(rows.fresh_feature[:count, 0], rows.node[:count], position, rows.draftable[:count], sampling)
        if budget.steps:
            root = root._replace(feature=decoder._read_fresh(count, position, reach))
        begun, size = decoder.trie.depth.take(rows.node[:count]), (budget.steps, budget.width)
        networks = (decoder.draft, decoder.target, decoder.trie)
        tree = grow(*networks, may, decoder.draft_cache, root, *size, table, reach)
        tree, length = _within(self.tokens(budget), pending, tree)
        packing = pack(length, decoder.places, self.tokens(budget))
        hidden, feature = decoder._verify(count, tree, packing, budget.width, reach)
        nodes = torch.cat([rows.node[:count, None], tree.node], dim=1)
        choice, _ = decoder._choose(hidden, tree.children, sampling, tree.noise)
        verdict = accept(tree, choice.best, *size)
        gain = decoder._gain(tree, nodes, choice, verdict, feature)
        base = decoder._settle(count, tree, packing, verdict, gain, budget.width)
        rows.advance(within, base, gain, shape.banned)
        scores = choice.score.gather(1, verdict.path)
        self._report(count, scores, gain, base, verdict.path, tree.length, tree.slot, begun, length)
        rows.rest(within)

    def _sampling(self, rows: Tensor | slice) -> Sampling:
        """Every row drawn, greedy ones at temperature 0."""
        state = self.decoder.rows
        return Sampling(state.temperature[rows], state.top_p[rows], state.seed[rows], state.written[rows])

    # ---- prompts ----------------------------------------------------------------------------------------------

    def prefill(self, indices: Sequence[int]) -> Told:
        """Write the state of the rows placed at `indices`, read their prompts, and make the first choice of each."""
        rows, vocabulary = self.decoder.rows, self.decoder.target.vocabulary
        placed = {placement.place: placement for placement in rows.placed}
        rows.placed.clear()
        held = [rows.row(i) for i in indices]
        prompts = [vocabulary.list_prompt(row.request.history[-row.history_used :]) for row in held]
        longest, banned, count = max(map(len, prompts)), max(row.banned for row in held), self.bucket(len(indices))
        shapes = self._prompt_shapes()
        fits = (s for s in shapes if s.rows == count and s.length >= longest and s.banned >= banned)
        for row in held:  # from here on: should the program fail half-way, freeing the row puts it to rest
            row.on_device = True
        self._run_prompts(next(fits), prompts, [placed[i] for i in indices])
        return self._told(range(len(indices)), list(indices), count, 1, 0)

    def _staging(self, shape: PromptShape) -> tuple[tuple[int, ...], tuple["_Staged", ...]]:
        """Values a row, and where they are staged: prompt tokens, state, how the row draws, what it excludes."""
        sizes = (shape.length, len(_STATE), 2, shape.banned)
        return sizes, (self._tokens, self._state, self._drawing, self._banned)

    def _run_prompts(self, shape: PromptShape, prompts: Sequence[Sequence[int]], placed: Sequence[Placement]) -> None:
        """Stage what the prompts' program reads, padded with prompts of one token in the row that is for padding."""
        sizes, staging = self._staging(shape)
        tokens, state, drawing, banned = (
            staged.on_host(shape.rows, size) for staged, size in zip(staging, sizes, strict=True)
        )
        tokens.zero_()
        state.zero_()
        state[:, 0], state[:, 1] = self.num_rows, 1
        drawing.zero_()
        banned.fill_(self.decoder.trie.num_items)
        for place, (prompt, row) in enumerate(zip(prompts, placed, strict=True)):
            tokens[place, : len(prompt)] = torch.tensor(prompt)
            banned[place, : len(row.leaves)] = torch.from_numpy(row.leaves)
            known = (row.place, len(prompt), row.wanted, row.draftable, row.filter_slot, row.seed)
            state[place] = torch.tensor(known)
            drawing[place] = torch.tensor((row.temperature, row.top_p), dtype=torch.float64)
        for staged, size in zip(staging, sizes, strict=True):
            staged.send(shape.rows * size)
        self._run(shape, lambda: self._prompt_program(shape))

    def _prompt_program(self, shape: PromptShape) -> None:
        """The state of new rows and `ListDecoder._prefill`, from the staging tensors."""
        decoder, rows = self.decoder, self.decoder.rows
        sizes, staging = self._staging(shape)
        tokens, state, drawing, banned = (
            staged.on_device(shape.rows, size) for staged, size in zip(staging, sizes, strict=True)
        )
        at, length, wanted, draftable, filter_slot, seed = state.unbind(1)
        rows.remaining[at], rows.draftable[at], rows.filter_slot[at], rows.seed[at] = (
            wanted,
            draftable,
            filter_slot,
            seed,
        )
        rows.temperature[at], rows.top_p[at] = drawing.unbind(1)
        rows.written[at] = torch.zeros_like(wanted)
        padding = self.max_banned - shape.banned
        rows.excluded[at] = pad(banned, (0, padding), value=decoder.trie.num_items)
        positions = torch.arange(shape.length, device=tokens.device).expand(shape.rows, -1)
        places = (at[:, None].expand_as(positions).flatten(), positions.flatten())
        write = Write(at[:, None], positions, places=places)
        layers = decoder.draft.feature_layers if decoder.draft else ()
        sight = Sight(None, None, shape.length, static=True)
        output = decoder.target(tokens, positions, decoder.cache, write, sight, layers)
        last, feature = (length - 1)[:, None], None
        if decoder.draft and decoder.draft_cache:
            fused = decoder.draft.fuse_features(output.features)
            before = torch.cat([torch.zeros_like(fused[:, :1]), fused[:, :-1]], dim=1)
            decoder.draft.read(tokens, before, positions, 0, decoder.draft_cache, write)
            feature = pick(fused, last)
        root, sampling = torch.zeros_like(last), self._sampling(at)
        children = decoder.trie.children(root, rows.may(at, shape.banned))
        drawn_with = noise(sampling, decoder.trie, root, children, root.new_empty(*root.shape, 0))
        choice, _ = decoder._choose(pick(output.hidden, last), children, sampling, drawn_with)
        run = decoder._step_into(root, choice.node)
        gain = Gain(run.tokens, run.length, run.leaf, feature, torch.zeros_like(length), run.node[:, 0])
        rows.advance(at, length, gain, shape.banned)
        none = root[:, :0]
        self._report(shape.rows, choice.score, gain, length, torch.zeros_like(root), none, none, length, root)
        rows.rest(at)

    # ---- status -----------------------------------------------------------------------------------------------

    def _report(
        self,
        rows: int,
        scores: Tensor,
        gain: Gain,
        base: Tensor,
        path: Tensor,
        drafted: Tensor,
        slot: Tensor,
        begun: Tensor,
        length: Tensor,
    ) -> None:
        """Leave the status: float64 holds every float32 score and every count here as they are."""
        pending = gain.length.gather(1, gain.last[:, None])
        columns = (scores, gain.leaf, gain.length, path, drafted, slot, gain.last[:, None], pending, base[:, None])
        status = torch.cat([c.double() for c in (*columns, begun[:, None], length.sum(1, keepdim=True))], dim=1)
        self._status.on_device(rows, status.shape[1]).copy_(status)

    def _told(self, places: Sequence[int], indices: list[int], rows: int, decisions: int, nodes: int) -> Told:
        """Read the status; `places` in it of the rows `indices`."""
        widths = [decisions] * 4 + [nodes] * 2 + [1] * 5
        status = self._status.fetch(rows, sum(widths))
        of_rows = status[list(places)]
        scores, leaf, length, _, _, _, last, pending, base, _, spent = of_rows.split(widths, dim=1)
        _, _, _, path, drafted, slot, accepted, _, _, begun, _ = status.long().split(widths, dim=1)
        waiting = pending[:, 0].long().tolist()
        for index, committed, wait in zip(indices, base[:, 0].long().tolist(), waiting, strict=True):
            self.decoder.rows.row(index).position = committed + wait
        none = slot[:, :0]
        gain = Gain(none, length.long(), leaf.long(), None, last[:, 0].long(), none)
        children = Children(none, none)
        tree = DraftTree(none, drafted, none, none, none, none, slot, none, none, children)
        return Told(scores, gain, waiting, tree, Verdict(path, accepted[:, 0]), begun[:, 0].tolist(), int(spent.sum()))


class _Staged:
    """A tensor on the device and its mirror on the host (pinned, so that the copies between them need no wait of their
    own). Every use lays [rows, width] at its beginning, without gaps."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int) -> None:
        self.device = torch.zeros(size, dtype=dtype, device=device)
        self.host = torch.zeros(size, dtype=dtype, pin_memory=device.type == "cuda")

    def on_device(self, rows: int, width: int) -> Tensor:
        return self.device[: rows * width].view(rows, width)

    def on_host(self, rows: int, width: int) -> Tensor:
        return self.host[: rows * width].view(rows, width)

    def send(self, size: int) -> None:
        """Host to device. The host writes again only after the status of the program that reads it has come back."""
        self.device[:size].copy_(self.host[:size], non_blocking=True)

    def fetch(self, rows: int, width: int) -> Tensor:
        """Device to host. This is the one place where the host waits for the device."""
        self.on_host(rows, width).copy_(self.on_device(rows, width), non_blocking=True)
        if self.device.is_cuda:
            torch.cuda.current_stream(self.device.device).synchronize()
        return self.on_host(rows, width)


def _within(room: int, pending: Tensor, tree: DraftTree) -> tuple[DraftTree, Tensor]:
    """The tree without the nodes that find no room among n tokens, and the lengths [B, 1 + M] of all runs. What comes
    after such a node is dropped with it, so no node loses its parent."""
    length = torch.cat([pending, tree.length], dim=1)
    length = length * (length.cumsum(1) <= room)
    return tree._replace(length=length[:, 1:]), length
