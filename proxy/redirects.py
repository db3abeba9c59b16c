"""What a server's word says about where a call belongs. Pure.

Of these words each means that nothing was run: a node of a cluster looks at the keys before it looks at the script, a
replica refuses a script that writes before its first line, as `#!lua` has it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    MovedError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from proxy.settings_urls import Address

SLOTS = 16384


@dataclass(frozen=True, slots=True)
class Moved:
    """The keys' slot has another home."""

    to: Address


@dataclass(frozen=True, slots=True)
class Ask:
    """The slot is moving: this once, ask there."""

    to: Address


@dataclass(frozen=True, slots=True)
class Later:
    """Half of the keys have moved: the same in a moment."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Not this server, or not now: another one can, or it can itself in a moment."""


@dataclass(frozen=True, slots=True)
class Unreached:
    """Nothing was sent."""


@dataclass(frozen=True, slots=True)
class Final:
    """The call has come to its end."""


Meaning = Moved | Ask | Later | Elsewhere | Unreached | Final


def meaning_of(word: object, *, sent: bool, host: str) -> Meaning:
    """What to make of a call's word. `sent`: the server may have it; `host`: whose word it is."""
    match word:
        case MovedError():
            return Moved(Address(word.host or host, word.port))
        case AskError():
            return Ask(Address(word.host or host, word.port))
        case TryAgainError():
            return Later()
        case ReadOnlyError() | ClusterDownError() | BusyLoadingError():  # MASTERDOWN is a ClusterDownError
            return Elsewhere()
        case RedisError() | OSError() if not sent and not isinstance(word, ResponseError):
            return Unreached()
        case _:
            return Final()


def may_have_run(word: object, *, sent: bool) -> bool:
    """Whether a call that came to no reply, but to this word, may have been run."""
    refused = isinstance(word, (ResponseError, BusyLoadingError))
    return sent and not refused


def homes_of(reply: Any, asked: str) -> list[Address | None]:
    """Of each slot the primary's address, out of what `CLUSTER SLOTS` says; None where nobody has it.

    A server that does not know its own name, or hides it, means the host that was asked.
    """
    homes: list[Address | None] = [None] * SLOTS
    for first, last, address in _ranges(reply, asked):
        homes[first : last + 1] = [address] * (last + 1 - first)
    return homes


def _ranges(reply: Any, asked: str) -> Iterator[tuple[int, int, Address]]:
    for first, last, primary, *_ in reply:
        host = (primary[0] or b"").decode()
        yield int(first), int(last), Address(asked if host in {"", "?"} else host, int(primary[1]))
