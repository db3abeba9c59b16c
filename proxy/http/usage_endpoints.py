"""`GET /v1/usage`, `GET /v1/quota` and `GET /v1/prices/changes`: reports from the ledger.

* Usage and quotas: a team's token shows that team, even if it is disabled. A viewer or admin token shows all teams.
* Price changes belong to accounts, so only a viewer or admin token shows them.
* All only read: they debit neither quotas nor the rate.
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
from proxy.http.headers import JSON
from proxy.http.report_access import reader_of
from proxy.problems import Code, Problem, StoreUnavailable
from proxy.quota.credits import Currency
from proxy.quota.csv_text import write_csv
from proxy.quota.history import UsageHistory
from proxy.quota.ledger_reader import LedgerReader
from proxy.quota.price_changes import NAME_COLUMNS, lines_of
from proxy.quota.price_changes import json_of as json_of_changes
from proxy.quota.quota_report import quota_document
from proxy.quota.report_queries import (
    PriceChangeQuery,
    UsageQuery,
    read_parameters,
    read_price_change_query,
    read_usage_query,
)
from proxy.quota.usage_report import csv_of, json_of
from proxy.quota.windows import day_of

CSV = "text/csv; charset=utf-8; header=present"  # RFC 4180 §3


class UsageEndpoints:
    """The handlers of these endpoints."""

    def __init__(
        self,
        live: ConfigHolder,
        ledger_reader: LedgerReader,
        history: UsageHistory,
        zone: ZoneInfo,
        currency: Currency | None,
    ) -> None:
        self._live = live
        self._ledger_reader = ledger_reader
        self._history = history
        self._zone = zone
        self._currency = currency

    async def usage(self, request: ClientRequest, trace: Trace) -> Document | Problem:
        """The usage that the query string asks for, as JSON or CSV. Raises `BadRequest`."""
        reader = reader_of(request.token, trace, self._live.config.access)
        if isinstance(reader, Problem):
            return reader
        query = read_usage_query(request.query, request.accept, today=day_of(int(time()), self._zone))
        if reader is not None:
            if query.team not in (None, reader.team.id) or "team" in query.by:
                return _forbidden(reader.team)
            query = replace(query, team=reader.team.id)
        return await _within(request.deadline, self._usage(query))

    async def quota(self, request: ClientRequest, trace: Trace) -> Document | Problem:
        """The rate and quotas of one team or, for a viewer or admin, of all teams. Raises `BadRequest`."""
        reader = reader_of(request.token, trace, self._live.config.access)
        if isinstance(reader, Problem):
            return reader
        team = read_parameters(request.query, ("team",)).get("team")
        if reader is not None:
            if team not in (None, reader.team.id):
                return _forbidden(reader.team)
            team = reader.team.id
        return await _within(request.deadline, self._quota(team))

    async def price_changes(self, request: ClientRequest, trace: Trace) -> Document | Problem:
        """The price changes that the query string asks for, as JSON or CSV. Raises `BadRequest`."""
        reader = reader_of(request.token, trace, self._live.config.access)
        if isinstance(reader, Problem):
            return reader
        if reader is not None:
            return Problem(Code.FORBIDDEN, "This needs a viewer token or an admin token; you sent a team's token.")
        today = day_of(int(time()), self._zone)
        query = read_price_change_query(request.query, request.accept, today=today)
        return await _within(request.deadline, self._price_changes(query))

    async def _price_changes(self, query: PriceChangeQuery) -> Document | Problem:
        found = await self._ledger_reader.price_changes(query)
        if not found.changes and query.account not in (None, *self._live.config.accounts):
            detail = f"account: {query.account!r:.64} is not configured and has no price change: check the name."
            return Problem(Code.INVALID_QUERY, detail)
        if query.csv:
            csv = write_csv(lines_of(found, self._zone), names=NAME_COLUMNS, dialect=query.dialect)
            return Document(csv, CSV)
        return Document(json_of_changes(found, query, self._zone), JSON)

    async def _usage(self, query: UsageQuery) -> Document | Problem:
        config = self._live.config
        if query.team is not None and query.team not in (
            *config.team_limits,
            *config.directory.current,
            *await self._ledger_reader.teams(),
        ):
            detail = f"team: {query.team[:64]!r} is not configured and never had usage: check the id."
            return Problem(Code.INVALID_QUERY, detail)
        usage = await self._ledger_reader.usage(query, config.directory)
        if query.csv:
            return Document(csv_of(usage, query.by, config.directory, self._currency, query.dialect), CSV)
        return Document(json_of(usage, query, self._zone.key, config.directory, self._currency), JSON)

    async def _quota(self, team: str | None) -> Document | Problem:
        config = self._live.config
        if team not in (None, *config.team_limits):
            return Problem(Code.INVALID_QUERY, "team names a team that is not configured: check its id.")
        wanted = [limits for limits in config.team_limits.values() if team in (None, limits.team)]
        quota_states = await self._ledger_reader.quota_states(wanted)
        forecasts = await self._history.forecasts(quota_states, config.directory)
        documents = [quota_document(state, forecasts, self._zone, config.directory) for state in quota_states]
        return Document(orjson.dumps({"teams": documents} if team is None else documents[0]), JSON)


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
