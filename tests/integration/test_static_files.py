"""Files of the package over HTTP: their headers, revalidation and compression."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette

import proxy.http
from proxy.http.static_files import CSP, static_routes
from serving import NO_TLS, serving

STYLE = Path(*proxy.http.__path__, "docs", "docs.css").read_bytes()


@pytest.fixture
def client() -> Iterator[httpx2.Client]:
    routes = static_routes({"/docs/docs.css": "docs/docs.css"})
    with (
        serving(Starlette(routes=routes)) as url,
        httpx2.Client(base_url=url, trust_env=False, verify=NO_TLS, headers={"accept-encoding": "identity"}) as client,
    ):
        yield client


def test_a_file_has_its_type_and_the_headers_of_a_safe_page(client: httpx2.Client) -> None:
    response = client.get("/docs/docs.css", headers={"x-request-id": "r1"})
    assert (response.status_code, response.content) == (200, STYLE)
    headers = dict(response.headers)
    assert headers.pop("etag")
    assert headers.pop("date")
    assert headers == {
        "content-type": "text/css; charset=utf-8",
        "content-length": str(len(STYLE)),
        "cache-control": "no-cache",
        "content-security-policy": CSP,
        "x-content-type-options": "nosniff",
        "vary": "accept-encoding, origin",
        "x-request-id": "r1",
    }


def test_a_file_is_compressed_for_clients_that_accept_it(client: httpx2.Client) -> None:
    plain = client.get("/docs/docs.css")
    compressed = client.get("/docs/docs.css", headers={"accept-encoding": "gzip"})
    assert compressed.headers["content-encoding"] == "gzip"
    assert int(compressed.headers["content-length"]) < len(STYLE) / 2
    assert compressed.content == STYLE
    assert compressed.headers["etag"] != plain.headers["etag"], "the representations differ"


@pytest.mark.parametrize("accept_encoding", ["identity", "gzip"])
def test_a_client_that_has_the_file_gets_no_body(client: httpx2.Client, accept_encoding: str) -> None:
    headers = {"accept-encoding": accept_encoding}
    etag = client.get("/docs/docs.css", headers=headers).headers["etag"]
    again = client.get("/docs/docs.css", headers={**headers, "if-none-match": f'"other", W/{etag}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == etag
    assert client.get("/docs/docs.css", headers={**headers, "if-none-match": '"other"'}).status_code == 200


def test_head_has_the_headers_of_get(client: httpx2.Client) -> None:
    response = client.head("/docs/docs.css")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == str(len(STYLE))


@pytest.mark.parametrize("path", ["/docs/other.css", "/docs/../paths.py", "/docs/%2e%2e/paths.py"])
def test_only_listed_paths_are_served(client: httpx2.Client, path: str) -> None:
    assert client.get(path).status_code == 404
