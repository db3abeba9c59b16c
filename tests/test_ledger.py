"""The ledger on real servers, Valkey and Redis 7.0: what is booked, what is not, and what becomes of it in trouble."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import count
from time import time_ns
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import redis

from proxy.decisions import MAX_BATCH, Decisions
from proxy.ledger import Admitted, Denied, Ledger
from proxy.metrics import Metrics
from proxy.models import MAX_MODELS
from proxy.problems import Code, Outcome, StoreUnavailable
from proxy.quotas import Charge, Measure, Quota, Rate, Scope, Terms
from proxy.sheets import ALWAYS, COUNTER_KEPT_S, USAGE_KEPT_DAYS, LedgerKeys
from proxy.store import GRACE_S, TIMEOUT_S, Store
from proxy.windows import Per, day_of, start_of, window_of
from relay import GOOD, Relay, Way, relay
from serving import free_port

ZONE = ZoneInfo("Europe/Berlin")
KEYS = LedgerKeys("acme")
DAY_S = 86_400
CREDIT = 1_000_000
DEAREST = 10**15
"""Micro-credits of an estimate, at the most."""

HIT = Charge(Outcome.HIT, 4 * CREDIT, "Flux")
MISS = Charge(Outcome.MISS, 4 * CREDIT, "Flux")
FAILED = Charge(Outcome.UPSTREAM_ERROR)
REST_S = 0.02
"""For how long the store is left alone after a failure, where a test has no time."""
SCHEDULING_S = 0.05
"""By how much a busy machine may be late, at the best of three times."""


def terms(*quotas: Quota, team: str = "design", rate: Rate | None = None) -> Terms:
    return Terms(team, rate or Rate(10_000, 10_000), quotas)


def quota(limit: int, measure: Measure = "requests", per: Per = "month", scope: Scope = "team") -> Quota:
    return Quota(scope, measure, per, limit, refuse=True)


PLAIN = terms()
SLOW = terms(rate=Rate(0.01, 9))
"""Its rate remembers for longer than a test takes."""


@dataclass
class Desk:
    """A gateway's ledger, and what it is made of."""

    ledger: Ledger
    decisions: Decisions
    metrics: Metrics

    def metric(self, name: str) -> float:
        value = self.metrics.registry.get_sample_value(f"estimate_proxy_{name}")
        assert value is not None
        return value

    async def admitted(self, terms: Terms = PLAIN) -> Admitted:
        """A question on its way upstream."""
        admission = await self.ledger.admit(terms)
        assert isinstance(admission, Admitted)
        return admission

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 -- what happens in a server sends no event
                await asyncio.sleep(0.005)

    async def until_paid(self) -> None:
        """Until nothing is owed to the ledger."""
        await self.until(lambda: not self.ledger._backlog)
        assert self.metric("buffered_debits") == 0

    async def until_back(self) -> None:
        """Until the ledger has answered, once."""
        async with asyncio.timeout(10):
            while True:
                with suppress(StoreUnavailable):
                    await self.ledger.peek(PLAIN, None)
                    return
                await asyncio.sleep(0.005)


Story = Callable[[Desk], Coroutine[Any, Any, None]]


@asynccontextmanager
async def opened(url: str, *, admits: bool = False) -> AsyncIterator[Desk]:
    metrics = Metrics()
    store = Store(url, "ledger")
    decisions = Decisions(store, KEYS, ZONE, metrics)
    ledger = Ledger(decisions, metrics, ZONE, admits_on_outage=admits)
    await ledger.open()
    try:
        yield Desk(ledger, decisions, metrics)
    finally:
        await ledger.close(5)
        await store.close()


def play(url: str, story: Story, *, admits: bool = False) -> None:
    """Tells a story of one gateway."""

    async def tell() -> None:
        async with asyncio.timeout(30), opened(url, admits=admits) as desk:
            await story(desk)

    asyncio.run(tell())


