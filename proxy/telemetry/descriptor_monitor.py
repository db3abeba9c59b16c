"""Logs when this process has run out of file descriptors, and when it has some again."""

import asyncio
import logging
import resource

from proxy.telemetry.descriptors import is_one_left
from proxy.telemetry.incidents import IncidentLog
from proxy.telemetry.metrics import Metrics

CHECK_EVERY_S = 1.0

QUIET_S = 10.0
"""Minimum time between two incidents in the log: the shortage can come and go with each connection."""

log = logging.getLogger(__name__)


class DescriptorMonitor:
    """Logs the shortage of descriptors and its end, instead of each failure.

    Failed connections to upstream and the stores are counted where they fail. Failed connections of clients are not
    visible: libuv accepts and closes them. So the monitor tries once a second to open a descriptor.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._counted_failures = 0
        self._incidents = IncidentLog(quiet_s=QUIET_S)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            self.check(asyncio.get_running_loop().time())

    def check(self, now: float) -> None:
        """Logs if a connection has failed since the last check, or would fail now."""
        if not is_one_left():
            self._metrics.record_descriptors_exhausted()
        failures = self._metrics.descriptor_failures - self._counted_failures
        self._counted_failures += failures
        if failures and self._incidents.opened("descriptors", "", now):
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            log.error(
                "out of file descriptors (this process may have %d): connections fail or are closed at once. "
                "Raise the limit: ulimit -n, or LimitNOFILE= in the systemd unit",
                limit,
            )
        elif not failures and self._incidents.closed("descriptors", now):
            log.info("there are file descriptors again")
