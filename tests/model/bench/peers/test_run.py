import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from model.bench.decode import held_out_requests
from model.bench.peers import run
from model.bench.peers.run import (
    ITEMS_ONLY,
    OPEN,
    PEERS,
    Peer,
    PeerFailed,
    PeerProcess,
    Reference,
    bench_peers,
    constrained_reference,
    main,
    open_reference,
    peer_task,
    python_for,
)
from model.bench.peers.turns import Task
from model.bundle import Bundle, load_bundle
from model.decoding.request import ListRequest

DATA = Path(__file__).parents[4] / ".data" / "ml-100k"
K = 5
KEYS = {"peer", "variant", "constrained", "batch", "lists", "ms_per_list", "ms_min", "ms_max", "identical"}
KEYS |= {"near_ties", "mismatches", "versions", "threads", "cores", "torch", "cpu"}


@pytest.fixture(scope="module")
def bundle(debug_run: tuple[Path, Path]) -> Bundle:
    return load_bundle(debug_run[1])


@pytest.fixture(scope="module")
def requests(bundle: Bundle) -> list[ListRequest]:
    """Three users; the second's history is short, so that a batch needs padding."""
    found = held_out_requests(bundle, DATA, K, users=3)
    return [found[0], replace(found[1], history=found[1].history[:2]), found[2]]


@pytest.fixture(scope="module")
def task(bundle: Bundle, requests: list[ListRequest], debug_run: tuple[Path, Path]) -> Task:
    return peer_task(bundle, debug_run[1] / "target", debug_run[0] / "exports", requests, 1, 1)


def nothing(text: str) -> None:
    del text


def test_transformers_with_a_prefix_function_writes_the_twins_lists_token_for_token(
    bundle: Bundle, requests: list[ListRequest], task: Task
) -> None:
    reference = constrained_reference(bundle, requests)
    for variant, batch in (("constrained", 1), ("constrained", 3), ("assisted-constrained", 1)):
        process = PeerProcess(Path(sys.executable), "transformers", replace(task, variant=variant, batch=batch))
        try:
            assert process.turn(3)[1] == reference.tokens, (variant, batch)
            assert process.turn(1)[1] == reference.tokens[:1], "a turn may ask for fewer lists"
        finally:
            process.close()


def test_transformers_without_constraint_writes_what_a_plain_loop_writes(task: Task) -> None:
    reference = open_reference(Path(task.checkpoint), task)
    assert {len(tokens) for tokens in reference.tokens} == {task.new_tokens}
    for variant, batch in (("plain", 3), ("assisted", 1)):
        process = PeerProcess(Path(sys.executable), "transformers", replace(task, variant=variant, batch=batch))
        try:
            compared = reference.compare(process.turn(3)[1])
        finally:
            process.close()
        assert compared["mismatches"] == 0, variant


def test_a_task_holds_the_prompts_and_bans_of_our_own_decoder(
    bundle: Bundle, requests: list[ListRequest], task: Task
) -> None:
    vocabulary = bundle.target.vocabulary
    assert task.new_tokens == K * vocabulary.tokens_per_item
    assert len(task.items) == len(bundle.catalog.items)
    for asked, given in zip(requests, task.requests, strict=True):
        used = asked.history[-bundle.info.max_history_items :]
        assert list(given.prompt) == vocabulary.list_prompt(used)
        assert set(given.banned) == {tuple(vocabulary.item_tokens(codes)[:-1]) for codes in asked.history}


def test_lists_that_differ_are_mismatches_unless_nearly_tied() -> None:
    reference = Reference([[1, 2], [3, 4], [5, 6]], [0.5, 0.5, 1e-6])
    assert reference.compare([[1, 2], [3, 5], [6, 5]]) == {"identical": 1 / 3, "near_ties": 1, "mismatches": 1}


def test_a_run_compares_every_variant_with_its_own_twin_and_names_what_is_missing(
    debug_run: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = Peer("no_such_engine", {"plain": True}, "nothing")
    monkeypatch.setattr(run, "PEERS", (*(p for p in PEERS if p.package == "transformers"), missing))
    path = tmp_path / "records.json"
    options = ["--bundle", str(debug_run[1]), "--data", str(DATA), "--environments", str(tmp_path / "none")]
    options += ["--batch", "1", "2", "--k", str(K), "--users", "2", "--repeats", "1", "--threads", "1"]
    assert main([*options, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "no_such_engine: not installed, skipped (make peers)" in printed
    assert "transformers can constrain:" in printed
    records = json.loads(path.read_text())
    ours = [("padrec", variant, ITEMS_ONLY) for variant in ("plain", "plain-forced", "padrec")]
    batched = [("transformers", "constrained", ITEMS_ONLY), ("transformers", "plain", OPEN)]
    alone = [("transformers", "assisted-constrained", ITEMS_ONLY), ("transformers", "assisted", OPEN)]
    asked = [(r["peer"], r["variant"], r["constrained"]) for r in records]
    assert asked == [*ours, *batched, *alone, *ours, *batched]
    for record in records:
        assert set(record) == KEYS
        assert record["mismatches"] == 0
        assert 0 < record["ms_min"] <= record["ms_per_list"] <= record["ms_max"]
        assert (record["lists"], record["threads"]) == (2, 1)


def test_an_engine_that_fails_is_recorded_with_what_it_said_and_the_others_run(
    bundle: Bundle,
    requests: list[ListRequest],
    debug_run: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "python_for", lambda package, environments: Path(sys.executable))
    broken = Peer("no_such_engine", {"plain": True}, "nothing")
    target = debug_run[1] / "target"
    records = bench_peers(bundle, target, requests[:2], [broken], tmp_path, [1], 1, 1, nothing)
    assert [r["peer"] for r in records] == ["padrec", "padrec", "padrec", "no_such_engine"]
    assert "No module named" in records[-1]["failed"]
    assert all("failed" not in r for r in records[:-1])


def test_an_engine_that_does_not_answer_is_ended(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "TURN_SECONDS", 0.01)
    with pytest.raises(PeerFailed):
        PeerProcess(Path(sys.executable), "transformers", task)


def test_a_peers_own_environment_is_preferred_once_it_is_finished(tmp_path: Path) -> None:
    assert python_for("no_such_engine", tmp_path) is None
    assert python_for("transformers", tmp_path) == Path(sys.executable)
    own = tmp_path / "transformers" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    assert python_for("transformers", tmp_path) == Path(sys.executable), "half-made"
    (tmp_path / "transformers" / "installed.txt").touch()
    assert python_for("transformers", tmp_path) == own


def test_missing_input_is_exit_code_2_and_says_why(
    debug_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--bundle", str(tmp_path / "none"), "--threads", "1"]) == 2
    assert "none/manifest.json" in capsys.readouterr().err
    assert main(["--bundle", str(debug_run[1]), "--data", str(tmp_path), "--threads", "1"]) == 2
    assert "make data" in capsys.readouterr().err
