"""Writes price changes to the ledger, in the background: the answer that revealed one does not wait for it.

While the ledger is unavailable, changes wait in memory, and are written when it is back. A process that is killed loses
those that wait.
"""

import asyncio
import logging
import secrets
from collections import deque
from time import time
from zoneinfo import ZoneInfo

from proxy.problems import StoreUnavailable
from proxy.quota.counters import LedgerKeys, day_expires_ms
from proxy.quota.credits import micro_of, text_of
from proxy.quota.price_changes import MAX_PER_DAY, FoundBy, PriceChange
from proxy.quota.windows import day_of
from proxy.store.client import Script, Store
from proxy.telemetry.logs import event

MAX_WAITING = 1000
"""Changes in memory. The log has those beyond."""

RETRY_S = 1.0

KEY_CHARACTERS = 16
"""Of a question's key: as many as in log lines."""

_PRICE_CHANGE_PUT = Script("proxy.quota", "price_change_put", repeatable=True)

log = logging.getLogger(__name__)


class PriceChangeLog:
    """The price changes that this process finds. `close` must be called."""

    def __init__(self, store: Store, keys: LedgerKeys, zone: ZoneInfo) -> None:
        self._store = store
        self._keys = keys
        self._zone = zone
        self._waiting: deque[tuple[str, PriceChange]] = deque()
        """With their ids."""
        self._writing: asyncio.Task[None] | None = None

    def record(self, found_by: FoundBy, *, account: str, model: str, key: str, old: bytes, new: bytes) -> None:
        """Records that the price of a question has changed. Equal amounts are no change.

        key: the question's. old, new: JSON numbers of credits, as RenderNet wrote them.
        """
        old_micro, new_micro = micro_of(old), micro_of(new)
        if old_micro == new_micro:
            return
        amounts = text_of(old_micro), text_of(new_micro)
        change = PriceChange(int(time()), account, model, key[:KEY_CHARACTERS], *amounts, found_by)
        if len(self._waiting) >= MAX_WAITING:
            facts = {"account": account, "model": model, "key": key, "old": amounts[0], "new": amounts[1]}
            event(log, logging.WARNING, "a price change is not recorded: the ledger is out of reach", facts)
            return
        self._waiting.append((secrets.token_hex(8), change))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write())

    async def close(self, timeout_s: float) -> None:
        """Waits at most `timeout_s` until everything is written."""
        if self._writing is not None:
            await asyncio.wait({self._writing}, timeout=timeout_s)
            self._writing.cancel()
        if self._waiting:
            log.error("%d price changes are not recorded: the ledger stayed out of reach", len(self._waiting))

    async def _write(self) -> None:
        while self._waiting:
            change_id, change = self._waiting[0]
            day = day_of(change.at_s, self._zone)
            args = (change_id, change.encoded(), MAX_PER_DAY, day_expires_ms(day, self._zone))
            try:
                await self._store.call(_PRICE_CHANGE_PUT, self._keys.price_changes(day), args=args)
            except StoreUnavailable:
                await asyncio.sleep(RETRY_S)
            else:
                self._waiting.popleft()
