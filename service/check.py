"""`padrec check`: can the things the settings name be reached and used? Changes nothing.

Knows the settings and one question for each outside thing.
"""

import asyncio
import importlib
from typing import NamedTuple

import httpx
from pydantic import ValidationError

from service.catalog_codec import ACTIVE_KEY
from service.redis_client import REDIS_ERRORS, close, connect
from service.schemas import WorkerInfo
from service.settings import Settings, mask_url

TIMEOUT_SECONDS = 2.0  # patient: this asks whether something can be reached, not whether it is fast


class Finding(NamedTuple):
    """One thing that was tried: `what` it is, whether it is usable, and what it said."""

    what: str
    ok: bool
    detail: str


async def check(settings: Settings) -> list[Finding]:
    """Redis and its active catalog, every worker, and the bundle if one is named."""
    asked = [_redis(settings), *(_worker(url) for url in settings.worker_urls)]
    findings = list(await asyncio.gather(*asked))
    if settings.bundle is not None:
        findings.append(await asyncio.to_thread(_bundle, settings))
    return findings


async def _redis(settings: Settings) -> Finding:
    url = settings.redis_url.get_secret_value()
    what, client = f"redis {mask_url(url)}", connect(url, TIMEOUT_SECONDS)
    try:
        active = await client.get(ACTIVE_KEY)
    except REDIS_ERRORS as error:
        return Finding(what, False, f"not reachable ({type(error).__name__})")
    finally:
        await close(client)
    if active is None:
        return Finding(what, False, "reachable, but no catalog is published (padrec publish)")
    version = active.decode("ascii", "replace") if isinstance(active, bytes) else active
    return Finding(what, True, f"active catalog version {version}")


async def _worker(url: str) -> Finding:
    what = f"worker {mask_url(url)}"
    try:
        async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS, trust_env=False) as client:
            reply = await client.get(f"{url}/info")
        reply.raise_for_status()
        info = WorkerInfo.model_validate_json(reply.content)
    except httpx.HTTPStatusError as error:
        return Finding(what, False, f"answers with status {error.response.status_code}")
    except httpx.HTTPError as error:
        return Finding(what, False, f"not reachable ({type(error).__name__})")
    except ValidationError:
        return Finding(what, False, "does not answer like a worker")
    model = info.model
    return Finding(what, True, f"{model.name} {model.version}, catalog version {info.catalog_version}")


def _bundle(settings: Settings) -> Finding:
    what = f"bundle {settings.bundle}"
    try:
        bundles = importlib.import_module("model.bundle")
    except ModuleNotFoundError as error:
        return Finding(what, False, f"cannot be read without the package {error.name}")
    try:
        manifest = bundles.verify(settings.bundle)
    except bundles.BundleError as error:
        return Finding(what, False, str(error))
    return Finding(what, True, f"{manifest['name']} {manifest['version']}, every file as its manifest says")
