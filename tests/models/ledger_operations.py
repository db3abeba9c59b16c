"""What is asked of a ledger by chance, and how its answers and its counters compare with what `ledger_model` says."""

from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime
from itertools import product
from typing import Any, NamedTuple

from hypothesis import strategies as st

from ledger_harness import Answer
from ledger_model import LASTING, MILLION, PERS, ZONE, Bill, Deal, Entry, Said, Ticket, span
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
    """What is to be asked, what the model has said to it, if anything, and how an answer is compared with that.

    deal: whose standing it is to tell.
    """

    asked: Coroutine[Any, Any, Answer]
    said: Said | None
    check: Callable[[Said | None, Answer], None]
    deal: Deal | None = None


def limits_of(deal: Deal) -> TeamLimits:
    quotas = tuple(Quota(one.scope, one.measure, one.per, one.most, one.refuses) for one in deal.limits)  # type: ignore[arg-type]  # they are spelled alike
    terms = TeamLimits(deal.team, Rate(MILLION / deal.interval_us, deal.burst), quotas)
    assert terms.rate.interval_us == deal.interval_us
    return terms


def charge_of(bill: Bill) -> Charge:
    return Charge(Outcome(bill.outcome), bill.micro, bill.model)


def shown_by(quota_state: QuotaState) -> Said:
    """How a team stands, as the model would put it."""
    return Said(
        "ok",
        quota_state.now_us,
        quota_state.tat_offset_us,
        quota_state.rate_remaining(),
        tuple(quota_state.used),
        tuple(quota_state.windows[quota.per].end_s for quota in quota_state.limits.quotas),
    )


def said_by(answer: Answer) -> Said:
    """A verdict, as the model would put it."""
    assert isinstance(answer, Admitted | Denied)
    assert answer.quota_state is not None
    shown = shown_by(answer.quota_state)
    if isinstance(answer, Admitted):
        return replace(shown, model=answer.model)
    problem = answer.problem
    violated = tuple(problem.members.get("violated-policies", ()))
    word, retry_after_s = problem.outcome.value, problem.retry_after_s
    return replace(shown, word=word, violated=violated, status=problem.status, retry_after_s=retry_after_s)


def agree(said: Said, expected: Said) -> bool:
    """Where more is used than a number of Lua can hold exactly, which is over any limit, a verdict may say it so."""
    pairs = zip(said.used, expected.used, strict=True)
    used = (right if right > 2**53 and abs(told - right) <= right >> 50 else told for told, right in pairs)
    return replace(said, used=tuple(used)) == expected


class Draft(NamedTuple):
    """A limit, or how far it lies from what is used when it comes into force."""

    measure: str
    per: str
    refuses: bool
    most: int
    is_relative: bool


class Act(NamedTuple):
    """What somebody wants; `pick` is which of those that have been admitted is settled, or refunded."""

    kind: str
    team: str
    bill: Bill
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
_PRICED = st.builds(Bill, st.sampled_from(["hit", "miss"]), _AMOUNTS, st.sampled_from(MODELS))
_FAILED = st.builds(Bill, st.sampled_from(["upstream-error", "unpriced", "cancelled"]), st.none(), st.just("Flux"))
BILLS = st.one_of(_PRICED, _PRICED, _PRICED, _FAILED)
MANY_BILLS = st.lists(BILLS, min_size=4, max_size=8)
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
    "peek",
)
PICKS = st.integers(0, 99)
ACTS = st.lists(
    st.one_of(
        *[st.builds(Act, st.sampled_from(_KINDS), ANY_TEAM, _PRICED, PICKS)] * 5,
        st.builds(Act, st.just("settle"), ANY_TEAM, _FAILED, PICKS),
    ),
    min_size=1,
    max_size=8,
)


def standing_as(last: Said | None, said: Said | None) -> Said:
    assert last is not None
    assert said is not None
    return replace(said, tat_offset_us=last.tat_offset_us, rate_left=last.rate_left, used=last.used)


def check(said: Said | None, answer: Answer) -> None:
    assert said is not None
    assert agree(said_by(answer), said), f"{said_by(answer)} is not {said}"


def check_shown(said: Said | None, answer: Answer) -> None:
    assert said is not None
    assert isinstance(answer, QuotaState)
    assert agree(shown_by(answer), said), f"{shown_by(answer)} is not {said}"


def check_nothing(_: Said | None, answer: Answer) -> None:
    assert answer is None


def entry_of(ticket: Ticket) -> Entry:
    assert ticket.entry is not None
    return ticket.entry


def lasting(counters: Mapping[tuple[str, str, int], Mapping[str, int]]) -> dict[tuple[str, str, int], Counter[str]]:
    """What is counted by the day, week and month."""
    return {of: Counter(amounts) for of, amounts in counters.items() if of[1] in LASTING}


def summed_up(usage: Mapping[tuple[date, str], Mapping[str, int]]) -> dict[tuple[str, str, int], Counter[str]]:
    """What these counters must hold, by the rows of usage."""
    sums: dict[tuple[str, str, int], Counter[str]] = {}
    for (day, team), row in usage.items():
        noon_s = int(datetime(day.year, day.month, day.day, 12, tzinfo=ZONE).timestamp())
        for owner, per in product(("", team), LASTING):
            counter = sums.setdefault((owner, per, span(per, noon_s)[0]), Counter())
            for name, amount in row.items():
                *_, measure = name.split(":")
                counter[measure] += amount if measure != "refused" else 0
    return {of: +counter for of, counter in sums.items() if +counter}
