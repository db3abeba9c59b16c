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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import time_ns
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from proxy.problems import NO_NAME, Problem, StoreUnanswered, StoreUnavailable
from proxy.quota.backlog import Owed, Pile
from proxy.quota.counters import LedgerKeys, Sheet, org_sheet, team_sheet
from proxy.quota.model_names import MAX_MODELS
from proxy.quota.quotas import Charge, Quota, Standing, Terms
from proxy.quota.windows import Window
from proxy.store.client import Script, Store
from proxy.telemetry.logs import event
from proxy.telemetry.metrics import Metrics

MAX_BATCH = 200
"""Entries in one script call: some milliseconds of the store's time."""

TURNS_BETWEEN = 3
"""Of the event loop, between two calls. In them those are heard who have just been answered, and ask again."""

FLUSH_REMEMBERED_S = 86400

EXACT_MICRO = 9 * 10**15
"""As much as a number of Lua holds exactly: what is owed may be more, and is booked in parts then."""

_US = 1_000_000
_FOR_EVER_S = 2**53 // _US
_DECIDE = Script("proxy.quota", "ledger_decide")
_DEBITS = frozenset(("charge", "admit", "settle"))
_ALIKE = frozenset(("charge", "admit"))
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

    terms: Terms
    sheet: Sheet
    standing: Standing | None = None
    booked: bool = True
    model: str = NO_NAME


class Denied(NamedTuple):
    problem: Problem
    standing: Standing | None = None


@dataclass(slots=True, eq=False)
class _Entry:
    """Requests alike, and who waits for what becomes of each."""

    operation: str
    terms: Terms
    charge: Charge
    admitted_on: Sheet | None
    waiting: list[asyncio.Future[Admitted | Denied]] = field(default_factory=list)

    def has_room(self) -> bool:
        """Whether one more leaves a sum that Lua can hold."""
        return (len(self.waiting) + 1) * (self.charge.credits_micro or 0) <= EXACT_MICRO


class _Pages:
    """Entries as `proxy/quota/lua/ledger_decide.lua` reads them, with the sheets that they are booked on."""

    def __init__(self) -> None:
        self.holds = Window(0, _FOR_EVER_S)
        self.count = 0
        self._keys: list[str] = []
        self._sheets: list[str | int] = []
        self._entries: list[str | int] = []
        self._numbers: dict[Sheet, int] = {}

    def write(self, operation: str, charge: Charge, sheet: Sheet, *, admitted_on: Sheet, requests: int = 1) -> None:
        credits_micro = "" if charge.credits_micro is None else charge.credits_micro
        numbers = self.number(sheet), self.number(admitted_on)
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
        return (*holds_us, new_id, MAX_MODELS, FLUSH_REMEMBERED_S * 1000, *counts, *self._sheets, *self._entries)

    def number(self, sheet: Sheet) -> int:
        """A sheet is written down when it is first needed, the organisation's before the team's."""
        if sheet not in self._numbers:
            org = self.number(sheet.org) if sheet.org else 0
            self._keys += sheet.keys
            self._sheets += (org, *sheet.args)
            self._numbers[sheet] = len(self._numbers) + 1
        return self._numbers[sheet]


