"""The way upstream: the one place that adds the server-side key, to one address that no request can steer.

The address is the configured base and a fixed path; of a request only the query string goes along. Headers are ours
alone, both ways. There is no redirect, no cookie, no proxy from the environment, and a cap on what is read.
"""

import asyncio
import logging
import math
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import httpx2

from proxy import __version__, settings
from proxy.canonical import key_of
from proxy.circuit import Circuit, Gate
from proxy.descriptors import ran_out
from proxy.lanes import Lanes
from proxy.metrics import Metrics
from proxy.problems import Code, Problem
from proxy.replies import Failed, Rejected, Reply, read_reply
from proxy.settings import SecretText
from proxy.troubles import Troubles

ESTIMATE_PATH = "/pub/v1/generations/estimate"
MAX_ANSWER_BYTES = 2**20

QUEUED_PER_CONNECTION = 1
"""Asks that may wait for a connection: those take one answer of upstream's longer, and more are refused at once."""

QUIET_S = 10.0
"""An upstream that fails now and then is said to fail, and to answer again, no more often."""

# RFC 3986 §3.4, the percent sign of what is encoded already, and what lenient clients leave bare.
_QUERY_CHARACTERS = "%!$&'()*+,;=:@/?-._~[]{}|\\^`"

# What counts as an outage; a busy or refusing upstream is there.
_OUTAGES = (Code.UPSTREAM_ERROR, Code.UPSTREAM_TIMEOUT)

log = logging.getLogger(__name__)


_TOO_MANY_ASKS = Problem(
    Code.OVERLOADED, "RenderNet is being asked as much at a time as the gateway allows: try again.", retry_after_s=1
)


_NO_DESCRIPTOR = Problem(
    Code.OVERLOADED,
    "The gateway has no file descriptor left for a connection to RenderNet: try again.",
    retry_after_s=1,
)


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

    def key_of(self, canonical: bytes, *, account: str, query: str, ignored: Sequence[str]) -> str:
        """The key of a question that is asked here, its query string as sent."""
        return key_of(canonical, origin=self.origin, account=account, path=self.path, query=query, ignored=ignored)


