"""HTTP/1.1 requests written by hand: request smuggling, malformed heads, size limits, timeouts and half-closing."""

import asyncio
import contextlib
import json
import logging
import select
import socket
import time
from collections.abc import Iterator

import pytest
from prometheus_client.samples import Sample

from gateway_fixture import DESIGN, PATH, GatewayFixture, UpstreamFixture
from gateway_process import address_of, gateway_runner
from malformed_http import NOT_CHUNKED, refused_heads
from proxy.http.connection import MAX_DISCARDED_BYTES, Connection
from proxy.http.framing import MAX_HEAD_BYTES
from proxy.settings.schema import ServerSettings
from serving import wait_until
from wire import Reader, chunked, post, talking

BODY = b'[{"batch_size":3}]'
PRICE = 3
SMUGGLED = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
OFFERS = [("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")] + [
    ("Connection: Upgrade", f"Upgrade: {protocol}") for protocol in ("h2c", "websocket", "TLS/1.2")
]
PATIENCE_S = 0.5
FEW_BYTES = 4096
"""The buffer of a socket. By default the system keeps megabytes of answers, and to write them takes seconds."""

CLOCK_S = 0.01
"""Tolerance between two processes' measurements of a wait."""

every_offer = pytest.mark.parametrize("offer", OFFERS, ids="+".join)


def price_of(body: bytes) -> float:
    return float(json.loads(body)["data"]["estimated"])


def statuses(reply: bytes) -> list[int]:
    """Returns the status of each answer in the received bytes."""
    return [int(part[:3]) for part in reply.split(b"HTTP/1.1 ")[1:]]


def samples_of(gateway: GatewayFixture, name: str) -> list[Sample]:
    return [one for family in gateway.metrics.collect() for one in family.samples if one.name == name]


def assert_cut_off(connection: socket.socket, piece: bytes, *, times: int) -> None:
    """Asserts that the gateway ends the connection before it has read everything."""
    with contextlib.suppress(ConnectionError):
        for _ in range(times):
            connection.sendall(piece)
        pytest.fail(f"{times * len(piece)} bytes were taken")


@every_offer
class TestAnOfferedUpgradeIsIgnored:
    def test_a_body_in_one_piece_is_read(self, gateway: GatewayFixture, offer: tuple[str, ...]) -> None:
        with talking(gateway) as (connection, reader):
            connection.sendall(post(BODY, *offer))
            status, headers, body = reader.response()
        assert (status, price_of(body)) == (200, PRICE)
        assert "upgrade" not in headers

    def test_a_body_in_pieces_is_read(self, gateway: GatewayFixture, offer: tuple[str, ...]) -> None:
        with talking(gateway) as (connection, reader):
            connection.sendall(post(BODY, *offer)[: -len(BODY)])
            wait_until(lambda: gateway.tracker.arriving_bytes)
            connection.sendall(BODY[:5])
            connection.sendall(BODY[5:])
            assert price_of(reader.response()[2]) == PRICE

    def test_a_chunked_body_is_read(self, gateway: GatewayFixture, offer: tuple[str, ...]) -> None:
        with talking(gateway) as (connection, reader):
            connection.sendall(post(chunked(BODY), *offer, "Transfer-Encoding: chunked", length=False))
            assert price_of(reader.response()[2]) == PRICE

    def test_a_body_sent_after_100_continue_is_read(self, gateway: GatewayFixture, offer: tuple[str, ...]) -> None:
        with talking(gateway) as (connection, reader):
            connection.sendall(post(BODY, *offer, "Expect: 100-continue")[: -len(BODY)])
            assert reader.response()[0] == 100
            connection.sendall(BODY)
            assert price_of(reader.response()[2]) == PRICE

    def test_a_request_after_it_is_served(self, gateway: GatewayFixture, offer: tuple[str, ...]) -> None:
        other = b'[{"batch_size":7}]'
        with talking(gateway) as (connection, reader):
            connection.sendall(post(BODY, *offer) + post(other, *offer) + post(BODY))
            assert [price_of(reader.response()[2]) for _ in range(3)] == [PRICE, 7, PRICE]

    def test_its_body_is_never_handled_as_a_request(self, gateway: GatewayFixture, offer: tuple[str, ...]) -> None:
        with talking(gateway) as (connection, reader):
            connection.sendall(post(SMUGGLED, *offer)[: -len(SMUGGLED)])
            wait_until(lambda: gateway.tracker.arriving_bytes)
            connection.sendall(SMUGGLED)
            assert reader.response()[0] == 400
            connection.sendall(post(BODY))
            assert price_of(reader.response()[2]) == PRICE


