"""File descriptors: every connection takes one, and a process may have only so many.

Running out of them is this gateway's own trouble: it says nothing about the upstream or the store whose connection
could not be made.
"""

import asyncio
import logging
import os
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from errno import EMFILE, ENFILE

from proxy.telemetry.incidents import IncidentLog
from proxy.telemetry.metrics import Metrics

LOOK_EVERY_S = 1.0
QUIET_S = 10.0
"""The trouble comes and goes with each connection, and is told no more often."""

log = logging.getLogger(__name__)


def raise_limit() -> int:
    """Lets this process and its children have as many descriptors as the system allows. Returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS says that there is no limit, and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def ran_out(error: BaseException) -> bool:
    """Whether `error` comes from there being no descriptor left, however many libraries it has passed.

    Resolving a name takes descriptors too, but its error does not say that they were missing: so another one is tried.
    """
    for origin in _origins(error):
        if isinstance(origin, socket.gaierror):
            return not is_one_left()
        if isinstance(origin, OSError) and origin.errno in (EMFILE, ENFILE):
            return True
    return False


def is_one_left() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _origins(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from or during, and what its groups hold."""
    waiting, seen = [error], set[int]()
    while waiting:
        origin = waiting.pop()
        if id(origin) in seen:
            continue
        seen.add(id(origin))
        yield origin
        waiting += [one for one in (origin.__cause__, origin.__context__) if one is not None]
        if isinstance(origin, BaseExceptionGroup):
            waiting += origin.exceptions


class DescriptorMonitor:
    """Logs that this process has run out of descriptors, and that it has some again; not once for each failure.

    Where a connection to upstream or a store fails for it, that is counted there. Clients' connections leave no trace:
    libuv accepts and closes them. So the monitor tries once a second whether there is a descriptor.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._known_failures = 0
        self._incidents = IncidentLog(quiet_s=QUIET_S)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.look(asyncio.get_running_loop().time())

    def look(self, now: float) -> None:
        """Whether something has failed since the last look, or would fail now."""
        if not is_one_left():
            self._metrics.record_descriptors_exhausted()
        failures = self._metrics.descriptor_failures - self._known_failures
        self._known_failures += failures
        if failures and self._incidents.begins("descriptors", "", now):
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            log.error(
                "out of file descriptors (this process may have %d): connections fail, or are closed at once. "
                "Raise the limit: ulimit -n, or LimitNOFILE= in the systemd unit",
                limit,
            )
        elif not failures and self._incidents.ends("descriptors", now):
            log.info("there are file descriptors again")
