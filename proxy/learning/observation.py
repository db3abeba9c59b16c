"""The effect of one upstream answer on the evidence, and the results by which inferred prices are counted."""

from dataclasses import dataclass
from enum import StrEnum

from proxy.cache.prices import Price
from proxy.learning.evidence import Contradiction


class Counted(StrEnum):
    """What became of an inferred price: it was answered; or, in observe mode, upstream's was the same or another."""

    ANSWERED = "answered"
    RIGHT = "right"
    WRONG = "wrong"


class Effect(StrEnum):
    """What an answer did to what was learned."""

    IGNORED = "ignored"
    """Nothing: it was asked before prices were dropped, the list moved, or its setting started over; or its data is too
    long to be kept."""
    NEW = "new"
    """It is the first of its setting."""
    AGREED = "agreed"
    OUTSIDE = "outside"
    """It does not agree with its setting, but its body is outside the range."""
    DOUBT = "doubt"
    """It does not agree with its setting. Until that is resolved, nothing is inferred in the scope or account."""
    LIST_MOVED = "list-moved"
    """It resolved a doubt: the price list changed. That counts as a changed price for repricing."""
    CONTRADICTED = "contradicted"
    """It resolved a doubt: a member that was left out decides prices."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What an answer did, in which scope and setting.

    old: the setting's price before, or if the list moved, before the doubt; None if it had none.
    contradiction: also present if a doubt of the scope turned out to have expired.
    """

    effect: Effect
    scope: str
    setting: str
    old: Price | None
    contradiction: Contradiction | None
