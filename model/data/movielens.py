"""MovieLens-100K as the `recbole` wheel carries it: tab-separated files with typed headers.

Knows only the file format. Interactions with equal timestamps keep the order of the file, which is no order of the
user's: training shuffles them anew each epoch, evaluation takes them as they are.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from model.data.histories import Interaction, Logs

Row = dict[str, str]
T = TypeVar("T")


class DataError(ValueError):
    """Logs that are missing or malformed; the message names the file."""


def read_movielens(folder: Path) -> Logs:
    """Read `ml-100k.inter` and `ml-100k.item`. Raises DataError."""
    interactions = _rows(folder / "ml-100k.inter", _interaction)
    return Logs(tuple(interactions), dict(_rows(folder / "ml-100k.item", _attributes)))


def read_titles(folder: Path) -> dict[str, str]:
    """Item ID -> title, for people; never part of a bundle."""
    return dict(_rows(folder / "ml-100k.item", lambda row: (row["item_id:token"], row["movie_title:token_seq"])))


def _interaction(row: Row) -> Interaction:
    return Interaction(row["user_id:token"], row["item_id:token"], int(float(row["timestamp:float"])))


def _attributes(row: Row) -> tuple[str, dict[str, list[str] | float]]:
    entry: dict[str, list[str] | float] = {"genre": row["class:token_seq"].split()}
    if row["release_year:token"].isdigit():
        entry["year"] = int(row["release_year:token"])
    return row["item_id:token"], entry


def _rows(path: Path, read: Callable[[Row], T]) -> list[T]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            try:
                return [read(row) for row in rows]
            except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as exc:
                raise DataError(f"{path} line {rows.line_num} is malformed: {exc}") from exc
    except OSError as exc:
        raise DataError(f"{path} cannot be read ({exc.strerror}); `make data` fetches it") from exc
