"""`GET /v1/learned`: what was learned about prices, by account and scope, for admin and viewer tokens.

`account=ID` shows one account. The answer has neither keys nor amounts.
"""

import asyncio
from zoneinfo import ZoneInfo

import orjson

from proxy.gateway.live_config import ConfigHolder
from proxy.gateway.request import ClientRequest, Document, Trace
from proxy.http.headers import JSON
from proxy.http.report_access import reader_of
from proxy.learning.learner import Learner
from proxy.learning.report import accounts_document
from proxy.problems import Code, Problem, StoreUnavailable
from proxy.quota.report_queries import read_parameters


async def learned(
    live: ConfigHolder, learner: Learner, zone: ZoneInfo, request: ClientRequest, trace: Trace
) -> Document | Problem:
    """The scopes of one account, or of all. Raises `BadRequest`."""
    config = live.config
    reader = reader_of(request.token, trace, config.access)
    if isinstance(reader, Problem):
        return reader
    if reader is not None:
        return Problem(Code.FORBIDDEN, "This needs a viewer or admin token; you sent a team's token.")
    account = read_parameters(request.query, ("account",)).get("account")
    if account not in (None, *config.accounts):
        known = ", ".join(sorted(config.accounts))
        return Problem(Code.INVALID_QUERY, f"account is not configured: use one of {known}.")
    accounts = sorted(config.accounts) if account is None else [account]
    try:
        async with asyncio.timeout_at(request.deadline):
            scopes = await asyncio.gather(*map(learner.scopes, accounts))
    except (StoreUnavailable, TimeoutError):
        detail = "The price book's store is unavailable: send the request again."
        return Problem(Code.STORE_UNAVAILABLE, detail, retry_after_s=1)
    found = dict(zip(accounts, scopes, strict=True))
    return Document(orjson.dumps(accounts_document(config.learn, found, zone)), JSON)
