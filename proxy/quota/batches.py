"""The ledger's decisions, in batches: who comes while others are decided is decided together with who else has come.

* Requests alike (the same team, operation and charge) are one entry of a batch, whatever their number. Its first ones
  are admitted, as many as there is room for.
* Who is admitted is told how the team stands behind the whole batch; who is refused, how it stood then.
* Windows are worked out here and verified there, against the store's clock. Where that is in another window, the
  script does nothing and says its time; the windows are worked out again, and it is asked once more.
* A call whose reply is lost is not repeated: it may have debited. Its requests fail, and are counted.
* Each reply says which ledger it is from: one that has been lost is noticed.
"""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import time_ns
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from proxy.problems import NO_NAME, Problem, StoreOutcomeUnknown, StoreUnavailable
from proxy.quota.backlog import FlushBatch
from proxy.quota.counters import MAX_ENTRIES, MAX_ENTRY_MICRO, CounterSet, LedgerKeys, org_counters, team_counters
from proxy.quota.model_names import MAX_MODELS
from proxy.quota.quotas import Charge, Quota, QuotaState, TeamLimits
from proxy.quota.windows import Window
from proxy.store.client import Script, Store
from proxy.telemetry.logs import event
from proxy.telemetry.metrics import Metrics

TURNS_BETWEEN = 3
"""Of the event loop, between two calls. In them those are heard who have just been answered, and ask again."""

FLUSH_REMEMBERED_S = 86400

_US = 1_000_000
_FOR_EVER_S = 2**53 // _US
_DECIDE = Script("proxy.quota", "ledger_decide")
_DEBITS = frozenset(("charge", "admit", "settle"))
_MERGEABLE = frozenset(("charge", "admit"))
"""Of what several can be decided as one."""

_COUNTED = frozenset(("charge", "settle"))
"""What books credits."""

log = logging.getLogger(__name__)


class Admitted(NamedTuple):
    """A request that may go on, or whose credits are counted.

    sheet: on which it stands.
    standing: None where the ledger is out of reach; `booked` is False where nothing stands on the sheet yet.
    model: the name under which credits were counted.
    """

    terms: TeamLimits
    counters: CounterSet
    quota_state: QuotaState | None = None
    booked: bool = True
    model: str = NO_NAME


class Denied(NamedTuple):
    problem: Problem
    quota_state: QuotaState | None = None


@dataclass(slots=True, eq=False)
class _BatchEntry:
    """Requests alike, and who waits for what becomes of each."""

    operation: str
    terms: TeamLimits
    charge: Charge
    admitted_on: CounterSet | None
    waiting: list[asyncio.Future[Admitted | Denied]] = field(default_factory=list)

    def takes_one_more(self) -> bool:
        return (len(self.waiting) + 1) * (self.charge.credits_micro or 0) <= MAX_ENTRY_MICRO


class _ScriptArgs:
    """Entries as `proxy/quota/lua/ledger_decide.lua` reads them, with the sheets that they are booked on."""

    def __init__(self) -> None:
        self.holds = Window(0, _FOR_EVER_S)
        self.count = 0
        self._keys: list[str] = []
        self._counter_sets: list[str | int] = []
        self._entries: list[str | int] = []
        self._numbers: dict[CounterSet, int] = {}

    def write(
        self, operation: str, charge: Charge, counters: CounterSet, *, admitted_on: CounterSet, requests: int = 1
    ) -> None:
        credits_micro = "" if charge.credits_micro is None else charge.credits_micro
        numbers = self.number(counters), self.number(admitted_on)
        self._entries += (operation, numbers[0], requests, credits_micro, charge.model, charge.outcome, numbers[1])
        self.count += 1

    def hold(self, window: Window) -> None:
        """The script must not run outside of `window` either."""
        self.holds = Window(max(self.holds.start_s, window.start_s), min(self.holds.end_s, window.end_s))

    def keys(self, names: LedgerKeys, flush: str | None) -> tuple[str, ...]:
        return (names.id, names.models, names.teams, names.flush(flush) if flush else names.id, *self._keys)

    def args(self, new_id: str) -> tuple[str | int, ...]:
        holds_us = (self.holds.start_s * _US, self.holds.end_s * _US)
        counts = (len(self._numbers), self.count)
        return (*holds_us, new_id, MAX_MODELS, FLUSH_REMEMBERED_S * 1000, *counts, *self._counter_sets, *self._entries)

    def number(self, counters: CounterSet) -> int:
        """A sheet is written down when it is first needed, the organisation's before the team's."""
        if counters not in self._numbers:
            org = self.number(counters.org) if counters.org else 0
            self._keys += counters.keys
            self._counter_sets += (org, *counters.args)
            self._numbers[counters] = len(self._numbers) + 1
        return self._numbers[counters]


