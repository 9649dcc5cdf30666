"""Bad input is a 4xx problem+json that names the field, quickly, and disturbs nobody; good input is documented."""

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from service.api.app import create_app
from service.embedded_valkey import ValkeyProcess
from tests.service.wire import TinyWorker, Workers, api, api_settings, served, until

JSON = {"Content-Type": "application/json"}
LIMIT_SECONDS = 0.05


def body(**fields: Any) -> bytes:
    return json.dumps({"history": ["i1"]} | fields).encode()


BAD_INPUT: dict[str, tuple[bytes, int, str | None]] = {
    "nothing": (b"", 400, None),
    "malformed JSON": (b'{"history": [', 400, None),
    "two documents": (b"{}{}", 400, None),
    "not UTF-8": (b'{"history": ["\xff"]}', 400, None),
    "UTF-16": ('{"history": []}'.encode("utf-16"), 400, None),
    "NaN": (b'{"history": [], "k": NaN}', 400, "/k"),
    "Infinity": (b'{"history": [], "filters": {"year": {"max": Infinity}}}', 400, "/filters/year/max"),
    "a number that overflows": (b'{"history": [], "filters": {"year": {"min": -1e999}}}', 400, "/filters/year/min"),
    "a number of 10000 digits": (b'{"history": [], "k": ' + b"9" * 10_000 + b"}", 400, None),
    "a lone surrogate": (b'{"history": ["i1", "\\ud800"]}', 400, "/history/1"),
    "a lone surrogate in a key": (b'{"\\udfff": 1}', 400, ""),
    "NUL": (b'{"history": ["a\\u0000b"]}', 400, "/history/0"),
    "a raw control character": (b'{"history": ["a\x01b"]}', 400, None),
    "a key twice": (b'{"history": [], "filters": {"year": {"min": 1, "min": 2}}}', 400, "/filters/year"),
    "nested 100000 deep": (b"[" * 100_000, 400, None),
    "nested 40 deep": (b'{"history": ' + b"[" * 40 + b"]" * 40 + b"}", 400, None),
    "a list": (b"[]", 422, ""),
    "null": (b"null", 422, ""),
    "no history": (b"{}", 422, "/history"),
    "history of numbers": (body(history=[1, 2]), 422, "/history/0"),
    "history as text": (body(history="i1"), 422, "/history"),
    "history of null": (body(history=[None]), 422, "/history/0"),
    "an object without item_id": (body(history=[{"id": "i1"}]), 422, "/history/0"),
    "an object with more": (body(history=[{"item_id": "i1", "at": 1}]), 422, "/history/0"),
    "an empty item": (body(history=[""]), 422, "/history/0"),
    "a long item": (body(history=["x" * 129]), 422, "/history/0"),
    "an item with a control character": (b'{"history": ["a\\u0007"]}', 422, "/history/0"),
    "1001 items": (body(history=["i1"] * 1001), 422, "/history"),
    "1001 exclusions": (body(exclude=["i1"] * 1001), 422, "/exclude"),
    "10^6 items of one byte": (b'{"history": [' + b'"",' * 10**6 + b'""]}', 413, None),
    "k = 0": (body(k=0), 422, "/k"),
    "k = -1": (body(k=-1), 422, "/k"),
    "k over the limit": (body(k=101), 422, "/k"),
    "k = 10^30": (body(k=10**30), 422, "/k"),
    "k as text": (body(k="10"), 422, "/k"),
    "k as a fraction": (body(k=10.5), 422, "/k"),
    "k as a boolean": (body(k=True), 422, "/k"),
    "an unknown strategy": (body(strategy="tree"), 422, "/strategy"),
    "a beam of 201": (body(strategy="beam", k=201), 422, "/k"),
    "a temperature for beams": (body(strategy="beam", temperature=0.5), 422, "/temperature"),
    "a top_p for beams": (body(strategy="beam", top_p=0.5), 422, "/top_p"),
    "an unknown verification": (body(strategy="beam", verification="sloppy"), 422, "/verification"),
    "a relaxed list": (body(verification="relaxed"), 422, "/verification"),
    "an unknown field": (body(colour="red"), 422, "/colour"),
    "an unknown filter": (body(filters={"colour": {"any": ["red"]}}), 422, "/filters/colour"),
    "an empty filter": (body(filters={"year": {}}), 422, "/filters/year"),
    "a filter of both kinds": (body(filters={"year": {"any": ["x"], "min": 1}}), 422, "/filters/year"),
    "a range upside down": (body(filters={"year": {"min": 2, "max": 1}}), 422, "/filters/year"),
    "17 filters": (body(filters={f"f{n}": {"min": 1} for n in range(17)}), 422, "/filters"),
    "a temperature below zero": (body(temperature=-0.1), 422, "/temperature"),
    "a temperature over the limit": (body(temperature=2.1), 422, "/temperature"),
    "temperature as text": (body(temperature="1"), 422, "/temperature"),
    "temperature as a boolean": (body(temperature=True), 422, "/temperature"),
    "temperature NaN": (b'{"history": [], "temperature": NaN}', 400, "/temperature"),
    "temperature Infinity": (b'{"history": [], "temperature": Infinity}', 400, "/temperature"),
    "top_p of nothing": (body(top_p=0), 422, "/top_p"),
    "top_p below zero": (body(top_p=-0.5), 422, "/top_p"),
    "top_p over one": (body(top_p=1.01), 422, "/top_p"),
    "top_p NaN": (b'{"history": [], "top_p": NaN}', 400, "/top_p"),
    "a seed below zero": (body(seed=-1), 422, "/seed"),
    "a seed that JSON readers would round": (body(seed=2**53), 422, "/seed"),
    "a seed as a fraction": (body(seed=1.5), 422, "/seed"),
    "a seed as text": (body(seed="7"), 422, "/seed"),
    "a seed as a boolean": (body(seed=True), 422, "/seed"),
    "speculation as a boolean": (body(speculation=True), 422, "/speculation"),
    "no time": (body(deadline_ms=0), 422, "/deadline_ms"),
    "too much time": (body(deadline_ms=60_001), 422, "/deadline_ms"),
    "an unknown fallback": (body(fallback="random"), 422, "/fallback"),
    "an unknown inclusion": (body(include=["everything"]), 422, "/include/0"),
    "20 MB": (b'{"history": ["' + b"x" * 20_000_000 + b'"]}', 413, None),
}


