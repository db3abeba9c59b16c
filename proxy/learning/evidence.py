"""What was learned in one scope, as it is shown to people and decided on."""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    OBSERVING = "observing"
    ANSWERING = "answering"
    IN_DOUBT = "in doubt"
    CONTRADICTED = "contradicted"
    """Observing again, after a contradiction."""


@dataclass(frozen=True, slots=True)
class Contradiction:
    """The last contradiction of a scope. Times are Unix time in ms, on the store's clock."""

    since_ms: int
    until_ms: int
    suspects: int


@dataclass(frozen=True, slots=True)
class Scope:
    """One scope.

    items: for each item of the body the mode that wins and its name, `model Flux`.
    counting, left_out: paths of the leaves whose value counts, and of those that only count with their class.
    tests: without a contradiction; needed: how many it takes to infer.
    asked, answered: bodies that upstream was asked, and prices that were inferred and answered.
    right, wrong: in observe mode, prices that would have been answered.
    """

    id: str
    items: tuple[str, ...]
    counting: tuple[str, ...]
    left_out: tuple[str, ...]
    state: State
    tests: int
    needed: int
    settings: int
    asked: int
    answered: int
    right: int
    wrong: int
    audits: int
    list_moves: int
    contradictions: int
    last_contradiction: Contradiction | None
    team: str
    used_at_ms: int

    @property
    def bound(self) -> float:
        """Fewer than this share of bodies cost otherwise, at 95 % confidence; 1.0 without a test."""
        ...
