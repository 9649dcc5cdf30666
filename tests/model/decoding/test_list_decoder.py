import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from model.decoding.budget import measured_budget
from model.decoding.list_decoder import ListDecoder
from model.decoding.offline import decode_all
from model.decoding.plain import PlainTwin
from model.decoding.profile import Profile
from model.decoding.request import CategoryFilter, InvalidRequest, ListRequest, ListResult, RangeFilter
from model.decoding.topology import Budget, FixedBudget
from model.draft.draft import Draft
from model.draft.network import DraftNetwork, DraftShape
from model.native import kernel
from model.target import Target
from tests.model.conftest import Tiny
from tests.model.decoding.company import in_any_company

NEAR_TIE = 1e-4  # nats: nearer choices than this are the rounding's
SLOT_TREES = Budget.static(
    [
        (((0, 0), (0, 1), (0, 2)), ((0, 0), (0, 1), (2, 0)), ((0, 0), (2, 1)), ((1, 0),)),
        (((0, 0), (0, 1)), ((1, 0),)),
        (((0, 0),), ((0, 0),), ((0, 0),), ((0, 0),)),
    ]
)
MODES = {
    "plain": (Budget(0), False),
    "forced": (Budget(0), True),
    "chain": (Budget(4), True),
    "static": (SLOT_TREES, True),
    "tree": (Budget(3, 3), True),
}


def decoder(tiny: Tiny, draft: Draft | None, mode: str = "chain", num_rows: int = 4) -> ListDecoder:
    budget, forced = MODES[mode]
    return ListDecoder(
        tiny.target,
        draft if budget.steps else None,
        tiny.trie,
        tiny.catalog,
        num_rows=num_rows,
        max_history_items=6,
        max_k=20,
        budget=FixedBudget(budget),
        forced=forced,
    )


def some_requests(tiny: Tiny, count: int, seed: int = 0) -> list[ListRequest]:
    rng = random.Random(seed)
    requests = []
    for i in range(count):
        filters: dict[str, CategoryFilter | RangeFilter] = {}
        if i % 3 == 1:
            filters["genre"] = CategoryFilter(("a", "b"))
        if i % 4 == 2:
            filters["year"] = RangeFilter(1991, 1995)
        requests.append(
            ListRequest(
                str(i),
                tuple(rng.sample(tiny.codes, rng.randrange(1, 9))),
                rng.choice([1, 3, 10, 20]),
                tuple(rng.sample(tiny.codes, 5)),
                exclude_history=i % 5 != 0,
                filters=filters,
                speculation=i % 6 != 5,
            )
        )
    return requests


def sampled(requests: Sequence[ListRequest], seed: int = 0) -> list[ListRequest]:
    """The same requests, drawn: hot and cold, cut and whole."""
    rng = random.Random(seed)
    return [
        replace(r, temperature=rng.choice([0.3, 1, 2]), top_p=rng.choice([0.6, 0.9, 1]), seed=rng.randrange(2**63))
        for r in requests
    ]


def mixed(tiny: Tiny, count: int, seed: int = 0) -> list[ListRequest]:
    """Requests of which about half are sampled."""
    greedy = some_requests(tiny, count, seed)
    return [random.Random(seed + i).choice(pair) for i, pair in enumerate(zip(greedy, sampled(greedy), strict=True))]


def assert_same(tiny: Tiny, requests: Sequence[ListRequest], results: dict[str, ListResult]) -> None:
    for request in requests:
        (expected, margin), got = tiny.twin_and_margin(request), results[request.request_id]
        if [i.codes for i in got.items] != [i.codes for i in expected.items]:
            assert margin < NEAR_TIE, request
            continue
        for item, right in zip(got.items, expected.items, strict=True):
            assert item.score == pytest.approx(right.score, abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("item", [True, False], ids=["padrec", "base"])
@pytest.mark.parametrize("choosing", ["greedy", "mixed", "sampled"])
def test_every_mode_writes_what_the_slow_twin_writes(tiny: Tiny, mode: str, item: bool, choosing: str) -> None:
    greedy = some_requests(tiny, 10)
    requests = {"greedy": greedy, "mixed": mixed(tiny, 10), "sampled": sampled(greedy)}[choosing]
    running = decoder(tiny, tiny.draft(item=item), mode)
    assert_same(tiny, requests, decode_all(running, requests).results)
    running.rows.check_integrity()


@pytest.mark.parametrize("mode", ["chain", "tree"])
def test_an_adversarial_draft_changes_nothing_but_the_speed(tiny: Tiny, mode: str) -> None:
    requests = mixed(tiny, 8, seed=4)
    running = decoder(tiny, tiny.draft(adversarial=True), mode)
    assert_same(tiny, requests, decode_all(running, requests).results)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), mode=st.sampled_from(["forced", "chain", "tree"]))
