"""Renders results as HTTP responses, and keeps the per-request context for headers, metrics and the log line.

Header fields are rendered as complete lines, `name: value`, which `Cycle.reply` writes as they are. The cycle adds
`Content-Length`, and `Connection: close` where needed.
"""

import logging
import secrets
from math import floor
from time import perf_counter
from typing import Any

import orjson
from starlette.requests import Request
from starlette.types import Scope

from proxy.gateway.request import Answer, Document, Explanation, Learned, Purged, Result, Trace
from proxy.http.connection import SCOPE_HEADERS
from proxy.http.framing import Headers
from proxy.http.headers import Lines
from proxy.http.paths import shown_path, without_tokens
from proxy.learning.report import verdict_document
from proxy.problems import NO_NAME, Outcome, Problem
from proxy.quota.ledger import Admitted, Denied
from proxy.telemetry.logs import event
from proxy.telemetry.metrics import Metrics

_JSON_TYPE = b"content-type: application/json"
_NO_STORE = b"cache-control: no-store"

LOGGED_KEY_CHARACTERS = 16
"""Of a cache key's 64 in a log line: enough to compare keys, and to find one in the store."""

log = logging.getLogger(__name__)


class RequestContext(Trace):
    """The trace of a request, with what its response headers and its log line need."""

    close = False
    """Whether to close the connection after the response."""

    def __init__(self, operation: str, request_id: str, scope: Scope) -> None:
        self.operation = operation
        self.request_id = request_id
        self.started = perf_counter()
        self._scope = scope

    def end(self, metrics: Metrics, outcome: Outcome, status: int, result: Result | None) -> None:
        """Counts the request and writes its log line. `result` is None if the client is gone.

        The line has nothing of the body but the model's name, and no secret.
        """
        duration_s = perf_counter() - self.started
        metrics.record_request(self.team, self.operation, outcome, duration_s)
        if not log.isEnabledFor(logging.INFO):
            return
        client = self._scope["client"]
        facts = {
            "request_id": self.request_id,
            "client": client[0] if client else NO_NAME,
            "team": self.team,
            "operation": self.operation,
            "path": shown_path(self._scope["raw_path"]),
            "outcome": outcome.value,
            "status": status,
            "ms": _ms(duration_s),
        }
        if self.upstream_s is not None:
            facts["upstream_ms"] = _ms(self.upstream_s)
        if self.token_label:
            facts["token"] = self.token_label
        if self.question is not None:
            facts["key"] = self.question.key[:LOGGED_KEY_CHARACTERS]
            facts["model"] = self.question.model
        if self.setting is not None:
            facts["setting"] = self.setting
        if isinstance(result, Problem):
            facts |= _refusal_facts(result)
        event(log, logging.INFO, "request", facts)


def _refusal_facts(problem: Problem) -> dict[str, str]:
    facts: dict[str, str] = {"code": problem.code.value}
    if "violated-policies" in problem.members:
        facts["quota"] = ", ".join(problem.members["violated-policies"])
    return {**facts, "reason": without_tokens(problem.detail)}


def render(result: Result, context: RequestContext) -> tuple[int, Lines, bytes]:
    """Status, header lines and body of a response. The lines are without `Content-Length` and `Connection`."""
    match result:
        case Answer(status=status):
            lines, body = _answer_lines(result), result.body
        case Problem(status=status):
            lines, body = [*result.lines], result.document(context.request_id)
        case Explanation():
            status, lines, body = 200, [_JSON_TYPE, _NO_STORE], _explanation_document(result)
        case Purged():
            status, lines, body = 200, [_JSON_TYPE, _NO_STORE], _purged_document(result)
        case Document():
            lines = [b"content-type: " + result.media_type.encode(), b"vary: accept", _NO_STORE]
            status, body = 200, result.body
    return status, lines + common_lines(context), body


