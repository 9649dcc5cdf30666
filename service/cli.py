"""The command `padrec`: serve | api | worker | publish | stock | key | check | train | align | bench | bundle.

Reads flags, environment and file into settings and hands over. Knows nothing of how anything works, and imports a
process's code only when that process is asked for: the API runs without torch.
"""

import argparse
import asyncio
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from service import __version__, log
from service.settings import Settings, SettingsError, load_settings

FAILED = 1
REFUSED = 2  # unusable settings, arguments or bundle: trying again cannot help
WORKER_PORT = 8001

Flags = dict[str, Any]

# First words of a command -> the module whose `main(argv)` it is. They parse their own arguments.
FORWARDED = {
    ("train",): ("model.train.run", "train a bundle from a recipe (TOML)"),
    ("align",): ("model.train.alignment", "align a draft with the target's beams (AtSpeed)"),
    ("bench", "serve"): ("service.bench_serve", "HTTP load against a running service"),
    ("bench", "api"): ("service.bench_api", "what one API process sustains over a stub worker"),
    ("bench", "redis"): ("service.bench_redis", "memory and look-up time of a catalog in Redis"),
    ("bench", "swap"): ("service.bench_swap", "how long a catalog swap holds up a worker"),
    ("bench", "beam"): ("model.bench.beam", "beam search by every plan, against the slow twin"),
    ("bench", "decode"): ("model.bench.decode", "speculative against plain decoding, without HTTP"),
    ("bench", "tune"): ("model.bench.tune", "which draft trees pay on this device"),
    ("bench", "trie"): ("model.bench.trie", "the item trie from 10^4 to 10^7 items against nested dictionaries"),
    ("bench", "ablation"): ("model.bench.ablation", "PAD-Rec's draft and those it is compared with, on one target"),
    ("bench", "peers"): ("model.bench.peers.run", "other engines on the same target and requests"),
    ("bundle",): ("model.bundle", "verify a bundle and print what it says of itself"),
}
MEASURES = " | ".join(words[1] for words in FORWARDED if words[0] == "bench")

_COMMON = ("log_level",)
_HTTP = (
    "host", "port", "metrics_port", "drain_seconds", "finish_seconds", "poll_seconds", "otlp_endpoint", "trace_percent",
    *_COMMON,
)  # fmt: skip
_ENGINE = (
    "bundle", "num_rows", "prefill_tokens", "max_waiting", "max_wait_ms", "threads", "device", "dtype", "max_k",
    "shadow_percent",
)  # fmt: skip
_API = (
    "redis_url", "redis_timeout_ms", "worker_urls", "catalog_file", "api_keys_file", "max_body_bytes", "body_seconds",
    "max_history_items", "max_exclude_items", "max_k", "default_k", "deadline_ms", "max_in_flight", "lru_items",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit status: 1 when something failed, 2 when settings or arguments are bad."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for words, (module, _) in FORWARDED.items():
        if tuple(arguments[: len(words)]) == words:
            return _forward(module, arguments[len(words) :])
    flags = vars(_parser().parse_args(arguments))
    run: Callable[[Flags], int] = flags.pop("run")
    try:
        return run(flags)
    except SettingsError as error:
        return _say(str(error), REFUSED)


def _say(message: str, status: int) -> int:
    print(f"padrec: {message}", file=sys.stderr)  # noqa: T201 - a command's answer
    return status


def _forward(module: str, arguments: list[str]) -> int:
    try:
        status: int | None = importlib.import_module(module).main(arguments)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("model", "service"):
            raise
        return _say(f"this command needs the package {error.name}; run `make install`", REFUSED)
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="padrec", description="Recommendations written by a speculating model.")
    parser.add_argument("--version", action="version", version=f"padrec {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, text: str, run: Callable[[Flags], int], settings: Sequence[str]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        command.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings")
        for setting in dict.fromkeys(settings):
            info = Settings.model_fields[setting]
            command.add_argument(f"--{setting.replace('_', '-')}", metavar="VALUE", help=info.description)
        return command

    serve = add("serve", "Valkey, worker and API on this machine", _serve, (*_ENGINE, *_HTTP, "worker_yields"))
    serve.add_argument("--external-redis", metavar="URL", help="use this Redis instead of a Valkey of our own")
    add("api", "the API process", _api, (*_HTTP, *_API))
    worker = add("worker", "the worker process", _worker, (*_ENGINE, *_HTTP, "redis_url"))
    worker.add_argument("--spare", action="store_true", help="load the code, then wait for a line on standard input")
    publish = add(
        "publish", "write a catalog to Redis and make it the active version", _publish, ("bundle", "redis_url")
    )
    publish.add_argument("--catalog", type=Path, metavar="FILE", help="a catalog.jsonl within the active codebooks")
    publish.add_argument("--rollback", action="store_true", help="make the version before the active one active again")
    stock = add("stock", "say which items are out of stock, without a new version", _stock, ("redis_url",))
    stock.add_argument("--out", nargs="+", default=[], metavar="ITEM", help="these may not be recommended")
    stock.add_argument("--back", nargs="+", default=[], metavar="ITEM", help="these may again")
    key = add("key", "make an API key and its line for the keys file", _key, ())
    key.add_argument("name", help="whose key it is")
    key.add_argument("scopes", help="recommend, metrics, generate; several with commas")
    add("check", "print the resolved settings and try every connection", _check, tuple(Settings.model_fields))
    for words, (_, text) in FORWARDED.items():
        if len(words) == 1:
            commands.add_parser(words[0], help=text, add_help=False)
    commands.add_parser("bench", help=f"measure: bench {MEASURES}", add_help=False).set_defaults(run=_bench)
    return parser


