"""What the web floor does when the story itself goes wrong."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx2
import orjson
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from proxy.gateway import Answer, Ask, Trace
from proxy.metrics import Metrics
from proxy.problems import Outcome
from proxy.web import MAX_IN_FLIGHT, Ending, Lifecycle, Story, StoryEndpoint
from scene import PATH, Scene, code_of
from serving import serving, wait_until


@contextmanager
def telling(story: Story, *, timeout_s: float = 5.0) -> Iterator[tuple[httpx2.Client, Lifecycle]]:
    """A server whose every path tells `story`."""
    lifecycle = Lifecycle()
    endpoint = StoryEndpoint(
        "estimate", story, lifecycle=lifecycle, metrics=Metrics(), max_body_bytes=1000, timeout_s=timeout_s
    )
    with (
        serving(Starlette(routes=[Route("/", endpoint)])) as url,
        httpx2.Client(base_url=url, trust_env=False) as client,
    ):
        yield client, lifecycle


def facts_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [record.facts for record in caplog.records if hasattr(record, "facts")]


async def fine(ask: Ask, trace: Trace) -> Ending:
    trace.team = "design"
    await ask.read_body()
    return Answer(Outcome.MISS, 200, b"{}")


def test_a_defect_of_ours_is_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_ask: Ask, _trace: Trace) -> Ending:
        raise RuntimeError("the reason is for the log")

    with caplog.at_level(logging.INFO, "proxy"), telling(broken) as (client, _):
        response = client.post("/", headers={"x-request-id": "r1"})
    assert (response.status_code, code_of(response)) == (500, "internal-error")
    assert "reason is for" not in response.text
    assert "the reason is for the log" in caplog.text
    assert "request r1 failed" in caplog.text
    assert facts_of(caplog)[0]["outcome"] == "internal-error"


def test_each_request_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "proxy"), telling(fine) as (client, _):
        client.post("/", headers={"x-request-id": "r1"})
    (facts,) = facts_of(caplog)
    duration = facts.pop("ms")
    assert isinstance(duration, float)
    assert facts == {
        "request_id": "r1",
        "team": "design",
        "operation": "estimate",
        "outcome": "miss",
        "status": 200,
    }


def test_the_log_line_of_an_estimate_names_what_upstream_took(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "proxy"):
        scene.ask()
        scene.ask()
        wait_until(lambda: len(facts_of(caplog)) == 2)  # a line is written behind its answer
    miss, hit = facts_of(caplog)
    assert [miss["outcome"], hit["outcome"]] == ["miss", "hit"]
    assert "upstream_ms" in miss
    assert "upstream_ms" not in hit


def test_more_than_it_can_serve_is_told_to_come_back() -> None:
    with telling(fine) as (client, lifecycle):
        lifecycle.in_flight = MAX_IN_FLIGHT
        response = client.post("/")
        assert (response.status_code, code_of(response)) == (503, "overloaded")
        assert response.headers["retry-after"] == "1"
        lifecycle.in_flight = 0
        assert client.post("/").status_code == 200


def test_a_body_that_does_not_arrive(scene: Scene) -> None:
    with telling(fine, timeout_s=0.2) as (client, lifecycle):
        slow = replace(scene, url=str(client.base_url), lifecycle=lifecycle)
        reply = slow.raw(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n[{}")
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in head
    assert orjson.loads(body)["detail"] == "The body did not arrive in time."


def test_while_draining_connections_are_closed(scene: Scene) -> None:
    scene.lifecycle.draining = True
    for response in (scene.ask(), scene.ask(b"[]"), scene.client.get("/nowhere"), scene.client.get("/readyz")):
        assert response.headers["connection"] == "close"
    assert scene.client.get("/readyz").status_code == 503
    assert scene.client.get("/readyz").json() == {"status": "draining"}
    assert scene.client.get("/healthz").json() == {"status": "alive"}
    assert scene.ask().status_code == 200


def test_a_request_that_is_cut_off_is_told_why() -> None:
    async def endless(_ask: Ask, _trace: Trace) -> Ending:
        raise asyncio.CancelledError

    with telling(endless) as (client, _):
        response = client.post("/")
    assert (response.status_code, code_of(response)) == (503, "draining")
    assert response.headers["connection"] == "close"


def test_a_client_that_has_gone_is_logged_as_cancelled(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "proxy"), scene.simulator.hold() as hold:
        with scene.connect() as connection:
            token = scene.client.headers["x-api-key"]
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-KEY: {token}\r\nContent-Length: 4\r\n\r\n[{{}}]"
            connection.sendall(head.encode())
            assert scene.simulator.arrived(1)
        hold.release()
        wait_until(lambda: facts_of(caplog))
    (facts,) = facts_of(caplog)
    assert (facts["outcome"], facts["status"]) == ("cancelled", 499)


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_take_get_and_head(scene: Scene, path: str) -> None:
    assert scene.client.get(path).status_code == 200
    assert scene.client.head(path).status_code == 200
    refused = scene.client.post(path)
    assert (refused.status_code, code_of(refused)) == (405, "method-not-allowed")
    assert refused.headers["allow"] == "GET, HEAD"


def test_readiness_tells_of_a_lost_store(scene: Scene) -> None:
    assert scene.client.get("/readyz").json() == {"status": "ready", "degraded": []}
    scene.store.client_pause(700)
    assert scene.client.get("/readyz").json() == {"status": "ready", "degraded": ["ledger", "price-book"]}
    wait_until(lambda: scene.client.get("/readyz").json()["degraded"] == [])
