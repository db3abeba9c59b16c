"""A private directory for unix sockets, with a path that is short enough for them.

* It is made in the first folder that will do: `$XDG_RUNTIME_DIR`, `$RUNTIME_DIRECTORY` (systemd sets it for a unit with
  `RuntimeDirectory=`), the data directory, the folder for temporary files. In the last one cleaners are at work.
* It is locked while it is used: systemd-tmpfiles leaves alone what is in a locked directory.
* If it is removed nevertheless, `restore` makes it again, at the same path.
* Its name can be told from others, so that it can be removed after a gateway that was killed.
"""

import fcntl
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

_PREFIX = "estimate-proxy-"
_MAX_PATH_BYTES = 103
"""`sun_path` holds 108 bytes on Linux, 104 on macOS and the BSDs, the closing NUL among them."""


class SocketDir:
    """The directory at `path`. `remove` must be called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = lock_dir(path)

    @classmethod
    def make(cls, data_dir: Path, longest_name: str) -> "SocketDir | None":
        """A new one, in which a socket of that name can be made; None if no folder will do."""
        for parent in _parents(data_dir):
            longest = parent / f"{_PREFIX}{'x' * 8}" / longest_name  # mkdtemp appends 8 characters
            if len(os.fsencode(longest)) <= _MAX_PATH_BYTES:
                with suppress(OSError):
                    return cls._make_in(parent, longest_name)
        return None

    @classmethod
    def _make_in(cls, parent: Path, name: str) -> "SocketDir":
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            with closing(socket.socket(socket.AF_UNIX)) as tried:  # some file systems have no sockets
                tried.bind(str(path / name))
            (path / name).unlink()
            return cls(path)
        except OSError:
            path.rmdir()
            raise

    def restore(self) -> None:
        """Makes the directory again if it was removed. Raises `OSError`."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(self.path), os.fstat(self._fd)):
                return
        make_private(self.path)
        fd = lock_dir(self.path)
        os.close(self._fd)
        self._fd = fd

    def remove(self) -> None:
        os.close(self._fd)
        _remove(self.path)


def lock_dir(path: Path) -> int:
    """Locks a private directory of ours, so that systemd-tmpfiles leaves alone what is in it.

    Returns its descriptor, which holds the lock until it is closed. Raises `OSError`, also where the directory is
    somebody else's, open to others, or a link.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not _is_ours(found) or found.st_mode & 0o077:
            raise PermissionError(f"{path} is open to others")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def make_private(directory: Path) -> None:
    """Makes the directory and its missing parents, each with mode 0700. Raises `OSError`."""
    for level in (*reversed(directory.parents), directory):
        if not level.exists():
            level.mkdir(mode=0o700, exist_ok=True)


def remove_abandoned(named: object) -> None:
    """Removes what a killed gateway has left, if what its lock file names is a directory of ours."""
    if not isinstance(named, str) or not Path(named).name.startswith(_PREFIX):
        return
    with suppress(OSError, ValueError):
        if _is_ours(os.lstat(named)):
            _remove(Path(named))


def _parents(data_dir: Path) -> Iterator[Path]:
    of_login = os.environ.get("XDG_RUNTIME_DIR", "")
    of_unit = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]  # systemd joins several by colons
    for folder in map(Path, (of_login, of_unit)):
        with suppress(OSError):
            if folder.is_absolute() and _is_ours(folder.stat()):
                yield folder
    yield data_dir
    with suppress(FileNotFoundError):
        yield Path(tempfile.gettempdir())
    yield Path("/tmp")  # noqa: S108 -- only the parent of what mkdtemp makes, with mode 0700


def _is_ours(found: os.stat_result) -> bool:
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _remove(directory: Path) -> None:
    """Removes sockets, then the directory if nothing else is in it: a wrong name costs no data."""
    with suppress(OSError):
        for entry in directory.glob("*.sock"):
            entry.unlink()
        directory.rmdir()
