"""The shared timeout: it never fires early, and at most two ticks late."""

import asyncio
import time

import pytest

from proxy.store.coarse_timeout import CoarseTimeout

LIMIT_S, TICK_S = 0.1, 0.02


def limit() -> CoarseTimeout:
    return CoarseTimeout(LIMIT_S, tick_s=TICK_S)


def test_only_work_that_takes_too_long_is_cancelled() -> None:
    ended: list[str] = []

    async def take(seconds: float) -> None:
        await asyncio.sleep(seconds)
        ended.append("slept")

    async def run() -> list[object]:
        limited = limit()
        return await asyncio.gather(
            *(limited.run(take(seconds)) for seconds in (0, LIMIT_S / 2, 60, 60)), return_exceptions=True
        )

    began = time.monotonic()
    results = asyncio.run(run())
    assert LIMIT_S <= time.monotonic() - began < 50
    assert [type(result) for result in results] == [type(None), type(None), TimeoutError, TimeoutError]
    assert ended == ["slept", "slept"]


def test_after_a_blocked_event_loop_a_result_that_has_arrived_counts() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        reply = loop.create_future()

        async def wait() -> None:
            await reply

        held = loop.create_task(limit().run(wait()))
        await asyncio.sleep(0)
        loop.call_later(LIMIT_S, reply.set_result, None)
        time.sleep(3 * LIMIT_S)  # noqa: ASYNC251 -- the loop stands still
        await held

    asyncio.run(run())


def test_work_with_a_slow_clean_up_is_cancelled_once() -> None:
    async def cling() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(5 * TICK_S)

    with pytest.raises(TimeoutError):
        asyncio.run(limit().run(cling()))


def test_a_cancellation_from_outside_is_not_turned_into_a_timeout() -> None:
    async def run() -> None:
        held = asyncio.get_running_loop().create_task(limit().run(asyncio.sleep(60)))
        await asyncio.sleep(0)
        held.cancel()
        await held

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())


def test_the_timer_starts_again_after_it_has_stopped() -> None:
    async def run() -> None:
        limited = limit()
        await limited.run(asyncio.sleep(0))
        await asyncio.sleep(2 * TICK_S)
        await limited.run(asyncio.sleep(60))

    with pytest.raises(TimeoutError):
        asyncio.run(run())