class Upstream:
    """Asks upstream for estimates. `close` must be called."""

    def __init__(self, configured: settings.Upstream, keys: Mapping[str, SecretText], metrics: Metrics) -> None:
        self.address = Address.of(configured.base_url)
        self._keys: dict[str, SecretText] = {}
        self._metrics = metrics
        self._timeout_s = configured.timeout_s
        self._timeouts = {"timeout": httpx2.Timeout(configured.timeout_s).as_dict()}
        tls, proxy = _tls_context(configured.ca_file), configured.proxy
        self._lanes = Lanes(
            configured.max_connections,
            lambda size: httpx2.AsyncHTTPTransport(
                verify=tls,
                trust_env=False,
                proxy=None if proxy is None else proxy.get_secret_value(),
                limits=httpx2.Limits(max_connections=size),
            ),
        )
        self._asks = 0
        self._most_asks = (1 + QUEUED_PER_CONNECTION) * configured.max_connections
        self._circuits: dict[str, Circuit] = {}
        self.take_keys(keys)
        self._failing: set[str] = set()
        self._troubles = Troubles(quiet_s=QUIET_S)

    def take_keys(self, keys: Mapping[str, SecretText]) -> None:
        """New and changed keys. Accounts that are not named any more keep theirs for what is still under way."""
        self._keys |= keys
        for account in keys:
            self._circuits.setdefault(account, Circuit())

    @property
    def in_trouble(self) -> bool:
        """Whether some account's newest exchange failed."""
        return bool(self._failing)

    async def estimate(self, account: str, canonical: bytes, query: str, *, deadline: float) -> Reply:
        """What upstream says to `canonical`, asked with the account's key. Failures are replies too.

        `deadline` stands on the event loop's clock.
        """
        if self._asks >= self._most_asks:
            return Failed(_TOO_MANY_ASKS, asked=False)
        self._asks += 1
        try:
            return await self._estimate(account, canonical, query, deadline)
        finally:
            self._asks -= 1

    async def _estimate(self, account: str, canonical: bytes, query: str, deadline: float) -> Reply:
        loop = asyncio.get_running_loop()
        circuit = self._circuits[account]
        gate = circuit.admit(loop.time(), probe_s=self._timeout_s)
        if gate is not Gate.ASK:
            return Failed(_closed_gate(gate, circuit.wait_s(loop.time())), asked=False)
        era, asked_at = circuit.era, loop.time()
        reply = await self._ask(account, canonical, query, min(deadline, loop.time() + self._timeout_s))
        if isinstance(reply, Failed) and not reply.asked:  # it says nothing of upstream
            return reply
        self._metrics.upstream_duration.labels(account, _status_class(reply)).observe(loop.time() - asked_at)
        if isinstance(reply, Failed) and reply.problem.code is Code.UPSTREAM_BUSY:
            circuit.pause(loop.time(), reply.problem.retry_after_s or 0)
        if circuit.era == era:  # what was asked before the newest probe tells nothing now
            circuit.note(loop.time(), failed=isinstance(reply, Failed) and reply.problem.code in _OUTAGES)
            self._metrics.circuit_open.labels(account).set(circuit.is_open)
        return reply

    async def close(self) -> None:
        await self._lanes.close()

    async def _ask(self, account: str, canonical: bytes, query: str, deadline: float) -> Reply:
        reply: Reply
        reason: str | None
        try:
            async with asyncio.timeout_at(deadline):
                reply = await self._exchange(account, canonical, query)
        except (TimeoutError, httpx2.TimeoutException):
            problem = Problem(Code.UPSTREAM_TIMEOUT, "RenderNet did not answer in time: try again later.")
            reply, reason = Failed(problem), "no answer in time"
        except (httpx2.TransportError, httpx2.DecodingError, OSError) as error:
            if ran_out(error):
                self._metrics.record_descriptors_exhausted()
                return Failed(_NO_DESCRIPTOR, asked=False)
            problem = Problem(Code.UPSTREAM_ERROR, "RenderNet could not be reached: try again later.")
            reply, reason = Failed(problem), f"{type(error).__name__}: {error}"
        except _AnswerTooLargeError:
            problem = Problem(Code.UPSTREAM_ERROR, f"RenderNet's answer had more than {MAX_ANSWER_BYTES} bytes.")
            reply, reason = Failed(problem), "an answer beyond the size cap"
        else:
            reason = f"{reply.problem.code} ({reply.upstream_status})" if isinstance(reply, Failed) else None
        self._note_trouble(account, reason)
        return reply

    async def _exchange(self, account: str, canonical: bytes, query: str) -> Reply:
        secret = self._keys[account].get_secret_value()
        request = httpx2.Request(
            "POST",
            self.address.url.copy_with(query=query.encode()) if query else self.address.url,
            content=canonical,
            headers={
                "x-api-key": secret,
                "content-type": "application/json",
                "accept": "application/json",
                "accept-encoding": "identity",
                "user-agent": f"estimate-proxy/{__version__}",
            },
            extensions=self._timeouts,
        )
        with self._lanes.one() as transport:
            try:
                response = await transport.handle_async_request(request)
            except AttributeError as error:  # anyio's, where a connection is reset in the moment in which it is there
                raise httpx2.ConnectError("the connection was reset at once") from error
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

    def _note_trouble(self, account: str, reason: str | None) -> None:
        now = asyncio.get_running_loop().time()
        if reason is None:
            self._failing.discard(account)
            if self._troubles.ends(account, now):
                log.info("upstream answers again for the account %s", account)
        else:
            self._failing.add(account)
            if self._troubles.begins(account, reason, now):
                log.error("upstream fails for the account %s: %s", account, reason)


def _status_class(reply: Reply) -> str:
    match reply:
        case Failed(upstream_status=None, problem=problem):
            return "timeout" if problem.code is Code.UPSTREAM_TIMEOUT else "error"
        case Failed(upstream_status=int(status), problem=Problem(code=Code.UPSTREAM_ERROR)) if status < 500:  # noqa: PLR2004
            return "error"  # a page, or our own key: whatever its status, no answer
        case Failed(upstream_status=int(status)) | Rejected(status):
            return f"{status // 100}xx"
        case _:
            return "2xx"


def _closed_gate(gate: Gate, wait_s: float) -> Problem:
    if gate is Gate.PAUSED:
        detail = "RenderNet wants no requests for this account just now: try again later."
    else:
        detail = "RenderNet has been failing and is left alone for a moment: try again later."
    return Problem(Code.UPSTREAM_BUSY, detail, retry_after_s=math.ceil(wait_s))


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
