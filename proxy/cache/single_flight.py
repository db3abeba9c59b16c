"""Single-flight: concurrent calls for the same key share one execution of the work.

The work runs in a task of its own: cancelling a caller, even the first one, does not cancel the work.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Shares work by key, from its start until it is done. Results are not kept."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[T]] = {}

    async def do(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> tuple[T, bool]:
        """Returns the result for `key`, and whether its work was running already. If not, starts `work`."""
        task = self._tasks.get(key)
        joined = task is not None
        if task is None:
            task = self.start(key, work)
        return await asyncio.shield(task), joined

    def start(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Starts `work` without waiting for it. None may be running for `key`."""
        task = asyncio.get_running_loop().create_task(work())
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key))
        return task

    def in_flight(self, key: str) -> bool:
        return key in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    async def drain(self, timeout_s: float) -> None:
        """Waits at most `timeout_s` for all running work, then cancels the rest and waits for it to end."""
        if not self._tasks:
            return
        _, unfinished = await asyncio.wait(list(self._tasks.values()), timeout=timeout_s)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished)


class TurnCoalescer(Generic[T]):
    """Shares work between callers in the same iteration of the event loop.

    The store client sends all calls of an iteration together, so a caller gets the result that its own call would have
    had. Results must be awaited.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[T]] = {}

    def share(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> Awaitable[T]:
        """The result of the work that was last started for `key` in this iteration; if there is none, of `work`."""
        task = self._tasks.get(key)
        return self.start(key, work) if task is None else asyncio.shield(task)

    def start(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> Awaitable[T]:
        """The result of `work`, which is always started. Later callers of this iteration share it."""
        loop = asyncio.get_running_loop()
        task = self._tasks[key] = loop.create_task(work())
        loop.call_soon(self._tasks.pop, key, None)
        return asyncio.shield(task)
