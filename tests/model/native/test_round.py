"""A compiled round does what the tensors do, to the last count."""

from dataclasses import fields, replace

import pytest
import torch

from model.decoding.list_decoder import ListDecoder
from model.decoding.offline import Decoded, decode_all
from model.decoding.request import ListRequest, RoundStats
from model.decoding.topology import Budget, FixedBudget, table_of
from model.native.round import Prompt
from tests.model.conftest import Tiny
from tests.model.decoding.test_list_decoder import MODES, mixed, some_requests

COUNTS = ("rows", "draft_tokens", "accepted_tokens", "forced_tokens", "target_tokens", "drafted_by_step")
COUNTS = (*COUNTS, "accepted_by_step", "drafted_by_slot", "accepted_by_slot", "tried", "passed", "prompts_read")


def decoder(
    tiny: Tiny, budget: Budget, forced: bool, *, native: bool, prefill_tokens: int | None = None
) -> ListDecoder:
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
        prefill_tokens=prefill_tokens,
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


def all_tensors(running: ListDecoder) -> dict[str, torch.Tensor]:
    """What a round begins with, of rows in use."""
    state, busy, cache = running.rows.state(), running.rows.in_use, running.draft_cache
    assert cache is not None
    kept = {name: getattr(state, name)[busy] for name in state._fields if name != "passing"}
    drafted = [i for i in busy if running.rows.row(i).drafts]
    # Of others nobody looks at these.
    for name in ("fresh_tokens", "fresh_length", "fresh_feature"):
        kept[name] = getattr(state, name)[drafted, :1]
    for tokens, length in (("pending_tokens", "pending_length"), ("fresh_tokens", "fresh_length")):
        kept[tokens] = kept[tokens] * (torch.arange(kept[tokens].shape[-1]) < kept[length].unsqueeze(-1))
    positions = [int(running.rows.base[i]) for i in drafted]
    for index, end in zip(drafted, positions, strict=True):
        kept[f"draft of row {index}"] = cache.data[:, :, index, :, :end]
    return kept


@pytest.mark.parametrize("prefill_tokens", [None, 7, 40])
@pytest.mark.parametrize("forced", [True, False])
def test_prompts_leave_the_rows_and_caches_as_the_tensors_leave_them(
    tiny: Tiny, prefill_tokens: int | None, forced: bool
) -> None:
    """Whole or in pieces, of requests that are drafted for and of others, greedy and drawn."""
    requests = [
        replace(request, speculation=i % 3 != 1, seed=i, temperature=float(i % 2))
        for i, request in enumerate(mixed(tiny, 5))
    ]
    found = []
    for native in (True, False):
        running = decoder(tiny, Budget(2), forced, native=native, prefill_tokens=prefill_tokens)
        running.admit(requests)
        while running._unread:
            running._read_prompts()
        found.append(all_tensors(running))
        found[-1]["items"] = torch.tensor([[row.score, len(row.items)] for row in running.rows.held if row])
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("change", [{"row": 5}, {"row": -1}, {"start": -1}, {"start": 9_999}, {"tokens": (9_999,)}])
def test_prompts_outside_a_table_are_refused(tiny: Tiny, change: dict[str, object]) -> None:
    running = decoder(tiny, Budget(2), True, native=True)
    table = table_of(Budget(1), tiny.trie.num_levels, tiny.trie.device)
    assert running.native is not None and table is not None
    fine = Prompt(0, 0, (1, 2), True, 0, None)
    assert running.native.read([fine], running.rows.state(), table, True)[0].length > 0
    with pytest.raises(IndexError, match="outside"):
        running.native.read([fine._replace(**change)], running.rows.state(), table, True)  # type: ignore[arg-type]
