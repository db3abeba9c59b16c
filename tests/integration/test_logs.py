"""Log lines: one per record, JSON or text, from the configured level, with warnings of libraries."""

import json
import logging
import os
import pty
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from proxy.telemetry import logs

LIBRARIES = [
    "aiohttp.client",
    "httpx2",
    "httpcore2",
    "httpcore2.http11",
    "uvicorn",
    "uvicorn.error",
    "uvicorn.access",
    "redis",
    "asyncio",
]

log = logging.getLogger("proxy.something")


WAIT_S = 5.0


@pytest.fixture(autouse=True)
def restore_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger(logs.OURS)
    handlers, levels = root.handlers[:], (root.level, ours.level)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    logging.captureWarnings(capture=False)


class Log:
    """The log lines of a configured process, read from a file."""

    def __init__(self, level: str, style: str) -> None:
        self._fd, path = tempfile.mkstemp()
        weakref.finalize(self, os.close, self._fd)
        Path(path).unlink()
        self._writer = logs.configure(level, style, self._fd)

    def getvalue(self) -> str:
        self._writer.flush(WAIT_S)
        return os.pread(self._fd, 2**20, 0).decode()


def configured(level: str = "debug", style: str = "json") -> Log:
    return Log(level, style)


def only_line(stream: Log) -> str:
    return only_line_of(stream.getvalue())


def only_line_of(text: str) -> str:
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text[:-1]


def test_a_json_line_has_time_level_message_and_facts() -> None:
    stream = configured()
    before = datetime.now(UTC)
    logs.event(log, logging.INFO, "request", {"team": "design", "ms": 1.5, "outcome": None, "status": 200})
    line = json.loads(only_line(stream))
    written = datetime.fromisoformat(line.pop("time"))
    assert written.tzinfo is not None
    assert abs((written - before).total_seconds()) < 5
    assert line == {
        "level": "info",
        "message": "request",
        "team": "design",
        "ms": 1.5,
        "outcome": None,
        "status": 200,
    }


ODD_TEXTS = [
    "two\nlines",
    "\r\n",
    "tab\tand \x00 \x1b[31m",
    "é😀",
    "line\u2028separator",
    "\ud800 alone",
    '"quoted" \\',
]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_json_record_is_one_line_whatever_its_text(text: str) -> None:
    stream = configured()
    logs.event(log, logging.WARNING, text, {"fact": text})
    line = json.loads(only_line(stream))
    assert (line["message"], line["fact"]) == (text, text)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_text_record_is_one_line_whatever_its_text(text: str) -> None:
    stream = configured(style="text")
    logs.event(log, logging.WARNING, text, {"fact": text})
    line = only_line(stream)
    assert line.isprintable()
    assert " warning " in line
    assert " fact=" in line


def test_facts_of_any_type_are_written() -> None:
    stream = configured()
    logs.event(
        log,
        logging.INFO,
        "m",
        {"big": 2**70, "path": ValueError("x"), "list": (1, 2), "when": datetime(2027, 1, 1, tzinfo=UTC)},
    )
    line = json.loads(only_line(stream))
    assert line["big"] == 2**70
    assert line["path"] == "x"
    assert line["list"] == [1, 2]
    assert line["when"].startswith("2027-01-01")


def raised(message: str) -> ValueError:
    with pytest.raises(ValueError, match=message) as caught:
        raise ValueError(message)
    return caught.value


def test_an_exception_is_in_its_line() -> None:
    stream = configured()
    log.error("it failed", exc_info=raised("first\nsecond"))
    line = json.loads(only_line(stream))
    assert (line["level"], line["message"]) == ("error", "it failed")
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["exception"].endswith("ValueError: first\nsecond\n")


def test_text_format_has_the_traceback_after_the_line() -> None:
    stream = configured(style="text")
    log.error("it failed", exc_info=raised("why"))
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("error   it failed")
    assert rest[0].startswith("Traceback")
    assert rest[-1] == "ValueError: why"


