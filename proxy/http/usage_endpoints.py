"""`GET /v1/usage` and `GET /v1/quota`: usage, and the state of quotas.

* A team's token shows that team, even if it is disabled. A viewer or admin token shows all teams.
* Both only read: they debit neither quotas nor the rate.
"""

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from time import time
from typing import Any
from zoneinfo import ZoneInfo

import orjson

from proxy.auth import Team
from proxy.gateway.live_config import ConfigHolder
from proxy.gateway.request import ClientRequest, Document, Trace
from proxy.problems import Code, Problem, StoreUnavailable
from proxy.quota.quotas import Quota, QuotaState
from proxy.quota.reports import LedgerReader
from proxy.quota.usage import UsageQuery, csv_of, json_of, read_parameters, read_usage_query
from proxy.quota.windows import Window, day_of, rfc3339

JSON = "application/json"
CSV = "text/csv; charset=utf-8; header=present"  # RFC 4180 §3


class UsageEndpoints:
    """The handlers of both endpoints."""

    def __init__(self, live: ConfigHolder, ledger_reader: LedgerReader, zone: ZoneInfo) -> None:
        self._live = live
        self._ledger_reader = ledger_reader
        self._zone = zone

    async def usage(self, request: ClientRequest, trace: Trace) -> Document | Problem:
        """The usage that the query string asks for, as JSON or CSV. Raises `BadRequest`."""
        own_team = self._team_of(request.token, trace)
        if isinstance(own_team, Problem):
            return own_team
        query = read_usage_query(request.query, request.accept, today=day_of(int(time()), self._zone))
        if own_team is not None:
            if query.team not in (None, own_team.id) or "team" in query.by:
                return _forbidden(own_team)
            query = replace(query, team=own_team.id)
        return await _within(request.deadline, self._usage(query))

    async def quota(self, request: ClientRequest, trace: Trace) -> Document | Problem:
        """The rate and quotas of one team or, for a viewer or admin, of all teams. Raises `BadRequest`."""
        own_team = self._team_of(request.token, trace)
        if isinstance(own_team, Problem):
            return own_team
        team = read_parameters(request.query, ("team",)).get("team")
        if own_team is not None:
            if team not in (None, own_team.id):
                return _forbidden(own_team)
            team = own_team.id
        return await _within(request.deadline, self._quota(team))

    async def _usage(self, query: UsageQuery) -> Document | Problem:
        if query.team not in (None, *self._live.config.team_limits, *await self._ledger_reader.teams()):
            return _unknown("team names a team that is not configured and never had usage: check its id.")
        usage = await self._ledger_reader.usage(query)
        if query.csv:
            return Document(csv_of(usage, query.by), CSV)
        return Document(json_of(usage, query, self._zone.key), JSON)

    async def _quota(self, team: str | None) -> Document | Problem:
        if team not in (None, *self._live.config.team_limits):
            return _unknown("team names a team that is not configured: check its id.")
        wanted = [limits for limits in self._live.config.team_limits.values() if team in (None, limits.team)]
        documents = [
            quota_document(quota_state, self._zone) for quota_state in await self._ledger_reader.quota_states(wanted)
        ]
        return Document(orjson.dumps({"teams": documents} if team is None else documents[0]), JSON)

    def _team_of(self, token: str | None, trace: Trace) -> Team | Problem | None:
        """The token's team; None for a viewer or admin token."""
        access = self._live.config.access
        if access.is_admin(token) or access.is_viewer(token):
            return None
        credential = access.credential(token)
        if isinstance(credential, Problem):
            return credential
        trace.record_credential(credential)
        return credential.team


def quota_document(quota_state: QuotaState, zone: ZoneInfo) -> dict[str, Any]:
    """A team's rate and quotas as JSON values; amounts are exact decimal numbers."""
    rate, quotas = quota_state.limits.rate, quota_state.limits.quotas
    per_s = int(rate.per_s) if float(rate.per_s).is_integer() else rate.per_s
    return {
        "team": quota_state.limits.team,
        "rate": {"per_s": per_s, "burst": rate.burst, "remaining": quota_state.rate_remaining()},
        "quotas": [
            _quota_members(quota, used, quota_state.windows[quota.per], zone)
            for quota, used in zip(quotas, quota_state.used, strict=True)
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


async def _within(deadline: float, report: Coroutine[Any, Any, Document | Problem]) -> Document | Problem:
    """The report, or a problem if the ledger is unavailable or too slow."""
    try:
        async with asyncio.timeout_at(deadline):
            return await report
    except StoreUnavailable:
        return Problem(Code.STORE_UNAVAILABLE, "The ledger is unavailable: send the request again.", retry_after_s=1)
    except TimeoutError:
        return Problem(Code.STORE_UNAVAILABLE, "Reading the ledger took too long: ask for fewer days.")


def _forbidden(team: Team) -> Problem:
    return Problem(
        Code.FORBIDDEN,
        f"Your token only shows the team {team.id!r}: leave team and by=team out, or use a viewer or admin token.",
    )


def _unknown(detail: str) -> Problem:
    return Problem(Code.INVALID_QUERY, detail)
