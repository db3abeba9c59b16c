"""The client of RenderNet's estimate API: the only module that adds the server-side API key.

* A client's request does not determine the address: that is `upstream.base_url` and a fixed path. Only the query string
  is the client's.
* Each account has a circuit breaker.
* Failures are values, not exceptions.
"""

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime

from proxy.problems import Code, Problem
from proxy.settings.masking import SecretText
from proxy.settings.schema import UpstreamSettings
from proxy.telemetry.descriptors import ran_out
from proxy.telemetry.incidents import IncidentLog
from proxy.telemetry.metrics import Metrics
from proxy.upstream.address import UpstreamAddress
from proxy.upstream.circuit_breaker import CircuitBreaker, Decision, Transition
from proxy.upstream.http_client import MAX_RESPONSE_BYTES, ConnectError, HttpClient, HttpError, ResponseTooLargeError
from proxy.upstream.replies import Failed, Rejected, Reply, read_reply

QUEUED_PER_CONNECTION = 1
"""Limits the requests that wait for a connection, each for about one RenderNet answer. More are refused at once."""

QUIET_S = 10.0
"""Time after a recovery in which a new failure is not logged, unless it opens the circuit breaker."""

# Failures that the circuit breaker counts. An upstream that is busy, or refuses the key, works.
_OUTAGES = (Code.UPSTREAM_ERROR, Code.UPSTREAM_TIMEOUT)

_TOO_MANY_REQUESTS = Problem(
    Code.OVERLOADED, "Too many requests to RenderNet are in progress or waiting: try again.", retry_after_s=1
)

_NO_DESCRIPTOR = Problem(
    Code.OVERLOADED,
    "The gateway has no file descriptor left for a connection to RenderNet: try again.",
    retry_after_s=1,
)

log = logging.getLogger(__name__)


def http_client_of(configured: UpstreamSettings) -> HttpClient:
    return HttpClient(
        UpstreamAddress.of(configured.base_url),
        proxy=None if configured.proxy is None else configured.proxy.get_secret_value(),
        ca_file=configured.ca_file,
        max_connections=configured.max_connections,
    )


class Upstream:
    """Requests estimates, each with its account's key. `close` must be called."""

    def __init__(self, configured: UpstreamSettings, keys: Mapping[str, SecretText], metrics: Metrics) -> None:
        self.address = UpstreamAddress.of(configured.base_url)
        self._client = http_client_of(configured)
        self._keys = dict(keys)
        self._metrics = metrics
        self._timeout_s = configured.timeout_s
        self._places = asyncio.Semaphore((1 + QUEUED_PER_CONNECTION) * configured.max_connections)
        self._breakers = defaultdict[str, CircuitBreaker](CircuitBreaker)
        """By account."""
        self._failing: set[str] = set()
        self._incidents = IncidentLog(quiet_s=QUIET_S)

    async def close(self) -> None:
        await self._client.close()

    def update_keys(self, keys: Mapping[str, SecretText]) -> None:
        """Adds new and changed keys. Removed accounts keep theirs for requests in flight."""
        self._keys |= keys

    @property
    def is_failing(self) -> bool:
        """Whether the latest request of any account failed."""
        return bool(self._failing)

    async def estimate(self, account: str, canonical: bytes, query: str, *, deadline: float) -> Reply:
        """Upstream's reply to the JSON body `canonical`, sent with the account's key. Failures are replies too.

        deadline: on the event loop's clock.
        """
        if self._places.locked():
            return Failed(_TOO_MANY_REQUESTS, asked=False)
        async with self._places:  # does not wait
            return await self._estimate(account, canonical, query, deadline)

    async def _estimate(self, account: str, canonical: bytes, query: str, deadline: float) -> Reply:
        loop = asyncio.get_running_loop()
        breaker, started_at = self._breakers[account], loop.time()
        decision = breaker.admit(started_at, probe_s=self._timeout_s)
        if decision is Decision.BACK_OFF or decision is Decision.OPEN:
            return Failed(_refusal(decision, breaker.wait_s(started_at)), asked=False)
        if decision is Decision.PROBE:
            facts = (account, breaker.open_s(started_at), self._timeout_s)
            log.info("circuit breaker of the account %s half-opens after %.1f s: one probe, for %g s at most", *facts)
        probe_generation = breaker.probe_generation
        reply, reason = await self._post(account, canonical, query, min(deadline, started_at + self._timeout_s))
        if isinstance(reply, Failed) and not reply.asked:  # nothing was sent, so it says nothing about upstream
            return reply
        now = loop.time()
        self._metrics.record_upstream_request(account, _status_class(reply), now - started_at)
        self._log_incident(account, reason, now)
        if isinstance(reply, Failed) and reply.problem.code is Code.UPSTREAM_BUSY:
            breaker.back_off(now, reply.problem.retry_after_s or 0)
        if breaker.probe_generation == probe_generation:  # older requests say nothing about the state since the probe
            failed = isinstance(reply, Failed) and reply.problem.code in _OUTAGES
            if (transition := breaker.record(now, failed=failed)) is not None:
                self._log_transition(account, transition, reason)
        return reply

    async def _post(self, account: str, canonical: bytes, query: str, deadline: float) -> tuple[Reply, str | None]:
        """The reply, and if it is a failure, the reason for the log."""
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

    def _log_incident(self, account: str, reason: str | None, now: float) -> None:
        if reason is None:
            self._failing.discard(account)
            if self._incidents.closed(account, now):
                log.info("upstream answers again for the account %s", account)
        else:
            self._failing.add(account)
            if self._incidents.opened(account, reason, now):
                log.error("upstream fails for the account %s: %s", account, reason)

    def _log_transition(self, account: str, transition: Transition, reason: str | None) -> None:
        """Logs each transition: two that open the breaker are at least `OPEN_S` apart."""
        self._metrics.circuit_open.labels(account).set(transition.is_open)
        facts = (account, transition.seconds, transition.why)
        if transition.is_open:
            log.error("circuit breaker of the account %s opens for %.1f s: %s; the last error: %s", *facts, reason)
        else:
            log.info("circuit breaker of the account %s closes after %.1f s: %s", *facts)


def _reason_of(failed: Failed) -> str:
    """The reason for the log: our code, the status, and RenderNet's own code and message."""
    upstream = failed.problem.members.get("upstream", {})
    message = ": ".join(text for text in (upstream.get("code"), upstream.get("message")) if text)
    return f"{failed.problem.code} ({failed.upstream_status}{', ' * bool(message)}{message})"


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
            return "error"  # not JSON, or it has our key in it: not an answer, whatever its status
        case Failed(upstream_status=int(status)) | Rejected(status):
            return f"{status // 100}xx"
        case _:
            return "2xx"


def _refusal(decision: Decision, wait_s: float) -> Problem:
    if decision is Decision.BACK_OFF:
        detail = "RenderNet has asked for a pause in the requests for this account: try again later."
    else:
        detail = "RenderNet has been failing, so the gateway sends it no requests for a moment: try again later."
    return Problem(Code.UPSTREAM_BUSY, detail, retry_after_s=math.ceil(wait_s))
