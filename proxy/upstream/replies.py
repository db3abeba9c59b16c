"""What upstream's answers mean: prices, and everything that is none.

Amounts stay the JSON numbers that upstream wrote: they are never turned into binary fractions, so `5`, `5.0` and
`0.10` come out as they went in. An amount that cannot be read is *unpriced*; it is never taken for 0.
"""

import json
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any, assert_never

import orjson

from proxy.cache.prices import Price
from proxy.problems import Code, Problem

MAX_ESTIMATE = 10**6
"""Credits; a larger estimate counts as an upstream error. `proxy.quota.ledger_script.MAX_ENTRY_MICRO` builds on it."""

MAX_NUMBER_CHARACTERS = 64
MAX_RETRY_AFTER_S = 2**31
"""A longer wait counts as this one, so that any can be written as JSON."""

MAX_WORD_BYTES = 64 * 2**10
"""A longer refusal of upstream's is not left for other processes: each asks for itself."""


@dataclass(frozen=True, slots=True)
class Priced:
    """Upstream knows the price."""

    price: Price
    balance: bytes | None
    status: int = 200


@dataclass(frozen=True, slots=True)
class Unpriced:
    """Upstream answered without a usable estimate: its JSON body, to be passed through and never stored."""

    body: bytes
    balance: bytes | None
    status: int = 200


@dataclass(frozen=True, slots=True)
class Rejected:
    """Upstream refused the caller's body (a 4xx of its own): passed through, never stored."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """No answer of upstream's can be shown. `upstream_status` is what it sent, if anything.

    `asked` is False where the question did not reach upstream: the circuit, upstream's own wish or our load kept it.
    """

    problem: Problem
    upstream_status: int | None = None
    asked: bool = True


Reply = Priced | Unpriced | Rejected | Failed


_IDENTITY = "identity"

# RFC 9110 §16.6.1; no other name is repeated, for it may be anything.
_CONTENT_CODINGS = ("br", "compress", "deflate", "gzip", "x-compress", "x-gzip", "zstd")

_LONGEST_WORDS = {"code": 64, "message": 500}
"""Characters of upstream's own words that are passed on."""

# What can stand for a visible ASCII character in a JSON string besides itself (RFC 8259 §7).
_ESCAPED_CHARACTER = re.compile(rb'\\(?:u00([2-7][0-9A-Fa-f])|(["\\/]))')


_FAILED_FIELDS = ("code", "detail", "retry_after_s", "upstream_status", "asked")


class _RawNumber(str):
    """A JSON number as it was spelled."""

    __slots__ = ()


def read_reply(
    status: int, body: bytes, *, headers: Mapping[str, str] = MappingProxyType({}), secret: str, now: datetime
) -> Reply:
    """What an upstream answer means. `headers` have names in lower case.

    `secret` is the account's key, in visible ASCII: its echo goes nowhere.
    """
    coding = headers.get("content-encoding", _IDENTITY).lower()
    value, is_json = _parse(body) if coding == _IDENTITY else (None, False)
    is_withheld = _leaks_secret(secret, body)
    if status == 429:  # noqa: PLR2004 -- RFC 6585 §4
        code, detail = (
            Code.UPSTREAM_BUSY,
            "RenderNet takes no more requests for this account just now: try again later.",
        )
    elif not is_json:
        code, detail = Code.UPSTREAM_ERROR, f"RenderNet answered {status} {_json_error(body, coding)}: try again later."
    elif not (200 <= status < 300 or 400 <= status < 500):  # noqa: PLR2004 -- RFC 9110 §15
        code, detail = Code.UPSTREAM_ERROR, f"RenderNet answered {status}: try again later."
    elif is_withheld:
        code, detail = Code.UPSTREAM_ERROR, "RenderNet's answer was withheld: it had the gateway's own key in it."
    elif _refuses_key(status, value):
        code, detail = Code.UPSTREAM_REFUSED, "RenderNet refused the gateway's API key: tell its operator."
    elif status >= 400:  # noqa: PLR2004 -- RFC 9110 §15.5
        return Rejected(status, body)
    else:
        return _read_estimate(status, value, body)
    retry_after_s = retry_after_seconds(headers.get("retry-after"), now) if code is Code.UPSTREAM_BUSY else None
    members = _own_words(status, value) if is_json and not is_withheld else {}
    return Failed(Problem(code, detail, retry_after_s, members=members), status)


