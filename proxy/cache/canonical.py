"""Canonical JSON for request bodies, and the cache keys computed from it.

Two bodies are the same question if they are the same JSON value. Rules of the canonical form:

* Members are sorted by code point, without white space, in UTF-8 with the shortest escapes. Of a repeated member the
  last one counts.
* Integers from -2**63 to 2**64-1 are exact. A number with a fraction or an exponent is the nearest double, written as
  an integer if it is integral (`7.0` is `7`, `-0.0` is `0`), else in its shortest form.
* An integral number beyond 64 bits is refused, because JSON parsers disagree about it. So is anything that is not
  strict JSON in UTF-8.
* Array order, unknown members, `null` instead of an absent member, and Unicode form all make a difference.

For ASCII member names and numbers that need no exponent this is RFC 8785. Exactly these bytes are sent upstream, so the
gateway and upstream cannot read one body in two ways.
"""

import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import orjson

from proxy.problems import BadRequest, Code

KEY_FORMAT = 1
"""The version of the key's format. It is part of the key, so a new format does not find prices of an older one."""

MAX_DEPTH = 32
"""Limits the nesting of arrays and objects; the body's own array is the first level."""

_MIN_INTEGER, _END_INTEGER = -(2**63), 2**64

# Every integer below -2**63 that rounds to -2**63 begins with these digits. They count outside strings and exponents.
_NEAR_MIN_INTEGER = b"-92233720368547"
_STRING_OR_NEAR_MIN_INTEGER = re.compile(rb'"(?:[^"\\]|\\.)*+"|(?<![eE])(' + _NEAR_MIN_INTEGER + rb"\d{5})(?![\d.eE])")


def canonicalise(raw: bytes) -> bytes:
    """The canonical form of a request body.

    Raises `BadRequest` (`invalid-body`) unless `raw` is a JSON array of one or more objects.
    """
    return canonical_items(load(raw))


def load(raw: bytes) -> Any:
    """The JSON value of `raw`. Raises `BadRequest`.

    orjson rounds integers below -2**63 to doubles. Some round to exactly -2**63, which is allowed; they are replaced
    before, so that `canonical_items` refuses them.
    """
    value = _parse_json(raw)
    if _NEAR_MIN_INTEGER in raw:  # after parsing: on invalid JSON the pattern could take quadratic time
        value = _parse_json(_STRING_OR_NEAR_MIN_INTEGER.sub(_protect_below_min, raw))
    return value


def canonical_items(value: Any) -> bytes:
    """Like `canonicalise`, for a value that `load` returned, or a part of it. Changes the value in place."""
    if type(value) is not list or not value:
        raise _invalid_body("The body must be a JSON array of one or more generation objects.")
    for index, item in enumerate(value):
        if type(item) is not dict:
            raise _invalid_body(f"The item at index {index} is not a generation object (a JSON object).")
        try:
            _canonical(item, 2)
        except _InvalidItem as error:
            raise _invalid_body(f"The item at index {index} {error}.") from None
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def key_of(canonical: bytes, *, origin: str, account: str, path: str, query: str, ignored: Sequence[str] = ()) -> str:
    """The cache key of a question: a SHA-256 digest in 64 hexadecimal characters.

    query: as sent upstream.
    ignored: members that are left out of the key, as dotted paths inside each item.
    """
    frame = orjson.dumps([KEY_FORMAT, origin, account, "POST", path, query, sorted(set(ignored))])
    counted = _without_members(canonical, ignored) if ignored else canonical
    return sha256(frame + b"\n" + counted).hexdigest()


def present(canonical: bytes, members: Sequence[str]) -> list[str]:
    """The members, given as dotted paths, that at least one item of the body has."""
    items = orjson.loads(canonical)
    return [member for member in members if any(_parent_of(item, member) is not None for item in items)]


def _without_members(canonical: bytes, members: Sequence[str]) -> bytes:
    items = orjson.loads(canonical)
    remove_members(items, members)
    return orjson.dumps(items, option=orjson.OPT_SORT_KEYS)


def remove_members(items: list[Any], members: Sequence[str]) -> None:
    """Removes members, given as dotted paths, from the items of a body."""
    for item in items:
        for member in members:
            if (parent := _parent_of(item, member)) is not None:
                del parent[member.rpartition(".")[2]]


def _parent_of(item: Any, member: str) -> dict[str, Any] | None:
    """The object that has the last name of a dotted path; None if there is none."""
    *parents, name = member.split(".")
    for parent in parents:
        item = item.get(parent) if isinstance(item, dict) else None
    return item if isinstance(item, dict) and name in item else None


def _parse_json(raw: bytes) -> Any:
    if not raw or raw.isspace():
        raise _invalid_body("The body is empty: send a JSON array of one or more generation objects.")
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _invalid_body(f"The body is not valid JSON: {_json_error(raw, error)}.") from None


def _json_error(raw: bytes, error: orjson.JSONDecodeError) -> str:
    """Why `raw` is not JSON. For invalid UTF-8, orjson would name position 0 instead of the byte."""
    try:
        raw.decode()
    except UnicodeDecodeError as decode_error:
        return f"it is not UTF-8 from byte {decode_error.start} on"
    return str(error)


def _protect_below_min(token: re.Match[bytes]) -> bytes:
    """Replaces an integer below -2**63 by -1e19, a number that is refused; returns other tokens unchanged."""
    return b"-1e19" if token[1] and int(token[1]) < _MIN_INTEGER else token[0]


def _canonical(value: Any, depth: int) -> Any:
    """The value with its numbers in canonical form. Changes containers in place."""
    if type(value) is float:
        return _canonical_number(value)
    if depth > MAX_DEPTH:
        raise _InvalidItem(f"is too deep: a body may not be nested deeper than {MAX_DEPTH} levels")
    for place, member in value.items() if type(value) is dict else enumerate(value):
        if type(member) in _NEEDS_REWRITE:
            value[place] = _canonical(member, depth + 1)
    return value


_NEEDS_REWRITE = frozenset((float, dict, list))


def _canonical_number(number: float) -> float | int:
    if not number.is_integer():
        return number
    if not _MIN_INTEGER <= number < _END_INTEGER:
        raise _InvalidItem("has an integer beyond 64 bits: write it as a string, or leave it out")
    return int(number)


class _InvalidItem(Exception):  # noqa: N818 -- named as `BadRequest` is
    """Why an item is refused, as the end of a sentence that begins with the item's index."""


def _invalid_body(detail: str) -> BadRequest:
    return BadRequest(Code.INVALID_BODY, detail)
