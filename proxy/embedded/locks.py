"""Locks on directories.

* `lock_dir` locks a private directory of temporary files, so that systemd-tmpfiles does not clean it.
* `DataDirLock` gives a data directory to one gateway at a time.
"""

import fcntl
import json
import os
import stat
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

_TIMEOUT_S = 3.0
"""A gateway that was killed a moment ago may not be quite gone."""
_RETRY_EVERY_S = 0.05

_LOCK_FILE = "lock"
_MAX_OWNER_BYTES = 4096


def lock_dir(path: Path) -> int:
    """Locks a private directory that belongs to this user. systemd-tmpfiles skips the contents of locked directories.

    Returns the directory's descriptor, which holds the lock until it is closed. Raises `OSError`, also if the directory
    belongs to another user, is accessible to others, or is a symbolic link.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not is_own_dir(found) or found.st_mode & 0o077:
            raise PermissionError(f"{path} is open to others")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def is_own_dir(found: os.stat_result) -> bool:
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


class LockedError(Exception):
    """Another process holds the lock. `pid` is the gateway's, or "unknown"."""

    def __init__(self, pid: object) -> None:
        super().__init__(f"locked by process {pid}")
        self.pid = pid


class DataDirLock:
    """An exclusive flock on `<data_dir>/lock`. The file names the owner: `{"pid": …, "socket_dir": …}`.

    * Child processes inherit it with `fd`, so the lock is held as long as the gateway or one of them lives.
    * It is released by closing the descriptor, never by LOCK_UN, which would release it for the children too.
    * The file is never deleted: a second process could hold a lock on the deleted one.
    """

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / _LOCK_FILE
        self.fd = -1

    def acquire(self) -> None:
        """Raises `OSError`; `LockedError` if the lock is still held after some seconds."""
        with ExitStack() as undo:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, fd)
            if not _flock_within(fd, _TIMEOUT_S):
                raise LockedError(_read_owner(fd).get("pid", "unknown"))
            undo.pop_all()
        self.fd = fd

    def read_owner(self) -> dict[str, Any]:
        """Call it only while holding the lock: what a gateway that was killed has left."""
        return _read_owner(self.fd)

    def write_owner(self, owner: dict[str, Any]) -> None:
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        if self.fd < 0:
            return
        os.ftruncate(self.fd, 0)
        os.close(self.fd)
        self.fd = -1


def socket_dir_of_running(data_dir: Path) -> Path | None:
    """The socket directory of the gateway that runs on `data_dir`, if one does."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return Path(json.loads((data_dir / _LOCK_FILE).read_bytes())["socket_dir"])
    return None


def _flock_within(fd: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_RETRY_EVERY_S)


def _read_owner(fd: int) -> dict[str, Any]:
    """The JSON object in the file; {} if there is none, as after a clean stop or an incomplete write."""
    with suppress(ValueError):
        content = json.loads(os.pread(fd, _MAX_OWNER_BYTES, 0))
        if isinstance(content, dict):
            return content
    return {}
