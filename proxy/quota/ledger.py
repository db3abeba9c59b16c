"""The ledger: what teams may still ask for, and what they have used.

* Decisions are the store's: one script checks rate and quotas of both scopes and books all of a request or none of it.
* What is admitted stays on the books until it is settled. Settling is a task of its own: a request that is cancelled
  cannot take its accounting along.
* Out of reach, the ledger refuses, or admits and keeps the debits in a backlog, as the settings want. A debit whose
  reply was lost is neither repeated nor kept: it may have been booked.
"""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from proxy.problems import NO_NAME, Code, Outcome, Problem, StoreOutcomeUnknown, StoreUnavailable
from proxy.quota.backlog import Backlog
from proxy.quota.batches import Admitted, Denied, LedgerBatcher
from proxy.quota.counters import MAX_ENTRIES, CounterSet
from proxy.quota.model_names import OTHER
from proxy.quota.quotas import Charge, QuotaState, TeamLimits
from proxy.telemetry.metrics import Metrics

MAX_BACKLOG_ROWS = 10_000
FLUSH_EVERY_S = 0.5

_PENDING = Charge(Outcome.CANCELLED)

__all__ = ["Admitted", "Denied", "Ledger"]

_T = TypeVar("_T")

Admission = Coroutine[Any, Any, Admitted | Denied]

log = logging.getLogger(__name__)


_OUT_OF_REACH = Denied(
    Problem(Code.STORE_UNAVAILABLE, "The ledger of quotas is out of reach: ask again in a moment.", retry_after_s=1)
)


