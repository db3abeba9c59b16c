"""Reads and changes the stores for the command line: directly, without going through a gateway."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

from proxy.auth import token_id_of
from proxy.cli.inputs import fail
from proxy.embedded.stores import running_url
from proxy.embedded.valkey import EmbeddedStoreError
from proxy.gateway.canonical_request import RequestParser
from proxy.gateway.live_config import directory_of, limits_of
from proxy.learning.evidence import Scope
from proxy.learning.learner import Learner
from proxy.open_stores import book_of, learner_of, open_book_store, open_ledger_store
from proxy.problems import BadRequest, Code, StoreUnavailable
from proxy.quota.counters import LedgerKeys
from proxy.quota.forecast import Forecasts
from proxy.quota.history import UsageHistory
from proxy.quota.ledger_reader import LedgerReader
from proxy.quota.price_changes import PriceChanges
from proxy.quota.quotas import QuotaState
from proxy.quota.report_queries import PriceChangeQuery, UsageQuery
from proxy.quota.usage import Usage
from proxy.settings.schema import Settings
from proxy.store.access import EmbeddedUrls, Role
from proxy.store.client import Store
from proxy.upstream.address import UpstreamAddress

_Result = TypeVar("_Result")


def from_store(reading: Coroutine[Any, Any, _Result]) -> _Result:
    """The result. If the store cannot be read, prints why and exits."""
    logging.getLogger("proxy").addHandler(logging.NullHandler())  # the message below says it
    try:
        return asyncio.run(reading)
    except EmbeddedStoreError as error:
        fail(str(error))
    except StoreUnavailable as error:
        fail(f"the store is unreachable ({error}): check that it runs, and store.url and cache.url")


def change_store(change: Coroutine[Any, Any, _Result], *, in_doubt: str) -> _Result:
    """The result of `change`. If the store fails, prints why and exits. `in_doubt`: what may not have been done."""
    logging.getLogger("proxy").addHandler(logging.NullHandler())  # the message below says it
    try:
        return asyncio.run(change)
    except EmbeddedStoreError as error:
        fail(str(error))
    except StoreUnavailable:
        fail(f"the store is unreachable: {in_doubt}; try again")


async def read_usage(settings: Settings, query: UsageQuery) -> Usage:
    """Raises `BadRequest` if the team is unknown, `StoreUnavailable`, `EmbeddedStoreError`."""
    async with _open_ledger_reader(settings) as ledger_reader:
        directory = directory_of(settings)
        if query.team not in (None, *settings.teams, *directory.current, *await ledger_reader.teams()):
            raise BadRequest(
                Code.INVALID_QUERY, f"team: {query.team!r} is not configured and never had usage: check the id."
            )
        return await ledger_reader.usage(query, directory)


async def read_quotas(settings: Settings, team: str | None) -> tuple[list[QuotaState], Forecasts]:
    """The quota state of a team, or with None of all. Raises `StoreUnavailable`, `EmbeddedStoreError`."""
    wanted = [limits for limits in limits_of(settings).values() if team in (None, limits.team)]
    async with _open_ledger_reader(settings) as ledger_reader:
        quota_states = await ledger_reader.quota_states(wanted)
        history = UsageHistory(ledger_reader, settings.org.zone)
        return quota_states, await history.forecasts(quota_states, directory_of(settings))


async def read_price_changes(settings: Settings, query: PriceChangeQuery) -> PriceChanges:
    """Raises `StoreUnavailable`, `EmbeddedStoreError`."""
    async with _open_ledger_reader(settings) as ledger_reader:
        return await ledger_reader.price_changes(query)


async def read_token_uses(settings: Settings, digests: Sequence[str]) -> dict[str, int]:
    """The hour in which each token was last used, by token id. Raises `StoreUnavailable`, `EmbeddedStoreError`."""
    async with _open_ledger_reader(settings) as ledger_reader:
        return await ledger_reader.token_uses([token_id_of(digest) for digest in digests])


@asynccontextmanager
async def _open_ledger_reader(settings: Settings) -> AsyncIterator[LedgerReader]:
    async with _opened(open_ledger_store(settings, running_urls(settings, "ledger"))) as store:
        yield LedgerReader(store, LedgerKeys(settings.org.id), settings.org.zone)


async def purge_book(settings: Settings, account: str, canonical: bytes | None, query: bytes) -> str:
    """Removes the price of one body of an account and of its setting, or with None all prices of the account.

    Returns a message for people. Raises `StoreUnavailable`, `EmbeddedStoreError`.
    """
    address = UpstreamAddress.of(settings.upstream.base_url)
    async with _open_book_store(settings) as store:
        book, learner = book_of(settings, store, address), learner_of(settings, store, address)
        if canonical is None:
            await book.purge_account(account)
            await learner.drop_prices(account)
            return f"purged all prices of the account {account}"
        question = RequestParser(address).from_canonical(
            canonical, account=account, query=query, ignored=settings.cache.ignore
        )
        found = await book.purge_question(question.key, account)
        await learner.drop_setting(question, settings.cache.never_learn)
        return f"purged {question.key}" if found else f"nothing was stored for {question.key}"


async def read_learned(settings: Settings, accounts: Sequence[str]) -> dict[str, list[Scope]]:
    """What was learned, by account. Raises `StoreUnavailable`, `EmbeddedStoreError`."""
    async with _open_learner(settings) as learner:
        return {account: await learner.scopes(account) for account in accounts}


async def forget_learned(settings: Settings, account: str, scope: str | None) -> int:
    """Forgets a scope of an account, or with None all. Returns how many. Raises as `read_learned`."""
    async with _open_learner(settings) as learner:
        return await learner.forget(account, scope)


@asynccontextmanager
async def _open_learner(settings: Settings) -> AsyncIterator[Learner]:
    async with _open_book_store(settings) as store:
        yield learner_of(settings, store, UpstreamAddress.of(settings.upstream.base_url))


def _open_book_store(settings: Settings) -> AbstractAsyncContextManager[Store]:
    return _opened(open_book_store(settings, running_urls(settings, "price-book")))


def running_urls(settings: Settings, role: Role) -> EmbeddedUrls:
    """The URL of the store if it is embedded; a gateway must be running."""
    return {role: running_url(settings.store.data_dir, role=role)} if role in settings.embedded_roles else {}


@asynccontextmanager
async def _opened(store: Store) -> AsyncIterator[Store]:
    try:
        await store.open()
        yield store
    finally:
        await store.close()
