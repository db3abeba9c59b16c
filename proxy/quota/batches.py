"""Micro-batching of ledger calls: requests that arrive while a call is in flight go into the next one.

* Equal requests (same team, operation and charge) share one entry of a batch. The script admits the first ones, as
  many as rate and quotas allow.
* The `RateLimit` header of an admitted request shows the state after the whole batch; that of a refused one, the state
  at its refusal.
* Windows are computed here and verified in the store. If the store's clock is in another window, the script does
  nothing and returns its time; the windows are computed again, and the call is repeated once.
* A call whose reply was lost is not repeated, because it may have debited. Its requests fail and are counted.
* Each reply names its ledger, so a ledger that was lost is noticed.
"""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import time_ns
from typing import NamedTuple
from zoneinfo import ZoneInfo

from proxy.problems import NO_NAME, Outcome, Problem, StoreOutcomeUnknown, StoreUnavailable
from proxy.quota.backlog import FlushBatch
from proxy.quota.counters import CounterSet, LedgerKeys, org_counters, team_counters
from proxy.quota.ledger_script import (
    MAX_BATCH_ENTRIES,
    MAX_ENTRY_MICRO,
    LedgerReply,
    Operation,
    ScriptArgs,
    Verdict,
    read_reply,
)
from proxy.quota.quotas import Charge, Quota, QuotaState, TeamLimits
from proxy.store.client import Script, Store
from proxy.telemetry.logs import event
from proxy.telemetry.metrics import Metrics

LOOP_TURNS_BETWEEN_CALLS = 3
"""Clients that were just answered ask again within these turns of the event loop, and so get into the next call."""

_US = 1_000_000
_DECIDE = Script("proxy.quota", "ledger_decide")
_DEBITS = frozenset(("charge", "admit", "settle"))
_MERGEABLE = frozenset(("charge", "admit", "use_rate"))
"""The operations that the script decides for several equal requests at once."""

_PRICED = frozenset(("charge", "settle"))
"""The operations that book credits."""

log = logging.getLogger(__name__)


class Admitted(NamedTuple):
    """A request that may proceed, or whose credits are booked.

    counters: on which the request is booked.
    quota_state: None if the ledger is unavailable.
    booked: False if nothing is on the counters yet.
    model: the name under which credits were counted.
    """

    limits: TeamLimits
    counters: CounterSet
    quota_state: QuotaState | None = None
    booked: bool = True
    model: str = NO_NAME


class Denied(NamedTuple):
    problem: Problem
    quota_state: QuotaState | None = None


@dataclass(slots=True, eq=False)
class BatchEntry:
    """Equal requests, with one future each."""

    operation: Operation
    limits: TeamLimits
    charge: Charge
    admitted_on: CounterSet | None
    futures: list[asyncio.Future[Admitted | Denied]] = field(default_factory=list)

    def takes_one_more(self) -> bool:
        return (len(self.futures) + 1) * (self.charge.credits_micro or 0) <= MAX_ENTRY_MICRO


