"""Reads and changes the stores for the command line: directly, without going through a gateway."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from proxy.auth import token_id_of
from proxy.cli.inputs import fail
from proxy.embedded.stores import running_url
from proxy.embedded.valkey import EmbeddedStoreError
from proxy.gateway.live_config import directory_of, limits_of
from proxy.open_stores import book_of, open_book_store, open_ledger_store
from proxy.problems import BadRequest, Code, StoreUnavailable
from proxy.quota.counters import LedgerKeys
from proxy.quota.price_changes import PriceChangeQuery, PriceChanges
from proxy.quota.quotas import QuotaState
from proxy.quota.reports import LedgerReader
from proxy.quota.usage import Usage, UsageQuery
from proxy.settings.schema import Settings
from proxy.store.access import EmbeddedUrls
from proxy.upstream.address import UpstreamAddress

_Read = TypeVar("_Read")


def from_store(reading: Coroutine[Any, Any, _Read]) -> _Read:
    """The result. If the store cannot be read, prints why and exits."""
    try:
        return asyncio.run(reading)
    except EmbeddedStoreError as error:
        fail(str(error))
    except StoreUnavailable:
        fail("the store is unreachable")


async def read_usage(settings: Settings, query: UsageQuery) -> Usage:
    """Raises `BadRequest` if the team is unknown, `StoreUnavailable`, `EmbeddedStoreError`."""
    async with _open_ledger_reader(settings) as ledger_reader:
        directory = directory_of(settings)
        if query.team not in (None, *settings.teams, *directory.current, *await ledger_reader.teams()):
            raise BadRequest(
                Code.INVALID_QUERY, f"team: {query.team!r} is not configured and never had usage: check the id."
            )
        return await ledger_reader.usage(query, directory)


async def read_quota_states(settings: Settings, team: str | None) -> list[QuotaState]:
    """The quota state of a team, or with None of all. Raises `StoreUnavailable`, `EmbeddedStoreError`."""
    wanted = [limits for limits in limits_of(settings).values() if team in (None, limits.team)]
    async with _open_ledger_reader(settings) as ledger_reader:
        return await ledger_reader.quota_states(wanted)


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
    data_dir = settings.store.data_dir
    embedded_urls: EmbeddedUrls = {"ledger": running_url(data_dir, role="ledger")} if settings.store.url is None else {}
    store = open_ledger_store(settings, embedded_urls)
    try:
        await store.open()
        yield LedgerReader(store, LedgerKeys(settings.org.id), settings.org.zone)
    finally:
        await store.close()


async def purge_book(settings: Settings, account: str, canonical: bytes | None, query: bytes) -> str:
    """Removes the price of one body of an account, or with None all its prices, from the price book's store.

    Returns a message for people. Raises `StoreUnavailable`, `EmbeddedStoreError`.
    """
    embedded = settings.store.url is None and settings.cache.url is None
    urls: EmbeddedUrls = {"price-book": running_url(settings.store.data_dir, role="price-book")} if embedded else {}
    store = open_book_store(settings, urls)
    address = UpstreamAddress.of(settings.upstream.base_url)
    book = book_of(settings, store, address)
    try:
        await store.open()
        if canonical is None:
            await book.purge_account(account)
            return f"purged all prices of the account {account}"
        sent = address.query_as_sent(query)
        key = address.key_of(canonical, account=account, query=sent, ignored=settings.cache.ignore)
        return f"purged {key}" if await book.purge_question(key, account) else f"nothing was stored for {key}"
    finally:
        await store.close()
