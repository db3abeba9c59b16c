"""Measures forecasts on made-up usage: `python -m bench.forecast` prints a table, `--help` the options.

Each case is a month with its history, in one of the shapes below, whose parameters are random: the amount, the noise of
each day, the weekdays. The forecast is made at the end of the given day of the month. The constants of
`proxy/quota/forecast.py` were chosen with other seeds than the one that is used here by default.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from math import exp
from random import Random
from statistics import median
from zoneinfo import ZoneInfo

import click

from proxy.quota.credits import MICRO
from proxy.quota.forecast import HISTORY_DAYS, Forecast, forecast
from proxy.quota.quotas import Quota
from proxy.quota.windows import day_of, start_of, window_of

ZONE = ZoneInfo("Europe/Berlin")
CHECK_SEED = 2026

Shape = Callable[[Random, int], list[float]]
"""Daily amounts, of which the first is a Monday's and the last is the last day of the month."""


def steady(random: Random, days: int) -> list[float]:
    noise = random.uniform(0.15, 0.5)
    return [random.lognormvariate(0, noise) for _ in range(days)]


def weekly(random: Random, days: int) -> list[float]:
    """Five days of work, of different amounts, and weekends with little or nothing."""
    factors = [random.uniform(0.8, 1.3) for _ in range(5)] + [random.uniform(0, 0.3) for _ in range(2)]
    return [amount * factors[number % 7] for number, amount in enumerate(steady(random, days))]


def growth(random: Random, days: int) -> list[float]:
    """5 to 60 % more each month, with the weekly rhythm."""
    per_day = random.uniform(1.05, 1.6) ** (1 / 30)
    return [amount * per_day**number for number, amount in enumerate(weekly(random, days))]


def decline(random: Random, days: int) -> list[float]:
    """5 to 30 % less each month."""
    per_day = random.uniform(0.7, 0.95) ** (1 / 30)
    return [amount * per_day**number for number, amount in enumerate(weekly(random, days))]


def drift(random: Random, days: int) -> list[float]:
    """A level that wanders by 4 % a day, with the weekly rhythm."""
    level, amounts = 0.0, []
    for amount in weekly(random, days):
        level += random.gauss(0, 0.04)
        amounts.append(amount * exp(level))
    return amounts


def spike(random: Random, days: int) -> list[float]:
    """One day in the last weeks before the forecast has ten times its amount."""
    amounts = weekly(random, days)
    amounts[-min(days, random.randrange(22, 45))] *= 10
    return amounts


def step(random: Random, days: int) -> list[float]:
    """In the last weeks before the forecast, use halves, doubles or trebles, and stays so."""
    amounts, begin, factor = weekly(random, days), days - random.randrange(22, 60), random.choice((0.5, 2, 3))
    return [amount * factor if number >= begin else amount for number, amount in enumerate(amounts)]


def stop(random: Random, days: int) -> list[float]:
    """A week before the forecast of day 10, use ends."""
    return [*weekly(random, days - 27), *[0.0] * 27]


REQUIRED: tuple[Shape, ...] = (steady, weekly, growth)
OTHERS: tuple[Shape, ...] = (decline, drift, spike, step, stop)


@dataclass(frozen=True, slots=True)
class Result:
    """How far the forecast was off, as a share of the month's end; whether its range, and that of the date, held."""

    error: float
    held: bool
    date_held: bool


@dataclass(frozen=True, slots=True)
class Summary:
    median_error: float
    held: float
    dates_held: float


def measure(shape: Shape, *, seed: int, cases: int, day: int = 10, history: int = HISTORY_DAYS) -> Summary:
    random = Random(f"{shape.__name__} {seed}")
    results = [_case(shape, random, day=day, history=history) for _ in range(cases)]
    return Summary(
        median(result.error for result in results),
        sum(result.held for result in results) / cases,
        sum(result.date_held for result in results) / cases,
    )


def _case(shape: Shape, random: Random, *, day: int, history: int) -> Result:
    first = date(random.randrange(2024, 2028), random.randrange(1, 13), 1)
    now_s = start_of(first + timedelta(days=day), ZONE)
    window = window_of("month", now_s, ZONE)
    last = day_of(window.end_s - 1, ZONE)
    begin = first + timedelta(days=day - history)
    monday = begin - timedelta(days=begin.weekday())
    size = 10 ** random.uniform(2, 5) * MICRO
    amounts = [int(amount * size) for amount in shape(random, (last - monday).days + 1)][(begin - monday).days :]
    used, end = sum(amounts[history - day : history]), sum(amounts[history - day :])
    quota = Quota(
        "team", "estimated_credits", "month", int(used + random.uniform(0.1, 1.3) * (end - used)) + 1, refuse=False
    )
    found = forecast(quota, used, amounts[:history], window=window, now_s=now_s, zone=ZONE)
    assert found is not None
    reached_s = _reached_s(quota.limit, amounts[history - day :], first)
    return Result(abs(found.at_end - end) / end, found.low <= end <= found.high, _contains(found, reached_s))


def _reached_s(limit: int, amounts: Sequence[int], first: date) -> tuple[int, int] | None:
    """The start and end of the day on which the limit was reached; None if it was not."""
    sums = 0
    for number, amount in enumerate(amounts):
        sums += amount
        if sums >= limit:
            day = first + timedelta(days=number)
            return start_of(day, ZONE), start_of(day + timedelta(days=1), ZONE)
    return None


def _contains(found: Forecast, reached_s: tuple[int, int] | None) -> bool:
    """Whether the limit was reached on a day of the range, or was not, and the forecast allowed that."""
    if reached_s is None:
        return found.reached_until_s is None
    start_s, end_s = reached_s
    until_s = found.reached_until_s
    return found.reached_from_s is not None and found.reached_from_s < end_s and (until_s is None or until_s >= start_s)


def _lines(seed: int, cases: int, day: int, history: int) -> Iterator[str]:
    yield "| usage | median error of the month's end | range holds | range of the date holds |"
    yield "|---|---|---|---|"
    for shape in (*REQUIRED, *OTHERS):
        found = measure(shape, seed=seed, cases=cases, day=day, history=history)
        yield f"| {shape.__name__} | {found.median_error:.1%} | {found.held:.0%} | {found.dates_held:.0%} |"


@click.command()
@click.option("--seed", default=CHECK_SEED, show_default=True)
@click.option("--cases", type=click.IntRange(1), default=400, show_default=True, help="Of each shape.")
@click.option("--day", type=click.IntRange(1, 27), default=10, show_default=True, help="Finished days of the month.")
@click.option("--history", type=click.IntRange(14, HISTORY_DAYS), default=HISTORY_DAYS, show_default=True)
def main(seed: int, cases: int, day: int, history: int) -> None:
    """Print a table of how good forecasts of a month are, by the shape of the usage."""
    for line in _lines(seed, cases, day, history):
        click.echo(line)


if __name__ == "__main__":
    main()
