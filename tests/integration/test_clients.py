"""Requests of other HTTP clients, sent byte for byte in the pieces that these clients send."""

import contextlib
import json
import re
import socket

import pytest

from gateway_fixture import API_KEY, DESIGN, PATH, GatewayFixture, cache_status, code_of
from proxy.http.paths import OWN_PATHS
from serving import wait_until
from wire import chunked, talking

TOKEN = DESIGN.encode()

# The same request as each client library sends it.
REQUESTS = b'[{"model": "Flux", "prompt": {"positive": "caf\\u00e9 + bar", "negative": ""}, "batch_size": 2}]'
FETCH = '[{"model":"Flux","prompt":{"positive":"café + bar","negative":""},"batch_size":2}]'.encode()
DOTNET = b'[{"model":"Flux","prompt":{"positive":"caf\\u00E9 \\u002B bar","negative":""},"batch_size":2}]'

REQUESTS_HEAD = b"""POST /pub/v1/generations/estimate HTTP/1.1
Host: gateway.internal:8080
User-Agent: python-requests/2.32.3
Accept-Encoding: gzip, deflate, br
Accept: */*
Connection: keep-alive
X-API-KEY: %s
Content-Length: %d
Content-Type: application/json

"""
TOO_LARGE = (
    "The request line, headers, trailers and chunk extensions are larger than 65536 bytes together: shorten them."
)
FETCH_HEAD = b"""POST /pub/v1/generations/estimate HTTP/1.1
host: gateway.internal:8080
connection: keep-alive
x-api-key: %s
content-type: application/json
accept: */*
accept-language: *
sec-fetch-mode: cors
user-agent: node
accept-encoding: gzip, deflate
content-length: %d

"""
DOTNET_HEAD = b"""POST /pub/v1/generations/estimate HTTP/1.1
Host: gateway.internal:8080
X-API-KEY: %s
traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01
Transfer-Encoding: chunked
Content-Type: application/json; charset=utf-8

"""


def head(text: bytes, *values: object) -> bytes:
    return text.replace(b"\n", b"\r\n") % values


def test_requests_of_three_clients_share_one_price(gateway: GatewayFixture) -> None:
    with talking(gateway) as (connection, reader):
        outcomes = []
        for request in (
            head(REQUESTS_HEAD, TOKEN, len(REQUESTS)) + REQUESTS,
            head(FETCH_HEAD, TOKEN, len(FETCH)) + FETCH,
            head(DOTNET_HEAD, TOKEN) + chunked(DOTNET),
        ):
            connection.sendall(request)
            status, headers, body = reader.response()
            outcomes.append((status, headers["cache-status"].split(";")[1].strip(), json.loads(body)["data"]))
    priced = {"estimated": 5.5, "balance": 10_000}
    assert outcomes == [(200, "fwd=miss", priced), (200, "hit", priced), (200, "hit", priced)]
    assert gateway.simulator.received[0].body == (
        '[{"batch_size":2,"model":"Flux","prompt":{"negative":"","positive":"café + bar"}}]'.encode()
    )


def test_pipelined_requests_are_answered_in_order(gateway: GatewayFixture) -> None:
    bodies = [b'[{"batch_size":%d}]' % size for size in (1, 2, 3)]
    with talking(gateway) as (connection, reader):
        connection.sendall(b"".join(head(FETCH_HEAD, TOKEN, len(body)) + body for body in bodies))
        estimates = [json.loads(reader.response()[2])["data"]["estimated"] for _ in bodies]
    assert estimates == [1, 2, 3]


def test_a_request_sent_byte_by_byte_is_answered(gateway: GatewayFixture) -> None:
    with talking(gateway) as (connection, reader):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head(DOTNET_HEAD, TOKEN) + chunked(DOTNET):
            connection.sendall(bytes([byte]))
        assert reader.response()[0] == 200


def test_a_token_in_a_trailer_is_ignored(gateway: GatewayFixture) -> None:
    request = head(DOTNET_HEAD, b"ep_nobody") + chunked(DOTNET, trailer=b"X-API-KEY: %s\r\n" % TOKEN)
    with talking(gateway) as (connection, reader):
        connection.sendall(request)
        assert reader.response()[0] == 401


def test_expect_100_continue_gets_a_100_response(gateway: GatewayFixture) -> None:
    expecting = head(FETCH_HEAD, TOKEN, len(FETCH)).replace(b"accept: */*", b"expect: 100-continue")
    with talking(gateway) as (connection, reader):
        connection.sendall(expecting)
        assert reader.response()[0] == 100
        connection.sendall(FETCH)
        assert reader.response()[0] == 200


