"""One flight a key: who shares an answer, and that nobody who leaves takes it along."""

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from proxy.cache.single_flight import SingleFlight, TurnCoalescer


class Work:
    """Work that counts how often it began and ended, and ends when it is told to."""

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
    """The test that runs `scenario`, in five seconds at the most, and that sees the errors nobody waited for.

    They have to be the ones that the scenario returns, if it does.
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
    """Lets everything run that can run."""
    for _ in range(10):
        await asyncio.sleep(0)


def calling(flights: SingleFlight[str], work: Work, key: str = "key") -> asyncio.Task[tuple[str, bool]]:
    return asyncio.ensure_future(flights.do(key, work))


@in_a_loop
async def test_many_callers_share_one_work() -> None:
    flights, work = SingleFlight[str](), Work()
    callers = [calling(flights, work) for _ in range(100)]
    await turns()
    work.go.set()
    assert await asyncio.gather(*callers) == [("answer", False)] + [("answer", True)] * 99
    assert (work.begun, work.ended) == (1, 1)


@in_a_loop
async def test_the_work_of_a_caller_who_came_too_late_is_never_begun() -> None:
    flights, work, never = SingleFlight[str](), Work(), Work("another answer")
    first = calling(flights, work)
    await turns()
    second = calling(flights, never)
    await turns()
    work.go.set()
    assert [await first, await second] == [("answer", False), ("answer", True)]
    assert never.begun == 0


@in_a_loop
async def test_keys_fly_apart_from_each_other() -> None:
    flights, one, other = SingleFlight[str](), Work("one"), Work("other")
    callers = [calling(flights, one, "one"), calling(flights, other, "other")]
    await turns()
    assert (one.begun, other.begun) == (1, 1)
    other.go.set()
    assert await callers[1] == ("other", False)
    assert not callers[0].done()
    one.go.set()
    assert await callers[0] == ("one", False)


@in_a_loop
async def test_the_first_caller_leaves_and_the_others_get_the_answer() -> None:
    flights, work = SingleFlight[str](), Work()
    first, second, third = (calling(flights, work) for _ in range(3))
    await turns()
    first.cancel()
    await turns()
    assert first.cancelled()
    late = calling(flights, work)
    await turns()
    work.go.set()
    assert [await second, await third, await late] == [("answer", True)] * 3
    assert (work.begun, work.ended) == (1, 1)


@in_a_loop
async def test_a_follower_leaves_and_nobody_else_notices() -> None:
    flights, work = SingleFlight[str](), Work()
    first, second = calling(flights, work), calling(flights, work)
    await turns()
    second.cancel()
    work.go.set()
    assert await first == ("answer", False)


@in_a_loop
async def test_the_work_is_done_even_if_everybody_leaves() -> None:
    flights, work = SingleFlight[str](), Work()
    callers = [calling(flights, work) for _ in range(3)]
    await turns()
    for caller in callers:
        caller.cancel()
    await turns()
    work.go.set()
    await turns()
    assert (work.begun, work.ended) == (1, 1)


@in_a_loop
async def test_an_error_reaches_everybody() -> None:
    flights, work = SingleFlight[str](), Work(error=OSError("no way"))
    callers = [calling(flights, work) for _ in range(3)]
    await turns()
    work.go.set()
    errors = await asyncio.gather(*callers, return_exceptions=True)
    assert [str(error) for error in errors if isinstance(error, OSError)] == ["no way"] * 3


@in_a_loop
async def test_an_error_that_nobody_waits_for_is_not_lost() -> list[str]:
    flights, work = SingleFlight[str](), Work(error=OSError("no way"))
    caller = calling(flights, work)
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
        flights, work = SingleFlight[str](), Work(error=error)
        work.go.set()
        await asyncio.gather(calling(flights, work), return_exceptions=True)
        await turns()
        again = Work("a newer answer")
        again.go.set()
        assert await flights.do("key", again) == ("a newer answer", False)

    scenario()


@in_a_loop
async def test_draining_with_nothing_in_the_air_takes_no_time() -> None:
    flights = SingleFlight[str]()
    await flights.drain(3600)
    work = Work()
    work.go.set()
    await flights.do("key", work)
    await turns()
    await flights.drain(3600)


@in_a_loop
async def test_draining_waits_for_all_that_flies() -> None:
    flights, works = SingleFlight[str](), [Work(), Work()]
    callers = [calling(flights, work, key) for work, key in zip(works, "ab", strict=True)]
    await turns()
    draining = asyncio.ensure_future(flights.drain(3600))
    works[0].go.set()
    await turns()
    assert not draining.done()
    works[1].go.set()
    await draining
    assert await asyncio.gather(*callers) == [("answer", False)] * 2


@in_a_loop
async def test_draining_ends_what_is_late_and_only_that() -> None:
    flights, work, late = SingleFlight[str](), Work(), Work()
    in_time, too_late = calling(flights, work, "in time"), calling(flights, late, "too late")
    await turns()
    work.go.set()
    await flights.drain(0.05)
    await turns()
    assert await in_time == ("answer", False)
    assert too_late.cancelled()
    assert (late.begun, late.ended) == (1, 0)
    await flights.drain(3600)


@in_a_loop
async def test_draining_waits_for_the_last_words_of_what_it_ends() -> None:
    flights, said = SingleFlight[str](), []

    async def reluctant() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            await turns()
            said.append("goodbye")
        return "never"

    caller = asyncio.ensure_future(flights.do("key", reluctant))
    await turns()
    await flights.drain(0)
    assert said == ["goodbye"]
    await turns()
    assert caller.cancelled()


# --- the same turn -----------------------------------------------------------------------------------------------


@in_a_loop
async def test_work_is_shared_by_those_who_ask_in_one_turn_and_by_nobody_later() -> None:
    shared, works = TurnCoalescer[str](), [Work(answer) for answer in ("first", "other key", "later")]
    asked = [shared.share("key", works[0]), shared.share("key", works[2]), shared.share("other", works[1])]
    await asyncio.sleep(0)
    later = shared.share("key", works[2])
    for work in works:
        work.go.set()
    assert await asyncio.gather(*asked, later) == ["first", "first", "other key", "later"]
    assert [work.begun for work in works] == [1, 1, 1]


@in_a_loop
async def test_work_that_is_begun_in_any_case_is_shared_from_then_on() -> None:
    shared, works = TurnCoalescer[str](), [Work("first"), Work("second")]
    asked = [shared.start("key", works[0]), shared.start("key", works[1]), shared.share("key", works[0])]
    for work in works:
        work.go.set()
    assert await asyncio.gather(*asked) == ["first", "second", "second"]
    assert [work.begun for work in works] == [1, 1]


@in_a_loop
async def test_shared_work_goes_on_without_one_who_leaves_and_fails_for_all() -> None:
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
