"""MovieLens-100K as set-up unpacked it: titles and real histories for the demo and the load bench.

Reads recbole's tab-separated files. Knows bundles only by the held-out users their report names.
"""

import json
from pathlib import Path

DATA = Path(".data/ml-100k")
BUNDLE = Path("model/bundles/movielens-100k")
ITEMS, INTERACTIONS = "ml-100k.item", "ml-100k.inter"
HELD_BACK = 10  # newest interactions of a held-out user, not shown to the model


class DataMissing(Exception):
    """A file that is not there or is not what it should be; the message is one line that says what to do."""


def held_out_histories(bundle: Path, data: Path) -> dict[str, list[str]]:
    """user ID -> item IDs of all but the newest 10 interactions, oldest first, of users the bundle did not train on."""
    try:
        report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
        users = [str(user) for user in report["held_out_users"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataMissing(f"{bundle} is no bundle with held-out users in its report.json ({error!r})") from error
    histories = read_histories(data / INTERACTIONS)
    found = {user: histories[user][:-HELD_BACK] for user in users if len(histories.get(user, ())) > HELD_BACK}
    if not found:
        raise DataMissing(f"no held-out user of {bundle} has a history in {data}")
    return found


def read_histories(path: Path) -> dict[str, list[str]]:
    """user ID -> item IDs in the order of time; equal times keep the file's order."""
    histories: dict[str, list[str]] = {}
    for row in sorted(_rows(path), key=lambda row: float(row["timestamp"])):
        histories.setdefault(row["user_id"], []).append(row["item_id"])
    return histories


def read_titles(data: Path) -> dict[str, str]:
    """item ID -> "Title (year)"."""
    return {
        row["item_id"]: f"{row['movie_title']} ({row['release_year']})" if row["release_year"] else row["movie_title"]
        for row in _rows(data / ITEMS)
    }


def _rows(path: Path) -> list[dict[str, str]]:
    """Rows of a recbole file: a header of `name:type` cells, then tab-separated values."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataMissing(f"{path} is missing ({error.strerror}); `make data` fetches it") from error
    names = [cell.split(":")[0] for cell in lines[0].split("\t")]
    return [dict(zip(names, line.split("\t"), strict=True)) for line in lines[1:] if line]
