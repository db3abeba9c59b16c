"""What a request's `Cache-Control` asks for (RFC 9111 §5.2.1)."""

import re
from dataclasses import dataclass

from proxy.problems import BadRequest, Code

MAX_SECONDS = 2**31
"""A longer time counts as this one (RFC 9111 §1.2.2)."""

# What stands between commas outside quoted strings (RFC 9110 §5.6.4). A string that does not end takes all the rest.
_MEMBER = re.compile(r'(?:[^",]++|"(?:[^"\\]|\\.)*+"?)++', re.DOTALL)
_MAX_DIGITS = len(str(MAX_SECONDS)) + 1


@dataclass(frozen=True, slots=True)
class Directives:
    """`max_age_s` is None where any age will do."""

    no_cache: bool = False
    no_store: bool = False
    only_if_cached: bool = False
    max_age_s: int | None = None

    @property
    def asks_anew(self) -> bool:
        """Whether no stored answer will do, however young."""
        return self.no_cache or self.no_store

    def accepts(self, age_s: float) -> bool:
        """Whether a stored answer of this age is young enough."""
        return self.max_age_s is None or age_s <= self.max_age_s


def parse_directives(value: str) -> Directives:
    """The directives that count here; others are ignored, and of one that is repeated all but the first.

    Raises `BadRequest` for a `max-age` that is no whole number.
    """
    found: dict[str, str] = {}
    for member in _MEMBER.findall(value):
        name, _, argument = member.partition("=")
        found.setdefault(name.strip(" \t").lower(), argument.strip(" \t"))
    return Directives(
        no_cache="no-cache" in found,
        no_store="no-store" in found,
        only_if_cached="only-if-cached" in found,
        max_age_s=_seconds(found["max-age"]) if "max-age" in found else None,
    )


def _seconds(argument: str) -> int:
    """Both forms are to be accepted, the token and the quoted string (RFC 9111 §5.2)."""
    is_quoted = len(argument) > 1 and argument[0] == argument[-1] == '"'
    digits = argument[1:-1] if is_quoted else argument
    if not (digits.isascii() and digits.isdigit()):
        raise BadRequest(Code.INVALID_REQUEST, "Cache-Control: max-age is a whole number of seconds.")
    return min(int(digits.lstrip("0")[:_MAX_DIGITS] or "0"), MAX_SECONDS)
