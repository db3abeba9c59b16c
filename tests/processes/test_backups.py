"""The backup and restore commands of docs/operations.md, run exactly as written, with installed programs only."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deploy_files import PROJECT
from embedded_stores import client, running
from gateway_process import GatewayProcess, GatewayRunner
from programs import program
from proxy.auth import digest_of
from quota_fixture import ADMIN
from serving import free_port, wait_until
from topologies import LOCAL, Member, program_of, server_group

OPERATIONS = (PROJECT / "docs" / "operations.md").read_text()
DATA_DIR = re.compile("^data_dir=/var/lib/estimate-proxy ", re.MULTILINE)
SYSTEM = "/usr/bin:/bin"


def blocks(heading: str) -> list[str]:
    section = re.split("^## ", OPERATIONS.partition(f"\n## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall("^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


BACKUP, RESTORE, DUMP, RESTORE_DUMP = blocks("Backups")
(PLAIN_COMMANDS,) = blocks("Another store")


def shell(script: str, folder: Path, *programs: Path, **variables: str | Path) -> None:
    """Runs a code block of the page in `folder`; the folders `programs` come first in the PATH."""
    path = ":".join(map(str, (*programs, Path(sys.executable).parent, SYSTEM)))
    env = {"PATH": path, **{name: str(value) for name, value in variables.items()}}
    done = subprocess.run(["/bin/sh", "-eu", "-c", script], cwd=folder, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done


def back_up(data_dir: Path, folder: Path, *programs: Path) -> Path:
    script, count = DATA_DIR.subn(f"data_dir='{data_dir}' ", BACKUP)
    assert count == 1
    shell(script, folder, *programs)
    (made,) = folder.glob("ledger-*")
    return made


def usage(served: GatewayProcess) -> Any:
    """Returns the usage by team, model and outcome."""
    with served.client() as asking:
        answer = asking.get("/v1/usage?by=day,team,model", headers={"x-api-key": ADMIN})
    assert answer.status_code == 200
    return answer.json()["rows"]


def start(runner: GatewayRunner, **sections: Mapping[str, Any]) -> GatewayProcess:
    return runner.start(admin={"tokens": [digest_of(ADMIN)]}, **{name: dict(of) for name, of in sections.items()})


def ask(served: GatewayProcess, times: int) -> None:
    for _ in range(times):
        assert served.ask().status_code == 200


def test_a_ledger_copied_while_running_is_restored_into_a_new_data_dir(runner: GatewayRunner, tmp_path: Path) -> None:
    first = start(runner)
    ask(first, 5)
    expected = usage(first)
    backup = back_up(runner.data_dir, tmp_path)
    ask(first, 3)
    assert usage(first) != expected
    assert first.stop() == 0
    data_dir = tmp_path / "new"
    shell(RESTORE, tmp_path, backup=backup.name, data_dir=data_dir)
    second = start(runner, store={"data_dir": str(data_dir)})
    assert usage(second) == expected
    assert not second.messages("a new ledger begins")
    ask(second, 1)
    assert usage(second) != expected
    assert second.stop() == 0


def test_a_restored_ledger_replaces_another_and_keeps_its_owner(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with running(data_dir) as stores, client(stores) as connected:
        connected.set("written", "before")
        backup = back_up(data_dir, tmp_path)
        connected.set("written", "after")
    if os.geteuid() == 0:
        os.chown(data_dir, 65534, 65534)
    shell(RESTORE, tmp_path, backup=backup.name, data_dir=data_dir)
    restored = data_dir / "ledger"
    assert {path.stat().st_uid for path in (restored, *restored.rglob("*"))} == {data_dir.stat().st_uid}
    assert (restored / "before-restore").is_dir()
    with running(data_dir) as stores, client(stores) as connected:
        assert connected.get("written") == "before"


def test_a_rewrite_during_the_copy_is_detected(tmp_path: Path) -> None:
    """Installs a `cp` that causes a rewrite of the ledger after it has copied the manifest."""
    data_dir, programs = tmp_path / "data", tmp_path / "programs"
    programs.mkdir()
    rewrite = programs / "rewrite.py"
    rewrite.write_text(REWRITE)
    (programs / "cp").write_text(
        f'#!/bin/sh\n/bin/cp "$@" || exit\ntest -e {tmp_path}/rewritten || {sys.executable} {rewrite} "$URL"\n'
        f"touch {tmp_path}/rewritten\n"
    )
    (programs / "cp").chmod(0o700)
    with running(data_dir) as stores, client(stores) as connected:
        connected.mset({str(number): "1" for number in range(100)})
        (programs / "cp").write_text((programs / "cp").read_text().replace("$URL", stores.urls["ledger"]))
        backup = back_up(data_dir, tmp_path, programs)
        live = data_dir / "ledger" / "appendonlydir"
        assert {path.name for path in backup.iterdir()} == {path.name for path in live.iterdir()}
    shell(RESTORE, tmp_path, backup=backup, data_dir=tmp_path / "new")
    with running(tmp_path / "new") as stores, client(stores) as connected:
        assert connected.dbsize() == 100


REWRITE = """
import sys, time
import redis
with redis.Redis.from_url(sys.argv[1]) as client:
    client.bgrewriteaof()
    while client.info("persistence")["aof_rewrites"] == 0 or client.info("persistence")["aof_rewrite_in_progress"]:
        time.sleep(0.01)
"""


def test_a_servers_dump_is_converted_to_an_append_only_file(tmp_path: Path) -> None:
    """Uses the programs of that server's package."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "redis-cli").symlink_to(program("redis-cli"))
    (programs / "valkey-server").symlink_to(program_of("valkey"))
    with server_group("valkey") as group:
        ledger = group.member()
        wait_until(ledger.answers)
        ledger.client.mset({str(number): "1" for number in range(100)})
        shell(DUMP, tmp_path, programs, LEDGER=f"redis://{LOCAL}:{ledger.port}")
        shell(RESTORE_DUMP.replace("7000", str(free_port())), tmp_path, programs)
        assert (tmp_path / "restored" / "appendonlydir").is_dir()
        restored = group.member("appendonly yes")
        start_again_with(restored, tmp_path / "restored" / "appendonlydir")
        assert restored.client.dbsize() == 100


def start_again_with(server: Member, files: Path) -> None:
    """Starts a server on these append-only files."""
    wait_until(server.answers)
    server.kill()
    shutil.rmtree(server.folder / "appendonlydir")
    shutil.copytree(files, server.folder / "appendonlydir")
    server.start()
    wait_until(server.answers)


@pytest.mark.parametrize("brand", ["valkey", "redis"])
def test_an_embedded_ledger_can_be_moved_to_a_server(runner: GatewayRunner, tmp_path: Path, brand: str) -> None:
    first = start(runner)
    ask(first, 5)
    expected = usage(first)
    if brand == "redis":
        programs = tmp_path / "programs"
        programs.mkdir()
        (programs / "redis-cli").symlink_to(program("redis-cli"))
        shell(PLAIN_COMMANDS, tmp_path, programs, data_dir=runner.data_dir)
    assert first.stop() == 0
    with server_group(brand) as group:
        server = group.member("appendonly yes")
        start_again_with(server, runner.data_dir / "ledger" / "appendonlydir")
        second = start(runner, store={"url": f"redis://{LOCAL}:{server.port}"})
        assert usage(second) == expected
        assert not second.messages("a new ledger begins")
        assert second.stop() == 0
