"""Files of the package as constant responses: the pages at `/` and `/docs` with their scripts and styles.

* A file has a route of its own, so that a path in a request never becomes the name of a file.
* Everything that a page needs comes from the gateway: `CSP` allows no other origin and no inline script or style.
* Browsers revalidate each file by its ETag (`no-cache`), so that a page never runs with the script of another version.
"""

import gzip
from collections.abc import Mapping
from functools import cache, cached_property
from hashlib import sha256
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from proxy.http.paths import DOCS_PATH
from proxy.http.responses import request_id_of

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}

DOCS_FILES = {
    DOCS_PATH: "docs/index.html",
    f"{DOCS_PATH}/docs.css": "docs/docs.css",
    f"{DOCS_PATH}/docs.js": "docs/docs.js",
    f"{DOCS_PATH}/icon.svg": "docs/icon.svg",
}
"""The page at `/docs`, as `static_routes` takes it."""

_ETAG_DIGITS = 32
_NOT_MODIFIED = 304
_WEIGHTS_OF_NONE = ("q=0", "q=0.0", "q=0.00", "q=0.000")


class StaticFile:
    """A body that never changes. It is compressed when the first client asks for that."""

    def __init__(self, body: bytes, media_type: str) -> None:
        self._body = body
        self._media_type = media_type

    async def respond(self, request: Request) -> Response:
        """The whole file, or 304 if the client has it."""
        compress = accepts(request.headers.get("accept-encoding", ""), "gzip")
        etag = f'"{self._digest}-gzip"' if compress else f'"{self._digest}"'
        headers = {
            "etag": etag,
            "cache-control": "no-cache",
            "vary": "accept-encoding, origin",
            "x-request-id": request_id_of(request),
        }
        if is_listed(etag, request.headers.get("if-none-match", "")):
            return Response(None, _NOT_MODIFIED, headers)
        headers |= {
            "content-type": self._media_type,
            "content-security-policy": CSP,
            "x-content-type-options": "nosniff",
        }
        if compress:
            headers["content-encoding"] = "gzip"
        return Response(self._compressed if compress else self._body, headers=headers)

    @cached_property
    def _digest(self) -> str:
        return sha256(self._body).hexdigest()[:_ETAG_DIGITS]

    @cached_property
    def _compressed(self) -> bytes:
        return gzip.compress(self._body, mtime=0)


@cache
def package_file(name: str) -> StaticFile:
    """The file at this path inside `proxy/http`, such as `docs/index.html`."""
    body = files("proxy.http").joinpath(name).read_bytes()
    return StaticFile(body, MEDIA_TYPES["." + name.rpartition(".")[2]])


def static_routes(names: Mapping[str, str]) -> list[Route]:
    """Routes that serve package files. `names` is by URL path, with values as `package_file` takes them."""
    return [Route(path, package_file(name).respond, methods=["GET"]) for path, name in names.items()]


def accepts(header: str, name: str) -> bool:
    """Whether an `Accept` or `Accept-Encoding` header names this, without the weight 0. `*` names nothing."""
    parts = (part.partition(";") for part in "".join(header.lower().split()).split(","))
    return any(part == name and weight not in _WEIGHTS_OF_NONE for part, _, weight in parts)


def is_listed(etag: str, if_none_match: str) -> bool:
    """Whether `If-None-Match` has this tag, by weak comparison: a front that compresses makes tags weak."""
    return any(tag.strip().removeprefix("W/") in (etag, "*") for tag in if_none_match.split(","))
