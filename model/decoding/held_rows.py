"""HeldRows: what rows of lists and of beams have in common: who holds one, what he may not have, how he leaves.

Knows requests, filters and the item trie; nothing of passes, nor of how an answer grows.

Shapes: R rows, E exclusions a row.
"""

from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from model.decoding.beam_request import BeamRequest
from model.decoding.filters import FilterTable
from model.decoding.request import InvalidRequest, ListRequest
from model.decoding.sampling import MAX_SEED
from model.item_trie import ItemTrie
from model.semantic_id import Codes

Tensor = torch.Tensor


class Holder(Protocol):
    """What a row knows of its request."""

    @property
    def request(self) -> ListRequest | BeamRequest: ...

    @property
    def filter_slot(self) -> int: ...


R = TypeVar("R", bound=Holder)


def scalars(tensor: Tensor) -> Any:
    """A tensor to write a few numbers into: on a CPU a view of the same memory, as NumPy does that in a tenth of the
    time."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


class Share(NamedTuple):
    """What a request may be given: the `leaves` it may not have (of those its filter passes), the slot of its filter,
    how many items are `wanted` and there, how many of its history are read, and in what the answer is less."""

    leaves: npt.NDArray[np.int64]
    filter_slot: int
    wanted: int
    history_used: int
    degraded: tuple[tuple[str, str], ...]


class HeldRows(ABC, Generic[R]):
    """Fixed rows; `held` says by what. `excluded` [R, E] are the leaves each may not emit, ascending and padded."""

    def __init__(
        self,
        num_rows: int,
        trie: ItemTrie,
        filters: FilterTable,
        max_history_items: int,
        *,
        spare: int = 0,
        width: int = 64,
    ) -> None:
        """`spare` rows of the tables are nobody's; `width`: E, as long as no request needs more."""
        self.trie, self.filters, self.max_history_items = trie, filters, max_history_items
        self.held: list[R | None] = [None] * num_rows
        self._exclude_by(torch.full((num_rows + spare, width), trie.num_items, dtype=torch.int64, device=trie.device))

    @property
    def num_free(self) -> int:
        return self.held.count(None)

    @property
    def in_use(self) -> list[int]:
        return [i for i, row in enumerate(self.held) if row is not None]

    def row(self, index: int) -> R:
        row = self.held[index]
        assert row is not None, f"row {index} is free"
        return row

    @abstractmethod
    def free(self, index: int) -> None:
        """Nobody holds the row any more."""

    def cancel(self, request_id: str) -> bool:
        """Free the row of a request; whether there was one."""
        for index in self.in_use:
            if self.row(index).request.request_id == request_id:
                self.free(index)
                return True
        return False

    def check_items(self, request: ListRequest | BeamRequest) -> None:
        """Raises InvalidRequest where history or exclusions cannot be decoded with."""
        if not request.history:
            raise InvalidRequest("/history", "needs at least one item")
        for name, items in (("history", request.history), ("exclude", request.exclude)):
            if any(self.trie.leaf(codes) is None for codes in items):
                raise InvalidRequest(f"/{name}", "names an item that is not in this catalog version")

    def check_lot(self, request: ListRequest | BeamRequest) -> None:
        """Raises InvalidRequest where the seed or a filter cannot be decoded with."""
        if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
            raise InvalidRequest("/seed", f"must lie between 0 and {MAX_SEED}")
        self.filters.check(request.filters)

    def _share(self, request: ListRequest | BeamRequest) -> Share:
        """Of a validated request; the slot of its filter is its own until it is released."""
        banned = set(request.exclude) | (set(request.history) if request.exclude_history else set())
        leaves = np.array(sorted(map(self._leaf, banned)), dtype=np.int64)
        slot = self.filters.acquire(request.filters)
        passing = self.trie.num_items
        if slot:  # slot 0 is no filter
            counts = self.filters.counts(slot)
            nodes = self.trie.first_leaf + leaves
            leaves = leaves[counts[nodes + 1] > counts[nodes]]
            passing = int(counts[-1])
        available = passing - len(leaves)
        degraded = []
        if available < request.k:
            degraded.append(("fewer_items", f"Only {available} items pass the filters and exclusions."))
        used = min(len(request.history), self.max_history_items)
        return Share(leaves, slot, min(request.k, available), used, tuple(degraded))

    def _exclude(self, index: int, leaves: npt.NDArray[np.int64]) -> None:
        """Of a row that has been free: it excludes nothing."""
        on_host = isinstance(self._excluded, np.ndarray)
        self._excluded[index, : len(leaves)] = leaves if on_host else torch.from_numpy(leaves).to(self.excluded.device)

    def _exclude_by(self, excluded: Tensor) -> None:
        self.excluded, self._excluded = excluded, scalars(excluded)

    def _reserve_exclusions(self, count: int) -> None:
        rows, width = self.excluded.shape
        if count > width:
            # A tensor made in inference mode could not be changed outside of it, where requests are cancelled.
            with torch.inference_mode(False):
                more = self.excluded.new_full((rows, count + 63 - width), self.trie.num_items)
                self._exclude_by(torch.cat([self.excluded, more], dim=1))

    def _check_filters(self) -> None:
        filtered = sum(1 for row in self.held if row is not None and row.filter_slot)
        assert self.filters.in_use == filtered, f"{self.filters.in_use} filters held by {filtered} rows"

    def _leaf(self, codes: Codes) -> int:
        leaf = self.trie.leaf(codes)
        assert leaf is not None, "validated before"
        return leaf
