import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from model.bench import decode
from model.bench.decode import Bound, adversarial, disagreements, held_out_requests, main, twin_lists
from model.bundle import Bundle, load_bundle
from model.data.histories import histories
from model.data.movielens import DataError, read_movielens
from model.decoding.offline import decode_all
from model.decoding.request import ListRequest, ListResult
from model.kv_cache import Sight, Write

DATA = Path(__file__).parents[3] / ".data" / "ml-100k"
Twins = dict[str, tuple[ListResult, float]]
KEYS = {"variant", "batch", "lists", "ms_per_list", "ms_min", "ms_max", "speedup", "rounds", "acceptance_length"}
KEYS |= {"acceptance_by_slot", "acceptance_by_step", "budget_steps", "budget_nodes", "budget_width", "dtype"}
KEYS |= {"identical", "near_ties", "prefill_ms", "draft_ms", "verify_ms"}
KEYS |= {"next_recall@5", "next_ndcg@5", "future_recall@5", "future_ndcg@5"}
KEYS |= {"hidden_size", "mismatches", "invalid", "repeated", "excluded", "threads", "cores", "torch", "cpu"}


@pytest.fixture(scope="module")
def bundle(debug_run: tuple[Path, Path]) -> Bundle:
    return load_bundle(debug_run[1])


@pytest.fixture(scope="module")
def requests(bundle: Bundle) -> list[ListRequest]:
    return held_out_requests(bundle, DATA, 5, users=3)


@pytest.fixture(scope="module")
def twins(bundle: Bundle, requests: list[ListRequest]) -> Twins:
    return twin_lists(bundle, requests)


def test_requests_are_the_held_out_users_without_their_last_ten(bundle: Bundle) -> None:
    found = held_out_requests(bundle, DATA, 5)
    assert [r.request_id for r in found] == bundle.info.report["held_out_users"]
    item_of = {item.codes: item.item_id for item in bundle.catalog.items}
    by_user = {h.user_id: h.item_ids for h in histories(read_movielens(DATA))}
    for request in found:
        assert tuple(item_of[codes] for codes in request.history) == by_user[request.request_id][:-10]
        assert request.k == 5
    assert held_out_requests(bundle, DATA, 5, users=3) == found[:3]


def test_a_bundle_from_other_data_is_a_data_error(bundle: Bundle) -> None:
    stranger = replace(bundle, info=replace(bundle.info, report={"held_out_users": ["nobody"]}))
    with pytest.raises(DataError, match="nobody"):
        held_out_requests(stranger, DATA, 5)
    with pytest.raises(DataError, match="held-out"):
        held_out_requests(replace(bundle, info=replace(bundle.info, report={})), DATA, 5)


def results(twins: Twins) -> dict[str, ListResult]:
    return {name: result for name, (result, _) in twins.items()}


def test_lists_equal_to_the_twins_agree(bundle: Bundle, requests: list[ListRequest], twins: Twins) -> None:
    assert disagreements(bundle, requests, results(twins), twins) == {
        "identical": 1.0,
        "near_ties": 0,
        "mismatches": 0,
        "invalid": 0,
        "repeated": 0,
        "excluded": 0,
    }


@pytest.mark.parametrize(("margin", "counted"), [(0.5, "mismatches"), (1e-5, "near_ties")])
def test_a_list_in_another_order_is_a_mismatch_unless_it_was_nearly_a_tie(
    bundle: Bundle, requests: list[ListRequest], twins: Twins, margin: float, counted: str
) -> None:
    name = requests[1].request_id
    swapped = replace(twins[name][0], items=twins[name][0].items[::-1])
    found = disagreements(bundle, requests, results(twins), twins | {name: (swapped, margin)})
    assert found[counted] == 1
    assert found["mismatches"] + found["near_ties"] == 1
    assert found["identical"] == pytest.approx(2 / 3)


def test_items_that_must_not_be_there_are_counted(bundle: Bundle, requests: list[ListRequest], twins: Twins) -> None:
    request = requests[0]
    items = list(twins[request.request_id][0].items)
    items[0] = replace(items[0], codes=(9999, 0, 0, 0))
    items[1] = items[2]
    items[3] = replace(items[3], codes=request.history[0])
    spoiled = results(twins) | {request.request_id: replace(twins[request.request_id][0], items=tuple(items))}
    found = disagreements(bundle, requests, spoiled, twins)
    assert (found["invalid"], found["repeated"], found["excluded"]) == (1, 1, 1)
    assert found["mismatches"] + found["near_ties"] == 1


def run(debug_run: tuple[Path, Path], *options: str) -> int:
    given = ["--bundle", str(debug_run[1]), "--data", str(DATA), "--threads", "1", "--k", "5", "--users", "2"]
    return main([*given, *options])


