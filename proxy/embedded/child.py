"""No process of ours outlives the one that started it, however that one ends."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> Callable[[], None] | None:
    """What a child does between fork and exec so that it cannot outlive its parent, for `Popen(preexec_fn=…)`.

    Linux only. Called by the main thread: the kernel sends the signal when the *thread* that forked ends. The signal
    is SIGKILL because it cannot be delayed.

    Python warns of `preexec_fn` beside other threads because a lock that one of them holds stays locked in the child.
    `proxy.telemetry.log_writer` has such a thread, and this function needs none of its locks: it imports, logs and
    prints nothing.
    Python's own locks are its own care: it holds those of imports and logging during the fork, and renews the rest.

    The race: fork; the parent dies; prctl. No signal will come any more, but the parent's pid has changed.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec there is no loading of libraries

    def guard() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent_pid:
            os._exit(1)

    return guard
