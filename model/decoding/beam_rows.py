"""BeamRows: the state of the beam requests being decoded, as tensors with one row a request, and what the host knows.

A row keeps every node it has ever passed over, with its hidden state: where node j of a row lies in the KV cache is
where its prompt ends, plus j. So nothing is computed twice, a guess that came too early is a hit later, and nothing in
the cache is ever moved. Knows nothing of passes.

Shapes: R rows, T nodes a row, W the widest beam, E exclusions a row, d hidden size, n nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from model.decoding.beam_choice import Beams
from model.decoding.beam_request import BeamRequest, BeamResult
from model.decoding.beam_tree import BeamTree
from model.decoding.filters import FilterTable
from model.decoding.held_rows import HeldRows, scalars
from model.decoding.request import ScoredItem, SpeculationStats
from model.decoding.sampling import fresh_seed
from model.item_trie import Availability
from model.native.beams import BeamState, Drafted

Tensor = torch.Tensor


@dataclass
class BeamRow:
    """What the host knows of one request. `level`: how many codes its beams have; `alone`, `whole`: nodes to pass over
    next, without and with all sub-trees; `guessed` nodes a draft proposed for the next pass, which brings along the
    sub-trees below the last `deepest` of them; `drafted` what it searched, by level, kept only while verification is
    relaxed."""

    request: BeamRequest
    wanted: int
    filter_slot: int
    history_used: int
    degraded: tuple[tuple[str, str], ...]
    seed: int
    prompt: int = 0
    used: int = 0
    level: int = 0
    beams: int = 0
    settled: bool = False
    alone: int = 0
    whole: int = 0
    guessed: Tensor | None = None
    deepest: int = 0
    drafted: dict[int, Drafted] = field(default_factory=dict)
    lossy: bool = False
    rounds: int = 0
    draft_tokens: int = 0
    accepted: int = 0
    forced: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Known:
    """The nodes some rows have passed over, in the order of a search."""

    def __init__(self, nodes: Tensor, nowhere: int) -> None:
        """`nodes` [B, n] by where they lie, padded with `nowhere`."""
        self.nowhere = nowhere
        self._nodes, self._places = nodes.sort(dim=1)

    def find(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Where `nodes` [B, M] lie, and whether they do. What pads is never found."""
        count = self._nodes.shape[1]
        if not count:
            return torch.zeros_like(nodes), torch.zeros_like(nodes, dtype=torch.bool)
        place = torch.searchsorted(self._nodes, nodes.contiguous()).clamp_(max=count - 1)
        return self._places.gather(1, place), (self._nodes.gather(1, place) == nodes) & (nodes != self.nowhere)


class BeamRows(HeldRows[BeamRow]):
    """Rows of beam requests."""

    prompt: Tensor
    used: Tensor
    filter_slot: Tensor

    def __init__(
        self, num_rows: int, tree: BeamTree, filters: FilterTable, max_history_items: int, room: int, size: int, k: int
    ) -> None:
        """`room` T nodes, `size` d, `k` W."""
        trie = tree.trie
        super().__init__(num_rows, trie, filters, max_history_items)
        self.tree, self.room = tree, room
        self._counts = torch.zeros(3, num_rows, dtype=torch.int64, device=trie.device)
        self.prompt, self.used, self.filter_slot = self._counts
        self.nodes = self._counts.new_full((num_rows, room), tree.nowhere)
        self.hidden = torch.zeros(num_rows, room, size, device=trie.device)
        self.last = torch.zeros(num_rows, size, device=trie.device)
        self.beam = self._counts.new_full((num_rows, k), tree.nowhere)
        self.score = torch.zeros(num_rows, k, device=trie.device)
        self._state: BeamState | None = None
        self._views = [scalars(of) for of in (self._counts, self.nodes, self.beam, self.score)]

    def state(self) -> BeamState:
        """The rows' tensors as a compiled pass takes them: the same object as long as they are the same."""
        known = self._state
        if known is None or known.excluded is not self.excluded or known.passing is not self.filters.passing:
            changed = (self.prompt, self.used, self.nodes, self.beam, self.hidden, self.last, self.score)
            known = self._state = BeamState(*changed, self.excluded, self.filter_slot, self.filters.passing)
        return known

    def may(self, rows: Tensor) -> Availability:
        return Availability(self.filters.passing, self.filter_slot[rows], self.excluded[rows])

    def place(self, request: BeamRequest) -> int:
        """Give a validated request a free row."""
        index = self.held.index(None)
        share = self._share(request)
        # A strict answer draws nothing.
        relaxed = request.verification == "relaxed"
        seed = request.seed if request.seed is not None else fresh_seed() if relaxed else 0
        self.held[index] = BeamRow(request, share.wanted, share.filter_slot, share.history_used, share.degraded, seed)
        self._reserve_exclusions(len(share.leaves))
        self._exclude(index, share.leaves)
        self._views[0][2, index] = share.filter_slot
        return index

    def known(self, rows: Tensor, indices: Sequence[int]) -> Known:
        """What `rows` (on the host: `indices`) have passed over."""
        return Known(self.nodes[rows, : max(self.row(i).used for i in indices)], self.tree.nowhere)

    def hidden_at(self, rows: Tensor, places: Tensor) -> Tensor:
        """[B, M, d] at `places` [B, M] of `rows` [B]."""
        return self.hidden.flatten(0, 1)[rows[:, None] * self.room + places]

    def move(self, rows: Tensor, beams: Beams) -> None:
        """`rows` [B] go on with `beams`."""
        width = beams.nodes.shape[1]
        self.beam[rows, :width], self.beam[rows, width:] = beams.nodes, self.tree.nowhere
        self.score[rows, :width] = beams.scores

    def finish(self, index: int) -> BeamResult:
        """The items of a row whose beams are leaves; it is free afterwards."""
        row, trie = self.row(index), self.tree.trie
        _, _, nodes, scores = self._views
        beams = zip(nodes[index, : row.beams].tolist(), scores[index, : row.beams].tolist(), strict=True)
        best = sorted(beams, key=lambda beam: -beam[1])  # stable: ties stay in the order of their codes
        codes = trie.sorted_codes[[node - trie.first_leaf for node, _ in best]].tolist()
        items = tuple(ScoredItem(tuple(found), score) for found, (_, score) in zip(codes, best, strict=True))
        stats = SpeculationStats(row.rounds, row.draft_tokens, row.accepted, row.forced)
        self.free(index)
        return BeamResult(
            row.request.request_id,
            items if row.wanted else (),
            stats,
            row.history_used,
            row.degraded,
            prefill_seconds=row.prefill_seconds,
            decode_seconds=row.decode_seconds,
            lossy=row.lossy,
        )

    def free(self, index: int) -> None:
        self.filters.release(self.row(index).filter_slot)
        self.held[index] = None
        counts, nodes, beam, _ = self._views
        counts[:, index] = 0
        nodes[index] = beam[index] = self.tree.nowhere
        self._excluded[index] = self.tree.trie.num_items

    def check_integrity(self) -> None:
        """Nothing leaks: free rows hold nothing, filters are held by rows only."""
        self._check_filters()
        for index, row in enumerate(self.held):
            empty = int(self.used[index]) == 0 and bool((self.nodes[index] == self.tree.nowhere).all())
            empty &= bool((self.excluded[index] == self.tree.trie.num_items).all())
            assert row is not None or empty, f"row {index} is free but holds nodes or exclusions"
