"""Device programs, run on a CPU: the same functions over the same static tensors, without the recording."""

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from model.decoding.graph import UnknownProgram
from model.decoding.list_decoder import ListDecoder
from model.decoding.offline import decode_all
from model.decoding.request import InvalidRequest, ListRequest
from model.decoding.static_rounds import PromptShape, RoundShape, mean_run, row_buckets
from model.decoding.topology import Budget, FixedBudget, table_of
from model.draft.draft import Draft
from model.draft.network import DraftNetwork, DraftShape
from model.item_trie import ItemTrie
from model.semantic_id import Vocabulary
from model.target import Target
from tests.model.conftest import SIZES, Tiny, random_catalog
from tests.model.decoding.company import in_any_company
from tests.model.decoding.test_list_decoder import MODES, assert_same, mixed, sampled, some_requests

# Every operator whose result, or the shape of it, the host has to wait for.
WAITING = (
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "unique_dim",
    "equal",
    "allclose",
    "bincount",
)


@pytest.fixture(scope="module")
def layers() -> Tiny:
    """As `tiny`, run by torch: the layers a device runs."""
    torch.manual_seed(0)
    catalog, vocabulary = random_catalog(0), Vocabulary.compact(SIZES)
    shape = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
    )
    codes = [item.codes for item in catalog.items]
    target = Target(AutoModelForCausalLM.from_config(shape), vocabulary, native=False)
    return Tiny(catalog, ItemTrie(np.array(codes), vocabulary), target, codes)


def some_draft(tiny: Tiny, *, adversarial: bool = False) -> Draft:
    torch.manual_seed(0)
    network = DraftNetwork(DraftShape(32, 2, 48, tiny.target.vocabulary.num_slots, 4, (0, 1, 2), True, "gated"))
    if adversarial:
        network.norms[2].data.neg_()
    return Draft(network, tiny.target.embedding, tiny.target.vocabulary, native=False)


class Alone(FixedBudget):
    """Drafts for a row that is alone."""

    def __call__(self, rows: int) -> Budget:
        return self.budget if rows == 1 else Budget(0)


def decoder(tiny: Tiny, mode: str, *, draft: Draft | None = None, num_rows: int = 4, **options: Any) -> ListDecoder:
    budget, forced = MODES[mode]
    return ListDecoder(
        tiny.target,
        (draft or some_draft(tiny)) if budget.steps else None,
        tiny.trie,
        tiny.catalog,
        num_rows=num_rows,
        max_history_items=6,
        max_k=20,
        budget=options.pop("budget", FixedBudget(budget)),
        forced=forced,
        static=True,
        **options,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("choosing", ["greedy", "mixed", "sampled"])
def test_every_mode_writes_what_the_slow_twin_writes(layers: Tiny, mode: str, choosing: str) -> None:
    greedy = some_requests(layers, 10)
    requests = {"greedy": greedy, "mixed": mixed(layers, 10), "sampled": sampled(greedy)}[choosing]
    running = decoder(layers, mode)
    assert_same(layers, requests, decode_all(running, requests).results)
    running.rows.check_integrity()


@pytest.mark.parametrize("num_rows", [1, 3, 6])
@pytest.mark.parametrize("mode", ["chain", "tree"])
def test_every_bucket_writes_what_the_slow_twin_writes(layers: Tiny, num_rows: int, mode: str) -> None:
    requests = mixed(layers, 8, seed=5)
    running = decoder(layers, mode, num_rows=num_rows, draft=some_draft(layers, adversarial=True))
    assert_same(layers, requests, decode_all(running, requests).results)
    used = {key.rows for key in running.static.programs.keys if isinstance(key, RoundShape)}  # type: ignore[union-attr]
    assert used <= set(row_buckets(num_rows))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), mode=st.sampled_from(["forced", "chain", "tree"]))
def test_company_does_not_matter_whoever_joins_leaves_or_is_cancelled(layers: Tiny, seed: int, mode: str) -> None:
    rng = random.Random(seed)
    requests = mixed(layers, 8, seed)
    running = decoder(layers, mode)
    results, cancelled = in_any_company(running, requests, rng)
    assert_same(layers, [r for r in requests if r.request_id not in cancelled], results)


