"""Builds the answer of `POST /v1/quote`: prices of variants, their breakdowns, and how many fit into the quotas.

Amounts are RenderNet's own numbers, added or subtracted exactly. An unknown amount is null, as is each sum with it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, Inexact
from math import floor
from typing import Any, Literal
from zoneinfo import ZoneInfo

import orjson

from proxy.cache.prices import Balance
from proxy.gateway.quote_request import Breakdown, Line, QuoteRequest, Variant
from proxy.problems import Problem
from proxy.quota.credits import micro_of
from proxy.quota.quotas import Quota, QuotaState

Basis = Literal["asked", "stored", "inferred"]

_EXACT = Context(prec=500, traps=[Inexact])
"""RenderNet's numbers have at most 64 characters. With an absurd exponent they cannot be added exactly."""


@dataclass(frozen=True, slots=True)
class Known:
    """The price of a question. `estimated` is the JSON number; `ttl_s` is None if the price is not stored."""

    estimated: bytes
    basis: Basis
    age_s: float
    ttl_s: float | None

    @property
    def credits(self) -> Decimal:
        return Decimal(self.estimated.decode())


@dataclass(frozen=True, slots=True)
class Unknown:
    """Why a question has no price, in the codes of problems or of RenderNet."""

    code: str
    message: str

    @property
    def credits(self) -> None:
        return None

    @classmethod
    def of(cls, problem: Problem) -> "Unknown":
        return cls(problem.code, problem.detail)


Quoted = Known | Unknown


@dataclass(frozen=True, slots=True)
class QuotedVariant:
    """`lines`: the answers to the variant's lines, in their order."""

    variant: Variant
    whole: Quoted
    lines: Sequence[Quoted] = ()


def shown_to_team(priced: Quoted, state: QuotaState | None, zone: ZoneInfo) -> Quoted:
    """The price, unless a quota would refuse the estimate: then the team does not see it, as `explain` does."""
    if state is None or isinstance(priced, Unknown):
        return priced
    credits_micro = micro_of(priced.estimated)
    violated = state.refusing(credits_micro)
    if not violated:
        return priced
    return Unknown.of(state.quota_exceeded(violated, credits_micro, zone, shows_price=False))


def quote_document(
    request: QuoteRequest, priced: Sequence[QuotedVariant], state: QuotaState | None, balance: Balance | None
) -> bytes:
    """The JSON of a quote. `state`, `balance`: None if unknown."""
    cheapest, quantity = _cheapest(priced), request.quantity
    first = priced[0].whole.credits
    document: dict[str, Any] = {
        "variants": [_variant_members(one, first, request.breakdown) for one in priced],
        "cheapest": None if cheapest is None else cheapest.variant.label,
        "quotas": None if state is None else _quotas(state, cheapest, quantity or 1),
        "balance": None if balance is None else orjson.Fragment(balance.amount),
        "balance_age_s": None if balance is None else int(balance.age_s),
    }
    if quantity is not None:
        each = None if cheapest is None else cheapest.whole.credits
        document["quantity"] = quantity
        document["total"] = _json(_exact(_EXACT.multiply, each, Decimal(quantity)))
    return orjson.dumps(document)


def _cheapest(priced: Sequence[QuotedVariant]) -> QuotedVariant | None:
    known = [(one.whole.credits, one) for one in priced if isinstance(one.whole, Known)]
    return min(known, key=lambda pair: pair[0])[1] if known else None


def _variant_members(one: QuotedVariant, first: Decimal | None, breakdown: Breakdown | None) -> dict[str, Any]:
    variant, whole = one.variant, one.whole
    members: dict[str, Any] = {"label": variant.label, "changes": variant.changes, **_price(whole)}
    members["delta"] = _json(_exact(_EXACT.subtract, whole.credits, first))
    if isinstance(whole, Known):
        members["age_s"] = int(whole.age_s)
        members["ttl_s"] = None if whole.ttl_s is None else floor(whole.ttl_s)
        members["basis"] = whole.basis
    else:
        members |= {"age_s": None, "ttl_s": None, "basis": None}
    parts = zip(variant.lines, one.lines, strict=True)
    if breakdown == "items":
        members["breakdown"] = [{"item": line.part, **_price(priced)} for line, priced in parts]
        items = _sum(priced.credits for priced in one.lines)
        members["residual"] = _json(_exact(_EXACT.subtract, whole.credits, items))
    elif breakdown == "members":
        members["breakdown"] = [_marginal_members(line, whole, priced) for line, priced in parts]
    return members


def _marginal_members(line: Line, whole: Quoted, without: Quoted) -> dict[str, Any]:
    marginal = _json(_exact(_EXACT.subtract, whole.credits, without.credits))
    mode_changes = {"mode_changes": True} if line.mode_changes else {}
    return {"member": line.part, "marginal": marginal, **mode_changes, **_error(without)}


def _price(priced: Quoted) -> dict[str, Any]:
    estimated = orjson.Fragment(priced.estimated) if isinstance(priced, Known) else None
    return {"estimated": estimated, **_error(priced)}


def _error(priced: Quoted) -> Mapping[str, Any]:
    return {"error": {"code": priced.code, "message": priced.message}} if isinstance(priced, Unknown) else {}


def _quotas(state: QuotaState, cheapest: QuotedVariant | None, quantity: int) -> list[dict[str, Any]]:
    whole = None if cheapest is None else cheapest.whole
    credits_micro = micro_of(whole.estimated) if isinstance(whole, Known) else None
    return [_quota_members(quota, max(0, quota.limit - used), credits_micro, quantity) for quota, used in state.uses()]


def _quota_members(quota: Quota, remaining: int, credits_micro: int | None, quantity: int) -> dict[str, Any]:
    """`how_many` is null if the price is unknown, or 0: then the quota does not limit how many."""
    each = 1 if quota.measure == "requests" else credits_micro
    return {
        "scope": quota.scope,
        "measure": quota.measure,
        "per": quota.per,
        "remaining": quota.number(remaining),
        "fits": None if credits_micro is None or each is None else 0 < remaining >= each * quantity,
        "how_many": None if credits_micro is None or (not each and remaining) else remaining // (each or 1),
    }


def _sum(amounts: Iterable[Decimal | None]) -> Decimal | None:
    total: Decimal | None = Decimal()
    for amount in amounts:
        total = _exact(_EXACT.add, total, amount)
    return total


def _exact(
    operation: Callable[[Decimal, Decimal], Decimal], left: Decimal | None, right: Decimal | None
) -> Decimal | None:
    """None if an amount is unknown, or if the result has too many digits."""
    if left is None or right is None:
        return None
    try:
        return operation(left, right)
    except Inexact:
        return None


def _json(amount: Decimal | None) -> orjson.Fragment | None:
    return None if amount is None else orjson.Fragment(format(_EXACT.normalize(amount), "f").encode())