def test_expect_100_continue_with_a_body_far_too_large_is_refused_before_it_is_sent(gateway: GatewayFixture) -> None:
    expecting = head(FETCH_HEAD, TOKEN, 50_000_000).replace(b"accept: */*", b"expect: 100-continue")
    with talking(gateway) as (connection, reader):
        connection.sendall(expecting)
        status, headers, _ = reader.response()
    assert (status, headers["connection"]) == (413, "close")


def test_an_http_1_0_request_is_answered_and_its_connection_closed(gateway: GatewayFixture) -> None:
    request = head(REQUESTS_HEAD, TOKEN, len(REQUESTS)).replace(b"HTTP/1.1", b"HTTP/1.0")
    reply = gateway.raw(request.replace(b"Connection: keep-alive", b"Connection: close") + REQUESTS)
    assert reply.startswith(b"HTTP/1.1 200 ")


def test_a_client_that_leaves_during_its_body_causes_no_upstream_call(gateway: GatewayFixture) -> None:
    with gateway.connect() as connection:
        connection.sendall(head(FETCH_HEAD, TOKEN, len(FETCH)) + FETCH[:10])
        wait_until(lambda: gateway.tracker.arriving_bytes)
    wait_until(lambda: not gateway.tracker.arriving_bytes)
    assert gateway.simulator.calls == 0
    assert cache_status(gateway.ask(FETCH)).startswith("fwd=miss")


@pytest.mark.parametrize(
    "target",
    [
        "//evil.example/pub/v1/generations/estimate",
        "/pub/v1/generations/estimate@evil.example",
        "/@evil.example/pub/v1/generations/estimate",
        "http://evil.example/pub/v1/generations/estimate",
        "http://evil.example@127.0.0.1/pub/v1/generations/estimate",
        "/pub/v1/generations/../../../admin",
        "/pub/v1/generations/%2e%2e/%2e%2e/estimate",
        "/pub%2fv1%2fgenerations%2festimate",
        "/pub/v1/generations/estimate/",
        "/pub/v1/generations/estimate%00",
        "/pub/v1/generations/estimate?@evil.example/",
        "/pub/v1/generations/estimate?/../../generations",
        "/pub/v1/generations/estimate#@evil.example",
        "/pub/v1/generations/estimate;x=1",
        "\\evil.example",
        "*",
    ],
)
def test_a_path_never_changes_the_upstream_host(gateway: GatewayFixture, target: str) -> None:
    head_bytes = f"POST {target} HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\nX-API-KEY: {DESIGN}\r\n"
    reply = gateway.raw(head_bytes.encode() + b"Content-Length: 4\r\n\r\n[{}]")
    status = int(reply.split()[1])
    assert status in {200, 400, 404}
    assert b"evil" not in reply.lower().partition(b"\r\n\r\n")[0], "only a problem's text repeats the path"
    assert b"location:" not in reply.lower()
    assert {received.path for received in gateway.simulator.received} <= {PATH}
    assert (gateway.simulator.calls == 1) == (status == 200)
    for received in gateway.simulator.received:
        assert dict(received.headers)[b"host"] == sent_to_upstream_host(received.headers)
        assert received.api_keys == [API_KEY.encode()]


def sent_to_upstream_host(headers: list[tuple[bytes, bytes]]) -> bytes:
    (host,) = (value for name, value in headers if name == b"host")
    assert host.startswith(b"127.0.0.1:")
    return host


