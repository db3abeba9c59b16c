"""Invented usage of the last 60 days in the demo's ledger, so that charts and forecasts have something to show.

It has usage rows, and counters of the current week and month that agree with them. Apart from the dates it is the same
in every demo. Today has only the usage of the live traffic.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random
from typing import Final
from zoneinfo import ZoneInfo

import redis

from proxy.quota.counters import COUNTER_KEPT_S, USAGE_KEPT_DAYS, LedgerKeys
from proxy.quota.credits import MICRO
from proxy.quota.windows import Period, day_of, start_of, window_of

DAYS: Final = 60

_UPSTREAM_US: Final = 155_000
"""How long the simulated RenderNet takes to answer, on average."""

_SATURDAY: Final = 5
_RUNNING: Final[tuple[Period, ...]] = ("week", "month")


@dataclass(frozen=True, slots=True)
class _Habit:
    """How a team uses the gateway.

    requests: on a working day. growth: from day to day, 1 for none. prices: credits of an estimate, by model.
    """

    requests: int
    weekend_share: float
    growth: float
    noise: float
    hit_share: float
    prices: Mapping[str, float]


_HABITS: Final = {
    "design": _Habit(1500, 0.1, 1.01, 0.15, 0.7, {"JuggernautXL": 2, "Flux": 2.75, "RealVisXL_V3.0_Turbo": 1.5}),
    "marketing": _Habit(350, 0.3, 1.0, 0.25, 0.5, {"Flux": 2.75, "narrator": 8, "JuggernautXL": 2}),
    "video": _Habit(80, 0.05, 0.995, 0.4, 0.35, {"video_anyone": 30, "narrator": 8}),
}


def past_usage(today: date) -> Iterator[tuple[str, date, dict[str, int]]]:
    """Team, day and the fields of the usage row (see `proxy.quota.counters.split_usage_field`)."""
    for team, habit in _HABITS.items():
        random = Random(team)  # noqa: S311 -- no secret
        for age in range(DAYS, 0, -1):
            day = today - timedelta(days=age)
            usual = habit.requests * (habit.weekend_share if day.weekday() >= _SATURDAY else 1) / habit.growth**age
            yield team, day, _row(habit, 1 + int(usual * random.lognormvariate(0, habit.noise)))


def _row(habit: _Habit, requests: int) -> dict[str, int]:
    """A day's requests, of which the first model has half, the second a quarter, and so on."""
    fields = {"-:upstream-error:requests": requests // 100, "-:rate-limited:refused": requests // 50}
    left = requests
    for model, price in habit.prices.items():
        asked = (left + 1) // 2
        left -= asked
        hits = int(asked * habit.hit_share)
        for outcome, answered in (("hit", hits), ("miss", asked - hits)):
            fields[f"{model}:{outcome}:requests"] = answered
            fields[f"{model}:{outcome}:credits"] = answered * int(price * MICRO)
    return fields


def put_past_usage(ledger_url: str, keys: LedgerKeys, now_s: int, zone: ZoneInfo) -> None:
    """Adds the usage to a new ledger."""
    rows: dict[tuple[str, int], dict[str, int]] = {}
    sums: defaultdict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    windows = {per: window_of(per, now_s, zone) for per in _RUNNING}
    for team, day, fields in past_usage(day_of(now_s, zone)):
        expires_s = start_of(day + timedelta(days=1 + USAGE_KEPT_DAYS), zone)
        rows[keys.usage(team, day), expires_s] = fields
        asked = sum(amount for name, amount in fields.items() if name.endswith(":miss:requests"))
        sums[keys.upstream(day), expires_s].update(calls=asked, us=asked * _UPSTREAM_US)
        for per, window in windows.items():
            if start_of(day, zone) in window:
                for owner in (team, None):
                    counter = keys.counter(owner, per, window), window.end_s + COUNTER_KEPT_S
                    sums[counter].update(_counted(fields))
    with redis.Redis.from_url(ledger_url) as store, store.pipeline(transaction=False) as pipeline:
        for (key, expires_s), fields in (rows | sums).items():
            pipeline.hset(key, mapping=dict(fields.items()))
            pipeline.expireat(key, expires_s)
        pipeline.sadd(keys.teams, *_HABITS)
        pipeline.execute()


def _counted(fields: Mapping[str, int]) -> Counter[str]:
    """What a row adds to the counters of quotas: requests and credits."""
    sums = Counter[str]()
    for name, amount in fields.items():
        measure = name.rpartition(":")[2]
        if measure != "refused":
            sums[measure] += amount
    return sums
