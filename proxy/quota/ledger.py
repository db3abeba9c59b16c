"""An organisation's ledger: admits requests by rate and quotas, and counts what teams have used.

* The store decides: one script checks the rate and the quotas of team and organisation, and books all of a request or
  nothing.
* An admitted request is booked at once as `cancelled`. When its result is known, it is settled: it gets its
  outcome and its credits. Settling runs in a task of its own, so cancelling the request does not cancel its accounting.
* While the store is unavailable, the ledger refuses requests or, with `admits_on_outage`, admits them and buffers
  their debits. A debit whose reply was lost is neither repeated nor buffered, because it may have been booked.
"""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from proxy.problems import NO_NAME, Code, Outcome, Problem, StoreOutcomeUnknown, StoreUnavailable
from proxy.quota.backlog import Backlog
from proxy.quota.batches import Admitted, Denied, LedgerBatcher
from proxy.quota.counters import CounterSet
from proxy.quota.ledger_script import MAX_BATCH_ENTRIES, Operation
from proxy.quota.model_names import OTHER
from proxy.quota.quotas import Charge, TeamLimits
from proxy.telemetry.metrics import Metrics

MAX_BACKLOG_ROWS = 10_000
FLUSH_EVERY_S = 0.5

_PENDING = Charge(Outcome.CANCELLED)
"""What an admitted request counts as until it is settled."""

__all__ = ["Admitted", "Denied", "Ledger"]

_T = TypeVar("_T")

Admission = Coroutine[Any, Any, Admitted | Denied]

log = logging.getLogger(__name__)


