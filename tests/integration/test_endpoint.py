"""The endpoint when its handler fails, is late or is cancelled, and its log lines."""

import asyncio
import logging
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx2
import orjson
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from gateway_fixture import DESIGN, EXPIRED, MARKETING, PATH, GatewayFixture, OpenGateway, break_off, code_of
from gateway_process import address_of
from proxy.auth import digest_of, token_of
from proxy.gateway.in_flight import MAX_ACTIVE, MAX_IN_FLIGHT, InFlightTracker
from proxy.gateway.request import Answer, ClientRequest, Result, Trace
from proxy.http.endpoint import Endpoint, Handler
from proxy.problems import Outcome
from proxy.telemetry.metrics import Metrics
from serving import NO_TLS, ServerThread, serving, wait_until


@contextmanager
def serving_handler(handler: Handler, *, timeout_s: float = 5.0) -> Iterator[tuple[httpx2.Client, InFlightTracker]]:
    """Starts a server that calls `handler` for each request."""
    tracker = InFlightTracker()
    endpoint = Endpoint(
        "estimate", handler, tracker=tracker, metrics=Metrics(), max_body_bytes=1000, timeout_s=timeout_s
    )
    with (
        serving(Starlette(routes=[Route("/", endpoint)])) as url,
        httpx2.Client(base_url=url, trust_env=False, verify=NO_TLS) as client,
    ):
        yield client, tracker


def facts_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [record.facts for record in caplog.records if hasattr(record, "facts")]


async def fine(ask: ClientRequest, trace: Trace) -> Result:
    trace.team = "design"
    await ask.read_body()
    return Answer(Outcome.MISS, 200, b"{}")


def test_an_unexpected_exception_is_a_500_without_details(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_ask: ClientRequest, _trace: Trace) -> Result:
        raise RuntimeError("the reason is for the log")

    with caplog.at_level(logging.INFO, "proxy"), serving_handler(broken) as (client, _):
        response = client.post("/", headers={"x-request-id": "r1"})
    assert (response.status_code, code_of(response)) == (500, "internal-error")
    assert "reason is for" not in response.text
    assert "the reason is for the log" in caplog.text
    assert "request r1 failed" in caplog.text
    assert facts_of(caplog)[0]["outcome"] == "internal-error"


def test_each_request_has_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "proxy"), serving_handler(fine) as (client, _):
        client.post("/", headers={"x-request-id": "r1"})
    (facts,) = facts_of(caplog)
    duration = facts.pop("ms")
    assert isinstance(duration, float)
    assert facts == {
        "request_id": "r1",
        "client": "127.0.0.1",
        "team": "design",
        "operation": "estimate",
        "path": "/",
        "outcome": "miss",
        "status": 200,
    }


def test_the_log_line_of_an_estimate_has_upstreams_duration(
    gateway: GatewayFixture, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "proxy"):
        gateway.ask()
        gateway.ask()
        wait_until(lambda: len(facts_of(caplog)) == 2)  # the line is written after the answer
    miss, hit = facts_of(caplog)
    assert [miss["outcome"], hit["outcome"]] == ["miss", "hit"]
    assert "upstream_ms" in miss
    assert "upstream_ms" not in hit


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[int], list[dict[str, object]]]:
    """Returns the facts of all requests' log lines, once there are as many as expected: answers come first."""
    caplog.set_level(logging.INFO, "proxy")

    def wait_for(count: int) -> list[dict[str, object]]:
        def found() -> list[dict[str, object]]:
            return [record.__dict__["facts"] for record in caplog.records if record.getMessage() == "request"]

        wait_until(lambda: len(found()) >= count)
        assert len(found()) == count
        return found()

    return wait_for


Lines = Callable[[int], list[dict[str, object]]]


