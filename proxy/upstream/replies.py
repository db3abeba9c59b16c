"""Parses upstream's responses into replies: a price, an unpriced answer, a rejection or a failure.

Amounts stay the JSON numbers that upstream wrote and are never converted to floats: `5`, `5.0` and `0.10` keep their
spelling. An estimate that cannot be read makes the answer *unpriced*; it never counts as 0.
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
"""Limits numbers in responses: real amounts have a few digits, and long ones are slow to parse."""

MAX_RETRY_AFTER_S = 2**31
"""Limits `Retry-After`; without a limit its number could be too long for JSON."""

MAX_FAILURE_BYTES = 64 * 2**10
"""Limits the failures that are shared through the store. After a longer one, each process asks upstream itself."""


@dataclass(frozen=True, slots=True)
class Priced:
    """An answer with a usable estimate."""

    price: Price
    balance: bytes | None
    status: int = 200


@dataclass(frozen=True, slots=True)
class Unpriced:
    """An answer without a usable estimate. Its JSON body is passed through and never stored."""

    body: bytes
    balance: bytes | None
    status: int = 200


@dataclass(frozen=True, slots=True)
class Rejected:
    """A 4xx about the caller's body. It is passed through and never stored."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """No answer that can be passed through.

    upstream_status: the status that upstream sent, if any.
    asked: False if no request was sent, because of the circuit breaker, a back-off or our own load.
    """

    problem: Problem
    upstream_status: int | None = None
    asked: bool = True


Reply = Priced | Unpriced | Rejected | Failed


_IDENTITY = "identity"

# RFC 9110 §16.6.1. No other name is repeated in an error: it could be any text.
_CONTENT_CODINGS = ("br", "compress", "deflate", "gzip", "x-compress", "x-gzip", "zstd")

MAX_CODE_CHARACTERS, MAX_MESSAGE_CHARACTERS = 64, 500
"""Limits upstream's error code and message when they are passed on."""

# The escapes of visible ASCII characters in a JSON string (RFC 8259 §7).
_ESCAPED_CHARACTER = re.compile(rb'\\(?:u00([2-7][0-9A-Fa-f])|(["\\/]))')


_FAILED_FIELDS = ("code", "detail", "retry_after_s", "upstream_status", "asked")


class _RawNumber(str):
    """A JSON number as it was written."""

    __slots__ = ()


def read_reply(
    status: int, body: bytes, *, headers: Mapping[str, str] = MappingProxyType({}), secret: str, now: datetime
) -> Reply:
    """Classifies a response.

    headers: names in lower case.
    secret: the account's API key, in visible ASCII. A response that contains it is withheld.
    """
    coding = headers.get("content-encoding", _IDENTITY).lower()
    value, is_json = _parse(body) if coding == _IDENTITY else (None, False)
    is_withheld = _leaks_secret(secret, body)
    if status == 429:  # noqa: PLR2004 -- RFC 6585 §4
        code = Code.UPSTREAM_BUSY
        detail = "RenderNet accepts no more requests for this account at the moment: try again later."
    elif not is_json:
        code, detail = Code.UPSTREAM_ERROR, f"RenderNet answered {status} {_json_error(body, coding)}: try again later."
    elif not (200 <= status < 300 or 400 <= status < 500):  # noqa: PLR2004 -- RFC 9110 §15
        code, detail = Code.UPSTREAM_ERROR, f"RenderNet answered {status}: try again later."
    elif is_withheld:
        code = Code.UPSTREAM_ERROR
        detail = "RenderNet's answer was withheld, because it contains the gateway's API key."
    elif _refuses_key(status, value):
        code, detail = Code.UPSTREAM_REFUSED, "RenderNet refused the gateway's API key: tell the gateway's operator."
    elif status >= 400:  # noqa: PLR2004 -- RFC 9110 §15.5
        return Rejected(status, body)
    else:
        return _read_estimate(status, value, body)
    retry_after_s = retry_after_seconds(headers.get("retry-after"), now) if code is Code.UPSTREAM_BUSY else None
    members = _upstream_error(status, value) if is_json and not is_withheld else {}
    return Failed(Problem(code, detail, retry_after_s, members=members), status)


def rejection_of(body: bytes) -> tuple[str | None, str | None]:
    """Upstream's own code and message in the body of a rejection; None for what it does not have."""
    return _code_and_message(_parse(body)[0])


