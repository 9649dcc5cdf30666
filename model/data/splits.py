"""The split of a folder of data, whichever kind it holds: Amazon reviews bring their own, MovieLens users are divided.

Knows the readers; nothing of catalogs or training.
"""

from pathlib import Path

from model.config import DataConfig
from model.data import amazon
from model.data.histories import Split, histories, split_users
from model.data.movielens import read_movielens


def read_split(folder: Path, config: DataConfig) -> Split:
    """Raises DataError, or ValueError where there are too few users."""
    if amazon.is_amazon(folder):
        return amazon.read_split(folder, config)
    return split_users(histories(read_movielens(folder)), config)
