"""Random operations on a ledger, and the comparison of its answers and counters with `ledger_model`."""

from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime
from itertools import product
from typing import Any, NamedTuple

from hypothesis import strategies as st

from ledger_harness import Answer
from ledger_model import LASTING, MILLION, PERS, ZONE, Admission, Cost, Entry, TeamPolicy, Verdict, window_of
from proxy.problems import Outcome
from proxy.quota.ledger import Admitted, Denied
from proxy.quota.quotas import Charge, Quota, QuotaState, Rate, TeamLimits

TEAMS = ("design", "marketing", "film")
MODELS = ("Flux", "Flux dev.1", "style", "mixed", "other", "-")

HUGE = 10**12
"""Micro-credits of the highest estimate that has a price."""

MAX_LIMIT = 9 * 10**15
"""Micro-credits of the highest quota."""


class Expected(NamedTuple):
    """A call, the model's verdict on it, if there is one, and the function that compares the answer with it.

    deal: the team whose state the answer reports.
    """

    call: Coroutine[Any, Any, Answer]
    verdict: Verdict | None
    check: Callable[[Verdict | None, Answer], None]
    policy: TeamPolicy | None = None


def limits_of(policy: TeamPolicy) -> TeamLimits:
    quotas = tuple(Quota(one.scope, one.measure, one.per, one.max_amount, one.refuses) for one in policy.limits)  # type: ignore[arg-type]  # they are spelled alike
    team_limits = TeamLimits(policy.team, Rate(MILLION / policy.interval_us, policy.burst), quotas)
    assert team_limits.rate.interval_us == policy.interval_us
    return team_limits


def charge_of(cost: Cost) -> Charge:
    return Charge(Outcome(cost.outcome), cost.micro, cost.model)


def state_of(quota_state: QuotaState) -> Verdict:
    """Converts a team's state to the model's form."""
    return Verdict(
        "ok",
        quota_state.now_us,
        quota_state.tat_offset_us,
        quota_state.rate_remaining(),
        tuple(quota_state.used),
        tuple(quota_state.windows[quota.per].end_s for quota in quota_state.limits.quotas),
    )


def verdict_of(answer: Answer) -> Verdict:
    """Converts a verdict to the model's form."""
    assert isinstance(answer, Admitted | Denied)
    assert answer.quota_state is not None
    shown = state_of(answer.quota_state)
    if isinstance(answer, Admitted):
        return replace(shown, model=answer.model)
    problem = answer.problem
    violated = tuple(problem.members.get("violated-policies", ()))
    code, retry_after_s = problem.outcome.value, problem.retry_after_s
    return replace(shown, code=code, violated=violated, status=problem.status, retry_after_s=retry_after_s)


def verdicts_match(verdict: Verdict, expected: Verdict) -> bool:
    """Compares verdicts. Above 2**53, which is above any limit, `used` may be rounded: Lua's numbers are doubles."""
    pairs = zip(verdict.used, expected.used, strict=True)
    used = (right if right > 2**53 and abs(actual - right) <= right >> 50 else actual for actual, right in pairs)
    return replace(verdict, used=tuple(used)) == expected


class Draft(NamedTuple):
    """A limit: absolute, or relative to the amount that is used when it takes effect."""

    measure: str
    per: str
    refuses: bool
    max_amount: int
    is_relative: bool


class Operation(NamedTuple):
    """One operation; `pick` selects the admitted request that is settled or refunded."""

    kind: str
    team: str
    cost: Cost
    pick: int


def _drafts(measure: str, fixed: Sequence[int], relative: Sequence[int]) -> st.SearchStrategy[Draft]:
    parts = st.just(measure), st.sampled_from(PERS), st.sampled_from([True, True, True, False])
    return st.one_of(
        *[st.builds(Draft, *parts, st.sampled_from(relative), st.just(value=True))] * 3,
        st.builds(Draft, *parts, st.sampled_from(fixed), st.just(value=False)),
    )


