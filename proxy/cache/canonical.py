"""One spelling for each question: canonical bodies, and the keys taken from them.

Two bodies are the same question when they are the same JSON value. Rules of the canonical spelling:

* members sorted by code point, no white space, UTF-8, the shortest escapes; of a repeated member the last;
* integers from -2**63 to 2**64-1 exactly; a number with a fraction or an exponent is the nearest double,
  written as an integer where it is integral (`7.0` is `7`, `-0.0` is `0`), else in its shortest form;
* an integral number beyond 64 bits is refused, because readers disagree about it; so is anything that is not
  strict JSON in UTF-8;
* array order, unknown members, `null` against absent and Unicode form all count.

For ASCII member names and numbers that need no exponent this is RFC 8785. What is sent upstream is exactly
these bytes, so that gateway and upstream never read one body in two ways.
"""

import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import orjson

from proxy.problems import BadRequest, Code

KEY_FORMAT = 1
"""Counts changes of the key's meaning: a new format never finds prices stored under an older one."""

MAX_DEPTH = 32
"""Levels of arrays and objects, the body's own array being the first."""

_MIN_INTEGER, _END_INTEGER = -(2**63), 2**64

# Every integer that a double rounds up to -2**63 is spelled with these digits, outside strings and exponents.
_NEAR_MIN_INTEGER = b"-92233720368547"
_STRING_OR_NEAR_MIN_INTEGER = re.compile(rb'"(?:[^"\\]|\\.)*+"|(?<![eE])(' + _NEAR_MIN_INTEGER + rb"\d{5})(?![\d.eE])")


def canonicalise(raw: bytes) -> bytes:
    """The canonical spelling of a request body.

    Raises `BadRequest` (`invalid-body`) unless `raw` is a JSON array of one or more objects.
    """
    return canonical_items(load(raw))


def load(raw: bytes) -> Any:
    """The JSON value in `raw`, in which no integer below -2**63 is taken for it. Raises `BadRequest`."""
    value = _parse_json(raw)
    if _NEAR_MIN_INTEGER in raw:  # only now: on what is no JSON the pattern could take quadratic time
        value = _parse_json(_STRING_OR_NEAR_MIN_INTEGER.sub(_protect_below_min, raw))
    return value


def canonical_items(value: Any) -> bytes:
    """As `canonicalise`, of a body that `load` has read, perhaps as a part of something. It is changed in place."""
    if type(value) is not list or not value or any(type(item) is not dict for item in value):
        raise _invalid_body("The body must be a JSON array of one or more generation objects.")
    return orjson.dumps(_canonical(value, 1), option=orjson.OPT_SORT_KEYS)


def key_of(canonical: bytes, *, origin: str, account: str, path: str, query: str, ignored: Sequence[str] = ()) -> str:
    """The digest (64 hexadecimal characters) under which a question's price is stored.

    `query` is as sent upstream. `ignored` are the members that do not count, as dotted paths inside each item.
    """
    frame = orjson.dumps([KEY_FORMAT, origin, account, "POST", path, query, sorted(set(ignored))])
    counted = _without_members(canonical, ignored) if ignored else canonical
    return sha256(frame + b"\n" + counted).hexdigest()


def present(canonical: bytes, members: Sequence[str]) -> list[str]:
    """Those of the dotted paths that some item of the body has."""
    items = orjson.loads(canonical)
    return [member for member in members if any(_parent_of(item, member) is not None for item in items)]


def _without_members(canonical: bytes, members: Sequence[str]) -> bytes:
    items = orjson.loads(canonical)
    for item in items:
        for member in members:
            if (parent := _parent_of(item, member)) is not None:
                del parent[member.rpartition(".")[2]]
    return orjson.dumps(items, option=orjson.OPT_SORT_KEYS)


def _parent_of(item: Any, member: str) -> dict[str, Any] | None:
    """The object in which the last name of a dotted path stands."""
    *parents, name = member.split(".")
    for parent in parents:
        item = item.get(parent) if isinstance(item, dict) else None
    return item if isinstance(item, dict) and name in item else None


def _parse_json(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _invalid_body(f"The body is not valid JSON: {_json_error(raw, error)}.") from None


def _json_error(raw: bytes, error: orjson.JSONDecodeError) -> str:
    """What is no UTF-8 orjson would place at the beginning."""
    try:
        raw.decode()
    except UnicodeDecodeError as decode_error:
        return f"it is not UTF-8 from byte {decode_error.start} on"
    return str(error)


def _protect_below_min(token: re.Match[bytes]) -> bytes:
    """An integer below -2**63 in a spelling that no double confuses with it; anything else as it is."""
    return b"-1e19" if token[1] and int(token[1]) < _MIN_INTEGER else token[0]


def _canonical(value: Any, depth: int) -> Any:
    """`value` with its numbers in canonical form; containers are changed in place."""
    match value:
        case float():
            return _canonical_number(value)
        case dict():
            _check_depth(depth)
            for name, member in value.items():
                if type(member) in _NEEDS_REWRITE:
                    value[name] = _canonical(member, depth + 1)
        case _:  # a list: nothing else is compound
            _check_depth(depth)
            for index, member in enumerate(value):
                if type(member) in _NEEDS_REWRITE:
                    value[index] = _canonical(member, depth + 1)
    return value


_NEEDS_REWRITE = frozenset((float, dict, list))


def _canonical_number(number: float) -> float | int:
    if not number.is_integer():
        return number
    if not _MIN_INTEGER <= number < _END_INTEGER:
        raise _invalid_body("The body has an integer beyond 64 bits: write it as a string, or leave it out.")
    return int(number)


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _invalid_body(f"The body is nested deeper than {MAX_DEPTH} levels.")


def _invalid_body(detail: str) -> BadRequest:
    return BadRequest(Code.INVALID_BODY, detail)
