"""Writes log lines from a bounded queue in a thread, so that a blocked reader of the log does not block the process.

* `write` never waits. If `MAX_LINES` lines are queued, further lines are dropped until the queue is empty. So the
  dropped lines are missing in one place, where one line reports their number.
* If a write fails (a closed pipe, a full disk), the queued lines are dropped too. The line that reports it is tried
  once a second.
* Lines are encoded in batches: encoding one between the other work of a request takes twice as long.
* Processes that share a pipe do not mix their lines: each write has whole lines and at most PIPE_BUF bytes, which a
  pipe takes in one piece (POSIX). Only a line that is longer itself, such as a traceback, could be split.
* The descriptor stays in blocking mode: O_NONBLOCK would apply to all processes that have inherited it.
"""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Generic, TypeVar

MAX_LINES = 10_000
"""Limits memory: about 6 MB of request lines, which one busy core logs in half a second."""

PAUSE_S = 0.05
"""Pause after the queue was emptied, in which lines are collected: a wake-up costs more than a line."""

RETRY_S = 1.0
"""Time between two attempts after a write has failed."""

_Line = TypeVar("_Line")


class LogWriter(Generic[_Line]):
    """Writes lines to `fd`, in the order of `write`.

    encode: returns the bytes of a line, with a newline. Lines that are bytes already are written unchanged.
    report: returns the line that reports the number of dropped lines.
    """

    def __init__(self, fd: int, encode: Callable[[_Line], bytes], report: Callable[[int], _Line]) -> None:
        self._fd = fd
        self._encode = encode
        self._report_line = report
        self._lock = threading.RLock()  # a signal handler or finalizer may log while its own thread holds the lock
        self._changed = threading.Condition(self._lock)
        self._queue: deque[_Line | bytes] = deque()
        self._idle = True
        self._unreported = 0
        """Dropped lines that have not been reported. Until they are, all further lines are dropped."""
        self._dropped = 0
        """Lines dropped since `take_dropped` was last called."""
        self._encoded: list[bytes] = []
        """The first line of the next write, if it did not fit into the last one."""
        self._is_split = False
        """Whether the last write ended within a line."""
        threading.Thread(target=self._run, name="log-writer", daemon=True).start()

    def write(self, line: _Line | bytes) -> None:
        """Queues a line, or drops it. The line must not be changed afterwards."""
        with self._lock:
            if self._unreported or len(self._queue) >= MAX_LINES:
                self._drop(1)
                return
            self._queue.append(line)
            if self._idle:
                self._idle = False
                self._changed.notify_all()

    def take_dropped(self) -> int:
        """The number of lines dropped since the last call."""
        with self._lock:
            dropped, self._dropped = self._dropped, 0
            return dropped

    def flush(self, timeout_s: float) -> None:
        """Waits until all lines are written or dropped, for at most `timeout_s`."""
        with self._lock:
            self._changed.wait_for(lambda: self._idle, timeout_s)

    def _drop(self, count: int) -> None:
        self._unreported += count
        self._dropped += count

    def _run(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(lambda: not self._idle, RETRY_S if self._unreported else None)
            while self._write_next():
                pass
            time.sleep(PAUSE_S)

    def _write_next(self) -> bool:
        """Writes the next lines, or if there are none, the report of dropped ones.

        Returns False if there is nothing to write, or the write failed.
        """
        reported = 0
        lines = self._next_lines()
        if not lines:
            with self._lock:
                if not self._unreported and not self._queue:
                    self._become_idle()
                    return False
                reported, self._unreported = self._unreported, 0
            lines = [self._encode(self._report_line(reported))] if reported else []
        lost = self._write_lines(lines)
        if lost:
            with self._lock:
                self._unreported += reported
                self._drop(len(self._queue) + len(self._encoded) + (0 if reported else lost))
                self._queue.clear()
                self._encoded.clear()
                self._become_idle()
        return not lost

    def _become_idle(self) -> None:
        self._idle = True
        self._changed.notify_all()

    def _next_lines(self) -> list[bytes]:
        """The lines of the next write, encoded."""
        lines, self._encoded = self._encoded, []
        size = sum(map(len, lines))
        while self._queue:
            line = self._queue.popleft()
            try:
                encoded = line if isinstance(line, bytes) else self._encode(line)
            except Exception:  # noqa: BLE001 -- a line that cannot be encoded must not end the thread
                with self._lock:
                    self._drop(1)
                continue
            size += len(encoded)
            if lines and size > select.PIPE_BUF:
                self._encoded.append(encoded)
                break
            lines.append(encoded)
        return lines

    def _write_lines(self, lines: Sequence[bytes]) -> int:
        """Writes the lines. Returns the number of lines that were not written completely."""
        data = b"".join(lines)
        written = 0
        with suppress(OSError):
            if self._is_split:
                _write_some(self._fd, b"\n")
                self._is_split = False
            while written < len(data):
                written += _write_some(self._fd, data[written:])
        if 0 < written < len(data):
            self._is_split = data[written - 1] != ord("\n")
        if written == len(data):
            return 0
        return sum(end > written for end in accumulate(map(len, lines)))


def _write_some(fd: int, data: bytes) -> int:
    try:
        return os.write(fd, data)
    except BlockingIOError:  # another process has set O_NONBLOCK on the shared descriptor
        select.select([], [fd], [])
        return 0
