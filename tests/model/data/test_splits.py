import json
from pathlib import Path

import pytest

from model.config import DataConfig
from model.data.movielens import DataError
from model.data.splits import read_split

ML_100K = Path(__file__).parents[3] / ".data" / "ml-100k"


def test_reviews_bring_their_split_and_ratings_are_split_by_user(tmp_path: Path) -> None:
    lines = [{"user": n, "train": [n, 10 + n], "valid": [20 + n], "test": [30 + n]} for n in range(3)]
    (tmp_path / "sequences.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_split(tmp_path, DataConfig(held_out_users=2, validation_users=1))
    assert [len(part) for part in (found.train, found.validation, found.test)] == [3, 1, 2]
    divided = read_split(ML_100K, DataConfig(held_out_users=5, validation_users=4))
    assert [len(part) for part in (divided.validation, divided.test)] == [4, 5]
    users = [user.user_id for part in (divided.train, divided.validation, divided.test) for user in part]
    assert len(set(users)) == len(users) == 943


def test_a_folder_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read_split(tmp_path, DataConfig())
