"""Keys open what their scopes say and nothing else, are exchanged without a restart, and never show."""

import logging
import os
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from service.api.app import create_app
from service.errors import Forbidden, Unauthorized
from service.keys import Keys, KeysError, new_key, read_keys
from service.metrics import HttpMetrics
from service.middleware import Door
from service.probes import Drain
from service.settings import Settings, SettingsError, load_settings
from service.tracing import Spans
from tests.service.wire import TinyWorker, Workers, api, api_settings


def shown(key: str, how: str = "bearer") -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {key}".encode())] if how == "bearer" else [(b"x-api-key", key.encode())]


@pytest.fixture
def web() -> tuple[str, str]:
    """A key for recommendations, and its line."""
    return new_key("web", "recommend")


@pytest.fixture
def file(tmp_path: Path, web: tuple[str, str]) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who asks\n\n{web[1]}  # the shop\n")
    return path


@pytest.mark.parametrize("how", ["bearer", "x-api-key"])
def test_a_key_opens_its_scope_and_no_other(file: Path, web: tuple[str, str], how: str) -> None:
    keys = Keys.of_file(file)
    for path in ("/recommend", "/v1/recommend/batch", "/docs", "/no/such/path"):
        assert keys.admit(path, shown(web[0], how)) == "web"
    for path in ("/metrics", "/generate", "/info"):
        with pytest.raises(Forbidden):
            keys.admit(path, shown(web[0], how))


def test_health_alone_is_open(file: Path) -> None:
    keys = Keys.of_file(file)
    assert keys.admit("/healthz", []) == keys.admit("/readyz", []) == ""
    for path in ("/recommend", "/metrics", "/docs", "/openapi.json", "/healthz/", "//healthz", "/"):
        with pytest.raises(Unauthorized):
            keys.admit(path, [])


@pytest.mark.parametrize("wrong", ["", "x", "ключ", "a" * 600, "Bearer"])
def test_a_wrong_key_opens_nothing(file: Path, web: tuple[str, str], wrong: str) -> None:
    keys = Keys.of_file(file)
    for key in (wrong, web[0][:-1], web[0] + "x", web[1].split()[-1]):
        with pytest.raises(Unauthorized):
            keys.admit("/recommend", shown(key))


def test_keys_are_rotated_without_a_restart(
    file: Path, web: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("service.keys.LOOK_SECONDS", 0.0)
    keys = Keys.of_file(file)
    key, line = new_key("web", "recommend,metrics")
    file.write_text(f"{web[1]}\n{line}\n")
    assert keys.admit("/recommend", shown(web[0])) == keys.admit("/metrics", shown(key)) == "web"
    other = file.with_name("new")
    other.write_text(line)
    os.replace(other, file)
    with pytest.raises(Unauthorized):
        keys.admit("/recommend", shown(web[0]))
    with caplog.at_level(logging.INFO):
        file.write_text("garbage")  # what was valid stays so
        assert keys.admit("/recommend", shown(key)) == "web"
        file.unlink()
        assert keys.admit("/recommend", shown(key)) == "web"
    assert "cannot be read" in caplog.text
    assert key not in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# none",
        "web recommend",
        "web everything " + "0" * 64,
        "web recommend " + "0" * 63,
        "a/b recommend " + "0" * 64,
    ],
)
def test_a_bad_keys_file_is_refused_by_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(KeysError, match="keys"):
        read_keys(path)
    with pytest.raises(SettingsError, match="api_keys_file"):
        create_app(load_settings({"api_keys_file": path}))


def test_a_new_key_is_unlike_any_other_and_only_its_sum_is_kept() -> None:
    (first, line), (second, _) = new_key("a", "recommend"), new_key("a", "recommend")
    assert first != second
    assert len(first) >= 43
    assert first not in line
    with pytest.raises(KeysError):
        new_key("a b", "recommend")
    with pytest.raises(KeysError):
        new_key("a", "all")


async def test_the_api_behind_keys_answers_who_may_ask(
    tmp_path: Path, file: Path, web: tuple[str, str], catalog_path: Path
) -> None:
    settings = api_settings(api_keys_file=file, catalog_file=catalog_path)
    headers = {"authorization": f"Bearer {web[0]}"}
    async with api(settings, Workers(w1=TinyWorker())) as client:
        body = {"history": ["i1"], "k": 2}
        closed = [await client.post("/recommend", json=body), await client.get("/docs"), await client.get("/metrics")]
        assert [reply.status_code for reply in closed] == [401] * 3
        assert closed[0].headers["www-authenticate"] == "Bearer"
        assert closed[0].headers["content-type"] == "application/problem+json"
        assert closed[0].headers["x-request-id"] == closed[0].json()["request_id"]
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        assert (await client.post("/recommend", json=body, headers=headers)).json()["items"]
        refused = await client.get("/metrics", headers=headers)
        assert refused.status_code == 403
        assert web[0] not in refused.text + closed[0].text


async def test_a_worker_with_keys_takes_each_of_them() -> None:
    app = FastAPI()
    keys = Keys.of_secret("first-secret-key-16, second-secret-key-16")
    metrics = HttpMetrics(CollectorRegistry())
    spans = Spans(Settings(), "padrec-worker", "1", metrics)
    app.add_middleware(Door, metrics=metrics, drain=Drain(), spans=spans, keys=keys)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://w") as client:
        assert (await client.get("/info")).status_code == 401
        for key in ("first-secret-key-16", "second-secret-key-16"):
            assert (await client.get("/info", headers={"x-api-key": key})).status_code == 404
