"""The files that workers write their metrics to. The supervisor opens them, and marks those whose worker has ended.

* On Linux a file is in memory and has no name, so nothing can remove it while the gateway runs, and nothing is left
  afterwards.
* `proxy.telemetry.multiprocess` reads and writes them. It is separate because that module imports
  prometheus_client, which would cost the supervisor memory and start-up time.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from struct import Struct
from typing import BinaryIO

HEADER = Struct("=QQ")
"""Number of bytes in use; whether a worker is alive (0 or 1)."""

_ALIVE = Struct("=Q")
_ALIVE_AT = _ALIVE.size


class NoMetricsFileError(Exception):
    """No file can be opened. The message says what to do."""


@contextmanager
def metrics_files(slots: int) -> Iterator[list[int]]:
    """The descriptors of a new file for each slot. Raises `NoMetricsFileError`."""
    with ExitStack() as opened:
        try:
            descriptors = [opened.enter_context(_nameless_file()).fileno() for _ in range(slots)]
        except OSError as error:
            raise NoMetricsFileError(
                f"cannot open a file for metrics ({error.strerror}): set TMPDIR to a writable directory"
            ) from None
        yield descriptors


def _nameless_file() -> BinaryIO:
    if sys.platform == "linux":
        with suppress(OSError):  # a sandbox may forbid it
            return open(os.memfd_create("estimate-proxy-metrics"), "r+b", buffering=0)  # noqa: PTH123 -- it has no path
    return tempfile.TemporaryFile(buffering=0)


def vacate(descriptor: int) -> None:
    """Marks the slot of a worker that has ended: its gauges no longer count, its counters still do."""
    os.pwrite(descriptor, _ALIVE.pack(0), _ALIVE_AT)
