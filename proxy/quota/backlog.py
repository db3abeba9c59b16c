"""Debits of a time without the ledger: summed up, bounded, and handed over in piles that have names.

A pile keeps its name and its rows until it is booked, so that booking it a second time can be recognised.
"""

import secrets
from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import islice

from proxy.quota.counters import MAX_ENTRY_MICRO, CounterSet
from proxy.quota.quotas import Charge


@dataclass(frozen=True, slots=True)
class BufferedDebit:
    """A sum of debits: so many requests, and their credits together."""

    counters: CounterSet
    charge: Charge
    requests: int

    def plus(self, charge: Charge, requests: int) -> "BufferedDebit":
        """With one more debit of its kind."""
        micro = self.charge.credits_micro
        total = replace(charge, credits_micro=None if micro is None else micro + (charge.credits_micro or 0))
        return BufferedDebit(self.counters, total, self.requests + requests)


@dataclass(frozen=True, slots=True)
class FlushBatch:
    name: str
    rows: tuple[BufferedDebit, ...]


class Backlog:
    """At most `max_rows` sums; a debit that would begin one more is not taken. A sum ends at `MAX_ENTRY_MICRO`."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._sums: dict[Hashable, BufferedDebit] = {}
        self._pile: FlushBatch | None = None

    def __bool__(self) -> bool:
        return bool(self._sums) or self._pile is not None

    @property
    def requests(self) -> int:
        """How many requests are owed for."""
        rows = [*self._sums.values(), *(self._pile.rows if self._pile else ())]
        return sum(owed.requests for owed in rows if owed.requests > 0)

    def has_room(self) -> bool:
        return len(self._sums) < self._max_rows

    def add(self, counters: CounterSet, charge: Charge, requests: int) -> bool:
        """Adds a debit to its sum; False if there is no room for it."""
        key = counters, charge.outcome, charge.model, charge.credits_micro is None
        known = self._sums.get(key)
        total = known.plus(charge, requests) if known else BufferedDebit(counters, charge, requests)
        is_too_much = (total.charge.credits_micro or 0) > MAX_ENTRY_MICRO
        if (known is None or is_too_much) and not self.has_room():
            return False
        if known is not None and is_too_much:
            self._sums[object()] = known  # under a key that no debit has: nothing is added to it any more
            total = BufferedDebit(counters, charge, requests)
        self._sums[key] = total
        return True

    def batch(self, max_rows: int) -> FlushBatch | None:
        """What is to be booked next, the same until it is dropped; None if nothing is owed."""
        if self._pile is None and self._sums:
            keys = list(islice(self._sums, max_rows))
            self._pile = FlushBatch(secrets.token_hex(16), tuple(self._sums.pop(key) for key in keys))
        return self._pile

    def drop(self, batch: FlushBatch) -> None:
        """It is booked."""
        if self._pile is batch:
            self._pile = None