class Decisions:
    """The way to the ledger of one organisation. All raise `StoreUnavailable`."""

    def __init__(self, store: Store, keys: LedgerKeys, zone: ZoneInfo, metrics: Metrics) -> None:
        self._store = store
        self._keys = keys
        self._zone = zone
        self._metrics = metrics
        self._waiting: list[_Entry] = []
        self._alike: dict[tuple[object, ...], _Entry] = {}
        """Of those that wait, the ones that more requests can join."""
        self._deciding: asyncio.Task[None] | None = None
        self._sheets: dict[str, tuple[Terms, Sheet]] = {}
        self._org_sheets: dict[tuple[Quota, ...], Sheet] = {}
        self._ahead_us = 0
        """By how much the store's clock is ahead of this machine's."""
        self._id: bytes | None = None
        self._new_id = secrets.token_hex(8)
        """Of the next ledger that begins with a call from here."""

    async def open(self) -> None:
        """Looks whether there is a ledger, and begins one if there is none."""
        await self._run(_Pages())

    async def book(self, pile: Pile) -> None:
        """Books what is owed, unless that has been done before."""
        pages = _Pages()
        for owed in pile.rows:
            for charge, requests in _parts(owed):
                pages.write("apply", charge, owed.sheet, admitted_on=owed.sheet, requests=requests)
        await self._run(pages, pile.name)

    def decide(
        self, operation: str, terms: Terms, charge: Charge, *, admitted_on: Sheet | None = None
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

    def _entry(self, operation: str, terms: Terms, charge: Charge, admitted_on: Sheet | None) -> _Entry:
        """The one that takes the request. Which answers have passed a quota that warns must be told of each."""
        if operation not in _ALIKE or terms.warns:
            entry = _Entry(operation, terms, charge, admitted_on)
            self._waiting.append(entry)
            return entry
        kind = (operation, terms.team, charge.outcome, charge.credits_micro, charge.model)
        known = self._alike.get(kind)
        if known is not None and known.terms is terms and known.has_room():
            return known
        entry = self._alike[kind] = _Entry(operation, terms, charge, admitted_on)
        self._waiting.append(entry)
        return entry

    async def _decide_waiting(self) -> None:
        """One call after the other: who comes meanwhile is decided by the next. The busier, the larger the batches."""
        try:
            while self._waiting:
                entries, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                self._alike.clear()
                await self._decide(entries)
                for _ in range(TURNS_BETWEEN):
                    await asyncio.sleep(0)
        finally:
            self._deciding = None

    async def _decide(self, entries: Sequence[_Entry]) -> None:
        """Nobody waits for a verdict that a defect has lost."""
        try:
            is_done = await self._decide_now(entries) or await self._decide_now(entries)
        except StoreUnavailable as error:
            self._fail(entries, error)
            return
        except BaseException as error:
            self._fail(entries, StoreUnanswered("the ledger's client failed"))
            if not isinstance(error, Exception):  # the process ends
                raise
            log.exception("the ledger's client failed")
            return
        if not is_done:
            self._fail(entries, StoreUnavailable("the store's clock passes from window to window"))

    async def _decide_now(self, entries: Sequence[_Entry]) -> bool:
        """False if the store's clock was not in the windows that this machine took for the current ones."""
        sheets = [self.sheet(entry.terms) for entry in entries]
        pages = _pages(entries, sheets)
        reply = await self._run(pages)
        if reply is None:
            return False
        now_us, _, _, _, verdicts, stood = reply
        standings: dict[Sheet, Standing] = {}
        for entry, sheet in zip(entries, sheets, strict=True):
            if sheet not in standings:
                standings[sheet] = _standing(entry.terms, sheet, now_us, stood[pages.number(sheet) - 1])
        for entry, sheet, verdict in zip(entries, sheets, verdicts, strict=True):
            self._deliver(entry, sheet, verdict, standings[sheet])
        return True

    def _deliver(self, entry: _Entry, sheet: Sheet, verdict: list[Any], behind: Standing) -> None:
        """To the first ones that they are admitted, to the others why not. `behind` the batch the team stands so."""
        word, room, model, *stood = verdict
        standing = _standing(entry.terms, sheet, behind.now_us, stood[0]) if stood else behind
        good, bad = Admitted(entry.terms, sheet, standing if entry.terms.warns else behind, model=model.decode()), None
        if room < len(entry.waiting):
            bad = Denied(self._problem(word, standing, entry.charge), standing)
        if room and entry.operation in _COUNTED:
            self._count(entry.charge, good, room)
        for number, decided in enumerate(entry.waiting):
            if not decided.done():  # else its request has gone
                decided.set_result(good if number < room or bad is None else bad)

    def _problem(self, word: bytes, standing: Standing, charge: Charge) -> Problem:
        if word == b"rate":
            return standing.rate_limited()
        quotas = standing.terms.quotas
        violated = tuple(quotas[int(number) - 1] for number in word.split(b","))
        return standing.quota_exceeded(violated, charge.credits_micro, self._zone)

    def _count(self, charge: Charge, admitted: Admitted, requests: int) -> None:
        """Credits, and warnings, of which there are none where there are several requests."""
        team = admitted.terms.team
        if charge.credits_micro is not None:
            self._metrics.note_credits(team, admitted.model, requests * charge.credits_micro)
        if admitted.standing is not None:
            for quota in admitted.standing.warnings():
                self._metrics.record_warning(quota.owner(team), quota.measure, quota.per)

    def _fail(self, entries: Sequence[_Entry], error: StoreUnavailable) -> None:
        if isinstance(error, StoreUnanswered):
            self._metrics.unanswered_debits.inc(
                sum(len(entry.waiting) for entry in entries if entry.operation in _DEBITS)
            )
        for entry in entries:
            for decided in entry.waiting:
                if not decided.done():
                    decided.set_exception(error)

    async def _run(self, pages: _Pages, flush: str | None = None) -> list[Any] | None:
        """The script's reply; None if the store's clock was outside of the sheets. Raises `StoreUnavailable`."""
        keys, args = pages.keys(self._keys, flush), pages.args(self._new_id)
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

    def sheet(self, terms: Terms) -> Sheet:
        """The one to book on now."""
        now_s = (time_ns() // 1000 + self._ahead_us) // _US
        known_terms, sheet = self._sheets.get(terms.team, (None, None))
        if sheet is not None and known_terms is terms and sheet.holds.start_s <= now_s < sheet.holds.end_s:
            return sheet
        org = self._org_sheets.get(terms.org_quotas)
        if org is None or not org.holds.start_s <= now_s < org.holds.end_s:
            org = self._org_sheets[terms.org_quotas] = org_sheet(self._keys, terms.org_quotas, now_s, self._zone)
        sheet = team_sheet(self._keys, terms, org, now_s, self._zone)
        self._sheets[terms.team] = terms, sheet
        return sheet


def _standing(terms: Terms, sheet: Sheet, now_us: int, stood: Sequence[int]) -> Standing:
    lead_us, *used = stood
    return Standing(terms, sheet.windows, now_us, lead_us, tuple(used), sheet.policy_field)


def _parts(owed: Owed) -> Iterator[tuple[Charge, int]]:
    """What is owed, its requests with the first part of the credits."""
    charge, requests = owed.charge, owed.requests
    while charge.credits_micro is not None and charge.credits_micro > EXACT_MICRO:
        yield replace(charge, credits_micro=EXACT_MICRO), requests
        charge, requests = replace(charge, credits_micro=charge.credits_micro - EXACT_MICRO), 0
    yield charge, requests


def _pages(entries: Sequence[_Entry], sheets: Sequence[Sheet]) -> _Pages:
    pages = _Pages()
    for entry, sheet in zip(entries, sheets, strict=True):
        admitted_on, requests = entry.admitted_on or sheet, len(entry.waiting)
        pages.write(entry.operation, entry.charge, sheet, admitted_on=admitted_on, requests=requests)
        pages.hold(sheet.holds)
    return pages
