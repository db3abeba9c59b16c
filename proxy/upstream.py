"""The way upstream: the one place that adds the server-side key, to one address that no request can steer.

The address is the configured base and a fixed path; of a request only the query string goes along. Headers are ours
alone, both ways. There is no redirect, no cookie, no proxy from the environment, and a cap on what is read.
"""

import asyncio
import logging
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import httpx2

from proxy import __version__, settings
from proxy.prices import Failed, Reply, read_reply
from proxy.problems import Code, Problem
from proxy.settings import SecretText

ESTIMATE_PATH = "/pub/v1/generations/estimate"
MAX_ANSWER_BYTES = 2**20

# RFC 3986 §3.4, the percent sign of what is encoded already, and what lenient clients leave bare.
_QUERY_CHARACTERS = "%!$&'()*+,;=:@/?-._~[]{}|\\^`"

log = logging.getLogger(__name__)


class _AnswerTooLargeError(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Address:
    """Where estimates are asked. `origin` and `path` are normalised, as they stand in keys."""

    url: httpx2.URL

    @classmethod
    def of(cls, base_url: str) -> "Address":
        return cls(httpx2.URL(base_url.rstrip("/") + ESTIMATE_PATH))

    @property
    def origin(self) -> str:
        return f"{self.url.scheme}://{self.url.netloc.decode()}"

    @property
    def path(self) -> str:
        return self.url.raw_path.decode()

    def query_as_sent(self, query: bytes) -> str:
        """A request's query string in the spelling in which it goes upstream."""
        return quote(query, safe=_QUERY_CHARACTERS)


class Upstream:
    """Asks upstream for estimates. `close` must be called."""

    def __init__(self, configured: settings.Upstream, keys: Mapping[str, SecretText]) -> None:
        self.address = Address.of(configured.base_url)
        self._keys = keys
        self._timeout_s = configured.timeout_s
        self._transport = httpx2.AsyncHTTPTransport(
            verify=_tls_context(configured.ca_file),
            trust_env=False,
            proxy=None if configured.proxy is None else configured.proxy.get_secret_value(),
            limits=httpx2.Limits(max_connections=configured.max_connections),
        )
        self._trouble: str | None = None

    @property
    def in_trouble(self) -> bool:
        """Whether the newest exchange failed."""
        return self._trouble is not None

    async def estimate(self, account: str, canonical: bytes, query: str) -> Reply:
        """What upstream says to `canonical`, asked with the account's key. Failures are replies too."""
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await self._exchange(account, canonical, query)
        except (TimeoutError, httpx2.TimeoutException):
            problem = Problem(Code.UPSTREAM_TIMEOUT, f"RenderNet did not answer within {self._timeout_s:g} s.")
            reply = self._failed(problem, "no answer in time")
        except (httpx2.TransportError, httpx2.DecodingError, OSError) as error:
            problem = Problem(Code.UPSTREAM_ERROR, "RenderNet could not be reached: try again later.")
            reply = self._failed(problem, f"{type(error).__name__}: {error}")
        except _AnswerTooLargeError:
            problem = Problem(Code.UPSTREAM_ERROR, f"RenderNet's answer had more than {MAX_ANSWER_BYTES} bytes.")
            reply = self._failed(problem, "an answer beyond the size cap")
        self._note_health(reply)
        return reply

    async def close(self) -> None:
        await self._transport.aclose()

    async def _exchange(self, account: str, canonical: bytes, query: str) -> Reply:
        secret = self._keys[account].get_secret_value()
        request = httpx2.Request(
            "POST",
            self.address.url.copy_with(query=query.encode() or None),
            content=canonical,
            headers={
                "x-api-key": secret,
                "content-type": "application/json",
                "accept": "application/json",
                "accept-encoding": "identity",
                "user-agent": f"estimate-proxy/{__version__}",
            },
            extensions={"timeout": httpx2.Timeout(self._timeout_s).as_dict()},
        )
        response = await self._transport.handle_async_request(request)
        try:
            body = await _read(response)
        finally:
            await response.aclose()
        return read_reply(
            response.status_code,
            body,
            secret=secret,
            retry_after=response.headers.get("retry-after"),
            now=datetime.now(UTC),
        )

    def _failed(self, problem: Problem, reason: str) -> Failed:
        self._log_trouble(reason)
        return Failed(problem)

    def _note_health(self, reply: Reply) -> None:
        match reply:
            case Failed(upstream_status=int(status), problem=problem):
                self._log_trouble(f"{problem.code} ({status})")
            case Failed():
                return
            case _ if self._trouble is not None:
                self._trouble = None
                log.info("upstream answers again")

    def _log_trouble(self, reason: str) -> None:
        """Logs a trouble when it begins or changes, not for every request."""
        if reason != self._trouble:
            self._trouble = reason
            log.warning("upstream fails: %s", reason)


async def _read(response: httpx2.Response) -> bytes:
    chunks, size = [], 0
    async for chunk in response.aiter_bytes():
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise _AnswerTooLargeError
    return b"".join(chunks)


def _tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Certificates from `ca_file` alone, or else those that httpx2 trusts by default."""
    if ca_file is None:
        return httpx2.create_ssl_context(trust_env=False)
    return ssl.create_default_context(cafile=str(ca_file))
