"""A question on its way upstream, asked once in the fleet.

In this process equal questions share a flight. Between processes the lease decides: its holder asks, renews it while it
lives and leaves the price, or a word why there is none; the others watch for either. A holder that dies loses the lease
within `LEASE_S`, and one of those who wait takes over. Without a store each process asks for itself.

Behind answers that are given already go refreshes of stale prices and audits: at most one audit in the fleet and
account at a time, and so few refreshes in a process that a repriced account is asked again step by step.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from itertools import count
from time import perf_counter
from typing import Any

from proxy.cache.canonical import present
from proxy.cache.leases import LEASE_S, LeaderFailure, Lease, LeaseHeld
from proxy.cache.price_book import PriceBook
from proxy.cache.prices import Lookup, Price, StoredPrice
from proxy.cache.single_flight import SingleFlight
from proxy.gateway.canonical_request import CanonicalRequest
from proxy.gateway.in_flight import InFlightTracker
from proxy.problems import Code, Problem, StoreUnavailable
from proxy.telemetry.logs import event
from proxy.telemetry.metrics import Metrics
from proxy.upstream.client import Upstream
from proxy.upstream.replies import Failed, Priced, Rejected, Reply, Unpriced, decode_failure, encode_failure

MAX_REFRESHES = 8
"""Refreshes that one process has under way; what is stale beyond that is asked again at its next hit."""

AUDIT_CLAIM_S = 5.0
"""How long nobody else in the fleet asks for a balance that somebody is asking for."""

AUDIT_PAUSE_S = 1.0
"""After another process was found at it, this one does not look again for so long."""

FIRST_WATCH_PAUSE_S, MAX_WATCH_PAUSE_S = 0.01, 0.08

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchResult:
    """What a flight brings home to everybody who waits for it.

    upstream_s: what upstream took, where this process asked it.
    collapsed: another process asked.
    superseded: by a purge, or by another leader, while upstream was asked.
    """

    reply: Reply
    stored: bool = False
    upstream_s: float | None = None
    collapsed: bool = False
    superseded: bool = False


class Fetcher:
    """Times are seconds; deadlines stand on the event loop's clock."""

    def __init__(
        self, book: PriceBook, upstream: Upstream, metrics: Metrics, tracker: InFlightTracker, *, timeout_s: float
    ) -> None:
        self._book = book
        self._upstream = upstream
        self._metrics = metrics
        self._tracker = tracker
        self._timeout_s = timeout_s
        self._fetches = SingleFlight[FetchResult]()
        self._audits = SingleFlight[None]()
        self._audit_paused_until: dict[str, float] = {}
        self._refreshes = 0
        self._sequence = count()

    async def fetch(self, request: CanonicalRequest, lookup: Lookup | None) -> tuple[FetchResult, bool]:
        """What upstream says, and whether somebody was asking already.

        `lookup` is what the price book had; None if the store is out of reach, so that this process asks for itself.

        An ask that was superseded answers only who began it: who joined it may have come after the purge.
        """
        while True:
            fetched, joined = await self._coalesce(request.key, lambda: self._lead_or_follow(request, lookup))
            if not (joined and fetched.superseded):
                return fetched, joined or fetched.collapsed
            await asyncio.sleep(0)  # a flight that has just landed can still be joined

    async def fetch_uncoalesced(self, request: CanonicalRequest, *, store: bool) -> FetchResult:
        """What upstream says to this very request: it replaces what is stored, or is not stored at all."""
        key = f"{request.key} {next(self._sequence)}"
        fetched, _ = await self._coalesce(key, lambda: self._fetch_uncoalesced(request, store=store))
        return fetched

    def refresh(self, request: CanonicalRequest, lookup: Lookup | None) -> None:
        """Asks again behind the answer, if there is room and nobody is at it."""
        if self._refreshes >= MAX_REFRESHES or self._fetches.in_flight(request.key):
            return
        self._refreshes += 1
        task = self._fetches.start(request.key, lambda: self._lead_or_follow(request, lookup))
        task.add_done_callback(self._on_refresh_done)

    def audit(self, request: CanonicalRequest, stored: StoredPrice, lookup: Lookup | None, *, max_age_s: float) -> None:
        """Asks for a fresh balance behind the answer, and re-checks the price that was served."""
        now = asyncio.get_running_loop().time()
        if now >= self._audit_paused_until.get(request.account, now) and not self._audits.in_flight(request.account):
            self._audits.start(request.account, lambda: self._audit(request, stored, lookup, max_age_s))

    async def finish(self, timeout_s: float) -> None:
        """Lets what was asked upstream come home and be stored."""
        await asyncio.gather(self._fetches.drain(timeout_s), self._audits.drain(timeout_s))

    async def _coalesce(
        self, key: str, work: Callable[[], Coroutine[Any, Any, FetchResult]]
    ) -> tuple[FetchResult, bool]:
        self._metrics.flush_soon()
        with self._tracker.waiting_for_upstream():
            return await self._fetches.do(key, work)

    async def _lead_or_follow(self, request: CanonicalRequest, lookup: Lookup | None) -> FetchResult:
        """Leads, or follows who leads, until there is an answer."""
        if lookup is None:
            return await self._fetch_without_lease(request)
        deadline = self._deadline()
        try:
            while True:
                match await self._book.leases.take(request.key, request.account, lookup):
                    case Lease() as lease:
                        break
                    case StoredPrice(price):
                        return await self._from_leader(request, price)
                    case LeaseHeld():
                        if (fetched := await self._follow(request, lookup, deadline)) is not None:
                            return fetched
        except StoreUnavailable:
            return await self._fetch_without_lease(request)
        return await self._lead(request, lease)

    async def _follow(self, request: CanonicalRequest, lookup: Lookup, deadline: float) -> FetchResult | None:
        """What another process was told; None if it has gone without a word."""
        pause_s = FIRST_WATCH_PAUSE_S
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_WATCH_PAUSE_S)
            match await self._book.leases.watch(request.key, request.account, lookup):
                case StoredPrice(price):
                    return await self._from_leader(request, price)
                case LeaderFailure(text):
                    return FetchResult(decode_failure(text), collapsed=True) if text else None
                case None:
                    return None
        return FetchResult(Failed(Problem(Code.UPSTREAM_TIMEOUT, f"There was no answer within {self._timeout_s:g} s.")))

    async def _from_leader(self, request: CanonicalRequest, price: Price) -> FetchResult:
        """Another process asked. Its answer's balance is in the account's book."""
        await self._book.accounts.read(request.account)
        return FetchResult(Priced(price, None), stored=True, collapsed=True)

    async def _lead(self, request: CanonicalRequest, lease: Lease) -> FetchResult:
        with self._renewing(lease):
            reply, upstream_s = await self._call_upstream(request)
        recording = self._record_balance(request, reply)  # goes to the store together with what follows
        try:
            is_current = await self._end_lease(request, lease, reply)
        except StoreUnavailable:
            return FetchResult(reply, upstream_s=upstream_s)
        finally:
            await _finish(recording)
        is_stored = is_current and isinstance(reply, Priced)
        return FetchResult(reply, stored=is_stored, upstream_s=upstream_s, superseded=not is_current)

    async def _fetch_uncoalesced(self, request: CanonicalRequest, *, store: bool) -> FetchResult:
        if store:
            with suppress(StoreUnavailable):
                lease = await self._book.leases.take(request.key, request.account, force=True)
                if isinstance(lease, Lease):
                    return await self._lead(request, lease)
        return await self._fetch_without_lease(request)

    async def _fetch_without_lease(self, request: CanonicalRequest) -> FetchResult:
        reply, upstream_s = await self._call_upstream(request)
        await _finish(self._record_balance(request, reply))
        return FetchResult(reply, upstream_s=upstream_s)

    async def _call_upstream(self, request: CanonicalRequest) -> tuple[Reply, float]:
        """The reply, and the seconds that it took.

        An ask has its full time, however long its asker has waited to lead: cut short, it would fail everybody who
        follows. Each request's own deadline stands beside that.
        """
        started, deadline = perf_counter(), self._deadline()
        reply = await self._upstream.estimate(request.account, request.canonical, request.query, deadline=deadline)
        return reply, perf_counter() - started

    def _record_balance(self, request: CanonicalRequest, reply: Reply) -> Awaitable[None] | None:
        """Begins to keep a balance, whatever becomes of the price. What is returned must be awaited."""
        if isinstance(reply, Priced | Unpriced) and reply.balance is not None:
            return self._book.accounts.record_balance(request.account, reply.balance)
        return None

    async def _end_lease(self, request: CanonicalRequest, lease: Lease, reply: Reply) -> bool:
        """Ends a lease with what it brought; False if that was superseded. Raises `StoreUnavailable`."""
        match reply:
            case Priced(price):
                return await self._book.put(lease, price, request.body_digest)
            case _:
                return await self._book.leases.end(
                    lease, failure=encode_failure(reply), end_price=isinstance(reply, Rejected)
                )

    @contextmanager
    def _renewing(self, lease: Lease) -> Iterator[None]:
        """Renews a lease once it is not new any more: most answers come before that."""
        loop = asyncio.get_running_loop()
        renewals: list[asyncio.Task[None]] = []
        timer = loop.call_later(LEASE_S / 4, lambda: renewals.append(loop.create_task(self._renew(lease))))
        try:
            yield
        finally:
            timer.cancel()
            for renewal in renewals:
                renewal.cancel()

    async def _renew(self, lease: Lease) -> None:
        while True:
            with suppress(StoreUnavailable):
                if not await self._book.leases.keep(lease):
                    return
            await asyncio.sleep(LEASE_S / 4)

    def _on_refresh_done(self, _: object) -> None:
        self._refreshes -= 1

    async def _audit(
        self, request: CanonicalRequest, stored: StoredPrice, lookup: Lookup | None, max_age_s: float
    ) -> None:
        """Asks again if this process is the one to do so and nobody is asking already."""
        try:
            if not await self._book.accounts.claim_audit(request.account, max_age_s=max_age_s, for_s=AUDIT_CLAIM_S):
                self._audit_paused_until[request.account] = asyncio.get_running_loop().time() + AUDIT_PAUSE_S
                return
            lease = await self._book.leases.take(request.key, request.account, lookup)
        except StoreUnavailable:
            return
        if isinstance(lease, Lease):
            fetched = await self._lead(request, lease)
            if isinstance(fetched.reply, Priced) and fetched.stored:
                await self._compare(request, stored, fetched.reply.price)

    async def _compare(self, request: CanonicalRequest, stored: StoredPrice, price: Price) -> None:
        """What an audit has found: the price list may have changed, or a member that was declared neutral is not."""
        facts = {"account": request.account, "key": request.key}
        facts |= {"old": stored.price.estimated.decode(), "new": price.estimated.decode()}
        if Decimal(facts["old"]) == Decimal(facts["new"]):
            result = "same"
        elif stored.body_digest != request.body_digest:
            result = "ignored-member"
            members = ", ".join(present(request.canonical, request.ignored))
            event(log, logging.ERROR, "a member of cache.ignore decides prices", {**facts, "members": members})
        else:
            result = "changed"
            event(log, logging.WARNING, "price changed", facts)
            with suppress(StoreUnavailable):
                if await self._book.accounts.record_price_change(request.account, request.key):
                    event(log, logging.WARNING, "price list changed: older prices are stale", facts)
        self._metrics.price_audits.labels(request.account, result).inc()

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout_s


async def _finish(recording: Awaitable[None] | None) -> None:
    if recording is not None:
        with suppress(StoreUnavailable):
            await recording
