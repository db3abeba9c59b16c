"""The ledger's decisions, in batches: requests of the same turn of the event loop are decided in one script call.

* Windows are worked out here and verified there, against the store's clock. Where that is in another window, the
  script does nothing and says its time; the windows are worked out again, and it is asked once more.
* A call whose reply is lost is not repeated: it may have debited. Its requests fail, and are counted.
* Each reply says which ledger it is from: one that has been lost is noticed.
"""

import asyncio
import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import time_ns
from typing import Any
from zoneinfo import ZoneInfo

from proxy.backlog import Owed, Pile
from proxy.logs import event
from proxy.metrics import Metrics
from proxy.models import MAX_MODELS
from proxy.problems import StoreUnanswered, StoreUnavailable
from proxy.quotas import Charge, Quota, Standing, Terms
from proxy.sheets import LedgerKeys, Sheet, org_sheet, team_sheet
from proxy.store import Script, Store
from proxy.windows import Window

MAX_BATCH = 200
"""Requests decided in one script call: a millisecond or so of the store's time."""

FLUSH_REMEMBERED_S = 86400

EXACT_MICRO = 9 * 10**15
"""As much as a number of Lua holds exactly: what is owed may be more, and is booked in parts then."""

_US = 1_000_000
_FOR_EVER_S = 2**53 // _US
_DECIDE = Script("ledger_decide")
_DEBITS = frozenset(("charge", "admit", "settle"))

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    operation: str
    terms: Terms
    charge: Charge
    verdict: asyncio.Future["Verdict"]
    admitted_on: Sheet | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    word: str
    standing: Standing
    sheet: Sheet
    model: str

    @property
    def violated(self) -> tuple[Quota, ...]:
        quotas = self.standing.terms.quotas
        return tuple(quotas[int(number) - 1] for number in self.word.split(","))