def test_http_2_with_prior_knowledge_is_refused(gateway: GatewayFixture) -> None:
    reply = gateway.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x12\x04")
    assert statuses(reply) == [505]
    assert b"version-not-supported" in reply


def assert_refused(reply: bytes, status: int) -> None:
    """Asserts that there is one problem document, and nothing after it."""
    assert statuses(reply) == [status]
    head, _, body = reply.partition(b"\r\n\r\n")
    fields = {line.split(b":")[0] for line in head.split(b"\r\n")}
    assert {b"date", b"x-request-id"} <= fields
    assert {b"connection: close", b"cache-control: no-store"} <= set(head.split(b"\r\n"))
    assert json.loads(body)["status"] == status


@pytest.mark.parametrize(("text", "status"), refused_heads().items())
def test_a_malformed_head_is_refused_and_the_following_bytes_are_not_read(
    gateway: GatewayFixture, text: bytes, status: int
) -> None:
    assert_refused(gateway.raw(text + SMUGGLED), status)


def test_a_malformed_request_has_a_log_line_with_its_id(
    gateway: GatewayFixture, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "proxy"):
        reply = gateway.raw(b"FOO / HTTP/1.1\r\nHost: x\r\n\r\n")
    problem = json.loads(reply.partition(b"\r\n\r\n")[2])
    (record,) = (record for record in caplog.records if record.getMessage() == "malformed request")
    assert record.__dict__["facts"] == {
        "request_id": problem["request_id"],
        "client": "127.0.0.1",
        "status": 501,
        "code": "not-implemented",
        "reason": problem["detail"],
    }


@pytest.mark.parametrize("text", NOT_CHUNKED)
def test_a_malformed_chunked_body_is_refused_and_the_following_bytes_are_not_read(
    gateway: GatewayFixture, text: bytes
) -> None:
    assert_refused(gateway.raw(post(text + SMUGGLED, "Transfer-Encoding: chunked", length=False)), 400)
    assert gateway.simulator.calls == 0


@pytest.mark.parametrize(
    ("rest", "status"),
    [
        pytest.param(b"nonsense\r\n", 400, id="malformed chunk"),
        pytest.param(b"0\r\n" + b"A: b\r\n" * 20_000, 431, id="trailers too large"),
        pytest.param(b"1;" + b"a" * 100_000, 431, id="chunk extension too large"),
    ],
)
@pytest.mark.parametrize("half_closes", [False, True])
def test_a_malformed_body_is_logged_and_counted_once_as_invalid(
    gateway: GatewayFixture, caplog: pytest.LogCaptureFixture, rest: bytes, status: int, *, half_closes: bool
) -> None:
    with caplog.at_level(logging.INFO, "proxy"), talking(gateway) as (connection, reader):
        connection.sendall(post(b"1\r\n[\r\n", "Transfer-Encoding: chunked", length=False))
        wait_until(lambda: gateway.tracker.arriving_bytes)
        connection.sendall(rest)
        if half_closes:
            connection.shutdown(socket.SHUT_WR)
        got, headers, body = reader.response()
        with contextlib.suppress(ConnectionResetError):  # closed while bytes that nobody wants were still arriving
            assert connection.recv(1) == b"", "the connection closes"
        wait_until(lambda: any(hasattr(record, "facts") for record in caplog.records))
        gateway.metrics.flush()
    (counted,) = (sample for sample in samples_of(gateway, "estimate_proxy_requests_total") if sample.value)
    assert (counted.labels["outcome"], counted.value) == ("invalid", 1)
    assert (got, headers["connection"], json.loads(body)["status"]) == (status, "close", status)
    (facts,) = (record.__dict__["facts"] for record in caplog.records if hasattr(record, "facts"))
    assert (facts["request_id"], facts["team"], facts["outcome"], facts["status"]) == (
        headers["x-request-id"],
        "design",
        "invalid",
        status,
    )
    assert json.loads(body)["request_id"] == headers["x-request-id"]


def test_a_malformed_body_does_not_replace_an_answer_that_needs_no_body(gateway: GatewayFixture) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    assert_refused(gateway.raw(head + b"nonsense\r\n" + SMUGGLED), 401)


