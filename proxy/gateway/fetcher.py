"""Fetches prices from upstream, once for concurrent requests with the same key.

* Within a process, single-flight: equal requests share one fetch.
* Between processes, a lease: its holder, the leader, calls upstream, renews the lease meanwhile, and stores the price
  or leaves its failure. Followers poll for either. If the leader dies, its lease expires within `LEASE_S` and a
  follower takes over.
* With the store unavailable, each process calls upstream for itself.
* Stale prices are refreshed in the background. Each process limits how many, so that a repriced account is fetched
  again gradually.
* The gateway learns from answers to calls under a lease, so not from those to `no-store` requests or during outages.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from time import perf_counter
from typing import Any

from proxy.cache.leases import LEASE_S, LeaderFailure, Lease, LeaseHeld
from proxy.cache.price_book import PriceBook
from proxy.cache.prices import Lookup, Price, StoredPrice
from proxy.cache.single_flight import SingleFlight
from proxy.gateway.canonical_request import CanonicalRequest
from proxy.gateway.in_flight import InFlightTracker
from proxy.gateway.inferences import Inferences
from proxy.problems import Code, Problem, StoreUnavailable
from proxy.quota.price_change_log import PriceChangeLog
from proxy.quota.price_changes import FoundBy
from proxy.telemetry.metrics import Metrics
from proxy.upstream.client import Upstream
from proxy.upstream.replies import Failed, Priced, Rejected, Reply, Unpriced, decode_failure, encode_failure

MAX_REFRESHES = 8
"""Limits concurrent refreshes in a process. A stale price beyond that is refreshed at a later hit."""

FIRST_WATCH_PAUSE_S, MAX_WATCH_PAUSE_S = 0.01, 0.08
"""Time between two polls of a follower. It doubles from the first to the second."""


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

    @property
    def was_asked(self) -> bool:
        """Whether a request was sent to upstream."""
        return not isinstance(self.reply, Failed) or self.reply.asked


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
        self._refreshes: set[asyncio.Task[FetchResult]] = set()
        self._sequence = count()
        self.running = SingleFlight[FetchResult]()
        """The fetches in progress, by key."""

    async def fetch(self, question: CanonicalRequest, lookup: Lookup | None) -> FetchResult:
        """Calls upstream, unless that is being done for another request or by another process.

        lookup: what the price book had; None if the store is unavailable, then nothing is shared between processes.

        The result of a superseded fetch is only for the request that started it. Requests that joined it may have
        arrived after the purge, so they fetch again.
        """
        while True:
            fetched, joined = await self._coalesce(question.key, lambda: self.lead_or_follow(question, lookup))
            if not joined:
                return fetched
            if not fetched.superseded:
                return replace(fetched, collapsed=True)
            await asyncio.sleep(0)  # until the next iteration of the event loop, the superseded fetch would be joined

    async def fetch_uncoalesced(self, question: CanonicalRequest, *, store: bool) -> FetchResult:
        """Calls upstream for this request alone. With `store` the reply replaces what is stored."""
        key = f"{question.key} {next(self._sequence)}"
        fetched, _ = await self._coalesce(key, lambda: self._fetch_uncoalesced(question, store=store))
        return fetched

    def refresh(self, question: CanonicalRequest, lookup: Lookup | None) -> None:
        """Fetches a stale price again in the background, unless it is being fetched or `MAX_REFRESHES` are running."""
        if len(self._refreshes) >= MAX_REFRESHES or self.running.in_flight(question.key):
            return
        task = self.running.start(question.key, lambda: self.lead_or_follow(question, lookup))
        self._refreshes.add(task)
        task.add_done_callback(self._refreshes.discard)

    async def finish(self, timeout_s: float) -> None:
        """Waits at most `timeout_s` until running fetches are done and stored, then cancels the rest."""
        await self.running.drain(timeout_s)

    async def lead_or_follow(
        self, question: CanonicalRequest, lookup: Lookup | None, *, is_audit: bool = False
    ) -> FetchResult:
        """Takes the lease and leads, or follows the leader; takes over if the leader leaves no result."""
        if lookup is None:
            return await self._fetch_without_lease(question)
        deadline = self._deadline()
        try:
            while True:
                match await self._book.leases.take(question.key, question.account, lookup):
                    case Lease() as lease:
                        break
                    case StoredPrice(price):
                        return await self._from_leader(question, price)
                    case LeaseHeld():
                        if (fetched := await self._follow(question, lookup, deadline)) is not None:
                            return fetched
        except StoreUnavailable:
            return await self._fetch_without_lease(question)
        return await self.lead(question, lease, is_audit=is_audit)

    async def lead(
        self, question: CanonicalRequest, lease: Lease, found_by: FoundBy = "ask", *, is_audit: bool = False
    ) -> FetchResult:
        """Calls upstream and ends the lease. `found_by`: how a price that has changed is then found."""
        with self._renewing(lease):
            ticket = await self._inferences.ticket(question)
            reply, upstream_s = await self._call_upstream(question)
        if ticket is not None and isinstance(reply, Priced):
            self._inferences.learn(ticket, question, reply.price, is_audit=is_audit)
        recording = self._record_balance(question, reply)  # goes to the store in one round trip with the next call
        try:
            is_current = await self._end_lease(question, lease, reply, found_by)
        except StoreUnavailable:
            return FetchResult(reply, upstream_s=upstream_s)
        finally:
            await _finish(recording)
        is_stored = is_current and isinstance(reply, Priced)
        return FetchResult(reply, stored=is_stored, upstream_s=upstream_s, superseded=not is_current)

    async def _coalesce(
        self, key: str, work: Callable[[], Coroutine[Any, Any, FetchResult]]
    ) -> tuple[FetchResult, bool]:
        self._metrics.flush_soon()
        with self._tracker.waiting_for_upstream():
            return await self.running.do(key, work)

    async def _follow(self, question: CanonicalRequest, lookup: Lookup, deadline: float) -> FetchResult | None:
        """Polls for the leader's result; None if it ended or died without leaving one."""
        pause_s = FIRST_WATCH_PAUSE_S
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_WATCH_PAUSE_S)
            match await self._book.leases.watch(question.key, question.account, lookup):
                case StoredPrice(price):
                    return await self._from_leader(question, price)
                case LeaderFailure(text):
                    return FetchResult(decode_failure(text), collapsed=True) if text else None
                case None:
                    return None
        return timed_out(self._timeout_s)

    async def _from_leader(self, question: CanonicalRequest, price: Price) -> FetchResult:
        """The result for a price that another process stored.

        Reads the account's book, because the leader stored the reply's balance there.
        """
        await self._book.accounts.read(question.account)
        return FetchResult(Priced(price, None), stored=True, collapsed=True)

    async def _fetch_uncoalesced(self, question: CanonicalRequest, *, store: bool) -> FetchResult:
        if store:
            with suppress(StoreUnavailable):
                lease = await self._book.leases.take(question.key, question.account, force=True)
                if isinstance(lease, Lease):
                    return await self.lead(question, lease)
        return await self._fetch_without_lease(question)

    async def _fetch_without_lease(self, question: CanonicalRequest) -> FetchResult:
        reply, upstream_s = await self._call_upstream(question)
        await _finish(self._record_balance(question, reply))
        return FetchResult(reply, upstream_s=upstream_s)

    async def _call_upstream(self, question: CanonicalRequest) -> tuple[Reply, float]:
        """Returns the reply and the duration in seconds.

        The call always has the full timeout, however long the request has waited for the lease: a shorter one would
        fail all followers too. Each request has its own deadline besides.
        """
        started, deadline = perf_counter(), self._deadline()
        reply = await self._upstream.estimate(question.account, question.canonical, question.query, deadline=deadline)
        return reply, perf_counter() - started

    def _record_balance(self, question: CanonicalRequest, reply: Reply) -> Awaitable[None] | None:
        """Starts recording the reply's balance, if it has one, even if the price is not stored. Must be awaited."""
        if isinstance(reply, Priced | Unpriced) and reply.balance is not None:
            return self._book.accounts.record_balance(question.account, reply.balance)
        return None

    async def _end_lease(self, question: CanonicalRequest, lease: Lease, reply: Reply, found_by: FoundBy) -> bool:
        """Ends a lease with its price or failure. False if it was superseded. Raises `StoreUnavailable`."""
        if not isinstance(reply, Priced):
            failure, end_price = encode_failure(reply), isinstance(reply, Rejected)
            return await self._book.leases.end(lease, failure=failure, end_price=end_price)
        put = await self._book.put(lease, reply.price, question.body_digest)
        if put.replaced is not None:  # only the holder of a lease replaces a price: the fleet finds each change once
            changed = {"account": question.account, "model": question.model, "key": question.key}
            self._price_changes.record(found_by, **changed, old=put.replaced, new=reply.price.estimated)
        return put.is_current

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

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout_s


def timed_out(timeout_s: float) -> FetchResult:
    """The result for a request that has waited for `timeout_s`."""
    detail = f"RenderNet did not answer within {timeout_s:g} s: send the request again."
    return FetchResult(Failed(Problem(Code.UPSTREAM_TIMEOUT, detail)))


async def _finish(recording: Awaitable[None] | None) -> None:
    if recording is not None:
        with suppress(StoreUnavailable):
            await recording
