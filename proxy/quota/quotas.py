"""Rates and quotas: what a team may ask for, its state, and the header fields and problems that show it.

* A *rate* is limited by the generic cell rate algorithm (GCRA), in whole microseconds: each request moves the team's
  theoretical arrival time (TAT) on by one interval. It may be ahead of the clock by the burst tolerance, which is
  `burst` intervals.
* A *quota* limits a measure in a calendar window, for a team or for the whole organisation.
* The decisions are made in the store, by `lua/ledger_decide.lua`.
* Header fields follow draft-ietf-httpapi-ratelimit-headers-11.
"""

from collections.abc import Iterator, Mapping, Sequence
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

UNITS: Mapping[Measure, int] = {"requests": 1, "estimated_credits": MICRO}
"""How many of the ledger's integers are one of a measure."""

_US = 1_000_000


@dataclass(frozen=True)
class Rate:
    """`per_s` requests a second on average, at most `burst` at once."""

    per_s: float
    burst: int

    @cached_property
    def interval_us(self) -> int:
        """The time between two requests, rounded down, so that no team gets less than its rate."""
        return int(_US / self.per_s)

    @cached_property
    def burst_tolerance_us(self) -> int:
        """How far ahead of the clock the TAT may be."""
        return self.interval_us * self.burst


