"""One gateway per data directory, and no orphaned stores, with real process deaths."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from embedded_stores import BOTH, LEDGER, answers, gone, running, socket_dir_of, until
from open_files import open_files
from proxy.embedded import locks
from proxy.embedded.child import die_with_parent
from proxy.embedded.socket_dir import remove_abandoned
from proxy.embedded.stores import EmbeddedStores
from proxy.embedded.valkey import EmbeddedStoreError

GATEWAY = """
import sys
from pathlib import Path
from proxy.embedded import stores as embedded
from proxy.embedded import valkey
if "--orphans" in sys.argv:
    valkey.die_with_parent = lambda parent_pid: None
stores = embedded.EmbeddedStores(Path(sys.argv[1]), ("ledger", "price-book"))
stores.start()
print(stores.urls["ledger"], *(server._child.pid for server in stores._servers.values()), flush=True)
sys.stdin.read()
stores.stop()
"""
"""A stand-in for a gateway's supervisor; it ends when its standard input is closed."""


@dataclass(frozen=True)
class Gateway:
    process: subprocess.Popen[str]
    socket_dir: Path
    servers: tuple[psutil.Process, psutil.Process]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def clean_up(self) -> None:
        self.kill()
        for server in self.servers:
            with suppress(psutil.NoSuchProcess):
                server.kill()
        shutil.rmtree(self.socket_dir, ignore_errors=True)


@contextmanager
def gateway(data_dir: Path, *options: str) -> Iterator[Gateway]:
    command = [sys.executable, "-c", GATEWAY, str(data_dir), *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url, ledger, price_book = process.stdout.readline().split()
        servers = psutil.Process(int(ledger)), psutil.Process(int(price_book))
        started = Gateway(process, Path(url.removeprefix("unix://")).parent, servers)
        try:
            yield started
        finally:
            started.clean_up()


def test_a_second_gateway_is_refused(tmp_path: Path) -> None:
    with gateway(tmp_path) as first:
        opened = open_files()
        with pytest.raises(EmbeddedStoreError) as raised:
            EmbeddedStores(tmp_path, BOTH).start()
        assert not open_files() - opened
        assert str(raised.value) == (
            f"another gateway (pid {first.process.pid}), or a Valkey server that it left behind, is using {tmp_path}: "
            "end it, or set store.data_dir to another directory"
        )
        assert not any(gone(server.pid) for server in first.servers)
        assert json.loads((tmp_path / "lock").read_text()) == {
            "pid": first.process.pid,
            "socket_dir": str(first.socket_dir),
        }


def test_a_second_gateway_is_refused_whatever_its_roles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_TIMEOUT_S", 0.2)
    with running(tmp_path, LEDGER), pytest.raises(EmbeddedStoreError, match=f"pid {os.getpid()}"):
        EmbeddedStores(tmp_path, ["price-book"]).start()
    assert not (tmp_path / "price-book").exists()


def test_a_killed_gateway_leaves_no_orphan_and_is_replaced_quickly(tmp_path: Path) -> None:
    with gateway(tmp_path) as first:
        first.kill()
        began = time.monotonic()
        with running(tmp_path, BOTH) as stores:
            assert time.monotonic() - began < 3
            assert all(answers(stores, role) for role in BOTH)
            assert all(gone(server.pid) for server in first.servers)
            assert not first.socket_dir.exists()


def test_a_killed_gateway_leaves_no_orphan_without_a_successor(tmp_path: Path) -> None:
    with gateway(tmp_path) as first:
        first.kill()
        until(lambda: all(gone(server.pid) for server in first.servers))


def test_each_store_that_outlives_its_gateway_keeps_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_TIMEOUT_S", 0.2)
    with gateway(tmp_path, "--orphans") as first:
        first.kill()
        for server in first.servers:
            with pytest.raises(EmbeddedStoreError, match="another gateway"):
                EmbeddedStores(tmp_path, BOTH).start()
            server.kill()
            until(partial(gone, server.pid))
        with running(tmp_path, BOTH) as stores:
            assert all(answers(stores, role) for role in BOTH)


def test_an_orderly_stop_leaves_nothing(tmp_path: Path) -> None:
    with gateway(tmp_path) as first:
        assert first.process.stdin is not None
        first.process.stdin.close()
        assert first.process.wait(10) == 0
        assert all(gone(server.pid) for server in first.servers)
        assert not first.socket_dir.exists()


@pytest.mark.parametrize(("pids_off", "status"), [(0, 0), (1, 1)])
def test_a_child_whose_parent_died_before_it_runs_ends(pids_off: int, status: int) -> None:
    guard = die_with_parent(os.getpid() + pids_off)
    ended = subprocess.run([sys.executable, "-c", ""], preexec_fn=guard, check=False)
    assert ended.returncode == status


def test_without_a_parent_death_signal_the_child_starts_anyway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert die_with_parent(os.getpid()) is None
    with running(tmp_path) as stores:
        assert answers(stores)


def test_only_our_own_directories_are_cleaned_up(tmp_path: Path) -> None:
    ours, foreign = tmp_path / "estimate-proxy-ours", tmp_path / "foreign"
    for directory in (ours, foreign):
        directory.mkdir()
        (directory / "price-book.sock").touch()
    link = tmp_path / "estimate-proxy-link"
    link.symlink_to(foreign)
    named: list[object] = [str(foreign), str(link), str(tmp_path / "estimate-proxy-gone"), None, 7]
    for name in named:
        remove_abandoned(name)
    assert (foreign / "price-book.sock").exists()
    remove_abandoned(str(ours))
    assert not ours.exists()


def test_a_directory_of_another_user_is_not_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "estimate-proxy-theirs"
    theirs.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: theirs.stat().st_uid + 1)
    remove_abandoned(str(theirs))
    assert theirs.exists()


def test_a_directory_with_other_files_is_kept(tmp_path: Path) -> None:
    ours = tmp_path / "estimate-proxy-ours"
    ours.mkdir()
    (ours / "notes.txt").touch()
    remove_abandoned(str(ours))
    assert (ours / "notes.txt").exists()


@pytest.mark.parametrize("content", [b"", b"{" * 1000, b"[1]", b"\xff", b'{"socket_dir": "estimate-proxy-\\u0000"}'])
def test_a_lock_file_without_an_owner_is_overwritten(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    with running(tmp_path) as stores:
        owner = {"pid": os.getpid(), "socket_dir": str(socket_dir_of(stores))}
        assert json.loads((tmp_path / "lock").read_text()) == owner
