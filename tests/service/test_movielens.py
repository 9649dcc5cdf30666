"""MovieLens is read as it lies: histories in the order of time, titles with their year, what is missing named."""

from pathlib import Path

import pytest

from service.movielens import DataMissing, held_out_histories, read_histories, read_titles
from tests.service.tiny_bundle import HELD_OUT_USER, item_ids, write_bundle, write_data


def test_histories_are_in_the_order_of_time_and_equal_times_keep_the_files_order(tmp_path: Path) -> None:
    histories = read_histories(write_data(tmp_path / "data", ["a", "b", "c", "d"]) / "ml-100k.inter")
    assert histories == {HELD_OUT_USER: ["d", "c", "b", "a"], "8": ["a", "b", "c"]}


def test_titles_carry_their_year_where_there_is_one(tmp_path: Path) -> None:
    assert read_titles(write_data(tmp_path / "data", ["a", "b"])) == {"a": "Film a", "b": "Film b (1990)"}


def test_the_newest_ten_interactions_of_held_out_users_are_kept_back(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "tiny")
    items = item_ids(bundle)[:14]
    histories = held_out_histories(bundle, write_data(tmp_path / "data", items))
    assert histories == {HELD_OUT_USER: items[::-1][:-10]}


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", ["a", "b"])
    with pytest.raises(DataMissing, match=r"report\.json"):
        held_out_histories(tmp_path, data)
    with pytest.raises(DataMissing, match="no held-out user"):
        held_out_histories(write_bundle(tmp_path / "tiny"), data)
    with pytest.raises(DataMissing, match=r"ml-100k\.item is missing"):
        read_titles(tmp_path)
