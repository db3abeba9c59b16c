"""Forecasts how much of a quota will be used when its week or month ends, and when its limit will be reached.

* The expected use of a day is a level times the factor of its weekday. The level is an exponentially weighted mean of
  the finished days. A factor compares one weekday with all days.
* Backtests correct it: the same rule is applied at each earlier day of the history, and the actual use after that day
  is divided by the expected one. The median of these ratios is the correction (it follows growth). The range goes from
  their 10th to their 90th percentile, and is widened if there are few independent ones.
* A day counts as at most `_PEAK` times the upper quartile, so that one spike does not change the forecast of other
  days. Days on which the quota was used up are unknown: they do not show what a team would have used.
* What is used so far counts in full, today included. Only the remaining time of today is forecast.

`bench/forecast.py` measures the errors and how often the range holds. The constants were chosen with it.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta, tzinfo
from functools import lru_cache
from itertools import accumulate, dropwhile, pairwise
from operator import mul

from proxy.quota.quotas import Quota
from proxy.quota.windows import Period, Window, day_of, start_of

HISTORY_DAYS = 90
"""The finished days that a forecast is made from."""

LOOKBACK_DAYS = HISTORY_DAYS + 31
"""The finished days to read: those before the history only show whether the quota of its first month was used up."""

MIN_DAYS = 14
"""The finished days, counted from the first with any use, that a forecast needs."""

FORECAST_PERIODS: tuple[Period, ...] = ("week", "month")

_DECAY = 0.5 ** (1 / 10)
"""The weight of each day relative to the next: half as much ten days earlier."""

_PRIOR_DAYS = 1
"""A day of average use is added to each weekday, so that one or two days do not make an extreme factor."""

_PEAK = 3
"""A day counts as at most this many times the upper quartile of the days with use."""

_USED_UP = 0.95
"""The share from which a quota refuses what is dear, if not yet everything."""

_LEARNING_DAYS = 7
"""The days before the first backtest, each weekday once; and the known days without which unknown ones count too."""

_WIDENING = 1.2
_CAUTION = 0.5
"""Backtests overlap: each counts as one divided by the days that it tests. The fewer there are in this sense, the wider
the range is than their deciles, and the less their median corrects."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Use at the end of the window in requests or micro-credits, and when the limit is reached, in seconds since 1970.

    at_end, low, high: the expected use and its range, in whole requests, or rounded up to whole credits. The limit does
    not cap them: they are what would be used if the quota did not refuse.
    reached_at_s, reached_from_s, reached_until_s: the expected, earliest and latest time; None: not in this window.
    If the limit has been reached, from and until are the edges of that day.
    """

    at_end: int
    low: int
    high: int
    reached_at_s: int | None
    reached_from_s: int | None
    reached_until_s: int | None
    method: str

    @property
    def reached_s(self) -> tuple[int | None, int | None, int | None]:
        """The expected, earliest and latest time."""
        return self.reached_at_s, self.reached_from_s, self.reached_until_s


Forecasts = Mapping[tuple[str, Quota], Forecast]
"""By the owner of a quota (`Quota.owner`), and the quota."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A day, or the part of it that is in a window. `share`: its length relative to the whole day."""

    day: date
    window: Window
    share: float


@dataclass(frozen=True, slots=True)
class _State:
    """What a history says up to a day: the expected use of each weekday, how often each was known, and all use."""

    by_weekday: Sequence[float]
    counts: Sequence[int]
    total: float


@dataclass(frozen=True, slots=True)
class _Pattern:
    """The expected use of each weekday, and the factors by which `tests` backtests correct and limit it."""

    by_weekday: Sequence[float]
    low: float
    correction: float
    high: float
    tests: int


