"""The composition root: settings in, a Starlette application out, whose lifespan closes what was opened."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from time import monotonic
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Send
from starlette.types import Scope as ASGIScope

from proxy.access import Access
from proxy.auth import Credential, Team, Teams
from proxy.cache.price_book import PriceBook
from proxy.embedded.stores import running_url
from proxy.gateway.estimates import Gateway, Policy
from proxy.gateway.fetcher import Asker
from proxy.gateway.freshness import Windows
from proxy.gateway.in_flight import Lifecycle
from proxy.gateway.live_config import InForce, Rules
from proxy.gateway.questions import Reader
from proxy.http.endpoint import StoryEndpoint, probe_answer, refuse_route
from proxy.http.metrics_endpoint import Scrape
from proxy.http.usage_endpoints import Statements
from proxy.quota.batches import Decisions
from proxy.quota.counters import LedgerKeys
from proxy.quota.ledger import Ledger
from proxy.quota.quotas import Quota, Rate, Scope, Terms
from proxy.quota.reports import Reports
from proxy.settings.schema import Quota as QuotaSettings
from proxy.settings.schema import Settings
from proxy.store.client import OLDEST_REDIS, EmbeddedUrls, Store, open_book_store, open_ledger_store
from proxy.store.persistence import data_loss_warning
from proxy.telemetry.descriptors import DescriptorMonitor
from proxy.telemetry.metrics import Metrics
from proxy.upstream.address import ESTIMATE_PATH, Address
from proxy.upstream.client import Upstream

EXPLAIN_PATH = "/v1/explain"
PURGE_PATH = "/v1/cache/purge"
USAGE_PATH = "/v1/usage"
QUOTA_PATH = "/v1/quota"
METRICS_PATH = "/metrics"

log = logging.getLogger(__name__)


class Application(Starlette):
    """Starlette, whose middleware and router estimates leave aside: their endpoint catches what it raises itself."""

    def __init__(self, estimate: StoryEndpoint, routes: Sequence[Route], **how: Any) -> None:
        super().__init__(routes=[Route(ESTIMATE_PATH, estimate, methods=["POST"]), *routes], **how)
        self.router.redirect_slashes = False  # a redirect would repeat the request's Host header
        self._estimate = estimate

    def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        is_estimate = scope["type"] == "http" and scope["path"] == ESTIMATE_PATH and scope["method"] == "POST"
        return self._estimate(scope, receive, send) if is_estimate else super().__call__(scope, receive, send)


def build(settings: Settings, embedded_urls: EmbeddedUrls, lifecycle: Lifecycle, metrics: Metrics) -> Starlette:
    """The gateway as an application. `embedded_urls` say where the stores are that no setting names."""
    ledger_store = open_ledger_store(settings, embedded_urls, metrics)
    book_store = open_book_store(settings, embedded_urls, metrics, ledger=ledger_store)
    api_keys = {name: account.api_key for name, account in settings.accounts.items()}
    upstream = Upstream(settings.upstream, api_keys, metrics)
    book = book_of(settings, book_store, upstream.address)
    asker = Asker(book, upstream, metrics, lifecycle, timeout_s=settings.server.request_timeout_s)
    zone, keys, in_force = settings.org.zone, LedgerKeys(settings.org.id), InForce(rules_of(settings))
    admits_on_outage = settings.store.on_outage == "admit"
    decisions = Decisions(ledger_store, keys, zone, metrics)
    ledger = Ledger(decisions, metrics, admits_on_outage=admits_on_outage)
    metrics.expect_warnings(in_force.rules.terms.values())
    metrics.in_flight = lambda: lifecycle.in_flight
    gateway = Gateway(in_force, ledger, book, asker, Reader(upstream.address), policy_of(settings))
    reports = Reports(ledger_store, keys, zone)
    statements = Statements(in_force, reports, zone)
    scrape = Scrape(in_force, metrics, decisions, reports, book)

    def reload(changed: Settings) -> None:
        """What began under the old rules ends under them."""
        in_force.rules = rules_of(changed)
        metrics.expect_warnings(in_force.rules.terms.values())
        upstream.take_keys({name: account.api_key for name, account in changed.accounts.items()})
        metrics.begin(changed.teams, changed.accounts)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await asyncio.gather(ledger_store.open(), book_store.open())
        await ledger.open()
        monitor = asyncio.create_task(DescriptorMonitor(metrics).run())
        yield
        monitor.cancel()
        await gateway.finish(max(0.0, lifecycle.stop_by - monotonic()))
        metrics.flush()
        await upstream.close()
        await book_store.close()
        await ledger_store.close()

    endpoint = partial(
        StoryEndpoint,
        lifecycle=lifecycle,
        metrics=metrics,
        max_body_bytes=settings.server.max_body_bytes,
        timeout_s=settings.server.request_timeout_s,
    )
    app = Application(
        endpoint("estimate", gateway.estimate),
        routes=[
            Route(EXPLAIN_PATH, endpoint("other", gateway.explain), methods=["POST"]),
            Route(PURGE_PATH, endpoint("other", gateway.purge), methods=["POST"]),
            Route(USAGE_PATH, endpoint("other", statements.usage), methods=["GET"]),
            Route(QUOTA_PATH, endpoint("other", statements.quota), methods=["GET"]),
            Route(METRICS_PATH, endpoint("other", scrape.metrics), methods=["GET"]),
            Route("/healthz", _healthz, methods=["GET"]),
            Route("/readyz", partial(_readyz, (ledger_store, book_store), upstream, lifecycle), methods=["GET"]),
        ],
        exception_handlers={HTTPException: partial(refuse_route, lifecycle, metrics)},
        lifespan=lifespan,
    )
    app.state.reload = reload
    return app


def terms_of(settings: Settings) -> dict[str, Terms]:
    """What holds for each team: its rate, its quotas and the organisation's."""
    org = tuple(_quota("org", quota) for quota in settings.org.quotas)
    terms = {}
    for name, team in settings.teams.items():
        rate = settings.rate_of(team)
        own = tuple(_quota("team", quota) for quota in settings.quotas_of(team))
        terms[name] = Terms(name, Rate(rate.per_s, rate.burst), own + org)
    return terms


