"""An index that was saved and mapped decodes like the catalog it was built from; what cannot be served is refused."""

import json
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from model.catalog import Catalog
from model.decoding.beam_decoder import BeamDecoder
from model.decoding.beam_plan import DRAFT_FREE
from model.decoding.beam_request import BeamRequest
from model.decoding.beam_tree import BeamTables, BeamTree
from model.decoding.beam_twin import BeamTwin
from model.decoding.catalog_index import CatalogIndex, CatalogRefused
from model.decoding.filters import compile_stock
from model.decoding.list_decoder import ListDecoder
from model.decoding.request import CategoryFilter, ListRequest, RangeFilter
from model.decoding.strategies import Strategies
from model.decoding.topology import Budget, FixedBudget
from model.item_trie import ItemTrie
from model.semantic_id import Codes, Vocabulary
from tests.model.conftest import SIZES, Tiny, random_catalog, tiny

__all__ = ["tiny"]
VOCABULARY = Vocabulary.compact(SIZES)
FILTERS = {"genre": CategoryFilter(("a", "c")), "year": RangeFilter(1992, 1998)}


def index_of(catalog: Catalog, folder: Path) -> CatalogIndex:
    CatalogIndex.build(catalog, "v2", VOCABULARY).save(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return CatalogIndex.load(folder, VOCABULARY)


def decoder(tiny: Tiny, index: CatalogIndex) -> ListDecoder:
    return ListDecoder(
        tiny.target,
        tiny.draft(),
        index.trie,
        index.attributes,
        num_rows=3,
        max_history_items=6,
        max_k=20,
        budget=FixedBudget(Budget(3)),
    )


def lists(decoder: ListDecoder, *requests: ListRequest) -> dict[str, list[tuple[int, ...]]]:
    for request in requests:
        decoder.validate(request)
    results = decoder.admit(requests)
    while decoder.rows.in_use:
        results += decoder.round()[0]
    return {result.request_id: [item.codes for item in result.items] for result in results}


def test_a_mapped_trie_is_the_built_one_table_by_table(tmp_path: Path) -> None:
    catalog = random_catalog(3)
    built = CatalogIndex.build(catalog, "v2", VOCABULARY)
    mapped = index_of(catalog, tmp_path)
    built_tables, mapped_tables = built.trie.tables(), mapped.trie.tables()
    assert built_tables.keys() == mapped_tables.keys()
    for name, table in built_tables.items():
        assert table.dtype == mapped_tables[name].dtype
        assert table.tolist() == mapped_tables[name].tolist(), name
    assert (mapped.version, mapped.popular) == ("v2", built.popular)
    assert mapped.popular[0] == max(catalog.items, key=lambda i: (i.popularity, -int(i.item_id))).codes
    mapped.check(catalog)


def test_lists_over_a_mapped_index_are_the_twins_over_its_catalog(tiny: Tiny, tmp_path: Path) -> None:
    catalog = random_catalog(5)
    codes = [item.codes for item in catalog.items]
    other = Tiny(catalog, ItemTrie(np.array(codes), VOCABULARY), tiny.target, codes)
    index = index_of(catalog, tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()  # what is mapped stays
    plain = ListRequest("plain", tuple(codes[:3]), 7)
    filtered = ListRequest("filtered", tuple(codes[:3]), 7, filters=FILTERS)
    found = lists(decoder(tiny, index), plain, filtered)
    assert found == {r.request_id: [i.codes for i in other.twin(r).items] for r in (plain, filtered)}


def test_what_is_out_of_stock_is_in_no_list_and_the_rest_is_the_twins(tiny: Tiny, tmp_path: Path) -> None:
    catalog = tiny.catalog
    index = index_of(catalog, tmp_path)
    made = decoder(tiny, index)
    plain = ListRequest("plain", tuple(tiny.codes[:3]), 6)
    filtered = replace(plain, request_id="filtered", filters=FILTERS)
    before = lists(made, plain, filtered)
    out = [before["plain"][0], before["plain"][3], before["filtered"][1]]
    made.rows.filters.set_stock(compile_stock(index.trie, index.trie.leaves(np.array([*out, (5, 5, 4, 9)]))))
    after = lists(made, plain, filtered)
    for request in (plain, filtered):
        twin = tiny.twin(replace(request, exclude=tuple(out)))
        assert after[request.request_id] == [item.codes for item in twin.items]
    made.rows.filters.set_stock(None)
    assert lists(made, plain, filtered) == before
    made.rows.check_integrity()


def test_beams_over_a_mapped_index_know_its_catalog_and_its_stock(tiny: Tiny, tmp_path: Path) -> None:
    index = index_of(tiny.catalog, tmp_path)
    built = BeamTables.of(index.trie)
    for field in fields(BeamTables):
        assert list(getattr(index.beams, field.name)) == list(getattr(built, field.name)), field.name
    limits = {"num_rows": 3, "max_history_items": 6, "max_k": 8}
    tree = BeamTree(index.trie, index.beams)
    beams = BeamDecoder(tiny.target, index.trie, index.attributes, plan=DRAFT_FREE, tree=tree, **limits)
    made = Strategies(decoder(tiny, index), beams)
    request, twin = BeamRequest("b", tuple(tiny.codes[:3]), 6), BeamTwin(tiny.target, tiny.codes, 6)

    def found() -> list[Codes]:
        results = made.admit([request])
        while made.rows.in_use:
            results += made.round()[0]
        return [item.codes for item in results[0].items]

    before = found()
    assert before == [item.codes for item in twin.decode(request).items]
    out = before[::2]
    made.set_stock(compile_stock(index.trie, index.trie.leaves(np.array(out))))
    assert found() == [item.codes for item in twin.decode(replace(request, exclude=tuple(out))).items]
    assert not set(lists(made.lists, ListRequest("l", request.history, 8))["l"]) & set(out)


def test_a_row_keeps_the_stock_it_began_with(tiny: Tiny, tmp_path: Path) -> None:
    index = index_of(tiny.catalog, tmp_path)
    made = decoder(tiny, index)
    request = ListRequest("r", tuple(tiny.codes[:3]), 8)
    expected = [item.codes for item in tiny.twin(request).items]
    made.admit([request])
    results = made.round()[0]
    made.rows.filters.set_stock(compile_stock(index.trie, index.trie.leaves(np.array(expected))))
    made.admit([replace(request, request_id="later")])
    while made.rows.in_use:
        results += made.round()[0]
    found = {result.request_id: [item.codes for item in result.items] for result in results}
    assert found["r"] == expected
    assert found["later"] == [i.codes for i in tiny.twin(replace(request, exclude=tuple(expected))).items]


def test_a_catalog_the_target_has_no_tokens_for_is_refused() -> None:
    for sizes in ((6, 6, 5), (6, 6, 5, 5)):
        catalog = random_catalog(0, sizes=sizes)
        with pytest.raises(CatalogRefused, match="codebooks"):
            CatalogIndex.build(catalog, "v2", VOCABULARY)
    CatalogIndex.build(random_catalog(0, sizes=(6, 5, 5, 4)), "v2", VOCABULARY)


def test_an_index_that_is_not_its_catalogs_is_found_out() -> None:
    index = CatalogIndex.build(random_catalog(1), "v2", VOCABULARY)
    with pytest.raises(CatalogRefused):
        index.check(random_catalog(2))
    with pytest.raises(CatalogRefused, match="items"):
        index.check(random_catalog(1, count=20))


def test_a_folder_that_is_no_index_of_this_bundle_is_refused(tmp_path: Path) -> None:
    index_of(random_catalog(1), tmp_path)
    with pytest.raises(CatalogRefused, match="another bundle"):
        CatalogIndex.load(tmp_path, Vocabulary.compact((6, 6, 5, 9)))
    (tmp_path / "run_end.npy").unlink()
    with pytest.raises(CatalogRefused, match="cannot be read"):
        CatalogIndex.load(tmp_path, VOCABULARY)
    (tmp_path / "index.json").write_text(json.dumps({"vocabulary": VOCABULARY.as_dict()}))
    with pytest.raises(CatalogRefused, match="cannot be read"):
        CatalogIndex.load(tmp_path, VOCABULARY)


def test_golden_requests_can_be_decoded_whatever_the_size_of_the_catalog(tiny: Tiny, tmp_path: Path) -> None:
    for count in (1, 2, 9, 200):
        folder = tmp_path / str(count)
        folder.mkdir()
        index = index_of(random_catalog(1, count=count), folder)
        golden = index.golden_requests(3, 6)
        assert all(lists(decoder(tiny, index), *golden).values())
