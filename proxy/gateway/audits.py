"""Audits: calls to upstream in the background that refresh an old balance and check a price that was served.

* Audits of stored prices: at most one at a time for each account over all processes (docs/architecture.md, Audits).
* Audits of inferred prices (docs/learning.md): each process limits how many run at a time.
"""

import asyncio
import logging
from contextlib import suppress
from decimal import Decimal

from proxy.cache.canonical import present
from proxy.cache.leases import Lease
from proxy.cache.price_book import PriceBook
from proxy.cache.prices import Lookup, Price, StoredPrice
from proxy.cache.single_flight import SingleFlight
from proxy.gateway.canonical_request import CanonicalRequest
from proxy.gateway.fetcher import Fetcher, FetchResult
from proxy.gateway.inferences import Inferences
from proxy.learning.verdict import Inferred
from proxy.problems import StoreUnavailable
from proxy.telemetry.logs import event
from proxy.telemetry.metrics import Metrics
from proxy.upstream.replies import Priced

MAX_INFERENCE_AUDITS = 8
"""Limits concurrent audits of inferred prices in a process. One beyond that is owed."""

AUDIT_CLAIM_S = 5.0
"""How long a claimed audit keeps other processes from auditing the same account."""

AUDIT_PAUSE_S = 1.0
"""After it could not claim an account's audit, a process does not try again for so long: each try is a call to the
store."""

log = logging.getLogger(__name__)


class Auditor:
    """The audits of one process."""

    def __init__(self, book: PriceBook, fetcher: Fetcher, inferences: Inferences, metrics: Metrics) -> None:
        self._book = book
        self._fetcher = fetcher
        self._inferences = inferences
        self._metrics = metrics
        self._audits = SingleFlight[None]()
        """By account."""
        self._paused_until: dict[str, float] = {}
        """By account, on the event loop's clock."""
        self._inference_audits: set[asyncio.Task[FetchResult]] = set()

    def audit(
        self, question: CanonicalRequest, stored: StoredPrice | None, lookup: Lookup | None, *, max_age_s: float
    ) -> None:
        """Calls upstream in the background, for a fresh balance, and compares the price with the one that was served.

        stored: the price that was served; None if it was inferred, because learning then makes the comparison.
        max_age_s: no audit is made if the balance in the store is younger.
        """
        account, now = question.account, asyncio.get_running_loop().time()
        if now >= self._paused_until.get(account, now) and not self._audits.in_flight(account):
            self._audits.start(account, lambda: self._audit(question, stored, lookup, max_age_s))

    def audit_inferred(self, question: CanonicalRequest, inferred: Inferred, lookup: Lookup | None) -> None:
        """Calls upstream in the background for a body whose price was inferred, to learn whether that was right.

        The audit is owed if too many are running, if this body is being asked already, which may fail, or if upstream
        cannot be asked or gives no price.
        """
        if len(self._inference_audits) >= MAX_INFERENCE_AUDITS or self._fetcher.running.in_flight(question.key):
            self._inferences.owe_audit(inferred)
            return
        task = self._fetcher.running.start(question.key, lambda: self._audit_inferred(question, inferred, lookup))
        self._inference_audits.add(task)
        task.add_done_callback(self._inference_audits.discard)

    async def finish(self, timeout_s: float) -> None:
        """Waits at most `timeout_s` for audits of stored prices, then cancels the rest.

        Those of inferred prices are in `Fetcher.running`, for which `Fetcher.finish` waits.
        """
        await self._audits.drain(timeout_s)

    async def _audit(
        self, question: CanonicalRequest, stored: StoredPrice | None, lookup: Lookup | None, max_age_s: float
    ) -> None:
        """Audits if this process can claim it and take the question's lease."""
        try:
            if not await self._book.accounts.claim_audit(question.account, max_age_s=max_age_s, for_s=AUDIT_CLAIM_S):
                self._paused_until[question.account] = asyncio.get_running_loop().time() + AUDIT_PAUSE_S
                return
            lease = await self._book.leases.take(question.key, question.account, lookup)
        except StoreUnavailable:
            return
        if isinstance(lease, Lease):
            fetched = await self._fetcher.lead(question, lease, "audit", is_audit=stored is None)
            if stored is not None and isinstance(fetched.reply, Priced) and fetched.stored:
                await self._compare(question, stored, fetched.reply.price)

    async def _compare(self, question: CanonicalRequest, stored: StoredPrice, price: Price) -> None:
        """Counts and logs the result of an audit.

        A different price means that the price list changed, or, if the body differs from the one that was stored, that
        a member in `cache.ignore` does affect prices.
        """
        facts = {"account": question.account, "key": question.key}
        facts |= {"old": stored.price.estimated.decode(), "new": price.estimated.decode()}
        if Decimal(facts["old"]) == Decimal(facts["new"]):
            result = "same"
        elif stored.body_digest != question.body_digest:
            result = "ignored-member"
            members = ", ".join(present(question.canonical, question.ignored))
            event(log, logging.ERROR, "a member of cache.ignore decides prices", {**facts, "members": members})
        else:
            result = "changed"
            event(log, logging.WARNING, "price changed", facts)
            with suppress(StoreUnavailable):
                if await self._book.accounts.record_price_change(question.account, question.key):
                    event(log, logging.WARNING, "price list changed: older prices are stale", facts)
                    await self._inferences.drop_prices(question.account)
        self._metrics.price_audits.labels(question.account, result).inc()

    async def _audit_inferred(
        self, question: CanonicalRequest, inferred: Inferred, lookup: Lookup | None
    ) -> FetchResult:
        is_priced = False
        try:
            fetched = await self._fetcher.lead_or_follow(question, lookup, is_audit=True)
            is_priced = isinstance(fetched.reply, Priced)
        finally:
            if not is_priced:
                self._inferences.owe_audit(inferred)
        return fetched
