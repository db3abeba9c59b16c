"""The HTTP client for upstream: requests on the wire, broken connections, TLS and proxies."""

import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from certificates import Certificates, make_certificates
from gateway_fixture import API_KEY, PATH, GatewayFixture, OpenGateway, cache_status, code_of
from proxy import __version__
from raw_upstream import RawUpstream, Turn, answer, raw_proxy, raw_upstream
from serving import wait_until

OTHER = answer(99)
"""An answer without a request."""


@pytest.fixture
def raw() -> Iterator[RawUpstream]:
    with raw_upstream() as upstream:
        yield upstream


@pytest.fixture
def gateway(open_gateway: OpenGateway, raw: RawUpstream) -> GatewayFixture:
    return open_gateway(upstream={"base_url": raw.url})


def estimate(gateway: GatewayFixture, steps: int) -> int:
    """Requests the price of a body with `steps`; the correct price is the same number."""
    response = gateway.ask(b'[{"steps":%d}]' % steps)
    assert response.status_code == 200, response.text
    price: int = response.json()["data"]["estimated"]
    return price


EXTRA_BYTES = {
    "a second answer": OTHER,
    "the beginning of a second answer": OTHER[:30],
    "one byte of a second answer": OTHER[:1],
    "two answers": OTHER + OTHER,
    "junk": b"junk\r\n\r\n",
    "a blank line": b"\r\n",
    "a line break": b"\n",
}


class TestBytesAfterAnAnswer:
    @pytest.mark.parametrize("late", [False, True], ids=["in the same segment", "50 ms later"])
    @pytest.mark.parametrize("extra", EXTRA_BYTES.values(), ids=EXTRA_BYTES)
    def test_bytes_after_an_answer_are_dropped_with_their_connection(
        self,
        gateway: GatewayFixture,
        raw: RawUpstream,
        extra: bytes,
        late: bool,  # noqa: FBT001 -- a row of a table
    ) -> None:
        raw.script(Turn((answer(2), extra) if late else (answer(2) + extra,)))
        assert estimate(gateway, 2) == 2
        wait_until(lambda: raw.closed == 1)
        assert [estimate(gateway, steps) for steps in (3, 4, 2)] == [3, 4, 2]
        assert [request.connection for request in raw.requests] == [0, 1, 1]

    @pytest.mark.parametrize("extra", [b"", OTHER, b"\r\n", b"0\r\n\r\n"])
    def test_bytes_after_a_chunked_answer_too(self, gateway: GatewayFixture, raw: RawUpstream, extra: bytes) -> None:
        body = b'{"data":{"estimated":2,"balance":20},"error":{}}'
        chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        raw.script(Turn((chunked + extra,)))
        assert [estimate(gateway, steps) for steps in (2, 3)] == [2, 3]
        assert [request.connection for request in raw.requests] == [0, int(extra != b"")]

    def test_after_an_answer_in_pieces_the_connection_is_reused(
        self, gateway: GatewayFixture, raw: RawUpstream
    ) -> None:
        whole = answer(2)
        raw.script(Turn((whole[:10], whole[10:40], whole[40:-3], whole[-3:])))
        assert [estimate(gateway, steps) for steps in (2, 3, 4)] == [2, 3, 4]
        assert raw.connections == 1


