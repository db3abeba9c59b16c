"""The command line in this process, in an empty folder and without settings in the environment, also on a terminal."""

import os
import pty
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pytest
from click.testing import CliRunner, Result

from proxy.cli.commands import main
from proxy.quota.counters import LedgerKeys
from proxy.settings import loader

CANARY = "CaNaRy5Xq"
DIGEST = "sha256:" + "a" * 64
CONFIG = f'[accounts.default]\napi_key = "{CANARY}"\n[teams.design]\ntokens = ["{DIGEST}"]\n'
BODY = b'[{"b": 7.0, "a": "\\u00e9"}]'
Run = Callable[..., Result]
LEDGER = LedgerKeys("default")


@pytest.fixture
def empty_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("ESTIMATE_PROXY_", "RENDERNET_", "REDIS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(loader, "DEFAULT_PATHS", loader.DEFAULT_PATHS[:1])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run() -> Run:
    """Runs a command line in this process, and asserts that no exception is raised."""

    def invoke(*args: str, stdin: bytes = b"", **environ: str) -> Result:
        result = CliRunner(catch_exceptions=False).invoke(
            main, args, input=stdin, env=environ, prog_name="estimate-proxy"
        )
        assert "Traceback" not in result.output
        return result

    return invoke


def refusal(result: Result) -> str:
    """Returns the one line that says why a command line was refused."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("estimate-proxy: ")
    return result.stderr.removeprefix("estimate-proxy: ").rstrip("\n")


def on_terminal(*args: str, columns: int = 300) -> str:
    """Returns the output of a command line in this process on a terminal."""
    ours, theirs = pty.openpty()
    with (
        ThreadPoolExecutor(1) as pool,
        os.fdopen(ours, "rb", buffering=0) as screen,
        os.fdopen(theirs, "w", encoding="utf-8") as terminal,
        pytest.MonkeyPatch.context() as patch,
    ):
        shown = pool.submit(_all_of, screen)
        for name, value in (("COLUMNS", str(columns)), ("TERM", "xterm")):
            patch.setenv(name, value)
        patch.setattr(sys, "stdout", terminal)
        with pytest.raises(SystemExit, match=r"^0$"):
            main(args, prog_name="estimate-proxy")
        terminal.close()
        return re.sub(r"\x1b\[[0-9;]*m", "", shown.result().decode())


def _all_of(screen: BinaryIO) -> bytes:
    shown = b""
    with suppress(OSError):  # Linux: the other end of the terminal is closed
        while more := screen.read(65536):
            shown += more
    return shown


def printed(result: Result) -> str:
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def fields(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]
