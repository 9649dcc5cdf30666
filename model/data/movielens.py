"""MovieLens-100K as the `recbole` wheel carries it: tab-separated files with typed headers.

Knows only the file format. Interactions with equal timestamps keep the order of the file, which is no order of the
user's: training shuffles them anew each epoch, evaluation takes them as they are.
"""

import csv
from pathlib import Path

from model.data.histories import Interaction, Logs


class DataError(ValueError):
    """Logs that are missing or malformed; the message names the file."""


def read_movielens(folder: Path) -> Logs:
    """Read `ml-100k.inter` and `ml-100k.item`. Raises DataError."""
    interactions = [
        Interaction(row["user_id:token"], row["item_id:token"], int(float(row["timestamp:float"])))
        for row in _rows(folder / "ml-100k.inter")
    ]
    attributes: dict[str, dict[str, list[str] | float]] = {}
    for row in _rows(folder / "ml-100k.item"):
        entry: dict[str, list[str] | float] = {"genre": row["class:token_seq"].split()}
        if row["release_year:token"].isdigit():
            entry["year"] = int(row["release_year:token"])
        attributes[row["item_id:token"]] = entry
    return Logs(tuple(interactions), attributes)


def read_titles(folder: Path) -> dict[str, str]:
    """Item ID -> title, for people; never part of a bundle."""
    return {r["item_id:token"]: r["movie_title:token_seq"] for r in _rows(folder / "ml-100k.item")}


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except OSError as exc:
        raise DataError(f"{path} cannot be read ({exc.strerror}); `make data` fetches it") from exc
