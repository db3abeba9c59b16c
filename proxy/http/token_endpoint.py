"""`GET /v1/token`: what the caller's token may see, and the balances of its accounts.

* It does not read the ledger, so the usage page can sign in while that is unavailable.
* A balance is the newest that RenderNet has reported, and null if there is none or the price book is unavailable.
"""

import asyncio
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import orjson

from proxy.auth import Credential
from proxy.cache.account_book import AccountBooks
from proxy.cache.prices import Balance
from proxy.gateway.live_config import ConfigHolder, RuntimeConfig
from proxy.gateway.request import ClientRequest, Document, Trace
from proxy.http.headers import JSON
from proxy.problems import Problem, StoreUnavailable


class TokenEndpoint:
    """The handler of `GET /v1/token`."""

    def __init__(self, live: ConfigHolder, accounts: AccountBooks, zone: ZoneInfo) -> None:
        self._live = live
        self._accounts = accounts
        self._zone = zone

    async def token(self, request: ClientRequest, trace: Trace) -> Document | Problem:
        """The token's role: `admin` or `viewer`, or `team` with the team, also if it is disabled."""
        config = self._live.config
        access = config.access
        if access.is_admin(request.token) or access.is_viewer(request.token):
            role = "admin" if access.is_admin(request.token) else "viewer"
            return await self._document({"role": role}, sorted(config.accounts), request.deadline)
        credential = access.credential(request.token)
        if isinstance(credential, Problem):
            return credential
        trace.record_credential(credential)
        return await self._document(_team_members(credential, config), [credential.team.account], request.deadline)

    async def _document(self, members: dict[str, Any], accounts: Collection[str], deadline: float) -> Document:
        balances = await self._balances(accounts, deadline)
        today = datetime.now(self._zone).date()
        shown = [_account_members(account, balances.get(account)) for account in accounts]
        document = {**members, "timezone": self._zone.key, "today": today, "accounts": shown}
        return Document(orjson.dumps(document), JSON)

    async def _balances(self, accounts: Collection[str], deadline: float) -> Mapping[str, Balance]:
        try:
            async with asyncio.timeout_at(deadline):
                return await self._accounts.balances(accounts)
        except (StoreUnavailable, TimeoutError):
            return {}


def _team_members(credential: Credential, config: RuntimeConfig) -> dict[str, Any]:
    team = credential.team.id
    return {
        "role": "team",
        "team": team,
        "team_name": config.directory.name_of(team),
        "token_label": credential.label,
        "token_expires": credential.expires,
    }


def _account_members(account: str, balance: Balance | None) -> dict[str, Any]:
    if balance is None:
        return {"account": account, "balance": None, "balance_age_s": None}
    return {"account": account, "balance": orjson.Fragment(balance.amount), "balance_age_s": int(balance.age_s)}
