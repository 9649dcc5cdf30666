import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.config import DataConfig
from model.data.amazon import distinct, is_amazon, read_catalog, read_split
from model.data.histories import Case, cases, last_cases
from model.data.movielens import DataError

CONFIG = DataConfig(validation_users=10, held_out_users=10)
SEQUENCES = [
    {"user": 0, "train": [1, 2], "valid": [3], "test": [4, 5]},
    {"user": 1, "train": [2, 6, 1], "valid": [], "test": []},
    {"user": "u", "train": [3], "valid": [], "test": [1]},
    {"user": 3, "train": [5], "valid": [6, 2], "test": []},
]
ITEMS = [{"item": item, "codes": [item % 3, item, 0]} for item in range(1, 8)]


def write(folder: Path, sequences: list[Any] = SEQUENCES, items: list[Any] = ITEMS) -> Path:
    for name, lines in (("sequences", sequences), ("semantic_ids", items)):
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_a_folder_is_told_by_its_files(tmp_path: Path) -> None:
    assert not is_amazon(tmp_path)
    assert is_amazon(write(tmp_path))


def test_the_split_is_the_published_one_and_a_history_says_what_is_known(tmp_path: Path) -> None:
    split = read_split(write(tmp_path), CONFIG)
    assert [(u.user_id, u.item_ids, u.known) for u in split.train] == [
        ("0", ("1", "2"), 0),
        ("1", ("2", "6", "1"), 0),
        ("u", ("3",), 0),
        ("3", ("5",), 0),
    ]
    assert [(u.user_id, u.item_ids, u.known) for u in split.validation] == [
        ("0", ("1", "2", "3"), 2),
        ("3", ("5", "6", "2"), 1),
    ]
    assert [(u.user_id, u.item_ids, u.known) for u in split.test] == [
        ("0", ("1", "2", "3", "4", "5"), 3),
        ("u", ("3", "1"), 1),
    ]
    assert split.train[1].timestamps == (0, 1, 2)


def test_a_case_asks_for_the_test_part_after_all_that_came_before(tmp_path: Path) -> None:
    split = read_split(write(tmp_path), CONFIG)
    expected = [Case("0", ("1", "2", "3"), ("4", "5")), Case("u", ("3",), ("1",))]
    assert cases(split.test, CONFIG) == last_cases(split.test, CONFIG) == expected


def test_so_many_users_are_used_as_the_recipe_says(tmp_path: Path) -> None:
    few = read_split(write(tmp_path), replace(CONFIG, validation_users=1, held_out_users=1))
    assert [u.user_id for u in (*few.validation, *few.test)] == ["0", "0"]
    assert len(few.train) == 4
    assert len(read_split(write(tmp_path), replace(CONFIG, max_users=3)).train) == 3
    with pytest.raises(DataError, match="no user to validate on"):
        read_split(write(tmp_path, SEQUENCES[1:3]), CONFIG)


def test_published_codes_are_the_catalog_and_popularity_counts_training_alone(tmp_path: Path) -> None:
    catalog = read_catalog(write(tmp_path), read_split(tmp_path, CONFIG))
    assert {i.item_id: i.codes for i in catalog.items} == {str(i): (i % 3, i, 0) for i in range(1, 8)}
    assert catalog.codebook_sizes == (3, 8, 1)
    assert {i.item_id: i.popularity for i in catalog.items} == {"1": 2, "2": 2, "3": 1, "4": 0, "5": 1, "6": 1, "7": 0}


def test_an_item_that_shares_a_semantic_id_takes_the_next_free_code() -> None:
    assert distinct([(1, 4), (1, 4), (1, 5), (1, 4), (2, 4), (1, 5)]) == [
        (1, 4),
        (1, 6),
        (1, 5),
        (1, 7),
        (2, 4),
        (1, 8),
    ]


def test_the_last_codebook_grows_where_no_code_is_free(tmp_path: Path) -> None:
    items = [*ITEMS, {"item": 8, "codes": [1, 7, 0]}]
    catalog = read_catalog(write(tmp_path, items=items), read_split(tmp_path, CONFIG))
    assert catalog.items[-1].codes == (1, 7, 1)
    assert catalog.codebook_sizes == (3, 8, 2)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "line 2 is malformed"),
        ("[]", "line 2 is malformed"),
        ({"user": 1, "train": [1], "valid": []}, r"line 2.*'test' is missing"),
        ({"user": 1, "train": [1], "valid": 3, "test": []}, r"line 2.*'valid' must be a list"),
        ({"user": 1, "train": [1, None], "valid": [], "test": []}, r"line 2.*'train' must be a number or a name"),
        ({"user": 1, "train": [1, True], "valid": [], "test": []}, r"line 2.*'train' must be a number or a name"),
        ({"user": None, "train": [1], "valid": [], "test": []}, r"line 2.*'user' must be"),
        ({"user": 1, "train": [], "valid": [1], "test": []}, r"line 2.*'train' must hold"),
        ({"user": 1, "train": [1, 2], "valid": [1], "test": []}, r"line 2.*occurs twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, named: str) -> None:
    with pytest.raises(DataError, match=rf"sequences\.jsonl {named}"):
        read_split(write(tmp_path, [SEQUENCES[0], line]), CONFIG)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ({"item": 9}, r"line 8.*'codes' is missing"),
        ({"item": 9, "codes": "abc"}, r"line 8.*'codes' must be a list"),
        ({"item": 9, "codes": []}, r"line 8.*'codes' must be whole numbers"),
        ({"item": 9, "codes": [1, -1, 0]}, r"line 8.*'codes' must be whole numbers"),
        ({"item": 9, "codes": [1, 1.0, 0]}, r"line 8.*'codes' must be whole numbers"),
        ({"item": 7, "codes": [1, 1, 1]}, "item IDs must be distinct"),
        ({"item": 9, "codes": [1, 1]}, "zip"),
    ],
)
def test_bad_semantic_ids_are_named(tmp_path: Path, line: object, named: str) -> None:
    split = read_split(write(tmp_path), CONFIG)
    with pytest.raises(DataError, match=rf"semantic_ids\.jsonl.*{named}"):
        read_catalog(write(tmp_path, items=[*ITEMS, line]), split)


def test_an_item_without_a_semantic_id_and_a_missing_file_are_named(tmp_path: Path) -> None:
    split = read_split(write(tmp_path, items=ITEMS[1:]), CONFIG)
    with pytest.raises(DataError, match="no semantic ID for item '1' of user '0'"):
        read_catalog(tmp_path, split)
    (tmp_path / "semantic_ids.jsonl").unlink()
    with pytest.raises(DataError, match=r"semantic_ids\.jsonl cannot be read"):
        read_catalog(tmp_path, split)
