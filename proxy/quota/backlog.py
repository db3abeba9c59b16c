"""Buffers debits of requests that were admitted while the ledger was unavailable.

* Debits with the same counters, outcome and model are added up. The number of such sums is limited, so memory is too.
* The ledger books them in batches. A batch keeps its name and its rows until it is dropped, so a repeated flush is
  recognised and books nothing: flushing is idempotent.
"""

import secrets
from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import islice

from proxy.quota.counters import CounterSet
from proxy.quota.ledger_script import MAX_ENTRY_MICRO
from proxy.quota.quotas import Charge


@dataclass(frozen=True, slots=True)
class BufferedDebit:
    """A sum of debits: so many requests and all their credits. A negative `requests` undoes earlier admissions."""

    counters: CounterSet
    charge: Charge
    requests: int

    def plus(self, charge: Charge, requests: int) -> "BufferedDebit":
        """The sum with one more debit of the same kind."""
        micro, upstream_us = self.charge.credits_micro, self.charge.upstream_us
        total = replace(
            charge,
            credits_micro=None if micro is None else micro + (charge.credits_micro or 0),
            upstream_us=None if upstream_us is None else upstream_us + (charge.upstream_us or 0),
        )
        return BufferedDebit(self.counters, total, self.requests + requests)


@dataclass(frozen=True, slots=True)
class FlushBatch:
    name: str
    rows: tuple[BufferedDebit, ...]


class Backlog:
    """At most `max_rows` sums, each of at most `MAX_ENTRY_MICRO`. Refuses a debit that would start one sum too many."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._sums: dict[Hashable, BufferedDebit] = {}
        self._batch: FlushBatch | None = None

    def __bool__(self) -> bool:
        return bool(self._sums) or self._batch is not None

    @property
    def requests(self) -> int:
        """The number of requests whose debits are buffered."""
        rows = [*self._sums.values(), *(self._batch.rows if self._batch else ())]
        return sum(debit.requests for debit in rows if debit.requests > 0)

    def has_capacity(self) -> bool:
        """Whether a new sum can start. The rows of a batch count until it is booked."""
        in_batch = len(self._batch.rows) if self._batch else 0
        return len(self._sums) + in_batch < self._max_rows

    def add(self, counters: CounterSet, charge: Charge, requests: int) -> bool:
        """Returns False, and buffers nothing, if that would start one sum too many."""
        kind = counters, charge.outcome, charge.model, charge.credits_micro is None, charge.upstream_us is None
        known = self._sums.get(kind)
        total = known.plus(charge, requests) if known else BufferedDebit(counters, charge, requests)
        is_over_limit = (total.charge.credits_micro or 0) > MAX_ENTRY_MICRO
        if (known is None or is_over_limit) and not self.has_capacity():
            return False
        if known is not None and is_over_limit:
            self._sums[object()] = known  # the key is unique, so this sum is complete
            total = BufferedDebit(counters, charge, requests)
        self._sums[kind] = total
        return True

    def batch(self, max_rows: int) -> FlushBatch | None:
        """The batch to book next, the same one until it is dropped; None if nothing is buffered."""
        if self._batch is None and self._sums:
            kinds = list(islice(self._sums, max_rows))
            self._batch = FlushBatch(secrets.token_hex(16), tuple(self._sums.pop(kind) for kind in kinds))
        return self._batch

    def drop(self, batch: FlushBatch) -> None:
        """Forgets a batch that was booked."""
        if self._batch is batch:
            self._batch = None
