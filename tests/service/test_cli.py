"""The command line: settings from flags, one clear line for what is wrong, the right program behind each command."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.cli import main
from service.embedded_valkey import start_valkey
from service.keys import Keys
from service.supervisor import free_port
from tests.service.tiny_bundle import write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands configure the logging of their process, which here is the tests' own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["api", "--port", "seven"], "'port'"),
        (["api", "--redis-url", "mysql://x"], "'redis_url'"),
        (["api", "--config", "/no/such/file.toml"], "'config'"),
        (["worker", "--dtype", "int8"], "'dtype'"),
        (["worker"], "'bundle'"),
        (["serve"], "'bundle'"),
        (["serve", "--bundle", "/no/such/bundle"], "'bundle'"),
        (["serve", "--bundle", "x", "--external-redis", "ftp://x"], "'redis_url'"),
        (["publish"], "'bundle'"),
        (["publish", "--catalog", "/no/such/file"], "/no/such/file"),
        (["key", "a b", "recommend"], "name"),
        (["key", "web", "everything"], "scopes"),
        (["api", "--api-keys-file", "/no/such/file"], "'api_keys_file'"),
        (["worker", "--redis-url", "redis+sentinel://h"], "'redis_url'"),
        (["check", "--deadline-ms", "0"], "'deadline_ms'"),
        (["bench"], "bench serve"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it_and_status_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert named in printed.err


def test_an_unknown_flag_is_refused_by_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["api", "--colour", "red"])
    assert caught.value.code == 2
    assert "--colour" in capsys.readouterr().err


def test_a_bundle_that_is_none_is_refused_by_the_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", "--bundle", str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err


def test_a_damaged_bundle_is_refused_and_the_file_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = write_bundle(tmp_path / "damaged")
    weights = damaged / "target" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert main(["worker", "--bundle", str(damaged)]) == 2
    assert "target/model.safetensors: missing, truncated or changed" in capsys.readouterr().err


def test_publish_says_what_it_did_and_says_when_it_could_not(
    bundle: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    with start_valkey(tmp_path_factory.mktemp("v")) as server:
        assert main(["publish", "--bundle", str(bundle), "--redis-url", server.url]) == 0
        version = json.loads((bundle / "manifest.json").read_text())["catalog_version"]
        assert version in capsys.readouterr().out
    assert main(["publish", "--bundle", str(bundle), "--redis-url", server.url]) == 1
    assert "not published" in capsys.readouterr().err


def test_check_masks_passwords_and_fails_when_something_is_out_of_reach(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port("127.0.0.1")
    redis, worker = f"redis://user:secret@127.0.0.1:{port}/0", f"http://127.0.0.1:{port}"
    assert main(["check", "--redis-url", redis, "--worker-urls", worker, "--bundle", str(bundle)]) == 1
    printed = capsys.readouterr().out
    assert "secret" not in printed
    assert '"redis_url": "redis://user:***@' in printed
    assert "FAILED  redis redis://user:***@" in printed
    assert f"FAILED  worker {worker}: not reachable" in printed
    assert f"ok      bundle {bundle}" in printed


def test_check_names_the_active_catalog_version(
    bundle: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    with start_valkey(tmp_path_factory.mktemp("v")) as server:
        assert main(["check", "--redis-url", server.url]) == 1
        assert "no catalog is published" in capsys.readouterr().out
        main(["publish", "--bundle", str(bundle), "--redis-url", server.url])
        main(["check", "--redis-url", server.url])
        assert "active catalog version" in capsys.readouterr().out


def test_bundle_is_forwarded_with_its_arguments(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", str(bundle)]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "tiny"


def test_the_api_runs_without_torch_and_ends_with_status_0_on_sigterm(bundle: Path) -> None:
    port = free_port("127.0.0.1")
    code = (
        "import sys; from service.cli import main; status = main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'model'} & set(sys.modules); raise SystemExit(status)"
    )
    nobody = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    command = [sys.executable, "-c", code, "api", "--port", str(port), "--catalog-file", str(bundle / "catalog.jsonl")]
    command += ["--worker-urls", nobody, "--redis-url", "redis://127.0.0.1:1/0", "--drain-seconds", "0"]
    process = subprocess.Popen([*command, "--log-level", "error"], env={**os.environ, "PADREC_PORT": "1"})
    try:
        reply, end = None, time.monotonic() + 20
        while reply is None and time.monotonic() < end:
            try:
                reply = httpx.post(f"http://127.0.0.1:{port}/recommend", json={"history": [], "k": 3})
            except httpx.TransportError:
                time.sleep(0.05)
        assert reply is not None
        assert reply.status_code == 200
        assert len(reply.json()["items"]) == 3
    finally:
        process.terminate()
    assert process.wait(10) == 0


def test_publishing_a_catalog_going_back_and_stock(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        status = main([*arguments, "--redis-url", server.url])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    lines = (bundle / "catalog.jsonl").read_text().splitlines()
    fewer = tmp_path / "fewer.jsonl"
    header = json.loads(lines[0])
    fewer.write_text("\n".join([json.dumps(header | {"catalog_version": "fewer"}), *lines[1:-3]]))
    foreign = tmp_path / "foreign.jsonl"
    sizes = [size + 1 for size in header["codebook_sizes"]]
    foreign.write_text("\n".join([json.dumps(header | {"codebook_sizes": sizes}), *lines[1:]]))
    with start_valkey(tmp_path) as server:
        assert run("publish", "--rollback") == (1, "padrec: not published: no version was active before this one\n")
        assert run("stock", "--out", "1")[0] == 1
        assert run("publish", "--bundle", str(bundle))[0] == 0
        assert (
            run("publish", "--catalog", str(fewer))[1] == f"catalog version fewer is active, {len(lines) - 4} items\n"
        )
        status, told = run("publish", "--catalog", str(foreign))
        assert status == 1
        assert "codebooks" in told
        assert (
            run("stock", "--out", "0", "1", "nobody")[1]
            == "3 items are out of stock, 2 of them in the active catalog\n"
        )
        assert header["catalog_version"] in run("publish", "--rollback")[1]
        assert "fewer" in run("publish", "--rollback")[1]
        assert run("stock", "--back", "0", "1", "nobody")[1].startswith("0 items")


def test_a_key_is_printed_once_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "web", "recommend,metrics"]) == 0
    key, line = (text.partition(":")[2].strip() for text in capsys.readouterr().out.splitlines())
    (tmp_path / "keys").write_text(line)
    assert Keys.of_file(tmp_path / "keys").admit("/recommend", [(b"x-api-key", key.encode())]) == "web"
