"""Metrics of several workers: each worker writes a file of its own, and any of them can add up all files.

* There is one file for each worker slot. The supervisor opens it (`proxy.telemetry.metrics_files`) and every worker
  inherits it.
* A worker writes only into the file of its own slot.
* Counters outlive their worker: the next one in the slot continues them. Gauges end with their worker: the supervisor
  then marks the slot as vacant.
* Numbers are written with `pwrite` instead of through a memory map: if memory runs out, the other workers see an old
  number, and no process is ended by SIGBUS.

A file has a header (how many bytes are in use; whether a worker is alive) and entries (amount; time of the last `set`;
length of the key; key). Entries are appended; afterwards only their two numbers change.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from struct import Struct
from threading import Lock
from time import time
from typing import Any

import orjson
from prometheus_client import disable_created_metrics, values

from proxy.telemetry.metrics_files import HEADER

_USED = Struct("=Q")
_ENTRY = Struct("=ddQ")
_NUMBERS = Struct("=dd")
_GAUGE = b'["gauge",'

_Reading = tuple[float, float]
"""An amount, and the Unix time at which it was set; 0 for counters, which are never set."""


class SharedValues:
    """The numbers of this worker, and those of the other workers as last read.

    own: the descriptor of this slot's file. others: those of the other slots.
    """

    def __init__(self, own: int, others: Sequence[int]) -> None:
        self._own = own
        self._others = others
        self._values: dict[bytes, _Value] = {}
        self._inherited: dict[bytes, tuple[int, _Reading]] = {}
        """The numbers of earlier workers in this slot, and their positions in the file."""
        self._readings: Mapping[bytes, Sequence[_Reading]] = {}
        self._appending = Lock()
        self._used = HEADER.size
        self._take_over(_content(own))

    def install(self) -> None:
        """Connects the metrics of this process that are declared from now on."""
        values.ValueClass = self.new_value
        disable_created_metrics()  # type: ignore[no-untyped-call] # a worker's start is not when its counters began

    def new_value(
        self, kind: str, family: str, name: str, _: Any, labels: Sequence[str], __: str, multiprocess_mode: str = ""
    ) -> "_Value":
        """Replaces prometheus_client's `ValueClass`. The unused parameters are the label names and the help text."""
        key = _padded(orjson.dumps([kind, family, name, labels]))
        position, reading = self._inherited.get(key, (None, (0.0, 0.0)))
        value = self._values[key] = _Value(self, key, reading, position, _MERGES[multiprocess_mode])
        self.write(value)
        return value

    def write(self, value: "_Value") -> None:
        if value.position is None:
            with self._appending:  # a scrape, in its own thread, creates values too
                self._append(value)
        else:
            with suppress(OSError):  # out of memory: it is written with its next change
                os.pwrite(self._own, _NUMBERS.pack(value.amount, value.set_at), value.position)

    def read(self) -> list[bytes]:
        """Reads the numbers of the other workers.

        Returns the keys that other or earlier workers have and this one does not; see `series_of`.
        """
        readings: dict[bytes, list[_Reading]] = defaultdict(list)
        for descriptor in self._others:
            with suppress(OSError):
                for key, reading in _counting(_content(descriptor)):
                    readings[key].append(reading)
        self._readings = readings
        return [key for key in (*readings, *self._inherited) if key not in self._values]

    def readings(self, key: bytes) -> Sequence[_Reading]:
        """The other workers' values of a number."""
        return self._readings.get(key, ())

    def _take_over(self, content: bytes) -> None:
        """Continues the counters of the previous worker in this slot, and resets its gauges."""
        for key, position, reading in _entries(content):
            if key.startswith(_GAUGE):
                reading = (0.0, 0.0)  # noqa: PLW2901
                os.pwrite(self._own, _NUMBERS.pack(*reading), position)
            self._inherited[key] = position, reading
            self._used = position + _ENTRY.size + len(key)
        os.pwrite(self._own, HEADER.pack(self._used, 1), 0)

    def _append(self, value: "_Value") -> None:
        """Appends an entry. The header is updated last, because other workers can read the file at any moment."""
        entry = _ENTRY.pack(value.amount, value.set_at, len(value.key)) + value.key
        with suppress(OSError):  # out of memory: it is tried again with the next change
            if os.pwrite(self._own, entry, self._used) == len(entry):
                os.pwrite(self._own, _USED.pack(self._used + len(entry)), 0)
                value.position = self._used
                self._used += len(entry)


class _Value:
    """One number of a series of this worker, with the methods that prometheus_client calls."""

    __slots__ = ("_merge", "_shared", "amount", "key", "position", "set_at")

    def __init__(
        self,
        shared: SharedValues,
        key: bytes,
        reading: _Reading,
        position: int | None,
        merge: "Callable[[Sequence[_Reading]], float]",
    ) -> None:
        self._shared = shared
        self._merge = merge
        self.key = key
        self.amount, self.set_at = reading
        self.position = position

    def inc(self, amount: float) -> None:
        self.amount += amount
        self._shared.write(self)

    def set(self, amount: float, timestamp: float | None = None) -> None:
        self.amount, self.set_at = amount, timestamp or time()
        self._shared.write(self)

    def get(self) -> float:
        """The merged value of all workers."""
        return self._merge([(self.amount, self.set_at), *self._shared.readings(self.key)])

    def get_exemplar(self) -> None:
        """Exemplars are not used."""


def series_of(key: bytes) -> tuple[str, Sequence[str]]:
    """The family name and the labels of a key. Raises `ValueError` for a key from a damaged file."""
    _, family, _, labels = orjson.loads(key)
    return family, labels


def _sum(readings: Sequence[_Reading]) -> float:
    return sum(amount for amount, _ in readings)


def _max(readings: Sequence[_Reading]) -> float:
    return max((amount for amount, set_at in readings if set_at), default=0.0)


def _min(readings: Sequence[_Reading]) -> float:
    return min((amount for amount, set_at in readings if set_at), default=0.0)


def _newest(readings: Sequence[_Reading]) -> float:
    return max(readings, key=lambda reading: reading[1])[0]


_MERGES = {"": _sum, "livesum": _sum, "livemax": _max, "livemin": _min, "mostrecent": _newest}
"""How the numbers of several workers are merged, by prometheus_client's `multiprocess_mode`; counters have ""."""


def _content(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _counting(content: bytes) -> Iterator[tuple[bytes, _Reading]]:
    """The numbers to add up; a vacant slot contributes only counters."""
    _, alive = HEADER.unpack_from(content.ljust(HEADER.size, b"\0"))
    return ((key, reading) for key, _, reading in _entries(content) if alive or not key.startswith(_GAUGE))


def _entries(content: bytes) -> Iterator[tuple[bytes, int, _Reading]]:
    """Keys, the positions of their numbers, and the numbers, up to the first incomplete entry."""
    if len(content) < HEADER.size:
        return
    position, used = HEADER.size, min(HEADER.unpack_from(content)[0], len(content))
    while position + _ENTRY.size <= used:
        amount, set_at, length = _ENTRY.unpack_from(content, position)
        start = position + _ENTRY.size
        if not length or start + length > used:
            return
        yield content[start : start + length], position, (amount, set_at)
        position = start + length


def _padded(key: bytes) -> bytes:
    """Pads a key so that numbers are aligned to 8 bytes: aligned numbers are never read half written."""
    return key + b" " * (-len(key) % 8)