DRAFT = st.one_of(
    _drafts("requests", (0, 1, 3, 20, 10**12), (-1, 1, 2, 3, 4, 6, 8, 12)),
    _drafts(
        "estimated_credits",
        (0, 1, 50 * MILLION, MAX_LIMIT),
        (-1, 1, MILLION, 9 * MILLION, 20 * MILLION, HUGE, 3 * HUGE),
    ),
)
DRAFTS = st.lists(DRAFT, max_size=4, unique_by=lambda draft: (draft.measure, draft.per))
ANY_TEAM = st.sampled_from(TEAMS)
_AMOUNTS = st.sampled_from([0, 1, 2, 999_999, MILLION, HUGE - 1, HUGE]) | st.integers(0, 5 * MILLION)
_PRICED = st.builds(Cost, st.sampled_from(["hit", "miss"]), _AMOUNTS, st.sampled_from(MODELS))
_FAILED = st.builds(Cost, st.sampled_from(["upstream-error", "unpriced", "cancelled"]), st.none(), st.just("Flux"))
_OVER = st.builds(Cost, st.just("over-ceiling"), _AMOUNTS, st.sampled_from(MODELS))
COSTS = st.one_of(_PRICED, _PRICED, _PRICED, _FAILED, _OVER)
MANY_COSTS = st.lists(COSTS, min_size=4, max_size=8)
_KINDS = (
    "charge",
    "charge",
    "admit",
    "admit",
    "settle",
    "settle",
    "settle",
    "refund",
    "refund",
    "record_uncached",
    "use_rate",
    "release",
    "peek",
)
PICKS = st.integers(0, 99)
OPERATIONS = st.lists(
    st.one_of(
        *[st.builds(Operation, st.sampled_from(_KINDS), ANY_TEAM, _PRICED, PICKS)] * 5,
        st.builds(Operation, st.just("settle"), ANY_TEAM, _FAILED, PICKS),
        st.builds(Operation, st.sampled_from(["settle", "refund", "over_ceiling"]), ANY_TEAM, _OVER, PICKS),
    ),
    min_size=1,
    max_size=8,
)


def with_state_of(last: Verdict | None, verdict: Verdict | None) -> Verdict:
    assert last is not None
    assert verdict is not None
    return replace(verdict, tat_offset_us=last.tat_offset_us, rate_left=last.rate_left, used=last.used)


def check(verdict: Verdict | None, answer: Answer) -> None:
    assert verdict is not None
    assert verdicts_match(verdict_of(answer), verdict), f"{verdict_of(answer)} is not {verdict}"


def check_nothing(_: Verdict | None, answer: Answer) -> None:
    assert answer is None


def check_unbooked(_: Verdict | None, answer: Answer) -> None:
    assert isinstance(answer, Denied)
    assert answer.quota_state is None


def entry_of(admission: Admission) -> Entry:
    assert admission.entry is not None
    return admission.entry


def lasting(counters: Mapping[tuple[str, str, int], Mapping[str, int]]) -> dict[tuple[str, str, int], Counter[str]]:
    """Returns the counters of days, weeks and months."""
    return {of: Counter(amounts) for of, amounts in counters.items() if of[1] in LASTING}


def counters_of(usage: Mapping[tuple[date, str], Mapping[str, int]]) -> dict[tuple[str, str, int], Counter[str]]:
    """Computes these counters from the rows of usage."""
    sums: dict[tuple[str, str, int], Counter[str]] = {}
    for (day, team), row in usage.items():
        noon_s = int(datetime(day.year, day.month, day.day, 12, tzinfo=ZONE).timestamp())
        for owner, per in product(("", team), LASTING):
            counter = sums.setdefault((owner, per, window_of(per, noon_s)[0]), Counter())
            for name, amount in row.items():
                *_, measure = name.split(":")
                counter[measure] += amount if measure != "refused" else 0
    return {of: +counter for of, counter in sums.items() if +counter}