class TestTheLogLineOfARequest:
    def test_it_has_token_path_key_and_model(self, open_gateway: OpenGateway, lines: Lines) -> None:
        gateway = open_gateway(teams={"design": {"tokens": [{"sha256": digest_of(DESIGN), "label": "ci"}]}})
        hit_key = gateway.client.post("/v1/explain", content=b'[{"model":"Flux"}]').json()["key"]
        gateway.ask()
        gateway.ask(b'[{"model":"Flux","seed":7}]', x_api_key=MARKETING)
        explained, first, second = lines(3)
        assert [line["operation"] for line in (explained, first, second)] == ["other", "estimate", "estimate"]
        assert [line["path"] for line in (explained, first, second)] == ["/v1/explain", PATH, PATH]
        assert first["key"] == explained["key"] == hit_key[:16]
        assert second["key"] != first["key"]
        for line in (first, second):
            assert (line["client"], line["model"]) == ("127.0.0.1", "Flux")
            assert {"code", "quota", "reason"}.isdisjoint(line)
        assert (first["team"], first["token"]) == ("design", "ci")
        assert second["team"] == "marketing"
        assert "token" not in second, "its token has no label"

    def test_it_has_the_quota_and_the_reason_of_a_refusal(self, open_gateway: OpenGateway, lines: Lines) -> None:
        quotas = [{"measure": "estimated_credits", "limit": 2, "per": "month"}]
        org = {"quotas": [{"measure": "estimated_credits", "limit": 1, "per": "day"}]}
        gateway = open_gateway(teams={"design": {"tokens": [digest_of(DESIGN)], "quotas": quotas}}, org=org)
        detail = gateway.ask().json()["detail"]
        (line,) = lines(1)
        assert (line["outcome"], line["status"], line["code"]) == ("quota-exceeded", 402, "quota-exceeded")
        assert line["quota"] == "credits-month, org-credits-day"
        assert line["reason"] == detail
        assert str(line["reason"]).endswith(" needs 2.75, more than the whole quota.")

    def test_it_has_the_reason_of_any_problem_but_no_body_or_secret(
        self, gateway: GatewayFixture, lines: Lines
    ) -> None:
        gateway.ask(b'[{"prompt":"Tamarin"},7]')
        gateway.ask(x_api_key=EXPIRED)
        gateway.client.post(f"/pub/v1/{DESIGN}/%0a?key={DESIGN}", content=b"Tamarin")
        gateway.client.get(PATH)
        gateway.client.get(f"/v1/usage?{DESIGN}=1")
        invalid, expired, unserved, method, parameter = lines(5)
        assert (invalid["code"], invalid["team"]) == ("invalid-body", "design")
        assert str(invalid["reason"]).startswith("The item at index 1 ")
        assert (expired["code"], expired["team"]) == ("unknown-token", "-")
        assert str(expired["reason"]).startswith("The token has expired: 2026-01-31 ")
        assert (unserved["code"], unserved["path"]) == ("not-found", "/pub/v1/ep_***/%0A")
        assert (method["code"], method["path"]) == ("method-not-allowed", PATH)
        assert (parameter["code"], parameter["path"]) == ("invalid-query", "/v1/usage")
        text = repr(lines(5))
        assert "Tamarin" not in text
        assert DESIGN[:30] not in text

    def test_it_has_the_operation_of_a_quote(self, gateway: GatewayFixture, lines: Lines) -> None:
        gateway.client.post("/v1/quote", json={"variants": [{"label": "a", "body": [{}]}]})
        (line,) = lines(1)
        assert (line["operation"], line["outcome"], line["status"], line["team"]) == ("quote", "miss", 200, "design")
        assert "upstream_ms" in line

    def test_it_has_the_key_of_a_purged_request(self, open_gateway: OpenGateway, lines: Lines) -> None:
        admin = token_of("a" * 32)
        gateway = open_gateway(admin={"tokens": [digest_of(admin)]})
        for body in (b'{"body":[{}]}', b'{"account":"Tamarin","all":true}'):
            answer = gateway.client.post("/v1/cache/purge", content=body, headers={"x-api-key": admin})
        assert answer.json()["detail"] == "The body's account is not configured: use one of default, second."
        gateway.ask(b"[{}]")
        purged, refused, asked = lines(3)
        assert (purged["path"], purged["key"]) == ("/v1/cache/purge", asked["key"])
        assert (refused["code"], "key" in refused) == ("invalid-request", False)


def test_requests_above_the_limit_get_a_503_with_retry_after() -> None:
    with serving_handler(fine) as (client, tracker):
        for in_flight, waiting, status in (
            (MAX_ACTIVE, 0, 503),
            (MAX_ACTIVE, 1, 200),
            (MAX_IN_FLIGHT - 1, MAX_IN_FLIGHT - 1, 200),
            (MAX_IN_FLIGHT, MAX_IN_FLIGHT, 503),
        ):
            tracker.in_flight, tracker.waiting = in_flight, waiting
            response = client.post("/")
            assert response.status_code == status
            if status == 503:
                assert code_of(response) == "overloaded"
                assert response.headers["retry-after"] == "1"


