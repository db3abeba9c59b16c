"""Asks RenderNet for estimates: the one place that adds the server-side key.

Nothing of a request steers where it goes: the address is `upstream.base_url` and a fixed path, and only the query
string is the client's. Each account has a circuit breaker. Failures are replies, as prices are.
"""

import asyncio
import logging
import math
from collections.abc import Mapping
from datetime import UTC, datetime

from proxy.problems import Code, Problem
from proxy.settings.schema import SecretText, UpstreamSettings
from proxy.telemetry.descriptors import ran_out
from proxy.telemetry.incidents import IncidentLog
from proxy.telemetry.metrics import Metrics
from proxy.upstream.address import UpstreamAddress
from proxy.upstream.circuit_breaker import CircuitBreaker, Decision, Transition
from proxy.upstream.http_client import MAX_RESPONSE_BYTES, ConnectError, HttpClient, HttpError, ResponseTooLargeError
from proxy.upstream.replies import Failed, Rejected, Reply, read_reply

QUEUED_PER_CONNECTION = 1
"""Questions that may wait for a connection. They take one answer of RenderNet's longer; more are refused at once."""

QUIET_S = 10.0
"""After RenderNet has answered again, a new failure is not logged for so long, unless it opens the circuit."""

# What counts as an outage; a busy or refusing upstream is there.
_OUTAGES = (Code.UPSTREAM_ERROR, Code.UPSTREAM_TIMEOUT)

_TOO_MANY_ASKS = Problem(
    Code.OVERLOADED, "RenderNet is being asked as much at a time as the gateway allows: try again.", retry_after_s=1
)

_NO_DESCRIPTOR = Problem(
    Code.OVERLOADED,
    "The gateway has no file descriptor left for a connection to RenderNet: try again.",
    retry_after_s=1,
)

log = logging.getLogger(__name__)


class Upstream:
    """Asks with each account's key. `close` must be called."""

    def __init__(self, configured: UpstreamSettings, keys: Mapping[str, SecretText], metrics: Metrics) -> None:
        self.address = UpstreamAddress.of(configured.base_url)
        self._client = HttpClient(
            self.address,
            proxy=None if configured.proxy is None else configured.proxy.get_secret_value(),
            ca_file=configured.ca_file,
            max_connections=configured.max_connections,
        )
        self._keys: dict[str, SecretText] = {}
        self._metrics = metrics
        self._timeout_s = configured.timeout_s
        self._asks = 0
        self._most_asks = (1 + QUEUED_PER_CONNECTION) * configured.max_connections
        self._circuits: dict[str, CircuitBreaker] = {}
        self.take_keys(keys)
        self._failing: set[str] = set()
        self._incidents = IncidentLog(quiet_s=QUIET_S)

    async def close(self) -> None:
        await self._client.close()

    def take_keys(self, keys: Mapping[str, SecretText]) -> None:
        """New and changed keys. Accounts that are not named any more keep theirs for what is still under way."""
        self._keys |= keys
        for account in keys:
            self._circuits.setdefault(account, CircuitBreaker())

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
        circuit, asked_at = self._circuits[account], loop.time()
        gate = circuit.admit(asked_at, probe_s=self._timeout_s)
        if gate is Decision.PAUSED or gate is Decision.OPEN:
            return Failed(_admitting_decision(gate, circuit.wait_s(asked_at)), asked=False)
        if gate is Decision.PROBE:
            how = (account, circuit.open_s(asked_at), self._timeout_s)
            log.info("circuit breaker of the account %s half-opens after %.1f s: one probe, for %g s at most", *how)
        probe_generation = circuit.probe_generation
        reply, reason = await self._ask(account, canonical, query, min(deadline, asked_at + self._timeout_s))
        if isinstance(reply, Failed) and not reply.asked:  # it says nothing of upstream
            return reply
        now = loop.time()
        self._metrics.record_upstream_request(account, _status_class(reply), now - asked_at)
        self._note_trouble(account, reason, now)
        if isinstance(reply, Failed) and reply.problem.code is Code.UPSTREAM_BUSY:
            circuit.pause(now, reply.problem.retry_after_s or 0)
        if circuit.probe_generation == probe_generation:  # what was asked before the newest probe tells nothing now
            failed = isinstance(reply, Failed) and reply.problem.code in _OUTAGES
            if (transition := circuit.note(now, failed=failed)) is not None:
                self._note_transition(account, transition, reason)
        return reply

    async def _ask(self, account: str, canonical: bytes, query: str, deadline: float) -> tuple[Reply, str | None]:
        """The reply, and for the log why it is a failure."""
        api_key = self._keys[account].get_secret_value()
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._client.post(canonical, api_key=api_key, query=query)
        except TimeoutError:
            problem = Problem(Code.UPSTREAM_TIMEOUT, "RenderNet did not answer in time: try again later.")
            return Failed(problem), "no answer in time"
        except HttpError as error:
            if ran_out(error):
                self._metrics.record_descriptors_exhausted()
                return Failed(_NO_DESCRIPTOR, asked=False), None
            return Failed(Problem(Code.UPSTREAM_ERROR, _detail_of(error)), error.status), str(error)
        reply = read_reply(
            response.status, response.body, headers=response.headers, secret=api_key, now=datetime.now(UTC)
        )
        return reply, _reason_of(reply) if isinstance(reply, Failed) else None

    def _note_trouble(self, account: str, reason: str | None, now: float) -> None:
        if reason is None:
            self._failing.discard(account)
            if self._incidents.ends(account, now):
                log.info("upstream answers again for the account %s", account)
        else:
            self._failing.add(account)
            if self._incidents.begins(account, reason, now):
                log.error("upstream fails for the account %s: %s", account, reason)

    def _note_transition(self, account: str, transition: Transition, reason: str | None) -> None:
        """Each is logged: they are at least `OPEN_S` apart."""
        self._metrics.circuit_open.labels(account).set(transition.is_open)
        about = (account, transition.seconds, transition.why)
        if transition.is_open:
            log.error("circuit breaker of the account %s opens for %.1f s: %s; the last error: %s", *about, reason)
        else:
            log.info("circuit breaker of the account %s closes after %.1f s: %s", *about)


def _reason_of(failed: Failed) -> str:
    """For the log: the code, and what RenderNet itself said."""
    words = failed.problem.members.get("upstream", {})
    said = ": ".join(word for word in (words.get("code"), words.get("message")) if word)
    return f"{failed.problem.code} ({failed.upstream_status}{', ' * bool(said)}{said})"


def _detail_of(error: HttpError) -> str:
    match error:
        case ConnectError():
            return "RenderNet could not be reached: try again later."
        case ResponseTooLargeError():
            return f"RenderNet's answer had more than {MAX_RESPONSE_BYTES} bytes."
        case _:
            return "The connection to RenderNet broke before its answer was complete: try again later."


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


def _admitting_decision(gate: Decision, wait_s: float) -> Problem:
    if gate is Decision.PAUSED:
        detail = "RenderNet wants no requests for this account just now: try again later."
    else:
        detail = "RenderNet has been failing and is left alone for a moment: try again later."
    return Problem(Code.UPSTREAM_BUSY, detail, retry_after_s=math.ceil(wait_s))
