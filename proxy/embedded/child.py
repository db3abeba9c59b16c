"""Child processes: they end with their parent, and those that keep dying are restarted after growing delays."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from time import monotonic

_PR_SET_PDEATHSIG = 1

STABLE_S = 30.0
"""A child that lived this long did not die quickly: the delays start over."""

_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 10.0


def die_with_parent(parent_pid: int) -> Callable[[], None] | None:
    """A function for `Popen(preexec_fn=…)` that makes the child end when its parent ends, however that happens.

    * Linux only; None elsewhere.
    * `Popen` must be called by the main thread: the kernel sends the signal when the *thread* that forked ends. The
      signal is SIGKILL, which cannot be blocked or delayed.
    * Python warns about `preexec_fn` when there are other threads, because a lock that one of them holds stays locked
      in the child. `proxy.telemetry.log_writer` has such a thread, and this function takes none of its locks: it does
      not import, log or print. Python itself takes care of the locks for imports and logging during the fork.
    * Race: if the parent dies between fork and prctl, no signal comes. The child notices because its parent pid has
      changed.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here, because libraries must not be loaded between fork and exec

    def guard() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent_pid:
            os._exit(1)

    return guard


class RestartBackoff:
    """When the next start of a child is due. Quick deaths in a row are followed by 0, 0.5, 1, 2, 4, 8, 10, 10, … s."""

    def __init__(self) -> None:
        self._started_at = 0.0
        self._next_start_at = 0.0
        self._quick_deaths = 0

    def is_due(self) -> bool:
        return monotonic() >= self._next_start_at

    def record_start(self) -> None:
        """Records that a start is being tried."""
        self._started_at = monotonic()

    def record_death(self) -> float:
        """Records a death, or a start that failed. Returns the seconds until the next start is due."""
        now = monotonic()
        if now - self._started_at >= STABLE_S:
            self._quick_deaths = 0
        delay_s = restart_delay_s(self._quick_deaths)
        self._quick_deaths += 1
        self._next_start_at = now + delay_s
        return delay_s


def restart_delay_s(quick_deaths: int) -> float:
    if quick_deaths == 0:
        return 0.0
    doublings = min(quick_deaths - 1, 10)  # unbounded, the power would overflow a float after some hours
    return min(_FIRST_DELAY_S * 2.0**doublings, _MAX_DELAY_S)
