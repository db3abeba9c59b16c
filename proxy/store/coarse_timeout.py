"""A limit on how long quick things take: one timer for all of them, where one for each would take longer than they.

An event loop that stood still is late itself: its timers and the replies that came meanwhile are due in the same turn,
and a reply that is there already must count. So what is late has one more tick.
"""

import asyncio
from collections.abc import Coroutine
from math import inf
from typing import Any

_LATE, _ENDED = -inf, inf
"""Instead of when the time of something is over."""


class CoarseTimeout:
    """`seconds`, and up to two ticks more."""

    def __init__(self, seconds: float, *, tick_s: float) -> None:
        self._seconds = seconds
        self._tick_s = tick_s
        self._ends: dict[asyncio.Timeout, float] = {}
        """Of what is under way, when its time is over."""
        self._is_ticking = False

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Does `work`. Raises `TimeoutError` if it takes longer."""
        async with asyncio.timeout(None) as limit:
            loop = asyncio.get_running_loop()
            self._ends[limit] = loop.time() + self._seconds
            if not self._is_ticking:
                self._is_ticking = True
                loop.call_later(self._tick_s, self._tick, loop)
            try:
                await work
            finally:
                del self._ends[limit]

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for limit, ends in self._ends.items():
            if ends == _LATE:
                limit.reschedule(now)
                self._ends[limit] = _ENDED
            elif now >= ends:
                self._ends[limit] = _LATE
        self._is_ticking = bool(self._ends)
        if self._is_ticking:
            loop.call_later(self._tick_s, self._tick, loop)
