"""The interface of `lua/ledger_decide.lua`: its operations, its arguments and its reply.

Only this module and the script know the order of keys, arguments and replies; the script's header documents it.

All sums of one call are exact. Lua's numbers are doubles, exact up to 2**53, and a call has at most `MAX_BATCH_ENTRIES`
entries of at most `MAX_ENTRY_MICRO`: 9 * 10**15 micro-credits together, which is below 2**53.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from proxy.quota.counters import CounterSet, LedgerKeys
from proxy.quota.model_names import MAX_MODELS
from proxy.quota.quotas import Charge, Quota
from proxy.quota.windows import Window

MAX_BATCH_ENTRIES = 200
"""In one call, which then takes some milliseconds of the store's time."""

MAX_ENTRY_MICRO = 45 * 10**12
"""Micro-credits of one entry: 45 estimates of the highest price (`proxy.upstream.replies.MAX_ESTIMATE`)."""

FLUSH_MARKER_TTL_S = 86_400
"""How long the ledger remembers a flush, so that a repetition books nothing."""

Operation = Literal[
    "charge", "admit", "settle", "refund", "peek", "record_uncached", "over_ceiling", "use_rate", "release", "apply"
]

_US = 1_000_000
_MAX_TIME_S = 2**53 // _US
_RATE_LIMITED = b"rate"


class Verdict(NamedTuple):
    """The script's decision about the requests of one entry: it admits the first `admitted` and refuses the rest.

    result: `ok`, `rate` or the numbers of the exceeded quotas.
    model: the name under which credits were counted.
    state: the team's TAT (µs) and the use of each quota at the time of the decision; None if that does not matter.
    """

    result: bytes
    admitted: int
    model: bytes
    state: Sequence[int] | None = None

    @property
    def is_rate_limited(self) -> bool:
        return self.result == _RATE_LIMITED

    def violated(self, quotas: Sequence[Quota]) -> tuple[Quota, ...]:
        """Those of the team's `quotas` that are exceeded, if the refusal is not by the rate."""
        return tuple(quotas[int(number) - 1] for number in self.result.split(b","))


class LedgerReply(NamedTuple):
    """What a call returned: only the time if it wrote nothing.

    ledger_id: None if nothing was written.
    states: for each counter set the team's TAT in µs and the use of each quota, after all entries.
    in_windows: False if nothing was written because the store's clock is outside of the windows.
    """

    now_us: int
    ledger_id: bytes | None = None
    created_ms: int = 0
    is_new: bool = False
    verdicts: Sequence[Verdict] = ()
    states: Sequence[Sequence[int]] = ()
    in_windows: bool = True


class ScriptArgs:
    """The keys and arguments of one call, collected entry by entry. `flush`: the name of the flush, if it is one."""

    def __init__(self, keys: LedgerKeys, flush: str | None = None) -> None:
        self._valid = Window(0, _MAX_TIME_S)
        marker = keys.id if flush is None else keys.flush(flush)
        self.keys = [keys.id, keys.models, keys.teams, marker, keys.model_uses]
        self._counter_sets: list[str | int] = []
        self._entries: list[str | int] = []
        self._numbers: dict[CounterSet, int] = {}
        self._entry_count = 0

    def args(self, new_id: str) -> tuple[str | int, ...]:
        """`new_id`: the id of the ledger if this call creates it."""
        valid_us = (self._valid.start_s * _US, self._valid.end_s * _US)
        counts = (len(self._numbers), self._entry_count)
        limits = (MAX_MODELS, FLUSH_MARKER_TTL_S * 1000)
        return (*valid_us, new_id, *limits, *counts, *self._counter_sets, *self._entries)

    def add(
        self,
        operation: Operation,
        charge: Charge,
        counters: CounterSet,
        *,
        requests: int = 1,
        admitted_on: CounterSet | None = None,
    ) -> None:
        """Adds requests of now or, with the operation `apply`, of any time.

        admitted_on: the counters on which the request is booked, if it was admitted before.
        """
        if operation != "apply":
            start_s, end_s = counters.valid.start_s, counters.valid.end_s
            self._valid = Window(max(self._valid.start_s, start_s), min(self._valid.end_s, end_s))
        credits_micro = "" if charge.credits_micro is None else charge.credits_micro
        upstream_us = "" if charge.upstream_us is None else charge.upstream_us
        number, admitted_number = self._number_of(counters), self._number_of(admitted_on or counters)
        self._entries += (operation, number, requests, credits_micro, charge.model, charge.outcome)
        self._entries += (admitted_number, upstream_us)
        self._entry_count += 1

    def state_of(self, counters: CounterSet, reply: LedgerReply) -> Sequence[int]:
        """The row of the reply's `states` for these counters."""
        return reply.states[self._numbers[counters] - 1]

    def _number_of(self, counters: CounterSet) -> int:
        """The number of a counter set, which is added on first use, the organisation's before the team's."""
        if counters not in self._numbers:
            org_number = self._number_of(counters.org) if counters.org else 0
            if team := counters.team:
                rate = team.rate
                self.keys += (team.usage.key, team.rate_key)
                self._counter_sets += (org_number, team.usage.expires_ms, team.id)
                self._counter_sets += (rate.interval_us, rate.burst_tolerance_us)
            else:
                self.keys.append(counters.upstream.key)
                self._counter_sets += (org_number, counters.upstream.expires_ms, "", 0, 0)
            self.keys += counters.expires_ms
            self._counter_sets += (len(counters.expires_ms), *counters.expires_ms.values(), len(counters.quotas))
            for quota in counters.quotas:
                self._counter_sets += (quota.counter, quota.field, quota.limit, quota.refuse)
            self._numbers[counters] = len(self._numbers) + 1
        return self._numbers[counters]


def read_reply(reply: Sequence[Any]) -> LedgerReply:
    match reply:
        case [now_us]:
            return LedgerReply(now_us, in_windows=False)
        case [now_us, _]:
            return LedgerReply(now_us)
    now_us, ledger_id, created_ms, is_new, rows, states = reply
    return LedgerReply(now_us, ledger_id, int(created_ms), bool(is_new), [Verdict(*row) for row in rows], states)