class TestClosedConnections:
    """An estimate changes nothing upstream, so it can be repeated if it failed on a reused connection."""

    @pytest.mark.parametrize("end", ["close", "reset"])
    def test_a_reused_connection_that_closes_before_the_answer_is_replaced(
        self, gateway: GatewayFixture, raw: RawUpstream, end: str
    ) -> None:
        assert estimate(gateway, 1) == 1
        raw.script(Turn(end=end))  # type: ignore[arg-type]  # a row of a table
        response = gateway.ask(b'[{"steps":2}]')
        assert response.json()["data"]["estimated"] == 2
        assert cache_status(response) == "fwd=miss; fwd-status=200; stored; ttl=3600"
        assert [request.connection for request in raw.requests] == [0, 0, 1]
        assert raw.requests[1].body == raw.requests[2].body
        assert gateway.client.get("/v1/usage").json()["total"]["requests"] == 2
        assert gateway.client.get("/readyz").json()["degraded"] == []

    def test_the_second_attempt_uses_a_new_connection(self, gateway: GatewayFixture, raw: RawUpstream) -> None:
        with ThreadPoolExecutor(4) as pool:
            raw.script(*[Turn((b"", answer(7)))] * 4)
            assert list(pool.map(lambda steps: estimate(gateway, steps), range(4))) == [7] * 4
        assert raw.connections == 4
        raw.script(Turn(end="close"))
        assert estimate(gateway, 5) == 5
        assert raw.requests[-1].connection == 4

    def test_a_request_is_repeated_only_once(self, gateway: GatewayFixture, raw: RawUpstream) -> None:
        estimate(gateway, 1)
        raw.script(Turn(end="close"), Turn(end="close"))
        response = gateway.ask(b'[{"steps":2}]')
        assert (response.status_code, code_of(response)) == (502, "upstream-error")
        assert len(raw.requests) == 3

    def test_a_new_connection_that_is_closed_is_not_replaced(self, gateway: GatewayFixture, raw: RawUpstream) -> None:
        raw.script(Turn(end="close"))
        response = gateway.ask()
        assert (response.status_code, code_of(response)) == (502, "upstream-error")
        assert len(raw.requests) == 1

    @pytest.mark.parametrize("begun", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", OTHER[:-1]])
    def test_a_connection_that_has_begun_to_answer_is_not_replaced(
        self, gateway: GatewayFixture, raw: RawUpstream, begun: bytes
    ) -> None:
        estimate(gateway, 1)
        raw.script(Turn((begun,), "close"))
        response = gateway.ask(b'[{"steps":2}]')
        assert (response.status_code, code_of(response)) == (502, "upstream-error")
        assert "broke before its answer was complete" in response.json()["detail"]
        assert len(raw.requests) == 2

    def test_both_attempts_share_one_timeout(self, open_gateway: OpenGateway, raw: RawUpstream) -> None:
        gateway = open_gateway(upstream={"base_url": raw.url, "timeout_s": 0.3})
        estimate(gateway, 1)
        raw.script(Turn(end="close"), Turn())
        response = gateway.ask(b'[{"steps":2}]')
        assert (response.status_code, code_of(response)) == (504, "upstream-timeout")

    def test_every_request_is_answered_at_upstreams_idle_timeout(
        self, gateway: GatewayFixture, raw: RawUpstream
    ) -> None:
        raw.idle_s = idle_s = 0.03
        with ThreadPoolExecutor(6) as pool:

            def ask(client: int) -> list[int]:
                estimates = []
                for number in range(50):
                    estimates.append(estimate(gateway, client * 100 + number))
                    time.sleep(idle_s)
                return estimates

            estimates = list(pool.map(ask, range(6)))
        assert estimates == [[client * 100 + number for number in range(50)] for client in range(6)]


PRICED = b'{"data":{"estimated":2,"balance":20},"error":{}}'

FORMS = {
    "up to the end of the connection": (b"HTTP/1.1 200 OK\r\n\r\n" + PRICED, "close"),
    "by HTTP/1.0": (b"HTTP/1.0 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(PRICED), PRICED), "none"),
    "for the last time": (answer(2, head="connection: close\r\n"), "none"),
    "after a hint": (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + answer(2), "none"),
    "after two continues": (b"HTTP/1.1 100 Continue\r\n\r\n" * 2 + answer(2), "none"),
    "with trailers": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\nx: y\r\n\r\n" % (len(PRICED), PRICED),
        "none",
    ),
    "after a blank line": (b"\r\n" + answer(2), "none"),
    "with a cookie": (answer(2, head="set-cookie: a=b\r\n"), "none"),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_answers_in_every_form_of_http_are_accepted(
    gateway: GatewayFixture, raw: RawUpstream, form: tuple[bytes, str]
) -> None:
    raw.script(Turn((form[0],), form[1]))  # type: ignore[arg-type]  # a row of a table
    assert [estimate(gateway, steps) for steps in (2, 3)] == [2, 3]
    assert b"cookie" not in raw.requests[1].headers


NO_FORMS = {
    "junk": b"junk\r\n\r\n",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "two lengths": answer(2, head="content-length: 1\r\n"),
    "a length and chunks": answer(2, head="transfer-encoding: chunked\r\n"),
    "an upgrade": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "an endless head": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 2**18,
    "endless continues": b"HTTP/1.1 100 Continue\r\n\r\n" * 2**16,
    "a long body": b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % 2**30 + b" " * 2**21,
}


@pytest.mark.parametrize("sent", NO_FORMS.values(), ids=NO_FORMS)
def test_malformed_answers_are_an_error_at_once(gateway: GatewayFixture, raw: RawUpstream, sent: bytes) -> None:
    raw.script(Turn((sent,)))
    response = gateway.ask(b'[{"steps":2}]')
    assert (response.status_code, code_of(response)) == (502, "upstream-error")
    assert estimate(gateway, 2) == 2
    assert [request.connection for request in raw.requests] == [0, 1]


@pytest.mark.parametrize("sent", [NO_FORMS["a long body"], OTHER[:-1]])
def test_the_status_of_an_incomplete_answer_is_reported(gateway: GatewayFixture, raw: RawUpstream, sent: bytes) -> None:
    raw.script(Turn((sent,), "close"))
    assert cache_status(gateway.ask(b'[{"steps":2}]')) == "fwd=miss; fwd-status=200"


def test_a_request_has_only_the_body_and_our_own_headers(open_gateway: OpenGateway, raw: RawUpstream) -> None:
    gateway = open_gateway(upstream={"base_url": raw.url + "/a%2fb/"})
    body, query = '[{"prompt":"é","steps":2}]'.encode(), "type=image&q=%zz'\"+{}|"
    headers = {
        "content-type": "application/json",
        "cookie": "a=b",
        "x-other": "1",
        "user-agent": "team",
        "accept": "x/y",
    }
    assert gateway.client.post(f"{PATH}?{query}", content=body, headers=headers).status_code == 200
    (request,) = raw.requests
    assert request.line == b"POST /a%2fb/pub/v1/generations/estimate?type=image&q=%zz'%22+{}| HTTP/1.1"
    assert request.body == body
    assert request.headers == {
        b"host": raw.url.removeprefix("http://").encode(),
        b"x-api-key": API_KEY.encode(),
        b"content-type": b"application/json",
        b"content-length": b"%d" % len(body),
        b"accept": b"application/json",
        b"accept-encoding": b"identity",
        b"user-agent": f"estimate-proxy/{__version__}".encode(),
    }


# Certificates and proxies


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def served(certified: Certificates) -> ssl.SSLContext:
    """Returns the server's TLS context with a certificate of the test's CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certified.cert("server"), certified.key("server"))
    return context


@pytest.mark.parametrize("trusted", [True, False])
def test_a_ca_file_replaces_the_cas_of_the_system_and_the_environment(
    open_gateway: OpenGateway,
    certified: Certificates,
    served: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trusted: bool,  # noqa: FBT001 -- a row of a table
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certified.ca))
    with raw_upstream(served) as raw:
        ca = {"ca_file": certified.ca} if trusted else {}
        gateway = open_gateway(upstream={"base_url": raw.url, **ca})
        responses = [gateway.ask(b'[{"steps":%d}]' % steps) for steps in (1, 2)]
    if trusted:
        assert [response.json()["data"]["estimated"] for response in responses] == [1, 2]
        assert raw.connections == 1
    else:
        assert [code_of(response) for response in responses] == ["upstream-error"] * 2
        assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
        assert not raw.requests


WAYS = [(proxy, upstream) for proxy in ("http", "https") for upstream in ("http", "https")]


@pytest.mark.parametrize(("proxy_scheme", "upstream_scheme"), WAYS)
def test_requests_go_through_a_configured_proxy(
    open_gateway: OpenGateway, certified: Certificates, served: ssl.SSLContext, proxy_scheme: str, upstream_scheme: str
) -> None:
    credentials = b"Basic dTpww6TDn3c6QC9vcmQ="
    with (
        raw_upstream(served if upstream_scheme == "https" else None) as raw,
        raw_proxy(served if proxy_scheme == "https" else None) as proxy,
    ):
        proxy_url = f"{proxy_scheme}://u:p%C3%A4%C3%9Fw%3A%40%2Ford@127.0.0.1:{proxy.port}"
        gateway = open_gateway(upstream={"base_url": raw.url, "proxy": proxy_url, "ca_file": certified.ca})
        assert [estimate(gateway, steps) for steps in (1, 2)] == [1, 2]
        seen = proxy.requests[0]
        assert seen.headers[b"proxy-authorization"] == credentials
        assert seen.headers[b"user-agent"] == f"estimate-proxy/{__version__}".encode()
        if upstream_scheme == "http":
            assert seen.line == f"POST {raw.url}{PATH} HTTP/1.1".encode()
            assert len(proxy.requests) == 2
        else:
            assert seen.line == f"CONNECT {raw.url.removeprefix('https://')} HTTP/1.1".encode()
            assert len(proxy.requests) == 1
            assert b"x-api-key" not in seen.headers
            assert b"proxy-authorization" not in raw.requests[0].headers


def test_a_proxy_without_credentials_gets_none(open_gateway: OpenGateway, raw: RawUpstream) -> None:
    with raw_proxy() as proxy:
        gateway = open_gateway(upstream={"base_url": raw.url, "proxy": f"http://127.0.0.1:{proxy.port}"})
        assert estimate(gateway, 2) == 2
    assert b"proxy-authorization" not in proxy.requests[0].headers


def test_a_refusal_of_the_proxy_is_an_error_and_is_not_logged(
    open_gateway: OpenGateway, certified: Certificates, served: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = b"HTTP/1.1 407 Who is pass-word?\r\ncontent-length: 0\r\nproxy-authenticate: Basic\r\n\r\n"
    with raw_upstream(served) as raw, raw_proxy(refuses=refusal) as proxy:
        proxy_url = f"http://user-name:pass-word@127.0.0.1:{proxy.port}"
        gateway = open_gateway(upstream={"base_url": raw.url, "proxy": proxy_url, "ca_file": certified.ca})
        response = gateway.ask()
    assert (response.status_code, code_of(response)) == (502, "upstream-error")
    assert "ClientHttpProxyError: 407" in caplog.text
    for word in ("user-name", "pass-word", "dXNlci1uYW1lOnBhc3Mtd29yZA=="):
        assert word not in caplog.text + response.text


def test_the_environments_proxies_are_not_used(
    open_gateway: OpenGateway, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:1")
    assert estimate(open_gateway(upstream={"base_url": raw.url}), 2) == 2