def common_lines(context: RequestContext) -> Lines:
    """The header lines that do not depend on the kind of result."""
    lines = [b"x-request-id: " + context.request_id.encode()]
    if context.cache_status is not None:
        lines.append(b"cache-status: estimate-proxy; " + context.cache_status.encode())
    if context.quota_state is not None:
        lines += context.quota_state.header_lines
    if context.warnings:
        names = ", ".join(f'"{quota.policy}"' for quota in context.warnings)
        lines.append(b"estimate-proxy-warning: " + names.encode())
    if timing := _timings(context):
        lines.append(b"server-timing: " + b", ".join(timing))
    return lines


def message_headers(lines: Lines, context: RequestContext) -> Headers:
    """Header lines as name and value pairs for an ASGI message, with `Connection: close` if the context says so."""
    pairs = (line.split(b": ", 1) for line in ([*lines, b"connection: close"] if context.close else lines))
    return [(name, value) for name, value in pairs]


def request_id_of(request: Request) -> str:
    """The client's request id, or a new one."""
    client_id: str | None = request.scope[SCOPE_HEADERS].request_id
    return client_id or secrets.token_hex(16)


def _answer_lines(answer: Answer) -> Lines:
    lines = [_JSON_TYPE]
    if answer.status >= 400:  # noqa: PLR2004 -- upstream's own errors are errors too
        lines.append(_NO_STORE)
    if answer.age_s is not None:
        lines.append(b"age: %d" % answer.age_s)
    if answer.balance_age_s is not None:
        lines.append(b"estimate-proxy-balance-age: %d" % answer.balance_age_s)
    return lines


def _explanation_document(explanation: Explanation) -> bytes:
    """The JSON of an explanation. It shows the price only if an estimate would be admitted."""
    request, stored, admission = explanation.request, explanation.stored, explanation.admission
    is_admitted = isinstance(admission, Admitted)
    has_price_book = explanation.outcome is not Outcome.BYPASS
    document: dict[str, object] = {
        "canonical_body": request.canonical.decode(),
        "key": request.key,
        "account": request.account,
        "query": request.query,
        "ignored_members": explanation.ignored,
        "stored": stored is not None if has_price_book else None,
        "admitted": is_admitted if admission is not None else None,
    }
    if stored is not None:
        document |= {"age_s": int(stored.age_s), "ttl_s": floor(stored.ttl_s)}
        if is_admitted:
            document["estimated"] = orjson.Fragment(stored.price.estimated)
    if explanation.learned is not None:
        document["learned"] = _learned_document(explanation.learned, is_admitted=is_admitted)
    if isinstance(admission, Denied):
        document["refusal"] = {"code": admission.problem.code, "detail": admission.problem.detail}
    if not has_price_book or admission is None:
        available = {"price-book": has_price_book, "ledger": admission is not None}
        document["degraded"] = [role for role, is_available in available.items() if not is_available]
    return orjson.dumps(document)


def _learned_document(learned: Learned, *, is_admitted: bool) -> dict[str, Any]:
    document = {"learn": learned.learn, **verdict_document(learned.verdict)}
    if learned.inferred is not None and is_admitted:
        document["estimated"] = orjson.Fragment(learned.inferred.price.estimated)
    return document


def _purged_document(purged: Purged) -> bytes:
    if purged.key is None:
        return orjson.dumps({"account": purged.account, "purged": "all"})
    return orjson.dumps(
        {"account": purged.account, "purged": "question", "key": purged.key, "was_stored": purged.found}
    )


def _timings(trace: Trace) -> list[bytes]:
    timings = []
    if trace.cache_status is not None:
        timings.append(b"cache;desc=hit" if trace.cache_status.startswith("hit") else b"cache;desc=miss")
    if trace.store_s is not None:
        timings.append(b"store;dur=%.1f" % (1000 * trace.store_s))
    if trace.upstream_s is not None:
        timings.append(b"upstream;dur=%.1f" % (1000 * trace.upstream_s))
    return timings


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
