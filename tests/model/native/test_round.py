"""A compiled round does what the tensors do, to the last count."""

from dataclasses import fields

import pytest
import torch

from model.decoding.list_decoder import ListDecoder
from model.decoding.offline import Decoded, decode_all
from model.decoding.request import ListRequest, RoundStats
from model.decoding.topology import Budget, FixedBudget
from tests.model.conftest import Tiny
from tests.model.decoding.test_list_decoder import MODES, mixed, some_requests

COUNTS = ("rows", "draft_tokens", "accepted_tokens", "forced_tokens", "target_tokens", "drafted_by_step")
COUNTS = (*COUNTS, "accepted_by_step", "drafted_by_slot", "accepted_by_slot", "tried", "passed")


def decoder(tiny: Tiny, budget: Budget, forced: bool, *, native: bool) -> ListDecoder:
    made = ListDecoder(
        tiny.target,
        tiny.draft(),
        tiny.trie,
        tiny.catalog,
        num_rows=5,
        max_history_items=6,
        max_k=20,
        budget=FixedBudget(budget),
        forced=forced,
    )
    if made.native is None:
        pytest.skip("no compiled kernel here")
    if not native:
        made.native = None
    return made


def decoded(tiny: Tiny, mode: str, requests: list[ListRequest], *, native: bool) -> Decoded:
    return decode_all(decoder(tiny, *MODES[mode], native=native), requests)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "tree"])
@pytest.mark.parametrize("choosing", [some_requests, mixed], ids=["greedy", "mixed"])
def test_a_compiled_round_counts_and_scores_as_the_tensors_do(tiny: Tiny, mode: str, choosing: object) -> None:
    assert callable(choosing)
    requests = choosing(tiny, 16)
    compiled, tensors = (decoded(tiny, mode, requests, native=native) for native in (True, False))
    for request in requests:
        got, right = compiled.results[request.request_id], tensors.results[request.request_id]
        assert [i.codes for i in got.items] == [i.codes for i in right.items]
        assert [i.score for i in got.items] == pytest.approx([i.score for i in right.items], abs=1e-4)
        assert got.speculation == right.speculation
    assert len(compiled.rounds) == len(tensors.rounds)
    for got_round, right_round in zip(compiled.rounds, tensors.rounds, strict=True):
        assert {name: getattr(got_round, name) for name in COUNTS} == {
            name: getattr(right_round, name) for name in COUNTS
        }


def test_every_count_is_compared() -> None:
    assert {f.name for f in fields(RoundStats)} - set(COUNTS) == {"draft_seconds", "verify_seconds"}


def test_a_row_that_points_outside_the_trie_is_refused(tiny: Tiny) -> None:
    running = decoder(tiny, Budget(2), True, native=True)
    running.admit(some_requests(tiny, 1))
    running.rows.node[0] = tiny.trie.num_nodes
    with pytest.raises(IndexError, match="outside"):
        running.round()


def test_rows_after_a_compiled_round_hold_what_the_tensors_hold(tiny: Tiny) -> None:
    requests = some_requests(tiny, 4)
    pair = [decoder(tiny, *MODES["static"], native=native) for native in (True, False)]
    for running in pair:
        running.admit(requests)
        for _ in range(2):
            running.round()
    left, right = (running.rows.state() for running in pair)
    for name in ("base", "node", "remaining", "draftable", "written", "pending_length", "fresh_length", "excluded"):
        busy = pair[0].rows.in_use
        assert torch.equal(getattr(left, name)[busy], getattr(right, name)[busy]), name
