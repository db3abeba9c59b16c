"""The configuration that a reload can change: tokens, teams' limits, accounts, which members count, and CORS.

A request takes the configuration once, when it begins, and keeps it to its end.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from math import inf
from typing import Literal
from zoneinfo import ZoneInfo

from proxy.auth import Access, Credential, RoleDigests, Team, Teams, token_id_of
from proxy.quota.quotas import Quota, Rate, Scope, TeamLimits
from proxy.quota.team_directory import TeamDirectory
from proxy.settings.schema import QuotaSettings, Settings


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """The configuration in force. A reload replaces it as a whole.

    team_limits: by the ids of all configured teams.
    token_ends: when the tokens of enabled teams expire, in seconds since 1970, by team and label; infinity: never.
    ignored: members that are left out of cache keys, as dotted paths inside each item.
    learn, never_learn: as in `CacheSettings`.
    directory: the teams' names and earlier ids, for reports.
    cors_origins: whose pages may call the API from a browser.
    """

    access: Access
    team_limits: Mapping[str, TeamLimits]
    token_ends: Mapping[tuple[str, str], float]
    accounts: frozenset[str]
    ignored: tuple[str, ...]
    learn: Literal["off", "observe", "use"]
    never_learn: tuple[str, ...]
    directory: TeamDirectory
    cors_origins: frozenset[str]


@dataclass(slots=True)
class ConfigHolder:
    config: RuntimeConfig


def limits_of(settings: Settings) -> dict[str, TeamLimits]:
    """Each team's rate, its own quotas and the organisation's, by team id."""
    org = tuple(_quota("org", quota) for quota in settings.org.quotas)
    team_limits = {}
    for name, team in settings.teams.items():
        rate = settings.rate_of(team)
        own = tuple(_quota("team", quota) for quota in settings.quotas_of(team))
        team_limits[name] = TeamLimits(name, Rate(rate.per_s, rate.burst), own + org)
    return team_limits


def _quota(scope: Scope, quota: QuotaSettings) -> Quota:
    return Quota(scope, quota.measure, quota.per, quota.counted_limit, quota.on_exceed == "refuse")


def runtime_config_of(settings: Settings, record_use: Callable[[str], None]) -> RuntimeConfig:
    """The reloadable part of the settings, except for the accounts' keys. `record_use`: see `Access`."""
    team_limits = limits_of(settings)
    access = Access(
        teams_of(settings, team_limits),
        settings.org.zone,
        RoleDigests(settings.admin.tokens, settings.viewer.tokens, settings.metrics.tokens),
        metrics_are_public=settings.metrics.public,
        record_use=record_use,
    )
    return RuntimeConfig(
        access=access,
        team_limits=team_limits,
        token_ends=_token_ends(settings),
        accounts=frozenset(settings.accounts),
        ignored=settings.cache.ignore,
        learn=settings.cache.learn,
        never_learn=settings.cache.never_learn,
        directory=directory_of(settings),
        cors_origins=frozenset(settings.server.cors_origins),
    )


def _token_ends(settings: Settings) -> dict[tuple[str, str], float]:
    return {
        (name, label): inf if day in (None, date.max) else _end_of(day, settings.org.zone)
        for name, team in settings.teams.items()
        if not team.disabled
        for label, day in team.last_days().items()
    }


def _end_of(day: date, zone: ZoneInfo) -> float:
    return datetime.combine(day + timedelta(days=1), time.min, zone).timestamp()


def directory_of(settings: Settings) -> TeamDirectory:
    """The teams' names and earlier ids."""
    names = {team_id: team.name for team_id, team in settings.teams.items() if team.name}
    current = {earlier: team_id for team_id, team in settings.teams.items() for earlier in team.was}
    return TeamDirectory(names, current)


def teams_of(settings: Settings, team_limits: Mapping[str, TeamLimits]) -> Teams:
    """The configured teams, to be found by their tokens."""
    credentials: dict[str, Credential] = {}
    for name, configured in settings.teams.items():
        team = Team(name, configured.account, configured.disabled, team_limits[name], configured.infer)
        for token in configured.tokens:
            credentials[token.sha256] = Credential(team, token.expires, token.label, token_id_of(token.sha256))
    return Teams(credentials)
