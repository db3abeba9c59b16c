"""One shared timer for short timeouts: a timer per call costs more than the calls.

The timer ticks. A timeout that has passed takes effect one tick later: if the event loop was blocked, its timers and
the replies that arrived meanwhile are due in the same turn, and a reply that has arrived must count.
"""

import asyncio
from collections.abc import Coroutine
from math import inf
from typing import Any

_LATE, _EXPIRED = -inf, inf
"""Stand for a deadline that passed before the last tick, and for one whose timeout has been raised."""


class CoarseTimeout:
    """A timeout of `seconds`, and up to two ticks more."""

    def __init__(self, seconds: float, *, tick_s: float) -> None:
        self._seconds = seconds
        self._tick_s = tick_s
        self._deadlines: dict[asyncio.Timeout, float] = {}
        self._is_ticking = False

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Awaits `work`. Raises `TimeoutError` if it takes too long."""
        async with asyncio.timeout(None) as limit:
            loop = asyncio.get_running_loop()
            self._deadlines[limit] = loop.time() + self._seconds
            if not self._is_ticking:
                self._is_ticking = True
                loop.call_later(self._tick_s, self._tick, loop)
            try:
                await work
            finally:
                del self._deadlines[limit]

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for limit, deadline in self._deadlines.items():
            if deadline == _LATE:
                limit.reschedule(now)
                self._deadlines[limit] = _EXPIRED
            elif now >= deadline:
                self._deadlines[limit] = _LATE
        self._is_ticking = bool(self._deadlines)
        if self._is_ticking:
            loop.call_later(self._tick_s, self._tick, loop)