class Ledger:
    """The ledger of one organisation. `close` must be called."""

    def __init__(self, batcher: LedgerBatcher, metrics: Metrics, *, admits_on_outage: bool) -> None:
        self._batcher = batcher
        self._metrics = metrics
        self._admits_on_outage = admits_on_outage
        self._backlog = Backlog(MAX_BACKLOG_ROWS)
        self._flushing: asyncio.Task[None] | None = None
        self._settling: set[asyncio.Future[Any]] = set()

    async def open(self) -> None:
        """Looks whether there is a ledger, and begins one if there is none."""
        try:
            await self._batcher.open()
        except StoreUnavailable:
            log.warning("the ledger is out of reach: nobody knows what was used until it is back")

    def charge(self, terms: TeamLimits, charge: Charge) -> Admission:
        """Admits and books an answer whose price is known."""
        return self._begin("charge", terms, charge)

    def admit(self, terms: TeamLimits) -> Admission:
        """Admits a question on its way upstream: it must be settled, or refunded if it never gets there."""
        return self._begin("admit", terms, _PENDING)

    def record_uncached(self, terms: TeamLimits, outcome: Outcome) -> Admission:
        """Notes an estimate for which nobody is asked and nothing is answered: it takes from the rate."""
        return self._begin("pass", terms, Charge(outcome))

    async def peek(self, terms: TeamLimits, credits_micro: int | None) -> Admitted | Denied:
        """What would be said to an estimate of this price. Takes from the rate, and debits nothing.

        Raises `StoreUnavailable`.
        """
        return await self._batcher.decide("peek", terms, Charge(Outcome.HIT, credits_micro))

    async def settle(self, admitted: Admitted, charge: Charge) -> Admitted | Denied:
        """Books what became of an admitted question; denied if its price passes a quota."""
        return await self._to_the_end(self._settle(admitted, charge))

    async def refund(self, admitted: Admitted, outcome: Outcome) -> QuotaState | None:
        """Takes back an admission that came to nothing before upstream was asked. How the team stands, if known."""
        return await self._to_the_end(self._refund(admitted, Charge(outcome)))

    async def close(self, timeout_s: float) -> None:
        """Lets settlements and the backlog come to their end, within `timeout_s`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        if self._settling:
            await asyncio.wait(self._settling, timeout=timeout_s)
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.wait({self._flushing})
        await self._flush_until(deadline)
        if self._backlog:
            log.error("the debits of %d requests are lost: the ledger stayed out of reach", self._backlog.requests)

    async def _begin(self, operation: str, terms: TeamLimits, charge: Charge) -> Admitted | Denied:
        try:
            return await self._batcher.decide(operation, terms, charge)
        except StoreOutcomeUnknown:
            return _OUT_OF_REACH
        except StoreUnavailable:
            counters = self._batcher.counters(terms)
            if operation == "charge":
                return self._admit_buffered(terms, counters, charge)
            return _on_credit(terms, counters, charge) if self._may_buffer() else _OUT_OF_REACH

    async def _settle(self, admitted: Admitted, charge: Charge) -> Admitted | Denied:
        terms, counters = admitted.terms, admitted.counters
        if not admitted.booked:
            return self._admit_buffered(terms, counters, charge)
        try:
            return await self._batcher.decide("settle", terms, charge, admitted_on=counters)
        except StoreOutcomeUnknown:
            return _OUT_OF_REACH
        except StoreUnavailable:
            if not self._buffer(counters, _PENDING, requests=-1):
                return _OUT_OF_REACH
            settled = self._admit_buffered(terms, counters, charge)
            if isinstance(settled, Denied):  # no room: it stands as it stood
                self._buffer(counters, _PENDING)
            return settled

    def _admit_buffered(self, terms: TeamLimits, counters: CounterSet, charge: Charge) -> Admitted | Denied:
        """Admits an answer without the ledger, and keeps its debit, if that is wanted and there is room."""
        if not self._buffer(counters, charge):
            return _OUT_OF_REACH
        admitted = _on_credit(terms, counters, charge)
        if charge.credits_micro is not None:
            self._metrics.record_credits(terms.team, admitted.model, charge.credits_micro)
        return admitted

    async def _refund(self, admitted: Admitted, charge: Charge) -> QuotaState | None:
        if not admitted.booked:
            return None
        try:
            refunded = await self._batcher.decide("refund", admitted.terms, charge, admitted_on=admitted.counters)
        except StoreOutcomeUnknown:
            return None
        except StoreUnavailable:
            self._buffer(admitted.counters, _PENDING, requests=-1)
            return None
        return refunded.quota_state

    async def _to_the_end(self, work: Coroutine[Any, Any, _T]) -> _T:
        task = asyncio.ensure_future(work)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return await asyncio.shield(task)

    def _may_buffer(self) -> bool:
        return self._admits_on_outage and self._backlog.has_room()

    def _buffer(self, counters: CounterSet, charge: Charge, *, requests: int = 1) -> bool:
        """Keeps a debit until the ledger is back; False if that is not wanted, or there is no room."""
        if not self._admits_on_outage or not self._backlog.add(counters, charge, requests):
            return False
        self._metrics.buffered_debits.set(self._backlog.requests)
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.get_running_loop().create_task(self._flush_when_possible())
        return True

    async def _flush_when_possible(self) -> None:
        while self._backlog:
            await asyncio.sleep(FLUSH_EVERY_S)
            with suppress(StoreUnavailable):
                await self._flush()
                log.warning("the ledger is back: what was admitted without it is on the books")

    async def _flush_until(self, deadline: float) -> None:
        """Tries at least once; a pile that was booked already stays so."""
        loop = asyncio.get_running_loop()
        while self._backlog:
            with suppress(StoreUnavailable):
                await self._flush()
            left_s = deadline - loop.time()
            if not self._backlog or left_s <= 0:
                return
            await asyncio.sleep(min(FLUSH_EVERY_S, left_s))

    async def _flush(self) -> None:
        while (batch := self._backlog.batch(MAX_ENTRIES)) is not None:
            await self._batcher.book(batch)
            self._backlog.drop(batch)
            self._metrics.buffered_debits.set(self._backlog.requests)


def _on_credit(terms: TeamLimits, counters: CounterSet, charge: Charge) -> Admitted:
    """Without the ledger nobody knows which models have a name of their own."""
    model = NO_NAME if charge.credits_micro is None else OTHER
    return Admitted(terms, counters, booked=False, model=model)
