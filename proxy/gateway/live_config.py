"""What can change while the gateway runs: who may ask, on what limits, for which accounts, and what counts.

A story takes the rules once, when it begins, and keeps them to its end.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from proxy.auth import Access, Credential, Team, Teams
from proxy.quota.quotas import Quota, Rate, Scope, TeamLimits
from proxy.settings.schema import QuotaSettings, Settings


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """limits: of every configured team. ignored: members that do not count, as dotted paths inside each item."""

    access: Access
    team_limits: Mapping[str, TeamLimits]
    accounts: frozenset[str]
    ignored: tuple[str, ...]


@dataclass(slots=True)
class ConfigHolder:
    """Where the rules in force are to be found."""

    config: RuntimeConfig


def limits_of(settings: Settings) -> dict[str, TeamLimits]:
    """What holds for each team: its rate, its quotas and the organisation's."""
    org = tuple(_quota("org", quota) for quota in settings.org.quotas)
    limits = {}
    for name, team in settings.teams.items():
        rate = settings.rate_of(team)
        own = tuple(_quota("team", quota) for quota in settings.quotas_of(team))
        limits[name] = TeamLimits(name, Rate(rate.per_s, rate.burst), own + org)
    return limits


def _quota(scope: Scope, quota: QuotaSettings) -> Quota:
    return Quota(scope, quota.measure, quota.per, quota.counted_limit, quota.on_exceed == "refuse")


def runtime_config_of(settings: Settings) -> RuntimeConfig:
    """What can be reloaded of the settings, but for the accounts' keys."""
    limits = limits_of(settings)
    access = Access(
        teams_of(settings, limits),
        settings.org.zone,
        admin_digests=settings.admin.tokens,
        metrics_digests=settings.metrics.tokens,
        metrics_are_public=settings.metrics.public,
    )
    return RuntimeConfig(access, limits, frozenset(settings.accounts), settings.cache.ignore)


def teams_of(settings: Settings, limits: Mapping[str, TeamLimits]) -> Teams:
    """The teams by the digests of their tokens."""
    credentials: dict[str, Credential] = {}
    for name, configured in settings.teams.items():
        team = Team(name, configured.account, configured.disabled, limits[name])
        for token in configured.tokens:
            credentials[token.sha256] = Credential(team, token.expires)
    return Teams(credentials)
