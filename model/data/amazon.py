"""Amazon reviews as sequences of items with published semantic IDs: two files of JSON lines, split by time.

`sequences.jsonl` holds {user, train[], valid[], test[]}, each part in time order, `semantic_ids.jsonl` {item,
codes[]}. The semantic IDs become the catalog as they are; an item that shares one with an earlier item takes the next
free code of the last level. Nothing is known of the items but how often they were bought in training.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from model.catalog import Catalog, CatalogError, CatalogItem
from model.config import DataConfig
from model.data.histories import History, Split
from model.data.movielens import DataError
from model.semantic_id import Codes

SEQUENCES, SEMANTIC_IDS = "sequences.jsonl", "semantic_ids.jsonl"
PARTS = ("train", "valid", "test")
Parts = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
T = TypeVar("T")


def is_amazon(folder: Path) -> bool:
    """Whether the folder holds data of this kind."""
    return (folder / SEQUENCES).exists()


def read_split(folder: Path, config: DataConfig) -> Split:
    """What is trained on are the `train` parts; of users with a `valid` part, `validation_users` are validated on, and
    of those with a `test` part, `held_out_users` tested, each with all that came before as history. `max_users` of
    the file's users are read (0: all). Raises DataError."""
    sequences = list(_lines(folder / SEQUENCES, _sequence))
    if config.max_users:
        sequences = sequences[: config.max_users]
    train, validation, test = [], [], []
    for user, (bought, valid, last) in sequences:
        train.append(_history(user, bought, 0))
        if valid:
            validation.append(_history(user, bought + valid, len(bought)))
        if last:
            test.append(_history(user, bought + valid + last, len(bought + valid)))
    if not (validation and test):
        raise DataError(f"{folder / SEQUENCES} has no user to validate on, or none to test")
    return Split(tuple(train), tuple(validation[: config.validation_users]), tuple(test[: config.held_out_users]))


def read_catalog(folder: Path, split: Split) -> Catalog:
    """Every item with a published semantic ID; popularity counts the training parts. Raises DataError."""
    path = folder / SEMANTIC_IDS
    published = list(_lines(path, _semantic_id))
    counts = Counter(item for user in split.train for item in user.item_ids)
    codes = distinct([codes for _, codes in published])
    items = tuple(CatalogItem(item, own, counts[item], {}) for (item, _), own in zip(published, codes, strict=True))
    try:
        catalog = Catalog(tuple(max(level) + 1 for level in zip(*codes, strict=True)), items)
    except (CatalogError, ValueError) as exc:
        raise DataError(f"{path}: {exc}") from exc
    known = {item.item_id for item in items}
    for user in (*split.train, *split.validation, *split.test):
        for item in user.item_ids:
            if item not in known:
                raise DataError(f"{path} has no semantic ID for item {item!r} of user {user.user_id!r}")
    return catalog


def distinct(codes: list[Codes]) -> list[Codes]:
    """The same semantic IDs, each once: one that an earlier item has moves to the next free code of the last level,
    if need be behind the codebook's end."""
    taken, given, found = set(codes), set(), []
    for own in codes:
        if own in given:
            while own in taken:
                own = (*own[:-1], own[-1] + 1)
            taken.add(own)
        given.add(own)
        found.append(own)
    return found


def _history(user: str, items: tuple[str, ...], known: int) -> History:
    # The files have an order and no times: an item's place is its time.
    return History(user, items, tuple(range(len(items))), known)


def _sequence(line: dict[str, Any]) -> tuple[str, Parts]:
    train, valid, test = (tuple(_identifier(item, part) for item in _list(line, part)) for part in PARTS)
    items = (*train, *valid, *test)
    if not train:
        raise ValueError("'train' must hold at least one item")
    if len(set(items)) != len(items):
        raise ValueError("an item occurs twice")
    return _identifier(line["user"], "user"), (train, valid, test)


def _semantic_id(line: dict[str, Any]) -> tuple[str, Codes]:
    codes = _list(line, "codes")
    if not codes or not all(type(code) is int and code >= 0 for code in codes):
        raise ValueError("'codes' must be whole numbers from 0")
    return _identifier(line["item"], "item"), tuple(codes)


def _list(line: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(line[name], list):
        raise TypeError(f"{name!r} must be a list")
    values: list[Any] = line[name]
    return values


def _identifier(value: Any, name: str) -> str:
    if type(value) is not int and not (isinstance(value, str) and value):
        raise TypeError(f"{name!r} must be a number or a name")
    return str(value)


def _lines(path: Path, read: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield read(json.loads(line))
                except (ValueError, TypeError) as exc:
                    raise DataError(f"{path} line {number} is malformed: {exc}") from exc
                except KeyError as exc:
                    raise DataError(f"{path} line {number} is malformed: {exc} is missing") from exc
    except OSError as exc:
        raise DataError(f"{path} cannot be read ({exc.strerror})") from exc
