"""The hottest prices, in this process: bounded by entries and bytes, for a minute at the most.

Where there is no room, the one goes that was read longest ago. What is in use comes back with its next minute, and to
note each use would take longer than to read a price again now and then.
"""

from collections import OrderedDict
from dataclasses import dataclass

from proxy.cache.prices import PriceRecord, decode_price

MAX_AGE_S = 60.0
"""A process may miss for this long that another one has fetched the same price again. If the price has changed, it
notices within `BOOK_REREAD_S`: see `invalidations` in `proxy.cache.account_book`."""

MAX_ENTRIES = 10_000
MAX_BYTES = 16 * 2**20
OVERHEAD_BYTES = 600
"""What an entry takes beside its price's own bytes; measured generously."""


@dataclass(frozen=True, slots=True)
class MemoryEntry:
    """`read_at` is on this process's monotonic clock, taken before the store was asked, and so is `invalidations`.

    invalidations: of the account's book, as far as was known; -1 if nothing was.
    """

    record: PriceRecord
    now_ms: int
    read_at: float
    invalidations: int


def decode_entry(text: bytes | None, now_ms: int, read_at: float, invalidations: int) -> MemoryEntry | None:
    """A price out of the store's text; None if there is none, or none that this version reads."""
    record = None if text is None else decode_price(text)
    return None if record is None else MemoryEntry(record, now_ms, read_at, invalidations)


class MemoryCache:
    def __init__(self, *, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        self._entries: OrderedDict[str, MemoryEntry] = OrderedDict()
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str, now: float) -> MemoryEntry | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if now - entry.read_at > MAX_AGE_S:
            self.drop(key)
            return None
        return entry

    def put(self, key: str, entry: MemoryEntry, now: float) -> None:
        """Keeps `entry`, unless it was read or stored before the entry that is here.

        Replies can overtake each other, and come in another order than the store gave them: the one that was read last
        may be the older price.
        """
        current = self.get(key, now)
        if current is not None and (
            current.read_at > entry.read_at or current.record.put_at_ms > entry.record.put_at_ms
        ):
            return
        self.drop(key)
        self._entries[key] = entry
        self._bytes += _size(entry)
        while len(self._entries) > self._max_entries or self._bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= _size(oldest)

    def drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= _size(entry)


def _size(entry: MemoryEntry) -> int:
    price = entry.record.price
    return OVERHEAD_BYTES + len(price.estimated) + len(price.rest)
