"""Updates the metric of upstream seconds saved, in a background task.

`Metrics` counts the answers that saved time; the task multiplies them by today's mean so far, from the ledger. Usage
reports do not use the metric: they multiply each day's answers by the final mean of that day.
"""

import asyncio
from collections import Counter

from proxy.problems import StoreUnavailable
from proxy.quota.ledger_reader import LedgerReader
from proxy.telemetry.metrics import Metrics

TICK_S = 5.0
"""Time between two reads of the mean, if there were such answers: limits how late the metric is."""


class SavedTime:
    """The background task of one process."""

    def __init__(self, ledger_reader: LedgerReader, metrics: Metrics) -> None:
        self._ledger_reader = ledger_reader
        self._metrics = metrics
        self._answers = Counter[str]()
        """By team, those whose time is not counted yet."""

    async def run(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            await self.flush()

    async def flush(self) -> None:
        """Counts the time of the answers so far. If the ledger is unavailable, the next call does.

        Without a mean, nothing is known to be saved.
        """
        self._answers.update(self._metrics.take_time_saving_answers())
        if not self._answers:
            return
        try:
            mean = await self._ledger_reader.current_mean()
        except StoreUnavailable:
            return
        if mean is not None:
            self._metrics.record_saved_time(self._answers, mean.us / mean.calls)
        self._answers.clear()
