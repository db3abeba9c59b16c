"""One flight a key: callers who ask the same at the same time share one answer.

The work belongs to nobody who waits for it: a caller that goes away, the first one included, leaves it flying for
the others.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Flights(Generic[Answer]):
    def __init__(self) -> None:
        self._flying: dict[str, asyncio.Task[Answer]] = {}

    async def join(self, key: str, work: Callable[[], Awaitable[Answer]]) -> tuple[Answer, bool]:
        """The answer of the flight for `key`, and whether it was under way already; else `work` makes it."""
        task = self._flying.get(key)
        joined = task is not None
        if task is None:
            task = self.start(key, work)
        return await asyncio.shield(task), joined

    def start(self, key: str, work: Callable[[], Awaitable[Answer]]) -> asyncio.Task[Answer]:
        """Sets off a flight that nobody may be waiting for. There must be none for `key`."""
        task = asyncio.ensure_future(work())
        self._flying[key] = task
        task.add_done_callback(lambda _: self._flying.pop(key))
        return task

    def is_flying(self, key: str) -> bool:
        return key in self._flying

    def __len__(self) -> int:
        return len(self._flying)

    async def land(self, timeout_s: float) -> None:
        """Waits for what is flying, `timeout_s` at the most, and ends what is left."""
        if not self._flying:
            return
        _, late = await asyncio.wait(list(self._flying.values()), timeout=timeout_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
