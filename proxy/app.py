"""The composition root: settings in, a Starlette application out, whose lifespan closes what was opened."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from time import monotonic

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from proxy.asking import Asker
from proxy.choices import Windows
from proxy.embedded import running_url
from proxy.gateway import Gateway, Policy
from proxy.metrics import Metrics
from proxy.pricebook import PriceBook
from proxy.settings import Settings
from proxy.store import OLDEST_REDIS, Store, open_store
from proxy.teams import Credential, Team, Teams
from proxy.upstream import ESTIMATE_PATH, Address, Upstream
from proxy.web import Lifecycle, StoryEndpoint, refuse_route

EXPLAIN_PATH = "/v1/explain"
PURGE_PATH = "/v1/cache/purge"


def build(settings: Settings, embedded_url: str | None, lifecycle: Lifecycle, metrics: Metrics) -> Starlette:
    """The gateway as an application. `embedded_url` is where the store is that no setting names."""
    store = open_store(settings.store, embedded_url)
    upstream = Upstream(settings.upstream, {name: account.api_key for name, account in settings.accounts.items()})
    book = book_of(settings, store, upstream.address)
    asker = Asker(
        book,
        upstream,
        metrics,
        timeout_s=settings.server.request_timeout_s,
        ignored=settings.cache.ignore,
    )
    gateway = Gateway(teams_of(settings), book, asker, upstream.address, policy_of(settings))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await gateway.finish(max(0.0, lifecycle.stop_by - monotonic()))
        await upstream.close()
        await store.close()

    endpoint = partial(
        StoryEndpoint,
        lifecycle=lifecycle,
        max_body_bytes=settings.server.max_body_bytes,
        timeout_s=settings.server.request_timeout_s,
    )
    app = Starlette(
        routes=[
            Route(ESTIMATE_PATH, endpoint("estimate", gateway.estimate), methods=["POST"]),
            Route(EXPLAIN_PATH, endpoint("other", gateway.explain), methods=["POST"]),
            Route(PURGE_PATH, endpoint("other", gateway.purge), methods=["POST"]),
            Route("/healthz", _healthz, methods=["GET"]),
            Route("/readyz", partial(_readyz, store, upstream, lifecycle), methods=["GET"]),
        ],
        exception_handlers={HTTPException: partial(refuse_route, lifecycle)},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirect would repeat the request's Host header
    return app


def teams_of(settings: Settings) -> Teams:
    """The teams by the digests of their tokens."""
    credentials: dict[str, Credential] = {}
    for name, configured in settings.teams.items():
        team = Team(name, configured.account, configured.disabled)
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
    embedded_url = running_url(settings.store.data_dir) if settings.store.url is None else None
    store = open_store(settings.store, embedded_url)
    address = Address.of(settings.upstream.base_url)
    book = book_of(settings, store, address)
    try:
        if canonical is None:
            await book.purge_account(account)
            return f"purged all prices of the account {account}"
        sent = address.query_as_sent(query)
        key = address.key_of(canonical, account=account, query=sent, ignored=settings.cache.ignore)
        return f"purged {key}" if await book.purge_question(key) else f"nothing was stored for {key}"
    finally:
        await store.close()


def policy_of(settings: Settings) -> Policy:
    """What the settings say about answers."""
    cache = settings.cache
    return Policy(
        zone=settings.org.zone,
        accounts=frozenset(settings.accounts),
        admin_digests=frozenset(settings.admin.tokens),
        ignored=cache.ignore,
        windows=Windows(cache.stale_while_revalidate_s, cache.stale_if_error_s),
        balance_max_age_s=cache.balance_max_age_s,
        timeout_s=settings.server.request_timeout_s,
        refuse_unpriced=settings.upstream.on_unpriced == "refuse",
    )


async def objection(settings: Settings, embedded_url: str | None) -> str | None:
    """Why the store must not be used, if its version is known and too old."""
    store = open_store(settings.store, embedded_url)
    try:
        version = await store.version()
    finally:
        await store.close()
    if version is None or version >= OLDEST_REDIS:
        return None
    found, oldest = (".".join(map(str, numbers)) for numbers in (version, OLDEST_REDIS))
    return f"the store is Redis {found}: use Redis {oldest} or newer, or Valkey 7.2 or newer"


async def _healthz(_: Request) -> Response:
    return JSONResponse({"status": "alive"})


async def _readyz(store: Store, upstream: Upstream, lifecycle: Lifecycle, _: Request) -> Response:
    """Ready unless shutting down: a lost store or upstream has its own promises, and all replicas share it."""
    if lifecycle.draining:
        return JSONResponse({"status": "draining"}, 503, {"connection": "close", "cache-control": "no-store"})
    degraded = [] if await store.ping() else ["store"]
    if upstream.in_trouble:
        degraded.append("upstream")
    return JSONResponse({"status": "ready", "degraded": degraded})
