"""What is known about a body's price: `Inferred`, or `NotInferred` with the reason."""

from dataclasses import dataclass
from enum import StrEnum

from proxy.cache.prices import StoredPrice
from proxy.learning.evidence import Scope
from proxy.learning.ticket import Ticket


class Reason(StrEnum):
    """Why a body's price was not inferred."""

    NOT_LEARNABLE = "not-learnable"
    """The body has a dot or only digits in a member name, or too many members."""
    UNAVAILABLE = "store-unavailable"
    NEW_SCOPE = "new-scope"
    IN_DOUBT = "in-doubt"
    TOO_FEW_TESTS = "too-few-tests"
    NEW_SETTING = "new-setting"
    """Fewer than 3 bodies of its setting were asked."""
    OUTSIDE = "outside-range"
    AUDIT_OWED = "audit-owed"
    """An audit of its setting was due and could not be asked."""


@dataclass(frozen=True, slots=True)
class Inferred:
    """The price of the body's setting. It may be stale: `stored.ttl_s` says so, as for an exact price.

    setting: the setting's id, for the log.
    ticket: for `Learner.observe`, if the body is asked nevertheless (audit, refresh, observe mode).
    """

    stored: StoredPrice
    setting: str
    scope: Scope
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class NotInferred:
    """scope: None if it is new or unknown. ticket: None if the answer cannot be learned from.

    outside: the path of the member that is outside its range, if that is the reason.
    """

    reason: Reason
    scope: Scope | None = None
    ticket: Ticket | None = None
    outside: str | None = None