@pytest.mark.parametrize("name", list(BAD_INPUT))
async def test_bad_input_is_refused_by_name_and_quickly(standing: ValkeyProcess, name: str) -> None:
    content, status, pointer = BAD_INPUT[name]
    async with api(api_settings(standing.url), Workers(w1=TinyWorker())) as client:
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            reply = await client.post("/recommend", content=content, headers=JSON)
            seconds.append(time.monotonic() - started)
        problem = reply.json()
        good = await client.post("/recommend", content=body(), headers=JSON)
    assert reply.status_code == problem["status"] == status
    assert reply.headers["content-type"] == "application/problem+json"
    assert problem["type"].startswith("urn:padrec:problem:")
    assert problem["retryable"] is False
    assert problem["request_id"] == reply.headers["x-request-id"]
    if pointer is not None:
        assert pointer in [error["pointer"] for error in problem["errors"]]
        assert all(error["reason"] for error in problem["errors"])
    assert min(seconds) < LIMIT_SECONDS
    assert good.status_code == 200
    assert good.json()["items"][0]["source"] == "model"


async def test_the_times_of_an_answer_are_in_a_header_too(standing: ValkeyProcess) -> None:
    async with api(api_settings(standing.url), Workers(w1=TinyWorker())) as client:
        reply = await client.post("/recommend", content=body(), headers=JSON)
    stages = dict(part.split(";dur=") for part in reply.headers["server-timing"].split(", "))
    assert {stage: float(ms) for stage, ms in stages.items()} == pytest.approx(reply.json()["timings_ms"])