def _quota(scope: Scope, quota: QuotaSettings) -> Quota:
    return Quota(scope, quota.measure, quota.per, quota.counted_limit, quota.on_exceed == "refuse")


def rules_of(settings: Settings) -> Rules:
    """What can be reloaded of the settings, but for the accounts' keys."""
    terms = terms_of(settings)
    access = Access(
        teams_of(settings, terms),
        settings.org.zone,
        admin_digests=settings.admin.tokens,
        metrics_digests=settings.metrics.tokens,
        metrics_are_public=settings.metrics.public,
    )
    return Rules(access, terms, frozenset(settings.accounts), settings.cache.ignore)


def teams_of(settings: Settings, terms: Mapping[str, Terms]) -> Teams:
    """The teams by the digests of their tokens."""
    credentials: dict[str, Credential] = {}
    for name, configured in settings.teams.items():
        team = Team(name, configured.account, configured.disabled, terms[name])
        for token in configured.tokens:
            credentials[token.sha256] = Credential(team, token.expires)
    return Teams(credentials)


def book_of(settings: Settings, store: Store, address: Address) -> PriceBook:
    """The price book of the upstream at `address`."""
    cache = settings.cache
    stale_s = max(cache.stale_while_revalidate_s, cache.stale_if_error_s)
    return PriceBook(store, origin=address.origin, ttl_s=cache.ttl_s, stale_s=stale_s)


async def purge_book(settings: Settings, account: str, canonical: bytes | None, query: bytes) -> str:
    """Forgets one question of an account, or all of them, in the store that a running gateway uses.

    Returns what was done, for people. Raises `StoreUnavailable`, `EmbeddedStoreError`.
    """
    embedded = settings.store.url is None and settings.cache.url is None
    urls: EmbeddedUrls = {"price-book": running_url(settings.store.data_dir, role="price-book")} if embedded else {}
    store = open_book_store(settings, urls)
    address = Address.of(settings.upstream.base_url)
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


def policy_of(settings: Settings) -> Policy:
    """What the settings say about answers."""
    cache = settings.cache
    return Policy(
        windows=Windows(cache.stale_while_revalidate_s, cache.stale_if_error_s),
        balance_max_age_s=cache.balance_max_age_s,
        timeout_s=settings.server.request_timeout_s,
        refuse_unpriced=settings.upstream.on_unpriced == "refuse",
    )


async def objections(settings: Settings, embedded_urls: EmbeddedUrls) -> str | None:
    """Why a store must not be used, if its version is known and too old. Logs what could lose the ledger's data."""
    for open_role in (open_ledger_store, open_book_store):
        store = open_role(settings, embedded_urls)
        try:
            version = await store.version()
            if store.role == "ledger":
                await _log_data_loss_risks(store)
        finally:
            await store.close()
        if version is not None and version < OLDEST_REDIS:
            found, oldest = (".".join(map(str, numbers)) for numbers in (version, OLDEST_REDIS))
            return f"the store is Redis {found}: use Redis {oldest} or newer, or Valkey 7.2 or newer"
    return None


async def _log_data_loss_risks(ledger: Store) -> None:
    policy = await ledger.eviction_policy()
    if policy not in (None, "noeviction"):
        log.error(
            "the ledger's server may evict (maxmemory-policy %s): quotas and usage can vanish in silence. "
            "Set it to noeviction, and give the price book a server of its own (cache.url)",
            policy,
        )
    warning = data_loss_warning(await ledger.persistence())
    if warning is not None:
        log.error("the ledger's server %s", warning)


async def _healthz(request: Request) -> Response:
    return probe_answer(request, {"status": "alive"})


async def _readyz(stores: Sequence[Store], upstream: Upstream, lifecycle: Lifecycle, request: Request) -> Response:
    """Ready unless shutting down: a lost store or upstream has its own promises, and all replicas share it."""
    if lifecycle.draining:
        return probe_answer(request, {"status": "draining"}, draining=True)
    found = await asyncio.gather(*(store.is_up() for store in stores))
    degraded: list[str] = [store.role for store, is_up in zip(stores, found, strict=True) if not is_up]
    if upstream.in_trouble:
        degraded.append("upstream")
    return probe_answer(request, {"status": "ready", "degraded": degraded})
