"""Single-flight: sharing, cancelled callers, errors and draining; and sharing within a turn of the event loop."""

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from proxy.cache.single_flight import SingleFlight, TurnCoalescer


class Work:
    """Work that counts how often it began and ended, and ends when `go` is set."""

    def __init__(self, answer: str = "answer", error: Exception | None = None) -> None:
        self.begun = self.ended = 0
        self.go = asyncio.Event()
        self._answer = answer
        self._error = error

    async def __call__(self) -> str:
        self.begun += 1
        await self.go.wait()
        self.ended += 1
        if self._error is not None:
            raise self._error
        return self._answer


Scenario = Callable[[], Coroutine[Any, Any, list[str] | None]]


def in_a_loop(scenario: Scenario) -> Callable[[], None]:
    """A test that runs `scenario` with a limit of five seconds, and checks the errors that no caller received.

    They must be the ones that the scenario returns; none if it returns None.
    """

    def run() -> None:
        asyncio.run(asyncio.wait_for(watched(), 5))

    async def watched() -> None:
        reports: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
        expected = await scenario() or []
        await turns()
        gc.collect()
        assert [str(report["exception"]) for report in reports] == expected

    return run


async def turns() -> None:
    """Runs what is ready in the event loop."""
    for _ in range(10):
        await asyncio.sleep(0)


def calling(calls: SingleFlight[str], work: Work, key: str = "key") -> asyncio.Task[tuple[str, bool]]:
    return asyncio.ensure_future(calls.do(key, work))


@in_a_loop
async def test_many_callers_share_one_execution() -> None:
    calls, work = SingleFlight[str](), Work()
    callers = [calling(calls, work) for _ in range(100)]
    await turns()
    work.go.set()
    assert await asyncio.gather(*callers) == [("answer", False)] + [("answer", True)] * 99
    assert (work.begun, work.ended) == (1, 1)


@in_a_loop
async def test_the_work_of_a_later_caller_is_not_started() -> None:
    calls, work, never = SingleFlight[str](), Work(), Work("another answer")
    first = calling(calls, work)
    await turns()
    second = calling(calls, never)
    await turns()
    work.go.set()
    assert [await first, await second] == [("answer", False), ("answer", True)]
    assert never.begun == 0


@in_a_loop
async def test_keys_are_independent() -> None:
    calls, one, other = SingleFlight[str](), Work("one"), Work("other")
    callers = [calling(calls, one, "one"), calling(calls, other, "other")]
    await turns()
    assert (one.begun, other.begun) == (1, 1)
    other.go.set()
    assert await callers[1] == ("other", False)
    assert not callers[0].done()
    assert (calls.in_flight("one"), calls.in_flight("other"), len(calls)) == (True, False, 1)
    one.go.set()
    assert await callers[0] == ("one", False)


@in_a_loop
async def test_cancelling_the_first_caller_does_not_affect_the_others() -> None:
    calls, work = SingleFlight[str](), Work()
    first, second, third = (calling(calls, work) for _ in range(3))
    await turns()
    first.cancel()
    await turns()
    assert first.cancelled()
    late = calling(calls, work)
    await turns()
    work.go.set()
    assert [await second, await third, await late] == [("answer", True)] * 3
    assert (work.begun, work.ended) == (1, 1)


@in_a_loop
async def test_cancelling_a_later_caller_does_not_affect_the_first() -> None:
    calls, work = SingleFlight[str](), Work()
    first, second = calling(calls, work), calling(calls, work)
    await turns()
    second.cancel()
    work.go.set()
    assert await first == ("answer", False)


@in_a_loop
async def test_the_work_is_done_even_if_all_callers_are_cancelled() -> None:
    calls, work = SingleFlight[str](), Work()
    callers = [calling(calls, work) for _ in range(3)]
    await turns()
    for caller in callers:
        caller.cancel()
    await turns()
    work.go.set()
    await turns()
    assert (work.begun, work.ended) == (1, 1)


@in_a_loop
async def test_an_error_reaches_all_callers() -> None:
    calls, work = SingleFlight[str](), Work(error=OSError("no way"))
    callers = [calling(calls, work) for _ in range(3)]
    await turns()
    work.go.set()
    errors = await asyncio.gather(*callers, return_exceptions=True)
    assert [str(error) for error in errors if isinstance(error, OSError)] == ["no way"] * 3


