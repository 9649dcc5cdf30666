import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from model.decoding.beam_decoder import BeamDecoder
from model.decoding.beam_plan import ATSPEED, DRAFT_FREE, TREE_ATTENTION, Ahead, FixedPlan, Plan, Question, Seen
from model.decoding.beam_request import BeamRequest, BeamResult, BeamStats
from model.decoding.beam_twin import BeamTwin
from model.decoding.request import CategoryFilter, InvalidRequest, RangeFilter
from model.draft.draft import Draft
from model.item_trie import ItemTrie
from model.semantic_id import Vocabulary
from model.target import Target
from tests.model.conftest import Tiny, random_catalog
from tests.model.decoding.company import in_any_company

NEAR_TIE = 1e-4  # nats: nearer choices than this are the rounding's
GUESS_AND_BELOW = FixedPlan("atspeed and below", Ahead.DRAFT, draft_to=2, below=True)


class Whim:
    """A plan that answers anything, to find what does not fit together."""

    name, draft_to, below = "whim", 3, True

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def ahead(self, question: Question) -> Ahead:
        ways = [Ahead.NOTHING]
        ways += [Ahead.WHOLE] * (question.whole is not None) + [Ahead.DRAFT] * question.draft
        return self.rng.choice(ways)

    def observe(self, seen: Seen) -> None:
        assert seen.nodes >= 0


def small_model(tiny: Tiny, seed: int = 5) -> Target:
    """An independent language model over the same items, which knows nothing of them."""
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=tiny.target.vocabulary.size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
    )
    return Target(AutoModelForCausalLM.from_config(shape), tiny.target.vocabulary)


def drafts(tiny: Tiny) -> dict[str, Draft | Target | None]:
    return {
        "none": None,
        "padrec": tiny.draft(),
        "adversarial": tiny.draft(adversarial=True),
        "model": small_model(tiny),
        "the target itself": tiny.target,
    }


def decoder(
    tiny: Tiny,
    plan: Plan,
    draft: Draft | Target | None = None,
    *,
    num_rows: int = 4,
    max_k: int = 30,
    width: int = 12,
    max_nodes: int = 64,
) -> BeamDecoder:
    return BeamDecoder(
        tiny.target,
        tiny.trie,
        tiny.catalog,
        num_rows=num_rows,
        max_history_items=6,
        max_k=max_k,
        plan=plan,
        draft=draft,
        draft_width=width,
        max_nodes=max_nodes,
    )


def some_requests(tiny: Tiny, count: int, seed: int = 0, most: int = 30) -> list[BeamRequest]:
    rng = random.Random(seed)
    requests = []
    for i in range(count):
        filters: dict[str, CategoryFilter | RangeFilter] = {}
        if i % 3 == 1:
            filters["genre"] = CategoryFilter(("a", "b"))
        if i % 4 == 2:
            filters["year"] = RangeFilter(1991, 1995)
        requests.append(
            BeamRequest(
                str(i),
                tuple(rng.choices(tiny.codes, k=rng.randrange(1, 9))),
                rng.choice([k for k in (1, 2, 5, 10, 30, 200) if k <= most]),
                tuple(rng.choices(tiny.codes, k=5)),
                exclude_history=i % 5 != 0,
                filters=filters,
                speculation=i % 6 != 5,
            )
        )
    return requests


def decode_all(running: BeamDecoder, requests: Sequence[BeamRequest]) -> tuple[dict[str, BeamResult], list[BeamStats]]:
    results: dict[str, BeamResult] = {}
    waiting, rounds = list(requests), []
    while len(results) < len(requests):
        entering, waiting = waiting[: running.rows.num_free], waiting[running.rows.num_free :]
        finished = running.admit(entering) if entering else []
        if running.rows.in_use:
            more, stats = running.round()
            finished += more
            rounds.append(stats)
        results |= {result.request_id: result for result in finished}
    running.rows.check_integrity()
    return results, rounds