def test_counts_are_those_of_the_eager_round(layers: Tiny) -> None:
    requests = some_requests(layers, 6, seed=2)
    static = decode_all(decoder(layers, "chain", num_rows=1), requests)
    eager = ListDecoder(
        layers.target,
        some_draft(layers),
        layers.trie,
        layers.catalog,
        num_rows=1,
        max_history_items=6,
        max_k=20,
        budget=FixedBudget(Budget(4)),
        static=False,
    )
    expected = decode_all(eager, requests)

    def counts(decoded: Any) -> list[Any]:
        timeless = [replace(r, draft_seconds=0.0, verify_seconds=0.0) for r in decoded.rounds]
        return [timeless, [r.speculation for r in decoded.results.values()]]

    # The one difference there may be: nodes that found no room among the tokens of a pass. None here.
    assert static.rounds[0].target_tokens <= eager.places * 5
    assert counts(static) == counts(expected)


def test_nodes_that_find_no_room_are_not_drafted_and_nothing_else_changes(
    layers: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = mixed(layers, 8, seed=3)
    running = decoder(layers, "tree")
    assert running.static is not None
    monkeypatch.setattr(running.static, "tokens", lambda budget: layers.target.vocabulary.tokens_per_item + 2)
    cramped = decode_all(running, requests)
    assert_same(layers, requests, cramped.results)
    roomy = decode_all(decoder(layers, "tree"), requests)
    assert sum(r.draft_tokens for r in cramped.rounds) < sum(r.draft_tokens for r in roomy.rounds)


def test_long_exclusions_and_far_rows_are_served_by_wider_programs(
    layers: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.decoding.static_rounds.FEW_EXCLUDED", 40)
    monkeypatch.setattr("model.decoding.static_rounds.REACHES_FROM", 1)
    short = ListRequest("short", (layers.codes[0],), 3)
    long = ListRequest("long", tuple(layers.codes[:9]), 20, tuple(layers.codes[9:70]))
    running = decoder(layers, "chain")
    requests = [short, long, replace(short, request_id="after"), replace(short, request_id="drawn", temperature=1)]
    for request in requests:  # one by one, in the same row: what a wide one leaves behind must not be seen
        request = replace(request, seed=1)
        assert_same(layers, [request], decode_all(running, [request]).results)
    shapes = [key for key in running.static.programs.keys if isinstance(key, RoundShape)]  # type: ignore[union-attr]
    assert len({shape.reach for shape in shapes}) > 1
    assert len({shape.banned for shape in shapes}) == 2
    assert {shape.drawing for shape in shapes} == {False, True}


def test_after_the_freeze_every_request_is_served_and_no_program_is_made(layers: Tiny) -> None:
    running = decoder(layers, "chain")
    assert running.static is not None
    decode_all(running, some_requests(layers, 1))
    running.freeze()
    made = running.static.programs.keys
    assert any(isinstance(key, PromptShape) for key in made)
    requests = mixed(layers, 12, seed=7)
    # One row tried a chain; larger buckets were never tried, and are served without a draft.
    running.budget = Alone(Budget(4))
    assert_same(layers, requests, decode_all(running, requests).results)
    assert running.static.programs.keys == made
    assert running.static.programs.refused == 0


def test_a_program_unknown_at_the_freeze_is_refused_and_counted(layers: Tiny) -> None:
    running = decoder(layers, "chain")
    assert running.static is not None
    running.freeze()
    running.admit(some_requests(layers, 1))
    with pytest.raises(UnknownProgram, match="steps=4"):
        running.round()
    assert running.static.programs.refused == 1


def test_a_freeze_needs_an_idle_decoder(layers: Tiny) -> None:
    running = decoder(layers, "forced")
    running.admit(some_requests(layers, 1))
    with pytest.raises(AssertionError, match="rows in use"):
        running.freeze()


def test_more_exclusions_than_there_is_room_for_are_refused_by_name(
    layers: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.decoding.list_decoder.MAX_EXCLUDED", 10)
    running = decoder(layers, "forced")
    running.validate(ListRequest("few", tuple(layers.codes[:4]), 3, tuple(layers.codes[4:10])))
    with pytest.raises(InvalidRequest) as caught:
        running.validate(ListRequest("many", tuple(layers.codes[:4]), 3, tuple(layers.codes[4:11])))
    assert caught.value.pointer == "/exclude"


def test_a_decoder_that_is_dropped_is_gone_at_once(layers: Tiny) -> None:
    running = decoder(layers, "chain")
    decode_all(running, some_requests(layers, 2))
    running.freeze()
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(running.static)
        del running
        assert gone() is None  # its recordings would otherwise be destroyed at any time, while others are made
    finally:
        gc.enable()


def test_tokens_per_choice_are_those_of_looking_at_every_item(layers: Tiny) -> None:
    choices = 0
    for codes in layers.codes:
        for level in range(len(SIZES)):
            choices += len({other[level] for other in layers.codes if other[:level] == codes[:level]}) > 1
    assert mean_run(layers.trie) == pytest.approx(len(layers.codes) * (len(SIZES) + 1) / choices)


# ---- the host never waits ---------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Fails on operators that a device program may not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        name = func.__name__.partition(".")[0]
        assert name not in WAITING, f"{func} makes the host wait for the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{func} with a mask: a shape from data"
        if name in ("repeat_interleave",):
            assert not isinstance(args[0], torch.Tensor) or isinstance(args[1], int), f"{func} with repeats from data"
        return func(*args, **(kwargs or {}))


def told_in_full(tensor: torch.Tensor, *_: Any) -> Any:
    raise AssertionError("the host reads a tensor's values")


set_item = torch.Tensor.__setitem__


def set_item_on_device(tensor: torch.Tensor, index: Any, value: Any) -> None:
    """A number given to places that a tensor names is a tensor of the host: a GPU fetches it, and the host waits."""
    named = any(isinstance(i, torch.Tensor) for i in (index if isinstance(index, tuple) else (index,)))
    assert isinstance(value, torch.Tensor) or not named, "a number of the host goes to indexed places"
    set_item(tensor, index, value)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, running: ListDecoder) -> Iterator[Waits]:
    """Device programs run under `Waits`; what copies values to the host without an operator is refused too."""
    waits = Waits()
    assert running.static is not None
    run = running.static.programs.run

    def watch(key: Any, program: Callable[[], None]) -> None:
        def within() -> None:
            with monkeypatch.context() as patch, waits:
                for name in ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__"):
                    patch.setattr(torch.Tensor, name, told_in_full)
                patch.setattr(torch.Tensor, "__setitem__", set_item_on_device)
                program()

        run(key, within)

    monkeypatch.setattr(running.static.programs, "run", watch)
    yield waits


@pytest.mark.parametrize("mode", MODES)
def test_no_program_makes_the_host_wait(layers: Tiny, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    running = decoder(layers, mode)
    requests = mixed(layers, 5, seed=1)
    with watched(monkeypatch, running) as waits:
        assert_same(layers, requests, decode_all(running, requests).results)
    assert waits.seen > 1000


def test_the_watch_sees_a_wait(layers: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    running = decoder(layers, "forced")
    assert running.static is not None
    mask = torch.tensor([True, False])
    for waiting in (
        lambda: int(mask.sum()),
        lambda: mask.tolist(),
        lambda: torch.arange(2)[mask],
        lambda: mask.nonzero(),
        lambda: bool(mask.any()),
        lambda: torch.zeros(2).__setitem__(torch.tensor([1]), 5),
    ):
        with watched(monkeypatch, running), pytest.raises(AssertionError):
            running.static.programs.run(object(), waiting)  # type: ignore[arg-type]


def moved(value: Any, fake: FakeTensorMode, known: dict[int, Any]) -> Any:
    """`value` with every tensor in it replaced by one without data on another device than the CPU: what is left on the
    CPU meets it and fails. In place, where there is a place."""
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, torch.Tensor):
        with fake:
            made: Any = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    elif isinstance(value, torch.nn.Module):
        made = value
        for holder in value.modules():
            for names in (holder._parameters, holder._buffers):
                names.update({n: moved(t, fake, known) for n, t in names.items()})
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        made = type(value)(*(moved(v, fake, known) for v in value))
    elif isinstance(value, list | tuple):
        made = type(value)(moved(v, fake, known) for v in value)
    elif isinstance(value, torch.device):
        made = torch.device("meta")
    elif type(value).__module__.startswith("model."):
        known[id(value)] = made = value
        for name, inner in list(getattr(value, "__dict__", {}).items()):
            object.__setattr__(value, name, moved(inner, fake, known))
    else:
        made = value
    known[id(value)] = made
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_programs_are_of_one_device_and_need_no_values(mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    catalog, vocabulary = random_catalog(0), Vocabulary.compact(SIZES)
    codes = [item.codes for item in catalog.items]
    shape = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    target = Target(AutoModelForCausalLM.from_config(shape).to(dtype), vocabulary, native=False)
    tiny = Tiny(catalog, ItemTrie(np.array(codes), vocabulary), target, codes)
    running = decoder(tiny, mode)
    static, budget = running.static, MODES[mode][0]
    assert static is not None
    with FakeTensorMode() as fake:
        known: dict[int, Any] = {}
        moved(running, fake, known)
        # Past the cache of tables: what is made here belongs to this test's device alone.
        table = table_of.__wrapped__(budget, len(SIZES), torch.device("meta"))
        with torch.inference_mode():
            for rows in (1, 4):
                for round_shape in static.round_shapes(rows, budget):
                    static._round_program(round_shape, table)
                for prompt_shape in static._prompt_shapes():
                    static._prompt_program(prompt_shape)
