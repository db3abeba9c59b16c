"""Where the workers of one gateway count: a private directory of memory-mapped files.

It lasts as long as the supervisor, so that counters survive a worker that is replaced. A lock says whose it is: what a
killed supervisor has left is removed by the next one.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""In which prometheus_client looks for the directory, when it is imported."""

_PREFIX = "estimate-proxy-metrics-"


class NoMetricsDirectoryError(Exception):
    """Nothing can be counted; the message says what to do."""


@contextmanager
def metrics_directory() -> Iterator[Path]:
    """A new directory, removed behind its use. Raises `NoMetricsDirectoryError`."""
    try:
        _remove_abandoned()
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = os.open(directory / "lock.new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        (directory / "lock.new").rename(directory / "lock")  # locked before anybody could find it
    except OSError as error:
        raise NoMetricsDirectoryError(
            f"there is no writable directory for metrics ({error.strerror}): set TMPDIR to one"
        ) from None
    try:
        yield directory
    finally:
        os.close(lock)
        shutil.rmtree(directory, ignore_errors=True)


def forget_worker(directory: Path, pid: int) -> None:
    """A worker is gone: its gauges go with it, its counters stay."""
    mark_process_dead(pid, str(directory))  # type: ignore[no-untyped-call]  # prometheus_client has none here


def _remove_abandoned() -> None:
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # somebody else's, or just going away
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(lock)
