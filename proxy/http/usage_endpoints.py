"""A team's own view, and the operator's of all teams: what was used, and how quotas stand.

Told in the same shape as the gateway's stories. A team's token shows that team, be it disabled; an admin token shows
all. Nothing is booked.
"""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from time import time
from typing import Any
from zoneinfo import ZoneInfo

import orjson

from proxy.auth import Team
from proxy.gateway.estimates import Ask, Trace
from proxy.gateway.live_config import InForce
from proxy.problems import Code, Problem, StoreUnavailable
from proxy.quota.quotas import Quota, Standing
from proxy.quota.reports import Reports
from proxy.quota.usage import UsageQuery, csv_of, json_of, read_parameters, read_usage_query
from proxy.quota.windows import Window, day_of, rfc3339

JSON = "application/json"
CSV = "text/csv; charset=utf-8; header=present"  # RFC 4180 §3


@dataclass(frozen=True, slots=True)
class Report:
    """What a client gets: a document."""

    body: bytes
    media_type: str


class Statements:
    """What the ledger says to those who may know it."""

    def __init__(self, in_force: InForce, reports: Reports, zone: ZoneInfo) -> None:
        self._in_force = in_force
        self._reports = reports
        self._zone = zone

    async def usage(self, ask: Ask, trace: Trace) -> Report | Problem:
        """The sums that the query asks for. Raises `BadRequest`."""
        asker = self._asker(ask.token, trace)
        if isinstance(asker, Problem):
            return asker
        query = read_usage_query(ask.query, ask.accept, today=day_of(int(time()), self._zone))
        if asker is not None:
            if query.team not in (None, asker.id) or "team" in query.by:
                return _forbidden(asker)
            query = replace(query, team=asker.id)
        return await _by(ask.deadline, self._usage(query))

    async def quota(self, ask: Ask, trace: Trace) -> Report | Problem:
        """How rate and quotas stand, of one team or, for the operator, of each. Raises `BadRequest`."""
        asker = self._asker(ask.token, trace)
        if isinstance(asker, Problem):
            return asker
        team = read_parameters(ask.query, ("team",)).get("team")
        if asker is not None:
            if team not in (None, asker.id):
                return _forbidden(asker)
            team = asker.id
        return await _by(ask.deadline, self._quota(team))

    async def _usage(self, query: UsageQuery) -> Report | Problem:
        if query.team not in (None, *self._in_force.rules.terms, *await self._reports.teams()):
            return _unknown("team names none that is configured or ever had usage.")
        usage = await self._reports.usage(query)
        if query.csv:
            return Report(csv_of(usage, query.by), CSV)
        return Report(json_of(usage, query, self._zone.key), JSON)

    async def _quota(self, team: str | None) -> Report | Problem:
        if team not in (None, *self._in_force.rules.terms):
            return _unknown("team names none that is configured.")
        wanted = [terms for terms in self._in_force.rules.terms.values() if team in (None, terms.team)]
        documents = [quota_document(standing, self._zone) for standing in await self._reports.standings(wanted)]
        return Report(orjson.dumps({"teams": documents} if team is None else documents[0]), JSON)

    def _asker(self, token: str | None, trace: Trace) -> Team | Problem | None:
        """Whose token it is; None: the operator's."""
        if self._in_force.rules.access.is_admin(token):
            return None
        team = self._in_force.rules.access.team(token)
        if isinstance(team, Team):
            trace.team = team.id
        return team


def quota_document(standing: Standing, zone: ZoneInfo) -> dict[str, Any]:
    """How a team stands, as JSON; amounts are exact decimal numbers."""
    rate, quotas = standing.terms.rate, standing.terms.quotas
    per_s = int(rate.per_s) if float(rate.per_s).is_integer() else rate.per_s
    return {
        "team": standing.terms.team,
        "rate": {"per_s": per_s, "burst": rate.burst, "remaining": standing.rate_remaining()},
        "quotas": [
            _quota_members(quota, used, standing.windows[quota.per], zone)
            for quota, used in zip(quotas, standing.used, strict=True)
        ],
    }


def _quota_members(quota: Quota, used: int, window: Window, zone: ZoneInfo) -> dict[str, Any]:
    return {
        "scope": quota.scope,
        "measure": quota.measure,
        "per": quota.per,
        "limit": quota.number(quota.limit),
        "used": quota.number(used),
        "remaining": quota.number(max(0, quota.limit - used)),
        "on_exceed": "refuse" if quota.refuse else "warn",
        "window_start": rfc3339(window.start_s, zone),
        "resets_at": rfc3339(window.end_s, zone),
    }


async def _by(deadline: float, report: Coroutine[Any, Any, Report | Problem]) -> Report | Problem:
    """The report, unless the ledger keeps it from being there in time."""
    try:
        async with asyncio.timeout_at(deadline):
            return await report
    except StoreUnavailable:
        return Problem(Code.STORE_UNAVAILABLE, "The ledger is out of reach: try again.", retry_after_s=1)
    except TimeoutError:
        return Problem(Code.STORE_UNAVAILABLE, "The ledger took too long to read: ask for fewer days.")


def _forbidden(asker: Team) -> Problem:
    return Problem(
        Code.FORBIDDEN, f"Your token shows the team {asker.id!r} alone: others, and by=team, need an admin token."
    )


def _unknown(detail: str) -> Problem:
    return Problem(Code.INVALID_QUERY, detail)
