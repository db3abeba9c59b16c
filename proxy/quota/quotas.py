"""Rates and quotas: what a team may ask for, how it stands, and how that is told.

A *rate* is a generic cell rate algorithm (GCRA) on whole microseconds: each request moves the team's theoretical
arrival time one interval on, which may lie `burst` intervals ahead of the clock. A *quota* limits a measure, of a team
or of the whole organisation, in a calendar window. The ledger decides; see `proxy/quota/lua/ledger_decide.lua`.

Header fields are those of draft-ietf-httpapi-ratelimit-headers-11.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Literal
from zoneinfo import ZoneInfo

import orjson

from proxy.problems import NO_NAME, Code, Outcome, Problem
from proxy.quota.credits import MICRO, text_of
from proxy.quota.windows import Period, Window, rfc3339

Scope = Literal["team", "org"]
Measure = Literal["requests", "estimated_credits"]

_US = 1_000_000


@dataclass(frozen=True)
class Rate:
    """`per_s` requests a second, after a pause `burst` at once."""

    per_s: float
    burst: int

    @cached_property
    def interval_us(self) -> int:
        """Between two requests, rounded down: nobody gets less than was said."""
        return int(1_000_000 / self.per_s)

    @cached_property
    def burst_tolerance_us(self) -> int:
        """How far ahead of the clock the theoretical arrival time may lie."""
        return self.interval_us * self.burst


@dataclass(frozen=True)
class Quota:
    """`limit` is in requests or in micro-credits; one that does not `refuse` only warns."""

    scope: Scope
    measure: Measure
    per: Period
    limit: int
    refuse: bool

    @cached_property
    def policy(self) -> str:
        """Its name in header fields."""
        kind = "requests" if self.measure == "requests" else "credits"
        return f"{'org-' * (self.scope == 'org')}{kind}-{self.per}"

    def owner(self, team: str) -> str:
        """Whose quota it is: `team`, or `NO_NAME` for the organisation."""
        return team if self.scope == "team" else NO_NAME

    def told(self, amount: int) -> int:
        """An amount in whole units of the header fields, rounded down."""
        return amount if self.measure == "requests" else amount // MICRO

    def text(self, amount: int) -> str:
        """An amount as a decimal number, exactly."""
        return str(amount) if self.measure == "requests" else text_of(amount)

    def number(self, amount: int) -> orjson.Fragment:
        """An amount as a JSON number, exactly."""
        return orjson.Fragment(self.text(amount))


@dataclass(frozen=True)
class TeamLimits:
    """What holds for a team: its rate, its own quotas, and then the organisation's."""

    team: str
    rate: Rate
    quotas: tuple[Quota, ...]

    @cached_property
    def org_quotas(self) -> tuple[Quota, ...]:
        return tuple(quota for quota in self.quotas if quota.scope == "org")

    @cached_property
    def warns(self) -> bool:
        """Whether some quota only warns."""
        return not all(quota.refuse for quota in self.quotas)


@dataclass(slots=True)
class Charge:
    """What a request has come to. `credits_micro` is None where nothing was priced."""

    outcome: Outcome
    credits_micro: int | None = None
    model: str = NO_NAME


