"""A compiled pass over beams does what the tensors do, to the last count."""

from dataclasses import asdict

import pytest
import torch

from model.decoding.beam_decoder import BeamDecoder
from model.decoding.beam_plan import ATSPEED, DRAFT_FREE, TREE_ATTENTION, Plan
from model.decoding.beam_request import BeamRequest, BeamResult, BeamStats
from model.draft.draft import Draft
from model.native.beams import Asked
from model.native.search import SearchAsked
from model.target import Target
from tests.model.conftest import Tiny
from tests.model.decoding.test_beam_decoder import (
    GUESS_AND_BELOW,
    Whim,
    decode_all,
    decoder,
    drafts,
    other_tiny,
    relaxed,
    small_model,
    some_requests,
)

CLOCKS = ("draft_seconds", "verify_seconds")


def both(
    tiny: Tiny, *plans: Plan, draft: Draft | Target | None, max_nodes: int = 64
) -> tuple[BeamDecoder, BeamDecoder]:
    """The compiled one and the tensors, with a plan each: plans learn."""
    compiled, tensors = (decoder(tiny, plan, draft, max_nodes=max_nodes) for plan in plans)
    if compiled.native is None:
        pytest.skip("no compiled kernel here")
    tensors.native = tensors.native_search = None
    return compiled, tensors


