"""Log lines: JSON for machines, text on a terminal, the same facts in both.

Only this project's loggers follow the configured level. Libraries are heard from `warning` on: at debug level some
of them would print headers, and a header may be a secret.
"""

import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

import orjson

OURS = "proxy"


def configure(level: str, style: str, stream: TextIO | None = None) -> None:
    """Sends this process's log lines to `stream`, or else to standard error.

    `style` is `json`, `text`, or `auto`: text on a terminal.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    text = style == "text" or (style == "auto" and handler.stream.isatty())
    handler.setFormatter(_TextFormatter() if text else _JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(OURS).setLevel(level.upper())
    logging.captureWarnings(capture=True)


def event(logger: logging.Logger, level: int, message: str, facts: Mapping[str, Any]) -> None:
    """One line with named facts beside its message."""
    logger.log(level, message, extra={"facts": facts})


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # orjson writes no lone surrogates and no integers beyond 64 bits
            return json.dumps(line, default=str)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        facts = "".join(f" {name}={_on_one_line(str(value))}" for name, value in _facts(record).items())
        line = f"{clock} {record.levelname.lower():7} {_on_one_line(record.getMessage())}{facts}"
        if record.exc_info:
            line += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return line


def _on_one_line(text: str) -> str:
    """A text from elsewhere must not look like a line of ours, nor steer the terminal."""
    return text if text.isprintable() else repr(text)[1:-1]


def _facts(record: logging.LogRecord) -> Mapping[str, Any]:
    facts: Mapping[str, Any] = getattr(record, "facts", {})
    return facts
