"""Load generation with wrk if installed, else with the bench's own loader, which can also keep a fixed rate."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

import click

from bench.children import BenchError, environment, module
from bench.loader import GRACE_S, Spec
from bench.machine import ROOT, on
from bench.traffic import FIRST_NUMBER, Traffic

Kind = Literal["wrk", "own"]

SCRIPT = Path(__file__).with_name("wrk.lua")
_NUMBERS_A_LOAD = 10**8
_MARGIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Load:
    """The results of one load. `refused`: answers with status 400 or more; `broken`: answers that never arrived."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    refused: int
    broken: int


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a load: connections, duration, and a rate or as fast as answers arrive."""

    seconds: float
    connections: int = 32
    rate: float = 0.0
    most: int = 0


class Loads:
    """Runs loads on the load's cores. Numbers of counted traffic are never used twice."""

    def __init__(self, kind: Kind, folder: Path, cores: frozenset[int]) -> None:
        self.kind: Kind = kind
        self._folder = folder
        self._cores = cores
        self._firsts = count(FIRST_NUMBER + _NUMBERS_A_LOAD, _NUMBERS_A_LOAD)
        self._files: dict[Traffic, Path] = {}

    def make(self, url: str, traffic: Traffic, shape: Shape) -> Load:
        """Raises `BenchError` if the load cannot run, or connections break."""
        file, first = self._file(traffic), next(self._firsts)
        by_wrk = self.kind == "wrk" and not shape.rate and not shape.most
        command = _wrk(url, file, first, shape) if by_wrk else _own(url, file, first, shape)
        done = Load(**_run(command, shape.seconds, self._cores))
        if done.broken:
            raise BenchError(f"{done.broken} requests to {url} got no answer")
        if not done.requests:
            raise BenchError(f"no answer came from {url} within {shape.seconds:g} s")
        return done

    def sample(self, traffic: Traffic) -> bytes:
        """Returns one request, with a unique number."""
        return traffic.sample(next(self._firsts))

    def _file(self, traffic: Traffic) -> Path:
        if traffic not in self._files:
            with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".traffic", delete=False) as file:
                path = Path(file.name)
            traffic.write(path)
            self._files[traffic] = path
        return self._files[traffic]


def kind_of(wanted: str) -> Kind:
    """Returns the load for `wrk`, `own` or `auto`. Raises `UsageError`."""
    if wanted == "own" or (wanted == "auto" and shutil.which("wrk") is None):
        return "own"
    if shutil.which("wrk") is None:
        raise click.UsageError("wrk is not installed: install it, or leave out --load wrk")
    return "wrk"


def _wrk(url: str, file: Path, first: int, shape: Shape) -> list[str]:
    seconds, connections = max(1, ceil(shape.seconds)), shape.connections
    options = f"wrk -t1 -c{connections} -d{seconds}s --timeout 20s -s".split()
    return [*options, str(SCRIPT), url, str(file), str(first)]


def _own(url: str, file: Path, first: int, shape: Shape) -> list[str]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return module(
        "bench.loader", json.dumps(asdict(Spec(parts.hostname, parts.port, str(file), first, **asdict(shape))))
    )


def _run(command: Sequence[str], seconds: float, cores: frozenset[int]) -> dict[str, Any]:
    with (
        on(cores),
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, env=environment()
        ) as process,
    ):
        try:
            output, _ = process.communicate(timeout=seconds + GRACE_S + _MARGIN_S)
        except BaseException as error:
            process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                _failed(command, "it did not end in time")
            raise
    lines = output.decode(errors="replace").splitlines()
    if process.returncode or not lines or not lines[-1].startswith("{"):
        _failed(command, " | ".join(lines[-3:]))
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _failed(command: Sequence[str], why: str) -> NoReturn:
    name = "wrk" if command[0] == "wrk" else "the bench's own load"
    raise BenchError(f"{name} failed: {why}")
