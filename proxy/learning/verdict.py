"""Decides whether a body's price is inferred, from the evidence. Pure.

A price is inferred if its setting has enough bodies that agree, its scope has enough tests, the body is inside the
range, and nothing is in doubt.
"""

from dataclasses import dataclass
from enum import StrEnum

from proxy.cache.prices import StoredPrice
from proxy.learning.evidence import Evidence, Scope, Setting
from proxy.learning.leaves import LEFT_OUT, Reduced, class_of
from proxy.learning.limits import ENOUGH_BODIES, REACH
from proxy.learning.ticket import Ticket


class Reason(StrEnum):
    """Why a body's price was not inferred."""

    NOT_LEARNABLE = "not-learnable"
    """A member name has a dot or only digits, or there are too many members: see `proxy.learning.leaves`."""
    UNAVAILABLE = "store-unavailable"
    NEW_SCOPE = "new-scope"
    IN_DOUBT = "in-doubt"
    TOO_FEW_TESTS = "too-few-tests"
    NEW_SETTING = "new-setting"
    """Fewer than `ENOUGH_BODIES` of its setting were asked."""
    OUTSIDE = "outside-range"
    AUDIT_OWED = "audit-owed"
    """An audit of its setting was due and could not be asked."""
    NEVER_LEARN = "never-learn-changed"
    """The settings name a leaf that was left out; the next observation begins the tests again."""
    EXACT_TEAM = "exact-team"
    """The team has `infer = false`."""


@dataclass(frozen=True, slots=True)
class Inferred:
    """The price of the body's setting. It may be stale, as an exact price may: see `stored.ttl_s`.

    setting: its id. ticket: for `Learner.observe`, if the body is asked nevertheless.
    """

    stored: StoredPrice
    setting: str
    scope: Scope
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class NotInferred:
    """scope: None if it is unknown. ticket: for `Learner.observe`; None if the answer cannot be learned from.

    outside: the path of a leaf that is outside its range, if that is the reason.
    """

    reason: Reason
    scope: Scope | None = None
    ticket: Ticket | None = None
    outside: str | None = None


def decide(
    ticket: Ticket, evidence: Evidence, known: Setting | None, *, setting: str, ttl_s: float
) -> Inferred | NotInferred:
    """What the evidence says about the body of `ticket`, at the ticket's time.

    known: what is known about its setting, whose id is `setting`. ttl_s: how long prices are fresh.
    """
    scope = evidence.scope
    if scope is None:
        return NotInferred(Reason.NEW_SCOPE, ticket=ticket)
    reason = _lacks(ticket, evidence, scope, known)
    if reason is not None or known is None:
        return NotInferred(reason or Reason.NEW_SETTING, scope, ticket)
    outside = _outside(ticket.reduced, evidence, known)
    if outside is not None:
        return NotInferred(Reason.OUTSIDE, scope, ticket, outside)
    age_s = max(0, ticket.asked_at_ms - known.at_ms) / 1000
    return Inferred(StoredPrice(known.price, age_s, ttl_s - age_s, b""), setting, scope, ticket)


def _lacks(ticket: Ticket, evidence: Evidence, scope: Scope, known: Setting | None) -> Reason | None:
    if evidence.in_doubt:
        return Reason.IN_DOUBT
    if _counts_now(ticket.reduced, evidence.left):
        return Reason.NEVER_LEARN
    if scope.tests < scope.needed:
        return Reason.TOO_FEW_TESTS
    return Reason.NEW_SETTING if known is None or known.bodies < ENOUGH_BODIES else None


def _counts_now(reduced: Reduced, left: str) -> bool:
    """Whether a leaf that was left out may no longer be: `cache.never_learn` was changed."""
    return any(never and mark == LEFT_OUT for never, mark in zip(reduced.never_left_out, left, strict=True))


def _outside(reduced: Reduced, evidence: Evidence, setting: Setting) -> str | None:
    """The path of a left-out leaf that is outside its range, or too far from what its own setting had."""
    leaves = zip(reduced.paths, reduced.values, evidence.left, strict=True)
    for number, (path, value, mark) in enumerate(leaves, start=1):
        if mark != LEFT_OUT:
            continue
        leaf = class_of(value)
        for name, measure in ((f"{number}n", leaf.number), (f"{number}s", leaf.length)):
            if measure is None:
                continue
            low, high = map(float, evidence.ranges.get(name, ("inf", "-inf")))
            largest = max(abs(float(own)) for own in setting.reach.get(name, ("0",)))
            if not low <= measure <= high or abs(measure) > REACH * largest:
                return path
    return None