class LedgerBatcher:
    """The way to the ledger of one organisation. All raise `StoreUnavailable`."""

    def __init__(self, store: Store, keys: LedgerKeys, zone: ZoneInfo, metrics: Metrics) -> None:
        self._store = store
        self._keys = keys
        self._zone = zone
        self._metrics = metrics
        self._waiting: list[_BatchEntry] = []
        self._mergeable: dict[tuple[object, ...], _BatchEntry] = {}
        """Of those that wait, the ones that more requests can join."""
        self._deciding: asyncio.Task[None] | None = None
        self._counter_sets: dict[str, tuple[TeamLimits, CounterSet]] = {}
        self._org_counter_sets: dict[tuple[Quota, ...], CounterSet] = {}
        self._ahead_us = 0
        """By how much the store's clock is ahead of this machine's."""
        self._id: bytes | None = None
        self._new_id = secrets.token_hex(8)
        """Of the next ledger that begins with a call from here."""

    async def open(self) -> None:
        """Looks whether there is a ledger, and begins one if there is none."""
        await self._run(_ScriptArgs())

    async def book(self, batch: FlushBatch) -> None:
        """Books what is owed, unless that has been done before."""
        script_args = _ScriptArgs()
        for debit in batch.rows:
            counters = debit.counters
            script_args.write("apply", debit.charge, counters, admitted_on=counters, requests=debit.requests)
        await self._run(script_args, batch.name)

    def decide(
        self, operation: str, terms: TeamLimits, charge: Charge, *, admitted_on: CounterSet | None = None
    ) -> asyncio.Future[Admitted | Denied]:
        """What becomes of a request; `proxy/quota/lua/ledger_decide.lua` describes the operations."""
        decided: asyncio.Future[Admitted | Denied] = self._loop.create_future()
        self._entry(operation, terms, charge, admitted_on).waiting.append(decided)
        if self._deciding is None:  # it begins in the next turn of the loop, when all who come in this one are there
            self._deciding = self._loop.create_task(self._decide_waiting())
        return decided

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """Looked up once: Python asks the system each time whether the process is still the same."""
        return asyncio.get_running_loop()

    def _entry(self, operation: str, terms: TeamLimits, charge: Charge, admitted_on: CounterSet | None) -> _BatchEntry:
        """The one that takes the request. Which answers have passed a quota that warns must be told of each."""
        if operation not in _MERGEABLE or terms.warns:
            entry = _BatchEntry(operation, terms, charge, admitted_on)
            self._waiting.append(entry)
            return entry
        kind = (operation, terms.team, charge.outcome, charge.credits_micro, charge.model)
        known = self._mergeable.get(kind)
        if known is not None and known.terms is terms and known.takes_one_more():
            return known
        entry = self._mergeable[kind] = _BatchEntry(operation, terms, charge, admitted_on)
        self._waiting.append(entry)
        return entry

    async def _decide_waiting(self) -> None:
        """One call after the other: who comes meanwhile is decided by the next. The busier, the larger the batches."""
        try:
            while self._waiting:
                entries, self._waiting = self._waiting[:MAX_ENTRIES], self._waiting[MAX_ENTRIES:]
                self._mergeable.clear()
                await self._decide(entries)
                for _ in range(TURNS_BETWEEN):
                    await asyncio.sleep(0)
        finally:
            self._deciding = None

    async def _decide(self, entries: Sequence[_BatchEntry]) -> None:
        """Nobody waits for a verdict that a defect has lost."""
        try:
            is_done = await self._decide_now(entries) or await self._decide_now(entries)
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
            self._fail(entries, StoreUnavailable("the store's clock passes from window to window"))

    async def _decide_now(self, entries: Sequence[_BatchEntry]) -> bool:
        """False if the store's clock was not in the windows that this machine took for the current ones."""
        counter_sets = [self.counters(entry.terms) for entry in entries]
        script_args = _script_args(entries, counter_sets)
        reply = await self._run(script_args)
        if reply is None:
            return False
        now_us, _, _, _, verdicts, stood = reply
        quota_states: dict[CounterSet, QuotaState] = {}
        for entry, counters in zip(entries, counter_sets, strict=True):
            if counters not in quota_states:
                quota_states[counters] = _quota_state(
                    entry.terms, counters, now_us, stood[script_args.number(counters) - 1]
                )
        for entry, counters, row in zip(entries, counter_sets, verdicts, strict=True):
            self._deliver(entry, counters, row, quota_states[counters])
        return True

    def _deliver(self, entry: _BatchEntry, counters: CounterSet, row: list[Any], behind: QuotaState) -> None:
        """To the first ones that they are admitted, to the others why not. `behind` the batch the team stands so."""
        verdict, admitted_count, model, *stood = row
        quota_state = _quota_state(entry.terms, counters, behind.now_us, stood[0]) if stood else behind
        good, bad = (
            Admitted(entry.terms, counters, quota_state if entry.terms.warns else behind, model=model.decode()),
            None,
        )
        if admitted_count < len(entry.waiting):
            bad = Denied(self._problem(verdict, quota_state, entry.charge), quota_state)
        if admitted_count and entry.operation in _COUNTED:
            self._count(entry.charge, good, admitted_count)
        for number, decided in enumerate(entry.waiting):
            if not decided.done():  # else its request has gone
                decided.set_result(good if number < admitted_count or bad is None else bad)

    def _problem(self, verdict: bytes, quota_state: QuotaState, charge: Charge) -> Problem:
        if verdict == b"rate":
            return quota_state.rate_limited()
        quotas = quota_state.terms.quotas
        violated = tuple(quotas[int(number) - 1] for number in verdict.split(b","))
        return quota_state.quota_exceeded(violated, charge.credits_micro, self._zone)

    def _count(self, charge: Charge, admitted: Admitted, requests: int) -> None:
        """Credits, and warnings, of which there are none where there are several requests."""
        team = admitted.terms.team
        if charge.credits_micro is not None:
            self._metrics.record_credits(team, admitted.model, requests * charge.credits_micro)
        if admitted.quota_state is not None:
            for quota in admitted.quota_state.warnings():
                self._metrics.record_warning(quota.owner(team), quota.measure, quota.per)

    def _fail(self, entries: Sequence[_BatchEntry], error: StoreUnavailable) -> None:
        if isinstance(error, StoreOutcomeUnknown):
            self._metrics.unanswered_debits.inc(
                sum(len(entry.waiting) for entry in entries if entry.operation in _DEBITS)
            )
        for entry in entries:
            for decided in entry.waiting:
                if not decided.done():
                    decided.set_exception(error)

    async def _run(self, script_args: _ScriptArgs, flush: str | None = None) -> list[Any] | None:
        """The script's reply; None if the store's clock was outside of the sheets. Raises `StoreUnavailable`."""
        keys, args = script_args.keys(self._keys, flush), script_args.args(self._new_id)
        reply: list[Any] = await self._store.call_at_once(_DECIDE, *keys, args=args)
        self._ahead_us = reply[0] - time_ns() // 1000
        if len(reply) == 1:
            return None
        if reply[1]:
            self._notice(reply[1], int(reply[2]), is_new=bool(reply[3]))
        return reply

    def _notice(self, found: bytes, created_ms: int, *, is_new: bool) -> None:
        """A ledger that begins, or is another than a moment ago, is never passed over in silence."""
        if found == self._id:
            return
        if is_new:
            self._new_id = secrets.token_hex(8)
        facts = {"ledger": found.decode(), "created_ms": created_ms}
        if self._id is not None:
            self._metrics.ledger_lost.inc()
            facts["before"] = self._id.decode()
            event(log, logging.ERROR, "the ledger was lost: usage and quotas count from zero", facts)
        elif is_new:
            event(log, logging.WARNING, "a new ledger begins: usage and quotas count from zero", facts)
        self._id = found
        self._metrics.ledger_created.set(created_ms / 1000)

    def counters(self, terms: TeamLimits) -> CounterSet:
        """The one to book on now."""
        now_s = (time_ns() // 1000 + self._ahead_us) // _US
        known_terms, counters = self._counter_sets.get(terms.team, (None, None))
        if counters is not None and known_terms is terms and counters.holds.start_s <= now_s < counters.holds.end_s:
            return counters
        org = self._org_counter_sets.get(terms.org_quotas)
        if org is None or not org.holds.start_s <= now_s < org.holds.end_s:
            org = self._org_counter_sets[terms.org_quotas] = org_counters(
                self._keys, terms.org_quotas, now_s, self._zone
            )
        counters = team_counters(self._keys, terms, org, now_s, self._zone)
        self._counter_sets[terms.team] = terms, counters
        return counters


def _quota_state(terms: TeamLimits, counters: CounterSet, now_us: int, stood: Sequence[int]) -> QuotaState:
    tat_offset_us, *used = stood
    return QuotaState(terms, counters.windows, now_us, tat_offset_us, tuple(used), counters.policy_field)


def _script_args(entries: Sequence[_BatchEntry], counter_sets: Sequence[CounterSet]) -> _ScriptArgs:
    script_args = _ScriptArgs()
    for entry, counters in zip(entries, counter_sets, strict=True):
        admitted_on, requests = entry.admitted_on or counters, len(entry.waiting)
        script_args.write(entry.operation, entry.charge, counters, admitted_on=admitted_on, requests=requests)
        script_args.hold(counters.holds)
    return script_args
