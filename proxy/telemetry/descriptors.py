"""File descriptors: raises their limit, and recognises errors that come from having none left.

Each connection takes a descriptor. Running out of them is a failure of this process, and says nothing about the
upstream or the store whose connection could not be opened.
"""

import os
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from errno import EBUSY, EMFILE, ENFILE


def raise_limit() -> int:
    """Raises the limit of this process and its children as far as the system allows. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS reports no limit, but has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def ran_out(error: BaseException) -> bool:
    """Whether `error` was caused by a lack of descriptors, however often libraries have wrapped it.

    Resolving a name takes descriptors too, but its error does not say so, and may be a `gaierror` or `EBUSY`. Then this
    opens a descriptor to find out.
    """
    for origin in _origins(error):
        if isinstance(origin, socket.gaierror) or (isinstance(origin, OSError) and origin.errno == EBUSY):
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
    """The error, its causes and contexts, and the members of its groups."""
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
