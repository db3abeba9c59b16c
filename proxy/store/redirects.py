"""What a server's error says: where a call belongs, whether it may have run, and what to do about it. Pure.

Each of the errors that lead elsewhere guarantees that the script did not run: a node of a cluster looks at the keys
before it looks at the script, and a script that begins with `#!lua` and writes is refused before its first line.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from redis.exceptions import (
    AskError,
    BusyLoadingError,
    MovedError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from proxy.urls import Address

SLOTS = 16384

_NOT_SERVING = frozenset(("CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF", "NOREPLICAS", "READONLY"))
"""Errors of a server that does not serve now. Another one may have taken its place, under the same name even."""

_REFUSED_WRITES = frozenset(("MISCONF", "NOREPLICAS", "OOM", "READONLY"))

_REMEDIES = {
    "CLUSTERDOWN": "see that each slot of the cluster has a primary",
    "LOADING": "it serves when it has loaded its data",
    "MASTERDOWN": "see that there is a primary, and that the URL leads to it",
    "MISCONF": "look into the server's log, and at its disk",
    "NOPERM": "allow this user the scripts and keys that docs/configuration.md lists",
    "NOREPLICAS": "bring its replicas back, or lower min-replicas-to-write",
    "OOM": "raise maxmemory, or take other data off this server",
    "READONLY": "see that the URL leads to the primary",
}
"""By the error's code, what an operator can do."""

_KEY_EXPIRED = "access a non local key in a cluster node"
"""Part of the error of a script whose slot is moving (Valkey and Redis word its beginning differently).

The server checks before it starts a script that all keys are there, but with the time of the command before. A key that
expires in between is missing for the script, which then fails at the first command that uses the key. Our scripts read
a key that can expire before their first write, or may be run twice: the call can be repeated.
"""

_ACL_FAILURES = ("ACL failure in script", "The user executing the script can't run")
"""How Valkey and Redis begin the error where a script runs a command that its user must not."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The keys' slot has another home."""

    to: Address


@dataclass(frozen=True, slots=True)
class Ask:
    """The slot is moving: this once, ask there."""

    to: Address


@dataclass(frozen=True, slots=True)
class TryAgain:
    """Half of the keys have moved: the same in a moment."""


@dataclass(frozen=True, slots=True)
class NotServing:
    """Not this server, or not now: another one can, or it can itself in a moment."""


@dataclass(frozen=True, slots=True)
class NotSent:
    """Nothing was sent."""


@dataclass(frozen=True, slots=True)
class Done:
    """The call has come to its end."""


ReplyKind = Moved | Ask | TryAgain | NotServing | NotSent | Done


def kind_of(word: object, *, sent: bool, host: str) -> ReplyKind:
    """What to make of a call's word. `sent`: the server may have it; `host`: whose word it is."""
    match word:
        case MovedError():
            return Moved(Address(word.host or host, word.port))
        case AskError():
            return Ask(Address(word.host or host, word.port))
        case ResponseError() if isinstance(word, TryAgainError) or _KEY_EXPIRED in str(word):
            return TryAgain()
        case _ if is_not_serving(word):
            return NotServing()
        case RedisError() | OSError() if not sent and not isinstance(word, ResponseError):
            return NotSent()
        case _:
            return Done()


def code_of(error: RedisError) -> str:
    """The first word of what the server said, such as OOM; "" if it was not a server that said it.

    redis-py takes the codes that it knows from the text.
    """
    if any(map(str(error).startswith, _ACL_FAILURES)):
        return "NOPERM"
    code = error.status_code or str(error).partition(" ")[0]
    return code if code.isupper() else ""


def is_not_serving(word: object) -> bool:
    return isinstance(word, RedisError) and code_of(word) in _NOT_SERVING


def refuses_writes(error: RedisError) -> bool:
    """Whether the server serves what only reads, but refuses whatever writes."""
    return code_of(error) in _REFUSED_WRITES


def explained(error: Exception) -> str:
    """The error in a line for the log: what the server said, and what can be done about it."""
    text = str(error)
    if not isinstance(error, RedisError):
        return text
    code = code_of(error)
    said = text.partition(". ")[0].rstrip(".")
    named = said if said.startswith(code) or any(map(text.startswith, _ACL_FAILURES)) else f"{code} {said}"
    return f"{named}: {_REMEDIES[code]}" if code in _REMEDIES else text


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
