"""The results of a run: parts with tables, targets and raw numbers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Pace:
    """The number of rounds, and the duration of each measurement."""

    rounds: int
    seconds: float

    def text(self) -> str:
        rounds = "one round" if self.rounds == 1 else f"medians of {self.rounds} rounds"
        return f"{rounds} of {self.seconds:g} s a case"


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, minimum and maximum of a number over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> "Spread":
        values = list(numbers)
        return cls(median(values), min(values), max(values))

    def times(self, factor: float) -> "Spread":
        return Spread(self.median * factor, self.least * factor, self.most * factor)

    def text(self, form: str = ",.0f") -> str:
        return f"{self.median:{form}}"

    def range(self, form: str = ",.0f") -> str:
        return f"{self.least:{form}} to {self.most:{form}}"


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Target:
    """A bound, and the measured value.

    spread: over the rounds, if there are any.
    by_cpu: the same ratio, by CPU time per request instead of throughput. Other work on the machine affects it less.
    """

    text: str
    bound: float
    measured: float
    at_least: bool = True
    form: str = ".2f"
    spread: Spread | None = None
    by_cpu: float | None = None

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def cells(self) -> list[str]:
        between = self.spread.range(self.form) if self.spread else ""
        by_cpu = "" if self.by_cpu is None else f"{self.by_cpu:{self.form}}"
        bound = f"{'≥' if self.at_least else '≤'} {self.bound:g}"
        return [self.text, bound, f"{self.measured:{self.form}}", "yes" if self.met else "no", between, by_cpu]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the results. `name`: of its option and its markers in the docs. `raw`: for the JSON.

    failures: by name of a case, why it has no numbers.
    """

    name: str
    how: str
    tables: Sequence[Table]
    targets: Sequence[Target] = ()
    notes: Sequence[str] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    raw: Any = None

    def all_tables(self) -> list[Table]:
        """Returns its tables, and its targets as a table."""
        if not self.targets:
            return list(self.tables)
        columns = ("target", "bound", "measured", "met", "rounds", "by CPU")
        return [Table("Targets", columns, [target.cells() for target in self.targets]), *self.tables]


Say = Callable[[str], None]
"""Shows progress."""
