"""The composition root: builds the Starlette application from the settings. Its lifespan closes what it opens."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
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

from proxy.gateway.canonical_request import RequestParser
from proxy.gateway.estimates import Gateway, Policy
from proxy.gateway.fetcher import Fetcher
from proxy.gateway.freshness import StaleLimits
from proxy.gateway.in_flight import InFlightTracker
from proxy.gateway.inferences import Inferences
from proxy.gateway.live_config import ConfigHolder, RuntimeConfig, runtime_config_of
from proxy.gateway.purge import PurgeHandler
from proxy.gateway.quotes import Quotes
from proxy.http.connection import SCOPE_HEADERS
from proxy.http.cors import Cors, Refuse
from proxy.http.endpoint import Endpoint, refuse, refuse_route
from proxy.http.learned_endpoint import LearnedEndpoint
from proxy.http.metrics_endpoint import MetricsEndpoint
from proxy.http.openapi.document import openapi_file
from proxy.http.page_routes import page_routes
from proxy.http.paths import (
    EXPLAIN_PATH,
    LEARNED_PATH,
    LIVENESS_PATH,
    METRICS_PATH,
    OPENAPI_PATH,
    PRICE_CHANGES_PATH,
    PURGE_PATH,
    QUOTA_PATH,
    QUOTE_PATH,
    READINESS_PATH,
    TOKEN_PATH,
    USAGE_PATH,
)
from proxy.http.responses import probe_answer
from proxy.http.static_files import DOCS_FILES, static_routes
from proxy.http.token_endpoint import TokenEndpoint
from proxy.http.usage_endpoints import UsageEndpoints
from proxy.open_stores import book_of, learner_of, open_book_store, open_ledger_store
from proxy.quota.batches import LedgerBatcher
from proxy.quota.counters import LedgerKeys
from proxy.quota.history import UsageHistory
from proxy.quota.ledger import Ledger
from proxy.quota.ledger_reader import LedgerReader
from proxy.quota.price_change_log import PriceChangeLog
from proxy.quota.saved_time import SavedTime
from proxy.quota.token_uses import TokenUses
from proxy.settings.schema import SecretText, Settings
from proxy.store.access import EmbeddedUrls
from proxy.store.client import Store
from proxy.telemetry.descriptor_monitor import DescriptorMonitor
from proxy.telemetry.metrics import Metrics
from proxy.upstream.address import ESTIMATE_PATH
from proxy.upstream.client import Upstream


class Application(Starlette):
    """A Starlette application that calls the endpoint of estimates directly, without its middleware and router.

    That saves time on the hot path. The endpoint turns exceptions into responses itself.

    refuse: see `Cors`.
    """

    def __init__(
        self,
        estimate: Endpoint,
        routes: Sequence[Route],
        live: ConfigHolder,
        refuse: Refuse,
        **options: Any,
    ) -> None:
        super().__init__(routes=[Route(ESTIMATE_PATH, estimate, methods=["POST"]), *routes], **options)
        self.router.redirect_slashes = False  # a redirect would repeat the request's Host header
        self._estimate = estimate
        self._cors = Cors(self._serve, lambda: live.config.cors_origins, refuse)

    def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        if scope["type"] == "http" and scope[SCOPE_HEADERS].origin is not None:
            return self._cors(scope, receive, send)
        return self._serve(scope, receive, send)

    def _serve(self, scope: ASGIScope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        is_estimate = scope["type"] == "http" and scope["path"] == ESTIMATE_PATH and scope["method"] == "POST"
        return self._estimate(scope, receive, send) if is_estimate else super().__call__(scope, receive, send)


def build(settings: Settings, embedded_urls: EmbeddedUrls, tracker: InFlightTracker, metrics: Metrics) -> Starlette:
    """The gateway as an application. Its `state.reload` takes new settings.

    embedded_urls: the embedded stores, for those that the settings do not name.
    """
    ledger_store = open_ledger_store(settings, embedded_urls, metrics)
    book_store = open_book_store(settings, embedded_urls, metrics, ledger=ledger_store)
    upstream = Upstream(settings.upstream, _api_keys(settings), metrics)
    book = book_of(settings, book_store, upstream.address)
    timeout_s = settings.server.request_timeout_s
    zone, keys = settings.org.zone, LedgerKeys(settings.org.id)
    price_changes = PriceChangeLog(ledger_store, keys, zone)
    token_uses = TokenUses(ledger_store, keys)
    live = ConfigHolder(runtime_config_of(settings, token_uses.record))
    policy = _policy_of(settings)
    learner = learner_of(settings, book_store, upstream.address)
    inferences = Inferences(live, learner, book.accounts, price_changes, metrics, stale_limits=policy.stale_limits)
    fetcher = Fetcher(book, upstream, inferences, metrics, tracker, price_changes, timeout_s=timeout_s)
    batcher = LedgerBatcher(ledger_store, keys, zone, metrics)
    ledger = Ledger(batcher, metrics, admits_on_outage=settings.store.on_outage == "admit")
    ledger_reader = LedgerReader(ledger_store, keys, zone)
    history = UsageHistory(ledger_reader, zone)
    saved_time = SavedTime(ledger_reader, metrics)
    parser = RequestParser(upstream.address)
    gateway = Gateway(live, ledger, book, fetcher, inferences, parser, policy=policy)
    quotes = Quotes(live, gateway, book, parser, tracker, zone=zone)
    purges = PurgeHandler(live, book, learner, parser)
    usage_endpoints = UsageEndpoints(live, ledger_reader, history, zone, settings.org.counted_currency)
    token_endpoint = TokenEndpoint(live, book.accounts, zone)
    learned_endpoint = LearnedEndpoint(live, learner, zone)
    metrics_endpoint = MetricsEndpoint(live, metrics, batcher, ledger_reader, history, book)
    _preregister_warnings(metrics, live.config)
    metrics.in_flight = lambda: tracker.in_flight

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await asyncio.gather(ledger_store.open(), book_store.open())
        await ledger.open()
        background = [
            asyncio.create_task(work) for work in (DescriptorMonitor(metrics).run(), token_uses.run(), saved_time.run())
        ]
        yield
        for task in background:
            task.cancel()
        await gateway.finish(max(0.0, tracker.stop_deadline - monotonic()))
        await price_changes.close(max(0.0, tracker.stop_deadline - monotonic()))
        await token_uses.flush()
        metrics.flush()
        await upstream.close()
        await book_store.close()
        await ledger_store.close()

    max_body_bytes = settings.server.max_body_bytes
    endpoint = partial(Endpoint, tracker=tracker, metrics=metrics, max_body_bytes=max_body_bytes, timeout_s=timeout_s)
    app = Application(
        endpoint("estimate", gateway.estimate),
        routes=[
            Route(QUOTE_PATH, endpoint("quote", quotes.quote), methods=["POST"]),
            Route(EXPLAIN_PATH, endpoint("other", gateway.explain), methods=["POST"]),
            Route(PURGE_PATH, endpoint("other", purges.purge), methods=["POST"]),
            Route(USAGE_PATH, endpoint("other", usage_endpoints.usage), methods=["GET"]),
            Route(PRICE_CHANGES_PATH, endpoint("other", usage_endpoints.price_changes), methods=["GET"]),
            Route(QUOTA_PATH, endpoint("other", usage_endpoints.quota), methods=["GET"]),
            Route(TOKEN_PATH, endpoint("other", token_endpoint.token), methods=["GET"]),
            Route(LEARNED_PATH, endpoint("other", learned_endpoint.learned), methods=["GET"]),
            Route(METRICS_PATH, endpoint("other", metrics_endpoint.metrics), methods=["GET"]),
            Route(LIVENESS_PATH, _healthz, methods=["GET"]),
            Route(OPENAPI_PATH, openapi_file().respond, methods=["GET"]),
            *static_routes(DOCS_FILES),
            Route(READINESS_PATH, partial(_readyz, (ledger_store, book_store), upstream, tracker), methods=["GET"]),
            *(page_routes() if settings.page.enabled else ()),
        ],
        live=live,
        refuse=partial(refuse, tracker, metrics),
        exception_handlers={HTTPException: partial(refuse_route, tracker, metrics)},
        lifespan=lifespan,
    )
    app.state.reload = partial(_reload, live, metrics, upstream, token_uses)
    return app


def _reload(live: ConfigHolder, metrics: Metrics, upstream: Upstream, token_uses: TokenUses, changed: Settings) -> None:
    """Puts changed settings into force. Requests that have already begun keep the previous ones."""
    live.config = runtime_config_of(changed, token_uses.record)
    _preregister_warnings(metrics, live.config)
    upstream.update_keys(_api_keys(changed))
    metrics.preregister(changed.teams, changed.accounts)


def _api_keys(settings: Settings) -> dict[str, SecretText]:
    return {name: account.api_key for name, account in settings.accounts.items()}


def _preregister_warnings(metrics: Metrics, config: RuntimeConfig) -> None:
    """Creates the series of quotas that only warn, so that their first event is an increase."""
    for limits in config.team_limits.values():
        for quota in limits.quotas:
            if not quota.refuse:
                metrics.quota_warned.labels(quota.owner(limits.team), quota.measure, quota.per)


def _policy_of(settings: Settings) -> Policy:
    """The settings about answers."""
    cache = settings.cache
    return Policy(
        stale_limits=StaleLimits(cache.stale_while_revalidate_s, cache.stale_if_error_s),
        balance_max_age_s=cache.balance_max_age_s,
        timeout_s=settings.server.request_timeout_s,
        refuse_unpriced=settings.upstream.on_unpriced == "refuse",
    )


async def _healthz(request: Request) -> Response:
    return probe_answer(request, {"status": "alive"})


async def _readyz(stores: Sequence[Store], upstream: Upstream, tracker: InFlightTracker, request: Request) -> Response:
    """Ready unless draining.

    A lost store or upstream is only reported as degraded: it affects all replicas at once, and the gateway still serves
    without it as documented.
    """
    if tracker.draining:
        return probe_answer(request, {"status": "draining"}, draining=True)
    are_up = await asyncio.gather(*(store.is_up() for store in stores))
    degraded: list[str] = [store.role for store, is_up in zip(stores, are_up, strict=True) if not is_up]
    if upstream.is_failing:
        degraded.append("upstream")
    return probe_answer(request, {"status": "ready", "degraded": degraded})
