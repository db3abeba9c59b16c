"""The composition root: builds the Starlette application from the settings. Its lifespan closes what it opens."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from time import monotonic
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route

from proxy.gateway.audits import Auditor
from proxy.gateway.canonical_request import RequestParser
from proxy.gateway.estimates import Estimates
from proxy.gateway.explanations import Explanations
from proxy.gateway.fetcher import Fetcher
from proxy.gateway.freshness import StaleLimits
from proxy.gateway.in_flight import InFlightTracker
from proxy.gateway.inferences import Inferences
from proxy.gateway.live_config import ConfigHolder, runtime_config_of
from proxy.gateway.pricing import Policy, Pricing
from proxy.gateway.purge import PurgeHandler
from proxy.gateway.quotes import Quotes
from proxy.http.application import Application
from proxy.http.endpoint import Endpoint
from proxy.http.learned_endpoint import learned
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
from proxy.http.probes import liveness, readiness
from proxy.http.static_files import DOCS_FILES, static_routes
from proxy.http.token_endpoint import token
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
from proxy.settings.masking import SecretText
from proxy.settings.schema import Settings
from proxy.store.access import EmbeddedUrls
from proxy.telemetry.descriptor_monitor import DescriptorMonitor
from proxy.telemetry.metrics import Metrics
from proxy.upstream.client import Upstream


def build(settings: Settings, embedded_urls: EmbeddedUrls, tracker: InFlightTracker, metrics: Metrics) -> Starlette:
    """The gateway as an application. Its `state.reload` takes new settings.

    embedded_urls: the embedded stores, for those that the settings do not name.
    """
    parts = _Parts(settings, embedded_urls, tracker, metrics)
    estimate = parts.endpoint("estimate", parts.estimates.estimate)
    routes = [*parts.routes(), *static_routes(DOCS_FILES), *(page_routes() if settings.page.enabled else ())]
    app = Application(estimate, routes, parts.live, tracker, metrics, lifespan=parts.lifespan)
    app.state.reload = parts.reload
    return app


class _Parts:
    """Everything that a gateway consists of."""

    def __init__(
        self, settings: Settings, embedded_urls: EmbeddedUrls, tracker: InFlightTracker, metrics: Metrics
    ) -> None:
        zone, keys = settings.org.zone, LedgerKeys(settings.org.id)
        max_bytes, timeout_s = settings.server.max_body_bytes, settings.server.request_timeout_s
        self.tracker, self.metrics, self.zone = tracker, metrics, zone
        self.ledger_store = open_ledger_store(settings, embedded_urls, metrics)
        self.book_store = open_book_store(settings, embedded_urls, metrics, ledger=self.ledger_store)
        self.upstream = Upstream(settings.upstream, _api_keys(settings), metrics)
        self.token_uses = TokenUses(self.ledger_store, keys)
        self.live = live = ConfigHolder(runtime_config_of(settings, self.token_uses.record))

        self.batcher = LedgerBatcher(self.ledger_store, keys, zone, metrics)
        self.ledger = Ledger(self.batcher, metrics, admits_on_outage=settings.store.on_outage == "admit")
        self.ledger_reader = LedgerReader(self.ledger_store, keys, zone)
        self.history = UsageHistory(self.ledger_reader, zone)
        self.saved_time = SavedTime(self.ledger_reader, metrics)
        self.price_changes = PriceChangeLog(self.ledger_store, keys, zone)
        self.reports = UsageEndpoints(live, self.ledger_reader, self.history, zone, settings.org.counted_currency)

        policy, parser = _policy_of(settings), RequestParser(self.upstream.address)
        self.book = book = book_of(settings, self.book_store, self.upstream.address)
        self.learner = learner_of(settings, self.book_store, self.upstream.address)
        inferences = Inferences(
            live, self.learner, book.accounts, self.price_changes, metrics, stale_limits=policy.stale_limits
        )
        fetcher = Fetcher(book, self.upstream, inferences, metrics, tracker, self.price_changes, timeout_s=timeout_s)
        auditor = Auditor(book, fetcher, inferences, metrics)
        self.pricing = pricing = Pricing(self.ledger, book, fetcher, auditor, inferences, policy)
        self.estimates, self.explanations = Estimates(live, parser, pricing), Explanations(live, parser, pricing)
        self.quotes = Quotes(live, parser, pricing, tracker, zone)
        self.purges = PurgeHandler(live, book, self.learner, parser)
        self.endpoint = partial(
            Endpoint, tracker=tracker, metrics=metrics, max_body_bytes=max_bytes, timeout_s=timeout_s
        )
        metrics.in_flight = lambda: tracker.in_flight
        self._preregister_warnings()

    def routes(self) -> list[Route]:
        """The API's routes, except for estimates."""
        live, zone, other = self.live, self.zone, partial(self.endpoint, "other")
        metrics = MetricsEndpoint(live, self.metrics, self.batcher, self.ledger_reader, self.history, self.book)
        posts = {
            QUOTE_PATH: self.endpoint("quote", self.quotes.quote),
            EXPLAIN_PATH: other(self.explanations.explain),
            PURGE_PATH: other(self.purges.purge),
        }
        gets: dict[str, Callable[..., Any]] = {
            USAGE_PATH: other(self.reports.usage),
            PRICE_CHANGES_PATH: other(self.reports.price_changes),
            QUOTA_PATH: other(self.reports.quota),
            TOKEN_PATH: other(partial(token, live, self.book.accounts, zone)),
            LEARNED_PATH: other(partial(learned, live, self.learner, zone)),
            METRICS_PATH: other(metrics.metrics),
            LIVENESS_PATH: liveness,
            READINESS_PATH: partial(readiness, (self.ledger_store, self.book_store), self.upstream, self.tracker),
            OPENAPI_PATH: openapi_file().respond,
        }
        return [
            *(Route(path, handler, methods=["POST"]) for path, handler in posts.items()),
            *(Route(path, handler, methods=["GET"]) for path, handler in gets.items()),
        ]

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Opens what needs opening, and closes it."""
        await asyncio.gather(self.ledger_store.open(), self.book_store.open())
        await self.ledger.open()
        background = (DescriptorMonitor(self.metrics), self.token_uses, self.saved_time)
        tasks = [asyncio.create_task(worker.run()) for worker in background]
        yield
        for task in tasks:
            task.cancel()
        await self.pricing.finish(max(0.0, self.tracker.stop_deadline - monotonic()))
        await self.price_changes.close(max(0.0, self.tracker.stop_deadline - monotonic()))
        await self.token_uses.flush()
        await self.saved_time.flush()
        self.metrics.flush()
        await self.upstream.close()
        await self.book_store.close()
        await self.ledger_store.close()

    def reload(self, changed: Settings) -> None:
        """Puts changed settings into force. Requests that have already begun keep the previous ones."""
        self.live.config = runtime_config_of(changed, self.token_uses.record)
        self._preregister_warnings()
        self.upstream.update_keys(_api_keys(changed))
        self.metrics.preregister(changed.teams, changed.accounts)

    def _preregister_warnings(self) -> None:
        """Creates the series of quotas that only warn, so that their first event is an increase."""
        for limits in self.live.config.team_limits.values():
            for quota in limits.quotas:
                if not quota.refuse:
                    self.metrics.quota_warned.labels(quota.owner(limits.team), quota.measure, quota.per)


def _api_keys(settings: Settings) -> dict[str, SecretText]:
    return {name: account.api_key for name, account in settings.accounts.items()}


def _policy_of(settings: Settings) -> Policy:
    """The settings about answers."""
    cache = settings.cache
    return Policy(
        stale_limits=StaleLimits(cache.stale_while_revalidate_s, cache.stale_if_error_s),
        balance_max_age_s=cache.balance_max_age_s,
        timeout_s=settings.server.request_timeout_s,
        refuse_unpriced=settings.upstream.on_unpriced == "refuse",
    )
