"""Single-flight: callers who ask the same at the same time share one answer.

The work belongs to nobody who waits for it: a caller that goes away, the first one included, leaves it flying for
the others.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[T]] = {}

    async def do(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> tuple[T, bool]:
        """The answer of the flight for `key`, and whether it was under way already; else `work` makes it."""
        task = self._tasks.get(key)
        joined = task is not None
        if task is None:
            task = self.start(key, work)
        return await asyncio.shield(task), joined

    def start(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Sets off a flight that nobody may be waiting for. There must be none for `key`."""
        task = asyncio.get_running_loop().create_task(work())
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key))
        return task

    def in_flight(self, key: str) -> bool:
        return key in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    async def drain(self, timeout_s: float) -> None:
        """Waits for what is flying, `timeout_s` at the most, and ends what is left."""
        if not self._tasks:
            return
        _, unfinished = await asyncio.wait(list(self._tasks.values()), timeout=timeout_s)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished)


class TurnCoalescer(Generic[T]):
    """Shares work among those who ask for it in the same turn of the event loop, before any of it is done.

    Calls of one turn are sent together, so each caller has the answer that a call of its own would have brought.
    Answers must be awaited.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[T]] = {}

    def share(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> Awaitable[T]:
        """The answer of the work that this turn has begun last for `key`, or else of `work`."""
        task = self._tasks.get(key)
        return self.start(key, work) if task is None else asyncio.shield(task)

    def start(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> Awaitable[T]:
        """The answer of `work`, which is begun in any case."""
        loop = asyncio.get_running_loop()
        task = self._tasks[key] = loop.create_task(work())
        loop.call_soon(self._tasks.pop, key, None)
        return asyncio.shield(task)
