"""A Redis client from a URL: one server, TLS, Sentinel or Cluster, always with short patience.

    redis://[user:password@]host:port/db          rediss:// the same over TLS        unix:///path.sock
    redis+sentinel://[user:password@]host:26379,host:26379/name[/db]                 rediss+sentinel://
    redis+cluster://[user:password@]host:6379,host:6379                              rediss+cluster://

TLS takes `?ssl_ca_certs=FILE&ssl_certfile=FILE&ssl_keyfile=FILE`; certificates are always checked. Knows no catalogs.
"""

from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
REDIS_ERRORS = (RedisError, RedisClusterException, TimeoutError, OSError)  # all that a command may raise
MAX_CONNECTIONS = 32

Client = Redis | RedisCluster


def url_fault(url: str) -> str:
    """Why `url` cannot be a Redis URL, in words that quote nothing of it; empty if it can."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        return f"must start with one of {', '.join(f'{scheme}://' for scheme in SCHEMES)}"
    if parts.scheme.endswith("+sentinel") and not parts.path.strip("/"):
        return "must name the service that Sentinel watches: redis+sentinel://host:port/name"
    if parts.scheme != "unix" and not all(host for host, _ in _hosts(parts, 0)):
        return "must name a host"
    return ""


def connect(url: str, timeout_seconds: float) -> Client:
    """A client that fails in `timeout_seconds` instead of redis-py's seconds to minutes. Connects when first used."""
    parts = urlsplit(url)
    patience: dict[str, Any] = {
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    kind = parts.scheme.partition("+")[2]
    if not kind:
        pool = BlockingConnectionPool.from_url(
            url, max_connections=MAX_CONNECTIONS, timeout=timeout_seconds, **patience
        )
        return Redis.from_pool(pool)
    name, _, db = parts.path.strip("/").partition("/")
    # What is left after hosts and name have been taken out is a URL that redis-py can read.
    credentials = parts.netloc.rpartition("@")[0]
    plain = parts._replace(
        scheme=parts.scheme.partition("+")[0],
        netloc=f"{credentials}@h" if credentials else "h",
        path=f"/{db}" if db else "",
    )
    options: dict[str, Any] = dict(parse_url(urlunsplit(plain)))
    options.pop("host", None)
    if options.pop("connection_class", None) is not None:
        options["ssl"] = True
    if kind == "sentinel":
        sentinel = Sentinel(_hosts(parts, 26379), sentinel_kwargs=patience, **patience)  # type: ignore[no-untyped-call]
        master: Redis = sentinel.master_for(name, max_connections=MAX_CONNECTIONS, **patience, **options)
        return master
    nodes = [ClusterNode(host, port) for host, port in _hosts(parts, 6379)]
    return RedisCluster(startup_nodes=nodes, max_connections=MAX_CONNECTIONS, **patience, **options)


async def get(client: Client, key: str) -> bytes | None:
    """A value as it is stored."""
    value: Any = await client.get(key)
    return value if value is None else bytes(value)


async def close(client: Client) -> None:
    """Close every connection of `client`."""
    await client.aclose()
    if isinstance(client, Redis):
        await client.connection_pool.disconnect()
        if isinstance(client.connection_pool, SentinelConnectionPool):
            for sentinel in client.connection_pool.sentinel_manager.sentinels:
                await close(sentinel)


def _hosts(parts: SplitResult, port: int) -> list[tuple[str, int]]:
    hosts = []
    for each in parts.netloc.rpartition("@")[2].split(","):
        host, colon, number = each.rpartition(":")
        plain = (host, int(number)) if colon and number.isdecimal() else (each, port)
        hosts.append((plain[0].strip("[]"), plain[1]))
    return hosts
