"""Reports on quotas: the documents of `GET /v1/quota`, and the rows of tables and CSV."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo

import orjson

from proxy.problems import NO_NAME
from proxy.quota.credits import percent_text
from proxy.quota.quotas import Quota, QuotaState
from proxy.quota.usage import TeamDirectory
from proxy.quota.windows import Window, rfc3339

QUOTA_COLUMNS = (
    *("scope", "team", "measure", "per", "limit", "used", "remaining", "on_exceed", "resets_at"),
    *("used_percent", "team_name"),
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

    @property
    def amounts(self) -> list[str]:
        """Limit, used and remaining, in requests or credits."""
        return [self.quota.text(amount) for amount in (self.quota.limit, self.used, self.remaining)]

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


def quota_uses(quota_states: Sequence[QuotaState]) -> list[QuotaUse]:
    """The organisation's quotas once, because all teams share them, and then the teams'."""
    found = [use for quota_state in quota_states for use in _uses_of(quota_state)]
    return sorted(dict.fromkeys(found), key=lambda use: use.team != NO_NAME)


def quota_lines(quota_states: Sequence[QuotaState], zone: ZoneInfo, directory: TeamDirectory) -> list[list[str]]:
    """Quotas as rows of text, the header first."""
    return [list(QUOTA_COLUMNS), *(_cells(use, zone, directory) for use in quota_uses(quota_states))]


def quota_document(quota_state: QuotaState, zone: ZoneInfo, directory: TeamDirectory) -> dict[str, Any]:
    """A team's rate and quotas as JSON values; amounts are exact decimal numbers."""
    rate, team = quota_state.limits.rate, quota_state.limits.team
    per_s = int(rate.per_s) if float(rate.per_s).is_integer() else rate.per_s
    return {
        "team": team,
        "rate": {"per_s": per_s, "burst": rate.burst, "remaining": quota_state.rate_remaining()},
        "quotas": [_members(use, zone) for use in _uses_of(quota_state)],
        "team_name": directory.name_of(team),
    }


def _uses_of(quota_state: QuotaState) -> list[QuotaUse]:
    limits = quota_state.limits
    return [
        QuotaUse(quota.owner(limits.team), quota, used, quota_state.windows[quota.per])
        for quota, used in zip(limits.quotas, quota_state.used, strict=True)
    ]


def _cells(use: QuotaUse, zone: ZoneInfo, directory: TeamDirectory) -> list[str]:
    quota, resets_at = use.quota, rfc3339(use.window.end_s, zone)
    own = [quota.scope, use.team, quota.measure, quota.per, *use.amounts, use.on_exceed, resets_at]
    return [*own, use.used_percent, directory.name_of(use.team)]


def _members(use: QuotaUse, zone: ZoneInfo) -> dict[str, Any]:
    quota = use.quota
    return {
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