def assert_equal(
    requests: list[BeamRequest],
    compiled: tuple[dict[str, BeamResult], list[BeamStats]],
    tensors: tuple[dict[str, BeamResult], list[BeamStats]],
) -> None:
    for request in requests:
        got, right = compiled[0][request.request_id], tensors[0][request.request_id]
        assert [i.codes for i in got.items] == [i.codes for i in right.items]
        assert [i.score for i in got.items] == pytest.approx([i.score for i in right.items], abs=1e-4)
        assert (got.speculation, got.lossy, got.degraded) == (right.speculation, right.lossy, right.degraded)
    counts = [[{k: v for k, v in asdict(s).items() if k not in CLOCKS} for s in of[1]] for of in (compiled, tensors)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("plan", [TREE_ATTENTION, DRAFT_FREE, ATSPEED, GUESS_AND_BELOW], ids=lambda plan: plan.name)
@pytest.mark.parametrize("draft", ["none", "padrec", "model"])
def test_a_compiled_pass_counts_and_scores_as_the_tensors_do(tiny: Tiny, plan: Plan, draft: str) -> None:
    requests = some_requests(tiny, 16)
    compiled, tensors = both(tiny, plan, plan, draft=drafts(tiny)[draft])
    assert_equal(requests, decode_all(compiled, requests), decode_all(tensors, requests))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sizes", [(40, 2, 1), (2, 2, 2, 8), (1, 5, 5), (9,), (4, 9)])
def test_whatever_rides_along_over_tries_of_any_shape(seed: int, sizes: tuple[int, ...]) -> None:
    strange = other_tiny(seed, sizes)
    requests = some_requests(strange, 8, seed)
    draft = small_model(strange) if seed % 2 else None
    compiled, tensors = both(strange, Whim(seed), Whim(seed), draft=draft, max_nodes=(0, 3, 64)[seed % 3])
    assert_equal(requests, decode_all(compiled, requests), decode_all(tensors, requests))


@pytest.mark.parametrize("plan", [ATSPEED, GUESS_AND_BELOW], ids=lambda plan: plan.name)
@pytest.mark.parametrize("draft", ["padrec", "adversarial", "model", "the target itself"])
@pytest.mark.parametrize("replacement", [False, True])
def test_relaxed_rows_keep_what_the_tensors_keep_beside_strict_ones(
    tiny: Tiny, plan: Plan, draft: str, replacement: bool
) -> None:
    strict = [BeamRequest(f"s{i}", (code,), 5) for i, code in enumerate(tiny.codes[:16])]
    requests = [r for pair in zip(relaxed(tiny, 16, replacement), strict, strict=True) for r in pair]
    compiled, tensors = both(tiny, plan, plan, draft=drafts(tiny)[draft])
    results = decode_all(compiled, requests)
    assert any(result.lossy for result in results[0].values())
    assert_equal(requests, results, decode_all(tensors, requests))


@pytest.mark.parametrize("replacement", [False, True])
def test_a_compiled_search_drafts_what_the_tensors_draft(tiny: Tiny, replacement: bool) -> None:
    requests = [*relaxed(tiny, 2, replacement), *some_requests(tiny, 2, seed=1)]
    compiled, tensors = both(tiny, ATSPEED, ATSPEED, draft=tiny.draft())
    assert compiled.native_search is not None
    for running in (compiled, tensors):
        running.admit(requests)
    for index in tensors.rows.in_use:
        one, other = compiled.rows.row(index), tensors.rows.row(index)
        assert one.guessed is not None and other.guessed is not None
        assert one.guessed.tolist() == other.guessed.tolist()
        assert one.drafted.keys() == other.drafted.keys() == ({1, 2} if index < 2 else set())
        for level, drafted in one.drafted.items():
            assert drafted.nodes.tolist() == other.drafted[level].nodes.tolist() != []
            torch.testing.assert_close(drafted.joint, other.drafted[level].joint, atol=1e-4, rtol=0)


def test_hidden_states_are_the_same_to_the_last_bit(tiny: Tiny) -> None:
    """Also where those of the prompt's other tokens are left out."""
    requests = some_requests(tiny, 4)
    compiled, tensors = both(tiny, DRAFT_FREE, DRAFT_FREE, draft=None)
    for running in (compiled, tensors):
        running.admit(requests)
    assert torch.equal(compiled.rows.last, tensors.rows.last)
    assert torch.equal(compiled.rows.nodes, tensors.rows.nodes)
    assert torch.equal(compiled.rows.hidden, tensors.rows.hidden)


@pytest.mark.parametrize(
    "change",
    [
        {"row": 4},
        {"row": -1},
        {"wanted": 31},
        {"level": 9},
        {"beams": 31},
        {"limit": 10_000},
        {"prompt": range(500)},
        {"prompt": (10_000,)},
        {"guessed": torch.tensor([-1])},
        {"guessed": torch.tensor([10_000])},
        {"deepest": 1},
    ],
)
def test_numbers_outside_a_table_are_refused(tiny: Tiny, change: dict[str, object]) -> None:
    running = both(tiny, TREE_ATTENTION, TREE_ATTENTION, draft=None)[0]
    fine = Asked(0, 3, 0, 0, False, 9, False, (1, 2, 3), None, 0, 0, False, {})
    assert running.native is not None
    assert running.native([fine], running.rows.state())[0][0].beams == 3
    with pytest.raises(IndexError, match="outside"):
        running.native([fine._replace(**change)], running.rows.state())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change", [{"row": 4}, {"prompt": ()}, {"prompt": range(500)}, {"prompt": (10_000,)}, {"beams": 31}, {"beams": 3}]
)
def test_a_search_from_outside_a_table_is_refused(tiny: Tiny, change: dict[str, object]) -> None:
    running = both(tiny, TREE_ATTENTION, TREE_ATTENTION, draft=tiny.draft())[0]
    fine = SearchAsked(0, (1, 2, 3), 2, 5, [torch.zeros(3, 32) for _ in range(3)])
    running.rows.beam[0, :2], running.rows.score[0, :2] = torch.tensor([2, 3]), torch.tensor([-1.0, -2.0])
    search, state = running.native_search, running.rows.state()
    assert search is not None
    assert len(search([fine], state, 1, 2)[0].nodes) == 10
    with pytest.raises(IndexError, match="outside"):
        search([fine._replace(**change)], state, 1, 2)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="outside"):
        search([fine], state, 1, 9)
