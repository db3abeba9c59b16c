"""Formats tables: aligned for people on a terminal, tab-separated with stable columns for programs.

A table never breaks a word or number to fit the terminal. It leaves out the columns that do not fit, and names them
under the table. Only an id that is wider than the whole terminal is broken.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from zoneinfo import ZoneInfo

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxy.learning.evidence import Scope
from proxy.learning.report import percent_below
from proxy.problems import NO_NAME
from proxy.quota.credits import Currency
from proxy.quota.forecast import Forecasts
from proxy.quota.price_changes import PriceChange
from proxy.quota.quota_report import QuotaUse, quota_uses, reached_text
from proxy.quota.quotas import QuotaState
from proxy.quota.report_queries import UsageQuery
from proxy.quota.team_directory import TeamDirectory
from proxy.quota.usage import Usage
from proxy.quota.usage_report import amounts_of, share_of
from proxy.quota.windows import rfc3339
from proxy.settings.schema import UNLABELLED_CHARACTERS

_NAME_WIDTH = 24
"""A team's name that is longer is wrapped between its words, so that it leaves room for amounts."""

LEARNED_COLUMNS = (
    *("account", "scope", "state", "tests", "tests_needed", "fewer_than_percent", "asked", "answered"),
    *("would_have_answered", "would_have_been_wrong", "audits", "contradictions", "suspect_answers", "items"),
    *("left_out", "counting", "team", "last_asked"),
)
TOKEN_COLUMNS = ("team", "label", "expires", "last_used", "digest", "team_name")


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


@dataclass(frozen=True, slots=True)
class ListedToken:
    """A configured token.

    used_at_s: the beginning of the hour in which it was last used; None if no use is recorded.
    """

    team: str
    label: str
    expires: date | None
    digest: str
    used_at_s: int | None

    @property
    def last_day(self) -> str:
        return NO_NAME if self.expires is None else str(self.expires)

    @property
    def digest_start(self) -> str:
        """Tells tokens with the same label apart."""
        return self.digest[:UNLABELLED_CHARACTERS]


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


def usage_columns(usage: Usage, query: UsageQuery, directory: TeamDirectory, currency: Currency | None) -> list[Column]:
    """Usage for people, with the outcomes that occurred."""
    groups = zip(*(row.group for row in usage.rows), strict=True) if usage.rows else [()] * len(query.by)
    columns = [
        Column(group, cells, total="total" if place == 0 else "", is_text=True)
        for place, (group, cells) in enumerate(zip(query.by, groups, strict=True))
    ]
    if "team" in query.by:
        names = [directory.name_of(row.group[query.by.index("team")]) for row in usage.rows]
        columns += _name_columns(names, rank=3)
    outcomes = tuple(usage.total.outcomes)
    amounts = zip(*(amounts_of(row, outcomes) for row in (*usage.rows, usage.total)), strict=True)
    headers = [("requests", 1), ("refused", 4), ("estimated credits", 0), *((outcome, 5) for outcome in outcomes)]
    for (header, rank), (*cells, total) in zip(headers, amounts, strict=True):
        columns.append(Column(header, cells, rank, total))
    beside_credits = [Column("share %", [share_of(row, usage) for row in usage.rows], rank=2)]
    if currency is not None:
        *costs, total_cost = [currency.rounded_text(row.credits_micro) for row in (*usage.rows, usage.total)]
        beside_credits.insert(0, Column(f"derived {currency.code}", costs, rank=1, total=total_cost))
    place = len(columns) - len(outcomes)
    return [*columns[:place], *beside_credits, *columns[place:], *_saved_columns(usage)]


def _saved_columns(usage: Usage) -> list[Column]:
    *calls, all_calls = [str(row.upstream_calls_saved) for row in (*usage.rows, usage.total)]
    *seconds, all_seconds = [_seconds(row.saved_us) for row in (*usage.rows, usage.total)]
    return [Column("calls saved", calls, 6, all_calls), Column("seconds saved", seconds, 6, all_seconds)]


def quota_columns(
    quota_states: Sequence[QuotaState], forecasts: Forecasts, zone: ZoneInfo, directory: TeamDirectory
) -> list[Column]:
    """Quotas for people; the organisation's once, without a team."""
    uses = quota_uses(quota_states, forecasts)
    limits, used, remaining = zip(*(use.amounts for use in uses), strict=True) if uses else ((), (), ())
    resets_at = [_moment(use.window.end_s, zone) for use in uses]
    return [
        Column("team", [use.team for use in uses], is_text=True),
        *_name_columns([directory.name_of(use.team) for use in uses], rank=6),
        Column("quota", [use.quota.policy for use in uses], is_text=True),
        Column("limit", limits, rank=2),
        Column("used", used, rank=3),
        Column("used %", [use.used_percent for use in uses]),
        Column("remaining", remaining, rank=1),
        Column("on exceed", [use.on_exceed for use in uses], rank=5, is_text=True),
        Column("resets at", resets_at, rank=4, is_text=True),
        *_forecast_columns(uses, zone),
    ]


