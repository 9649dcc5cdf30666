"""What RecBole is given to train and to be judged on: the target's own split and cases. (RecBole has an environment of
its own, where nothing here is tested.)"""

from pathlib import Path

import pytest

from model.bench.sasrec import main, prefixes, write_cases
from model.data.histories import History


def test_every_item_but_the_first_is_asked_behind_the_newest_before_it() -> None:
    user = History("u", ("a", "b", "c", "d"), (0, 1, 2, 3))
    alone = History("v", ("a",), (0,))
    asked = prefixes([user, alone], most=2)
    assert asked == [("u", ("a",), "b"), ("u", ("a", "b"), "c"), ("u", ("b", "c"), "d")]


def test_cases_are_written_a_line_each_under_a_typed_header(tmp_path: Path) -> None:
    write_cases(tmp_path / "cases.inter", [("u", ("a", "b"), "c")])
    header, line = (tmp_path / "cases.inter").read_text().splitlines()
    assert header.split("\t") == ["user_id:token", "item_id_list:token_seq", "item_id:token"]
    assert line.split("\t") == ["u", "a b", "c"]


def test_data_that_is_not_there_is_an_error_and_not_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[3] / "model" / "recipes" / "amazon-beauty.toml"
    assert main([str(recipe), "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
