"""Single-flight: callers who ask the same at the same time share one answer.

The work belongs to nobody who waits for it: a caller that goes away, the first one included, leaves it flying for
the others.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

Answer = TypeVar("Answer")


class SingleFlight(Generic[Answer]):
    def __init__(self) -> None:
        self._flying: dict[str, asyncio.Task[Answer]] = {}

    async def join(self, key: str, work: Callable[[], Coroutine[Any, Any, Answer]]) -> tuple[Answer, bool]:
        """The answer of the flight for `key`, and whether it was under way already; else `work` makes it."""
        task = self._flying.get(key)
        joined = task is not None
        if task is None:
            task = self.start(key, work)
        return await asyncio.shield(task), joined

    def start(self, key: str, work: Callable[[], Coroutine[Any, Any, Answer]]) -> asyncio.Task[Answer]:
        """Sets off a flight that nobody may be waiting for. There must be none for `key`."""
        task = asyncio.get_running_loop().create_task(work())
        self._flying[key] = task
        task.add_done_callback(lambda _: self._flying.pop(key))
        return task

    def in_flight(self, key: str) -> bool:
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


class SameTurn(Generic[Answer]):
    """Shares work among those who ask for it in the same turn of the event loop, before any of it is done.

    Calls of one turn are sent together, so each caller has the answer that a call of its own would have brought.
    Answers must be awaited.
    """

    def __init__(self) -> None:
        self._begun: dict[str, asyncio.Task[Answer]] = {}

    def share(self, key: str, work: Callable[[], Coroutine[Any, Any, Answer]]) -> Awaitable[Answer]:
        """The answer of the work that this turn has begun last for `key`, or else of `work`."""
        task = self._begun.get(key)
        return self.begin(key, work) if task is None else asyncio.shield(task)

    def begin(self, key: str, work: Callable[[], Coroutine[Any, Any, Answer]]) -> Awaitable[Answer]:
        """The answer of `work`, which is begun in any case."""
        loop = asyncio.get_running_loop()
        task = self._begun[key] = loop.create_task(work())
        loop.call_soon(self._begun.pop, key, None)
        return asyncio.shield(task)
