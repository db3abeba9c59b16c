"""CORS: which preflights are granted, and which answers a page may read, over HTTP and in a browser."""

import logging
from collections.abc import Mapping

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import Route

from browser import Browser
from gateway_fixture import DESIGN, PATH, GatewayFixture, OpenGateway, code_of
from serving import serving, wait_until

LISTED = "https://tools.example.com"
OTHER = "https://evil.example.com"


@pytest.fixture
def shared(open_gateway: OpenGateway) -> GatewayFixture:
    """A gateway that pages of `LISTED` may call."""
    return open_gateway(server={"cors_origins": [LISTED, "http://localhost:3000"]})


def preflight(gateway: GatewayFixture, origin: str, path: str = PATH) -> httpx2.Response:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,x-api-key"}
    with httpx2.Client(base_url=gateway.url, trust_env=False) as browser:
        return browser.options(path, headers={"origin": origin, **asked})


def names(headers: Mapping[str, str], name: str) -> set[str]:
    return set(headers[name].lower().split(", "))


@pytest.mark.parametrize("origin", [LISTED, "http://localhost:3000"])
def test_a_preflight_of_a_listed_origin_is_granted(shared: GatewayFixture, origin: str) -> None:
    response = preflight(shared, origin)
    assert (response.status_code, response.content) == (204, b"")
    headers = response.headers
    assert headers["access-control-allow-origin"] == origin
    assert headers["vary"] == "origin"
    assert names(headers, "access-control-allow-methods") == {"get", "post"}
    assert names(headers, "access-control-allow-headers") == {
        "authorization",
        "cache-control",
        "content-type",
        "estimate-proxy-max-credits",
        "x-api-key",
        "x-request-id",
    }
    assert headers["access-control-max-age"] == "600"
    assert "access-control-allow-credentials" not in headers
    assert not shared.simulator.received


@pytest.mark.parametrize("origin", [OTHER, LISTED.upper(), LISTED + ":443", LISTED + ".evil.example", "null"])
def test_a_preflight_of_another_origin_is_refused(
    shared: GatewayFixture, origin: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "proxy"):
        response = preflight(shared, origin)
    assert (response.status_code, code_of(response)) == (403, "forbidden")
    assert repr(origin) in response.json()["detail"]
    assert "cors_origins in the section [server]" in response.json()["detail"]
    assert not [name for name in response.headers if name.startswith("access-control-")]
    (line,) = (record.__dict__["facts"] for record in caplog.records if record.getMessage() == "request")
    assert (line["status"], line["code"], line["path"]) == (403, "forbidden", PATH)


def test_without_the_setting_every_preflight_is_refused(gateway: GatewayFixture) -> None:
    response = preflight(gateway, LISTED)
    assert (response.status_code, code_of(response)) == (403, "forbidden")


def test_an_origin_in_a_problem_is_short_and_has_no_token(shared: GatewayFixture) -> None:
    token = shared.client.headers["x-api-key"]
    detail = preflight(shared, f"https://{token}.example/" + "x" * 900).json()["detail"]
    assert token[:20] not in detail
    assert len(detail) < 500


def test_options_that_is_not_a_preflight_is_refused_as_before(shared: GatewayFixture) -> None:
    response = shared.client.options(PATH, headers={"origin": LISTED})
    assert (response.status_code, code_of(response)) == (405, "method-not-allowed")


def test_a_page_of_a_listed_origin_can_read_every_answer(shared: GatewayFixture) -> None:
    for response in (
        shared.ask(origin=LISTED),
        shared.ask(origin=LISTED),
        shared.ask(b"[]", origin=LISTED),
        shared.ask(origin=LISTED, x_api_key="ep_unknown"),
        shared.client.get("/v1/quota", headers={"origin": LISTED}),
        shared.client.head("/v1/quota", headers={"origin": LISTED}),
        shared.client.get("/nowhere", headers={"origin": LISTED}),
        shared.client.get("/healthz", headers={"origin": LISTED}),
    ):
        assert response.headers["access-control-allow-origin"] == LISTED
        assert "origin" in names(response.headers, "vary")
        assert {
            "age",
            "cache-status",
            "estimate-proxy-balance-age",
            "estimate-proxy-warning",
            "ratelimit",
            "ratelimit-policy",
            "retry-after",
            "server-timing",
            "x-request-id",
        } <= names(response.headers, "access-control-expose-headers")
        assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize("headers", [{}, {"origin": OTHER}, {"origin": ""}])
def test_other_requests_are_served_without_permission_to_read(shared: GatewayFixture, headers: dict[str, str]) -> None:
    response = shared.ask(**headers)
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers
    assert "vary" not in response.headers


def test_a_connection_stays_open_after_a_preflight(shared: GatewayFixture) -> None:
    asked = f"OPTIONS {PATH} HTTP/1.1\r\nHost: x\r\nOrigin: {LISTED}\r\nAccess-Control-Request-Method: POST\r\n"
    received = shared.raw((asked + "\r\n" + asked + "Connection: close\r\n\r\n").encode())
    assert received.count(b"HTTP/1.1 204 No Content\r\n") == 2
    assert b"transfer-encoding" not in received
    wait_until(lambda: shared.tracker.in_flight == 0)


ASK = """
const [url, token] = arguments;
const headers = {"X-API-KEY": token, "Content-Type": "application/json", "Cache-Control": "max-age=60",
                 "X-Request-Id": "page-1"};
return (async () => {
  try {
    const response = await fetch(url, {method: "POST", headers, body: '[{"model": "Flux"}]'});
    return {status: response.status, body: await response.json(), headers: Object.fromEntries(response.headers)};
  } catch (error) {
    return {error: error.name};
  }
})();
"""


def test_a_page_of_a_listed_origin_asks_in_a_browser(open_gateway: OpenGateway, browser: Browser) -> None:
    """The page's server has two origins, by its address and by its name; one of them is listed."""
    with serving(Starlette(routes=[Route("/", HTMLResponse("<!doctype html><title>A page</title>"))])) as page:
        gateway = open_gateway(server={"cors_origins": [page]})
        browser.open(page)
        asked, again = (browser.run(ASK, gateway.url + PATH, DESIGN) for _ in range(2))
        refused = browser.run(ASK, gateway.url + PATH, "ep_unknown")
        browser.open(page.replace("127.0.0.1", "localhost"))
        blocked = browser.run(ASK, gateway.url + PATH, DESIGN)
    assert (asked["status"], again["status"]) == (200, 200)
    assert asked["body"] == again["body"]
    assert again["headers"]["cache-status"].startswith("estimate-proxy; hit; ttl=")
    assert again["headers"]["x-request-id"] == "page-1"
    assert {"age", "ratelimit", "ratelimit-policy", "server-timing", "estimate-proxy-balance-age"} <= set(
        again["headers"]
    )
    assert (refused["status"], refused["body"]["error"]["code"]) == (401, "unknown-token")
    assert blocked == {"error": "TypeError"}
    assert "has been blocked by CORS policy" in " ".join(browser.errors())
    assert len(gateway.simulator.received) == 1
