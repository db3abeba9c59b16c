"""Formats tables: aligned for people on a terminal, tab-separated with stable columns for programs.

A table never breaks a word or number to fit the terminal. It leaves out the columns that do not fit, and names them
under the table. Only an id that is wider than the whole terminal is broken.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from zoneinfo import ZoneInfo

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_NAME_WIDTH = 24
"""A team's name that is longer is wrapped between its words, so that it leaves room for amounts."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a terminal table. Those of the highest `rank` are left out first; 0 is always shown."""

    header: str
    cells: Sequence[str]
    rank: int = 0
    total: str = ""
    is_text: bool = False
    wraps: bool = False

    def width(self, *, wrapped: bool) -> int:
        """Terminal columns that it needs without breaking a word. `wrapped`: with wrapped header and, if so, cells."""
        header = _longest_word(self.header) if wrapped else cell_len(self.header)
        cells = [self._cell_width(cell, wrapped=wrapped) for cell in (*self.cells, self.total)]
        return max(header, *cells)

    def _cell_width(self, cell: str, *, wrapped: bool) -> int:
        wraps = self.wraps and wrapped
        return min(cell_len(cell), max(_NAME_WIDTH, _longest_word(cell))) if wraps else cell_len(cell)


def to_tsv(lines: Iterable[Sequence[str]]) -> str:
    return "".join("\t".join(cells) + "\n" for cells in lines)


def print_table(title: str, columns: Sequence[Column]) -> None:
    """Prints the columns that fit into the terminal, and the names of the others."""
    console = Console()
    wrapped = _width_of(columns, wrapped=False) > console.width
    shown = _fitting(columns, console.width) if wrapped else list(columns)
    table = Table(show_footer=any(column.total for column in columns), box=None, collapse_padding=True, pad_edge=False)
    for column in shown:
        table.add_column(
            Text(column.header),
            Text(column.total),
            justify="left" if column.is_text else "right",
            overflow="fold",
            width=None if column.rank == 0 and column.is_text and not column.wraps else column.width(wrapped=wrapped),
        )
    for cells in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*map(Text, cells))
    console.print(Text(title))
    console.print(table)
    if hidden := [column.header for column in columns if column not in shown]:
        console.print(Text(f"Not shown, for lack of width: {', '.join(hidden)}."))


def name_columns(names: Sequence[str], rank: int) -> list[Column]:
    """The column of teams' names; none if no team has a name."""
    return [Column("name", names, rank, is_text=True, wraps=True)] if any(names) else []


def moment(at_s: int, zone: ZoneInfo) -> str:
    """Day and time, to the minute; the day alone if that is when it begins."""
    return f"{datetime.fromtimestamp(at_s, zone):%Y-%m-%d %H:%M}".removesuffix(" 00:00")


def _fitting(columns: Sequence[Column], width: int) -> list[Column]:
    shown = [column for column in columns if column.rank == 0]
    for column in sorted(columns, key=lambda column: column.rank):
        if column.rank > 0 and _width_of([*shown, column], wrapped=True) <= width:
            shown.append(column)
    return [column for column in columns if column in shown]


def _width_of(columns: Sequence[Column], *, wrapped: bool) -> int:
    """With one space between columns."""
    return sum(column.width(wrapped=wrapped) + 1 for column in columns) - 1


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)
