import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from model.bench.ablation import Compared, Twins, compared, main, mismatches, plot, twin_lists
from model.decoding.offline import decode_all
from model.decoding.profile import caterpillar
from model.decoding.topology import Budget
from model.train.run import main as train
from model.train.variants import VARIANTS

ROOT = Path(__file__).parents[3]
DRAFTS = ("popularity", *VARIANTS)


@pytest.fixture(scope="module")
def run(debug_run: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The debug run with every draft that is compared, each trained for seconds."""
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(debug_run[0], runs / "debug")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert train(["model/recipes/debug.toml", "--runs", str(runs), "--ablation", "--threads", "1"]) == 0
    return runs / "debug"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name their data relative to it."""
    monkeypatch.chdir(ROOT)


def test_the_command_measures_every_draft_and_draws_what_was_accepted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")]
    assert main(["--run", str(run), "--users", "3", "--repeats", "2", "--k", "4", "--threads", "1", *files]) == 0
    records = json.loads((tmp_path / "a.json").read_text())
    for temperature in (0.0, 1.0):
        of_it = [r for r in records if r["temperature"] == temperature]
        assert [r["draft"] for r in of_it] == ["none", *DRAFTS]
        for record in of_it:
            assert record["mismatches"] == 0
            assert record["ms_min"] <= record["ms_per_list"] <= record["ms_max"]
            assert record["draft_ms"] + record["verify_ms"] <= record["ms_max"]
            assert record["acceptance_length"] == pytest.approx(1 + sum(record["survival"]), abs=0.01)
            assert len(record["acceptance_by_step"]) == (0 if record["draft"] == "none" else 5)
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n{name} ") == printed.count(f"\n| {name} |") == 2 for name in ("none", *DRAFTS))
    drawn = {text.text for text in ElementTree.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")}
    assert {*DRAFTS, "debug, greedy", "debug, temperature 1"} <= drawn
    assert "none" not in drawn
    assert plot(records, "debug") == (tmp_path / "a.svg").read_text()


@pytest.fixture(scope="module")
def settings(run: Path) -> dict[bool, Compared]:
    """With and without the compiled kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return {native: compared(run, None, native=native) for native in (True, False)}


@pytest.fixture(scope="module")
def twins(settings: dict[bool, Compared]) -> dict[float, Twins]:
    """The slow twin's lists, greedy and sampled."""
    setting = settings[True]
    return {t: twin_lists(setting, setting.requests(setting.run.cases[:7], 5, t)) for t in (0.0, 1.0)}


@pytest.mark.parametrize(("name", "native"), [*((name, True) for name in DRAFTS), ("draft", False)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_draft_decodes_what_the_twin_decodes(
    settings: dict[bool, Compared], twins: dict[float, Twins], name: str, native: bool, temperature: float
) -> None:
    """In batches where rows end and begin at any time, in chains and in trees."""
    setting = settings[native]
    requests = setting.requests(setting.run.cases[:7], 5, temperature)
    for budget in (Budget(5), Budget(3, 3), caterpillar(4, 3, setting.run.trie.num_levels)):
        decoder = setting.decoder(setting.drafts[name], 5, budget, num_rows=3)
        decoded = decode_all(decoder, requests)
        decoder.rows.check_integrity()
        assert mismatches(decoded.results, twins[temperature])["mismatches"] == 0
        assert decoded.acceptance_length > 1


def test_popularity_is_counted_over_all_items_below_a_node(settings: dict[bool, Compared]) -> None:
    setting = settings[True]
    draft, trie, catalog = setting.drafts["popularity"], setting.run.trie, setting.run.catalog
    assert draft is not None
    assert draft.by_node is not None
    for depth in range(trie.num_levels + 1):
        for node in (trie.depth == depth).nonzero()[:-1, 0].tolist()[:40]:
            leaves = range(int(trie.leaf_start[node]), int(trie.leaf_start[node + 1]))
            below = sum(catalog.items[trie.item_of_leaf[leaf]].popularity for leaf in leaves)
            assert float(draft.by_node[node].exp()) == pytest.approx(below + 0.5)


def test_a_list_that_is_not_the_twins_is_counted(twins: dict[float, Twins]) -> None:
    right = {name: twin for name, (twin, _) in twins[0.0].items()}
    assert mismatches(right, twins[0.0]) == {"near_ties": 0, "mismatches": 0}
    name = next(iter(right))
    wrong = right | {name: replace(right[name], items=right[name].items[::-1])}
    for margin, key in ((1.0, "mismatches"), (0.0, "near_ties")):
        assert mismatches(wrong, {n: (twin, margin) for n, twin in right.items()})[key] == 1


def test_a_run_without_the_drafts_says_how_to_train_them(
    debug_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(debug_run[0])]) == 2
    assert "padrec train RECIPE --ablation" in capsys.readouterr().err


def test_data_that_is_not_there_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(run), "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