def forecast(
    quota: Quota, used: int, history: Sequence[int], *, window: Window, now_s: int, zone: tzinfo
) -> Forecast | None:
    """The forecast of a quota; None for short windows, for too little history, or if nothing was used.

    used: in the window, until now.
    history: what was used on each of the last `LOOKBACK_DAYS` finished days in the zone, the day before `now_s` last.
    """
    today = day_of(now_s, zone)
    seen = tuple(dropwhile(lambda amount: amount == 0, history[-HISTORY_DAYS:]))
    if quota.per not in FORECAST_PERIODS or len(seen) < MIN_DAYS:
        return None
    first = today - timedelta(days=len(seen))
    wanted = tuple(_wanted(quota, history, today - timedelta(days=len(history))))[-len(seen) :]
    is_known_enough = len(seen) - wanted.count(None) >= _LEARNING_DAYS
    ahead = _parts(Window(now_s, window.end_s), zone)
    pattern = _pattern_of(wanted if is_known_enough else seen, first.weekday(), len(ahead))
    method = f"weekday means of {len(seen)} days, corrected by {pattern.tests} backtests"
    expected = [pattern.by_weekday[part.day.weekday()] * part.share for part in ahead]
    rest, unit = sum(expected), quota.unit
    ratios = (pattern.correction, pattern.low, pattern.high)
    at_end, low, high = (-(-(used + round(rest * ratio)) // unit) * unit for ratio in ratios)
    if used < quota.limit:
        at_s, until_s, from_s = (
            _reached(quota.limit - used, ahead, [amount * ratio for amount in expected])[0] for ratio in ratios
        )
    else:
        past = _parts(Window(window.start_s, now_s + 1), zone)
        finished = {first + timedelta(days=number): amount for number, amount in enumerate(seen)}
        amounts = [finished.get(part.day, 0) for part in past[:-1]]
        at_s, from_s, until_s = _reached(quota.limit, past, [*amounts, max(0, used - sum(amounts))])
    return Forecast(at_end, low, high, at_s, from_s, until_s, method)


@lru_cache(maxsize=8)  # the quotas of one report have few windows
def _parts(window: Window, zone: tzinfo) -> tuple[_Part, ...]:
    """The window, day by day. Days that a zone skipped are not in it."""
    first = day_of(window.start_s, zone)
    starts = [(day, start_of(day, zone)) for day in (first + timedelta(days=number) for number in range(33))]
    found = (
        (day, Window(max(start_s, window.start_s), min(end_s, window.end_s)), end_s - start_s)
        for (day, start_s), (_, end_s) in pairwise(starts)
    )
    return tuple(
        _Part(day, part, (part.end_s - part.start_s) / length_s)
        for day, part, length_s in found
        if part.start_s < part.end_s
    )


def _reached(
    limit: float, parts: Sequence[_Part], amounts: Iterable[float]
) -> tuple[int, int, int] | tuple[None, None, None]:
    """When the amounts add up to the limit, and the start and end of that part."""
    sums = [0.0, *accumulate(amounts)]
    index = bisect_left(sums, limit, lo=1)
    if index == len(sums):
        return None, None, None
    window, amount = parts[index - 1].window, sums[index] - sums[index - 1]
    share = (limit - sums[index - 1]) / amount if limit else 0
    return window.start_s + round(share * (window.end_s - window.start_s)), window.start_s, window.end_s


def _wanted(quota: Quota, amounts: Iterable[int], first: date) -> Iterator[int | None]:
    """The amounts of the days from `first`; None for a day on which this quota was used up, and refused the rest."""
    used, day = 0, first
    for amount in amounts:
        begins = day.day == 1 if quota.per == "month" else day.weekday() == 0
        used = amount if begins else used + amount
        yield None if quota.refuse and used >= _USED_UP * quota.limit else amount
        day += timedelta(days=1)


@lru_cache(maxsize=512)  # the history changes once a day
def _pattern_of(wanted: tuple[int | None, ...], first_weekday: int, days_ahead: int) -> _Pattern:
    """The pattern of a history, tested over as many days as are ahead."""
    states = list(_states(_without_peaks(wanted), first_weekday))
    tested_days = max(1, min(days_ahead, (len(wanted) - _LEARNING_DAYS) // 2))
    tests = zip(states[_LEARNING_DAYS:], states[_LEARNING_DAYS + tested_days :], strict=False)
    ratios = [ratio for before, after in tests if (ratio := _ratio(before, after)) is not None]
    low, median, high = (_quantile(ratios or [1.0], place) for place in (0.1, 0.5, 0.9))
    independent = max(1, len(ratios)) / tested_days
    correction = 1 + (median - 1) * independent / (independent + _CAUTION)
    widening = 1 + _WIDENING / independent
    low, high = max(0.0, correction - (median - low) * widening), correction + (high - median) * widening
    return _Pattern(states[-1].by_weekday, low, correction, high, len(ratios))


def _states(amounts: Iterable[float | None], first_weekday: int) -> Iterator[_State]:
    """The state before each day, and after the last: before one more, of which nothing is known."""
    sums, counts = [0.0] * 7, [0] * 7
    recent_sum, recent_counts = 0.0, [0.0] * 7  # exponentially weighted
    for number, amount in enumerate((*amounts, None)):
        yield _State(_by_weekday(sums, counts, recent_sum, recent_counts), tuple(counts), sum(sums))
        weekday = (first_weekday + number) % 7
        recent_sum *= _DECAY
        recent_counts = [count * _DECAY for count in recent_counts]
        if amount is not None:
            sums[weekday] += amount
            counts[weekday] += 1
            recent_sum += amount
            recent_counts[weekday] += 1


def _by_weekday(
    sums: Sequence[float], counts: Sequence[int], recent_sum: float, recent_counts: Sequence[float]
) -> list[float]:
    """The expected use of each weekday: its factor times the level."""
    total = sum(sums)
    if total == 0:
        return [0.0] * 7
    prior = _PRIOR_DAYS * total / sum(counts)
    factors = [(amount + prior) / (count + _PRIOR_DAYS) for amount, count in zip(sums, counts, strict=True)]
    level = recent_sum / sum(map(mul, recent_counts, factors))
    return [level * factor for factor in factors]


def _without_peaks(amounts: Sequence[int | None]) -> list[float | None]:
    highest = _PEAK * _quantile([amount for amount in amounts if amount] or [0], 0.75)
    return [None if amount is None else min(amount, highest) for amount in amounts]


def _ratio(before: _State, after: _State) -> float | None:
    """Used to expected on the known days between two states; None if nothing was expected."""
    counts = [later - earlier for earlier, later in zip(before.counts, after.counts, strict=True)]
    expected = sum(map(mul, before.by_weekday, counts))
    return (after.total - before.total) / expected if expected > 0 else None


def _quantile(values: Iterable[float], place: float) -> float:
    """Interpolated between the two nearest values."""
    ordered = sorted(values)
    index, part = divmod(place * (len(ordered) - 1), 1)
    low, high = ordered[int(index)], ordered[min(int(index) + 1, len(ordered) - 1)]
    return low + (high - low) * part