def test_company_does_not_matter_whoever_joins_leaves_or_is_cancelled(tiny: Tiny, seed: int, mode: str) -> None:
    rng = random.Random(seed)
    requests = mixed(tiny, 8, seed)
    running = decoder(tiny, tiny.draft(), mode)
    results, cancelled = in_any_company(running, requests, rng)
    assert running.rows.num_free == 4
    assert_same(tiny, [r for r in requests if r.request_id not in cancelled], results)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [1, 7, 16, 40])
@pytest.mark.parametrize("native", [True, False], ids=["compiled", "tensors"])
def test_prompts_read_in_pieces_between_rounds_change_nothing(tiny: Tiny, mode: str, share: int, native: bool) -> None:
    requests = mixed(tiny, 8, seed=share)
    running = decoder(tiny, tiny.draft(), mode)
    running.prefill_tokens = share
    if not native:
        running.native = None
    assert_same(tiny, requests, decode_all(running, requests).results)
    running.rows.check_integrity()


def test_a_long_prompt_does_not_stall_the_rows_that_run(tiny: Tiny) -> None:
    running = decoder(tiny, tiny.draft(), "forced")
    running.prefill_tokens = 8
    first = ListRequest("first", tuple(tiny.codes[:1]), 20)
    running.admit([first])
    running.admit([ListRequest("long", tuple(tiny.codes[10:16]), 3)])
    assert len(running.rows.running) == 1  # the other one still reads
    rows = [running.round()[1].rows]
    while rows[-1] == 1:
        rows.append(running.round()[1].rows)
    assert rows[-1] == 2
    assert len(rows) >= 3
    assert running.cancel("first")
    running.admit([ListRequest("left", tuple(tiny.codes[20:26]), 3)])
    assert running.cancel("left")  # while it reads
    while running.rows.in_use:
        running.round()
    running.rows.check_integrity()


@pytest.mark.parametrize("mode", MODES)
def test_when_fewer_than_k_exist_all_of_them_come_and_the_answer_says_so(tiny: Tiny, mode: str) -> None:
    left = set(tiny.codes[:3])
    exclude = tuple(c for c in tiny.codes if c not in left)
    request = ListRequest("few", (exclude[0],), 10, exclude)
    result = decode_all(decoder(tiny, tiny.draft(), mode), [request]).results["few"]
    assert {item.codes for item in result.items} == left
    assert [code for code, _ in result.degraded] == ["fewer_items"]


def test_nothing_left_to_recommend_is_an_empty_list(tiny: Tiny) -> None:
    request = ListRequest("none", (tiny.codes[0],), 5, tuple(tiny.codes))
    running = decoder(tiny, tiny.draft())
    assert running.admit([request])[0].items == ()
    running.rows.check_integrity()


def test_long_histories_keep_the_newest_items_and_say_how_many(tiny: Tiny) -> None:
    history = tuple(tiny.codes[:15])
    long = ListRequest("long", history, 5)
    short = ListRequest("short", history[-6:], 5, exclude=history)
    results = decode_all(decoder(tiny, tiny.draft()), [long, short]).results
    assert [i.codes for i in results["long"].items] == [i.codes for i in results["short"].items]
    assert results["long"].history_used == 6
    assert results["long"].degraded == ()


def test_rounds_and_tokens_add_up(tiny: Tiny) -> None:
    requests = some_requests(tiny, 5, seed=2)
    decoded = decode_all(decoder(tiny, tiny.draft()), requests)
    stats = [decoded.results[r.request_id].speculation for r in requests]
    assert sum(s.rounds for s in stats) == sum(r.rows for r in decoded.rounds)
    assert sum(s.accepted_tokens for s in stats) == sum(r.accepted_tokens for r in decoded.rounds)
    assert sum(s.draft_tokens for s in stats) == sum(sum(r.drafted_by_step) for r in decoded.rounds)
    assert sum(s.draft_tokens for s in stats) == sum(sum(r.drafted_by_slot) for r in decoded.rounds)
    assert sum(s.accepted_tokens for s in stats) == sum(sum(r.accepted_by_slot) for r in decoded.rounds)


@pytest.mark.parametrize("mode", MODES)
def test_equal_seeds_draw_equal_lists_and_longer_ones_start_with_the_shorter(tiny: Tiny, mode: str) -> None:
    asked = ListRequest("whole", tuple(tiny.codes[:4]), 12, temperature=1.5, top_p=0.95, seed=3)
    requests = [asked, replace(asked, request_id="same"), replace(asked, request_id="short", k=5)]
    requests += [replace(asked, request_id="quiet", speculation=False), replace(asked, request_id="other", seed=4)]
    requests += [replace(asked, request_id="greedy", temperature=0.0)]
    results = decode_all(decoder(tiny, tiny.draft(), mode, num_rows=3), requests).results
    lists = {name: [i.codes for i in result.items] for name, result in results.items()}
    assert lists["same"] == lists["quiet"] == lists["whole"]
    assert lists["short"] == lists["whole"][:5]
    assert lists["other"] != lists["whole"]
    assert lists["greedy"] != lists["whole"]


