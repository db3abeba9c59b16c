"""File descriptors: every connection takes one, and a process may have only so many.

Running out of them is this gateway's own trouble: it says nothing about the upstream or the store whose connection
could not be made.
"""

import os
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from errno import EMFILE, ENFILE


def raise_limit() -> int:
    """Lets this process and its children have as many descriptors as the system allows. Returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS says that there is no limit, and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def ran_out(error: BaseException) -> bool:
    """Whether `error` comes from there being no descriptor left, however many libraries it has passed.

    Resolving a name takes descriptors too, but its error does not say that they were missing: so another one is tried.
    """
    for origin in _origins(error):
        if isinstance(origin, socket.gaierror):
            return not is_one_left()
        if isinstance(origin, OSError) and origin.errno in (EMFILE, ENFILE):
            return True
    return False


def is_one_left() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _origins(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from or during, and what its groups hold."""
    waiting, seen = [error], set[int]()
    while waiting:
        origin = waiting.pop()
        if id(origin) in seen:
            continue
        seen.add(id(origin))
        yield origin
        waiting += [one for one in (origin.__cause__, origin.__context__) if one is not None]
        if isinstance(origin, BaseExceptionGroup):
            waiting += origin.exceptions
