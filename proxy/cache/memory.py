"""In-process cache of prices, limited by entries, bytes and age.

Evicts in FIFO order. Tracking use for LRU costs more than an occasional re-read, and every entry is read again within
`MAX_AGE_S` anyway.
"""

from collections import OrderedDict
from dataclasses import dataclass

from proxy.cache.prices import PriceRecord, decode_price

MAX_AGE_S = 60.0
"""For this long a process may not notice that another one has fetched the same price again. It notices a changed price
within `BOOK_REREAD_S`: see invalidations in `proxy.cache.account_book`."""

MAX_ENTRIES = 10_000
MAX_BYTES = 16 * 2**20
OVERHEAD_BYTES = 600
"""Memory of an entry besides its price's own bytes. Measured, and rounded up."""


@dataclass(frozen=True, slots=True)
class MemoryEntry:
    """A price as this process read it from the store or put it there.

    now_ms: the store's clock when it ran the call.
    read_at: this process's monotonic clock before the call.
    invalidations: the count in the snapshot of the account's book before the call; -1 if there was no snapshot.
    """

    record: PriceRecord
    now_ms: int
    read_at: float
    invalidations: int


def decode_entry(text: bytes | None, now_ms: int, read_at: float, invalidations: int) -> MemoryEntry | None:
    """Decodes the text of a price key. None if the key does not exist or has another encoding."""
    record = None if text is None else decode_price(text)
    return None if record is None else MemoryEntry(record, now_ms, read_at, invalidations)


class MemoryCache:
    """Prices by key. `now` is on the monotonic clock, as is `read_at` of the entries."""

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
        """Keeps `entry`, unless the cached entry was read later or has a newer price.

        Replies can arrive in another order than the store gave them, so the entry that arrives last may be the older.
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
