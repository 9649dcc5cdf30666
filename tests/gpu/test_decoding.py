"""On a CUDA device: everything decodes as the slow twin does. Needs torch, transformers, numpy and pytest alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from model.bench.gpu import copy_bandwidth, held_out_requests, measure, twin_lists
from model.bench.sessions import TINY, train_bundle
from model.bundle import load_bundle
from model.catalog import Catalog, CatalogItem
from model.decoding.graph import UnknownProgram
from model.decoding.list_decoder import ListDecoder
from model.decoding.offline import decode_all
from model.decoding.plain import PlainTwin
from model.decoding.request import CategoryFilter, ListRequest, ListResult
from model.decoding.sampling import gumbel
from model.decoding.static_rounds import row_buckets
from model.decoding.topology import Budget, FixedBudget
from model.draft.draft import Draft
from model.draft.network import DraftNetwork, DraftShape
from model.item_trie import ItemTrie
from model.kv_cache import Sight, Write
from model.semantic_id import Vocabulary
from model.target import Target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZES = (6, 6, 5, 4)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    shape = LlamaConfig(
        vocab_size=Vocabulary.compact(SIZES).size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(shape).eval().cuda()


@torch.no_grad()
def test_logits_equal_transformers(model: Any) -> None:
    target = Target(model, Vocabulary.compact(SIZES), "cuda")
    tokens = torch.randint(3, target.vocabulary.size, (2, 12), device="cuda")
    positions = torch.arange(12, device="cuda").expand(2, -1)
    at = Write(torch.arange(2, device="cuda")[:, None], positions)
    output = target(tokens, positions, target.new_cache(2, 12), at, Sight(None, None, 12))
    expected = model(tokens).logits[..., target.vocabulary.level_offsets[0] :]
    assert torch.allclose(target.item_logits(output.hidden), expected, atol=1e-3, rtol=1e-3)


def test_the_noise_is_that_of_the_cpu() -> None:
    seed, decision, code = torch.arange(50)[:, None, None] * 2**57, torch.arange(40)[:, None], torch.arange(64)
    on_device = gumbel(seed.cuda(), decision.cuda(), code.cuda()).cpu()
    assert torch.allclose(on_device, gumbel(seed, decision, code), rtol=1e-12, atol=1e-12)


NEAR_TIE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
BUDGETS = [Budget(0), Budget(1), Budget(4), Budget(6), Budget(3, 3), Budget(2, 5)]


@dataclass(frozen=True)
class Stack:
    """A target with its trie and draft, on the device."""

    target: Target
    trie: ItemTrie
    catalog: Catalog
    draft: Draft

    def decoder(self, budget: Budget, **options: Any) -> ListDecoder:
        return ListDecoder(
            self.target,
            self.draft if budget.steps else None,
            self.trie,
            self.catalog,
            **{"num_rows": 4, "max_history_items": 6, "max_k": 10, "budget": FixedBudget(budget), **options},
        )

    def parted(self, requests: Sequence[ListRequest], results: dict[str, ListResult]) -> list[float]:
        """How close the twin's choice was where a list parts from the twin's, for those that do."""
        codes = [item.codes for item in self.catalog.items]
        twin, margins = PlainTwin(self.target, codes, 6), []
        for request in requests:
            allowed = {i.codes for i in self.catalog.items if not request.filters or i.attributes["genre"] != ["c"]}
            right = [c for item in twin.decode(request, allowed).items for c in item.codes]
            mine = [c for item in results[request.request_id].items for c in item.codes]
            assert len(mine) == len(right)
            margins += [twin.margins[i] for i, (a, b) in enumerate(zip(mine, right, strict=True)) if a != b][:1]
        return margins


def some_stack(dtype: torch.dtype, architecture: type[Any] = LlamaConfig) -> Stack:
    torch.manual_seed(0)
    rng, vocabulary = random.Random(0), Vocabulary.compact(SIZES)
    shape = architecture(
        vocab_size=vocabulary.size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
    )
    codes = sorted({tuple(rng.randrange(n) for n in SIZES) for _ in range(120)})
    items = tuple(CatalogItem(str(i), c, 1, {"genre": [rng.choice("abc")]}) for i, c in enumerate(codes))
    target = Target(AutoModelForCausalLM.from_config(shape).to(dtype), vocabulary, "cuda")
    network = DraftNetwork(DraftShape(64, 4, 96, vocabulary.num_slots, 4, (0, 1, 2), True, "gated"))
    draft = Draft(network, target.embedding, vocabulary)
    return Stack(target, ItemTrie(np.array(codes), vocabulary, "cuda"), Catalog(SIZES, items), draft)


@pytest.fixture(scope="module")
def stack() -> Stack:
    torch.backends.cuda.matmul.allow_tf32 = False
    return some_stack(torch.float32)


def some_requests(stack: Stack, count: int, seed: int = 0) -> list[ListRequest]:
    rng, codes = random.Random(seed), [item.codes for item in stack.catalog.items]
    return [
        ListRequest(
            str(i),
            tuple(rng.sample(codes, rng.randrange(1, 7))),
            rng.choice([1, 4, 10]),
            tuple(rng.sample(codes, 5)),
            filters={"genre": CategoryFilter(("a", "b"))} if i % 2 else {},
            temperature=i % 3 / 2,
            top_p=0.9 if i % 2 else 1.0,
            seed=i,
            speculation=i % 6 != 5,
        )
        for i in range(count)
    ]


def close(margins: Sequence[float], dtype: torch.dtype) -> bool:
    return all(margin < NEAR_TIE[dtype] for margin in margins)


@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_every_budget_and_bucket_writes_what_the_slow_twin_writes(stack: Stack, budget: Budget, num_rows: int) -> None:
    requests = some_requests(stack, 12)
    running = stack.decoder(budget, num_rows=num_rows)
    decoded = decode_all(running, requests)
    running.rows.check_integrity()
    assert close(stack.parted(requests, decoded.results), torch.float32)
    assert running.static is not None
    assert running.static.programs.num_captured == len(running.static.programs.keys) > 1


def test_plain_decoding_writes_what_the_slow_twin_writes(stack: Stack) -> None:
    requests = some_requests(stack, 8)
    decoded = decode_all(stack.decoder(Budget(0), forced=False), requests)
    assert close(stack.parted(requests, decoded.results), torch.float32)


def test_qwen3_with_normalised_queries_and_keys_does_too() -> None:
    stack = some_stack(torch.float32, Qwen3Config)
    requests = some_requests(stack, 8)
    assert close(stack.parted(requests, decode_all(stack.decoder(Budget(4)), requests).results), torch.float32)


@pytest.mark.parametrize("budget", [Budget(0), Budget(4), Budget(3, 3)], ids=str)
def test_half_precision_parts_from_its_twin_at_near_ties_alone(budget: Budget) -> None:
    stack = some_stack(torch.bfloat16)
    assert stack.target.new_cache(1, 8).data.dtype is torch.bfloat16
    assert stack.target.item_logits(torch.zeros(1, 64, device="cuda")).dtype is torch.float32
    requests = [replace(r, temperature=0.0) for r in some_requests(stack, 24)]
    margins = stack.parted(requests, decode_all(stack.decoder(budget), requests).results)
    assert close(margins, torch.bfloat16)
    assert len(margins) < len(requests) / 2


@pytest.mark.parametrize("budget", [Budget(0), Budget(4), Budget(3, 3)], ids=str)
def test_graphs_write_what_the_same_programs_write_without(stack: Stack, budget: Budget) -> None:
    requests = some_requests(stack, 12)
    graphs, without = (decode_all(stack.decoder(budget, graphs=on), requests) for on in (True, False))
    for name, result in graphs.results.items():
        other = without.results[name]
        assert [i.codes for i in result.items] == [i.codes for i in other.items]
        assert [i.score for i in result.items] == pytest.approx([i.score for i in other.items], abs=1e-5)
        assert result.speculation == other.speculation


@pytest.mark.parametrize("budget", [Budget(0), Budget(4), Budget(3, 3)], ids=str)
def test_static_rounds_write_what_eager_ones_write(stack: Stack, budget: Budget) -> None:
    requests = some_requests(stack, 12)
    results = decode_all(stack.decoder(budget, static=False), requests).results
    assert close(stack.parted(requests, results), torch.float32)


def test_equal_seeds_draw_equal_lists_alone_in_company_and_without_graphs(stack: Stack) -> None:
    codes = [item.codes for item in stack.catalog.items]
    asked = ListRequest("drawn", tuple(codes[:4]), 10, temperature=1.5, top_p=0.95, seed=3)
    company = some_requests(stack, 6)
    lists = []
    for budget, requests, graphs in (
        (Budget(4), [asked], True),
        (Budget(4), [*company, asked], True),
        (Budget(0), [asked], False),
        (Budget(3, 3), [asked, *company], True),
    ):
        running = stack.decoder(budget, graphs=graphs)
        lists.append([i.codes for i in decode_all(running, requests).results["drawn"].items])
    assert all(found == lists[0] for found in lists)


def test_after_the_freeze_nothing_is_captured_and_the_unknown_is_refused(stack: Stack) -> None:
    running = stack.decoder(Budget(4), num_rows=6)
    assert running.static is not None
    decode_all(running, some_requests(stack, 10))
    running.freeze()
    programs = running.static.programs
    made = programs.num_captured
    assert made == len(programs.keys) >= len(row_buckets(6))
    requests = some_requests(stack, 30, seed=1)
    assert close(stack.parted(requests, decode_all(running, requests).results), torch.float32)
    assert (programs.num_captured, programs.refused) == (made, 0)
    running.budget = FixedBudget(Budget(7))
    running.admit([replace(requests[0], request_id="unknown")])
    with pytest.raises(UnknownProgram):
        running.round()
    assert (programs.num_captured, programs.refused) == (made, 1)


def test_no_program_waits_for_the_device(stack: Stack) -> None:
    for budget in BUDGETS:
        running = stack.decoder(budget, graphs=False)
        assert running.static is not None
        run = running.static.programs.run

        def strict(key: Any, program: Any, run: Any = run) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                run(key, program)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        running.static.programs.run = strict  # type: ignore[method-assign]
        decode_all(running, some_requests(stack, 6))


def test_memory_does_not_grow_over_rounds(stack: Stack) -> None:
    running = stack.decoder(Budget(4), num_rows=4)
    requests = some_requests(stack, 8)
    decode_all(running, requests)
    running.freeze()
    decode_all(running, requests)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(5):
        decode_all(running, requests)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_a_bundle_trained_on_the_device_is_measured_there(tmp_path: Path) -> None:
    train_bundle(tmp_path / "bundle", TINY, "cuda", print)
    bundle = load_bundle(tmp_path / "bundle", dtype="bf16", device="cuda")
    assert bundle.info.report["validation"]["target"][1] < bundle.info.report["validation"]["target"][0]
    requests = held_out_requests(bundle, 8, 10)
    floor = 1e6 / copy_bandwidth(torch.device("cuda"))
    told: list[str] = []
    twins = twin_lists(bundle, requests[:4])
    records = measure(bundle, requests, 4, 1, twins, dtype="bf16", floor_seconds=floor, say=told.append)
    assert {(r["variant"], r["graphs"]) for r in records} >= {("plain", True), ("padrec", True), ("plain", False)}
    for record in records:
        assert record["compared"] == 4
        assert record["mismatches"] == record["invalid"] == record["repeated"] == record["excluded"] == 0
        assert record["memory_grown_bytes"] == 0
