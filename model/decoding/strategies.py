"""Strategies: list and beam requests behind one decoder's interface, so that one engine serves both.

Both decoders hold as many rows as there are in all, and requests take the rows they need: a mixed load is never
refused while any row is free. Each has its own cache: a list grows behind its prompt, beams lie beside each other.
They advance in turn, a round of one and then a round of the other, because a list's round and a pass over beams have
nothing to share but the clock. Knows nothing of queues, deadlines or sockets.
"""

from collections.abc import Sequence

from model.decoding.beam_decoder import BeamDecoder
from model.decoding.beam_request import MAX_BEAMS, BeamRequest, BeamStats
from model.decoding.filters import Stock
from model.decoding.list_decoder import ListDecoder
from model.decoding.request import ListRequest, ListResult, RoundStats

Asked = ListRequest | BeamRequest
Stats = RoundStats | BeamStats


def beams_of(requests: Sequence[ListRequest]) -> list[BeamRequest]:
    """The same, asked of a beam search."""
    return [
        BeamRequest(f"{r.request_id}-beam", r.history, min(r.k, MAX_BEAMS), exclude_history=r.exclude_history)
        for r in requests
    ]


class SharedRows:
    """The rows of both: list rows come first, beam rows are numbered behind them."""

    def __init__(self, lists: ListDecoder, beams: BeamDecoder) -> None:
        self.lists, self.beams = lists, beams
        self.num_rows = len(lists.rows.held)
        assert len(beams.rows.held) >= self.num_rows, "every row may hold beams"

    @property
    def held(self) -> list[object]:
        """What holds a row, None for a free one: as many entries as there are rows."""
        taken = [row for row in (*self.lists.rows.held, *self.beams.rows.held) if row is not None]
        return [*taken, *[None] * (self.num_rows - len(taken))]

    @property
    def num_free(self) -> int:
        return self.num_rows - len(self.in_use)

    @property
    def in_use(self) -> list[int]:
        return [*self.lists.rows.in_use, *(self.num_rows + i for i in self.beams.rows.in_use)]

    def free(self, index: int) -> None:
        if index < self.num_rows:
            self.lists.rows.free(index)
        else:
            self.beams.rows.free(index - self.num_rows)

    def check_integrity(self) -> None:
        """Nothing leaks in either."""
        self.lists.rows.check_integrity()
        self.beams.rows.check_integrity()


class Strategies:
    """One decoder for both strategies. Not thread-safe: one thread calls it."""

    def __init__(self, lists: ListDecoder, beams: BeamDecoder) -> None:
        assert lists.trie is beams.trie, "both write items of one catalog"
        self.lists, self.beams, self.trie = lists, beams, lists.trie
        self.rows = SharedRows(lists, beams)
        self._beams_next = False

    def validate(self, request: Asked) -> None:
        """Raises InvalidRequest for content that cannot be decoded."""
        if isinstance(request, BeamRequest):
            self.beams.validate(request)
        else:
            self.lists.validate(request)

    def set_stock(self, stock: Stock | None) -> None:
        """What requests that get a row from now on may be given; None: everything."""
        self.lists.set_stock(stock)
        self.beams.set_stock(stock)

    def cancel(self, request_id: str) -> bool:
        """Free the row of a request; whether there was one."""
        return self.lists.cancel(request_id) or self.beams.cancel(request_id)

    def admit(self, requests: Sequence[Asked]) -> list[ListResult]:
        """Give each (validated) request a row and read its prompt. Returns the answers that are complete already."""
        assert len(requests) <= self.rows.num_free, f"{len(requests)} requests for {self.rows.num_free} free rows"
        lists = [request for request in requests if isinstance(request, ListRequest)]
        beams = [request for request in requests if isinstance(request, BeamRequest)]
        finished: list[ListResult] = []
        if lists:
            finished += self.lists.admit(lists)
        if beams:
            finished += self.beams.admit(beams)
        return finished

    def round(self) -> tuple[list[ListResult], Stats]:
        """Advance the list rows or the beam rows, in turn where there are both."""
        self._beams_next = bool(self.beams.rows.in_use) and (self._beams_next or not self.lists.rows.in_use)
        if self._beams_next:
            self._beams_next = False
            found, stats = self.beams.round()
            return list[ListResult](found), stats
        self._beams_next = True
        return self.lists.round()
