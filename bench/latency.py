"""Latency at rates below the server's limit: how much a hit adds to the bare route, and its tail.

The load is the bench's own, at a fixed rate; a request's latency counts from its scheduled time.
"""

from dataclasses import asdict

from bench.cases import CASES, Case
from bench.measuring import Measured, measure, prepare
from bench.parts import Pace, Part, Say, Spread, Table, Target
from bench.servers import Servers

RATE = 1000.0
PEAK, HALF = "hit, peak", "hit at half its peak"
_COLUMNS = ("case", "req/s", "p50 ms", "rounds", "p99 ms", "rounds", "CPU µs")
_ADDED_MS = 0.4
_TAIL = 3.0

Series = dict[str, list[Measured]]


def run(servers: Servers, pace: Pace, say: Say, *, with_peer: bool) -> Part:
    names = ["bare", "hit", *["peer"] * with_peer]
    cases = {case.name: case for case in CASES if case.name in names}
    for name in names:
        say(f"preparing: {name}")
        prepare(servers, cases[name])
    found: Series = {title: [] for title in (*(_at_rate(name) for name in names), PEAK, HALF)}
    for number in range(1, pace.rounds + 1):
        say(f"latency, round {number} of {pace.rounds}")
        for name in names:
            found[_at_rate(name)].append(measure(servers, cases[name], pace.seconds, rate=RATE))
        _half_of_peak(servers, cases["hit"], pace, found)
    return Part(
        name="latency",
        how=f"{pace.text()}, load at a rate by the bench's own loader on {cases['hit'].connections} connections",
        tables=[Table("Latency", _COLUMNS, [_row(title, series) for title, series in found.items()])],
        targets=_targets(found),
        raw={title: [asdict(each) for each in series] for title, series in found.items()},
    )


def _at_rate(name: str) -> str:
    return f"{name} at {RATE:,.0f}/s"


def _half_of_peak(servers: Servers, hit: Case, pace: Pace, found: Series) -> None:
    peak = measure(servers, hit, pace.seconds)
    found[PEAK].append(peak)
    half = measure(servers, hit.at(HALF), pace.seconds, rate=peak.per_s / 2)
    found[HALF].append(half)


def _row(title: str, series: list[Measured]) -> list[str]:
    p50, p99 = Spread.of(each.p50_ms for each in series), Spread.of(each.p99_ms for each in series)
    return [
        title,
        Spread.of(each.per_s for each in series).text(),
        p50.text(".2f"),
        p50.range(".2f"),
        p99.text(".2f"),
        p99.range(".2f"),
        Spread.of(each.cpu_us for each in series).text(),
    ]


def _targets(found: Series) -> list[Target]:
    bare, hit = found[_at_rate("bare")], found[_at_rate("hit")]
    added = Spread.of(theirs.p50_ms - ours.p50_ms for theirs, ours in zip(hit, bare, strict=True))
    tail = Spread.of(each.p99_ms / each.p50_ms for each in found[HALF])
    return [
        Target(f"p50 that a hit adds at {RATE:,.0f}/s, ms", _ADDED_MS, added.median, at_least=False, spread=added),
        Target("p99 ÷ p50 of a hit at half its peak", _TAIL, tail.median, at_least=False, spread=tail),
    ]
