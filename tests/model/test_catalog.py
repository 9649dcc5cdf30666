import json
from dataclasses import replace
from pathlib import Path

import pytest

from model.catalog import Catalog, CatalogError, CatalogItem

ITEMS = (
    CatalogItem("a", (0, 1), 5, {"genre": ["Comedy", "Action"], "year": 1997}),
    CatalogItem("b", (0, 0), 9, {"genre": ["Action"]}),
    CatalogItem("ü", (2, 1), 0, {"year": 1950.5}),
)
CATALOG = Catalog((3, 2), ITEMS)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    CATALOG.save(tmp_path / "catalog.jsonl")
    loaded = Catalog.load(tmp_path / "catalog.jsonl")
    assert loaded == CATALOG
    assert loaded.version == CATALOG.version


def test_item_ids_with_line_separators_inside_survive(tmp_path: Path) -> None:
    odd = Catalog((1, 1), (CatalogItem("a\u2028b\x85c\nd\re", (0, 0), 1, {"genre": ["x\x1cy\u2029z"]}),))
    odd.save(tmp_path / "catalog.jsonl")
    assert Catalog.load(tmp_path / "catalog.jsonl") == odd


@pytest.mark.parametrize(
    "changed",
    [
        replace(ITEMS[0], item_id="c"),
        replace(ITEMS[0], codes=(1, 1)),
        replace(ITEMS[0], popularity=6),
        replace(ITEMS[0], attributes={"genre": ["Action", "Comedy"], "year": 1997}),
        replace(ITEMS[0], attributes={}),
    ],
)
def test_the_version_changes_with_any_content(changed: CatalogItem) -> None:
    assert Catalog((3, 2), (changed, *ITEMS[1:])).version != CATALOG.version


def test_the_version_changes_with_the_codebooks_and_with_an_item_more() -> None:
    assert Catalog((4, 2), ITEMS).version != CATALOG.version
    assert Catalog((3, 2), ITEMS[:2]).version != CATALOG.version


def test_equal_content_has_an_equal_version_of_twelve_hex_digits() -> None:
    assert Catalog((3, 2), tuple(ITEMS)).version == CATALOG.version
    assert len(CATALOG.version) == 12
    int(CATALOG.version, 16)


def test_the_header_says_what_can_be_filtered_on(tmp_path: Path) -> None:
    CATALOG.save(tmp_path / "catalog.jsonl")
    header = json.loads((tmp_path / "catalog.jsonl").read_text().split("\n")[0])
    assert header == {
        "catalog_version": CATALOG.version,
        "num_levels": 2,
        "codebook_sizes": [3, 2],
        "attributes": {
            "genre": {"type": "categories", "values": ["Action", "Comedy"]},
            "year": {"type": "number", "min": 1950.5, "max": 1997},
        },
    }


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        ((), "at least one"),
        ((ITEMS[0], replace(ITEMS[1], item_id="a")), "item IDs"),
        ((ITEMS[0], replace(ITEMS[1], codes=(0, 1))), "semantic IDs"),
        ((replace(ITEMS[0], codes=(3, 0)),), "'a'"),
        ((replace(ITEMS[0], codes=(0, -1)),), "'a'"),
        ((replace(ITEMS[0], codes=(0,)),), "'a'"),
        ((replace(ITEMS[0], codes=(0, 1, 0)),), "'a'"),
    ],
)
def test_a_catalog_that_is_no_two_way_table_is_refused(items: tuple[CatalogItem, ...], reason: str) -> None:
    with pytest.raises(CatalogError, match=reason):
        Catalog((3, 2), items)


@pytest.mark.parametrize(
    "tamper",
    [
        lambda text: text.replace('"popularity": 9', '"popularity": 8'),
        lambda text: text.replace('"item_id": "b"', '"item_id": "c"'),
        lambda text: text.replace('"catalog_version": "', '"catalog_version": "0'),
        lambda text: text.replace("[3, 2]", "[4, 2]"),
        lambda text: "\n".join(text.split("\n")[:-2]) + "\n",
        lambda text: text[:-20],
        lambda text: text + "\n",
        lambda text: text.replace('"codes": [0, 0]', '"codes": "00"'),
        lambda text: text.replace('"popularity": 9', '"popular": 9'),
        lambda text: "",
        lambda text: "[]\n",
    ],
)
def test_a_tampered_file_is_refused_by_name(tmp_path: Path, tamper: object) -> None:
    path = tmp_path / "catalog.jsonl"
    CATALOG.save(path)
    assert callable(tamper)
    changed = tamper(path.read_text(encoding="utf-8"))
    assert changed != path.read_text(encoding="utf-8")
    path.write_text(changed, encoding="utf-8")
    with pytest.raises(CatalogError, match=r"catalog\.jsonl"):
        Catalog.load(path)


def test_a_missing_or_binary_file_is_a_catalog_error(tmp_path: Path) -> None:
    with pytest.raises(CatalogError):
        Catalog.load(tmp_path / "catalog.jsonl")
    (tmp_path / "catalog.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CatalogError):
        Catalog.load(tmp_path / "catalog.jsonl")