def test_text_format_has_local_time_level_and_facts() -> None:
    stream = configured(style="text")
    logs.event(log, logging.INFO, "request", {"team": "design", "ms": 1.5})
    clock, level, rest = only_line(stream).split(maxsplit=2)
    assert datetime.strptime(clock, "%H:%M:%S")  # noqa: DTZ007 -- a clock's time alone
    assert (level, rest) == ("info", "request team=design ms=1.5")


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    ours, theirs = os.pipe()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize(
    ("style", "target", "text"),
    [("auto", terminal, True), ("auto", pipe, False), ("text", pipe, True), ("json", terminal, False)],
)
def test_auto_format_is_text_only_on_a_terminal(style: str, target: Any, text: bool) -> None:  # noqa: FBT001 -- a parameter of the test
    with target() as (ours, theirs):
        writer = logs.configure("debug", style, theirs)
        log.info("hello")
        writer.flush(WAIT_S)
        assert os.read(ours, 4096).startswith(b"{") != text


@pytest.mark.parametrize(
    ("level", "logged"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_our_loggers_follow_the_level(level: str, logged: list[str]) -> None:
    stream = configured(level)
    for name in ("debug", "info", "warning", "error"):
        getattr(log, name)("x")
    assert [json.loads(line)["level"] for line in stream.getvalue().splitlines()] == logged


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_log_from_warning_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At debug level some of them print headers, and a header may be a secret."""
    stream = configured("debug")
    library = logging.getLogger(name)
    monkeypatch.setattr(library, "propagate", True)  # a server in another test may have silenced one
    library.debug("header: secret")
    library.info("header: secret")
    assert stream.getvalue() == ""
    library.warning("trouble")
    assert json.loads(only_line(stream))["message"] == "trouble"


def test_configuring_again_replaces_the_handler() -> None:
    first = configured("debug")
    second = configured("error", "text")
    log.info("quiet")
    log.error("once")
    assert first.getvalue() == ""
    assert only_line(second).endswith(" once")
    assert len(logging.getLogger().handlers) == 1


def test_warnings_become_lines() -> None:
    stream = configured()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn("old ways", DeprecationWarning, stacklevel=1)
    assert "DeprecationWarning: old ways" in json.loads(only_line(stream))["message"]


PROGRAM = """
import logging, warnings
from proxy.telemetry import logs
logs.configure("info", "auto")
logging.getLogger("proxy.x").info("hello")
logging.getLogger("proxy.x").debug("too low")
logging.getLogger("httpx2").info("too low")
warnings.warn("careful")
"""


def test_a_process_logs_to_standard_error() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True, text=True)
    assert done.stdout == ""
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["info", "warning"]
    assert lines[0]["message"] == "hello"


def test_a_process_logs_text_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=theirs) as child:
        os.close(theirs)
        shown = os.read(ours, 4096).decode()
        child.wait()
    os.close(ours)
    assert shown.splitlines()[0].endswith(" info    hello")


PRINTS = """
import logging, sys, threading
from proxy.telemetry import logs
logs.configure("info", "json")
print("printed", file=sys.stderr)
logging.getLogger("somebody").error("%d", "no number")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
logging.getLogger("proxy.x").info("before the crash")
raise RuntimeError("the reason")
"""


def test_output_before_a_crash_is_not_lost() -> None:
    done = subprocess.run([sys.executable, "-c", PRINTS], capture_output=True, check=False, text=True)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == "printed"
    assert "--- Logging error ---" in lines
    assert "ZeroDivisionError: division by zero" in lines
    assert json.loads(lines[-4])["message"] == "before the crash"
    assert lines[-3:] == [
        "Traceback (most recent call last):",
        '  File "<string>", line 11, in <module>',
        "RuntimeError: the reason",
    ]


def test_an_event_is_a_record_for_other_handlers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "proxy"):
        logs.event(log, logging.INFO, "request", {"team": "design"})
        logs.event(log, logging.DEBUG, "too low", {})
    (record,) = caplog.records
    assert (record.getMessage(), record.__dict__["facts"]) == ("request", {"team": "design"})


def test_lines_go_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    writer = logs.configure("info", "json")
    log.info("hello")
    writer.flush(WAIT_S)
    assert json.loads(capfd.readouterr().err)["message"] == "hello"
