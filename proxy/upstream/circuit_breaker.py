"""Circuit breaker for upstream requests, and the back-off that upstream asks for.

* Closed: all requests are admitted. It opens for `OPEN_S` when at least `MIN_ANSWERS` answers arrived within `WINDOW_S`
  and half of them were failures.
* Half-open: after `OPEN_S` one probe is admitted. An answer closes the breaker, a failure opens it again.
* Back-off: the `Retry-After` of a 429 is obeyed in each state.

There is one breaker per account and process. Times are seconds on one monotonic clock, passed in.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

WINDOW_S = 10.0
MIN_ANSWERS = 10
"""Below this number a failure rate says little: two failures of three requests can be chance."""

FAILURE_RATE = 0.5
OPEN_S = 5.0
"""Half the window: long enough to relieve upstream, short enough to notice a recovery."""

MAX_ANSWERS = 1000
"""Limits the answers of a window that are remembered, and with them memory."""

MAX_BACK_OFF_S = 3600.0
"""Limits what a `Retry-After` can ask for."""


class Decision(Enum):
    """The result of `CircuitBreaker.admit`. ADMIT and PROBE admit the request, BACK_OFF and OPEN do not."""

    ADMIT = auto()
    PROBE = auto()
    BACK_OFF = auto()
    OPEN = auto()


@dataclass(frozen=True, slots=True)
class Transition:
    """The breaker opens for `seconds`, or closes after having been open for `seconds`. `why` is for the log."""

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
        self._back_off_until = 0.0
        self.probe_generation = 0
        """Number of probes so far. An answer to a request of an earlier generation must not be recorded."""

    @property
    def is_open(self) -> bool:
        """Whether the breaker is open or half-open."""
        return self._open_until is not None

    def admit(self, now: float, *, probe_s: float) -> Decision:
        """Whether to send a request now. Half-open, it admits one probe, and no other for `probe_s`."""
        if now < self._back_off_until:
            return Decision.BACK_OFF
        if self._open_until is None:
            return Decision.ADMIT
        if now < self._open_until or (self._probe_until is not None and now < self._probe_until):
            return Decision.OPEN
        self._probe_until = now + probe_s
        self.probe_generation += 1
        return Decision.PROBE

    def open_s(self, now: float) -> float:
        """Seconds since the breaker opened, including failed probes."""
        return now - self._opened_at

    def wait_s(self, now: float) -> float:
        """Seconds until a request may be admitted again."""
        waits = (self._back_off_until, self._open_until or 0.0, self._probe_until or 0.0)
        return max(0.0, max(waits) - now)

    def back_off(self, now: float, seconds: float) -> None:
        """Admits nothing for `seconds`, at most `MAX_BACK_OFF_S`."""
        self._back_off_until = max(self._back_off_until, now + min(seconds, MAX_BACK_OFF_S))

    def record(self, now: float, *, failed: bool) -> Transition | None:
        """Records the result of a request of this probe generation, which may open or close the breaker.

        While the breaker is open only the probe's result counts: the other requests were sent before it opened.
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
