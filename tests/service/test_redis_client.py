"""Every kind of URL reaches its Redis: one server, TLS, Sentinel, Cluster, with and without a user of few rights."""

import asyncio
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service import child
from service.api.catalog import Catalog
from service.api.publish import publish, roll_back, set_stock
from service.api.redis_cache import RedisCache, RedisDown
from service.catalog_codec import ACTIVE_KEY, stock_key
from service.embedded_valkey import ValkeyProcess, valkey_binary
from service.metrics import ApiMetrics
from service.redis_client import MAX_CONNECTIONS, REDIS_ERRORS, close, connect, get, url_fault
from service.supervisor import free_port
from service.worker.catalog_builder import read_catalog
from tests.service.tls import certificate
from tests.service.wire import NUM_ITEMS, OTHER_VERSION, VERSION, api_settings, until, write_catalog


@contextmanager
def server(folder: Path, *arguments: str, port: int) -> Iterator[None]:
    """A Valkey on a TCP port; Sentinel and Cluster know no other."""
    command = [str(valkey_binary()), *arguments, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    process = child.spawn(command, output=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.01)
        yield
    finally:
        child.stop(process, 5)


async def whole_story(url: str, folder: Path, reader_url: str | None = None) -> None:
    """Publish, read as an API and as a worker do, change the stock, swap, go back."""
    await publish(write_catalog(folder), url)
    redis = RedisCache(connect(reader_url or url, 5), ApiMetrics(CollectorRegistry()), 5)
    catalog = Catalog(redis, api_settings(), redis.metrics)
    try:
        await catalog.start()
        assert catalog.current is not None
        assert catalog.current.version == VERSION
        mapped = await catalog.current.codes_of([f"i{n}" for n in range(NUM_ITEMS)])
        assert len(mapped.found) == NUM_ITEMS
        assert len((await catalog.current.items_of(mapped.found.values())).found) == NUM_ITEMS
        assert (await catalog.current.attributes_of(["i3"])).found["i3"] == {"genre": ["Comedy"], "year": 1903}
        assert len((await read_catalog(redis.client, VERSION)).items) == NUM_ITEMS
        assert await set_stock(url, out=["i1"]) == (1, 1)
        await catalog.refresh()
        assert catalog.current.out_of_stock == {mapped.found["i1"]}
        await publish(write_catalog(folder, OTHER_VERSION), url)
        await catalog.refresh()
        assert catalog.current.version == OTHER_VERSION
        await roll_back(url)
        await catalog.refresh()
        assert catalog.current.version == VERSION
        crowd = await asyncio.gather(*(redis.get(ACTIVE_KEY) for _ in range(3 * MAX_CONNECTIONS)))
        assert len({bytes(value) for (value,) in crowd if value}) == 1 and redis.up  # more than there are connections
    finally:
        await redis.close()


async def test_one_server(valkey: ValkeyProcess, tmp_path: Path) -> None:
    await whole_story(valkey.url, tmp_path)


async def test_a_cluster(tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    options = ("--cluster-enabled", "yes", "--save", "", "--cluster-port", str(free_port("127.0.0.1")))
    with server(tmp_path, *options, port=port):
        single = connect(f"redis://127.0.0.1:{port}", 5)
        await single.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)

        async def formed() -> bool:
            return b"cluster_state:ok" in bytes(await single.execute_command("CLUSTER", "INFO"))

        await until(formed, 20)
        await close(single)
        await whole_story(f"redis+cluster://127.0.0.1:{port}", tmp_path)


async def test_sentinel_finds_the_master_and_the_one_that_takes_its_place(tmp_path: Path) -> None:
    ports = [free_port("127.0.0.1") for _ in range(3)]
    first, second, sentinel = ports
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"sentinel monitor mymaster 127.0.0.1 {first} 1\nsentinel down-after-milliseconds mymaster 500\n"
        "sentinel failover-timeout mymaster 2000\n"
    )
    url = f"redis+sentinel://127.0.0.1:{sentinel}/mymaster/0"
    with server(tmp_path, "--save", "", port=first):
        replica = ("--save", "", "--replicaof", "127.0.0.1", str(first))
        with server(tmp_path, *replica, port=second), server(tmp_path, str(config), "--sentinel", port=sentinel):
            client = connect(url, 1)

            async def answers() -> bool:
                try:
                    return bool(await client.ping())
                except REDIS_ERRORS:
                    return False

            await until(answers, 20)
            await whole_story(url, tmp_path)
            watch = connect(f"redis://127.0.0.1:{sentinel}", 1)

            async def knows_the_replica() -> bool:
                return bool(await watch.execute_command("SENTINEL", "REPLICAS", "mymaster"))

            await until(knows_the_replica, 20)
            await close(watch)
            old = connect(f"redis://127.0.0.1:{first}", 1)
            with suppress(*REDIS_ERRORS):
                await old.execute_command("SHUTDOWN", "NOSAVE")
            await close(old)

            async def moved() -> bool:
                try:
                    await client.set("after", "failover")
                    return await get(client, "after") == b"failover"
                except REDIS_ERRORS:
                    return False

            await until(moved, 30)
            await close(client)


