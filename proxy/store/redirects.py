"""Classifies the errors of servers: redirects, errors worth a retry, and final ones.

Each error that leads to another try guarantees that the script did not run: a cluster node checks the keys before it
looks up the script, and a server that does not accept writes refuses a `#!lua` script without the flag `no-writes`
before it runs a line.
"""

from typing import Any

from redis.exceptions import (
    AskError,
    BusyLoadingError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from proxy.urls import Address

SLOTS = 16384

_NOT_SERVING = frozenset(("CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF", "NOREPLICAS", "READONLY"))
"""Codes of a server that does not serve now. Another server may have taken its place, even under the same name."""

_REFUSED_WRITES = frozenset(("MISCONF", "NOREPLICAS", "OOM", "READONLY"))

_REMEDIES = {
    "CLUSTERDOWN": "check that each slot of the cluster has a primary",
    "LOADING": "it serves once it has loaded its data",
    "MASTERDOWN": "check that there is a primary, and that the URL leads to it",
    "MISCONF": "check the server's log and its disk",
    "NOPERM": "allow this user the scripts and keys that docs/configuration.md lists",
    "NOREPLICAS": "restore its replicas, or lower min-replicas-to-write",
    "OOM": "raise maxmemory, or move other data off this server",
    "READONLY": "check that the URL leads to the primary",
    "WRONGTYPE": "another program uses keys that begin with ep1: move it to another server or database",
}
"""What an operator can do, by error code."""

_NO_PASSWORD = (
    "the server requires a password",
    "set store.password_file; the password for cache.url is a part of that URL",
)
_MEANINGS = {
    "Authentication required": _NO_PASSWORD,
    "unauthenticated multibulk length": _NO_PASSWORD,  # the same, for a command of more than ten parts
    "unauthenticated bulk length": _NO_PASSWORD,
    "invalid username-password pair": (
        "the server does not accept the user or the password",
        "check store.username and store.password_file, or those in the URL",
    ),
    "without any password configured": (
        "the server has no password for this user",
        "set one at the server, or remove it from the settings",
    ),
    "DB index is out of range": ("the server has no database of this number", "use a lower one in the URL, usually 0"),
    "cluster support disabled": ("the server is not part of a cluster", "write the URL without +cluster"),
    "unknown command 'SENTINEL'": (
        "the server is not a Sentinel",
        "name the Sentinels, or write the URL without +sentinel",
    ),
    "unknown command 'EVALSHA'": (
        "the server runs no scripts",
        "check that the URL names a Redis or Valkey server; one that names Sentinels begins with redis+sentinel",
    ),
    "max number of clients reached": ("the server accepts no more connections", "raise its maxclients"),
    "certificate is not valid for": (
        "the server's certificate is for another host",
        "use a host in the URL that the certificate names",
    ),
    "certificate has expired": ("the server's certificate has expired", "renew it"),
    "CERTIFICATE_VERIFY_FAILED": (
        "the server's certificate is not trusted",
        "set store.ca_file to the certificate of the CA that signed it",
    ),
    "CERTIFICATE_REQUIRED": ("the server requires a client certificate", "set store.cert_file and store.key_file"),
    "as reply type byte": ("it is not a Redis or Valkey server", "check host and port in the URL"),
    "Error 111 connecting": ("nothing listens there", "check that the server runs, and host and port in the URL"),
    "Name or service not known": ("the host name is unknown", "check it in the URL, and the machine's DNS"),
    "Error 2 connecting": ("the socket does not exist", "check that the server runs, and the path in the URL"),
}
"""By a part of an error's text: what it means, and what an operator can do. The first one that fits counts."""

_KEY_EXPIRED = "access a non local key in a cluster node"
"""Part of an error of a script whose slot is migrating (Valkey and Redis word its beginning differently).

The server checks that all keys exist before it starts the script, but with the clock of the previous command. A key
that expires in between does not exist for the script, which fails at the first command that uses it. The call can be
repeated, because our scripts read each key that can expire before their first write, or may run twice.
"""

_ACL_FAILURES = ("ACL failure in script", "The user executing the script can't run")
"""How Valkey and Redis begin the error of a script that runs a command its user must not run."""


def target_of(redirect: AskError, host: str) -> Address:
    """The server that a redirect names. Without a host it means `host`: that of the server that sent it."""
    return Address(redirect.host or host, redirect.port)


def may_pass(error: object) -> bool:
    """Whether the same server may serve the call in a moment: some of its keys have moved, or a key has expired."""
    return isinstance(error, TryAgainError) or (isinstance(error, ResponseError) and _KEY_EXPIRED in str(error))


def code_of(error: RedisError) -> str:
    """The error code, such as OOM; "" if the error is not from a server.

    redis-py removes the codes that it knows from the text.
    """
    if any(map(str(error).startswith, _ACL_FAILURES)):
        return "NOPERM"
    code = error.status_code or str(error).partition(" ")[0]
    return code if code.isupper() else ""


def is_not_serving(result: object) -> bool:
    """Whether the server does not serve now. Another one may, or this one in a moment."""
    return isinstance(result, RedisError) and code_of(result) in _NOT_SERVING


def refuses_writes(error: RedisError) -> bool:
    """Whether the server refuses all writes, and serves reads."""
    return code_of(error) in _REFUSED_WRITES


def describe(error: Exception) -> str:
    """The error as one line for the log, with what can be done about it."""
    text = str(error)
    if not isinstance(error, RedisError):
        return text
    for part, (meaning, remedy) in _MEANINGS.items():
        if part in text:
            return f"{meaning} ({text.strip().rstrip('.')}): {remedy}"
    code = code_of(error)
    sentence = text.partition(". ")[0].rstrip(".")
    has_code = sentence.startswith(code) or any(map(text.startswith, _ACL_FAILURES))
    return f"{sentence if has_code else f'{code} {sentence}'}: {_REMEDIES[code]}" if code in _REMEDIES else text


def may_have_run(error: object, *, sent: bool) -> bool:
    """Whether a server may have run the script of a failed call."""
    refused = isinstance(error, (ResponseError, BusyLoadingError))
    return sent and not refused


def slot_owners(reply: Any, host: str) -> list[Address | None]:
    """The address of each slot's primary, from a reply to `CLUSTER SLOTS`; None for a slot without a primary.

    host: of the server that replied. One that does not know its own name, or hides it, leaves its host out.
    """
    owners: list[Address | None] = [None] * SLOTS
    for first, last, primary, *_ in reply:
        name = (primary[0] or b"").decode()
        address = Address(host if name in {"", "?"} else name, int(primary[1]))
        owners[first : last + 1] = [address] * (last + 1 - first)
    return owners