@dataclass(slots=True, eq=False)
class QuotaState:
    """How a team stands after the ledger has decided, at `now_us` of the store's clock.

    lead_us: how far the theoretical arrival time lies ahead.
    used: of each quota, in the order of the terms.
    policy_field: as `policies_of` has it, from whom keeps it for many standings.
    """

    terms: TeamLimits
    windows: Mapping[Period, Window]
    now_us: int
    tat_offset_us: int
    used: Sequence[int]
    policy_field: bytes = b""
    _lines: tuple[bytes, ...] = ()

    @property
    def lines(self) -> tuple[bytes, ...]:
        """As header fields: many requests may be told of one standing."""
        if not self._lines:
            policies = self.policy_field or policies_of(self.terms, self.windows)
            self._lines = b"ratelimit-policy: " + policies, b"ratelimit: " + self.limits().encode()
        return self._lines

    def limits(self) -> str:
        """`RateLimit`: a list of what is left (§4)."""
        items = [f'"rate";r={self.rate_remaining()};t={-(-self.tat_offset_us // _US)}']
        for quota, used in zip(self.terms.quotas, self.used, strict=True):
            left = quota.told(quota.limit - used) if used < quota.limit else 0
            items.append(f'"{quota.policy}";r={left};t={self.seconds_left(quota)}')
        return ", ".join(items)

    def warnings(self) -> tuple[Quota, ...]:
        """The quotas that only warn, and are passed."""
        if not self.terms.warns:
            return ()
        pairs = zip(self.terms.quotas, self.used, strict=True)
        return tuple(quota for quota, used in pairs if used > quota.limit and not quota.refuse)

    def rate_remaining(self) -> int:
        rate = self.terms.rate
        return max(0, (rate.burst_tolerance_us - self.tat_offset_us) // rate.interval_us)

    def seconds_left(self, quota: Quota) -> int:
        """Until the quota's window ends."""
        return max(0, -((self.now_us - self.windows[quota.per].end_s * _US) // _US))

    def rate_limited(self) -> Problem:
        rate = self.terms.rate
        wait_us = self.tat_offset_us + rate.interval_us - rate.burst_tolerance_us
        return Problem(
            Code.RATE_LIMITED,
            f"The team may ask {rate.per_s:.10g} times a second, with bursts of {rate.burst}: slow down.",
            retry_after_s=max(1, ceil(wait_us / 1_000_000)),
        )

    def quota_exceeded(self, violated: Sequence[Quota], requested_micro: int | None, zone: ZoneInfo) -> Problem:
        """The denial by quotas: the first is explained, all are named. `requested_micro` is None if nobody knows."""
        quota = violated[0]
        counts_requests = quota.measure == "requests"
        used = self.used[self.terms.quotas.index(quota)]
        requested = 1 if counts_requests else requested_micro
        resets_at = rfc3339(self.windows[quota.per].end_s, zone)
        members = {
            "quota": {
                "scope": quota.scope,
                "measure": quota.measure,
                "per": quota.per,
                "limit": quota.number(quota.limit),
                "used": quota.number(used),
                "requested": None if requested is None else quota.number(requested),
                "resets_at": resets_at,
            },
            "violated-policies": [quota.policy for quota in violated],
        }
        return Problem(
            Code.QUOTA_EXCEEDED,
            self._explained(quota, used, requested, resets_at),
            retry_after_s=self.seconds_left(quota) if counts_requests else None,
            members=members,
            other_status=429 if counts_requests else None,
        )

    def _explained(self, quota: Quota, used: int, requested: int | None, resets_at: str) -> str:
        """What is left of a quota, and until when. No price: `explain` shows this to a team that may not have it."""
        what = "requests" if quota.measure == "requests" else "estimated credits"
        whose = "the team's" if quota.scope == "team" else "the organisation's"
        left = f"{quota.text(max(0, quota.limit - used))} of {whose} {quota.text(quota.limit)} {what} a {quota.per}"
        if quota.limit == 0:
            return f"Nothing passes: {left} are left, and never will be more. Ask the gateway's operator."
        if used >= quota.limit or requested is None:
            return f"{left} are left until {resets_at}."
        if requested > quota.limit:
            return f"This estimate needs more than the whole quota, however long you wait: {left} are left."
        return f"This estimate needs more than is left: {left}, until {resets_at}."


def policies_of(terms: TeamLimits, windows: Mapping[Period, Window]) -> bytes:
    """`RateLimit-Policy`: a list of quota policies (§3)."""
    rate = terms.rate
    items = [f'"rate";q={rate.burst};w={ceil(rate.burst / rate.per_s)}']
    for quota in terms.quotas:
        window = windows[quota.per]
        unit = "" if quota.measure == "requests" else ';qu="credits"'
        items.append(f'"{quota.policy}";q={quota.told(quota.limit)}{unit};w={window.end_s - window.start_s}')
    return ", ".join(items).encode()