@pytest.fixture
def server(any_store_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(any_store_url) as client:
        client.flushall()
        client.config_resetstat()
        yield client


async def cut(way: Relay) -> None:
    """The ledger is out of reach, and the loop has seen how its connections were closed."""
    await asyncio.to_thread(way.cut)


@pytest.fixture
def way(any_store_url: str) -> Iterator[Relay]:
    with relay(any_store_url) as found:
        yield found


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an outage nobody waits for long."""
    monkeypatch.setattr("proxy.store.REST_S", REST_S)
    monkeypatch.setattr("proxy.ledger.FLUSH_EVERY_S", 0.02)


class Skewed:
    """A gateway's clock that is wrong."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> int:
        return time_ns() + int(self.ahead_s * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Skewed:
    skewed = Skewed()
    monkeypatch.setattr("proxy.decisions.time_ns", skewed)
    return skewed


def calls(server: redis.Redis) -> int:
    """How many scripts were called, and known, since the test began."""
    stats = server.info("commandstats").get("cmdstat_evalsha", {"calls": 0, "failed_calls": 0})
    return int(stats["calls"]) - int(stats["failed_calls"])


def hashes(server: redis.Redis, pattern: str) -> dict[str, Counter[str]]:
    """What the ledger's hashes hold that is not 0."""
    names: Any = server.keys(f"ep1:{{acme}}:{pattern}")
    held: Any = [server.hgetall(name) for name in names]
    return {
        name.decode(): Counter({field.decode(): int(amount) for field, amount in fields.items() if amount != b"0"})
        for name, fields in zip(names, held, strict=True)
    }


def rows(server: redis.Redis, team: str = "design") -> Counter[str]:
    """A team's usage on all days."""
    return sum(hashes(server, f"u:*:{team}").values(), Counter[str]())


def used(server: redis.Redis, team: str | None = "design") -> tuple[int, int]:
    """Requests and credits in the counters, of all days; those of weeks and months must say the same, and usage too."""
    scope = "o" if team is None else f"t:{team}"
    sums = [sum(hashes(server, f"q:{scope}:{per}:*").values(), Counter[str]()) for per in ALWAYS]
    assert sums[0] == sums[1] == sums[2]
    in_rows: Counter[str] = Counter()
    for name, amount in rows(server, team or "*").items():
        in_rows[name.rpartition(":")[2]] += amount
    assert (in_rows["requests"], in_rows["credits"]) == (sums[0]["requests"], sums[0]["credits"])
    return sums[0]["requests"], sums[0]["credits"]


def everything(server: redis.Redis) -> dict[bytes, Any]:
    """Every key, but rates that are over."""
    names: Any = server.keys("*")
    found = {name: server.dump(name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def word(admission: Admitted | Denied) -> str:
    return "admitted" if isinstance(admission, Admitted) else admission.problem.code.value


# --- What is booked --------------------------------------------------------------------------------------------------


def test_a_charge_counts_for_the_team_and_the_organisation(any_store_url: str, server: redis.Redis) -> None:
    async def story(desk: Desk) -> None:
        for team in ("design", "design", "film"):
            assert isinstance(await desk.ledger.charge(terms(team=team), HIT), Admitted)

    play(any_store_url, story)
    assert rows(server) == {"Flux:hit:requests": 2, "Flux:hit:credits": 8 * CREDIT}
    assert used(server) == (2, 8 * CREDIT)
    assert used(server, None) == (3, 12 * CREDIT)
    assert server.smembers(KEYS.teams) == {b"design", b"film"}


@pytest.mark.parametrize(
    ("charge", "row", "credits_micro"),
    [
        (MISS, {"Flux:miss:requests": 1, "Flux:miss:credits": 4 * CREDIT}, 4 * CREDIT),
        (Charge(Outcome.MISS, 0, "Flux"), {"Flux:miss:requests": 1}, 0),
        (FAILED, {"-:upstream-error:requests": 1}, 0),
        (Charge(Outcome.CANCELLED), {"-:cancelled:requests": 1}, 0),
    ],
)
def test_a_question_counts_once_whatever_becomes_of_it(
    any_store_url: str, server: redis.Redis, charge: Charge, row: dict[str, int], credits_micro: int
) -> None:
    async def story(desk: Desk) -> None:
        admitted = await desk.admitted()
        assert rows(server) == {"-:cancelled:requests": 1}, "it counts from the begin: should all end here, it has been"
        assert used(server) == (1, 0)
        settled = await desk.ledger.settle(admitted, charge)
        assert isinstance(settled, Admitted)
        assert settled.model == charge.model

    play(any_store_url, story)
    assert rows(server) == row
    assert used(server) == used(server, None) == (1, credits_micro)


def test_what_is_not_answered_takes_no_quota(any_store_url: str, server: redis.Redis) -> None:
    limited = terms(quota(1), quota(1, scope="org"))

    async def story(desk: Desk) -> None:
        for _ in range(3):
            standing = await desk.ledger.refund(await desk.admitted(limited), Outcome.UPSTREAM_BUSY)
            assert standing is not None
            assert standing.used == (0, 0)
            assert isinstance(await desk.ledger.pass_over(limited, Outcome.NOT_CACHED), Admitted)
            assert isinstance(await desk.ledger.peek(limited, 7), Admitted)

    play(any_store_url, story)
    assert rows(server) == {"-:upstream-busy:refused": 3, "-:not-cached:refused": 3}
    assert used(server) == used(server, None) == (0, 0)


def test_a_denied_request_debits_nothing(any_store_url: str, server: redis.Redis) -> None:
    """Its own quota would have let it pass."""
    limited = terms(quota(9), quota(10 * CREDIT, "estimated_credits", "day", scope="org"))

    async def story(desk: Desk) -> None:
        assert isinstance(await desk.ledger.charge(terms(*limited.org_quotas, team="film"), HIT), Admitted)
        assert isinstance(await desk.ledger.charge(limited, HIT), Admitted)
        denied = await desk.ledger.charge(limited, HIT)
        assert isinstance(denied, Denied)
        assert (denied.problem.status, denied.problem.members["violated-policies"]) == (402, ["org-credits-day"])
        assert denied.standing is not None
        assert denied.standing.used == (1, 8 * CREDIT)

    play(any_store_url, story)
    assert rows(server) == {"Flux:hit:requests": 1, "Flux:hit:credits": 4 * CREDIT, "-:quota-exceeded:refused": 1}
    assert used(server) == (1, 4 * CREDIT)
    assert used(server, None) == (2, 8 * CREDIT)


def test_a_price_that_passes_a_quota_gives_its_request_back(any_store_url: str, server: redis.Redis) -> None:
    limited = terms(quota(2), quota(6 * CREDIT, "estimated_credits"))

    async def story(desk: Desk) -> None:
        first, second = await desk.admitted(limited), await desk.admitted(limited)
        assert word(await desk.ledger.charge(limited, HIT)) == "quota-exceeded", "both requests are taken"
        assert word(await desk.ledger.settle(first, MISS)) == "admitted"
        denied = await desk.ledger.settle(second, MISS)
        assert isinstance(denied, Denied)
        assert (denied.problem.status, denied.problem.members["violated-policies"]) == (402, ["credits-month"])
        assert word(await desk.ledger.charge(limited, Charge(Outcome.HIT, 2 * CREDIT, "Flux"))) == "admitted"

    play(any_store_url, story)
    assert used(server) == (2, 6 * CREDIT)
    assert rows(server)["-:quota-exceeded:refused"] == 2


@pytest.mark.usefixtures("server")
def test_who_has_used_up_all_credits_asks_nobody(any_store_url: str) -> None:
    limited = terms(quota(4 * CREDIT, "estimated_credits"))

    async def story(desk: Desk) -> None:
        admitted = await desk.admitted(limited)
        assert word(await desk.ledger.charge(limited, HIT)) == "admitted"
        assert word(await desk.ledger.settle(admitted, Charge(Outcome.MISS, 0, "Flux"))) == "admitted", "it had begun"
        for free in (Charge(Outcome.HIT, 0, "Flux"), Charge(Outcome.HIT)):
            assert word(await desk.ledger.charge(limited, free)) == "quota-exceeded"
        assert word(await desk.ledger.admit(limited)) == "quota-exceeded"
        assert word(await desk.ledger.peek(limited, None)) == "quota-exceeded"

    play(any_store_url, story)


def test_a_rate_refuses_before_any_quota(any_store_url: str, server: redis.Redis) -> None:
    limited = terms(quota(0), rate=Rate(0.001, 2))
    fast = terms(rate=Rate(0.001, 2))

    async def story(desk: Desk) -> None:
        assert [word(await desk.ledger.charge(limited, HIT)) for _ in range(3)] == ["quota-exceeded"] * 3
        assert [word(await desk.ledger.charge(fast, HIT)) for _ in range(3)] == ["admitted", "admitted", "rate-limited"]
        denied = await desk.ledger.admit(limited)
        assert isinstance(denied, Denied)
        assert (denied.problem.code, denied.problem.status) == (Code.RATE_LIMITED, 429)
        assert denied.problem.retry_after_s is not None
        assert 990 < denied.problem.retry_after_s <= 1000

    play(any_store_url, story)
    assert rows(server)["-:rate-limited:refused"] == 2
    assert used(server) == (2, 8 * CREDIT)


def test_a_quota_that_warns_is_passed_and_counted(any_store_url: str, server: redis.Redis) -> None:
    warned = terms(Quota("team", "requests", "day", 1, refuse=False))
    name, labels = "estimate_proxy_quota_warned_total", {"team": "design", "measure": "requests", "per": "day"}

    async def story(desk: Desk) -> None:
        await desk.ledger.charge(warned, HIT)
        assert not desk.metrics.registry.get_sample_value(name, labels)
        admission = await desk.ledger.charge(warned, HIT)
        assert isinstance(admission, Admitted)
        assert admission.standing is not None
        assert admission.standing.warnings() == warned.quotas
        admitted = await desk.admitted(warned)
        assert desk.metrics.registry.get_sample_value(name, labels) == 1
        await desk.ledger.settle(admitted, MISS)
        assert desk.metrics.registry.get_sample_value(name, labels) == 2

    play(any_store_url, story)
    assert used(server)[0] == 3


def test_many_gateways_together_pass_no_quota(any_store_url: str, server: redis.Redis) -> None:
    """Amounts that do not divide the limit, over three teams of one organisation."""
    limit = quota(100 * CREDIT, "estimated_credits", scope="org")

    async def gateway(number: int) -> list[str]:
        async with opened(any_store_url) as desk:
            team = terms(limit, team=f"team-{number % 3}")
            charge = Charge(Outcome.HIT, 3 * CREDIT, "Flux")
            return list(map(word, await asyncio.gather(*(desk.ledger.charge(team, charge) for _ in range(100)))))

    async def story() -> Counter[str]:
        return Counter(word for words in await asyncio.gather(*map(gateway, range(4))) for word in words)

    assert asyncio.run(story()) == {"admitted": 33, "quota-exceeded": 367}
    assert used(server, None) == (33, 99 * CREDIT)


# --- Batches ---------------------------------------------------------------------------------------------------------


def test_what_is_asked_in_one_turn_is_decided_in_one_call_and_in_order(any_store_url: str, server: redis.Redis) -> None:
    async def story(desk: Desk) -> None:
        before = calls(server)
        asked = [desk.ledger.charge(terms(quota(3), team=team), HIT) for team in ("design", "film") * 5]
        words = list(map(word, await asyncio.gather(*asked)))
        assert words == ["admitted"] * 6 + ["quota-exceeded"] * 4
        assert calls(server) - before == 1

    play(any_store_url, story)


def test_a_batch_has_a_limit(any_store_url: str, server: redis.Redis) -> None:
    async def story(desk: Desk) -> None:
        before, limited = calls(server), terms(quota(2 * MAX_BATCH + 1))
        asked = (desk.ledger.charge(limited, HIT) for _ in range(2 * MAX_BATCH + 2))
        words = list(map(word, await asyncio.gather(*asked)))
        assert words == ["admitted"] * (2 * MAX_BATCH + 1) + ["quota-exceeded"]
        assert calls(server) - before == 3

    play(any_store_url, story)
    assert used(server)[0] == 2 * MAX_BATCH + 1


def test_each_in_a_batch_has_its_own_fate(any_store_url: str, server: redis.Redis) -> None:
    """What one gives back, the next one may have; and who has gone away was still counted."""
    limited = terms(quota(1))

    async def story(desk: Desk) -> None:
        first = await desk.admitted(limited)
        decide = desk.decisions.decide
        tasks = [
            asyncio.ensure_future(decide("admit", limited, Charge(Outcome.CANCELLED))),
            asyncio.ensure_future(decide("refund", limited, FAILED, admitted_on=first.sheet)),
            asyncio.ensure_future(decide("charge", limited, HIT)),
            asyncio.ensure_future(decide("peek", limited, HIT)),
        ]
        await asyncio.sleep(0)
        tasks[2].cancel()
        words = [getattr(end, "word", "gone") for end in await asyncio.gather(*tasks, return_exceptions=True)]
        assert words == ["1", "ok", "gone", "1"]

    play(any_store_url, story)
    assert rows(server) == {
        "-:quota-exceeded:refused": 1,
        "-:upstream-error:refused": 1,
        "Flux:hit:requests": 1,
        "Flux:hit:credits": 4 * CREDIT,
    }


# --- Amounts and names -----------------------------------------------------------------------------------------------


def test_amounts_stay_exact_from_the_least_to_the_dearest(any_store_url: str, server: redis.Redis) -> None:
    """In one batch, and beyond what a number of Lua holds exactly."""
    amounts = [DEAREST - 1, 1] * 20

    async def story(desk: Desk) -> None:
        limited = terms(quota(DEAREST + 1, "estimated_credits"), team="film")
        for micro, said in ((DEAREST, "admitted"), (2, "quota-exceeded"), (1, "admitted"), (1, "quota-exceeded")):
            assert word(await desk.ledger.charge(limited, Charge(Outcome.HIT, micro, "Flux"))) == said
        for _ in range(2):
            await asyncio.gather(*(desk.ledger.charge(PLAIN, Charge(Outcome.HIT, micro, "Flux")) for micro in amounts))
        assert isinstance(await desk.ledger.charge(PLAIN, Charge(Outcome.HIT, 1, "Flux")), Admitted)

    play(any_store_url, story)
    assert used(server) == (81, 40 * DEAREST + 1)
    assert int(float(40 * DEAREST + 1)) != 40 * DEAREST + 1, "which is not a number of Lua"
    assert used(server, None) == (83, 41 * DEAREST + 2)


def test_the_first_models_have_a_name_of_their_own(any_store_url: str, server: redis.Redis) -> None:
    names = [f"Model {number}" for number in range(MAX_MODELS + 10)]

    async def charge(desk: Desk, *names: str) -> list[str]:
        asked = (desk.ledger.charge(PLAIN, Charge(Outcome.HIT, CREDIT, name)) for name in names)
        return [admission.model for admission in await asyncio.gather(*asked) if isinstance(admission, Admitted)]

    async def first(desk: Desk) -> None:
        assert await charge(desk, *names[:10], "mixed", "-", "other", names[0]) == [
            *names[:10],
            "mixed",
            "-",
            "other",
            names[0],
        ]
        assert await charge(desk, *names) == [*names[:MAX_MODELS], *["other"] * 10], "also within one batch"

    async def second(desk: Desk) -> None:
        assert await charge(desk, names[0], names[-1], "mixed") == [names[0], "other", "mixed"]

    play(any_store_url, first)
    play(any_store_url, second)
    assert server.smembers(KEYS.models) == {name.encode() for name in names[:MAX_MODELS]}
    named = {field.partition(":")[0]: amount for field, amount in rows(server).items() if field.endswith("requests")}
    assert len(named) == MAX_MODELS + 3
    assert named["other"] == 12


# --- Windows ---------------------------------------------------------------------------------------------------------


def _before_this_minute(now_s: float) -> float:
    return -(now_s % 60) - 0.5


@pytest.mark.parametrize(
    "wrong_s",
    [
        lambda _: 300.0,
        lambda _: -300.0,
        lambda _: 32.0 * DAY_S,
        lambda _: -32.0 * DAY_S,
        _before_this_minute,
        lambda now_s: _before_this_minute(now_s) + 61,
    ],
    ids=["ahead", "behind", "a month ahead", "a month behind", "in the last minute", "in the next minute"],
)
def test_the_stores_clock_decides(
    any_store_url: str, server: redis.Redis, clock: Skewed, wrong_s: Callable[[float], float]
) -> None:
    """A gateway whose clock is wrong asks once more, and knows from then on."""
    limited = terms(quota(9, per="minute"))

    async def story(desk: Desk) -> None:
        await _away_from_edges()
        before = calls(server)
        clock.ahead_s = wrong_s(time_ns() / 1e9)
        assert isinstance(await desk.ledger.charge(limited, HIT), Admitted)
        assert calls(server) - before == 2
        admissions = await asyncio.gather(*(desk.ledger.charge(limited, HIT) for _ in range(2)))
        assert calls(server) - before == 3
        assert isinstance(admissions[-1], Admitted)
        assert admissions[-1].standing is not None
        assert admissions[-1].standing.used == (3,)

    play(any_store_url, story)
    now_s = int(server.time()[0])
    minutes = [KEYS.counter("design", "minute", window_of("minute", at_s, ZONE)) for at_s in (now_s, now_s - 60)]
    lasting = {KEYS.counter(team, per, window_of(per, now_s, ZONE)) for team in ("design", None) for per in ALWAYS}
    (minute,) = set(hashes(server, "q:*")) - lasting
    assert minute in minutes
    assert list(hashes(server, "u:*")) == [KEYS.usage("design", day_of(now_s, ZONE))]


async def _away_from_edges() -> None:
    """A minute must not end within the next seconds."""
    left_s = 60 - time_ns() / 1e9 % 60
    if left_s < 3:
        await asyncio.sleep(left_s + 0.01)


def test_clocks_that_never_agree(any_store_url: str, server: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway's clock that is elsewhere at each look."""
    hours = count(1)

    async def story(desk: Desk) -> None:
        monkeypatch.setattr("proxy.decisions.time_ns", lambda: time_ns() + next(hours) * 10**9 * 3600)
        before = everything(server), calls(server)
        with pytest.raises(StoreUnavailable):
            await desk.ledger.peek(terms(quota(1, per="hour")), None)
        assert (everything(server), calls(server)) == (before[0], before[1] + 2)
        for asked in (desk.ledger.charge, lambda terms, _: desk.ledger.admit(terms)):
            assert word(await asked(terms(quota(1, per="hour")), HIT)) == "store-unavailable"
        assert (everything(server), calls(server)) == (before[0], before[1] + 6)
        assert desk.metric("unanswered_debits_total") == 0

    play(any_store_url, story)


def test_what_is_written_expires(any_store_url: str, server: redis.Redis) -> None:
    pers: tuple[Per, ...] = ("minute", "hour", *ALWAYS)
    limited = terms(*(quota(9, per=per) for per in pers), quota(9, per="hour", scope="org"), rate=Rate(0.01, 5))

    async def story(desk: Desk) -> None:
        await desk.ledger.charge(limited, HIT)
        await desk.ledger.pass_over(terms(team="film"), Outcome.NOT_CACHED)
        await desk.ledger.settle(await desk.admitted(limited), MISS)

    play(any_store_url, story)
    names: Any = server.keys("*")
    ends_ms = {name.decode(): int(server.pexpiretime(name)) for name in names}
    assert {name for name, end_ms in ends_ms.items() if end_ms == -1} == {KEYS.id, KEYS.models, KEYS.teams}
    now_s = int(server.time()[0])
    day = day_of(now_s, ZONE)
    for team in ("design", "film"):
        assert ends_ms[KEYS.usage(team, day)] == 1000 * start_of(day + timedelta(days=USAGE_KEPT_DAYS + 1), ZONE)
    for name, end_ms in ends_ms.items():
        *_, kind, per, start = name.split(":")
        if kind in ("o", "design") and per in pers:
            begun = window_of(per, int(start), ZONE)
            assert end_ms == 1000 * (begun.end_s + COUNTER_KEPT_S)
    assert 0 < ends_ms[KEYS.rate("design")] - 1000 * now_s <= 201_000


# --- A ledger that is new, or lost -----------------------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Levels and messages since the last look."""
    found = [(record.levelname, record.getMessage()) for record in caplog.records]
    caplog.clear()
    return found


NEW = ("WARNING", "a new ledger begins: usage and quotas count from zero")
LOST = ("ERROR", "the ledger was lost: usage and quotas count from zero")


def test_a_new_ledger_is_told_once(any_store_url: str, server: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    async def story(desk: Desk) -> None:
        created_s = desk.metric("ledger_created_timestamp_seconds")
        assert abs(created_s - time_ns() / 1e9) < 60
        assert created_s == int(server.hget(KEYS.id, "created_ms") or 0) / 1000
        await desk.ledger.charge(PLAIN, HIT)
        assert desk.metric("ledger_lost_total") == 0

    play(any_store_url, story)
    assert told(caplog) == [NEW]
    play(any_store_url, story)
    assert told(caplog) == []


def test_gateways_that_begin_together_raise_no_alarm(
    any_store_url: str, server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async def gateway() -> None:
        async with opened(any_store_url) as desk:
            await asyncio.gather(*(desk.ledger.charge(PLAIN, HIT) for _ in range(3)))
            assert desk.metric("ledger_lost_total") == 0

    async def story() -> None:
        await asyncio.gather(*(gateway() for _ in range(5)))

    asyncio.run(story())
    assert told(caplog) == [NEW]
    assert used(server)[0] == 15


def test_a_lost_ledger_is_an_error_once_for_each_gateway(
    any_store_url: str, server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with opened(any_store_url) as one, opened(any_store_url) as other:
            for times in (1, 2):
                told(caplog)
                server.flushall()
                for desk in (one, other, one, other):
                    assert isinstance(await desk.ledger.charge(terms(quota(4)), HIT), Admitted)
                assert told(caplog) == [LOST, LOST]
                assert one.metric("ledger_lost_total") == other.metric("ledger_lost_total") == times
                created_s = one.metric("ledger_created_timestamp_seconds")
                assert created_s == int(server.hget(KEYS.id, "created_ms") or 0) / 1000

    asyncio.run(story())
    assert used(server) == (4, 16 * CREDIT)


@pytest.mark.usefixtures("server", "hurried")
def test_a_ledger_that_is_out_of_reach_at_first_is_no_lost_one(way: Relay, caplog: pytest.LogCaptureFixture) -> None:
    way.cut()

    async def story(desk: Desk) -> None:
        assert any("nobody knows what was used" in message for _, message in told(caplog))
        way.become(GOOD)
        await desk.until_back()
        assert desk.metric("ledger_lost_total") == 0
        assert NEW in told(caplog)

    play(way.url, story)


# --- The store out of reach: refuse ----------------------------------------------------------------------------------


@contextmanager
def stopped(server: redis.Redis) -> Iterator[None]:
    """A server that hangs."""
    pid = int(server.info("server")["process_id"])
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def timed(asked: Coroutine[Any, Any, Admitted | Denied]) -> tuple[str, float]:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    return word(await asked), loop.time() - begun


def test_a_store_that_hangs_costs_a_moment_and_is_asked_nothing_twice(
    any_store_url: str, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest_s = 0.2
    monkeypatch.setattr("proxy.store.REST_S", rest_s)

    async def story(desk: Desk) -> None:
        admitted = await desk.admitted()
        before, waits_s = calls(server), []
        with stopped(server):
            for _ in range(3):
                asked = [desk.ledger.charge(PLAIN, HIT) for _ in range(5)]
                answers = await asyncio.gather(*map(timed, [*asked, desk.ledger.pass_over(PLAIN, Outcome.NOT_CACHED)]))
                assert {said for said, _ in answers} == {"store-unavailable"}
                waits_s.append(max(waited_s for _, waited_s in answers))
                assert (await timed(desk.ledger.admit(PLAIN)))[1] < TIMEOUT_S, "it is left alone for a moment"
                await asyncio.sleep(rest_s)
            assert word(await desk.ledger.settle(admitted, MISS)) == "store-unavailable"
        assert min(waits_s) < TIMEOUT_S + GRACE_S + SCHEDULING_S
        assert desk.metric("unanswered_debits_total") == 5, "later ones had no connection over which to be sent"
        await desk.until_back()
        assert calls(server) - before <= 2, "what was sent before it hung may have been run now"

    play(any_store_url, story)
    assert used(server)[0] in (1, 6)
    assert rows(server)["-:cancelled:requests"] == 1


@pytest.mark.usefixtures("hurried")
def test_a_store_that_refuses_costs_nothing(way: Relay, server: redis.Redis) -> None:
    async def story(desk: Desk) -> None:
        if way.url == url:
            admitted = await desk.admitted()
            await cut(way)
            assert word(await desk.ledger.settle(admitted, MISS)) == "store-unavailable"
        before = calls(server)
        for asked in (desk.ledger.charge(PLAIN, HIT), desk.ledger.admit(PLAIN)):
            said, waited_s = await timed(asked)
            assert said == "store-unavailable"
            assert waited_s < TIMEOUT_S
        with pytest.raises(StoreUnavailable):
            await desk.ledger.peek(PLAIN, 1)
        assert desk.metric("unanswered_debits_total") == 0
        assert calls(server) == before

    for url in (way.url, f"redis://127.0.0.1:{free_port()}"):
        play(url, story)
    way.become(GOOD)
    assert rows(server) == {"-:cancelled:requests": 1}, "of what ends without the ledger the request has been counted"


@pytest.mark.parametrize(
    "bad",
    [Way(swallows=b"EVALSHA"), Way(latency_s=0.02, piece_bytes=1)],
    ids=["lost", "dripping"],
)
@pytest.mark.parametrize("admits", [False, True])
@pytest.mark.usefixtures("hurried")
def test_a_debit_without_a_reply_is_refused_and_counted_and_not_repeated(
    way: Relay, server: redis.Redis, bad: Way, *, admits: bool
) -> None:
    async def story(desk: Desk) -> None:
        admitted = await desk.admitted()
        before = calls(server)
        way.become(bad)
        begins = desk.ledger.charge(PLAIN, HIT), desk.ledger.charge(PLAIN, HIT), desk.ledger.admit(PLAIN)
        assert list(map(word, await asyncio.gather(*begins))) == ["store-unavailable"] * 3
        assert desk.metric("unanswered_debits_total") == 3
        way.become(GOOD)
        await desk.until_back()
        assert calls(server) - before == 2
        way.become(bad)
        assert word(await desk.ledger.settle(admitted, MISS)) == "store-unavailable"
        assert desk.metric("unanswered_debits_total") == 4
        assert desk.metric("buffered_debits") == 0
        way.become(GOOD)
        await desk.until_back()
        assert await desk.ledger.refund(await desk.admitted(), Outcome.UPSTREAM_BUSY) is not None
        assert calls(server) - before == 6

    play(way.url, story, admits=admits)
    assert used(server) == (4, 12 * CREDIT), "all was booked, once"
    assert rows(server)["-:cancelled:requests"] == 1


@pytest.mark.usefixtures("hurried")
def test_a_connection_that_is_torn_under_a_debit_is_a_reply_that_is_lost(way: Relay, server: redis.Redis) -> None:
    async def story(desk: Desk) -> None:
        admitted = await desk.admitted()
        before = calls(server)
        way.become(Way(latency_s=60))
        refunded = asyncio.ensure_future(desk.ledger.refund(admitted, Outcome.UPSTREAM_BUSY))
        await asyncio.sleep(0)  # it has a task of its own, and goes out with what comes now
        charged, left = (asyncio.ensure_future(desk.ledger.charge(PLAIN, HIT)) for _ in range(2))
        await desk.until(lambda: calls(server) == before + 1)
        left.cancel()
        await asyncio.to_thread(way.tear)
        assert word(await charged) == "store-unavailable"
        assert await refunded is None
        assert desk.metric("unanswered_debits_total") == 2, "also of a request that has gone, but not what gives back"
        way.become(GOOD)
        await desk.until_back()
        assert calls(server) - before == 2

    play(way.url, story, admits=True)
    assert used(server) == (2, 8 * CREDIT)
    assert rows(server)["-:upstream-busy:refused"] == 1


# --- The store out of reach: admit -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("hurried")
def test_what_is_admitted_in_an_outage_is_booked_once_behind_it(way: Relay, server: redis.Redis) -> None:
    async def story(desk: Desk) -> None:
        settled, failed, refunded, cancelled = [await desk.admitted(terms(quota(4))) for _ in range(4)]
        await cut(way)
        for _ in range(3):
            admission = await desk.ledger.charge(terms(quota(0)), HIT)
            assert isinstance(admission, Admitted)
            assert (admission.standing, admission.booked, admission.model) == (None, False, "other")
        unseen = await desk.admitted()
        assert (unseen.standing, unseen.booked, unseen.model) == (None, False, "-")
        assert word(await desk.ledger.pass_over(PLAIN, Outcome.NOT_CACHED)) == "admitted"
        assert word(await desk.ledger.settle(settled, MISS)) == "admitted"
        assert word(await desk.ledger.settle(failed, FAILED)) == "admitted"
        assert word(await desk.ledger.settle(cancelled, Charge(Outcome.CANCELLED))) == "admitted"
        assert await desk.ledger.refund(refunded, Outcome.UPSTREAM_BUSY) is None
        assert await desk.ledger.refund(await desk.admitted(), Outcome.UPSTREAM_BUSY) is None
        assert desk.metric("buffered_debits") == 5
        assert rows(server) == {"-:cancelled:requests": 4}
        way.become(GOOD)
        await desk.until_paid()
        assert word(await desk.ledger.settle(unseen, MISS)) == "admitted", "it stands nowhere yet"
        await desk.until_paid()
        assert desk.metric("unanswered_debits_total") == 0

    play(way.url, story, admits=True)
    assert rows(server) == {
        "Flux:hit:requests": 3,
        "Flux:hit:credits": 12 * CREDIT,
        "Flux:miss:requests": 2,
        "Flux:miss:credits": 8 * CREDIT,
        "-:upstream-error:requests": 1,
        "-:cancelled:requests": 1,
    }
    assert used(server) == used(server, None) == (7, 20 * CREDIT)


@pytest.mark.usefixtures("hurried")
def test_what_was_admitted_in_an_outage_is_booked_in_the_windows_of_then(
    way: Relay, server: redis.Redis, clock: Skewed
) -> None:
    days: list[date] = []

    async def story(desk: Desk) -> None:
        seen = await desk.admitted()
        days.append(day_of(time_ns() // 10**9, ZONE))
        await cut(way)
        await desk.ledger.charge(PLAIN, HIT)
        unseen = await desk.admitted()
        clock.ahead_s = DAY_S
        await desk.ledger.charge(PLAIN, Charge(Outcome.STALE, CREDIT, "Flux"))
        for admitted in (seen, unseen):
            assert word(await desk.ledger.settle(admitted, MISS)) == "admitted"
        way.become(GOOD)
        await desk.until_paid()

    play(way.url, story, admits=True)
    today, tomorrow = days[0], days[0] + timedelta(days=1)
    assert hashes(server, "u:*") == {
        KEYS.usage("design", today): {
            "Flux:hit:requests": 1,
            "Flux:hit:credits": 4 * CREDIT,
            "Flux:miss:requests": 2,
            "Flux:miss:credits": 8 * CREDIT,
        },
        KEYS.usage("design", tomorrow): {"Flux:stale:requests": 1, "Flux:stale:credits": CREDIT},
    }
    for team in ("design", None):
        days_of = {
            KEYS.counter(team, "day", window_of("day", start_of(day, ZONE), ZONE)): day for day in (today, tomorrow)
        }
        found = {days_of[name]: held for name, held in hashes(server, "q:*").items() if name in days_of}
        assert found == {
            today: {"requests": 3, "credits": 12 * CREDIT},
            tomorrow: {"requests": 1, "credits": CREDIT},
        }


@pytest.mark.usefixtures("hurried")
def test_a_flush_without_a_reply_is_repeated_and_books_once(way: Relay, server: redis.Redis) -> None:
    async def story(desk: Desk) -> None:
        await cut(way)
        for _ in range(3):
            await desk.ledger.charge(PLAIN, HIT)
        before = calls(server)
        way.become(Way(swallows=b"EVALSHA"))
        await asyncio.to_thread(way.swallowed.wait, 10)
        await desk.until(lambda: calls(server) - before >= 2)
        assert desk.metric("buffered_debits") == 3
        assert used(server) == (3, 12 * CREDIT)
        way.become(GOOD)
        await desk.until_paid()
        assert used(server) == (3, 12 * CREDIT)
        assert len(server.keys("ep1:{acme}:flush:*")) == 1
        assert desk.metric("unanswered_debits_total") == 0

    play(way.url, story, admits=True)
    (flush,) = server.keys("ep1:{acme}:flush:*")
    assert 23 * 3600 < server.ttl(flush) <= 86_400


def test_what_is_owed_is_booked_when_the_gateway_closes(
    way: Relay, server: redis.Redis, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.store.REST_S", 0.0)
    monkeypatch.setattr("proxy.ledger.FLUSH_EVERY_S", 3600)

    async def story(desk: Desk) -> None:
        await cut(way)
        for _ in range(3):
            await desk.ledger.charge(PLAIN, HIT)
        if comes_back:
            way.become(GOOD)

    for comes_back in (True, False):
        way.become(GOOD)
        told(caplog)
        play(way.url, story, admits=True)
        lost = ("ERROR", "the debits of 3 requests are lost: the ledger stayed out of reach")
        assert (lost in told(caplog)) == (not comes_back)
    assert used(server) == (3, 12 * CREDIT)


@pytest.mark.usefixtures("hurried")
def test_a_full_backlog_refuses(way: Relay, server: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.ledger.MAX_BACKLOG_ROWS", 2)

    async def story(desk: Desk) -> None:
        seen, other_seen = await desk.admitted(), await desk.admitted()
        await cut(way)
        assert word(await desk.ledger.charge(PLAIN, HIT)) == "admitted"
        unseen = await desk.admitted()
        assert word(await desk.ledger.charge(terms(team="film"), HIT)) == "admitted"
        for asked in (desk.ledger.charge(PLAIN, MISS), desk.ledger.admit(PLAIN), desk.ledger.settle(unseen, MISS)):
            assert word(await asked) == "store-unavailable"
        assert word(await desk.ledger.settle(seen, MISS)) == "store-unavailable"
        assert await desk.ledger.refund(other_seen, Outcome.UPSTREAM_BUSY) is None
        assert word(await desk.ledger.charge(PLAIN, HIT)) == "admitted", "it adds to a sum that is there"
        assert desk.metric("buffered_debits") == 3
        way.become(GOOD)
        await desk.until_paid()
        await desk.admitted()

    play(way.url, story, admits=True)
    assert rows(server) == {"Flux:hit:requests": 2, "Flux:hit:credits": 8 * CREDIT, "-:cancelled:requests": 3}
    assert used(server) == (5, 8 * CREDIT)
    assert used(server, None) == (6, 12 * CREDIT)


@pytest.mark.usefixtures("hurried")
def test_a_settlement_that_finds_no_room_leaves_its_request_as_it_stands(
    way: Relay, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take two sums: what has been admitted is taken back, and what it has come to is counted."""
    monkeypatch.setattr("proxy.ledger.MAX_BACKLOG_ROWS", 1)

    async def story(desk: Desk) -> None:
        first, second = await desk.admitted(), await desk.admitted()
        await cut(way)
        assert word(await desk.ledger.settle(first, MISS)) == "store-unavailable"
        assert word(await desk.ledger.settle(second, Charge(Outcome.CANCELLED))) == "admitted"
        way.become(GOOD)
        await desk.until_paid()

    play(way.url, story, admits=True)
    assert rows(server) == {"-:cancelled:requests": 2}
    assert used(server) == (2, 0)


@pytest.mark.usefixtures("hurried")
def test_what_is_owed_stays_exact(way: Relay, server: redis.Redis) -> None:
    """As one sum it is more than a number of Lua holds exactly."""

    async def story(desk: Desk) -> None:
        await cut(way)
        for _ in range(27):
            await desk.ledger.charge(PLAIN, Charge(Outcome.HIT, DEAREST - 1, "Flux"))
        way.become(GOOD)
        await desk.until_paid()

    play(way.url, story, admits=True)
    assert used(server) == (27, 27 * DEAREST - 27)
    assert int(float(27 * DEAREST - 27)) != 27 * DEAREST - 27


def test_a_settlement_outlives_its_request(way: Relay, server: redis.Redis) -> None:
    async def story(desk: Desk) -> None:
        admitted, refunded = await desk.admitted(), await desk.admitted()
        way.become(Way(latency_s=0.05))
        tasks = [
            asyncio.ensure_future(desk.ledger.settle(admitted, MISS)),
            asyncio.ensure_future(desk.ledger.refund(refunded, Outcome.UPSTREAM_BUSY)),
        ]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)

    play(way.url, story)
    assert rows(server) == {"Flux:miss:requests": 1, "Flux:miss:credits": 4 * CREDIT, "-:upstream-busy:refused": 1}
    assert used(server) == (1, 4 * CREDIT)


# --- What the store objects to ---------------------------------------------------------------------------------------


@contextmanager
def full_of_memory(server: redis.Redis) -> Iterator[None]:
    names = ("maxmemory", "maxmemory-policy")
    before = [(name, server.config_get(name)[name] or "") for name in names]
    server.config_set("maxmemory-policy", "noeviction")
    server.config_set("maxmemory", "1")
    try:
        yield
    finally:
        for name, value in before:
            server.config_set(name, value)


@contextmanager
def replica(server: redis.Redis) -> Iterator[None]:
    server.replicaof("127.0.0.1", str(free_port()))
    try:
        yield
    finally:
        server.replicaof("NO", "ONE")


@pytest.mark.parametrize("trouble", [full_of_memory, replica])
def test_a_store_that_objects_writes_nothing(
    any_store_url: str, server: redis.Redis, trouble: Callable[[redis.Redis], Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def story(desk: Desk) -> None:
        admitted = await desk.admitted(SLOW)
        before = everything(server)
        told(caplog)
        with trouble(server):
            for _ in range(3):
                for asked in (desk.ledger.charge(SLOW, HIT), desk.ledger.admit(terms(team="film", rate=SLOW.rate))):
                    assert word(await asked) == "store-unavailable"
            assert everything(server) == before
        assert len(told(caplog)) == 1, "no line a request"
        assert word(await desk.ledger.settle(admitted, MISS)) == "admitted"
        assert desk.metric("unanswered_debits_total") == 0, "it is known that nothing was booked"

    play(any_store_url, story)
    assert used(server) == (1, 4 * CREDIT)


@pytest.mark.parametrize("field", ["requests", "credits"])
def test_a_counter_that_would_overflow_refuses_before_any_write(
    any_store_url: str, server: redis.Redis, field: str
) -> None:
    month = KEYS.counter(None, "month", window_of("month", int(server.time()[0]), ZONE))

    async def story(desk: Desk) -> None:
        await desk.ledger.charge(SLOW, HIT)
        server.hset(month, field, 81 * 10**17)
        before = everything(server)
        for asked in (desk.ledger.charge(SLOW, HIT), desk.ledger.admit(terms(team="film", rate=SLOW.rate))):
            assert word(await asked) == "store-unavailable"
        assert everything(server) == before
        server.hset(month, "credits", 8 * 10**18 - DEAREST)
        server.hset(month, "requests", 1)
        before = everything(server)
        dear = Charge(Outcome.HIT, DEAREST, "Flux")
        words = list(map(word, await asyncio.gather(*(desk.ledger.charge(SLOW, dear) for _ in range(2)))))
        assert words == ["store-unavailable"] * 2
        assert everything(server) == before
        assert word(await desk.ledger.charge(SLOW, dear)) == "admitted"

    play(any_store_url, story)


@pytest.mark.usefixtures("hurried")
def test_what_a_read_only_store_refuses_is_owed_to_it(any_store_url: str, server: redis.Redis) -> None:
    async def story(desk: Desk) -> None:
        with replica(server):
            assert word(await desk.ledger.charge(PLAIN, HIT)) == "admitted"
            assert used(server) == (0, 0)
        await desk.until_paid()

    play(any_store_url, story, admits=True)
    assert used(server) == (1, 4 * CREDIT)
