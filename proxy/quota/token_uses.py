"""Records when each token was last used, to the hour, so that operators see when a rotation is finished.

* A request only adds its token's id to a set. A background task writes each token once an hour.
* If the store is out of reach, the next tick repeats the write. It records the time of the use, not of the write.
* A process that is killed loses the uses since its last tick. One that stops normally writes them.
"""

import asyncio
from collections.abc import Callable
from time import monotonic

from proxy.problems import StoreUnavailable
from proxy.quota.counters import USAGE_KEPT_DAYS, LedgerKeys
from proxy.store.client import Script, Store

TICK_S = 10.0
"""Time between two writes: limits how many uses a crash loses, and how late a use appears in the list."""

KEPT_S = USAGE_KEPT_DAYS * 86400
"""How long a last use is kept."""

HOUR_S = 3600

_TOKEN_USES_PUT = Script("proxy.quota", "token_uses_put")


class TokenUses:
    """Records the uses of an organisation's tokens, by token id. The id must not reveal the token.

    record: notes a use, in memory.
    """

    def __init__(self, store: Store, keys: LedgerKeys) -> None:
        self._store = store
        self._keys = keys
        self._used: set[str] = set()
        """Used since the last tick."""
        self._unwritten: dict[str, float] = {}
        """When the tokens were used that are not written yet, on the monotonic clock."""
        self._written: set[str] = set()
        """Written as used in the hour that ends at `_hour_ends_at`."""
        self._hour_ends_at = 0.0
        self.record: Callable[[str], None] = self._used.add

    async def run(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            await self.flush()

    async def flush(self) -> None:
        """Writes the uses of tokens that are not yet written for this hour. If that fails, the next call repeats it."""
        now = monotonic()
        if now >= self._hour_ends_at:
            self._written.clear()
        self._unwritten.update(dict.fromkeys(self._used - self._written, now))
        self._used.clear()
        if self._unwritten:
            await self._write(dict(self._unwritten), now)

    async def _write(self, uses: dict[str, float], now: float) -> None:
        ages_s = (int(now - used_at) for used_at in uses.values())
        try:
            now_s = await self._store.call(_TOKEN_USES_PUT, *map(self._keys.token, uses), args=(KEPT_S, *ages_s))
        except StoreUnavailable:
            return
        hour_began_at = now - now_s % HOUR_S
        self._hour_ends_at = hour_began_at + HOUR_S
        self._written.update(token for token, used_at in uses.items() if used_at >= hour_began_at)
        self._unwritten.clear()
