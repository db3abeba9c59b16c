"""`estimate-proxy check --connect`: connects to the stores and to RenderNet's host, and reports what it finds.

It changes nothing in the stores, and sends RenderNet neither a request nor a key.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from proxy.cache.prices import store_keys
from proxy.cli.direct import running_urls
from proxy.embedded.valkey import EmbeddedStoreError
from proxy.open_stores import eviction_warning, open_book_store, open_ledger_store, version_error
from proxy.problems import StoreUnavailable
from proxy.quota.counters import LedgerKeys
from proxy.settings.masking import masked_url
from proxy.settings.schema import Settings
from proxy.store.access import EmbeddedUrls, Role
from proxy.store.client import Store
from proxy.store.persistence import Persistence, data_loss_warning
from proxy.upstream.client import http_client_of
from proxy.upstream.http_client import ConnectError

MAX_CLOCK_LEAD_S = 2.0
"""Windows end by the store's clock, and days of reports by the gateway's: more than this shows at their borders."""

CERTIFICATE_ENDS_SOON_DAYS = 14


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found at one place.

    warnings, errors: as predicates of a sentence about `place`. With an error the gateway would not work.
    """

    place: str
    facts: str
    warnings: Sequence[str] = ()
    errors: Sequence[str] = ()


async def probe(settings: Settings) -> list[Finding]:
    """Tries the ledger's store, the price book's store, and RenderNet's host."""
    logging.getLogger("proxy").addHandler(logging.NullHandler())  # the findings say it
    return list(await asyncio.gather(_probe_ledger(settings), _probe_book(settings), _probe_upstream(settings)))


async def _probe_ledger(settings: Settings) -> Finding:
    return await _probe_store(settings, "ledger", open_ledger_store, LedgerKeys(settings.org.id).teams)


async def _probe_book(settings: Settings) -> Finding:
    if settings.cache.url is None and settings.store.url is not None:
        return Finding("the price book", "in the ledger's store")
    return await _probe_store(settings, "price-book", open_book_store, store_keys("check")[0])


async def _probe_store(
    settings: Settings, role: Role, open_store: Callable[[Settings, EmbeddedUrls], Store], key: str
) -> Finding:
    place = f"the {role.replace('-', ' ')} ({_store_text(settings, role)})"
    try:
        store = open_store(settings, running_urls(settings, role))
    except EmbeddedStoreError:
        return Finding(place, "not tried: an embedded store runs only while its gateway does")
    try:
        await store.open()
        await store.check_writes(key)
    except StoreUnavailable as error:
        hint = " (so it looks when the server has no TLS: then the URL begins with redis://)" if store.uses_tls else ""
        return Finding(place, "failed", errors=[f"cannot be used: {error}{hint}"])
    else:
        return await _store_facts(store, place)
    finally:
        await store.close()


def _store_text(settings: Settings, role: Role) -> str:
    url = settings.store.url if role == "ledger" else settings.cache.url
    return f"embedded, in {settings.store.data_dir}" if url is None else masked_url(url.get_secret_value())


async def _store_facts(store: Store, place: str) -> Finding:
    version, policy = await store.version(), await store.eviction_policy()
    servers, lead_s = await store.persistence(), await store.clock_lead_s()
    facts = (
        "TLS" if store.uses_tls else "no TLS",
        "version unknown" if version is None else f"Redis {'.'.join(map(str, version))} or compatible",
        f"maxmemory-policy {policy or 'unknown'}",
        *map(_persistence_text, dict.fromkeys(servers)),  # of each kind of server once
        "clock unknown" if lead_s is None else f"clock {abs(lead_s):.3f} s {'ahead' if lead_s > 0 else 'behind'}",
    )
    warnings = []
    if store.role == "ledger":
        warnings = [eviction_warning(policy), data_loss_warning(servers)]
    if lead_s is not None and abs(lead_s) > MAX_CLOCK_LEAD_S:
        warnings.append(f"has a clock {abs(lead_s):.1f} s off this machine's: synchronise both")
    error = version_error(version)
    return Finding(place, ", ".join(facts), [line for line in warnings if line], [error] if error else [])


def _persistence_text(server: Persistence) -> str:
    append_only = {None: "unknown", True: "yes", False: "no"}[server.append_only]
    text = f"appendonly {append_only}"
    if server.append_only and server.appendfsync:
        text += f", appendfsync {server.appendfsync}"
    return text if server.save is None else f'{text}, save "{server.save}"'


async def _probe_upstream(settings: Settings) -> Finding:
    upstream = settings.upstream
    proxy = "" if upstream.proxy is None else f" through {masked_url(upstream.proxy.get_secret_value())}"
    place, client = f"RenderNet ({upstream.base_url}{proxy})", http_client_of(upstream)
    try:
        async with asyncio.timeout(upstream.timeout_s):
            tls = await client.try_connecting()
    except ConnectError as error:
        return Finding(place, "failed", errors=[f"cannot be connected to: {error}"])
    except TimeoutError:
        reason = f"no connection within upstream.timeout_s ({upstream.timeout_s:g} s)"
        return Finding(place, "failed", errors=[f"cannot be connected to: {reason}"])
    finally:
        await client.close()
    if tls is None:
        return Finding(place, "connected, no TLS")
    left, last_day = (tls.ends_at - datetime.now(UTC)).days, f"{tls.ends_at:%Y-%m-%d}"
    warnings = [f"has a certificate that ends on {last_day}"] if left <= CERTIFICATE_ENDS_SOON_DAYS else []
    return Finding(place, f"connected, {tls.version}, certificate until {last_day}", warnings)
