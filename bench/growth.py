"""How cost grows with body size, connections, teams and array items. A sudden jump would show here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log

from bench.cases import CASES, Case
from bench.gateways import GatewayVariant
from bench.parts import Pace, Part, Say, Table, Target
from bench.plot import Curve, Panel
from bench.rounds import Rounds, run_rounds
from bench.servers import Servers
from bench.table import cpu_us, notes, per_s
from bench.traffic import Traffic, by_turns, fresh, hot, items, sized, token

_STEEPEST = 1.1
"""CPU time that grows proportionally has an exponent of 1; a higher one is noise or a sudden jump."""

_SLOWEST_MISSES_PER_S = 50
"""Minimum number of answers per connection, if all are misses."""

_COLUMNS = ("req/s", "CPU µs", "p50 ms", "p99 ms")
_TITLES = {"bare": "bare route", "hit": "hit", "miss": "miss", "peer": "nginx + Lua"}
_DESIGN = token("design")

Vary = Callable[[Case, int], Case]


@dataclass(frozen=True, slots=True)
class Axis:
    """A variable that grows: `vary` changes the cases of `series` for each of these points."""

    title: str
    points: Sequence[int]
    series: Sequence[str]
    vary: Vary

    def cases(self, left_out: Sequence[str]) -> Iterator[Case]:
        cases_by_name = {case.name: case for case in CASES}
        for point in self.points:
            for name in self.series:
                if name not in left_out:
                    yield self.vary(cases_by_name[name], point)


def run(servers: Servers, pace: Pace, say: Say, *, with_peer: bool) -> tuple[Part, list[Panel]]:
    """Measures all axes, and returns the part and its plot."""
    left_out = [] if with_peer else ["peer"]
    found = {axis: run_rounds(servers, list(axis.cases(left_out)), pace, say) for axis in AXES}
    failures = {name: why for rounds in found.values() for name, why in rounds.failures.items()}
    part = Part(
        name="growth",
        how=pace.text(),
        tables=[_table(axis, rounds) for axis, rounds in found.items()],
        targets=[target for axis, rounds in found.items() for target in _targets(axis, rounds)],
        notes=[note for rounds in found.values() for note in notes(rounds)] if servers.workspace.cores.apart else (),
        failures=failures,
        raw={axis.title: rounds.raw() for axis, rounds in found.items()},
    )
    return part, [_panel(axis, rounds) for axis, rounds in found.items()]


def _named(case: Case, point: int) -> str:
    return f"{case.name} {point}"


def _of_size(case: Case, point: int) -> Case:
    return _with_body(case, point, lambda: sized(point))


def _of_items(case: Case, point: int) -> Case:
    return _with_body(case, point, lambda: items(point))


def _with_body(case: Case, point: int, body: Callable[[], bytes]) -> Case:
    def traffic() -> Traffic:
        return fresh(_DESIGN, body()) if case.name == "miss" else hot(_DESIGN, body())

    return case.at(_named(case, point), traffic=traffic, warm=None)


def _of_connections(case: Case, point: int) -> Case:
    least_s = point / _SLOWEST_MISSES_PER_S if case.name == "miss" else 0.0
    return case.at(_named(case, point), connections=point, least_s=least_s)


def _of_teams(case: Case, point: int) -> Case:
    teams = tuple(f"team-{number}" for number in range(1, point + 1))
    variant = GatewayVariant(f"teams-{point}", teams)
    return case.at(_named(case, point), site=lambda servers: servers.gateway(variant), traffic=lambda: by_turns(teams))


AXES: Sequence[Axis] = (
    Axis("body size, bytes", (200, 600, 2000, 6000, 20_000, 60_000, 200_000), tuple(_TITLES), _of_size),
    Axis("connections", (1, 4, 16, 64, 256, 1000), tuple(_TITLES), _of_connections),
    Axis("teams", (1, 10, 100, 500), ("hit",), _of_teams),
    Axis("items in the array", (1, 3, 10, 30, 100), tuple(_TITLES), _of_items),
)


def _curves(axis: Axis, found: Rounds) -> Mapping[str, list[tuple[int, float]]]:
    """Returns the CPU time per request at each point, by series."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for name in axis.series:
        names = [(point, f"{name} {point}") for point in axis.points]
        if points := [(point, found.of(case, cpu_us).median) for point, case in names if case in found]:
            curves[name] = points
    return curves


def _panel(axis: Axis, found: Rounds) -> Panel:
    curves = _curves(axis, found)
    return Panel(axis.title, "CPU µs a request", [Curve(_TITLES[name], points) for name, points in curves.items()])


def _table(axis: Axis, found: Rounds) -> Table:
    names = [(point, name, f"{name} {point}") for point in axis.points for name in axis.series]
    rows = [[f"{point:,}", _TITLES[name], *_cells(case, found)] for point, name, case in names if case in found]
    return Table(f"By {axis.title}", (axis.title, "case", *_COLUMNS), rows)


def _cells(case: str, found: Rounds) -> list[str]:
    return [
        found.of(case, per_s).text(),
        found.of(case, cpu_us).text(),
        found.of(case, lambda each: each.p50_ms).text(".2f"),
        found.of(case, lambda each: each.p99_ms).text(".2f"),
    ]


def _targets(axis: Axis, found: Rounds) -> Iterator[Target]:
    for name, points in _curves(axis, found).items():
        if name in ("hit", "miss") and len(points) > 1:
            steepest = max(log(y2 / y1) / log(x2 / x1) for (x1, y1), (x2, y2) in pairwise(points))
            text = f"{_TITLES[name]} by {axis.title}: steepest exponent of CPU time from point to point"
            yield Target(text, _STEEPEST, steepest, at_least=False)
