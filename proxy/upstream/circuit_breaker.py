"""A circuit breaker, and the pause that upstream has asked for.

Closed: everything is asked. When at least `MIN_ANSWERS` answers came within `WINDOW_S` and half of them were failures,
it opens for `OPEN_S`. Then it is half-open and lets one probe through: an answer closes it, a failure opens it again.
A 429's `Retry-After` is obeyed beside all that, until it is over.

One circuit an account and process. Times are seconds on one monotonic clock, passed in.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

WINDOW_S = 10.0
MIN_ANSWERS = 10
FAILURE_RATE = 0.5
OPEN_S = 5.0
MAX_ANSWERS = 1000
"""Of the window's answers so many are remembered."""

MAX_PAUSE_S = 3600.0


class Decision(Enum):
    """What `CircuitBreaker.admit` says."""

    ASK = auto()
    PROBE = auto()
    PAUSED = auto()
    OPEN = auto()


@dataclass(frozen=True, slots=True)
class Transition:
    """The circuit opens, for so many seconds, or closes, after so many. `why` is for the log."""

    is_open: bool
    seconds: float
    why: str


class CircuitBreaker:
    def __init__(self) -> None:
        self._answers: deque[tuple[float, bool]] = deque()
        self._failures = 0
        self._opened_at = 0.0
        self._open_until: float | None = None
        self._probe_until: float | None = None
        self._paused_until = 0.0
        self._era = 0

    @property
    def is_open(self) -> bool:
        """Also while a probe is under way."""
        return self._open_until is not None

    @property
    def probe_generation(self) -> int:
        """Counts the probes. What was asked in an earlier era says nothing of upstream as the newest probe found it."""
        return self._era

    def admit(self, now: float, *, probe_s: float) -> Decision:
        """Whether to ask now. Through an open circuit goes one probe, and for `probe_s` no other."""
        if now < self._paused_until:
            return Decision.PAUSED
        if self._open_until is None:
            return Decision.ASK
        if now < self._open_until or (self._probe_until is not None and now < self._probe_until):
            return Decision.OPEN
        self._probe_until = now + probe_s
        self._era += 1
        return Decision.PROBE

    def open_s(self, now: float) -> float:
        """Seconds since the circuit opened, failed probes included."""
        return now - self._opened_at

    def wait_s(self, now: float) -> float:
        """Seconds until asking may be let through again."""
        waits = (self._paused_until, self._open_until or 0.0, self._probe_until or 0.0)
        return max(0.0, max(waits) - now)

    def pause(self, now: float, seconds: float) -> None:
        """Nothing is asked for as long as upstream wants, an hour at the most."""
        self._paused_until = max(self._paused_until, now + min(seconds, MAX_PAUSE_S))

    def note(self, now: float, *, failed: bool) -> Transition | None:
        """Counts an answer, or its failing to come, to a question of this era, which may open or close the circuit.

        While the circuit is open only the probe's answer counts: the others were asked before it opened.
        """
        if self._open_until is None:
            return self._count(now, failed=failed)
        if self._probe_until is None:
            return None
        self._probe_until = None
        if failed:
            self._open_until = now + OPEN_S
            return Transition(is_open=True, seconds=OPEN_S, why="the probe failed")
        self._open_until = None
        return Transition(is_open=False, seconds=self.open_s(now), why="the probe was answered")

    def _count(self, now: float, *, failed: bool) -> Transition | None:
        self._answers.append((now, failed))
        self._failures += failed
        while len(self._answers) > MAX_ANSWERS or self._answers[0][0] < now - WINDOW_S:
            self._failures -= self._answers.popleft()[1]
        if len(self._answers) < MIN_ANSWERS or self._failures < FAILURE_RATE * len(self._answers):
            return None
        why = f"{self._failures} of {len(self._answers)} answers within {WINDOW_S:g} s were failures"
        self._answers.clear()
        self._failures = 0
        self._opened_at, self._open_until = now, now + OPEN_S
        return Transition(is_open=True, seconds=OPEN_S, why=why)