class _Pages:
    """Requests as `lua/ledger_decide.lua` reads them, with the sheets that they are booked on."""

    def __init__(self) -> None:
        self.holds = Window(0, _FOR_EVER_S)
        self.count = 0
        self._keys: list[str] = []
        self._sheets: list[str | int] = []
        self._requests: list[str | int] = []
        self._numbers: dict[Sheet, int] = {}

    def write(self, operation: str, charge: Charge, sheet: Sheet, *, admitted_on: Sheet, requests: int = 1) -> None:
        credits_micro = "" if charge.credits_micro is None else charge.credits_micro
        numbers = self._number(sheet), self._number(admitted_on)
        self._requests += (operation, numbers[0], requests, credits_micro, charge.model, charge.outcome, numbers[1])
        self.count += 1

    def hold(self, window: Window) -> None:
        """The script must not run outside of `window` either."""
        self.holds = Window(max(self.holds.start_s, window.start_s), min(self.holds.end_s, window.end_s))

    def keys(self, names: LedgerKeys, flush: str | None) -> tuple[str, ...]:
        return (names.id, names.models, names.teams, names.flush(flush) if flush else names.id, *self._keys)

    def args(self, new_id: str) -> tuple[str | int, ...]:
        holds_us = (self.holds.start_s * _US, self.holds.end_s * _US)
        counts = (len(self._numbers), self.count)
        return (*holds_us, new_id, MAX_MODELS, FLUSH_REMEMBERED_S * 1000, *counts, *self._sheets, *self._requests)

    def _number(self, sheet: Sheet) -> int:
        """A sheet is written down when it is first needed, the organisation's before the team's."""
        if sheet not in self._numbers:
            org = self._number(sheet.org) if sheet.org else 0
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
        self._waiting: list[_Request] = []
        self._running: set[asyncio.Task[None]] = set()
        self._sheets: dict[str, tuple[Terms, Sheet]] = {}
        self._org_sheets: dict[tuple[Quota, ...], Sheet] = {}
        self._ahead_us = 0
        """By how much the store's clock is ahead of this machine's."""
        self._id: bytes | None = None

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

    async def decide(
        self, operation: str, terms: Terms, charge: Charge, *, admitted_on: Sheet | None = None
    ) -> Verdict:
        """The verdict on a request; `lua/ledger_decide.lua` describes the operations."""
        loop = asyncio.get_running_loop()
        request = _Request(operation, terms, charge, loop.create_future(), admitted_on)
        self._waiting.append(request)
        if len(self._waiting) == 1:
            loop.call_soon(self._send)
        return await request.verdict

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), MAX_BATCH):
            requests = waiting[start : start + MAX_BATCH]
            task = asyncio.get_running_loop().create_task(self._decide(requests))
            self._running.add(task)
            task.add_done_callback(partial(self._finish, requests))

    def _finish(self, requests: Sequence[_Request], task: asyncio.Task[None]) -> None:
        """Nobody waits for a verdict that a defect has lost."""
        self._running.discard(task)
        if any(not request.verdict.done() for request in requests):
            self._fail(requests, StoreUnanswered("the ledger's client failed"))

    async def _decide(self, requests: Sequence[_Request]) -> None:
        try:
            verdicts = await self._verdicts(requests) or await self._verdicts(requests)
        except StoreUnavailable as error:
            self._fail(requests, error)
            return
        if verdicts is None:
            self._fail(requests, StoreUnavailable("the store's clock passes from window to window"))
            return
        for request, verdict in zip(requests, verdicts, strict=True):
            if not request.verdict.done():  # else its request has gone
                request.verdict.set_result(verdict)

    async def _verdicts(self, requests: Sequence[_Request]) -> list[Verdict] | None:
        """None if the store's clock was not in the windows that this machine took for the current ones."""
        sheets = [self.sheet(request.terms) for request in requests]
        reply = await self._run(_pages(requests, sheets))
        if reply is None:
            return None
        now_us, _, _, _, *words = reply
        return [
            _read(word, request.terms, sheet, int(now_us))
            for request, sheet, word in zip(requests, sheets, words, strict=True)
        ]

    def _fail(self, requests: Sequence[_Request], error: StoreUnavailable) -> None:
        if isinstance(error, StoreUnanswered):
            self._metrics.unanswered_debits.inc(sum(request.operation in _DEBITS for request in requests))
        for request in requests:
            if not request.verdict.done():
                request.verdict.set_exception(error)

    async def _run(self, pages: _Pages, flush: str | None = None) -> list[Any] | None:
        """The script's reply; None if the store's clock was outside of the sheets. Raises `StoreUnavailable`."""
        keys, args = pages.keys(self._keys, flush), pages.args(secrets.token_hex(8))
        reply: list[Any] = await self._store.call(_DECIDE, *keys, args=args)
        self._ahead_us = int(reply[0]) - time_ns() // 1000
        if len(reply) == 1:
            return None
        if reply[1]:
            self._notice(reply[1], int(reply[2]), is_new=bool(reply[3]))
        return reply

    def _notice(self, found: bytes, created_ms: int, *, is_new: bool) -> None:
        """A ledger that begins, or is another than a moment ago, is never passed over in silence."""
        if found == self._id:
            return
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


def _parts(owed: Owed) -> Iterator[tuple[Charge, int]]:
    """What is owed, its requests with the first part of the credits."""
    charge, requests = owed.charge, owed.requests
    while charge.credits_micro is not None and charge.credits_micro > EXACT_MICRO:
        yield replace(charge, credits_micro=EXACT_MICRO), requests
        charge, requests = replace(charge, credits_micro=charge.credits_micro - EXACT_MICRO), 0
    yield charge, requests


def _pages(requests: Sequence[_Request], sheets: Sequence[Sheet]) -> _Pages:
    pages = _Pages()
    for request, sheet in zip(requests, sheets, strict=True):
        pages.write(request.operation, request.charge, sheet, admitted_on=request.admitted_on or sheet)
        pages.hold(sheet.holds)
    return pages


def _read(words: bytes, terms: Terms, sheet: Sheet, now_us: int) -> Verdict:
    word, lead_us, *used, model = words.split(b" ", 2 + len(terms.quotas))
    standing = Standing(terms, sheet.windows, now_us, int(lead_us), tuple(map(int, used)))
    return Verdict(word.decode(), standing, sheet, model.decode())