def encode_failure(reply: Unpriced | Rejected | Failed) -> bytes:
    """What a leader that got no price leaves for those who wait; empty if it is too long to leave."""
    match reply:
        case Unpriced(body, balance, status):
            word: dict[str, Any] = {"body": body.decode(), "balance": None if balance is None else balance.decode()}
            word |= {} if status == 200 else {"status": status}  # noqa: PLR2004 -- older gateways leave it out
        case Rejected(status, body):
            word = {"status": status, "body": body.decode()}
        case Failed(problem, upstream_status, asked):
            fields = (problem.code, problem.detail, problem.retry_after_s, upstream_status, asked)
            word = {**dict(zip(_FAILED_FIELDS, fields, strict=True)), **problem.members}
        case _:
            assert_never(reply)
    text = orjson.dumps(word)
    return text if len(text) <= MAX_WORD_BYTES else b""


def decode_failure(text: bytes) -> Unpriced | Rejected | Failed:
    """What `encode_failure` was given, here or in a gateway of another version."""
    match orjson.loads(text):
        case {"body": body, "balance": balance, **rest}:
            status: Any = rest.get("status", 200)
            return Unpriced(body.encode(), None if balance is None else balance.encode(), status)
        case {"body": body, "status": status}:
            return Rejected(status, body.encode())
        case word:
            code, detail, retry_after_s, upstream_status, asked = (word[name] for name in _FAILED_FIELDS)
            members = {"upstream": word["upstream"]} if "upstream" in word else {}
            return Failed(Problem(Code(code), detail, retry_after_s, members=members), upstream_status, asked)


def retry_after_seconds(value: str | None, now: datetime) -> int | None:
    """`Retry-After` (RFC 9110 §10.2.3), seconds or a date, in whole seconds; None if it says nothing usable."""
    if value is None:
        return None
    if value.isascii() and value.isdigit() and len(value) <= MAX_NUMBER_CHARACTERS:
        return min(int(value), MAX_RETRY_AFTER_S)
    try:
        at = parsedate_to_datetime(value)
    except (ValueError, OverflowError):  # OverflowError: a year or an offset of too many digits
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0, round((at - now).total_seconds()))


def _parse(body: bytes) -> tuple[Any, bool]:
    """The JSON value in `body`, its numbers as spelled, and whether it is one that can be written again."""
    try:
        value = _DECODER.decode(body.decode())
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


_DECODER = json.JSONDecoder(parse_int=_RawNumber, parse_float=_RawNumber, parse_constant=_refuse_constant)


def _dump(value: Any) -> bytes:
    return orjson.dumps(value, default=_as_spelled, option=orjson.OPT_PASSTHROUGH_SUBCLASS)


def _as_spelled(number: _RawNumber) -> orjson.Fragment:
    return orjson.Fragment(number.encode())


def _leaks_secret(secret: str, body: bytes) -> bool:
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


def _json_error(body: bytes, coding: str) -> str:
    if coding != _IDENTITY:
        known = f"the content coding {coding}, which was not asked for"
        return f"in {known if coding in _CONTENT_CODINGS else 'an unknown content coding'}"
    if body.startswith((BOM_UTF8, BOM_UTF16_LE, BOM_UTF16_BE)):
        return "with a byte order mark, which JSON must not have"  # RFC 8259 §8.1
    return "without a usable JSON body"


def _own_words(status: int, value: Any) -> Mapping[str, Any]:
    """The problem's member for what upstream says in its envelope; none where it says nothing."""
    error = (value.get("error") or value.get("err")) if isinstance(value, dict) else None
    said = error if isinstance(error, dict) else {"message": error}
    code, message = (_bounded(said.get(name), length) for name, length in _LONGEST_WORDS.items())
    return {} if code is message is None else {"upstream": {"status": status, "code": code, "message": message}}


def _bounded(text: Any, length: int) -> str | None:
    """A text (or a number, as it was spelled) without characters that steer a terminal."""
    if not isinstance(text, str):
        return None
    text = text if len(text) <= length else text[: length - 1] + "…"
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _read_estimate(status: int, value: Any, body: bytes) -> Priced | Unpriced:
    data = value.get("data") if isinstance(value, dict) else None
    if not isinstance(data, dict):
        return Unpriced(body, None, status)
    balance = data.pop("balance", None)
    known_balance = balance.encode() if _is_number(balance) else None
    estimated = data.pop("estimated", None)
    if value.get("error") or not _is_usable(estimated):
        return Unpriced(body, known_balance, status)
    return Priced(Price(estimated.encode(), _dump(data)[1:-1]), known_balance, status)


def _is_usable(estimated: Any) -> bool:
    try:
        return _is_number(estimated) and 0 <= Decimal(estimated) <= MAX_ESTIMATE
    except InvalidOperation:  # an exponent beyond what even decimals can hold
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, _RawNumber) and len(value) <= MAX_NUMBER_CHARACTERS
