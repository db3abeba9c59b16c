"""The main table: every case next to the bare route, and the targets for ratios of throughput."""

from collections.abc import Sequence

from bench.cases import Case
from bench.measuring import Measured
from bench.parts import Pace, Part, Say, Spread, Table, Target
from bench.rounds import Rounds, run_rounds
from bench.servers import Servers

BARE = "bare"
COLUMNS = (
    "case",
    "req/s",
    "rounds",
    "÷ bare",
    "p50 ms",
    "p99 ms",
    "CPU µs",
    "CPU ÷ bare",
    "core",
    "others",
    "µs a script",
    "µs an admission",
)

_RATIOS = (
    ("hot hit ÷ bare Starlette route", "hit", BARE, 0.70),
    ("hot hit ÷ nginx + Lua", "hit", "peer", 1.0),
    ("Zipf hit ÷ hot hit", "zipf", "hit", 0.85),
    ("401 ÷ hot hit", "401", "hit", 1.0),
    ("402 ÷ hot hit", "402", "hit", 1.0),
    ("429 ÷ hot hit", "429", "hit", 1.0),
    ("miss ÷ bare httpx2 proxy route", "miss", "forward", 2.0),
)
_ADMISSION_US = 10.0

NAMED = 6
"""Maximum number of cases that a note names."""

DISTURBING = 0.05
BUSY = 0.90
"""Shares of the servers' cores."""


def run(servers: Servers, cases: Sequence[Case], pace: Pace, say: Say) -> Part:
    found = run_rounds(servers, cases, pace, say)
    rows = [_row(case, found) for case in cases if case.name in found]
    return Part(
        name="table",
        how=f"{pace.text()}, {cases[0].connections} connections",
        tables=[Table("Results", COLUMNS, rows)],
        targets=_targets(found),
        notes=notes(found) if servers.workspace.cores.apart else (),
        failures=found.failures,
        raw=found.raw(),
    )


def per_s(measured: Measured) -> float:
    return measured.per_s


def cpu_us(measured: Measured) -> float:
    return measured.cpu_us


def _row(case: Case, found: Rounds) -> list[str]:
    name = case.name
    speed = found.of(name, per_s)
    return [
        f"{name}: {case.title}",
        speed.text(),
        speed.range(),
        _text(found.ratio(name, BARE, per_s), ".2f"),
        found.of(name, lambda each: each.p50_ms).text(".2f"),
        found.of(name, lambda each: each.p99_ms).text(".2f"),
        found.of(name, cpu_us).text(),
        _text(found.ratio(name, BARE, cpu_us), ".2f"),
        found.of(name, lambda each: each.busy).text(".0%"),
        found.of(name, lambda each: each.others).text(".0%"),
        _text(found.maybe(name, lambda each: each.script_us), ".0f"),
        _text(found.maybe(name, lambda each: each.admission_us), ".1f"),
    ]


def _text(spread: Spread | None, form: str) -> str:
    return spread.text(form) if spread else "-"


def notes(found: Rounds) -> list[str]:
    """Returns notes on the reliability of the numbers, for servers with their own cores."""
    names = found.rounds[0]
    disturbed = [name for name in names if found.of(name, lambda each: each.others).median > DISTURBING]
    idle = [name for name in names if found.of(name, lambda each: each.busy + each.others).median < BUSY]
    lines = []
    if disturbed:
        lines.append(
            f"Something else took more than {DISTURBING:.0%} of the servers' cores in {_named(disturbed)}: "
            "alone they would be faster. Ratios by CPU time suffer less."
        )
    if idle:
        lines.append(
            f"The servers' cores had time left in {_named(idle)}: load, store or upstream was the limit, and the "
            "server could do more. Ratios by CPU time say how much."
        )
    return lines


def _named(cases: Sequence[str]) -> str:
    return ", ".join(cases) if len(cases) <= NAMED else f"{len(cases)} cases"


def _targets(found: Rounds) -> list[Target]:
    targets = []
    for text, case, other, bound in _RATIOS:
        if (ratio := found.ratio(case, other, per_s)) is not None:
            by_cpu = found.ratio(other, case, cpu_us)
            targets.append(Target(text, bound, ratio.median, spread=ratio, by_cpu=by_cpu.median if by_cpu else None))
    if "hit" in found and (spent := found.maybe("hit", lambda each: each.admission_us)):
        text = "ledger script, µs an admission, hot hit"
        targets.append(Target(text, _ADMISSION_US, spent.median, at_least=False, form=".1f", spread=spent))
    return targets