def encode_failure(reply: Unpriced | Rejected | Failed) -> bytes:
    """Encodes a reply without a price, to be shared through the store; empty if it is too long."""
    match reply:
        case Unpriced(body, balance, status):
            record: dict[str, Any] = {"body": body.decode(), "balance": None if balance is None else balance.decode()}
            record |= {} if status == 200 else {"status": status}  # noqa: PLR2004 -- older gateways leave it out
        case Rejected(status, body):
            record = {"status": status, "body": body.decode()}
        case Failed(problem, upstream_status, asked):
            fields = (problem.code, problem.detail, problem.retry_after_s, upstream_status, asked)
            record = {**dict(zip(_FAILED_FIELDS, fields, strict=True)), **problem.members}
        case _:
            assert_never(reply)
    text = orjson.dumps(record)
    return text if len(text) <= MAX_FAILURE_BYTES else b""


def decode_failure(text: bytes) -> Unpriced | Rejected | Failed:
    """The reply that `encode_failure` encoded, here or in a gateway of another version."""
    match orjson.loads(text):
        case {"body": body, "balance": balance, **rest}:
            status: Any = rest.get("status", 200)
            return Unpriced(body.encode(), None if balance is None else balance.encode(), status)
        case {"body": body, "status": status}:
            return Rejected(status, body.encode())
        case record:
            code, detail, retry_after_s, upstream_status, asked = (record[name] for name in _FAILED_FIELDS)
            members = {"upstream": record["upstream"]} if "upstream" in record else {}
            return Failed(Problem(Code(code), detail, retry_after_s, members=members), upstream_status, asked)


def retry_after_seconds(value: str | None, now: datetime) -> int | None:
    """A `Retry-After` header (RFC 9110 §10.2.3), seconds or a date, as whole seconds; None if it is not usable."""
    if value is None:
        return None
    if value.isascii() and value.isdigit() and len(value) <= MAX_NUMBER_CHARACTERS:
        return min(int(value), MAX_RETRY_AFTER_S)
    try:
        at = parsedate_to_datetime(value)
    except (ValueError, OverflowError):  # OverflowError: a year or an offset with too many digits
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0, round((at - now).total_seconds()))


def _parse(body: bytes) -> tuple[Any, bool]:
    """The JSON value in `body`, numbers as written, and whether it is valid and can be written as JSON again."""
    try:
        value = _DECODER.decode(body.decode())
        _dump(value)
    except (ValueError, TypeError, RecursionError):  # TypeError: what orjson cannot write, such as lone surrogates
        return None, False
    return value, True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_int=_RawNumber, parse_float=_RawNumber, parse_constant=_refuse_constant)


def _dump(value: Any) -> bytes:
    return orjson.dumps(value, default=_as_spelled, option=orjson.OPT_PASSTHROUGH_SUBCLASS)


def _as_spelled(number: _RawNumber) -> orjson.Fragment:
    return orjson.Fragment(number.encode())


def _leaks_secret(secret: str, body: bytes) -> bool:
    """Whether JSON text contains `secret`, escaped or not, even in a duplicate member that parsing drops."""
    return secret.encode() in body or secret.encode() in _ESCAPED_CHARACTER.sub(_unescaped, body)


def _unescaped(escape: re.Match[bytes]) -> bytes:
    return bytes.fromhex(escape[1].decode()) if escape[1] else escape[2]


def _refuses_key(status: int, value: Any) -> bool:
    """Whether upstream refused the API key: 401 or 403, as status or as the code in `error` or `err` of the body."""
    codes = {str(status)}
    if isinstance(value, dict):
        for name in ("error", "err"):
            if isinstance(filled := value.get(name), dict):
                codes.add(str(filled.get("code")))
    return not codes.isdisjoint(("401", "403"))


def _json_error(body: bytes, coding: str) -> str:
    if coding != _IDENTITY:
        known = f"the content coding {coding}, which was not requested"
        return f"in {known if coding in _CONTENT_CODINGS else 'an unknown content coding'}"
    if body.startswith((BOM_UTF8, BOM_UTF16_LE, BOM_UTF16_BE)):
        return "with a byte order mark, which JSON must not have"  # RFC 8259 §8.1
    return "without a usable JSON body"


def _upstream_error(status: int, value: Any) -> Mapping[str, Any]:
    """The problem member with upstream's own code and message; empty if the body has none."""
    code, message = _code_and_message(value)
    return {} if code is message is None else {"upstream": {"status": status, "code": code, "message": message}}


def _code_and_message(value: Any) -> tuple[str | None, str | None]:
    error = (value.get("error") or value.get("err")) if isinstance(value, dict) else None
    members = error if isinstance(error, dict) else {"message": error}
    return _bounded(members.get("code"), MAX_CODE_CHARACTERS), _bounded(members.get("message"), MAX_MESSAGE_CHARACTERS)


def _bounded(text: Any, length: int) -> str | None:
    """A text (or a number, as written), shortened, and without control characters."""
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
    except InvalidOperation:  # an exponent that is too large for Decimal
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, _RawNumber) and len(value) <= MAX_NUMBER_CHARACTERS
