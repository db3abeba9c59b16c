"""What upstream's answers mean: prices, balances, and everything that is neither.

Amounts stay the JSON numbers that upstream wrote: they are never turned into binary fractions, so `5`, `5.0` and
`0.10` come out as they went in. An amount that cannot be read is *unpriced*; it is never taken for 0.
"""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

from proxy.problems import Code, Problem

MAX_ESTIMATE = 10**9
"""Credits; a larger estimate is taken for an error of upstream's."""

MAX_NUMBER_CHARACTERS = 64
ENCODING = b"1"
"""Counts changes of `encode_price`; a price stored in another encoding is not found."""


@dataclass(frozen=True, slots=True)
class Price:
    """An estimate for one canonical body, as upstream gave it.

    estimated: the JSON number.
    rest: the other members of `data` as JSON text without the braces, empty if there are none.
    """

    estimated: bytes
    rest: bytes


@dataclass(frozen=True, slots=True)
class StoredPrice:
    """A price out of the price book. `ttl_s` is what is left of its time."""

    price: Price
    age_s: float
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Balance:
    """An account's balance, as a JSON number, and how long ago upstream said it."""

    amount: bytes
    age_s: float


@dataclass(frozen=True, slots=True)
class Priced:
    """Upstream knows the price."""

    price: Price
    balance: bytes | None


@dataclass(frozen=True, slots=True)
class Unpriced:
    """Upstream answered without a usable estimate: its JSON body, to be passed through and never stored."""

    body: bytes
    balance: bytes | None


@dataclass(frozen=True, slots=True)
class Rejected:
    """Upstream refused the caller's body (a 4xx of its own): passed through, never stored."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """No answer of upstream's can be shown. `upstream_status` is what it sent, if anything."""

    problem: Problem
    upstream_status: int | None = None


Reply = Priced | Unpriced | Rejected | Failed


# What can stand for a visible ASCII character in a JSON string besides itself (RFC 8259 §7).
_ESCAPED_CHARACTER = re.compile(rb'\\(?:u00([2-7][0-9A-Fa-f])|(["\\/]))')


class _RawNumber(str):
    """A JSON number as it was spelled."""

    __slots__ = ()


def read_reply(status: int, body: bytes, *, secret: str, retry_after: str | None = None, now: datetime) -> Reply:
    """What an upstream answer means. `secret` is the account's key, in visible ASCII: its echo goes nowhere."""
    if status == 429:  # noqa: PLR2004 -- RFC 6585 §4
        busy = Problem(
            Code.UPSTREAM_BUSY,
            "RenderNet takes no more requests for this account just now: try again later.",
            retry_after_s=retry_after_seconds(retry_after, now),
        )
        return Failed(busy, status)
    value, is_json = _parse(body)
    if not is_json or not (200 <= status < 300 or 400 <= status < 500):  # noqa: PLR2004 -- RFC 9110 §15
        return _broken(status, f"RenderNet answered {status} without a usable JSON body: try again later.")
    if _shows(secret, body):
        return _broken(status, "RenderNet's answer was withheld: it had the gateway's own key in it.")
    if _refuses_key(status, value):
        return Failed(
            Problem(Code.UPSTREAM_REFUSED, "RenderNet refused the gateway's API key: tell its operator."),
            status,
        )
    if status >= 400:  # noqa: PLR2004 -- RFC 9110 §15.5
        return Rejected(status, body)
    return _read_estimate(value, body)


def encode_price(price: Price, *, ttl_ms: int) -> bytes:
    """The text that the price book keeps for a price, behind the time at which it was put there."""
    return b" ".join((ENCODING, str(ttl_ms).encode(), price.estimated, price.rest))


def decode_price(stored: bytes, *, now_ms: int) -> StoredPrice | None:
    """A price out of `<time in ms> <encoded price>`; None if it was written in another encoding, or by others."""
    try:
        put_at_ms, encoding, ttl_ms, estimated, rest = stored.split(b" ", 4)
        age_ms = max(0, now_ms - int(put_at_ms))
        left_ms = int(ttl_ms) - age_ms
    except ValueError:
        return None
    if encoding != ENCODING:
        return None
    return StoredPrice(Price(estimated, rest), age_ms / 1000, left_ms / 1000)


def document(price: Price, balance: Balance | None) -> bytes:
    """The answer a client gets: upstream's envelope with the newest balance known."""
    parts = [b'{"data":{"estimated":', price.estimated]
    if balance is not None:
        parts += [b',"balance":', balance.amount]
    if price.rest:
        parts += [b",", price.rest]
    parts.append(b'},"error":{}}')
    return b"".join(parts)


def retry_after_seconds(value: str | None, now: datetime) -> int | None:
    """`Retry-After` (RFC 9110 §10.2.3), seconds or a date, in whole seconds; None if it says nothing usable."""
    if value is None:
        return None
    if value.isascii() and value.isdigit() and len(value) <= MAX_NUMBER_CHARACTERS:
        return int(value)
    try:
        at = parsedate_to_datetime(value)
    except (ValueError, OverflowError):  # OverflowError: a year or an offset of too many digits
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0, round((at - now).total_seconds()))


def _parse(body: bytes) -> tuple[Any, bool]:
    """The JSON value in `body`, its numbers as spelled, and whether it is one that can be written again."""
    try:
        value = json.loads(
            body.decode(), parse_int=_RawNumber, parse_float=_RawNumber, parse_constant=_refuse_constant
        )
        _dump(value)
    except (
        ValueError,
        TypeError,
        RecursionError,
    ):  # TypeError: what JSON cannot hold, such as lone surrogates
        return None, False
    return value, True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _dump(value: Any) -> bytes:
    return orjson.dumps(value, default=_as_spelled, option=orjson.OPT_PASSTHROUGH_SUBCLASS)


def _as_spelled(number: _RawNumber) -> orjson.Fragment:
    return orjson.Fragment(number.encode())


def _shows(secret: str, body: bytes) -> bool:
    """Whether JSON text has `secret` in it, escaped or not, and be it in a member that a later one hides."""
    return secret.encode() in body or secret.encode() in _ESCAPED_CHARACTER.sub(_unescaped, body)


def _unescaped(escape: re.Match[bytes]) -> bytes:
    return bytes.fromhex(escape[1].decode()) if escape[1] else escape[2]


def _refuses_key(status: int, value: Any) -> bool:
    """401 or 403, as status or as the code in the envelope, whose member is `error` or `err`."""
    codes = {str(status)}
    if isinstance(value, dict):
        for name in ("error", "err"):
            if isinstance(filled := value.get(name), dict):
                codes.add(str(filled.get("code")))
    return not codes.isdisjoint(("401", "403"))


def _read_estimate(value: Any, body: bytes) -> Priced | Unpriced:
    data = value.get("data") if isinstance(value, dict) else None
    if not isinstance(data, dict):
        return Unpriced(body, None)
    balance = data.pop("balance", None)
    known_balance = balance.encode() if _is_number(balance) else None
    estimated = data.pop("estimated", None)
    if value.get("error") or not _is_usable(estimated):
        return Unpriced(body, known_balance)
    return Priced(Price(estimated.encode(), _dump(data)[1:-1]), known_balance)


def _is_usable(estimated: Any) -> bool:
    try:
        return _is_number(estimated) and 0 <= Decimal(estimated) <= MAX_ESTIMATE
    except InvalidOperation:  # an exponent beyond what even decimals can hold
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, _RawNumber) and len(value) <= MAX_NUMBER_CHARACTERS


def _broken(status: int, detail: str) -> Failed:
    return Failed(Problem(Code.UPSTREAM_ERROR, detail), status)