@in_a_loop
async def test_an_error_without_a_caller_is_reported_to_the_event_loop() -> list[str]:
    calls, work = SingleFlight[str](), Work(error=OSError("no way"))
    caller = calling(calls, work)
    await turns()
    caller.cancel()
    await turns()
    work.go.set()
    await turns()
    assert work.ended == 1
    return ["no way"]


@pytest.mark.parametrize("error", [None, OSError("no way")])
def test_after_an_answer_the_next_caller_starts_the_work_again(error: Exception | None) -> None:
    @in_a_loop
    async def scenario() -> None:
        calls, work = SingleFlight[str](), Work(error=error)
        work.go.set()
        await asyncio.gather(calling(calls, work), return_exceptions=True)
        await turns()
        again = Work("a newer answer")
        again.go.set()
        assert await calls.do("key", again) == ("a newer answer", False)

    scenario()


@in_a_loop
async def test_draining_without_running_work_takes_no_time() -> None:
    calls = SingleFlight[str]()
    await calls.drain(3600)
    work = Work()
    work.go.set()
    await calls.do("key", work)
    await turns()
    await calls.drain(3600)


@in_a_loop
async def test_draining_waits_for_all_running_work() -> None:
    calls, works = SingleFlight[str](), [Work(), Work()]
    callers = [calling(calls, work, key) for work, key in zip(works, "ab", strict=True)]
    await turns()
    draining = asyncio.ensure_future(calls.drain(3600))
    works[0].go.set()
    await turns()
    assert not draining.done()
    works[1].go.set()
    await draining
    assert await asyncio.gather(*callers) == [("answer", False)] * 2


@in_a_loop
async def test_draining_cancels_only_what_exceeds_its_timeout() -> None:
    calls, work, late = SingleFlight[str](), Work(), Work()
    in_time, too_late = calling(calls, work, "in time"), calling(calls, late, "too late")
    await turns()
    work.go.set()
    await calls.drain(0.05)
    await turns()
    assert await in_time == ("answer", False)
    assert too_late.cancelled()
    assert (late.begun, late.ended) == (1, 0)
    await calls.drain(3600)


@in_a_loop
async def test_draining_waits_until_cancelled_work_has_ended() -> None:
    calls, ended = SingleFlight[str](), []

    async def slow_to_end() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            await turns()
            ended.append("work")
        return "never"

    caller = asyncio.ensure_future(calls.do("key", slow_to_end))
    await turns()
    await calls.drain(0)
    assert ended == ["work"]
    await turns()
    assert caller.cancelled()


# --- TurnCoalescer -----------------------------------------------------------------------------------------------


@in_a_loop
async def test_work_is_shared_within_a_turn_and_not_later() -> None:
    shared, works = TurnCoalescer[str](), [Work(answer) for answer in ("first", "other key", "later")]
    asked = [shared.share("key", works[0]), shared.share("key", works[2]), shared.share("other", works[1])]
    await asyncio.sleep(0)
    later = shared.share("key", works[2])
    for work in works:
        work.go.set()
    assert await asyncio.gather(*asked, later) == ["first", "first", "other key", "later"]
    assert [work.begun for work in works] == [1, 1, 1]


@in_a_loop
async def test_work_that_was_started_is_shared_for_the_rest_of_the_turn() -> None:
    shared, works = TurnCoalescer[str](), [Work("first"), Work("second")]
    asked = [shared.start("key", works[0]), shared.start("key", works[1]), shared.share("key", works[0])]
    for work in works:
        work.go.set()
    assert await asyncio.gather(*asked) == ["first", "second", "second"]
    assert [work.begun for work in works] == [1, 1]


@in_a_loop
async def test_shared_work_survives_a_cancelled_caller_and_its_error_reaches_all() -> None:
    shared, work = TurnCoalescer[str](), Work(error=ValueError("no"))

    async def wait() -> str:
        return await shared.share("key", work)

    callers = [asyncio.ensure_future(wait()) for _ in range(3)]
    await asyncio.sleep(0)
    callers[0].cancel()
    work.go.set()
    told = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(one) for one in told] == [asyncio.CancelledError, ValueError, ValueError]
    assert (work.begun, work.ended) == (1, 1)
