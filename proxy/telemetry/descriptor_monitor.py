"""Logs when this process has run out of file descriptors, and when it has some again."""

import asyncio
import logging
import resource

from proxy.telemetry.descriptors import is_one_left
from proxy.telemetry.incidents import IncidentLog
from proxy.telemetry.metrics import Metrics

LOOK_EVERY_S = 1.0
QUIET_S = 10.0
"""The trouble comes and goes with each connection, and is told no more often."""

log = logging.getLogger(__name__)


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
