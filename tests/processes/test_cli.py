"""The command line as a process: entry points, bytes of arguments and of output, a closed pipe."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import BODY, CANARY, Run, refusal
from configs import MINIMAL
from serving import free_port

pytestmark = pytest.mark.usefixtures("empty_environment")

PROGRAMS = [str(Path(sys.executable).with_name("estimate-proxy"))], [sys.executable, "-m", "proxy"]


def process(*command: str, stdin: bytes = b"", **environ: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, input=stdin, capture_output=True, env={**os.environ, **environ}, check=False)


def test_both_entry_points_are_the_same_program() -> None:
    Path("body.json").write_bytes(BODY)
    for args in (["--help"], ["explain", "body.json"], ["bogus"]):
        one, other = (process(*program, *args) for program in PROGRAMS)
        assert one.returncode == other.returncode
        assert one.stdout == other.stdout.replace(b"python -m proxy", b"estimate-proxy")
        assert one.stderr == other.stderr.replace(b"python -m proxy", b"estimate-proxy")
        assert b"Traceback" not in one.stderr


def test_check_of_a_broken_file_as_a_process() -> None:
    Path("estimate-proxy.toml").write_text(f'[accounts.default]\napi_key = "{CANARY}\n')
    done = process(*PROGRAMS[0], "check")
    assert (done.returncode, done.stdout) == (2, b"")
    assert re.fullmatch(
        rb"estimate-proxy: estimate-proxy\.toml is not valid TOML: .*\(at line 2, column \d+\)\n", done.stderr
    )


def test_a_bad_body_on_standard_input_is_one_line() -> None:
    done = process(*PROGRAMS[0], "explain", "-", stdin=b"[]")
    error = b"estimate-proxy: <stdin>: The body must be a JSON array of one or more generation objects.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", error)


@pytest.mark.parametrize("command", [["purge", "--all"], ["learned", "forget", "--all"], ["usage"]])
def test_an_unreachable_store_is_one_line(command: list[str]) -> None:
    """As a process: in the process of the tests, others take the lines of the log."""
    Path("estimate-proxy.toml").write_text(f'{MINIMAL}[store]\nurl = "redis://127.0.0.1:{free_port()}"\n')
    done = process(*PROGRAMS[0], *command)
    assert (done.returncode, done.stdout) == (2, b"")
    assert re.fullmatch(rb"estimate-proxy: the store is unreachable.*\n", done.stderr), done.stderr


def test_arguments_that_are_not_utf_8_or_very_long(run: Run) -> None:
    program = PROGRAMS[0]
    odd = process(*program, "explain", "-", "--query", "a=\udcff", stdin=BODY)
    assert (odd.returncode, odd.stderr) == (0, b"")
    long = run("explain", "-", "--query", "a" * 100_000, stdin=BODY)
    assert long.exit_code == 0
    assert odd.stdout != long.stdout_bytes
    narrow = process(*program, "explain", "-", stdin=BODY, PYTHONIOENCODING="latin-1")
    assert narrow.stdout.startswith('body  [{"a":"é"'.encode()), "the exact bytes, in any encoding of the terminal"
    assert process(*program, "check", "--config", "\udcff.toml").returncode == 2
    assert refusal(run("check", "--config", "x" * 5000)).endswith(" cannot be read: File name too long")


def test_a_closed_pipe_ends_quietly() -> None:
    body = json.dumps([{"a": "x" * 200_000}]).encode()
    Path("body.json").write_bytes(body)
    with subprocess.Popen(
        [*PROGRAMS[0], "explain", "body.json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
