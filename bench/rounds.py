"""Runs the cases in turn, over several rounds, so that compared numbers are measured within seconds of each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from bench.cases import Case
from bench.children import BenchError
from bench.measuring import Measured, measure, prepare
from bench.parts import Pace, Say, Spread
from bench.servers import Servers

Round = Mapping[str, Measured]
"""Results by name of the case."""


class Rounds:
    """The results of the rounds. Ratios are computed within each round, then their median.

    A case that failed once is in none of the rounds; `failures` has the reason.
    """

    def __init__(self, rounds: Sequence[Round], failures: Mapping[str, str]) -> None:
        self.rounds = [{name: each[name] for name in each if name not in failures} for each in rounds]
        self.failures = failures

    def __contains__(self, case: object) -> bool:
        return case in self.rounds[0]

    def of(self, case: str, number: Callable[[Measured], float]) -> Spread:
        return Spread.of(number(each[case]) for each in self.rounds)

    def maybe(self, case: str, number: Callable[[Measured], float | None]) -> Spread | None:
        """Like `of`, for a number that some rounds lack."""
        values = [found for each in self.rounds if (found := number(each[case])) is not None]
        return Spread.of(values) if values else None

    def ratio(self, case: str, other: str, number: Callable[[Measured], float]) -> Spread | None:
        """Returns the ratio of `case` to `other`, None unless both were measured."""
        if case not in self or other not in self:
            return None
        return Spread.of(number(each[case]) / number(each[other]) for each in self.rounds)

    def raw(self) -> list[dict[str, Any]]:
        return [{name: asdict(measured) for name, measured in each.items()} for each in self.rounds]


def run_rounds(servers: Servers, cases: Sequence[Case], pace: Pace, say: Say) -> Rounds:
    """Runs the rounds; a case whose answers are wrong is left out."""
    found: list[dict[str, Measured]] = [{} for _ in range(pace.rounds)]
    failures: dict[str, str] = {}

    def attempt(case: Case, what: str, work: Callable[[], None]) -> None:
        if case.name not in failures:
            say(f"{what}: {case.name}")
            try:
                work()
            except BenchError as error:
                failures[case.name] = str(error)

    def measure_in(number: int, case: Case) -> None:
        found[number][case.name] = measure(servers, case, pace.seconds)

    for case in cases:
        attempt(case, "preparing", partial(prepare, servers, case))
    for number in range(pace.rounds):
        for case in cases:
            attempt(case, f"round {number + 1} of {pace.rounds}", partial(measure_in, number, case))
    return Rounds(found, failures)