def test_a_body_that_does_not_arrive_times_out(gateway: GatewayFixture) -> None:
    with serving_handler(fine, timeout_s=0.2) as (client, tracker):
        slow = replace(gateway, url=str(client.base_url), tracker=tracker)
        reply = slow.raw(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n[{}")
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in head
    assert orjson.loads(body)["detail"] == "The body did not arrive in time."


def test_while_draining_connections_are_closed(gateway: GatewayFixture) -> None:
    gateway.tracker.draining = True
    for response in (gateway.ask(), gateway.ask(b"[]"), gateway.client.get("/nowhere"), gateway.client.get("/readyz")):
        assert response.headers["connection"] == "close"
    assert gateway.client.get("/readyz").status_code == 503
    assert gateway.client.get("/readyz").json() == {"status": "draining"}
    assert gateway.client.get("/healthz").json() == {"status": "alive"}
    assert gateway.ask().status_code == 200


def test_a_request_cut_off_by_the_shutdown_gets_a_503() -> None:
    async def endless(_ask: ClientRequest, _trace: Trace) -> Result:
        raise asyncio.CancelledError

    with serving_handler(endless) as (client, _):
        response = client.post("/")
    assert (response.status_code, code_of(response)) == (503, "draining")
    assert response.headers["connection"] == "close"


def test_a_client_that_breaks_off_is_logged_as_cancelled(
    gateway: GatewayFixture, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "proxy"), gateway.simulator.hold() as hold:
        with gateway.connect() as connection:
            token = gateway.client.headers["x-api-key"]
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-KEY: {token}\r\nContent-Length: 4\r\n\r\n[{{}}]"
            connection.sendall(head.encode())
            assert gateway.simulator.arrived(1)
            break_off(connection)
        hold.release()
        wait_until(lambda: facts_of(caplog))
    (facts,) = facts_of(caplog)
    assert (facts["outcome"], facts["status"]) == ("cancelled", 499)


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_accept_get_and_head(gateway: GatewayFixture, path: str) -> None:
    assert gateway.client.get(path).status_code == 200
    assert gateway.client.head(path).status_code == 200
    refused = gateway.client.post(path)
    assert (refused.status_code, code_of(refused)) == (405, "method-not-allowed")
    assert refused.headers["allow"] == "GET, HEAD"


def test_readiness_reports_a_lost_store(gateway: GatewayFixture) -> None:
    assert gateway.client.get("/readyz").json() == {"status": "ready", "degraded": []}
    gateway.store.client_pause(700)
    assert gateway.client.get("/readyz").json() == {"status": "ready", "degraded": ["ledger", "price-book"]}
    wait_until(lambda: gateway.client.get("/readyz").json()["degraded"] == [])


def test_two_requests_in_one_segment_get_one_answer_each(gateway: GatewayFixture) -> None:
    token, first, last = gateway.client.headers["x-api-key"], b'[{"model":"Flux"}]', b'[{"model":"Flux","steps":30}]'
    pieces = []
    for body, connection in ((first, "keep-alive"), (last, "close")):
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-KEY: {token}\r\nConnection: {connection}\r\n"
        pieces.append(head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    received = gateway.raw(b"".join(pieces))
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 2
    assert received.count(b"connection: close") == 1
    assert [exchange.body for exchange in gateway.simulator.received] == [first, last]


def test_a_header_that_would_break_the_head_is_never_sent(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_ask: ClientRequest, trace: Trace) -> Result:
        trace.cache_status = "hit\r\nset-cookie: a=b"
        return Answer(Outcome.HIT, 200, b"{}")

    with serving_handler(broken) as (client, _):
        response = client.post("/")
    assert response.status_code == 500
    assert "set-cookie" not in response.headers
    assert "a response header contains a line break or NUL" in caplog.text


def test_a_head_request_is_answered_without_a_body(gateway: GatewayFixture) -> None:
    expected, response = gateway.client.get("/v1/quota"), gateway.client.head("/v1/quota")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == str(len(expected.content))


def test_an_idle_connection_is_closed_after_its_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.http.connection.KEEP_ALIVE_S", 1)
    server = ServerThread()
    try:
        with server.serving(Starlette()), socket.create_connection(address_of(server.url), timeout=5) as connection:
            for _ in range(4):
                connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert connection.recv(65536).startswith(b"HTTP/1.1 404 ")
                assert not select.select([connection], [], [], 0.4)[0], "it is used now and then"
            assert connection.recv(65536) == b""
    finally:
        server.close()