def twin_and_margin(tiny: Tiny, request: BeamRequest) -> tuple[BeamResult, float]:
    allowed = {
        item.codes
        for item in tiny.catalog.items
        if all(passes(item.attributes[name], wanted) for name, wanted in request.filters.items())
    }
    twin = BeamTwin(tiny.target, tiny.codes, 6)
    return twin.decode(request, allowed), twin.margin


def passes(value: list[str] | float, wanted: CategoryFilter | RangeFilter) -> bool:
    if isinstance(wanted, CategoryFilter):
        return isinstance(value, list) and bool(set(value) & set(wanted.any_of))
    assert not isinstance(value, list) and wanted.minimum is not None and wanted.maximum is not None
    return wanted.minimum <= value <= wanted.maximum


def assert_same(tiny: Tiny, requests: Sequence[BeamRequest], results: dict[str, BeamResult]) -> None:
    near_ties = 0
    for request in requests:
        (expected, margin), got = twin_and_margin(tiny, request), results[request.request_id]
        assert not got.lossy
        if [i.codes for i in got.items] != [i.codes for i in expected.items]:
            assert margin < NEAR_TIE, request
            near_ties += 1
            continue
        for item, right in zip(got.items, expected.items, strict=True):
            assert item.score == pytest.approx(right.score, abs=1e-4)
    assert near_ties <= len(requests) / 3, "near-ties hide everything"


@pytest.mark.parametrize("plan", [TREE_ATTENTION, DRAFT_FREE, ATSPEED, GUESS_AND_BELOW], ids=lambda plan: plan.name)
@pytest.mark.parametrize("draft", ["none", "padrec", "adversarial", "model", "the target itself"])
def test_every_plan_returns_what_the_slow_twin_returns(tiny: Tiny, plan: Plan, draft: str) -> None:
    requests = some_requests(tiny, 12)
    assert_same(tiny, requests, decode_all(decoder(tiny, plan, drafts(tiny)[draft]), requests)[0])


def test_a_row_with_many_exclusions_can_be_cancelled(tiny: Tiny) -> None:
    """Room for them is made while a request is admitted, which is not where it is freed."""
    running = decoder(tiny, TREE_ATTENTION)
    running.admit([BeamRequest("r", tuple(tiny.codes[:3]), 3, exclude=tuple(tiny.codes[5:95]))])
    assert running.rows.in_use and running.cancel("r")
    running.rows.check_integrity()
    assert not running.rows.in_use


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), draft=st.sampled_from(["none", "padrec", "adversarial", "model"]))
def test_company_does_not_matter_whoever_joins_leaves_or_is_cancelled(tiny: Tiny, seed: int, draft: str) -> None:
    rng = random.Random(seed)
    requests = some_requests(tiny, 8, seed)
    running = decoder(tiny, Whim(seed), drafts(tiny)[draft], max_nodes=rng.choice([0, 3, 64]))
    results, cancelled = in_any_company(running, requests, rng)
    assert running.rows.num_free == 4
    assert_same(tiny, [r for r in requests if r.request_id not in cancelled], results)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000), sizes=st.sampled_from([(3, 3, 3), (40, 2, 1), (2, 2, 2, 8), (1, 5, 5), (9,), (4, 9)])
)
def test_random_catalogs_of_any_shape(seed: int, sizes: tuple[int, ...]) -> None:
    strange = other_tiny(seed, sizes)
    requests = some_requests(strange, 6, seed)
    for draft in (None, small_model(strange)):
        running = decoder(strange, Whim(seed), draft)
        assert_same(strange, requests, decode_all(running, requests)[0])


