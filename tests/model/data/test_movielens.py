from pathlib import Path

import pytest

from model.data.histories import Interaction
from model.data.movielens import DataError, read_movielens, read_titles

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"


def write(folder: Path, inter: str = "", item: str = "") -> Path:
    (folder / "ml-100k.inter").write_text(INTER + inter, encoding="utf-8")
    (folder / "ml-100k.item").write_text(ITEM + item, encoding="utf-8")
    return folder


def test_rows_become_interactions_in_the_order_of_the_file(tmp_path: Path) -> None:
    logs = read_movielens(write(tmp_path, "7\t242\t3\t881250949\n3\t12\t5\t8.5e8\n"))
    assert logs.interactions == (Interaction("7", "242", 881250949), Interaction("3", "12", 850000000))


def test_genres_are_categories_and_the_year_a_number_where_it_is_known(tmp_path: Path) -> None:
    items = "1\tToy Story\t1995\tAnimation Children's Comedy\n2\tunknown\tV\t\n"
    assert read_movielens(write(tmp_path, item=items)).attributes == {
        "1": {"genre": ["Animation", "Children's", "Comedy"], "year": 1995},
        "2": {"genre": []},
    }


def test_a_quotation_mark_in_a_title_is_only_a_letter(tmp_path: Path) -> None:
    write(tmp_path, item='1\t"Mr. Smith\t1939\tDrama\n2\tCyrano "de" B\t1990\tDrama\n')
    assert read_titles(tmp_path) == {"1": '"Mr. Smith', "2": 'Cyrano "de" B'}


def test_missing_logs_name_the_file_and_what_fetches_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ml-100k\.inter.*make data"):
        read_movielens(tmp_path)


@pytest.mark.parametrize("row", ["7\t242\t3\tsoon\n", "7\t242\t3\n", "7\t242\t3\tinf\n"])
def test_malformed_logs_name_the_file_and_the_line(tmp_path: Path, row: str) -> None:
    with pytest.raises(DataError, match=r"ml-100k\.inter line 3"):
        read_movielens(write(tmp_path, "1\t1\t1\t1\n" + row))


def test_logs_without_the_expected_columns_are_a_data_error(tmp_path: Path) -> None:
    write(tmp_path, item="1\tToy Story\t1995\tComedy\n")
    (tmp_path / "ml-100k.inter").write_text("user\titem\n1\t2\n")
    with pytest.raises(DataError, match="user_id:token"):
        read_movielens(tmp_path)


def test_an_item_row_cut_short_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ml-100k\.item line 2"):
        read_movielens(write(tmp_path, item="1\tToy Story\n"))