def _forecast_columns(uses: Sequence[QuotaUse], zone: ZoneInfo) -> list[Column]:
    """What will be used at the end of the window, and when the limit is reached; none without any forecast."""
    if not any(use.forecast for use in uses):
        return []
    ends = [at_end and f"{at_end} ({low} to {high})" for at_end, low, high in (use.forecast_amounts for use in uses)]
    return [
        Column("at the end", ends, rank=5),
        Column("forecast", [reached_text(use, zone) for use in uses], rank=1, is_text=True, wraps=True),
    ]


def price_change_columns(changes: Sequence[PriceChange], zone: ZoneInfo) -> list[Column]:
    """Price changes for people."""
    return [
        Column("found at", [_moment(change.at_s, zone) for change in changes], is_text=True),
        Column("account", [change.account for change in changes], rank=1, is_text=True),
        Column("model", [change.model for change in changes], is_text=True),
        Column("old", [change.old for change in changes]),
        Column("new", [change.new for change in changes]),
        Column("found by", [change.found_by for change in changes], rank=2, is_text=True),
        Column("key", [change.key for change in changes], rank=3, is_text=True),
    ]


def token_lines(tokens: Sequence[ListedToken], zone: ZoneInfo, directory: TeamDirectory) -> list[list[str]]:
    """Tokens as rows of text, the header first."""
    lines = [list(TOKEN_COLUMNS)]
    for token in tokens:
        last_used = NO_NAME if token.used_at_s is None else rfc3339(token.used_at_s, zone)
        cells = [token.team, token.label, token.last_day, last_used, token.digest_start]
        lines.append([*cells, directory.name_of(token.team)])
    return lines


def token_columns(tokens: Sequence[ListedToken], zone: ZoneInfo, directory: TeamDirectory) -> list[Column]:
    """Tokens for people."""
    return [
        Column("team", [token.team for token in tokens], is_text=True),
        *_name_columns([directory.name_of(token.team) for token in tokens], rank=3),
        Column("label", [token.label for token in tokens], is_text=True),
        Column("expires", [token.last_day for token in tokens], rank=1, is_text=True),
        Column("last used", [_hour(token.used_at_s, zone) for token in tokens], is_text=True),
        Column("digest", [token.digest_start for token in tokens], rank=2, is_text=True),
    ]


def learned_lines(found: Mapping[str, Sequence[Scope]], zone: ZoneInfo) -> list[list[str]]:
    """Scopes as rows of text, the header first."""
    return [list(LEARNED_COLUMNS), *_learned_rows(found, zone)]


def learned_columns(found: Mapping[str, Sequence[Scope]], zone: ZoneInfo) -> list[Column]:
    """Scopes for people."""
    ranks = {"account": 1, "scope": 0, "state": 0, "tests": 0, "left_out": 0, "fewer_than_percent": 1, "items": 1}
    headers = {"fewer_than_percent": "below %", "would_have_been_wrong": "wrong"}
    texts = {"account", "scope", "state", "items", "left_out", "counting", "team", "last_asked"}
    cells = zip(*_learned_rows(found, zone), strict=True) if any(found.values()) else [()] * len(LEARNED_COLUMNS)
    return [
        Column(
            headers.get(name, name.replace("_", " ")),
            each,
            ranks.get(name, place + 2),
            is_text=name in texts,
            wraps=name in texts,
        )
        for place, (name, each) in enumerate(zip(LEARNED_COLUMNS, cells, strict=True))
    ]


def _learned_rows(found: Mapping[str, Sequence[Scope]], zone: ZoneInfo) -> list[list[str]]:
    return [_learned_row(account, scope, zone) for account, scopes in found.items() for scope in scopes]


def _learned_row(account: str, scope: Scope, zone: ZoneInfo) -> list[str]:
    last = scope.last_contradiction
    amounts = (scope.asked, scope.answered, scope.right + scope.wrong, scope.wrong, scope.audits, scope.contradictions)
    return [
        *(account, scope.id, scope.state.value, str(scope.tests), str(scope.needed)),
        percent_below(scope.bound),
        *map(str, amounts),
        str(last.suspects) if last is not None else "0",
        *(", ".join(texts) for texts in (scope.items, scope.left_out, scope.counting)),
        *(scope.team, rfc3339(scope.used_at_ms // 1000, zone)),
    ]


def _name_columns(names: Sequence[str], rank: int) -> list[Column]:
    """The column of teams' names; none if no team has a name."""
    return [Column("name", names, rank, is_text=True, wraps=True)] if any(names) else []


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


def _seconds(duration_us: int | None) -> str:
    return NO_NAME if duration_us is None else f"{duration_us / 1_000_000:.1f}"


def _hour(at_s: int | None, zone: ZoneInfo) -> str:
    return NO_NAME if at_s is None else f"{datetime.fromtimestamp(at_s, zone):%Y-%m-%d %H:%M}"


def _moment(at_s: int, zone: ZoneInfo) -> str:
    return f"{datetime.fromtimestamp(at_s, zone):%Y-%m-%d %H:%M}".removesuffix(" 00:00")
