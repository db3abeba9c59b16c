"""Formats tables: aligned for people on a terminal, tab-separated with stable columns for programs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from zoneinfo import ZoneInfo

from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxy.problems import NO_NAME
from proxy.quota.quotas import Quota, QuotaState
from proxy.quota.usage import Usage, UsageQuery, amounts_of
from proxy.quota.windows import rfc3339

UNLIMITED_WIDTH = 10_000
"""A width in characters that is enough for any table."""

QUOTA_COLUMNS = ("scope", "team", "measure", "per", "limit", "used", "remaining", "on_exceed", "resets_at")


@dataclass(frozen=True, slots=True)
class _Used:
    """A quota with its use in the running window."""

    team: str
    quota: Quota
    used: int
    resets_at_s: int

    @property
    def amounts(self) -> list[str]:
        """Limit, used and remaining."""
        left = max(0, self.quota.limit - self.used)
        return [self.quota.text(amount) for amount in (self.quota.limit, self.used, left)]

    @property
    def on_exceed(self) -> str:
        return "refuse" if self.quota.refuse else "warn"


def to_tsv(lines: Iterable[Sequence[str]]) -> str:
    return "".join("\t".join(cells) + "\n" for cells in lines)


def usage_table(usage: Usage, query: UsageQuery, zone: ZoneInfo, console: Console) -> Table:
    """Usage for people. Has a column for each outcome that occurred, if the terminal is wide enough."""
    title = f"{query.first} to {query.last}, {zone.key}"
    wide = _usage_table(usage, query, title, tuple(usage.total.outcomes))
    width = console.measure(wide, options=console.options.update_width(UNLIMITED_WIDTH)).maximum
    return wide if width <= console.width else _usage_table(usage, query, title, ())


def quota_lines(quota_states: Sequence[QuotaState], zone: ZoneInfo) -> list[list[str]]:
    """Quotas for programs. The organisation's quotas are listed once."""
    return [list(QUOTA_COLUMNS), *(_quota_cells(used, zone) for used in _quotas(quota_states))]


def quota_table(quota_states: Sequence[QuotaState], zone: ZoneInfo) -> Table:
    """Quotas for people. The organisation's quotas are listed once, without a team."""
    table = _table(f"quotas on estimates, {zone.key}")
    for name in ("team", "quota"):
        table.add_column(name, overflow="fold")
    for name in ("limit", "used", "remaining"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("on exceed", "resets at"):
        table.add_column(name, no_wrap=True)
    for used in _quotas(quota_states):
        resets_at = f"{datetime.fromtimestamp(used.resets_at_s, zone):%Y-%m-%d %H:%M}".removesuffix(" 00:00")
        table.add_row(*map(Text, (used.team, used.quota.policy, *used.amounts, used.on_exceed, resets_at)))
    return table


def _usage_table(usage: Usage, query: UsageQuery, title: str, outcomes: Sequence[str]) -> Table:
    table = _table(title, with_footer=True)
    for place, group in enumerate(query.by):
        table.add_column(group, "total" if place == 0 else "", overflow="fold")
    names = ("requests", "refused", "estimated credits", *outcomes)
    for name, total in zip(names, amounts_of(usage.total, outcomes), strict=True):
        table.add_column(name, total, justify="right", no_wrap=True)
    for row in usage.rows:
        table.add_row(*map(Text, (*row.group, *amounts_of(row, outcomes))))
    return table


def _table(title: str, *, with_footer: bool = False) -> Table:
    return Table(
        title=Text(title),
        title_justify="left",
        show_footer=with_footer,
        box=None,
        collapse_padding=True,
        pad_edge=False,
    )


def _quotas(quota_states: Sequence[QuotaState]) -> list[_Used]:
    """The organisation's quotas, which each team's state repeats, then those of the teams."""
    found = [
        _Used(quota.owner(quota_state.limits.team), quota, used, quota_state.windows[quota.per].end_s)
        for quota_state in quota_states
        for quota, used in zip(quota_state.limits.quotas, quota_state.used, strict=True)
    ]
    return sorted(dict.fromkeys(found), key=lambda used: used.team != NO_NAME)


def _quota_cells(used: _Used, zone: ZoneInfo) -> list[str]:
    quota, resets_at = used.quota, rfc3339(used.resets_at_s, zone)
    return [quota.scope, used.team, quota.measure, quota.per, *used.amounts, used.on_exceed, resets_at]
