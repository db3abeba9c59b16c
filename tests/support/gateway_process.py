"""Gateways as an operator runs them: `serve` processes with their children, ended by their pids."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import psutil

from gateway_fixture import API_KEY, DESIGN, MARKETING, PATH, PLENTY, RETIRED
from proxy.auth import digest_of
from proxy.settings.loader import PREFIX, WELL_KNOWN_ENV
from proxy.store.access import Role
from serving import NO_TLS, wait_until

SOON_S = 5.0
"""Of an exit that waits for nothing, on a machine that has other things to do."""

START_S = 20.0
"""Until a gateway serves, on a machine that has other things to do."""

GONE_S = 5.0
"""Until nothing is left of a gateway that was killed."""

Tree = dict[str, Any]


class GatewayProcess:
    """One `serve` process that writes its log lines, and whatever else it says, into `log`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log
        self.url = ""
        self._children: set[psutil.Process] = set()

    def lines(self) -> list[Tree]:
        """The log so far; what is no JSON stands under `message`."""
        return [_parse(line) for line in self.log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def messages(self, text: str) -> list[str]:
        """The messages so far that have `text` in them."""
        return [line["message"] for line in self.lines() if text in line["message"]]

    def wait_for_message(self, text: str, *, times: int = 1) -> str:
        """The newest message with `text` in it, once there are so many."""
        wait_until(lambda: self.process.poll() is not None or len(self.messages(text)) >= times, within_s=START_S)
        found = self.messages(text)
        assert len(found) >= times, f"the log does not have {text!r} {times} times:\n{self.log.read_text()}"
        return found[-1]

    def wait_until_serving(self, *, times: int = 1) -> None:
        self.url = self.wait_for_message("serving on ", times=times).partition("serving on ")[2].split()[0]

    def client(self) -> httpx2.Client:
        """A client of the team `design` that keeps its connections."""
        headers = {"x-api-key": DESIGN, "content-type": "application/json"}
        return httpx2.Client(base_url=self.url, trust_env=False, verify=NO_TLS, headers=headers, timeout=15)

    def ask(self, content: bytes = b'[{"model":"Flux"}]', **headers: str) -> httpx2.Response:
        """An estimate on a connection of its own, asked by `design` unless `headers` say otherwise."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with self.client() as client:
            return client.post(PATH, content=content, headers=named)

    def get(self, path: str) -> httpx2.Response:
        with self.client() as client:
            return client.get(path)

    def children(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid).children()
            self._children.update(found)
            return found
        return []

    def worker(self) -> psutil.Process:
        return self._child("proxy.processes.worker")

    def workers(self) -> list[psutil.Process]:
        """The oldest first."""
        found = [child for child in self.children() if "proxy.processes.worker" in child.cmdline()]
        return sorted(found, key=lambda child: child.create_time())

    def store(self, role: Role) -> psutil.Process:
        """The embedded store; its command line names its socket, before and after it has changed its title."""
        return self._child(f"/{role}.sock")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """The exit status after SIGTERM."""
        self.send(signal.SIGTERM)
        return self.exit_status(within_s=SOON_S)

    def exit_status(self, *, within_s: float = START_S) -> int:
        """The exit status; by then nothing that it started may be left."""
        self.children()
        status = self.process.wait(within_s)
        assert not [child for child in self._children if lives(child)]
        return status

    def end(self) -> None:
        """Whatever became of it: nothing of it is left afterwards."""
        self.children()
        self.process.kill()
        self.process.wait()
        for child in self._children:
            with suppress(psutil.NoSuchProcess):
                child.kill()

    def _child(self, word: str) -> psutil.Process:
        (found,) = (child for child in self.children() if any(word in part for part in child.cmdline()))
        return found


class GatewayRunner:
    """Starts the gateways of one test. They share a config, a data directory, and a directory for sockets."""

    def __init__(self, folder: Path, runtime: Path, upstream_url: str) -> None:
        self.folder = folder
        self.runtime = runtime
        self.data_dir = folder / "data"
        self.upstream_url = upstream_url
        self._started: list[GatewayProcess] = []

    def config(self, **sections: Tree) -> Path:
        """A config file of two teams and a disabled one, with `sections` laid over it."""
        tree: Tree = {
            "server": {"drain_delay_s": 0},
            "upstream": {"base_url": self.upstream_url, "timeout_s": 10},
            "accounts": {"default": {"api_key": API_KEY}},
            "store": {"data_dir": str(self.data_dir)},
            "team_defaults": {"rate": PLENTY},
            "teams": {
                "design": {"tokens": [digest_of(DESIGN)]},
                "marketing": {"tokens": [digest_of(MARKETING)]},
                "retired": {"tokens": [digest_of(RETIRED)], "disabled": True},
            },
            "log": {"format": "json"},
        }
        for name, section in sections.items():
            tree[name] = {**tree.get(name, {}), **section}
        path = self.folder / "estimate-proxy.toml"
        path.write_text("".join(_toml(tree)), encoding="utf-8")
        return path

    def environment(self, **variables: str) -> dict[str, str]:
        """The environment of this process, without what would configure a gateway."""
        inherited = {name: value for name, value in os.environ.items() if not _configures(name)}
        return {**inherited, "XDG_RUNTIME_DIR": str(self.runtime), **variables}

    def patching(self, constants: Mapping[str, float]) -> dict[str, str]:
        """For `env` of `begin`: values of constants of modules, by their full names, in the gateway's processes."""
        modules = {name.rpartition(".")[0] for name in constants}
        lines = [f"import {module}" for module in modules] + [f"{name} = {constants[name]}" for name in constants]
        (self.folder / "sitecustomize.py").write_text("\n".join(lines))
        return {"PYTHONPATH": str(self.folder)}

    def begin(
        self,
        *options: str,
        command: Sequence[str] = (sys.executable, "-m", "proxy"),
        env: Mapping[str, str] | None = None,
        stderr: int | None = None,
        **sections: Tree,
    ) -> GatewayProcess:
        """Starts a gateway, and does not wait for it. `command` is how the program is called.

        stderr: standard error, where that is not its log.
        """
        config = self.config(**sections)
        log = self.folder / f"{len(self._started)}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*command, "serve", "--config", str(config), "--port", "0", *options],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream if stderr is None else stderr,
                cwd=self.folder,
                env=self.environment(**(env or {})),
            )
        served = GatewayProcess(process, log)
        self._started.append(served)
        return served

    def start(self, *options: str, **how: Any) -> GatewayProcess:
        """A gateway that serves; `begin` has the parameters."""
        served = self.begin(*options, **how)
        served.wait_until_serving()
        return served

    def refused(self, *options: str) -> str:
        """What `serve` says when it does not even begin: one line, and exit status 2."""
        served = self.begin(*options)
        assert served.exit_status() == 2, served.log.read_text()
        (line,) = served.log.read_text().splitlines()
        return line

    def end(self) -> None:
        for served in self._started:
            served.end()


