"""A private directory for unix sockets, with a path that is short enough for them.

* It is created in the first directory of these in which a socket works: `$XDG_RUNTIME_DIR`, `$RUNTIME_DIRECTORY`
  (systemd sets it for a unit with `RuntimeDirectory=`), the data directory, the directory for temporary files.
* It is locked while it is used, because systemd-tmpfiles cleans the directory for temporary files and skips locked
  directories.
* If it is removed nevertheless, `restore` creates it again at the same path.
* Its name has a prefix of its own, so that the next start can recognise and remove what a killed gateway has left.
"""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

from proxy.embedded.locks import is_own_dir, lock_dir

_PREFIX = "estimate-proxy-"
_MAX_PATH_BYTES = 103
"""`sun_path` holds 108 bytes on Linux and 104 on macOS and the BSDs, including the terminating NUL."""


class SocketDir:
    """The directory at `path`. `remove` must be called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = lock_dir(path)

    @classmethod
    def make(cls, data_dir: Path, longest_name: str) -> "SocketDir | None":
        """A new directory in which a socket of that name can be made; None if that works in none."""
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
        """Creates the directory again if it was removed. Raises `OSError`."""
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


def make_private(directory: Path) -> None:
    """Creates the directory and its missing parents, each with mode 0700. Raises `OSError`."""
    for level in (*reversed(directory.parents), directory):
        if not level.exists():
            level.mkdir(mode=0o700, exist_ok=True)


def remove_abandoned(path: object) -> None:
    """Removes the socket directory of a gateway that was killed, if `path` (from its lock file) is one."""
    if not isinstance(path, str) or not Path(path).name.startswith(_PREFIX):
        return
    with suppress(OSError, ValueError):
        if is_own_dir(os.lstat(path)):
            _remove(Path(path))


def _parents(data_dir: Path) -> Iterator[Path]:
    login_dir = os.environ.get("XDG_RUNTIME_DIR", "")
    unit_dir = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]  # systemd separates several by colons
    for folder in map(Path, (login_dir, unit_dir)):
        with suppress(OSError):
            if folder.is_absolute() and is_own_dir(folder.stat()):
                yield folder
    yield data_dir
    with suppress(FileNotFoundError):
        yield Path(tempfile.gettempdir())
    yield Path("/tmp")  # noqa: S108 -- mkdtemp makes a directory in it, with mode 0700


def _remove(directory: Path) -> None:
    """Removes sockets, then the directory if it is empty: a wrong path in the lock file cannot cost data."""
    with suppress(OSError):
        for entry in directory.glob("*.sock"):
            entry.unlink()
        directory.rmdir()
