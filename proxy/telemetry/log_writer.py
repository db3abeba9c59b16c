"""A bounded queue of log lines, and the thread that writes them: a stalled reader does not stop the process.

* `write` never waits. Once `MAX_LINES` wait, lines are dropped until all of those are written. So the lines of one gap
  are missing in one place, where one line says how many they were.
* A write that fails (a closed pipe, a full disk) drops what waits too. The line that says so is tried once a second.
* Lines are encoded in batches: among everything else that a request does, encoding one takes twice as long.
* Processes that share a pipe do not tear each other's lines: each write has whole lines, and at most PIPE_BUF bytes,
  which a pipe takes in one piece (POSIX). Only a line that is longer itself, a traceback, could be torn.
* The descriptor stays in blocking mode: O_NONBLOCK would hold for every process that has inherited it.
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
"""Some 6 MB of requests' lines: half a second of one busy core."""

PAUSE_S = 0.05
"""After the queue was empty. Lines that come meanwhile are written together: a wake-up costs more than a line."""

RETRY_S = 1.0
"""Between two attempts, once a write has failed."""

_Line = TypeVar("_Line")


class LogWriter(Generic[_Line]):
    """Writes lines to `fd`, in the order of `write`.

    encode: makes the bytes of a line, with its newline; bytes are written as they are.
    missing: makes the line that says how many are missing.
    """

    def __init__(self, fd: int, encode: Callable[[_Line], bytes], missing: Callable[[int], _Line]) -> None:
        self._fd = fd
        self._encode = encode
        self._missing_line = missing
        self._lock = threading.RLock()  # a signal handler or finalizer may log while its thread is in here
        self._changed = threading.Condition(self._lock)
        self._queue: deque[_Line | bytes] = deque()
        self._idle = True
        self._missing = 0
        """Lines dropped that no line has told of. Until one has, all others are dropped too."""
        self._dropped = 0
        """Lines dropped since `take_dropped` was last called."""
        self._encoded: list[bytes] = []
        """The first line of the next chunk, if the last chunk had no room for it."""
        self._torn = False
        """Whether the last write ended inside a line."""
        threading.Thread(target=self._run, name="log-writer", daemon=True).start()

    def write(self, line: _Line | bytes) -> None:
        """Queues a line, or drops it. It must not change any more."""
        with self._lock:
            if self._missing or len(self._queue) >= MAX_LINES:
                self._drop(1)
                return
            self._queue.append(line)
            if self._idle:
                self._idle = False
                self._changed.notify_all()

    def take_dropped(self) -> int:
        """How many lines were dropped since the last call."""
        with self._lock:
            dropped, self._dropped = self._dropped, 0
            return dropped

    def flush(self, timeout_s: float) -> None:
        """Returns when all lines are written or dropped, or the time is up."""
        with self._lock:
            self._changed.wait_for(lambda: self._idle, timeout_s)

    def _drop(self, count: int) -> None:
        self._missing += count
        self._dropped += count

    def _run(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(lambda: not self._idle, RETRY_S if self._missing else None)
            while self._write_next():
                pass
            time.sleep(PAUSE_S)

    def _write_next(self) -> bool:
        """Writes the next lines, or after the last one how many are missing. False: there are none, or it failed."""
        told = 0
        lines = self._next_lines()
        if not lines:
            with self._lock:
                if not self._missing and not self._queue:
                    self._rest()
                    return False
                told, self._missing = self._missing, 0
            lines = [self._encode(self._missing_line(told))] if told else []
        lost = self._write_lines(lines)
        if lost:
            with self._lock:
                self._missing += told
                self._drop(len(self._queue) + len(self._encoded) + (0 if told else lost))
                self._queue.clear()
                self._encoded.clear()
                self._rest()
        return not lost

    def _rest(self) -> None:
        self._idle = True
        self._changed.notify_all()

    def _next_lines(self) -> list[bytes]:
        """As many as one write takes, encoded."""
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
        """How many of them were not written as a whole."""
        data = b"".join(lines)
        written = 0
        with suppress(OSError):
            if self._torn:
                _write_some(self._fd, b"\n")
                self._torn = False
            while written < len(data):
                written += _write_some(self._fd, data[written:])
        if 0 < written < len(data):
            self._torn = data[written - 1] != ord("\n")
        if written == len(data):
            return 0
        return sum(end > written for end in accumulate(map(len, lines)))


def _write_some(fd: int, data: bytes) -> int:
    try:
        return os.write(fd, data)
    except BlockingIOError:  # another process has set O_NONBLOCK on what they share
        select.select([], [fd], [])
        return 0
