"""Opens the stores of the ledger and the price book as the settings say, and checks them at startup."""

import logging
from dataclasses import replace

from proxy.cache.price_book import PriceBook
from proxy.learning.learner import Learner
from proxy.settings.schema import Settings
from proxy.store.access import EmbeddedUrls, StoreAccess
from proxy.store.client import Store
from proxy.store.persistence import data_loss_warning
from proxy.store.scripts import scripts_in
from proxy.telemetry.metrics import Metrics
from proxy.upstream.address import UpstreamAddress

MIN_REDIS_VERSION = (7, 0)

log = logging.getLogger(__name__)


def open_ledger_store(settings: Settings, embedded_urls: EmbeddedUrls, metrics: Metrics | None = None) -> Store:
    """The ledger's store: `store.url`, or else the embedded one."""
    if settings.store.url is None:
        url, access = embedded_urls["ledger"], _access_without_credentials(settings)
    else:
        url, access = settings.store.url.get_secret_value(), _ledger_access(settings)
    return Store(url, "ledger", metrics, access=access, preload=scripts_in("proxy.quota"))


def open_book_store(
    settings: Settings, embedded_urls: EmbeddedUrls, metrics: Metrics | None = None, *, ledger: Store | None = None
) -> Store:
    """The price book's store: `cache.url`, or else `store.url`, or else the embedded one.

    ledger: the ledger's store, if it is open. If both use one server, they share its cool-downs.
    """
    cooldowns = None
    if settings.cache.url is not None:
        url, access = settings.cache.url.get_secret_value(), _access_without_credentials(settings)
    elif settings.store.url is not None:
        url, access = settings.store.url.get_secret_value(), _ledger_access(settings)
        cooldowns = None if ledger is None else ledger.cooldowns
    else:
        url, access = embedded_urls["price-book"], _access_without_credentials(settings)
    preload = scripts_in("proxy.cache") + scripts_in("proxy.learning")
    return Store(url, "price-book", metrics, access=access, cooldowns=cooldowns, preload=preload)


def book_of(settings: Settings, store: Store, address: UpstreamAddress) -> PriceBook:
    """The price book for the upstream at `address`."""
    cache = settings.cache
    stale_s = max(cache.stale_while_revalidate_s, cache.stale_if_error_s)
    return PriceBook(store, origin=address.origin, ttl_s=cache.ttl_s, stale_s=stale_s)


def learner_of(settings: Settings, store: Store, address: UpstreamAddress) -> Learner:
    """What is learned about prices of the upstream at `address`. It is in the price book's store."""
    cache = settings.cache
    return Learner(
        store, origin=address.origin, ttl_s=cache.ttl_s, learn_from=cache.learn_from, audit_one_in=cache.audit_one_in
    )


async def startup_errors(settings: Settings, embedded_urls: EmbeddedUrls) -> str | None:
    """Why the gateway must not start: a store's version is too old. None if there is no reason.

    An unknown version is accepted. Logs an error for each setting of the ledger's server that could lose data.
    """
    for open_role in (open_ledger_store, open_book_store):
        store = open_role(settings, embedded_urls)
        try:
            version = await store.version()
            if store.role == "ledger":
                await _log_data_loss_risks(store)
        finally:
            await store.close()
        if error := version_error(version):
            return f"the store {error}"
    return None


def version_error(version: tuple[int, ...] | None) -> str | None:
    """Why a store of this version cannot be used, as the predicate of a sentence."""
    if version is None or version >= MIN_REDIS_VERSION:
        return None
    found, minimum = (".".join(map(str, numbers)) for numbers in (version, MIN_REDIS_VERSION))
    return f"is Redis {found}: use Redis {minimum} or newer, or Valkey 7.2 or newer"


def eviction_warning(policy: str | None) -> str | None:
    """What is wrong with the ledger's `maxmemory-policy`, as the predicate of a sentence; None if nothing."""
    if policy in (None, "noeviction"):
        return None
    return (
        f"may evict keys (maxmemory-policy {policy}), so quotas and usage can disappear unnoticed: "
        "set maxmemory-policy to noeviction, and give the price book a server of its own (cache.url)"
    )


async def _log_data_loss_risks(ledger: Store) -> None:
    for warning in (eviction_warning(await ledger.eviction_policy()), data_loss_warning(await ledger.persistence())):
        if warning is not None:
            log.error("the ledger's server %s", warning)


def _ledger_access(settings: Settings) -> StoreAccess:
    store = settings.store
    return replace(
        _access_without_credentials(settings),
        username=store.username,
        password=None if store.password is None else store.password.get_secret_value(),
        sentinel_password=None if store.sentinel_password is None else store.sentinel_password.get_secret_value(),
    )


def _access_without_credentials(settings: Settings) -> StoreAccess:
    """Certificates and timeouts are shared by both stores. Credentials are not: those of `cache.url` are in the URL."""
    store = settings.store
    return StoreAccess(
        ca_file=store.ca_file,
        cert_file=store.cert_file,
        key_file=store.key_file,
        timeout_s=store.timeout_s,
        connect_timeout_s=store.connect_timeout_s,
    )