@dataclass(frozen=True)
class Quota:
    """`limit` is in requests or micro-credits. A quota that does not `refuse` only warns."""

    scope: Scope
    measure: Measure
    per: Period
    limit: int
    refuse: bool

    @cached_property
    def policy(self) -> str:
        """The quota's name in header fields."""
        kind = "requests" if self.measure == "requests" else "credits"
        return f"{'org-' * (self.scope == 'org')}{kind}-{self.per}"

    @cached_property
    def unit(self) -> int:
        return UNITS[self.measure]

    def owner(self, team: str) -> str:
        """`team` for a quota of a team, `NO_NAME` for one of the organisation."""
        return team if self.scope == "team" else NO_NAME

    def header_amount(self, amount: int) -> int:
        """An amount in requests or whole credits, rounded down, as header fields show it."""
        return amount // self.unit

    def text(self, amount: int) -> str:
        """An amount in requests or credits as an exact decimal number."""
        return text_of(amount * (MICRO // self.unit))

    def number(self, amount: int) -> orjson.Fragment:
        """An amount in requests or credits as an exact JSON number."""
        return orjson.Fragment(self.text(amount))


@dataclass(frozen=True)
class TeamLimits:
    """The limits of a team: its rate, and first its own quotas, then the organisation's."""

    team: str
    rate: Rate
    quotas: tuple[Quota, ...]

    @cached_property
    def org_quotas(self) -> tuple[Quota, ...]:
        return tuple(quota for quota in self.quotas if quota.scope == "org")

    @cached_property
    def warns(self) -> bool:
        """Whether a quota only warns."""
        return not all(quota.refuse for quota in self.quotas)


@dataclass(slots=True)
class Charge:
    """The result of a request to be booked.

    credits_micro: None where nothing was priced.
    upstream_us: how long upstream took to answer it, if that counts towards the mean of the day.
    """

    outcome: Outcome
    credits_micro: int | None = None
    model: str = NO_NAME
    upstream_us: int | None = None

    @property
    def booked(self) -> "Charge":
        """The part that is booked: the credits of an estimate over its ceiling only decide whether a quota refuses."""
        return Charge(self.outcome) if self.outcome is Outcome.OVER_CEILING else self


@dataclass(slots=True, eq=False)
class QuotaState:
    """A team's state at `now_us` of the store's clock.

    tat_us: the TAT as it is stored, 0 if there is none.
    used: the use of each quota in requests or micro-credits, in the order of `limits.quotas`.
    policy_field: the value of `RateLimit-Policy`, if the caller keeps it; it is the same for many states.
    """

    limits: TeamLimits
    windows: Mapping[Period, Window]
    now_us: int
    tat_us: int
    used: Sequence[int]
    policy_field: bytes = b""
    _header_lines: tuple[bytes, ...] = ()

    @property
    def tat_offset_us(self) -> int:
        """How far the TAT is ahead of the clock.

        Bounded as in `lua/ledger_decide.lua`: after a change of the rate, or of the clock, a team waits at most one
        interval.
        """
        return min(max(self.tat_us - self.now_us, 0), self.limits.rate.burst_tolerance_us)

    @property
    def header_lines(self) -> tuple[bytes, ...]:
        """The lines of `RateLimit-Policy` and `RateLimit`. Cached: requests of one batch share their state."""
        if not self._header_lines:
            policies = self.policy_field or policy_field(self.limits, self.windows)
            self._header_lines = b"ratelimit-policy: " + policies, b"ratelimit: " + self.limit_field().encode()
        return self._header_lines

    def limit_field(self) -> str:
        """The value of `RateLimit`: a list of what is left (§4)."""
        items = [f'"rate";r={self.rate_remaining()};t={-(-self.tat_offset_us // _US)}']
        for quota, used in self.uses():
            left = quota.header_amount(quota.limit - used) if used < quota.limit else 0
            items.append(f'"{quota.policy}";r={left};t={self.seconds_left(quota)}')
        return ", ".join(items)

    def uses(self) -> Iterator[tuple[Quota, int]]:
        """Each quota with its use."""
        return zip(self.limits.quotas, self.used, strict=True)

    def warnings(self) -> tuple[Quota, ...]:
        """The quotas that only warn and are exceeded."""
        if not self.limits.warns:
            return ()
        return tuple(quota for quota, used in self.uses() if used > quota.limit and not quota.refuse)

    def refusing(self, credits_micro: int) -> tuple[Quota, ...]:
        """The quotas that would refuse an estimate of this price now; `violated` in `lua/ledger_decide.lua` decides."""
        return tuple(
            quota
            for quota, used in self.uses()
            if quota.refuse and used + (1 if quota.measure == "requests" else max(1, credits_micro)) > quota.limit
        )

    def rate_remaining(self) -> int:
        """How many requests the rate admits at once."""
        rate = self.limits.rate
        return max(0, (rate.burst_tolerance_us - self.tat_offset_us) // rate.interval_us)

    def seconds_left(self, quota: Quota) -> int:
        """Seconds until the quota's window ends."""
        return max(0, -((self.now_us - self.windows[quota.per].end_s * _US) // _US))

    def rate_limited(self) -> Problem:
        """The refusal by the rate."""
        rate = self.limits.rate
        requests = "request" if rate.per_s == 1 else "requests"
        wait_us = self.tat_offset_us + rate.interval_us - rate.burst_tolerance_us
        return Problem(
            Code.RATE_LIMITED,
            f"The team may send {rate.per_s:.10g} {requests} per second, and at most {rate.burst} at once: send "
            "requests more slowly.",
            retry_after_s=max(1, ceil(wait_us / _US)),
        )

    def quota_exceeded(
        self, violated: Sequence[Quota], requested_micro: int | None, zone: ZoneInfo, *, shows_price: bool = True
    ) -> Problem:
        """The refusal by quotas: explains the first and names all.

        requested_micro: None if the price is unknown.
        shows_price: whether text and members have the price.
        """
        quota = violated[0]
        counts_requests = quota.measure == "requests"
        used = self.used[self.limits.quotas.index(quota)]
        requested = 1 if counts_requests else requested_micro
        hides_price = not (shows_price or counts_requests)
        resets_at = rfc3339(self.windows[quota.per].end_s, zone)
        members = {
            "quota": {
                "scope": quota.scope,
                "measure": quota.measure,
                "per": quota.per,
                "limit": quota.number(quota.limit),
                "used": quota.number(used),
                "requested": None if requested is None or hides_price else quota.number(requested),
                "resets_at": resets_at,
            },
            "violated-policies": [quota.policy for quota in violated],
        }
        return Problem(
            Code.QUOTA_EXCEEDED,
            self._detail(quota, used, requested, resets_at, shows_price=shows_price),
            retry_after_s=self.seconds_left(quota) if counts_requests else None,
            members=members,
            other_status=429 if counts_requests else None,
        )

    def _detail(self, quota: Quota, used: int, requested: int | None, resets_at: str, *, shows_price: bool) -> str:
        """What is left of a quota and until when, and what the request needs."""
        what = "requests" if quota.measure == "requests" else "estimated credits"
        whose = "the team's" if quota.scope == "team" else "the organisation's"
        if quota.limit == 0:
            quota_name = f"{whose} quota of {what} per {quota.per}"
            return f"{quota_name.capitalize()} is 0, so every request is refused. Ask the gateway's operator."
        limit = quota.text(quota.limit)
        left = (
            f"{quota.text(max(0, quota.limit - used))} of {whose} {limit} {what[:-1] if limit == '1' else what} per "
            f"{quota.per} are left until {resets_at}"
        )
        if quota.measure == "requests" or requested is None:
            return f"{left}."
        needed = quota.text(requested) if shows_price else "more"
        if requested > quota.limit:
            needed = f"{needed}, more than the whole quota" if shows_price else "more than the whole quota"
        return f"{left}, and this estimate needs {needed}."


def policy_field(limits: TeamLimits, windows: Mapping[Period, Window]) -> bytes:
    """The value of `RateLimit-Policy`: a list of quota policies (§3)."""
    rate = limits.rate
    items = [f'"rate";q={rate.burst};w={ceil(rate.burst / rate.per_s)}']
    for quota in limits.quotas:
        window = windows[quota.per]
        unit = "" if quota.measure == "requests" else ';qu="credits"'
        items.append(f'"{quota.policy}";q={quota.header_amount(quota.limit)}{unit};w={window.end_s - window.start_s}')
    return ", ".join(items).encode()
