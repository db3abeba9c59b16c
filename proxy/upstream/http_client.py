"""An HTTP/1.1 client for POST requests to one address, over pooled connections.

aiohttp's connector opens and pools the connections (name resolution, TLS, proxies, a limit on their number), and
httptools parses the responses. There is no client session, and so no cookies, redirects, decompression or settings from
the environment. We use undocumented parts of the connector: tests/integration/test_private_apis.py lists them.

* A connection is reused only after exactly one whole response, and is closed if anything arrives while it is idle:
  bytes after a response must not be taken for the response to the next request.
* A request whose reused connection is closed before the first byte of a response is sent again, once, on a new
  connection. Servers close idle connections without notice, and these requests change nothing.

Errors, whose texts contain no secret:

    HttpError
    ├── ConnectError            no connection could be opened
    ├── BrokenResponseError     the connection was closed too early, or the response is not HTTP
    └── ResponseTooLargeError   the response has more than `MAX_RESPONSE_BYTES`
"""

import asyncio
import socket
import ssl
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import aiohttp
from aiohttp.connector import Connection as PoolLease
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from yarl import URL

from proxy import __version__
from proxy.upstream.address import UpstreamAddress

MAX_RESPONSE_BYTES = 2**20
"""Limits a response, including its head: an estimate has a few hundred bytes."""

USER_AGENT = f"estimate-proxy/{__version__}"

_NO_TIMEOUT = aiohttp.ClientTimeout()
"""The caller limits each request as a whole."""

_LAST_CHUNK = b"0\r\n\r\n"  # RFC 9112 §7.1


class HttpError(Exception):
    """The root of this tree. `status` is set if the head of a response has arrived."""

    status: int | None = None


class ConnectError(HttpError):
    pass


class BrokenResponseError(HttpError):
    pass


class ResponseTooLargeError(HttpError):
    pass


class _StaleConnectionError(BrokenResponseError):
    """A reused connection was closed before the first byte of a response."""


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """`headers` have names in lower case, and the last value of a header that was sent more than once."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class TlsFacts:
    """The protocol of a TLS connection, such as `TLSv1.3`, and when the server's certificate ends."""

    version: str
    ends_at: datetime


class HttpClient:
    """POSTs JSON to `address`. `close` must be called.

    proxy: the URL of an HTTP proxy, credentials included.
    ca_file: the CA certificates to trust, instead of the system's.
    """

    def __init__(
        self, address: UpstreamAddress, *, proxy: str | None, ca_file: Path | None, max_connections: int
    ) -> None:
        self._address = address
        self._proxy, self._proxy_credentials = _proxy_of(proxy)
        self._tls = _tls_context(ca_file)
        self._max_connections = max_connections
        self._target, credentials = address.path, ""
        if self._proxy is not None and address.scheme == "http":  # not tunnelled: RFC 9112 §3.2.2, RFC 9110 §11.7.2
            self._target = address.origin + address.path
            credentials = "".join(f"{name}: {value}\r\n" for name, value in self._proxy_credentials.items())
        self._head = (
            f"Host: {address.netloc}\r\nUser-Agent: {USER_AGENT}\r\nContent-Type: application/json\r\n"
            f"Accept: application/json\r\nAccept-Encoding: identity\r\n{credentials}"
        )

    @cached_property
    def _connector(self) -> aiohttp.TCPConnector:
        """Created when it is first needed, because it belongs to the running event loop."""
        return aiohttp.TCPConnector(limit=self._max_connections)

    @cached_property
    def _peer(self) -> aiohttp.ClientRequest:
        """Tells the connector where to connect. It is never sent."""
        url, proxy_headers = URL(self._address.origin, encoded=True), None
        if self._proxy is not None:
            # The connector adds `Host` when it connects; without it here, it would not find the idle connection again.
            host = str(url.host_port_subcomponent)
            proxy_headers = {"Host": host, "User-Agent": USER_AGENT, **self._proxy_credentials}
        loop = asyncio.get_running_loop()
        return aiohttp.ClientRequest(
            "POST", url, loop=loop, ssl=self._tls, proxy=self._proxy, proxy_headers=proxy_headers
        )

    async def close(self) -> None:
        if "_connector" in vars(self):
            await self._connector.close()

    async def try_connecting(self) -> TlsFacts | None:
        """Opens a connection and sends nothing. What TLS agreed on; None for http. Raises `ConnectError`."""
        connection = await self._connect(new=True)
        try:
            return connection.tls_facts()
        finally:
            connection.lease.close()

    async def post(self, body: bytes, *, api_key: str, query: str) -> HttpResponse:
        """The response to a JSON body. `query` is percent-encoded. Raises `HttpError`."""
        target = f"{self._target}?{query}" if query else self._target
        head = f"POST {target} HTTP/1.1\r\n{self._head}X-API-KEY: {api_key}\r\nContent-Length: {len(body)}\r\n\r\n"
        request = head.encode() + body
        try:
            return await (await self._connect()).exchange(request)
        except _StaleConnectionError:
            return await (await self._connect(new=True)).exchange(request)

    async def _connect(self, *, new: bool = False) -> "_Connection":
        """A connection for one request.

        new: closes idle connections instead of reusing them; they are as old as the one that was stale.
        """
        try:
            while True:
                connection = _Connection.of(await self._connector.connect(self._peer, [], _NO_TIMEOUT))
                if connection.is_new or not new:
                    return connection
                connection.lease.close()
        except (aiohttp.ClientError, OSError, RuntimeError) as error:  # RuntimeError: uvloop's, instead of an OSError
            raise ConnectError(_reason_of(error)) from None


