"""Counts inferred prices (answered, right, wrong) in this process, until they are added to the store's counts."""

from collections.abc import Iterable
from time import monotonic

from proxy.learning.observation import Counted

FLUSH_AFTER_S = 1.0
"""How long counts stay in this process, while their scope is used."""

Key = tuple[str, str]


class Counts:
    """The counts of one process, by account and scope."""

    def __init__(self) -> None:
        self._counts: dict[Key, dict[Counted, int]] = {}
        self._since: dict[Key, float] = {}

    def add(self, key: Key, counted: Counted) -> None:
        if key not in self._counts:
            self._counts[key], self._since[key] = dict.fromkeys(Counted, 0), monotonic()
        self._counts[key][counted] += 1

    def is_due(self, key: Key) -> bool:
        return key in self._since and monotonic() - self._since[key] >= FLUSH_AFTER_S

    def take(self, key: Key) -> tuple[int, ...]:
        """The counts, in the order of `Counted`; empty if there are none. They are then no longer here."""
        self._since.pop(key, None)
        return tuple(self._counts.pop(key, {}).values())

    def pending(self) -> Iterable[Key]:
        return list(self._counts)
