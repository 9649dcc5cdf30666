"""What tests share: a real Valkey server on a unix socket, and the tiny catalog published to it."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.api.publish import publish
from service.embedded_valkey import ValkeyProcess, start_valkey
from tests.service.wire import write_catalog


@pytest.fixture
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    """An empty server; it ends with the test."""
    with start_valkey(tmp_path_factory.mktemp("v")) as server:
        yield server


@pytest.fixture
def catalog_path(tmp_path: Path) -> Path:
    """The durable copy of the tiny catalog."""
    return write_catalog(tmp_path)


@pytest.fixture
def published(valkey: ValkeyProcess, catalog_path: Path) -> ValkeyProcess:
    """A server that holds the tiny catalog."""
    asyncio.run(publish(catalog_path, valkey.url))
    return valkey


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run folder and the bundle of the debug recipe, trained once a session (seconds)."""
    from model.train.run import main  # here: most tests need no torch

    folder = tmp_path_factory.mktemp("debug")
    options = ["--runs", str(folder / "runs"), "--bundles", str(folder / "bundles")]
    with contextlib.chdir(Path(__file__).parent.parent):
        assert main(["model/recipes/debug.toml", *options]) == 0
    return folder / "runs" / "debug", folder / "bundles" / "debug"


@pytest.fixture(scope="session")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    """The same for the whole session: for tests that change nothing in it."""
    with start_valkey(tmp_path_factory.mktemp("v")) as server:
        asyncio.run(publish(write_catalog(tmp_path_factory.mktemp("c")), server.url))
        yield server
