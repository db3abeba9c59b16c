"""Two models of JSON that stand beside the code.

`meaning` says when two parsed values are one JSON value; `strict_reading` is a second reader, made of the standard
library, that takes raw bytes to the canonical ones or refuses them. Neither shares a line with what it judges.
"""

import json
import math
import re
from typing import Any

from proxy.cache.canonical import MAX_DEPTH

MIN, MAX = -(2**63), 2**64 - 1


def meaning(value: Any) -> Any:
    """Equal for two values exactly if they are the same JSON value: numbers by value, objects without order."""
    match value:
        case bool():
            return ("boolean", value)
        case int() | float():
            return ("number", value)  # Python compares integers with floats exactly
        case dict():
            return ("object", frozenset((name, meaning(member)) for name, member in value.items()))
        case list():
            return ("array", tuple(meaning(item) for item in value))
    return value


class Number(str):
    """A number of the strict reader's, as it was spelled."""

    __slots__ = ()


class Members(list[tuple[str, Any]]):
    """The members of an object of the strict reader's, the hidden ones too."""


class RefusedError(Exception):
    """The strict reader's only answer to what is no question."""


def strict_reading(raw: bytes) -> bytes | None:
    """The canonical bytes that a reader who knows the rules, but not our code, makes of `raw`; None if refused."""
    try:
        value = json.loads(
            raw.decode(),
            parse_int=Number,
            parse_float=Number,
            parse_constant=refuse,
            object_pairs_hook=Members,
        )
        refuse_wherever(value)
        if not (type(value) is list and value and all(type(item) is Members for item in value)):
            return None
        return written(value, 1).encode()
    except (ValueError, RecursionError, RefusedError):
        return None


def refuse(_: str) -> None:
    raise RefusedError


def refuse_wherever(value: Any) -> None:
    """What even a hidden member may not have: half a character, or a number that overflows a double."""
    match value:
        case Number():
            if math.isinf(float(value)):
                raise RefusedError
        case str():
            value.encode()  # UnicodeEncodeError is a ValueError
        case Members():
            for name, member in value:
                refuse_wherever(name)
                refuse_wherever(member)
        case list():
            for item in value:
                refuse_wherever(item)


def written(value: Any, level: int) -> str:
    match value:
        case Number():
            return written_number(value)
        case Members():
            members = sorted(dict(value).items())
            return nested("{}", [f"{written(n, level)}:{written(v, level + 1)}" for n, v in members], level)
        case list():
            return nested("[]", [written(item, level + 1) for item in value], level)
    return json.dumps(value, ensure_ascii=False)


def nested(brackets: str, parts: list[str], level: int) -> str:
    if level > MAX_DEPTH:
        raise RefusedError
    return brackets[0] + ",".join(parts) + brackets[1]


def written_number(number: Number) -> str:
    exact = int(number) if re.fullmatch("-?[0-9]+", number) else float(number)
    if exact != int(exact):
        spelled = repr(exact).replace("e-0", "e-")
        return re.sub(r"^(-?)(\d)(?:\.(\d+))?e-5$", r"\g<1>0.0000\2\3", spelled)  # the exponent starts at 1e-6
    if not MIN <= exact <= MAX:
        raise RefusedError
    return str(int(exact))