class _Connection(asyncio.Protocol):
    """A connection: the protocol of its transport, in place of aiohttp's.

    It passes `connection_lost` on to aiohttp's protocol; the pool depends on nothing else.
    """

    lease: PoolLease
    _response: asyncio.Future[HttpResponse] | None = None
    """The response to the request in flight; None while the connection is idle."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._pool_protocol = transport.get_protocol()
        self._parser = HttpResponseParser(self)
        self._exchanges = 0
        transport.set_protocol(self)

    @classmethod
    def of(cls, lease: PoolLease) -> "_Connection":
        """The connection of a lease from the pool. Raises `ConnectError` if it is already lost."""
        if lease.transport is None:
            lease.close()
            raise ConnectError("the connection was closed at once")
        protocol = lease.transport.get_protocol()
        connection = protocol if isinstance(protocol, _Connection) else cls(lease.transport)
        connection.lease = lease
        return connection

    @property
    def is_new(self) -> bool:
        return self._exchanges == 0

    def tls_facts(self) -> TlsFacts | None:
        tls = self._transport.get_extra_info("ssl_object")
        if tls is None:
            return None
        ends_at_s = ssl.cert_time_to_seconds(str(tls.getpeercert()["notAfter"]))
        return TlsFacts(tls.version(), datetime.fromtimestamp(ends_at_s, UTC))

    async def exchange(self, request: bytes) -> HttpResponse:
        """The response to a request. Returns the connection to the pool, or closes it. Raises `HttpError`."""
        self._exchanges += 1
        self._received_bytes, self._has_head, self._is_reusable = 0, False, False
        self._response = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._response
        finally:
            self._response = None
            if self._is_reusable:
                self.lease.release()
            else:
                self.lease.close()

    def data_received(self, data: bytes) -> None:
        if self._response is None or self._response.done():
            self._is_reusable = False
            self._transport.close()
            return
        self._received_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self._is_reusable = False
            self._fail(BrokenResponseError(f"not HTTP: {error}"))
        if self._received_bytes > MAX_RESPONSE_BYTES:
            self._fail(ResponseTooLargeError(f"a response of more than {MAX_RESPONSE_BYTES} bytes"))
        self._is_reusable = self._is_reusable and data.endswith(self._end)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool_protocol.connection_lost(exc)
        if self._response is None:
            return
        if exc is None and self._has_head and not self._headers.keys() & {"content-length", "transfer-encoding"}:
            self.on_message_complete()  # RFC 9112 §6.3: the body ends with the connection
        elif self._received_bytes:
            self._fail(BrokenResponseError("the connection was closed before the end of the response"))
        elif self._exchanges == 1:
            self._fail(BrokenResponseError("the connection was closed without a response"))
        else:
            self._fail(_StaleConnectionError("a reused connection was closed without a response"))

    def on_message_begin(self) -> None:
        self._headers: dict[str, str] = {}
        self._chunks: list[bytes] = []
        self._has_head = False
        self._is_reusable = False  # this may be a second response

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._has_head = self._parser.get_status_code() >= 200  # noqa: PLR2004 -- RFC 9110 §15.2

    def on_body(self, chunk: bytes) -> None:
        self._chunks.append(chunk)

    def on_message_complete(self) -> None:
        if self._has_head and self._response is not None and not self._response.done():
            body = b"".join(self._chunks)
            self._response.set_result(HttpResponse(self._parser.get_status_code(), self._headers, body))
            self._is_reusable = self._parser.should_keep_alive() and bool(body)

    @property
    def _end(self) -> bytes:
        """The last bytes of the response. The parser does not notice a blank line after them."""
        return _LAST_CHUNK if "transfer-encoding" in self._headers else self._chunks[-1]

    def _fail(self, error: HttpError) -> None:
        if self._response is not None and not self._response.done():
            error.status = self._parser.get_status_code() if self._has_head else None
            self._response.set_exception(error)


def _proxy_of(proxy: str | None) -> tuple[URL | None, Mapping[str, str]]:
    """A proxy's URL without credentials, because aiohttp's errors contain it, and the header with the credentials."""
    url = None if proxy is None else URL(proxy)
    if url is None or (url.user is None and url.password is None):
        return url, {}
    encoded = b64encode(f"{url.user or ''}:{url.password or ''}".encode()).decode()  # RFC 7617 §2
    return url.with_user(None), {"Proxy-Authorization": f"Basic {encoded}"}


def _reason_of(error: Exception) -> str:
    """The error for the log, without secrets: the text of `ClientHttpProxyError` has the proxy's headers."""
    if isinstance(error, aiohttp.ClientResponseError):
        return f"{type(error).__name__}: {error.status}"
    cause = error.__cause__ or error
    text = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, ConnectionRefusedError):
        return f"nothing listens there ({text})"
    return f"its host name cannot be resolved ({text})" if isinstance(cause, socket.gaierror) else text


def _tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Trusts only `ca_file`, or else the system's certificates, in the places where OpenSSL was built to look."""
    if ca_file is not None:
        context = ssl.create_default_context(cafile=ca_file)
    else:  # not `create_default_context`, which reads SSL_CERT_FILE and SSL_CERT_DIR
        context, paths = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.get_default_verify_paths()
        found = [path for path in (paths.openssl_cafile, paths.openssl_capath) if Path(path).exists()]
        for path in found:
            context.load_verify_locations(**{"capath" if Path(path).is_dir() else "cafile": path})
    context.set_alpn_protocols(["http/1.1"])
    return context
