"""The ledger's windows: the store's clock decides, and keys expire after their window."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from time import time_ns
from typing import Any

import pytest
import redis

from ledger_fixture import (
    DAY_S,
    HIT,
    KEYS,
    MISS,
    ZONE,
    LedgerFixture,
    SkewedClock,
    calls,
    everything,
    hashes,
    quota,
    run_scenario,
    terms,
    word,
)
from proxy.problems import Outcome, StoreUnavailable
from proxy.quota.counters import BASE_PERIODS, COUNTER_KEPT_S, USAGE_KEPT_DAYS
from proxy.quota.ledger import Admitted
from proxy.quota.quotas import Rate
from proxy.quota.windows import Period, day_of, start_of, window_of


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
    any_store_url: str, server: redis.Redis, clock: SkewedClock, wrong_s: Callable[[float], float]
) -> None:
    """A gateway with a wrong clock makes one more call, and knows the offset afterwards."""
    limited = terms(quota(9, per="minute"))

    async def scenario(fixture: LedgerFixture) -> None:
        await _away_from_edges()
        before = calls(server)
        clock.ahead_s = wrong_s(time_ns() / 1e9)
        assert isinstance(await fixture.ledger.charge(limited, HIT), Admitted)
        assert calls(server) - before == 2
        admissions = await asyncio.gather(*(fixture.ledger.charge(limited, HIT) for _ in range(2)))
        assert calls(server) - before == 3
        assert isinstance(admissions[-1], Admitted)
        assert admissions[-1].quota_state is not None
        assert admissions[-1].quota_state.used == (3,)

    run_scenario(any_store_url, scenario)
    now_s = int(server.time()[0])
    minutes = [KEYS.counter("design", "minute", window_of("minute", at_s, ZONE)) for at_s in (now_s, now_s - 60)]
    lasting = {
        KEYS.counter(team, per, window_of(per, now_s, ZONE)) for team in ("design", None) for per in BASE_PERIODS
    }
    (minute,) = set(hashes(server, "q:*")) - lasting
    assert minute in minutes
    assert list(hashes(server, "u:*")) == [KEYS.usage("design", day_of(now_s, ZONE))]


async def _away_from_edges() -> None:
    """Waits until the minute does not end within the next seconds."""
    left_s = 60 - time_ns() / 1e9 % 60
    if left_s < 3:
        await asyncio.sleep(left_s + 0.01)


def test_a_clock_that_never_agrees_with_the_stores_is_refused(
    any_store_url: str, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway's clock jumps at each reading."""
    hours = count(1)

    async def scenario(fixture: LedgerFixture) -> None:
        monkeypatch.setattr("proxy.quota.batches.time_ns", lambda: time_ns() + next(hours) * 10**9 * 3600)
        before = everything(server), calls(server)
        with pytest.raises(StoreUnavailable):
            await fixture.ledger.peek(terms(quota(1, per="hour")), None)
        assert (everything(server), calls(server)) == (before[0], before[1] + 2)
        for asked in (fixture.ledger.charge, lambda terms, _: fixture.ledger.admit(terms)):
            assert word(await asked(terms(quota(1, per="hour")), HIT)) == "store-unavailable"
        assert (everything(server), calls(server)) == (before[0], before[1] + 6)
        assert fixture.metric("unanswered_debits_total") == 0

    run_scenario(any_store_url, scenario)


def test_written_keys_expire(any_store_url: str, server: redis.Redis) -> None:
    pers: tuple[Period, ...] = ("minute", "hour", *BASE_PERIODS)
    limited = terms(*(quota(9, per=per) for per in pers), quota(9, per="hour", scope="org"), rate=Rate(0.01, 5))

    async def scenario(fixture: LedgerFixture) -> None:
        await fixture.ledger.charge(limited, HIT)
        await fixture.ledger.record_uncached(terms(team="film"), Outcome.NOT_CACHED)
        await fixture.ledger.settle(await fixture.admitted(limited), MISS)

    run_scenario(any_store_url, scenario)
    names: Any = server.keys("*")
    ends_ms = {name.decode(): int(server.pexpiretime(name)) for name in names}
    assert {name for name, end_ms in ends_ms.items() if end_ms == -1} == {
        *(KEYS.id, KEYS.models, KEYS.model_uses, KEYS.teams)
    }
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
