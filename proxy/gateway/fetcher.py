"""Fetches prices from upstream, once for concurrent requests with the same key.

* Within a process, single-flight: equal requests share one fetch.
* Between processes, a lease: its holder, the leader, calls upstream, renews the lease meanwhile, and stores the price
  or leaves its failure. Followers poll for either. If the leader dies, its lease expires within `LEASE_S` and a
  follower takes over.
* With the store unavailable, each process calls upstream for itself.
* Background work after the response: refreshes of stale prices; audits of stored prices, at most one at a time for each
  account over all processes (docs/architecture.md, Audits); audits of inferred prices (docs/learning.md). Each process
  limits its refreshes and its audits of inferred prices, so that a repriced account is fetched again gradually.
* The gateway learns from answers to calls under a lease, so not from those to `no-store` requests or during outages.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
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
from proxy.gateway.inferences import Inferences
from proxy.learning.verdict import Inferred
from proxy.problems import Code, Problem, StoreUnavailable
from proxy.quota.price_change_log import PriceChangeLog
from proxy.quota.price_changes import FoundBy
from proxy.telemetry.logs import event
from proxy.telemetry.metrics import Metrics
from proxy.upstream.client import Upstream
from proxy.upstream.replies import Failed, Priced, Rejected, Reply, Unpriced, decode_failure, encode_failure

MAX_REFRESHES = 8
"""Limits concurrent refreshes in a process. A stale price beyond that is refreshed at a later hit."""

MAX_INFERENCE_AUDITS = 8
"""Limits concurrent audits of inferred prices in a process. One beyond that is owed."""

AUDIT_CLAIM_S = 5.0
"""How long a claimed audit keeps other processes from auditing the same account."""

AUDIT_PAUSE_S = 1.0
"""After it could not claim an account's audit, a process does not try again for so long: each try is a call to the
store."""

FIRST_WATCH_PAUSE_S, MAX_WATCH_PAUSE_S = 0.01, 0.08
"""Time between two polls of a follower. It doubles from the first to the second."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchResult:
    """The result of a fetch, for all requests that share it.

    stored: the price is in the price book.
    upstream_s: the duration of the upstream call; None if another process made it.
    collapsed: another request or process had already asked for it.
    superseded: a purge happened, or another process took the lease, during the call; the reply is not stored.
    """

    reply: Reply
    stored: bool = False
    upstream_s: float | None = None
    collapsed: bool = False
    superseded: bool = False