async def test_a_problem_never_quotes_the_request(standing: ValkeyProcess) -> None:
    async with api(api_settings(standing.url), Workers(w1=TinyWorker())) as client:
        fields = {"k": "s3cret", "history": ["ok", 5, "s3cret\n"], "strategy": "s3cret", "exclude": "s3cret"}
        reply = await client.post("/recommend", json=fields | {"filters": {"year": {"any": ["s3cret"]}}})
    assert reply.status_code == 422
    assert "s3cret" not in reply.text


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
async def test_another_content_type_is_refused(standing: ValkeyProcess, content_type: str) -> None:
    async with api(api_settings(standing.url), Workers(w1=TinyWorker())) as client:
        reply = await client.post("/recommend", content=body(), headers={"Content-Type": content_type})
        fine = await client.post(
            "/recommend", content=body(), headers={"Content-Type": "Application/JSON; charset=utf-8"}
        )
    assert reply.status_code == 415
    assert fine.status_code == 200


async def test_the_body_limit_holds_whatever_the_headers_say(standing: ValkeyProcess) -> None:
    async def chunks() -> Any:
        for _ in range(40):
            yield b"x" * 50_000

    async with api(api_settings(standing.url), Workers(w1=TinyWorker())) as client:
        chunked = await client.post("/recommend", content=chunks(), headers=JSON)
        lying = await client.post("/recommend", content=chunks(), headers={**JSON, "Content-Length": "10"})
        huge = await client.post("/recommend", content=b"{}", headers={**JSON, "Content-Length": "9" * 5000})
    assert [chunked.status_code, lying.status_code, huge.status_code] == [413, 413, 413]


async def test_the_million_item_history_is_refused_by_length_when_the_body_may_be_large(
    standing: ValkeyProcess,
) -> None:
    settings = api_settings(standing.url, max_body_bytes=1 << 26)
    async with api(settings, Workers(w1=TinyWorker())) as client:
        reply = await client.post("/recommend", content=b'{"history": [' + b"1," * 10**6 + b"1]}", headers=JSON)
    assert reply.status_code == 422
    assert reply.json()["errors"] == [{"pointer": "/history", "reason": "should have at most 1000 items"}]


def test_twenty_megabytes_over_a_real_connection_get_their_answer(standing: ValkeyProcess) -> None:
    settings = api_settings(standing.url)
    app = create_app(settings, worker_transport=Workers(w1=TinyWorker()))
    with served(app) as url, httpx.Client(base_url=url) as client:
        started = time.monotonic()
        reply = client.post("/recommend", content=b"x" * 20_000_000, headers=JSON)
        assert reply.status_code == 413
        assert time.monotonic() - started < 5
        assert client.post("/recommend", content=body(), headers=JSON).status_code == 200