def _load(flags: Flags) -> Settings:
    config = flags.pop("config")
    return load_settings(flags, config)


def _serve(flags: Flags) -> int:
    from service.api.catalog_file import CatalogFileError
    from service.embedded_valkey import ValkeyUnavailable
    from service.serve import serve
    from service.supervisor import PortTaken

    external = flags.pop("external_redis")
    if external:
        flags["redis_url"] = external
    settings = _load(flags)
    log.configure_logging(settings.log_level, "serve")
    try:
        return serve(settings, external_redis=bool(external))
    except (PortTaken, CatalogFileError) as error:
        return _say(str(error), REFUSED)
    except ValkeyUnavailable as error:
        return _say(str(error), FAILED)


def _api(flags: Flags) -> int:
    from service.api.app import create_app
    from service.process import run_app

    settings = _load(flags)
    log.configure_logging(settings.log_level, "api")
    run_app(create_app, settings)
    return 0


def _worker(flags: Flags) -> int:
    try:
        from model.bundle import BundleError
        from model.target import preload
        from service.worker.app import load_app
    except ModuleNotFoundError as error:
        return _say(f"the worker needs the package {error.name}; run `make install`", REFUSED)
    from service.process import run_app

    spare = flags.pop("spare")
    settings = _load(flags)
    if "port" not in settings.model_fields_set:
        settings = settings.model_copy(update={"port": WORKER_PORT})
    log.configure_logging(settings.log_level, "worker")
    if spare:
        preload()
        if not sys.stdin.readline():  # whoever would have needed it is gone
            return 0
    try:
        run_app(load_app, settings)
    except BundleError as error:
        return _say(f"bundle {settings.bundle}: {error}", REFUSED)
    # The interpreter's own end takes torch up to a second and releases nothing the system would not.
    logging.shutdown()
    os._exit(0)


def _publish(flags: Flags) -> int:
    from service.api.catalog_file import CatalogFileError
    from service.api.publish import PublishError, publish, roll_back

    catalog, rollback = flags.pop("catalog"), flags.pop("rollback")
    settings = _load(flags)
    url = settings.redis_url.get_secret_value()
    try:
        if rollback:
            header = asyncio.run(roll_back(url))
        elif catalog is not None:
            # Without a bundle of its own it must be one that the active bundle's target can speak of.
            header = asyncio.run(publish(catalog, url, same_codebooks=True))
        elif settings.bundle is not None:
            header = asyncio.run(publish(settings.bundle / "catalog.jsonl", url))
        else:
            raise SettingsError(
                "setting 'bundle' (PADREC_BUNDLE, --bundle): say whose catalog to publish, or --catalog"
            )
    except CatalogFileError as error:
        return _say(str(error), REFUSED)
    except PublishError as error:
        return _say(f"not published: {error}", FAILED)
    print(f"catalog version {header.version} is active, {header.num_items} items")  # noqa: T201 - a command's answer
    return 0


def _stock(flags: Flags) -> int:
    from service.api.publish import PublishError, set_stock

    out, back = flags.pop("out"), flags.pop("back")
    settings = _load(flags)
    try:
        number, known = asyncio.run(set_stock(settings.redis_url.get_secret_value(), out=out, back=back))
    except PublishError as error:
        return _say(f"not changed: {error}", FAILED)
    print(f"{number} items are out of stock, {known} of them in the active catalog")  # noqa: T201
    return 0


def _key(flags: Flags) -> int:
    from service.keys import KeysError, new_key

    try:
        key, line = new_key(flags["name"], flags["scopes"])
    except KeysError as error:
        return _say(str(error), REFUSED)
    print(f"key, shown once:  {key}\nline of the file: {line}")  # noqa: T201 - a command's answer
    return 0


def _check(flags: Flags) -> int:
    from service.check import check

    settings = _load(flags)
    print(json.dumps(settings.masked(), indent=1))  # noqa: T201 - a command's answer
    findings = asyncio.run(check(settings))
    for finding in findings:
        print(f"{'ok    ' if finding.ok else 'FAILED'}  {finding.what}: {finding.detail}")  # noqa: T201
    return 0 if all(finding.ok for finding in findings) else FAILED


def _bench(flags: Flags) -> int:
    del flags
    return _say(f"say what to measure: padrec bench {MEASURES}", REFUSED)


if __name__ == "__main__":
    raise SystemExit(main())