def test_without_a_seed_every_list_is_drawn_anew(tiny: Tiny) -> None:
    requests = [ListRequest(str(i), tuple(tiny.codes[:4]), 20, temperature=2) for i in range(4)]
    results = decode_all(decoder(tiny, tiny.draft()), requests).results
    assert len({result.items for result in results.values()}) == 4


def test_greedy_batches_compute_no_noise(tiny: Tiny) -> None:
    running = decoder(tiny, tiny.draft())
    greedy, drawn = ListRequest("greedy", (tiny.codes[0],), 9), ListRequest("drawn", (tiny.codes[0],), 9, temperature=1)
    running.admit([greedy])
    assert running.rows.sampling(slice(1)) is None
    running.admit([drawn])
    assert running.rows.sampling(slice(2)) is not None
    running.cancel("drawn")
    assert running.rows.sampling(slice(1)) is None


def test_speculation_can_be_refused_by_a_request(tiny: Tiny) -> None:
    request = ListRequest("off", (tiny.codes[0],), 5, speculation=False)
    result = decode_all(decoder(tiny, tiny.draft()), [request]).results["off"]
    assert result.speculation.draft_tokens == 0


@pytest.mark.parametrize(
    ("pointer", "change"),
    [
        ("/k", {"k": 21}),
        ("/k", {"k": 0}),
        ("/temperature", {"temperature": -0.1}),
        ("/temperature", {"temperature": 2.1}),
        ("/temperature", {"temperature": float("nan")}),
        ("/top_p", {"top_p": 0.0}),
        ("/top_p", {"top_p": 1.1}),
        ("/top_p", {"top_p": float("nan")}),
        ("/seed", {"seed": -1}),
        ("/seed", {"seed": 2**63}),
        ("/history", {"history": ()}),
        ("/history", {"history": ((9, 9, 9, 9),)}),
        ("/exclude", {"exclude": ((0, 0),)}),
        ("/filters", {"filters": {"colour": CategoryFilter(("red",))}}),
        ("/filters/genre", {"filters": {"genre": RangeFilter(1, 2)}}),
        ("/filters/year", {"filters": {"year": CategoryFilter(("1990",))}}),
    ],
)
def test_bad_content_is_refused_by_name(tiny: Tiny, pointer: str, change: dict[str, object]) -> None:
    values: dict[str, object] = {"request_id": "bad", "history": (tiny.codes[0],), "k": 5} | change
    with pytest.raises(InvalidRequest) as caught:
        decoder(tiny, None, "forced").validate(ListRequest(**values))  # type: ignore[arg-type]
    assert caught.value.pointer == pointer


@pytest.mark.parametrize("native", [True, False])
def test_bf16_differs_from_its_own_twin_only_where_two_tokens_nearly_tie(tiny: Tiny, native: bool) -> None:
    """And nowhere where the kernel sums."""
    torch.manual_seed(2)
    vocabulary = tiny.target.vocabulary
    shape = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        initializer_range=0.3,
    )
    target = Target(AutoModelForCausalLM.from_config(shape).bfloat16(), vocabulary, native=native)
    compiled = target.native is not None
    assert compiled == (native and kernel.load() is not None)
    network = DraftNetwork(DraftShape(32, 4, 48, vocabulary.num_slots, 4, (0, 1), True, "gated"))
    half = Tiny(tiny.catalog, tiny.trie, target, tiny.codes)
    running = decoder(half, Draft(network, target.embedding, vocabulary))
    requests = [ListRequest(str(i), tuple(tiny.codes[i : i + 4]), 5) for i in range(12)]
    results = decode_all(running, requests).results
    identical, twin = 0, PlainTwin(target, tiny.codes, 6)
    for request in requests:
        expected = [item.codes for item in twin.decode(request).items]
        same = [item.codes for item in results[request.request_id].items] == expected
        identical += same
        assert same or min(twin.margins) < (0 if compiled else 0.05)
    assert identical >= 6


def test_a_row_with_many_exclusions_can_be_cancelled_and_timed(tiny: Tiny) -> None:
    """Room for them is made while a request is admitted, which is not where it is freed."""
    many = ListRequest("r", tuple(tiny.codes[:5]), 3, exclude=tuple(tiny.codes[5:95]))
    with_draft = decoder(tiny, tiny.draft())
    with_draft.admit([many])
    assert with_draft.cancel("r")
    measured_budget(with_draft, [many], Profile.guess(4), repeats=1)
    with_draft.rows.check_integrity()
    assert not with_draft.rows.in_use
