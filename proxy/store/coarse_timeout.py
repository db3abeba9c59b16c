"""One shared timer for short timeouts: a timer per call costs more than the calls.

The timer ticks at a fixed interval. A tick that finds a deadline passed marks it, and the next tick raises the timeout.
Without that delay, a reply that arrived while the event loop was blocked could lose against the timer.
"""

import asyncio
from collections.abc import Coroutine
from math import inf
from typing import Any

_LATE, _EXPIRED = -inf, inf
"""`_LATE`: the last tick found that the deadline had passed. `_EXPIRED`: the timeout was raised."""


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