def test_a_head_that_is_too_large_is_refused(gateway: GatewayFixture) -> None:
    assert_refused(gateway.raw(post(BODY, f"A: {'a' * MAX_HEAD_BYTES}") + SMUGGLED), 431)


def test_a_known_method_on_another_path_is_not_a_malformed_request(gateway: GatewayFixture) -> None:
    assert statuses(gateway.raw(f"TRACE {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())) == [405]
    assert statuses(gateway.raw(b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")) == [404]


def test_http_1_0_without_a_host_is_answered_and_the_connection_closed(gateway: GatewayFixture) -> None:
    assert statuses(gateway.raw(b"GET /healthz HTTP/1.0\r\n\r\n" + SMUGGLED)) == [200]


class TestTrailersAndChunkExtensions:
    """Trailers, chunk extensions and the head share one size limit."""

    @pytest.mark.parametrize("flood", [b"0\r\n" + b"A: b\r\n" * 20_000, b"1;" + b"a" * 100_000, b"0" * 100_000])
    def test_a_flood_of_them_is_refused_and_cut_off_at_once(self, gateway: GatewayFixture, flood: bytes) -> None:
        request = post(flood, "Transfer-Encoding: chunked", length=False)
        reply = gateway.raw(request)
        assert statuses(reply) == [431]
        assert b"headers-too-large" in reply
        wait_until(lambda: not gateway.tracker.arriving_bytes)
        assert gateway.simulator.calls == 0

    def test_a_flood_without_a_token_is_refused_too(self, gateway: GatewayFixture) -> None:
        """The answer is sent before the flood, then the connection is cut off."""
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        with talking(gateway) as (connection, reader):
            connection.sendall(head)
            assert reader.response()[0] == 401
            assert_cut_off(connection, b"0\r\n" + b"A: b\r\n" * 20_000, times=100)

    def test_trailers_are_not_read_as_headers(self, gateway: GatewayFixture) -> None:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        trailer = f"X-API-KEY: {DESIGN}\r\n".encode()
        assert statuses(gateway.raw(head.encode() + chunked(BODY, trailer=trailer))) == [401]

    def test_a_body_in_many_small_chunks_is_accepted(self, gateway: GatewayFixture) -> None:
        body = b'[{"prompt":{"positive":"%b"}}]' % (b"x" * 50_000)
        pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
        with talking(gateway) as (connection, reader):
            connection.sendall(post(pieces + b"0\r\n\r\n", "Transfer-Encoding: chunked", length=False))
            assert reader.response()[0] == 200


class TestHalfClosing:
    """A client that has closed its sending side still receives answers."""

    @pytest.mark.parametrize("count", [1, 3])
    def test_complete_requests_are_answered(self, gateway: GatewayFixture, count: int) -> None:
        with gateway.simulator.hold() as hold, talking(gateway) as (connection, reader):
            connection.sendall(post(BODY) * count)
            connection.shutdown(socket.SHUT_WR)
            assert gateway.simulator.arrived(1)
            hold.release()
            assert [price_of(reader.response()[2]) for _ in range(count)] == [PRICE] * count
            assert connection.recv(1) == b""

    def test_an_incomplete_request_is_not_answered(self, gateway: GatewayFixture) -> None:
        with talking(gateway) as (connection, _):
            connection.sendall(post(BODY)[:-1])
            wait_until(lambda: gateway.tracker.arriving_bytes)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
        wait_until(lambda: not gateway.tracker.arriving_bytes)
        assert gateway.simulator.calls == 0


class TestBodiesThatAreTooLarge:
    @pytest.mark.parametrize("fields", [(), ("Expect: 100-continue",)])
    def test_they_are_refused_by_their_length(self, gateway: GatewayFixture, fields: tuple[str, ...]) -> None:
        with talking(gateway) as (connection, reader):
            connection.sendall(post(b"", *fields, "Content-Length: 262145", length=False))
            status, headers, body = reader.response()
            assert (status, headers["connection"]) == (413, "close")
            assert json.loads(body)["error"]["code"] == "body-too-large"
            assert connection.recv(1) == b"", "the answer has an end that a client can see"

    @pytest.mark.parametrize("megabytes", [6, 60])
    def test_they_are_read_to_their_end_so_that_the_client_reads_the_answer(
        self, gateway: GatewayFixture, megabytes: int
    ) -> None:
        with talking(gateway) as (connection, reader):
            connection.settimeout(30)
            connection.sendall(post(b" " * (megabytes * 10**6)))
            assert reader.response()[0] == 413

    def test_reading_of_an_endless_body_stops(self, gateway: GatewayFixture) -> None:
        piece = b"10000\r\n" + b" " * 2**16 + b"\r\n"
        with talking(gateway) as (connection, reader):
            connection.settimeout(30)
            connection.sendall(post(piece * 10, "Transfer-Encoding: chunked", length=False))
            assert reader.response()[0] == 413
            assert_cut_off(connection, piece, times=2 * MAX_DISCARDED_BYTES // 2**16)

    def test_after_a_401_the_connection_stays_usable(self, gateway: GatewayFixture) -> None:
        request = post(BODY).replace(DESIGN.encode(), b"ep_nobody")
        with talking(gateway) as (connection, reader):
            connection.sendall(request[:-5])
            assert reader.response()[0] == 401
            connection.sendall(request[-5:] + post(BODY))
            assert price_of(reader.response()[2]) == PRICE


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamFixture) -> Iterator[tuple[str, int]]:
    """Makes the timeout for a head short."""
    with gateway_runner(tmp_path_factory.mktemp("impatient"), upstream.url) as runner:
        yield address_of(runner.start(server={"head_timeout_s": PATIENCE_S}).url)


class TestHeadsThatDoNotArrive:
    def test_the_default_timeout_is_ten_seconds(self) -> None:
        assert ServerSettings().head_timeout_s == 10

    @pytest.mark.parametrize("beginning", [b"", b"\r\n", b"POST /", b"POST / HTTP/1.1\r\nHost: x\r\n"])
    def test_they_are_cut_off(self, impatient: tuple[str, int], beginning: bytes) -> None:
        began = time.monotonic()
        with socket.create_connection(impatient, timeout=10) as connection, Reader(connection) as reader:
            connection.sendall(beginning)
            if beginning.strip():
                assert reader.response()[0] == 400
            assert connection.recv(1) == b""
            assert time.monotonic() - began >= PATIENCE_S - CLOCK_S

    def test_a_trickle_of_bytes_is_cut_off_too(self, impatient: tuple[str, int]) -> None:
        with socket.create_connection(impatient, timeout=PATIENCE_S / 8) as connection:
            for _ in range(80):
                connection.sendall(b"P")
                with contextlib.suppress(TimeoutError):
                    assert connection.recv(12) == b"HTTP/1.1 400"
                    return
        pytest.fail("it was never cut off")

    def test_each_later_request_has_the_full_timeout(self, impatient: tuple[str, int]) -> None:
        with socket.create_connection(impatient, timeout=10) as connection, Reader(connection) as reader:
            for _ in range(3):
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                assert reader.response()[0] == 200
                assert not select.select([connection], [], [], PATIENCE_S / 2)[0], "idle is not slow"
            connection.sendall(b"POST / ")
            began = time.monotonic()
            assert reader.response()[0] == 400
            assert time.monotonic() - began >= PATIENCE_S - CLOCK_S


def test_a_client_that_does_not_read_its_answers_is_cut_off(
    gateway: GatewayFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connection_made(self: Connection, transport: asyncio.Transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, FEW_BYTES)
        opened(self, transport)

    opened = Connection.connection_made
    monkeypatch.setattr(Connection, "connection_made", connection_made)
    monkeypatch.setattr("proxy.http.connection.LINGER_S", PATIENCE_S)
    with socket.socket() as connection:
        connection.settimeout(30)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, FEW_BYTES)
        connection.connect(address_of(gateway.url))
        assert_cut_off(connection, post(BODY) * 100, times=1000)
    wait_until(lambda: not gateway.tracker.in_flight)


def test_pipelined_requests_wait_unparsed(gateway: GatewayFixture) -> None:
    """The gateway reads one request at a time, however many are pipelined."""
    with gateway.simulator.hold() as hold, talking(gateway) as (connection, reader):
        connection.sendall(post(BODY) * 200)
        assert gateway.simulator.arrived(1)
        assert gateway.tracker.in_flight == 1
        hold.release()
        assert [price_of(reader.response()[2]) for _ in range(200)] == [PRICE] * 200