class LedgerBatcher:
    """Calls the ledger of one organisation. Methods raise `StoreUnavailable`."""

    def __init__(self, store: Store, keys: LedgerKeys, zone: ZoneInfo, metrics: Metrics) -> None:
        self._store = store
        self._keys = keys
        self._zone = zone
        self._metrics = metrics
        self._pending: list[BatchEntry] = []
        self._mergeable: dict[tuple[object, ...], BatchEntry] = {}
        """The pending entries that equal requests can join."""
        self._running: asyncio.Task[None] | None = None
        self._counter_sets: dict[str, tuple[TeamLimits, CounterSet]] = {}
        self._org_counter_sets: dict[tuple[Quota, ...], CounterSet] = {}
        self._clock_offset_us = 0
        """The store's clock minus this machine's."""
        self._ledger_id: bytes | None = None
        self._new_id = secrets.token_hex(8)
        """The id of the ledger that the next call creates if there is none."""

    async def open(self) -> None:
        """Checks whether the ledger exists, and creates it if not."""
        await self._call(ScriptArgs(self._keys))

    async def book(self, batch: FlushBatch) -> None:
        """Books buffered debits, unless this batch was booked before."""
        script_args = ScriptArgs(self._keys, flush=batch.name)
        for debit in batch.rows:
            script_args.add("apply", debit.charge, debit.counters, requests=debit.requests)
        await self._call(script_args)

    def decide(
        self, operation: Operation, limits: TeamLimits, charge: Charge, *, admitted_on: CounterSet | None = None
    ) -> asyncio.Future[Admitted | Denied]:
        """The decision about one request; `lua/ledger_decide.lua` describes the operations."""
        future: asyncio.Future[Admitted | Denied] = self._loop.create_future()
        self._entry(operation, limits, charge, admitted_on).futures.append(future)
        if self._running is None:  # the task starts in the loop's next iteration and takes all requests of this one
            self._running = self._loop.create_task(self._run_batches())
        return future

    def counters(self, limits: TeamLimits) -> CounterSet:
        """The counters that a team's requests are booked on now."""
        now_s = (time_ns() // 1000 + self._clock_offset_us) // _US
        known_limits, counters = self._counter_sets.get(limits.team, (None, None))
        if counters is not None and known_limits is limits and now_s in counters.valid:
            return counters
        org = self._org_counter_sets.get(limits.org_quotas)
        if org is None or now_s not in org.valid:
            org = org_counters(self._keys, limits.org_quotas, now_s, self._zone)
            self._org_counter_sets[limits.org_quotas] = org
        counters = team_counters(self._keys, limits, org, now_s, self._zone)
        self._counter_sets[limits.team] = limits, counters
        return counters

    def record_booked(self, charge: Charge, admitted: Admitted, requests: int = 1) -> None:
        """Counts credits in the metrics, and the warnings of one request. Merged requests have no warnings."""
        team = admitted.limits.team
        if charge.credits_micro is not None:
            self._metrics.record_credits(team, admitted.model, requests * charge.credits_micro)
        if admitted.quota_state is not None:
            for quota in admitted.quota_state.warnings():
                self._metrics.quota_warned.labels(quota.owner(team), quota.measure, quota.per).inc()

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """Looked up once, because `get_running_loop` makes a system call each time to detect a fork."""
        return asyncio.get_running_loop()

    def _entry(
        self, operation: Operation, limits: TeamLimits, charge: Charge, admitted_on: CounterSet | None
    ) -> BatchEntry:
        """The entry that the request goes into. With quotas that warn, each request needs its own state."""
        if operation not in _MERGEABLE or limits.warns:
            entry = BatchEntry(operation, limits, charge, admitted_on)
            self._pending.append(entry)
            return entry
        kind = (operation, limits.team, charge.outcome, charge.credits_micro, charge.model)
        known = self._mergeable.get(kind)
        if known is not None and known.limits is limits and known.takes_one_more():
            return known
        entry = self._mergeable[kind] = BatchEntry(operation, limits, charge, admitted_on)
        self._pending.append(entry)
        return entry

    async def _run_batches(self) -> None:
        """One call at a time. The higher the load, the larger the batches."""
        try:
            while self._pending:
                entries, self._pending = self._pending[:MAX_BATCH_ENTRIES], self._pending[MAX_BATCH_ENTRIES:]
                self._mergeable.clear()
                await self._decide(entries)
                for _ in range(LOOP_TURNS_BETWEEN_CALLS):
                    await asyncio.sleep(0)
        finally:
            self._running = None

    async def _decide(self, entries: Sequence[BatchEntry]) -> None:
        """Resolves each future of the entries, even if a defect of ours raises."""
        try:
            is_done = await self._try_to_decide(entries) or await self._try_to_decide(entries)
        except StoreUnavailable as error:
            self._fail(entries, error)
            return
        except BaseException as error:
            self._fail(entries, StoreOutcomeUnknown("the ledger's client failed"))
            if not isinstance(error, Exception):  # the process ends
                raise
            log.exception("the ledger's client failed")
            return
        if not is_done:
            self._fail(entries, StoreUnavailable("the store's clock was in other windows twice in a row"))

    async def _try_to_decide(self, entries: Sequence[BatchEntry]) -> bool:
        """Returns False if the store's clock was not in the windows that this machine computed."""
        counter_sets = [self.counters(entry.limits) for entry in entries]
        script_args = ScriptArgs(self._keys)
        for entry, counters in zip(entries, counter_sets, strict=True):
            requests, admitted_on = len(entry.futures), entry.admitted_on
            script_args.add(entry.operation, entry.charge, counters, requests=requests, admitted_on=admitted_on)
        reply = await self._call(script_args)
        if not reply.in_windows:
            return False
        states: dict[CounterSet, QuotaState] = {}
        for entry, counters, verdict in zip(entries, counter_sets, reply.verdicts, strict=True):
            if counters not in states:
                state = script_args.state_of(counters, reply)
                states[counters] = _quota_state(entry.limits, counters, reply.now_us, state)
            self._deliver(entry, counters, verdict, states[counters])
        return True

    def _deliver(self, entry: BatchEntry, counters: CounterSet, verdict: Verdict, state_after: QuotaState) -> None:
        """Admits the first requests of the entry and refuses the rest. `state_after`: the team's after the batch."""
        limits, futures = entry.limits, entry.futures
        state = state_after
        if verdict.state is not None:
            state = _quota_state(limits, counters, state_after.now_us, verdict.state)
        admitted_state = state if limits.warns else state_after
        admitted = Admitted(limits, counters, admitted_state, model=verdict.model.decode())
        denied = None
        if verdict.admitted < len(futures):
            denied = Denied(self._problem(verdict, state, entry), state)
        if verdict.admitted and entry.operation in _PRICED:
            self.record_booked(entry.charge.booked, admitted, verdict.admitted)
        for number, future in enumerate(futures):
            if not future.done():  # a cancelled request no longer waits
                future.set_result(admitted if number < verdict.admitted or denied is None else denied)

    def _problem(self, verdict: Verdict, state: QuotaState, entry: BatchEntry) -> Problem:
        if verdict.is_rate_limited:
            return state.rate_limited()
        return state.quota_exceeded(
            verdict.violated(state.limits.quotas),
            entry.charge.credits_micro,
            self._zone,
            # `explain` does not show a refused team the price, and a ceiling must not help it to find the price
            shows_price=entry.operation != "peek" and entry.charge.outcome is not Outcome.OVER_CEILING,
        )

    def _fail(self, entries: Sequence[BatchEntry], error: StoreUnavailable) -> None:
        if isinstance(error, StoreOutcomeUnknown):
            debits = sum(len(entry.futures) for entry in entries if entry.operation in _DEBITS)
            self._metrics.unanswered_debits.inc(debits)
        for entry in entries:
            for future in entry.futures:
                if not future.done():
                    future.set_exception(error)

    async def _call(self, script_args: ScriptArgs) -> LedgerReply:
        """Runs the script. Raises `StoreUnavailable`."""
        args = script_args.args(self._new_id)
        reply = read_reply(await self._store.call_at_once(_DECIDE, *script_args.keys, args=args))
        self._clock_offset_us = reply.now_us - time_ns() // 1000
        if reply.ledger_id is not None:
            self._check_ledger(reply.ledger_id, reply.created_ms, is_new=reply.is_new)
        return reply

    def _check_ledger(self, ledger_id: bytes, created_ms: int, *, is_new: bool) -> None:
        """Logs when the ledger is new or not the one of the call before."""
        if ledger_id == self._ledger_id:
            return
        if is_new:
            self._new_id = secrets.token_hex(8)
        facts = {"ledger": ledger_id.decode(), "created_ms": created_ms}
        if self._ledger_id is not None:
            self._metrics.ledger_lost.inc()
            facts["before"] = self._ledger_id.decode()
            event(log, logging.ERROR, "the ledger was lost: usage and quotas count from zero", facts)
        elif is_new:
            event(log, logging.WARNING, "a new ledger begins: usage and quotas count from zero", facts)
        self._ledger_id = ledger_id
        self._metrics.ledger_created.set(created_ms / 1000)


def _quota_state(limits: TeamLimits, counters: CounterSet, now_us: int, state: Sequence[int]) -> QuotaState:
    tat_us, *used = state
    return QuotaState(limits, counters.windows, now_us, tat_us, tuple(used), counters.policy_field)
