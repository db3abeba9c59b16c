"""Configures logging: JSON lines for machines, or text on a terminal, with the same content.

* Only this project's loggers follow the configured level. Libraries log from `warning` on: at debug level some of them
  log headers, which may contain secrets.
* All lines go through the queue of `proxy.telemetry.log_writer`, and so does everything else on stderr: warnings,
  tracebacks, errors of the command line. The process waits for the reader of stderr only at exit, for `FLUSH_S`.
"""

import atexit
import io
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import orjson

from proxy.telemetry.log_writer import LogWriter

OURS = "proxy"

STDERR = 2

FLUSH_S = 1.0
"""Limits the wait for the last lines at exit."""

_Line = tuple[float, int, str, Mapping[str, Any], str | None]
"""Unix time, level, message, facts and traceback."""

Writer = LogWriter[_Line]


def configure(level: str, style: str, fd: int = STDERR) -> Writer:
    """Sends the log lines of this process, and its output to `sys.stderr`, to `fd`.

    style: `json`, `text`, or `auto`, which is text on a terminal and else JSON.
    """
    _open_standard_error()
    text = style == "text" or (style == "auto" and os.isatty(fd))
    handler = _Handler(fd, _text_of if text else _json_of)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(OURS).setLevel(level.upper())
    logging.captureWarnings(capture=True)
    sys.stderr = io.TextIOWrapper(_Printed(handler.writer), "utf-8", "backslashreplace", line_buffering=True)
    atexit.register(handler.writer.flush, FLUSH_S)
    return handler.writer


def event(logger: logging.Logger, level: int, message: str, facts: Mapping[str, Any]) -> None:
    """Logs a message with named facts. The facts must not be changed afterwards.

    If lines go only to the queue, no LogRecord is made, because making one is slower than writing the line.
    """
    if not logger.isEnabledFor(level):
        return
    match logging.root.handlers:
        case [_Handler() as handler]:
            handler.writer.write((time.time(), level, message, facts, None))
        case _:
            logger.log(level, message, extra={"facts": facts})


class _Handler(logging.Handler):
    def __init__(self, fd: int, encode: Callable[[_Line], bytes]) -> None:
        super().__init__()
        self.writer: Writer = LogWriter(fd, encode, _report)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
            exception = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else None
        except Exception:  # noqa: BLE001 -- as in each handler of logging: a bad record must not fail its caller
            self.handleError(record)
        else:
            self.writer.write((record.created, record.levelno, message, getattr(record, "facts", {}), exception))


def _report(count: int) -> _Line:
    message = "log lines are missing here: standard error did not take them"
    return time.time(), logging.ERROR, message, {"lines": count}, None


class _Printed(io.RawIOBase):
    """A stream whose data goes into the queue."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._writer.write(bytes(data))
        return len(data)


def _open_standard_error() -> None:
    """Opens /dev/null as stderr if that is closed. Otherwise the next file would get its number, and the log lines."""
    if sys.stderr is None:
        while os.open(os.devnull, os.O_RDWR) < STDERR:
            pass


def _json_of(line: _Line) -> bytes:
    created, level, message, facts, exception = line
    tree = {"time": _timestamp(int(created * 1000)), "level": _name_of(level), "message": message, **facts}
    if exception is not None:
        tree["exception"] = exception
    try:
        return orjson.dumps(tree, default=str, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # orjson refuses lone surrogates and integers beyond 64 bits
        return json.dumps(tree, default=str).encode() + b"\n"


def _text_of(line: _Line) -> bytes:
    created, level, message, facts, exception = line
    clock = time.strftime("%H:%M:%S", time.localtime(created))
    shown = "".join(f" {name}={_on_one_line(str(value))}" for name, value in facts.items())
    text = f"{clock} {_name_of(level):7} {_on_one_line(message)}{shown}\n"
    if exception is not None:
        text += exception.rstrip() + "\n"
    return text.encode(errors="backslashreplace")


@lru_cache(maxsize=1)  # lines of one millisecond
def _timestamp(epoch_ms: int) -> str:
    """RFC 3339 in UTC."""
    return datetime.fromtimestamp(epoch_ms / 1000, UTC).isoformat(timespec="milliseconds")


@lru_cache
def _name_of(level: int) -> str:
    return logging.getLevelName(level).lower()


def _on_one_line(text: str) -> str:
    """Escapes line breaks and control characters, so that a value cannot fake a log line or control the terminal."""
    return text if text.isprintable() else repr(text)[1:-1]