_UNAVAILABLE = Denied(
    Problem(Code.STORE_UNAVAILABLE, "The ledger of quotas is out of reach: try again in a moment.", retry_after_s=1)
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
        """Checks whether the ledger exists, and creates it if not. Logs a warning if it is unavailable."""
        try:
            await self._batcher.open()
        except StoreUnavailable:
            log.warning("the ledger is out of reach: usage and quotas are unknown until it is back")

    def charge(self, limits: TeamLimits, charge: Charge) -> Admission:
        """Admits and books an answer whose price is known."""
        return self._decide("charge", limits, charge)

    def admit(self, limits: TeamLimits) -> Admission:
        """Admits and books a request to upstream. It must be settled, or refunded if it is never sent."""
        return self._decide("admit", limits, _PENDING)

    def record_uncached(self, limits: TeamLimits, outcome: Outcome) -> Admission:
        """Records an estimate that is neither answered nor sent upstream. It uses one request of the rate."""
        return self._decide("record_uncached", limits, Charge(outcome))

    def refuse_over_ceiling(self, limits: TeamLimits, charge: Charge) -> Admission:
        """Records a stored answer over its request's ceiling. Denied if the rate or a quota would refuse it anyway.

        Uses one request of the rate, and debits no quota.
        """
        return self._decide("over_ceiling", limits, charge)

    def use_rate(self, limits: TeamLimits) -> Admission:
        """Uses one request of the rate, and debits no quota."""
        return self._decide("use_rate", limits, Charge(Outcome.HIT))

    async def peek(self, limits: TeamLimits, credits_micro: int | None) -> Admitted | Denied:
        """The decision that an estimate of this price would get. Uses one request of the rate, and debits nothing.

        Raises `StoreUnavailable`.
        """
        return await self._batcher.decide("peek", limits, Charge(Outcome.HIT, credits_micro))

    async def settle(self, admitted: Admitted, charge: Charge) -> Admitted | Denied:
        """Books the result of an admitted request. Denied if its price exceeds a quota."""
        return await self._shielded(self._settle(admitted, charge))

    async def refund(self, admitted: Admitted, charge: Charge, problem: Problem) -> Denied:
        """Takes back an admission whose request was not sent upstream, and refuses it with `problem`.

        A quota that would refuse the charge's credits takes precedence.
        """
        refunded = await self._shielded(self._undo("refund", admitted, charge))
        if isinstance(refunded, Denied):
            return refunded
        return Denied(problem, None if refunded is None else refunded.quota_state)

    async def release(self, admitted: Admitted) -> None:
        """Takes back an admission whose request was not sent upstream, as if it had not happened."""
        await self._shielded(self._undo("release", admitted, _PENDING))

    async def close(self, timeout_s: float) -> None:
        """Waits for settlements and flushes the backlog, within `timeout_s`."""
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

    async def _decide(self, operation: Operation, limits: TeamLimits, charge: Charge) -> Admitted | Denied:
        try:
            return await self._batcher.decide(operation, limits, charge)
        except StoreOutcomeUnknown:
            return _UNAVAILABLE
        except StoreUnavailable:
            counters = self._batcher.counters(limits)
            if operation == "charge":
                return self._admit_buffered(limits, counters, charge)
            return _unbooked(limits, counters, charge.booked) if self._may_buffer() else _UNAVAILABLE

    async def _settle(self, admitted: Admitted, charge: Charge) -> Admitted | Denied:
        limits, counters = admitted.limits, admitted.counters
        if not admitted.booked:
            return self._admit_buffered(limits, counters, charge)
        try:
            return await self._batcher.decide("settle", limits, charge, admitted_on=counters)
        except StoreOutcomeUnknown:
            return _UNAVAILABLE
        except StoreUnavailable:
            if not self._buffer(counters, _PENDING, requests=-1):
                return _UNAVAILABLE
            settled = self._admit_buffered(limits, counters, charge)
            if isinstance(settled, Denied):  # the backlog is full: the request stays booked as it was
                self._buffer(counters, _PENDING)
            return settled

    def _admit_buffered(self, limits: TeamLimits, counters: CounterSet, charge: Charge) -> Admitted | Denied:
        """Admits an answer without the ledger, if its debit can be buffered."""
        charge = charge.booked
        if not self._buffer(counters, charge):
            return _UNAVAILABLE
        admitted = _unbooked(limits, counters, charge)
        self._batcher.record_booked(charge, admitted)
        return admitted

    async def _undo(self, operation: Operation, admitted: Admitted, charge: Charge) -> Admitted | Denied | None:
        """None if the ledger is unavailable, or has not booked the admission."""
        if not admitted.booked:
            return None
        try:
            return await self._batcher.decide(operation, admitted.limits, charge, admitted_on=admitted.counters)
        except StoreOutcomeUnknown:
            return None
        except StoreUnavailable:
            self._buffer(admitted.counters, _PENDING, requests=-1)
            return None

    async def _shielded(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs `work` to its end even if the caller is cancelled."""
        task = asyncio.ensure_future(work)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return await asyncio.shield(task)

    def _may_buffer(self) -> bool:
        return self._admits_on_outage and self._backlog.has_capacity()

    def _buffer(self, counters: CounterSet, charge: Charge, *, requests: int = 1) -> bool:
        """Buffers a debit until the ledger is back. False if the settings forbid it or the backlog is full."""
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
                log.warning("the ledger is back: all buffered debits are booked")

    async def _flush_until(self, deadline: float) -> None:
        """Tries at least once."""
        loop = asyncio.get_running_loop()
        while self._backlog:
            with suppress(StoreUnavailable):
                await self._flush()
            left_s = deadline - loop.time()
            if not self._backlog or left_s <= 0:
                return
            await asyncio.sleep(min(FLUSH_EVERY_S, left_s))

    async def _flush(self) -> None:
        """Batches that were booked stay so if a later one fails."""
        while (batch := self._backlog.batch(MAX_BATCH_ENTRIES)) is not None:
            await self._batcher.book(batch)
            self._backlog.drop(batch)
            self._metrics.buffered_debits.set(self._backlog.requests)


def _unbooked(limits: TeamLimits, counters: CounterSet, charge: Charge) -> Admitted:
    """Only the ledger knows which models have a name of their own, so credits count under `OTHER`."""
    model = NO_NAME if charge.credits_micro is None else OTHER
    return Admitted(limits, counters, booked=False, model=model)
