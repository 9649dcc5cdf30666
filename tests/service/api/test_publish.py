"""Publishing writes beside the old version, checks, then switches; it can be repeated and cleans up after itself."""

from pathlib import Path

import pytest

from service.api.catalog_file import CatalogFile, CatalogFileError
from service.api.publish import PublishError, check, publish, set_stock
from service.catalog_codec import dump_sealed, stock_key
from service.embedded_valkey import ValkeyProcess
from service.redis_client import connect
from tests.service.wire import OTHER_VERSION, VERSION, write_catalog


async def keys(url: str) -> set[str]:
    client = connect(url, 1)
    names = {key.decode() async for key in client.scan_iter()}
    await client.aclose()
    return names


async def test_a_published_version_is_active_and_has_small_buckets(valkey: ValkeyProcess, tmp_path: Path) -> None:
    header = await publish(write_catalog(tmp_path, num_items=120), valkey.url)
    assert (header.version, header.num_items, header.num_buckets) == (VERSION, 120, 2)
    client = connect(valkey.url, 1)
    assert await client.get("padrec:active") == VERSION.encode()
    assert await client.object("ENCODING", f"padrec:{VERSION}:item:0") == b"listpack"
    await client.aclose()
    assert await keys(valkey.url) == {"padrec:active", *header.keys()} - {stock_key(VERSION)}  # nobody has told it


async def test_publishing_again_changes_nothing(published: ValkeyProcess, catalog_path: Path) -> None:
    before = await keys(published.url)
    await publish(catalog_path, published.url)
    assert await keys(published.url) == before


async def test_the_version_before_stays_and_older_ones_go(published: ValkeyProcess, tmp_path: Path) -> None:
    third = "cccccccccccc"
    for version in (OTHER_VERSION, third, third):
        await publish(write_catalog(tmp_path, version), published.url)
    kept = {key.split(":")[1] for key in await keys(published.url)} - {"active", "previous"}
    assert kept == {OTHER_VERSION, third}


async def test_a_damaged_old_header_does_not_stop_publishing(published: ValkeyProcess, tmp_path: Path) -> None:
    client = connect(published.url, 1)
    await client.set("padrec:old:meta", b"{")
    await client.aclose()
    await publish(write_catalog(tmp_path, OTHER_VERSION), published.url)
    assert "padrec:old:meta" not in await keys(published.url)


async def test_what_cannot_be_published_leaves_the_active_version(published: ValkeyProcess, tmp_path: Path) -> None:
    broken = write_catalog(tmp_path, OTHER_VERSION)
    broken.write_text(broken.read_text()[:-10])
    with pytest.raises(CatalogFileError):
        await publish(broken, published.url)
    client = connect(published.url, 1)
    assert await client.get("padrec:active") == VERSION.encode()
    # A key of another type stands in the way of the header.
    await client.set(f"padrec:{OTHER_VERSION}:item:0", b"")
    with pytest.raises(PublishError, match="WRONGTYPE"):
        await publish(write_catalog(tmp_path, OTHER_VERSION), published.url)
    assert await client.get("padrec:active") == VERSION.encode()
    await client.aclose()


async def test_publishing_into_a_redis_that_has_lost_its_data_does_not_say_that_all_is_in_stock(
    published: ValkeyProcess, catalog_path: Path
) -> None:
    stock = stock_key(VERSION)
    assert stock not in await keys(published.url)
    await set_stock(published.url, out=["i1"])
    assert stock in await keys(published.url)
    client = connect(published.url, 1)
    await client.flushall()
    await publish(catalog_path, published.url)  # who was told of i1 goes on leaving it out
    assert stock not in await keys(published.url)
    await set_stock(published.url, out=["i1"])
    await set_stock(published.url, back=["i1"])  # now it is known that nothing is out
    await publish(write_catalog(catalog_path.parent, OTHER_VERSION), published.url)
    assert stock_key(OTHER_VERSION) in await keys(published.url)
    await client.aclose()


async def test_without_redis_publishing_says_so(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="Redis"):
        await publish(write_catalog(tmp_path), f"unix://{tmp_path}/none.sock")


@pytest.mark.parametrize("value", [b"", b"{}", None])
async def test_what_does_not_read_back_is_noticed(
    published: ValkeyProcess, catalog_path: Path, value: bytes | None
) -> None:
    catalog = CatalogFile.load(catalog_path)
    client = connect(published.url, 1)
    await check(client, catalog)
    if value is None:
        await client.set(f"padrec:{VERSION}:meta", dump_sealed({**catalog.header.document(), "num_items": 1}))
    else:
        await client.set(f"padrec:{VERSION}:meta", value)
    with pytest.raises(PublishError, match="header"):
        await check(client, catalog)
    await client.delete(f"padrec:{VERSION}:sid:0")
    with pytest.raises(PublishError, match="read back something else"):
        await check(client, catalog)
    await client.aclose()
