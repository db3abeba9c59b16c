"""Shows what was learned: as JSON for `GET /v1/learned` and `explain`, and in words. Pure."""

from collections.abc import Iterable, Mapping
from datetime import tzinfo
from math import ceil, floor, log10
from typing import Any

from proxy.learning.evidence import CONFIDENCE, Contradiction, Scope
from proxy.learning.limits import ENOUGH_BODIES
from proxy.learning.verdict import Inferred, NotInferred, Reason
from proxy.quota.windows import rfc3339

_WHY = {
    Reason.NOT_LEARNABLE: "A member name has a dot or only digits, or the body has too many members, so it is not "
    "learned from.",
    Reason.UNAVAILABLE: "The price book's store is unavailable.",
    Reason.NEW_SCOPE: "No body with these members, models and number of items was asked yet, or only in the last two "
    "seconds.",
    Reason.IN_DOUBT: "RenderNet's answer to another body did not agree: nothing is inferred until that is resolved.",
    Reason.TOO_FEW_TESTS: "There are too few tests without a contradiction.",
    Reason.NEW_SETTING: f"Fewer than {ENOUGH_BODIES} bodies were asked that are equal in all members that count.",
    Reason.OUTSIDE: "A member that is left out has a value outside the range that was tested.",
    Reason.NEVER_LEARN: "cache.never_learn has changed: the next asked body begins the tests again.",
    Reason.EXACT_TEAM: "The team has infer = false in the settings, so it gets only exact prices.",
    Reason.AUDIT_OWED: "An audit was due and could not be asked: the next body of this setting is asked.",
}


def percent_below(share: float) -> str:
    """A share as a percentage, rounded up: to whole percents from 1, to one digit below."""
    percent = 100 * share
    if percent >= 1:
        return str(ceil(percent))
    decimals = -floor(log10(percent))
    return f"{ceil(percent * 10**decimals) / 10**decimals:.{decimals}f}"


def bound_in_words(scope: Scope) -> str:
    """What the tests say about bodies that were not tested."""
    if scope.tests == 0:
        return "no test yet, so nothing is known"
    tries = "the only try did not cost" if scope.tests == 1 else f"of {scope.tests} tries none cost"
    confidence = round(100 * CONFIDENCE)
    return f"{tries} otherwise: with {confidence} % confidence fewer than {percent_below(scope.bound)} % of bodies do"


def scope_document(scope: Scope, zone: tzinfo) -> dict[str, Any]:
    """A scope for `/v1/learned`. It has neither keys nor amounts."""
    asked, counted = scope.asked, scope.right + scope.wrong
    return {
        "scope": scope.id,
        "items": scope.items,
        **_evidence_members(scope),
        "settings": scope.settings,
        "asked": asked,
        "answered": scope.answered,
        "answered_percent": _percent(scope.answered, asked + scope.answered),
        "would_have_answered": counted,
        "would_have_answered_percent": _percent(counted, asked),
        "would_have_been_wrong": scope.wrong,
        "audits": scope.audits,
        "list_moves": scope.list_moves,
        "contradictions": scope.contradictions,
        "last_contradiction": contradiction_document(scope.last_contradiction, zone),
        "team": scope.team,
        "last_asked": rfc3339(scope.used_at_ms // 1000, zone),
    }


def contradiction_document(contradiction: Contradiction | None, zone: tzinfo) -> dict[str, Any] | None:
    if contradiction is None:
        return None
    since, until = (rfc3339(at_ms // 1000, zone) for at_ms in (contradiction.since_ms, contradiction.until_ms))
    return {"since": since, "until": until, "suspect_answers": contradiction.suspects}


def accounts_document(learn: str, scopes: Mapping[str, Iterable[Scope]], zone: tzinfo) -> dict[str, Any]:
    """What was learned, by account."""
    accounts = [
        {"account": account, "scopes": [scope_document(scope, zone) for scope in found]}
        for account, found in scopes.items()
    ]
    return {"learn": learn, "timezone": str(zone), "accounts": accounts}


def verdict_document(verdict: Inferred | NotInferred) -> dict[str, Any]:
    """What is known about a body, for `explain`. A team sees it, so it has nothing of other teams' requests."""
    scope = verdict.scope
    document: dict[str, Any] = {"inferable": isinstance(verdict, Inferred)}
    if isinstance(verdict, Inferred):
        document["setting"] = verdict.setting
    else:
        document |= {"reason": verdict.reason, "detail": _detail(verdict)}
    if scope is not None:
        document |= {"scope": scope.id, **_evidence_members(scope)}
    return document


def _evidence_members(scope: Scope) -> dict[str, Any]:
    return {
        "state": scope.state,
        "counting": scope.counting,
        "left_out": scope.left_out,
        "tests": scope.tests,
        "tests_needed": scope.needed,
        "bound": round(scope.bound, 6),
        "bound_in_words": bound_in_words(scope),
    }


def _detail(verdict: NotInferred) -> str:
    match verdict:
        case NotInferred(Reason.OUTSIDE, outside=str(path)):
            return f"The value of {path} is outside the range that was tested."
        case NotInferred(Reason.TOO_FEW_TESTS, scope=Scope(tests=tests, needed=needed)):
            return f"There are {tests} tests without a contradiction, and it takes {needed}."
        case _:
            return _WHY[verdict.reason]


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 1) if whole else 0.0