async def test_a_user_with_few_rights_can_do_all_a_reader_does(valkey: ValkeyProcess, tmp_path: Path) -> None:
    """The rights are those SECURITY.md tells operators to give."""
    admin = connect(valkey.url, 1)
    security = (Path(__file__).parents[2] / "SECURITY.md").read_text(encoding="utf-8")
    users = [line.split()[2:] for line in security.splitlines() if line.startswith("ACL SETUSER ")]
    assert [name for name, *_ in users] == ["padrec-api", "padrec-worker", "padrec-publish"]
    for name, *rights in users:
        await admin.execute_command("ACL", "SETUSER", name, *[r.replace("SECRET", "s3cret") for r in rights])
    reader, worker, publisher = (valkey.url.replace("unix://", f"unix://{name}:s3cret@") for name, *_ in users)
    await whole_story(publisher, tmp_path, reader)
    client = connect(worker, 1)
    assert len((await read_catalog(client, VERSION)).items) == NUM_ITEMS
    assert await get(client, stock_key(VERSION)) is not None
    await close(client)
    client = connect(reader, 1)
    for forbidden in ("FLUSHALL", "DEL padrec:active", "KEYS *", "SET padrec:active x", "GET other"):
        with pytest.raises(REDIS_ERRORS):
            await client.execute_command(*forbidden.split())
    await close(client)
    await close(admin)


async def test_tls_is_spoken_and_the_certificate_checked(valkey: ValkeyProcess, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "server")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """TLS ends here; the server behind has none."""
        inner_reader, inner_writer = await asyncio.open_unix_connection(str(valkey.socket_path))

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            except OSError:
                pass
            finally:
                sink.close()

        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    listening = await asyncio.start_server(forward, "127.0.0.1", 0, ssl=context)
    port = listening.sockets[0].getsockname()[1]
    async with listening:
        await whole_story(f"rediss://localhost:{port}/0?ssl_ca_certs={cert}", tmp_path)
        other, _ = certificate(tmp_path, "other")
        for url in (f"rediss://localhost:{port}/0?ssl_ca_certs={other}", f"rediss://localhost:{port}/0"):
            stranger = RedisCache(connect(url, 1), ApiMetrics(CollectorRegistry()), 1)
            with pytest.raises(RedisDown):
                await stranger.get("padrec:active")
            await stranger.close()
    await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://h", "must start with"),
        ("redis+sentinel://h:26379", "service"),
        ("redis://", "host"),
        ("redis+cluster://a:1,,b:2", "host"),
        ("redis+sentinel://u:p@a:1,b:2/name/3", ""),
        ("rediss+cluster://:p@a,b", ""),
        ("unix:///tmp/x.sock", ""),
    ],
)
def test_a_url_that_cannot_work_is_told_so_without_being_quoted(url: str, told: str) -> None:
    fault = url_fault(url)
    assert told in fault
    assert bool(fault) == bool(told)


async def test_credentials_and_tls_reach_sentinel_and_cluster_clients() -> None:
    cluster = connect("rediss+cluster://me:pw@a:1,b:2?ssl_ca_certs=/ca", 1)
    assert [(node.host, node.port) for node in cluster.startup_nodes] == [("a", 1), ("b", 2)]  # type: ignore[union-attr]
    kwargs = cluster.connection_kwargs  # type: ignore[union-attr]
    assert (kwargs["username"], kwargs["password"], kwargs["ssl_ca_certs"]) == ("me", "pw", "/ca")
    assert kwargs["ssl_cert_reqs"] == "required"
    master = connect("rediss+sentinel://me:pw@a:1,b/name/3?ssl_ca_certs=/ca", 1)
    kwargs = master.connection_pool.connection_kwargs  # type: ignore[union-attr]
    assert (kwargs["username"], kwargs["password"], kwargs["db"], kwargs["ssl_ca_certs"]) == ("me", "pw", 3, "/ca")
    assert master.connection_pool.connection_class.__name__ == "SentinelManagedSSLConnection"  # type: ignore[union-attr]
    await close(cluster)
    await close(master)