def test_the_records_hold_what_is_promised_for_every_variant_and_batch(
    debug_run: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "records.json"
    drawn = tmp_path / "plot.svg"
    assert run(debug_run, "--batch", "1", "2", "--repeats", "2", "--json", str(path), "--plot", str(drawn)) == 0
    titles = [element.text for element in ElementTree.parse(drawn).iter() if element.tag.endswith("title")]
    assert {"padrec 1", "padrec 2", "plain 2"} <= {str(title).partition(":")[0] for title in titles}
    records = json.loads(path.read_text())
    variants = ["bound", "plain", "plain-forced", "draft", "padrec"]
    assert [(r["variant"], r["batch"]) for r in records] == [(v, b) for b in (1, 2) for v in variants]
    for record in records:
        assert record["lists"] == 2
        assert record["ms_min"] <= record["ms_per_list"] <= record["ms_max"]
        if record["variant"] == "bound":
            assert record["speedup"] > 0
            continue
        assert set(record) == KEYS
        assert record["identical"] + record["near_ties"] / 2 == 1.0
        assert record["threads"] == 1
    by_name = {(r["variant"], r["batch"]): r for r in records}
    for batch in (1, 2):
        assert by_name["plain", batch]["speedup"] == 1.0
        assert by_name["plain", batch]["acceptance_length"] == 1.0
        assert by_name["plain-forced", batch]["rounds"] < by_name["plain", batch]["rounds"]
    # Five items of four codes and a separator, a token a round; the first comes from the prefill, the last
    # separator is not needed.
    assert 5 * 5 - 2 <= by_name["plain", 1]["rounds"] <= 5 * 5


def test_a_wider_bundle_is_timed_on_the_same_lists(debug_run: tuple[Path, Path], tmp_path: Path) -> None:
    found = []
    for times in (1, 2):
        path = tmp_path / f"{times}.json"
        options = ("--batch", "1", "--repeats", "1", "--times-as-wide", str(times), "--json", str(path))
        assert run(debug_run, *options) == 0
        found.append({record["variant"]: record for record in json.loads(path.read_text())})
    narrow, wide = (records["plain"] for records in found)
    assert wide["hidden_size"] == 2 * narrow["hidden_size"]
    assert wide["same_as_fp32"] == 1
    assert wide["rounds"] == narrow["rounds"]
    assert wide["future_recall@5"] == narrow["future_recall@5"]


@pytest.mark.parametrize("batch", [1, 2])
def test_the_bound_reads_what_a_draft_that_is_always_right_would_have_verified(
    bundle: Bundle, requests: list[ListRequest], twins: Twins, batch: int
) -> None:
    lists = [twins[request.request_id][0] for request in requests]
    target, vocabulary = bundle.target, bundle.target.vocabulary
    read = [row for hidden in Bound(bundle, requests, lists, batch).run() for row in hidden]
    for request, found, hidden in zip(requests, lists, read, strict=True):
        prompt = vocabulary.list_prompt(request.history[-bundle.info.max_history_items :])
        written = [token for item in found.items for token in vocabulary.list_item_tokens(item.codes)][:-2]
        whole = torch.tensor([prompt + written])
        positions = torch.arange(whole.shape[1])[None]
        at = Write(torch.zeros(1, 1, dtype=torch.int64), positions, 0, 0)
        cache = target.new_cache(1, whole.shape[1])
        right = target(whole, positions, cache, at, Sight(None, None, whole.shape[1])).hidden[0, len(prompt) :]
        torch.testing.assert_close(hidden[: len(written)], right, atol=1e-4, rtol=1e-4)


def test_the_exactness_check_covers_three_drafts_three_loads_and_three_kinds_of_tree(
    debug_run: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "records.json"
    assert run(debug_run, "--exact", "--json", str(path)) == 0
    records = json.loads(path.read_text())
    asked = {(r["draft"], r["batch"], r["tree"]) for r in records}
    drafts, trees = ("trained", "random", "adversarial"), ("chain", "dynamic", "static")
    assert asked == {(d, b, t) for d in drafts for b in (1, 8, 32) for t in trees}
    assert len(records) == 27
    assert all(r["mismatches"] == r["invalid"] == r["repeated"] == r["excluded"] == 0 for r in records)


@pytest.mark.parametrize("options", [("--batch", "1", "--repeats", "1"), ("--exact",)])
def test_a_mismatch_is_exit_code_1(
    debug_run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    def tampered(bundle: Bundle, requests: list[ListRequest]) -> Twins:
        found = twin_lists(bundle, requests)
        name = requests[-1].request_id
        return found | {name: (replace(found[name][0], items=found[name][0].items[::-1]), 1.0)}

    monkeypatch.setattr(decode, "twin_lists", tampered)
    assert run(debug_run, *options) == 1


def test_a_missing_bundle_or_missing_data_is_exit_code_2_and_says_why(
    debug_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--bundle", str(tmp_path / "none"), "--threads", "1"]) == 2
    assert "none/manifest.json" in capsys.readouterr().err
    assert main(["--bundle", str(debug_run[1]), "--data", str(tmp_path), "--threads", "1"]) == 2
    assert "make data" in capsys.readouterr().err


def test_an_adversarial_draft_is_accepted_less_than_the_trained_one(
    bundle: Bundle, requests: list[ListRequest]
) -> None:
    assert bundle.draft is not None
    lengths = []
    for draft in (bundle.draft, adversarial(bundle, bundle.draft)):
        decoder = bundle.list_decoder(num_rows=3, max_k=5, draft=draft)
        lengths.append(decode_all(decoder, requests).acceptance_length)
    assert lengths[0] > lengths[1]