@pytest.mark.parametrize("line", [b"GET", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"HEAD"])
def test_other_methods_get_a_405(gateway: GatewayFixture, line: bytes) -> None:
    reply = gateway.raw(line + b" " + PATH.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 405 ")
    assert b"allow: POST\r\n" in reply


@pytest.mark.parametrize("path", ["/", "/pub/v1/generations", "/v1/quotas", "/pub/v1/models"])
def test_other_paths_get_a_404_with_the_served_ones(gateway: GatewayFixture, path: str) -> None:
    response = gateway.client.get(path)
    assert (response.status_code, code_of(response)) == (404, "not-found")
    problem = response.json()
    assert problem["detail"].startswith(f"The gateway does not serve {path}. ")
    assert {PATH, *OWN_PATHS} <= set(re.findall(r"/[a-z0-9/.]*[a-z0-9]", problem["detail"]))
    assert problem["err"] == problem["error"], "RenderNet's other endpoints use `err`"


@pytest.mark.parametrize(
    ("path", "right", "is_base_url"),
    [
        (f"/{PATH}", PATH, True),
        (f"//{PATH}/", PATH, True),
        (f"{PATH}/", PATH, False),
        ("//v1/quota", "/v1/quota", True),
        ("/metrics/", "/metrics", False),
    ],
)
def test_an_extra_slash_is_explained(gateway: GatewayFixture, path: str, right: str, *, is_base_url: bool) -> None:
    reply = gateway.raw(f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert reply.startswith(b"HTTP/1.1 404 ")
    detail = json.loads(reply.partition(b"\r\n\r\n")[2])["detail"]
    assert detail.startswith(f"The gateway does not serve {path}: send the request to {right}.")
    assert ("slash at the end of your client's base URL" in detail) == is_base_url


def test_a_404_truncates_a_long_path(gateway: GatewayFixture) -> None:
    detail = gateway.client.get("/" + "x" * 5000).json()["detail"]
    assert f"/{'x' * 199}..." in detail
    assert "x" * 200 not in detail


@pytest.mark.parametrize(
    "content_type",
    ["text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "image/png"],
)
def test_a_content_type_that_the_client_added_is_explained(gateway: GatewayFixture, content_type: str) -> None:
    response = gateway.ask(content_type=content_type)
    assert (response.status_code, code_of(response)) == (415, "unsupported-media-type")
    detail = response.json()["detail"]
    assert "send" in detail
    assert "Content-Type: application/json" in detail
    assert (f"Content-Type: {content_type.partition(';')[0]}," in detail) == (content_type != "image/png")


@pytest.mark.parametrize(
    "what", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nHost: x\r\nA B: c\r\n\r\n"]
)
def test_bytes_that_are_not_http_get_a_400(gateway: GatewayFixture, what: bytes) -> None:
    head_bytes, _, body = gateway.raw(what).partition(b"\r\n\r\n")
    assert head_bytes.startswith(b"HTTP/1.1 400 ")
    assert {b"connection: close", b"cache-control: no-store"} <= set(head_bytes.split(b"\r\n"))
    problem = json.loads(body)
    assert problem["error"]["code"] == "invalid-request"
    assert f"x-request-id: {problem['request_id']}".encode() in head_bytes


@pytest.mark.parametrize("line", [b"GET /healthz?", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: "])
def test_an_endless_head_is_cut_off(gateway: GatewayFixture, line: bytes) -> None:
    with gateway.connect() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(line)
        for _ in range(200):
            connection.sendall(b"a" * 2**20)
        pytest.fail("200 MiB of a head were taken")
    assert gateway.ask().status_code == 200


def test_a_head_of_many_headers_is_cut_off(gateway: GatewayFixture) -> None:
    reply = gateway.raw(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 2**14)
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["detail"] == TOO_LARGE


def test_a_large_body_does_not_count_as_head(gateway: GatewayFixture) -> None:
    body = b'[{"prompt":{"positive":"%s"}}]' % (b"x" * 200_000)
    with talking(gateway) as (connection, reader):
        for _ in range(3):
            connection.sendall(head(FETCH_HEAD, TOKEN, len(body)) + body)
            assert reader.response()[0] == 200


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a", True),
        ("A.b_c-9", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ("é", False),
        ("", False),
    ],
)
def test_a_valid_request_id_of_the_client_is_kept(gateway: GatewayFixture, given: str, *, kept: bool) -> None:
    responses = [
        gateway.client.post(PATH, content=b"[{}]", headers=[(b"x-request-id", given.encode())]),
        gateway.client.get("/nowhere", headers=[(b"x-request-id", given.encode())]),
    ]
    for response in responses:
        found = response.headers["x-request-id"]
        assert (found == given) is kept
        assert 1 <= len(found) <= 128


def test_two_request_ids_are_ignored(gateway: GatewayFixture) -> None:
    response = gateway.client.post(PATH, content=b"[{}]", headers=[("x-request-id", "a"), ("x-request-id", "b")])
    assert response.headers["x-request-id"] not in {"a", "b", "a, b"}


def test_a_query_that_is_too_long_is_refused(gateway: GatewayFixture) -> None:
    assert gateway.client.post(f"{PATH}?{'x' * 8192}", content=b"[{}]").status_code == 200
    assert gateway.client.post(f"{PATH}?{'x' * 8193}", content=b"[{}]").status_code == 400