def other_tiny(
    seed: int,
    sizes: tuple[int, ...],
    native: bool = True,
    flat: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tiny:
    """Another random catalog and target; a `flat` target thinks everything equally likely."""
    catalog = random_catalog(seed, 60, sizes)
    vocabulary = Vocabulary.compact(sizes)
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(shape)
    if flat:
        model.lm_head.weight.data.zero_()
    codes = [item.codes for item in catalog.items]
    return Tiny(
        catalog, ItemTrie(np.array(codes), vocabulary), Target(model.to(dtype), vocabulary, native=native), codes
    )


@pytest.mark.parametrize("draft", ["none", "model"])
def test_where_torch_runs_the_layers_the_answers_are_the_same(draft: str) -> None:
    slow = other_tiny(3, (6, 6, 5, 4), native=False)
    assert slow.target.native is None
    requests = some_requests(slow, 12)
    running = decoder(slow, Whim(1), drafts(slow)[draft] if draft == "none" else small_model(slow))
    assert_same(slow, requests, decode_all(running, requests)[0])


@pytest.mark.parametrize("plan", [TREE_ATTENTION, DRAFT_FREE], ids=lambda plan: plan.name)
def test_equally_likely_items_come_in_the_order_of_their_codes(plan: Plan) -> None:
    flat = other_tiny(3, (4, 4, 4), flat=True)
    requests = [BeamRequest(str(k), (flat.codes[0],), k) for k in (1, 2, 3, 5, 8, 13, 21)]
    results, _ = decode_all(decoder(flat, plan, num_rows=3), requests)
    for request in requests:
        expected = twin_and_margin(flat, request)[0]
        assert [i.codes for i in results[request.request_id].items] == [i.codes for i in expected.items]


def test_two_hundred_beams_are_served(tiny: Tiny) -> None:
    request = BeamRequest("many", tuple(tiny.codes[:3]), 200)
    results, _ = decode_all(decoder(tiny, DRAFT_FREE, max_k=1000), [request])
    assert len(results["many"].items) == len(tiny.codes) - 3
    assert [code for code, _ in results["many"].degraded] == ["fewer_items"]
    assert_same(tiny, [request], results)


def test_nothing_left_to_recommend_is_an_empty_answer(tiny: Tiny) -> None:
    request = BeamRequest("none", (tiny.codes[0],), 5, tuple(tiny.codes))
    running = decoder(tiny, TREE_ATTENTION)
    assert running.admit([request])[0].items == ()
    running.rows.check_integrity()


def test_passes_levels_and_nodes_add_up(tiny: Tiny) -> None:
    requests = some_requests(tiny, 12)
    for plan in (TREE_ATTENTION, DRAFT_FREE, ATSPEED):
        results, rounds = decode_all(decoder(tiny, plan, tiny.draft()), requests)
        counts = [results[r.request_id].speculation for r in requests]
        assert all(c.rounds + c.accepted_tokens + c.forced_tokens == tiny.trie.num_levels - 1 for c in counts)
        assert sum(r.rows for r in rounds) == sum(c.rounds for c in counts)


def test_what_rides_along_saves_passes(tiny: Tiny) -> None:
    requests = [BeamRequest(str(i), (code,), 10) for i, code in enumerate(tiny.codes[:20])]

    def rounds(plan: Plan, draft: Draft | Target | None = None, width: int = 12) -> int:
        running = decoder(tiny, plan, draft, width=width, max_nodes=400)
        return sum(r.speculation.rounds for r in decode_all(running, requests)[0].values())

    alone = rounds(TREE_ATTENTION)
    assert rounds(DRAFT_FREE) == 20, "first codes in the prompt's pass, everything else in one more"
    assert rounds(ATSPEED, tiny.target, width=30) == 0, (
        "a draft that is the target is always right, in the prompt's pass"
    )
    assert rounds(GUESS_AND_BELOW, small_model(tiny)) <= alone
    assert rounds(ATSPEED, tiny.draft(adversarial=True)) <= alone


def test_speculation_can_be_refused_by_a_request(tiny: Tiny) -> None:
    request = BeamRequest("off", (tiny.codes[0],), 5, speculation=False)
    assert decode_all(decoder(tiny, DRAFT_FREE), [request])[0]["off"].speculation.draft_tokens == 0


@pytest.mark.parametrize(
    ("pointer", "change"),
    [
        ("/k", {"k": 31}),
        ("/k", {"k": 0}),
        ("/seed", {"seed": -1}),
        ("/seed", {"seed": 2**63}),
        ("/history", {"history": ()}),
        ("/history", {"history": ((9, 9, 9, 9),)}),
        ("/exclude", {"exclude": ((0, 0),)}),
        ("/filters", {"filters": {"colour": CategoryFilter(("red",))}}),
        ("/filters/genre", {"filters": {"genre": RangeFilter(1, 2)}}),
    ],
)
def test_bad_content_is_refused_by_name(tiny: Tiny, pointer: str, change: dict[str, object]) -> None:
    values: dict[str, object] = {"request_id": "bad", "history": (tiny.codes[0],), "k": 5} | change
    with pytest.raises(InvalidRequest) as caught:
        decoder(tiny, TREE_ATTENTION).validate(BeamRequest(**values))  # type: ignore[arg-type]
    assert caught.value.pointer == pointer


# ---- relaxed --------------------------------------------------------------------------------------------------


def relaxed(tiny: Tiny, count: int, replacement: bool, seed: int | None = 3) -> list[BeamRequest]:
    return [
        BeamRequest(str(i), (code,), 1 + i % 10, verification="relaxed", replacement=replacement, seed=seed)
        for i, code in enumerate(tiny.codes[:count])
    ]


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("draft", ["padrec", "adversarial", "model"])
def test_relaxed_answers_are_valid_distinct_whole_and_say_that_they_are_lossy(
    tiny: Tiny, replacement: bool, draft: str
) -> None:
    requests = relaxed(tiny, 16, replacement)
    results, rounds = decode_all(decoder(tiny, ATSPEED, drafts(tiny)[draft]), requests)
    for request in requests:
        codes = [item.codes for item in results[request.request_id].items]
        assert len(codes) == len(set(codes)) == request.k
        assert set(codes) <= set(tiny.codes) - set(request.history)
        assert results[request.request_id].lossy
    assert sum(stats.lossy_rows for stats in rounds) > 0 or draft == "model"


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("draft", ["padrec", "model"])
def test_equal_seeds_give_equal_relaxed_answers_in_any_company(tiny: Tiny, replacement: bool, draft: str) -> None:
    requests = relaxed(tiny, 9, replacement)
    mixed = some_requests(tiny, 5)
    mixed = [r for pair in zip(mixed, requests, strict=False) for r in pair] + requests[5:]
    mixed = [BeamRequest(**(vars(r) | {"request_id": f"m{i}"})) for i, r in enumerate(mixed)]
    alone = decode_all(decoder(tiny, ATSPEED, drafts(tiny)[draft], num_rows=1), requests)[0]
    together = decode_all(decoder(tiny, ATSPEED, drafts(tiny)[draft]), mixed)[0]
    for i, request in enumerate(mixed):
        if request.verification == "relaxed":
            twin = next(r for r in requests if r.history == request.history and r.k == request.k)
            same = [i.codes for i in together[f"m{i}"].items] == [i.codes for i in alone[twin.request_id].items]
            assert same, request
    other = decode_all(decoder(tiny, ATSPEED, drafts(tiny)[draft]), relaxed(tiny, 9, replacement, seed=4))[0]
    assert any(other[str(i)].items != alone[str(i)].items for i in range(9))


def test_relaxed_without_a_draft_is_strict_and_does_not_say_otherwise(tiny: Tiny) -> None:
    requests = relaxed(tiny, 6, replacement=False)
    assert_same(tiny, requests, decode_all(decoder(tiny, DRAFT_FREE), requests)[0])


@pytest.mark.parametrize("native", [True, False])
def test_bf16_differs_from_its_own_twin_only_where_two_beams_nearly_tie(native: bool) -> None:
    """And nowhere where the kernel sums."""
    half = other_tiny(3, (6, 6, 5, 4), native=native, dtype=torch.bfloat16)
    assert half.target.dtype == torch.bfloat16
    requests = [BeamRequest(str(i), (code,), 6) for i, code in enumerate(half.codes[:24])]
    results, _ = decode_all(decoder(half, DRAFT_FREE), requests)
    identical = 0
    for request in requests:
        expected, margin = twin_and_margin(half, request)
        same = [i.codes for i in results[request.request_id].items] == [i.codes for i in expected.items]
        assert same or margin < (0.1 if half.target.native is None else 0)
        identical += same
    assert identical >= 12
