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
from proxy.http.report_access import reader_of
from proxy.problems import Problem, StoreUnavailable


async def token(
    live: ConfigHolder, books: AccountBooks, zone: ZoneInfo, request: ClientRequest, trace: Trace
) -> Document | Problem:
    """The token's role: `admin` or `viewer`, or `team` with the team, also if it is disabled."""
    config = live.config
    reader = reader_of(request.token, trace, config.access)
    if isinstance(reader, Problem):
        return reader
    if reader is None:
        members = {"role": "admin" if config.access.is_admin(request.token) else "viewer"}
        accounts = sorted(config.accounts)
    else:
        members, accounts = _team_members(reader, config), [reader.team.account]
    balances = await _balances(books, accounts, request.deadline)
    document = {
        **members,
        "timezone": zone.key,
        "today": datetime.now(zone).date(),
        "accounts": [_account_members(account, balances.get(account)) for account in accounts],
    }
    return Document(orjson.dumps(document), JSON)


async def _balances(books: AccountBooks, accounts: Collection[str], deadline: float) -> Mapping[str, Balance]:
    try:
        async with asyncio.timeout_at(deadline):
            return await books.balances(accounts)
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
