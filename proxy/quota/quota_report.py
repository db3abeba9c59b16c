"""Reports on quotas: the documents of `GET /v1/quota`, and the rows of tables and CSV."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any
from zoneinfo import ZoneInfo

import orjson

from proxy.problems import NO_NAME
from proxy.quota.credits import percent_text
from proxy.quota.forecast import Forecast, Forecasts
from proxy.quota.quotas import Quota, QuotaState
from proxy.quota.team_directory import TeamDirectory
from proxy.quota.windows import Window, rfc3339

QUOTA_COLUMNS = (
    *("scope", "team", "measure", "per", "limit", "used", "remaining", "on_exceed", "resets_at"),
    *("used_percent", "team_name"),
    *("forecast_at_end", "forecast_low", "forecast_high", "reached_at", "reached_from", "reached_until"),
)
"""`team` is `NO_NAME` for a quota of the organisation. Scripts rely on the order: new columns come last."""

QUOTA_NAME_COLUMNS = ("team", "team_name")


@dataclass(frozen=True, slots=True)
class QuotaUse:
    """A quota, and how much of it is used in the running window. `team`: `NO_NAME` for the organisation."""

    team: str
    quota: Quota
    used: int
    window: Window
    forecast: Forecast | None

    @property
    def amounts(self) -> list[str]:
        """Limit, used and remaining, in requests or credits."""
        return [self.quota.text(amount) for amount in (self.quota.limit, self.used, self.remaining)]

    @property
    def forecast_amounts(self) -> list[str]:
        """Expected use at the end of the window, low and high, in requests or credits; empty without a forecast."""
        found = self.forecast
        return [self.quota.text(amount) for amount in (found.at_end, found.low, found.high)] if found else [""] * 3

    @property
    def remaining(self) -> int:
        return max(0, self.quota.limit - self.used)

    @property
    def used_percent(self) -> str:
        """Empty if the limit is 0."""
        return percent_text(self.used, self.quota.limit)

    @property
    def on_exceed(self) -> str:
        return "refuse" if self.quota.refuse else "warn"


def quota_uses(quota_states: Sequence[QuotaState], forecasts: Forecasts) -> list[QuotaUse]:
    """The organisation's quotas once, because all teams share them, and then the teams'."""
    found = [use for quota_state in quota_states for use in _uses_of(quota_state, forecasts)]
    return sorted(dict.fromkeys(found), key=lambda use: use.team != NO_NAME)


def quota_lines(
    quota_states: Sequence[QuotaState], forecasts: Forecasts, zone: ZoneInfo, directory: TeamDirectory
) -> list[list[str]]:
    """Quotas as rows of text, the header first."""
    return [list(QUOTA_COLUMNS), *(_cells(use, zone, directory) for use in quota_uses(quota_states, forecasts))]


def quota_document(
    quota_state: QuotaState, forecasts: Forecasts, zone: ZoneInfo, directory: TeamDirectory
) -> dict[str, Any]:
    """A team's rate and quotas as JSON values; amounts are exact decimal numbers."""
    rate, team = quota_state.limits.rate, quota_state.limits.team
    per_s = int(rate.per_s) if float(rate.per_s).is_integer() else rate.per_s
    return {
        "team": team,
        "rate": {"per_s": per_s, "burst": rate.burst, "remaining": quota_state.rate_remaining()},
        "quotas": [_members(use, zone) for use in _uses_of(quota_state, forecasts)],
        "team_name": directory.name_of(team),
    }


def reached_text(use: QuotaUse, zone: ZoneInfo) -> str:
    """When the limit is reached, in words; empty without a forecast."""
    found = use.forecast
    if found is None:
        return ""
    at, earliest, latest = (
        None if moment_s is None else datetime.fromtimestamp(moment_s, zone).date() for moment_s in found.reached_s
    )
    if earliest is None:
        return f"not reached this {use.quota.per}"
    if at is None:
        return f"probably not reached this {use.quota.per}, {_day(earliest)} at the earliest"
    if use.remaining == 0:
        return f"reached on {_day(at)}"
    return f"reached about {_day(at)}{_range_text(at, earliest, latest, use)}"


def _range_text(at: date, earliest: date, latest: date | None, use: QuotaUse) -> str:
    if latest is None:
        return f" ({_day(earliest)} at the earliest, or not this {use.quota.per})"
    if earliest == latest:
        return ""
    if earliest.month == latest.month == at.month:
        return f" (between {earliest.day} and {latest.day})"
    return f" (between {_day(earliest)} and {_day(latest)})"


def _day(day: date) -> str:
    return f"{day.day} {day:%B}"


def _uses_of(quota_state: QuotaState, forecasts: Forecasts) -> list[QuotaUse]:
    uses = []
    for quota, used in quota_state.uses():
        owner = quota.owner(quota_state.limits.team)
        uses.append(QuotaUse(owner, quota, used, quota_state.windows[quota.per], forecasts.get((owner, quota))))
    return uses


def _cells(use: QuotaUse, zone: ZoneInfo, directory: TeamDirectory) -> list[str]:
    quota, resets_at = use.quota, rfc3339(use.window.end_s, zone)
    own = [quota.scope, use.team, quota.measure, quota.per, *use.amounts, use.on_exceed, resets_at]
    moments = [moment or "" for moment in _moments(use.forecast, zone)] if use.forecast else [""] * 3
    return [*own, use.used_percent, directory.name_of(use.team), *use.forecast_amounts, *moments]


def _members(use: QuotaUse, zone: ZoneInfo) -> dict[str, Any]:
    quota = use.quota
    members: dict[str, Any] = {
        "scope": quota.scope,
        "measure": quota.measure,
        "per": quota.per,
        "limit": quota.number(quota.limit),
        "used": quota.number(use.used),
        "remaining": quota.number(use.remaining),
        "on_exceed": use.on_exceed,
        "window_start": rfc3339(use.window.start_s, zone),
        "resets_at": rfc3339(use.window.end_s, zone),
        "used_percent": orjson.Fragment(use.used_percent or "null"),
    }
    if use.forecast is not None:
        members["forecast"] = _forecast_members(use.forecast, quota, zone)
    return members


def _forecast_members(found: Forecast, quota: Quota, zone: ZoneInfo) -> dict[str, Any]:
    at, earliest, latest = _moments(found, zone)
    return {
        "at_end": quota.number(found.at_end),
        "low": quota.number(found.low),
        "high": quota.number(found.high),
        "reached_at": at,
        "reached_from": earliest,
        "reached_until": latest,
        "method": found.method,
    }


def _moments(found: Forecast, zone: ZoneInfo) -> list[str | None]:
    """When the limit is reached, as in `Forecast.reached_s`."""
    return [None if moment_s is None else rfc3339(moment_s, zone) for moment_s in found.reached_s]