@pytest.mark.parametrize("value", ["0", "-5", "soon", "1.5", "9999999999", ""])
async def test_a_deadline_header_that_is_no_deadline_is_refused(standing: ValkeyProcess, value: str) -> None:
    async with api(api_settings(standing.url), Workers(w1=TinyWorker())) as client:
        reply = await client.post("/recommend", content=body(), headers={**JSON, "X-Request-Timeout-Ms": value})
    assert reply.status_code == 422
    assert "X-Request-Timeout-Ms" in reply.json()["detail"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/recommend", 405), ("POST", "/nowhere", 404)])
async def test_the_router_refuses_in_the_same_shape(
    standing: ValkeyProcess, method: str, path: str, status: int
) -> None:
    async with api(api_settings(standing.url), Workers()) as client:
        reply = await client.request(method, path)
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.json()["title"]
    assert ("allow" in reply.headers) == (status == 405)


async def test_openapi_describes_both_bodies_and_every_refusal(standing: ValkeyProcess) -> None:
    async with api(api_settings(standing.url), Workers()) as client:
        document = (await client.get("/openapi.json")).json()
    assert {"/recommend", "/v1/recommend", "/healthz", "/readyz", "/metrics"} <= set(document["paths"])
    post = document["paths"]["/v1/recommend"]["post"]
    content = post["requestBody"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/RecommendRequest"}
    assert len(content["examples"]) == 5
    assert {"200", "400", "408", "413", "415", "422", "503", "504"} <= set(post["responses"])
    schemas = document["components"]["schemas"]
    assert {"RecommendRequest", "RecommendResponse", "Problem", "Filter", "RecommendedItem"} <= set(schemas)
    referenced = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert referenced <= set(schemas)
    asked = schemas["RecommendRequest"]["properties"]
    items = schemas["RecommendBatch"]["properties"]["requests"]["items"]
    assert items == {"anyOf": [{"$ref": "#/components/schemas/RecommendRequest"}, {}]}
    assert asked["k"]["anyOf"][0]["maximum"] == asked["history"]["maxItems"] / 10 == 100
    assert set(asked["filters"]["properties"]) == {"genre", "year"}
    assert asked["filters"]["properties"]["genre"]["properties"]["any"]["items"]["enum"] == [
        "Comedy",
        "Drama",
        "Horror",
    ]
    assert asked["filters"]["additionalProperties"] is False
    assert asked["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 2}
    assert asked["top_p"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert asked["seed"]["anyOf"][0] == {"type": "integer", "minimum": 0, "maximum": 2**53 - 1}


async def test_the_documented_examples_are_served(standing: ValkeyProcess) -> None:
    async with api(api_settings(standing.url), Workers(w1=TinyWorker())) as client:
        document = (await client.get("/openapi.json")).json()
        examples = document["paths"]["/recommend"]["post"]["requestBody"]["content"]["application/json"]["examples"]
        for example in examples.values():
            reply = await client.post("/recommend", json=example["value"])
            assert reply.status_code == 200, reply.text


def batch(*requests: Any, **fields: Any) -> bytes:
    return json.dumps({"requests": list(requests)} | fields).encode()


async def test_a_batch_answers_every_request_as_if_it_had_come_alone(standing: ValkeyProcess) -> None:
    asked = [{"history": ["i1"], "k": 3}, {"history": ["i1"], "k": 0}, {"history": []}, 7, {"history": ["i2"], "k": 2}]
    async with api(api_settings(standing.url), Workers(w1=TinyWorker())) as client:
        reply = await client.post("/v1/recommend/batch", content=batch(*asked), headers=JSON | {"X-Request-Id": "r"})
        alone = [await client.post("/recommend", content=json.dumps(each), headers=JSON) for each in asked]
    assert reply.status_code == 200
    results = reply.json()["results"]
    assert [result["status"] for result in results] == [200, 422, 200, 422, 200] == [r.status_code for r in alone]
    for result, single in zip(results, alone, strict=True):
        if result["status"] == 200:
            assert result["answer"]["items"] == single.json()["items"]
            assert result["answer"]["degraded"] == single.json()["degraded"]
        else:
            assert result["problem"]["errors"] == single.json()["errors"]
    assert [r.get("answer", r.get("problem"))["request_id"] for r in results] == [f"r.{i}" for i in range(5)]


@pytest.mark.parametrize(
    ("requests", "outcome"),
    [
        ([{"history": ["i1"]}] * 2, "ok"),
        ([{"history": ["i1"]}, {"history": []}], "fallback"),
        ([{"history": ["i1"]}, {"history": []}, 7], "rejected"),
        ([{"history": []}, 7, {"history": ["i1"], "deadline_ms": 1, "fallback": "none"}], "deadline"),
    ],
)
async def test_a_batch_counts_as_its_worst_part(standing: ValkeyProcess, requests: list[Any], outcome: str) -> None:
    async with api(api_settings(standing.url), Workers(w1=TinyWorker(delay=0.05))) as client:
        await client.post("/v1/recommend/batch", content=batch(*requests), headers=JSON)
        metrics = (await client.get("/metrics")).text
    assert f'padrec_requests_total{{outcome="{outcome}",route="/v1/recommend/batch"}} 1.0' in metrics


async def test_requests_of_a_batch_run_beside_each_other_and_by_their_deadline(standing: ValkeyProcess) -> None:
    worker = TinyWorker(delay=0.2)
    async with api(api_settings(standing.url), Workers(w1=worker)) as client:
        started = time.monotonic()
        content = batch(*[{"history": ["i1"]}] * 31, {"history": ["i1"], "deadline_ms": 50, "fallback": "none"})
        results = (await client.post("/v1/recommend/batch", content=content, headers=JSON)).json()["results"]
        assert time.monotonic() - started < 31 * 0.2
        assert [result["status"] for result in results] == [200] * 31 + [504]
        content = batch({"history": ["i1"], "fallback": "none"}, {"history": ["i1"]}, deadline_ms=50)
        results = (await client.post("/v1/recommend/batch", content=content, headers=JSON)).json()["results"]
    assert results[0]["status"] == 504
    assert [note["code"] for note in results[1]["answer"]["degraded"]] == ["deadline"]


async def test_a_batch_counts_all_its_requests_at_the_door(standing: ValkeyProcess) -> None:
    worker = TinyWorker(delay=0.2)
    async with api(api_settings(standing.url, max_in_flight=5), Workers(w1=worker)) as client:
        ask = client.post("/v1/recommend/batch", content=batch(*[{"history": ["i1"]}] * 6), headers=JSON)
        assert (await ask).status_code == 503
        fits = asyncio.create_task(
            client.post("/v1/recommend/batch", content=batch(*[{"history": ["i1"]}] * 4), headers=JSON)
        )
        await until(lambda: len(worker.seen) == 4)
        pair = await client.post("/v1/recommend/batch", content=batch(*[{"history": ["i1"]}] * 2), headers=JSON)
        single = await client.post("/recommend", content=body(), headers=JSON)
        assert (await fits).status_code == 200
        again = await client.post("/v1/recommend/batch", content=batch(*[{"history": ["i1"]}] * 5), headers=JSON)
    assert (pair.status_code, single.status_code, again.status_code) == (503, 200, 200)
    assert int(pair.headers["retry-after"]) >= 1
    assert pair.json()["type"].endswith("overloaded")


@pytest.mark.parametrize(
    ("content", "status", "pointer"),
    [
        (batch(), 422, "/requests"),
        (batch(*[{"history": []}] * 33), 422, "/requests"),
        (batch({"history": []}, deadline_ms=0), 422, "/deadline_ms"),
        (batch({"history": []}, k=3), 422, "/k"),
        (b'{"requests": {}}', 422, "/requests"),
        (b"[]", 422, ""),
        (b'{"requests": [{"history": ["\\ud800"]}]}', 400, "/requests/0/history/0"),
    ],
)
async def test_a_bad_batch_is_refused_as_a_whole(
    standing: ValkeyProcess, content: bytes, status: int, pointer: str
) -> None:
    async with api(api_settings(standing.url), Workers(w1=TinyWorker())) as client:
        reply = await client.post("/v1/recommend/batch", content=content, headers=JSON)
    assert reply.status_code == status
    assert pointer in [error["pointer"] for error in reply.json()["errors"]]


async def test_a_client_that_leaves_takes_its_whole_batch_along(standing: ValkeyProcess) -> None:
    worker = TinyWorker(delay=5)
    async with api(api_settings(standing.url), Workers(w1=worker)) as client:
        asking = asyncio.create_task(
            client.post("/v1/recommend/batch", content=batch(*[{"history": ["i1"]}] * 4), headers=JSON)
        )
        await until(lambda: len(worker.seen) == 4)
        asking.cancel()
        await until(lambda: worker.abandoned == 4)
