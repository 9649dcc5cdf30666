"""Flags win over the environment, the environment over the file, the file over defaults; a bad value is one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.settings import Settings, SettingsError, load_settings, mask_url


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*Settings.model_fields, "config"):
        monkeypatch.delenv(f"PADREC_{name.upper()}", raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "padrec.toml"
    path.write_text('port = 1\nmax_k = 21\ndefault_k = 7\nworker_urls = ["http://a:1", "http://b:2/"]\n')
    return path


def test_each_source_wins_over_the_next(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (load_settings().port, load_settings(config=config).port) == (8000, 1)
    monkeypatch.setenv("PADREC_PORT", "2")
    assert load_settings(config=config).port == 2
    settings = load_settings({"port": "3", "host": None}, config)
    assert (settings.port, settings.max_k, settings.host) == (3, 21, "127.0.0.1")


def test_the_file_may_be_named_in_the_environment(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADREC_CONFIG", str(config))
    assert load_settings().worker_urls == ("http://a:1", "http://b:2")


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADREC_WORKER_URLS", "http://a:1, https://b:2/")
    assert load_settings().worker_urls == ("http://a:1", "https://b:2")


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADREC_PORT", "")
    assert load_settings().port == 8000


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": "eighty"}, "port"),
        ({"port": 70_000}, "port"),
        ({"worker_urls": "localhost:80"}, "worker_urls"),
        ({"worker_urls": ""}, "worker_urls"),
        ({"redis_url": "http://x"}, "redis_url"),
        ({"log_level": "loud"}, "log_level"),
        ({"default_k": 50, "max_k": 20}, "default_k"),
        ({"colour": "red"}, "colour"),
        ({"dtype": "fp8"}, "dtype"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_setting(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags)
    assert f"'{named}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_redis_url_does_not_show_its_password() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({"redis_url": "http://:s3cret@host"})
    assert "s3cret" not in str(caught.value)


def test_a_file_that_is_missing_broken_or_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no file at"):
        load_settings(config=tmp_path / "none.toml")
    path = tmp_path / "bad.toml"
    path.write_text("port = = 1")
    with pytest.raises(SettingsError, match="'config'"):
        load_settings(config=path)
    path.write_text("prot = 1")
    with pytest.raises(SettingsError, match="'prot' is not known"):
        load_settings(config=path)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        load_settings().port = 1  # type: ignore[misc]


def test_printed_settings_hide_passwords() -> None:
    settings = load_settings({"redis_url": "redis://user:s3cret@host:6379/0", "worker_urls": "http://u:s3cret@w"})
    shown = json.dumps(settings.masked())
    assert "redis://user:***@host:6379/0" in shown
    assert "s3cret" not in shown + repr(settings.redis_url)
    assert mask_url("unix:///tmp/x.sock") == "unix:///tmp/x.sock"


def test_the_worker_key_is_masked_and_its_first_part_shown() -> None:
    settings = load_settings({"worker_key": "first-secret-key-16, second-secret-key-16"})
    assert settings.masked()["worker_key"] == "***"
    assert "secret" not in json.dumps(settings.masked()) + repr(settings)
    assert settings.shown_worker_key == "first-secret-key-16"
    assert load_settings().shown_worker_key == ""
    for weak in ("s3cret", "s3cret,second-secret-key-16", ",second-secret-key-16"):
        with pytest.raises(SettingsError, match="'worker_key'") as caught:
            load_settings({"worker_key": weak})
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://collector", "http://"])
def test_a_collector_is_an_http_url(endpoint: str) -> None:
    with pytest.raises(SettingsError, match="otlp_endpoint"):
        load_settings({"otlp_endpoint": endpoint})


@pytest.mark.parametrize("name", ["shadow_percent", "trace_percent"])
def test_a_share_is_a_percentage(name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        load_settings({name: "101"})