@contextmanager
def gateway_runner(folder: Path, upstream_url: str) -> Iterator[GatewayRunner]:
    with tempfile.TemporaryDirectory(prefix="ep-run-") as runtime:
        opened = GatewayRunner(folder, Path(runtime), upstream_url)
        try:
            yield opened
        finally:
            opened.end()


def lives(process: psutil.Process) -> bool:
    """Whether it still runs or could; whoever inherits an orphan may be slow to collect it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(*processes: psutil.Process) -> None:
    wait_until(lambda: not any(map(lives, processes)), within_s=GONE_S)


def kill(process: psutil.Process) -> None:
    """Ends it by force; returns when it has ended."""
    process.send_signal(signal.SIGKILL)
    wait_until_gone(process)


def address_of(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 0


def _configures(name: str) -> bool:
    return name.startswith(PREFIX) or name in WELL_KNOWN_ENV


def _parse(line: bytes) -> Tree:
    with suppress(ValueError):
        if isinstance(parsed := json.loads(line), dict):
            return parsed
    return {"message": line.decode().rstrip()}


def _toml(tree: Tree, path: str = "") -> Iterator[str]:
    """Dotted keys, one a line."""
    for key, value in tree.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _toml(value, here)
        else:
            yield f"{here} = {_value(value)}\n"


def _value(value: object) -> str:
    """What JSON writes for a text or a number is TOML too."""
    match value:
        case dict():
            return f"{{{', '.join(f'{key} = {_value(member)}' for key, member in value.items())}}}"
        case list() | tuple():
            return f"[{', '.join(map(_value, value))}]"
        case _:
            return json.dumps(value)
