import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.bench import trie
from model.bench.trie import CODEBOOK, DictionaryTrie, Questions, build, made_up_codes, made_up_questions
from model.item_trie import ItemTrie
from service.cli import main

KEYS = {"items", "batch", "trie", "place", "build_seconds", "filter_seconds", "bytes", "bytes_per_item", "step_ms"}
KEYS |= {"step_ms_min", "step_ms_max", "growth", "disagreements", "threads", "cores", "torch", "cpu"}
QUICK = ("bench", "trie", "--repeats", "1", "--threads", "1")


@pytest.fixture(scope="module")
def catalog() -> trie.Catalog:
    return build(3000, lambda text: None)


@pytest.fixture(params=trie.PLACES)
def questions(catalog: trie.Catalog, request: pytest.FixtureRequest) -> Questions:
    return made_up_questions(catalog.passing, 3, request.param, np.random.default_rng(0))


def test_made_up_catalogs_are_distinct_uneven_and_the_same_every_time() -> None:
    codes = made_up_codes(20_000)
    assert len(np.unique(codes, axis=0)) == 20_000
    assert codes.min() >= 0
    assert codes.max() < CODEBOOK
    assert (codes == made_up_codes(20_000)).all()
    share = np.bincount(codes[:, 0], minlength=CODEBOOK)
    assert share.max() > 3 * np.median(share)
    # The last level counts equal beginnings up from 0.
    assert (codes[:, 3] == 0).sum() == len(np.unique(codes[:, :3], axis=0))


def test_what_a_row_may_not_emit_passes_the_filter_and_is_named_once(
    catalog: trie.Catalog, questions: Questions
) -> None:
    for excluded, emitted in zip(questions.excluded, questions.emitted, strict=True):
        gone = [*excluded, *emitted]
        assert len(set(gone)) == len(gone) == trie.EXCLUDED + trie.EMITTED
        assert catalog.passing[gone].all()
        assert (np.diff(excluded) > 0).all()


def test_arrays_and_dictionaries_and_a_search_give_the_same_answers(
    catalog: trie.Catalog, questions: Questions
) -> None:
    assert catalog.disagreements(questions, catalog.steps(questions)) == 0


def test_a_wrong_answer_is_counted(catalog: trie.Catalog) -> None:
    questions = made_up_questions(catalog.passing, 3, "depth 0", np.random.default_rng(0))
    steps = catalog.steps(questions)
    steps["dictionary"][20] = lambda: torch.zeros(3, CODEBOOK, dtype=torch.bool)
    assert catalog.disagreements(questions, steps) == 3
    other = made_up_questions(catalog.passing, 3, "depth 1", np.random.default_rng(1))
    assert catalog.disagreements(questions, {"arrays": catalog.steps(other)["arrays"]}) > 0


def test_the_bytes_of_dictionaries_grow_with_their_nodes() -> None:
    one = DictionaryTrie(np.array([[0, 0, 0, 0]]))
    two = DictionaryTrie(np.array([[0, 0, 0, 0], [1, 0, 0, 0]]))
    assert two.num_bytes > 1.5 * one.num_bytes


def test_the_command_writes_a_record_for_every_trie_batch_and_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trie.json"
    assert main([*QUICK, "--items", "2000,1000", "--batches", "2", "--json", str(path)]) == 0
    records = json.loads(path.read_text())
    assert all(set(record) == KEYS for record in records)
    named = [(r["place"], r["items"], r["trie"]) for r in records]
    tries = ("arrays", "dictionary")
    assert named == [(place, n, name) for place in trie.PLACES for n in (1000, 2000) for name in tries]
    assert all(0 < r["step_ms_min"] <= r["step_ms"] <= r["step_ms_max"] for r in records)
    assert {r["growth"] for r in records if r["items"] == 1000} == {1.0}
    assert "a step of arrays grows" in capsys.readouterr().out


def test_where_dictionaries_would_take_gigabytes_they_are_left_out_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trie, "DICTIONARY_LIMIT", 999)
    assert main([*QUICK, "--items", "1000", "--batches", "1"]) == 0
    printed = capsys.readouterr().out
    assert "left out" in printed
    assert "dictionary      1,000 items  batch" not in printed


def test_tries_that_disagree_are_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ItemTrie, "passing", lambda self, leaves=None: self.leaf_start.int())
    assert main([*QUICK, "--items", "1000", "--batches", "2"]) == 1


@pytest.mark.parametrize("items", ["10", "0"])
def test_too_few_items_are_exit_code_2(items: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--items", items]) == 2
    assert "1000" in capsys.readouterr().err


def test_more_items_than_semantic_ids_are_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trie, "CODEBOOK", 4)
    assert main([*QUICK, "--items", "1000"]) == 2
    assert "too many" in capsys.readouterr().err