class Fetcher:
    """The fetches of one process. Deadlines are on the event loop's clock.

    timeout_s: limits an upstream call, and the time for which a follower waits.
    """

    def __init__(  # noqa: PLR0913 -- what a fetch touches
        self,
        book: PriceBook,
        upstream: Upstream,
        inferences: Inferences,
        metrics: Metrics,
        tracker: InFlightTracker,
        price_changes: PriceChangeLog,
        *,
        timeout_s: float,
    ) -> None:
        self._book = book
        self._upstream = upstream
        self._inferences = inferences
        self._metrics = metrics
        self._tracker = tracker
        self._price_changes = price_changes
        self._timeout_s = timeout_s
        self._fetches = SingleFlight[FetchResult]()
        self._audits = SingleFlight[None]()
        self._audit_paused_until: dict[str, float] = {}
        self._refreshes = self._inference_audits = 0
        self._sequence = count()

    async def fetch(self, request: CanonicalRequest, lookup: Lookup | None) -> FetchResult:
        """Calls upstream, unless that is being done for another request or by another process.

        lookup: what the price book had; None if the store is unavailable, then nothing is shared between processes.

        The result of a superseded fetch is only for the request that started it. Requests that joined it may have
        arrived after the purge, so they fetch again.
        """
        while True:
            fetched, joined = await self._coalesce(request.key, lambda: self._lead_or_follow(request, lookup))
            if not joined:
                return fetched
            if not fetched.superseded:
                return replace(fetched, collapsed=True)
            await asyncio.sleep(0)  # until the next iteration of the event loop, the superseded fetch would be joined

    async def fetch_uncoalesced(self, request: CanonicalRequest, *, store: bool) -> FetchResult:
        """Calls upstream for this request alone. With `store` the reply replaces what is stored."""
        key = f"{request.key} {next(self._sequence)}"
        fetched, _ = await self._coalesce(key, lambda: self._fetch_uncoalesced(request, store=store))
        return fetched

    def refresh(self, request: CanonicalRequest, lookup: Lookup | None) -> None:
        """Fetches a stale price again in the background, unless it is being fetched or `MAX_REFRESHES` are running."""
        if self._refreshes >= MAX_REFRESHES or self._fetches.in_flight(request.key):
            return
        self._refreshes += 1
        task = self._fetches.start(request.key, lambda: self._lead_or_follow(request, lookup))
        task.add_done_callback(self._on_refresh_done)

    def audit(
        self, request: CanonicalRequest, stored: StoredPrice | None, lookup: Lookup | None, *, max_age_s: float
    ) -> None:
        """Calls upstream in the background, for a fresh balance, and compares the price with the one that was served.

        stored: that price; None if it was inferred. Then what is learned from the answer is the comparison.
        max_age_s: no audit is made if the balance in the store is younger.
        """
        now = asyncio.get_running_loop().time()
        if now >= self._audit_paused_until.get(request.account, now) and not self._audits.in_flight(request.account):
            self._audits.start(request.account, lambda: self._audit(request, stored, lookup, max_age_s))

    def audit_inferred(self, request: CanonicalRequest, inferred: Inferred, lookup: Lookup | None) -> None:
        """Calls upstream in the background for a body whose price was inferred, to learn whether that was right.

        If upstream cannot be asked, or gives no price, the audit is owed.
        """
        if self._fetches.in_flight(request.key):
            return  # the answer to that is learned from
        if self._inference_audits >= MAX_INFERENCE_AUDITS:
            self._inferences.owe_audit(inferred)
            return
        self._inference_audits += 1
        self._fetches.start(request.key, lambda: self._audit_inferred(request, inferred, lookup))

    async def finish(self, timeout_s: float) -> None:
        """Waits at most `timeout_s` until running fetches and audits are done and stored, then cancels the rest."""
        await asyncio.gather(self._fetches.drain(timeout_s), self._audits.drain(timeout_s))
        await self._inferences.finish(timeout_s)

    async def _coalesce(
        self, key: str, work: Callable[[], Coroutine[Any, Any, FetchResult]]
    ) -> tuple[FetchResult, bool]:
        self._metrics.flush_soon()
        with self._tracker.waiting_for_upstream():
            return await self._fetches.do(key, work)

    async def _lead_or_follow(
        self, request: CanonicalRequest, lookup: Lookup | None, *, is_audit: bool = False
    ) -> FetchResult:
        """Takes the lease and leads, or follows the leader; takes over if the leader leaves no result."""
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
        return await self._lead(request, lease, is_audit=is_audit)

    async def _follow(self, request: CanonicalRequest, lookup: Lookup, deadline: float) -> FetchResult | None:
        """Polls for the leader's result; None if it ended or died without leaving one."""
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
        detail = f"RenderNet did not answer within {self._timeout_s:g} s: send the request again."
        return FetchResult(Failed(Problem(Code.UPSTREAM_TIMEOUT, detail)))

    async def _from_leader(self, request: CanonicalRequest, price: Price) -> FetchResult:
        """The result for a price that another process stored.

        Reads the account's book, because the leader stored the reply's balance there.
        """
        await self._book.accounts.read(request.account)
        return FetchResult(Priced(price, None), stored=True, collapsed=True)

    async def _lead(
        self, request: CanonicalRequest, lease: Lease, found_by: FoundBy = "ask", *, is_audit: bool = False
    ) -> FetchResult:
        """`found_by`: how a price that has changed is then found."""
        with self._renewing(lease):
            ticket = await self._inferences.ticket(request)
            reply, upstream_s = await self._call_upstream(request)
        if ticket is not None and isinstance(reply, Priced):
            self._inferences.learn(ticket, request, reply.price, is_audit=is_audit)
        recording = self._record_balance(request, reply)  # goes to the store in one round trip with the next call
        try:
            is_current = await self._end_lease(request, lease, reply, found_by)
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
        """Returns the reply and the duration in seconds.

        The call always has the full timeout, however long the request has waited for the lease: a shorter one would
        fail all followers too. Each request has its own deadline besides.
        """
        started, deadline = perf_counter(), self._deadline()
        reply = await self._upstream.estimate(request.account, request.canonical, request.query, deadline=deadline)
        return reply, perf_counter() - started

    def _record_balance(self, request: CanonicalRequest, reply: Reply) -> Awaitable[None] | None:
        """Starts recording the reply's balance, if it has one, even if the price is not stored. Must be awaited."""
        if isinstance(reply, Priced | Unpriced) and reply.balance is not None:
            return self._book.accounts.record_balance(request.account, reply.balance)
        return None

    async def _end_lease(self, request: CanonicalRequest, lease: Lease, reply: Reply, found_by: FoundBy) -> bool:
        """Ends a lease with its price or failure. False if it was superseded. Raises `StoreUnavailable`."""
        match reply:
            case Priced(price):
                put = await self._book.put(lease, price, request.body_digest)
                if put.replaced is not None:
                    self._record_change(request, put.replaced, price, found_by)
                return put.is_current
            case _:
                return await self._book.leases.end(
                    lease, failure=encode_failure(reply), end_price=isinstance(reply, Rejected)
                )

    def _record_change(self, request: CanonicalRequest, old: bytes, price: Price, found_by: FoundBy) -> None:
        """Records a change. Only the holder of a lease replaces a price, so the fleet finds each change once."""
        self._price_changes.record(
            found_by, account=request.account, model=request.model, key=request.key, old=old, new=price.estimated
        )

    @contextmanager
    def _renewing(self, lease: Lease) -> Iterator[None]:
        """Renews a lease while the block runs, every quarter of `LEASE_S`. Most replies need no renewal."""
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

    async def _audit_inferred(
        self, request: CanonicalRequest, inferred: Inferred, lookup: Lookup | None
    ) -> FetchResult:
        is_priced = False
        try:
            fetched = await self._lead_or_follow(request, lookup, is_audit=True)
            is_priced = isinstance(fetched.reply, Priced)
        finally:
            self._inference_audits -= 1
            if not is_priced:
                self._inferences.owe_audit(inferred)
        return fetched

    async def _audit(
        self, request: CanonicalRequest, stored: StoredPrice | None, lookup: Lookup | None, max_age_s: float
    ) -> None:
        """Audits if this process can claim it and take the question's lease."""
        try:
            if not await self._book.accounts.claim_audit(request.account, max_age_s=max_age_s, for_s=AUDIT_CLAIM_S):
                self._audit_paused_until[request.account] = asyncio.get_running_loop().time() + AUDIT_PAUSE_S
                return
            lease = await self._book.leases.take(request.key, request.account, lookup)
        except StoreUnavailable:
            return
        if isinstance(lease, Lease):
            fetched = await self._lead(request, lease, "audit", is_audit=stored is None)
            if stored is not None and isinstance(fetched.reply, Priced) and fetched.stored:
                await self._compare(request, stored, fetched.reply.price)

    async def _compare(self, request: CanonicalRequest, stored: StoredPrice, price: Price) -> None:
        """Counts and logs the result of an audit.

        A different price means that the price list changed, or, if the body differs from the one that was stored, that
        a member in `cache.ignore` does affect prices.
        """
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
                    await self._inferences.drop_prices(request.account)
        self._metrics.price_audits.labels(request.account, result).inc()

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout_s


async def _finish(recording: Awaitable[None] | None) -> None:
    if recording is not None:
        with suppress(StoreUnavailable):
            await recording
