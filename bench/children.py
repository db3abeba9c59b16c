"""Processes of the bench: pinned to cores, each in its own session, and always ended by their pid."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from bench.machine import ROOT, on
from proxy.embedded.child import die_with_parent

READY_S = 20.0
_END_S = 5.0
_TAIL_BYTES = 2000


class BenchError(Exception):
    """The bench cannot continue; the message is one line."""


class Child:
    """A process with its log. Its CPU time includes its children's."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    def family(self) -> list[psutil.Process]:
        """Returns the process and its children, the oldest first."""
        own = psutil.Process(self.pid)
        return [own, *sorted(own.children(recursive=True), key=lambda child: child.create_time())]

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Raises `BenchError` if the process ends or is not ready in time."""
        deadline = time.monotonic() + READY_S
        while not ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{self.name} did not start: {self.log_tail()}")
            time.sleep(0.02)

    def log_tail(self) -> str:
        text = self._log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        return " | ".join(line.strip() for line in text.splitlines()[-3:]) or "its log is empty"

    def end(self) -> None:
        """Ends the process and its children."""
        with suppress(psutil.NoSuchProcess):
            family = self.family()
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
        self._process.wait()


@contextmanager
def running(
    name: str, command: Sequence[str], folder: Path, cores: frozenset[int], *, fds: Sequence[int] = ()
) -> Iterator[Child]:
    """Starts `command` on `cores`, with its output in a file in `folder`."""
    log = folder / f"{name.replace(' ', '-')}.log"
    with on(cores), log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            cwd=ROOT,
            env=environment(),
            pass_fds=fds,
            start_new_session=True,  # Ctrl-C is the bench's own to handle
            preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509 -- no threads here
        )
    child = Child(name, process, log)
    try:
        yield child
    finally:
        child.end()


def module(name: str, *args: object) -> list[str]:
    """Returns the command that runs a module of the bench or the gateway."""
    return [sys.executable, "-m", name, *map(str, args)]


def environment() -> dict[str, str]:
    """Returns the environment of children: without variables that configure a gateway, with this folder's modules."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"}
