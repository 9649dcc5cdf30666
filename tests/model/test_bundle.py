import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.bundle import BundleError, load_bundle, main, save_manifest, verify
from model.catalog import Catalog
from model.decoding.beam_request import BeamRequest
from model.decoding.beam_twin import BeamTwin
from model.decoding.budget import LoadBudget
from model.decoding.offline import decode_all
from model.decoding.strategies import Strategies
from model.semantic_id import Vocabulary


@pytest.fixture
def bundle(debug_run: tuple[Path, Path], tmp_path: Path) -> Path:
    """A bundle that a test may spoil."""
    shutil.copytree(debug_run[1], tmp_path / "debug")
    return tmp_path / "debug"


def manifest(bundle: Path, **changes: Any) -> dict[str, Any]:
    """The manifest, rewritten with `changes`."""
    values: dict[str, Any] = json.loads((bundle / "manifest.json").read_text()) | changes
    (bundle / "manifest.json").write_text(json.dumps(values))
    return values


def resign(bundle: Path) -> None:
    """Make the sums fit whatever is in the folder now."""
    old = manifest(bundle)
    save_manifest(bundle, old["name"], Vocabulary.from_dict(old["vocabulary"]), old["max_history_items"])


def refused(bundle: Path, reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        load_bundle(bundle)


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_bundle_loads_and_decodes_the_lists_asked_for(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    decoder = loaded.list_decoder(num_rows=2, max_k=10)
    requests = loaded.golden_requests(3)
    results = decode_all(decoder, requests).results
    valid = {item.codes for item in loaded.catalog.items}
    for request in requests:
        codes = [item.codes for item in results[request.request_id].items]
        assert len(set(codes)) == request.k == len(codes)
        assert set(codes) <= valid - set(request.history)


def test_a_bundle_warms_up_and_serves_lists_and_beams(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    both = loaded.strategies(num_rows=2, max_k=10)
    loaded.warm_up(both)
    both.rows.check_integrity()
    assert both.rows.num_free == 2
    asked = loaded.golden_requests(1)[0]
    found = both.admit([BeamRequest("beam", asked.history, 7), replace(asked, request_id="list", k=3)])
    while both.rows.in_use:
        found += both.round()[0]
    items = {result.request_id: [item.codes for item in result.items] for result in found}
    twin = BeamTwin(loaded.target, [item.codes for item in loaded.catalog.items], loaded.info.max_history_items)
    assert items["beam"] == [item.codes for item in twin.decode(BeamRequest("twin", asked.history, 7)).items]
    assert len(items["list"]) == 3


def test_a_second_warm_up_takes_over_what_the_first_measured(bundle: Path, tmp_path: Path) -> None:
    loaded, file = load_bundle(bundle), tmp_path / "measured.json"

    def warmed(num_rows: int) -> Strategies:
        both = loaded.strategies(num_rows=num_rows, max_k=10)
        loaded.warm_up(both, file)
        return both

    first, second = warmed(2), warmed(2)
    assert isinstance(first.lists.budget, LoadBudget) and isinstance(second.lists.budget, LoadBudget)
    assert second.lists.budget.seconds == first.lists.budget.seconds
    assert second.beams.plan == first.beams.plan
    written = file.read_bytes()
    other = warmed(3)  # other decoders: nothing is known of them
    assert isinstance(other.lists.budget, LoadBudget) and max(other.lists.budget.seconds) == 3
    assert file.read_bytes() != written
    with pytest.raises(OSError, match="No such file"):
        loaded.warm_up(other, tmp_path / "away" / "measured.json")
    asked = loaded.golden_requests(3)
    lists = [decode_all(both.lists, asked).results for both in (first, second, other)]
    assert [[i.codes for i in r["golden-1"].items] for r in lists] == [
        [i.codes for i in lists[0]["golden-1"].items]
    ] * 3


def test_golden_requests_ask_with_popular_items_and_are_always_the_same(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    requests = loaded.golden_requests(4)
    assert requests == loaded.golden_requests(4)
    top = sorted((item.popularity for item in loaded.catalog.items), reverse=True)[: 4 * 8]
    popularity = {item.codes: item.popularity for item in loaded.catalog.items}
    assert all(1 <= len(r.history) <= loaded.info.max_history_items for r in requests)
    assert min(popularity[c] for r in requests for c in r.history) >= top[-1]


def test_the_version_names_the_content(bundle: Path) -> None:
    before = manifest(bundle)["version"]
    resign(bundle)
    assert manifest(bundle)["version"] == before
    (bundle / "README.md").write_text("other words")
    resign(bundle)
    assert manifest(bundle)["version"] != before


FILES = ("catalog.jsonl", "target/model.safetensors", "target/config.json", "draft/model.safetensors", "report.json")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_by_name(bundle: Path, name: str) -> None:
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[:-1])
    refused(bundle, f"{name}: missing, truncated or changed")


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_one_bit_turned_is_refused_by_name(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    refused(bundle, f"{name}: missing, truncated or changed")


def test_a_missing_file_and_a_wrong_sum_are_refused(bundle: Path) -> None:
    files = manifest(bundle)["files"]
    files["report.json"]["sha256"] = "0" * 64
    manifest(bundle, files=files)
    refused(bundle, "report.json: missing, truncated or changed")
    (bundle / "report.json").unlink()
    refused(bundle, "report.json: missing, truncated or changed")


def test_a_file_that_is_not_listed_is_refused(bundle: Path) -> None:
    (bundle / "target" / "extra.json").write_text("{}")
    refused(bundle, r"target/extra\.json: not listed")


@pytest.mark.parametrize("name", ["weights.bin", "weights.pkl", "target/pytorch_model.pt", "target/modeling.py"])
def test_a_file_that_could_be_executed_is_refused_even_when_listed(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    resign(bundle)
    refused(bundle, f"{name}: only")


@pytest.mark.parametrize("name", ["../outside.json", "target/../../outside.json", "ABSOLUTE"])
def test_a_path_outside_the_bundle_is_refused(bundle: Path, name: str) -> None:
    outside = bundle.parent / "outside.json"
    outside.write_text("{}")
    files = manifest(bundle)["files"]
    files[str(outside) if name == "ABSOLUTE" else name] = files["report.json"]
    manifest(bundle, files=files)
    refused(bundle, "outside the bundle")


@pytest.mark.parametrize("name", ["a\0b.json", "x" * 400 + ".json"])
def test_a_file_name_no_system_takes_is_refused(bundle: Path, name: str) -> None:
    files = manifest(bundle)["files"]
    files[name] = files["report.json"]
    manifest(bundle, files=files)
    refused(bundle, "missing")


def test_a_symbolic_link_is_refused_even_to_equal_content(bundle: Path) -> None:
    (bundle / "report.json").rename(bundle.parent / "report.json")
    (bundle / "report.json").symlink_to(bundle.parent / "report.json")
    refused(bundle, r"report\.json: .*link")


def test_a_linked_folder_cannot_bring_in_weights_without_sums(bundle: Path) -> None:
    (bundle / "draft-plain").rename(bundle.parent / "elsewhere")
    files = {k: v for k, v in manifest(bundle)["files"].items() if not k.startswith("draft-plain/")}
    manifest(bundle, files=files)
    assert load_bundle(bundle).plain_draft is None
    (bundle / "draft-plain").symlink_to(bundle.parent / "elsewhere")
    refused(bundle, "draft-plain: .*link")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "files": []}', "\ud800"])
def test_a_manifest_that_is_none_is_refused(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    refused(bundle, r"manifest\.json")
    (bundle / "manifest.json").unlink()
    refused(bundle, r"manifest\.json")


def test_another_format_is_refused(bundle: Path) -> None:
    manifest(bundle, format=2)
    refused(bundle, "format 2 is not 1")


@pytest.mark.parametrize(
    "changes", [{"max_history_items": 0}, {"max_history_items": "many"}, {"vocabulary": {}}, {"vocabulary": None}]
)
def test_a_manifest_that_could_not_be_served_is_refused(bundle: Path, changes: dict[str, Any]) -> None:
    manifest(bundle, **changes)
    refused(bundle, "debug|max_history_items")


@pytest.mark.parametrize("folder", ["target", "draft", "draft-plain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bundle: Path, folder: str, value: float) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[max(weights)].view(-1)[0] = value

    edit_weights(bundle / folder / "model.safetensors", spoil)
    resign(bundle)
    refused(bundle, "not finite")


@pytest.mark.parametrize("folder", ["target", "draft"])
def test_weights_of_another_shape_are_refused(bundle: Path, folder: str) -> None:
    def cut(weights: dict[str, torch.Tensor]) -> None:
        name = next(n for n, w in weights.items() if w.dim() == 2)
        weights[name] = weights[name][:-1].clone()

    edit_weights(bundle / folder / "model.safetensors", cut)
    resign(bundle)
    refused(bundle, "debug|draft|target")


@pytest.mark.parametrize("folder", ["target", "draft"])
def test_weights_that_are_missing_are_refused_and_not_made_up(bundle: Path, folder: str) -> None:
    def lose(weights: dict[str, torch.Tensor]) -> None:
        del weights[sorted(weights)[1]]

    edit_weights(bundle / folder / "model.safetensors", lose)
    resign(bundle)
    refused(bundle, "debug|draft|target")


@pytest.mark.parametrize("folder", ["target", "draft"])
def test_a_weights_file_that_is_no_safetensors_is_refused(bundle: Path, folder: str) -> None:
    (bundle / folder / "model.safetensors").write_bytes(b"not weights at all")
    resign(bundle)
    refused(bundle, "debug|target")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("hidden_size", 64, "draft"),
        ("feature_layers", [0, 1, 3], "does not fit the target"),
        ("num_slots", 5, "draft"),
        ("num_heads", 0, "debug"),
        ("surprise", 1, "surprise"),
    ],
)
def test_a_draft_made_for_another_target_is_refused(bundle: Path, field: str, value: object, reason: str) -> None:
    path = bundle / "draft" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    resign(bundle)
    refused(bundle, reason)


def test_a_draft_with_too_few_slots_is_refused_before_a_request_finds_out(bundle: Path) -> None:
    path = bundle / "draft" / "config.json"
    shape = json.loads(path.read_text())
    path.write_text(json.dumps(shape | {"num_slots": shape["num_slots"] - 1}))

    def shorten(weights: dict[str, torch.Tensor]) -> None:
        weights["positions.item.weight"] = weights["positions.item.weight"][:-1].clone()

    edit_weights(bundle / "draft" / "model.safetensors", shorten)
    resign(bundle)
    refused(bundle, "slots")


def test_another_catalog_than_the_one_trained_for_is_refused(bundle: Path) -> None:
    catalog = Catalog.load(bundle / "catalog.jsonl")
    Catalog(catalog.codebook_sizes, catalog.items[:-1]).save(bundle / "catalog.jsonl")
    version = manifest(bundle)["catalog_version"]
    resign(bundle)
    manifest(bundle, catalog_version=version)
    refused(bundle, "not the catalog")


def test_a_catalog_with_other_codebooks_is_refused(bundle: Path) -> None:
    catalog = Catalog.load(bundle / "catalog.jsonl")
    wider = (*catalog.codebook_sizes[:-1], catalog.codebook_sizes[-1] + 1)
    Catalog(wider, catalog.items).save(bundle / "catalog.jsonl")
    resign(bundle)
    refused(bundle, "not the catalog")


def test_the_command_prints_what_a_bundle_says_of_itself(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundle)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["version"] == verify(bundle)["version"]
    assert "files" not in printed


def test_the_command_exits_1_and_says_why_a_bundle_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "report.json").write_text("{}")
    assert main([str(bundle)]) == 1
    assert "report.json: missing, truncated or changed" in capsys.readouterr().out
