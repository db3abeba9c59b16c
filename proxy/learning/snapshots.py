"""An in-process cache of evidence from the store. An entry is used for at most `REREAD_S`.

So each gateway notices a doubt, a dropped price or a moved price list within two seconds.
"""

from dataclasses import dataclass
from hashlib import blake2b
from time import monotonic

from proxy.learning.evidence import Evidence, Setting, decode_evidence, decode_setting
from proxy.learning.leaves import Reduced, setting_id
from proxy.store.client import Script, Store

REREAD_S = 1.0
"""Limits the age of a snapshot, and so the time for which a process may miss a doubt or a dropped price."""

MAX_SNAPSHOTS = 1024
"""Limits the memory. More are rarely current at a time; then all are forgotten."""

MAX_READS = 3
"""Limits the reads of one look-up: it reads again if the left-out leaves have changed since the last read."""

_GET = Script("proxy.learning", "learned_get", repeatable=True)


@dataclass(slots=True)
class Snapshot:
    """settings: by id, as far as they were read.

    sent_at, received_at: before and after the first read, on the monotonic clock. now_ms: the store's clock between.
    """

    evidence: Evidence
    settings: dict[str, Setting | None]
    now_ms: int
    sent_at: float
    received_at: float

    def is_current(self) -> bool:
        return monotonic() - self.sent_at < REREAD_S

    def store_ms(self) -> int:
        """The store's time now, or a little earlier."""
        return self.now_ms + int((monotonic() - self.received_at) * 1000)


class Snapshots:
    """The snapshots of one process. Methods that call the store raise `StoreUnavailable`."""

    def __init__(self, store: Store, *, origin: str, learn_from: int) -> None:
        self._store = store
        self._origin = origin
        self._learn_from = learn_from
        self._snapshots: dict[tuple[str, str], Snapshot] = {}

    def keys(self, account: str, scope: str) -> tuple[str, str]:
        """The store's keys of an account and of one of its scopes, in one cluster slot."""
        tag = blake2b(f"{self._origin}\n{account}".encode(), digest_size=12).hexdigest()
        return f"ep1:{{{tag}}}:learned", f"ep1:{{{tag}}}:scope:{scope}"

    async def read(self, account: str, reduced: Reduced) -> tuple[Snapshot, str, Setting | None]:
        """A current snapshot of a body's scope, and its setting with its id; the id is empty if the scope is new."""
        key = account, reduced.scope
        snapshot = self._snapshots.get(key)
        if snapshot is None or not snapshot.is_current():
            left = "" if snapshot is None else snapshot.evidence.left  # most likely still so: then one read suffices
            snapshot = await self._extend(key, snapshot, _setting(reduced, left))
        for _ in range(MAX_READS):
            setting = _setting(reduced, snapshot.evidence.left)
            if setting in snapshot.settings:
                break
            snapshot = await self._extend(key, snapshot, setting)
        return snapshot, setting, snapshot.settings.get(setting)

    async def read_scope(self, account: str, scope: str) -> Evidence:
        """A scope's evidence, always from the store."""
        return (await self._fetch((account, scope), "")).evidence

    def forget(self, account: str) -> None:
        """Forgets an account's snapshots, because its evidence is known to have changed."""
        for key in [key for key in self._snapshots if key[0] == account]:
            del self._snapshots[key]

    async def _extend(self, key: tuple[str, str], known: Snapshot | None, setting: str) -> Snapshot:
        """Reads a setting into a snapshot: the known one, if it is current and nothing has changed since."""
        fresh = await self._fetch(key, setting)
        current = self._snapshots.get(key)
        if current is known and known is not None and known.is_current() and _is_alike(known.evidence, fresh.evidence):
            known.settings[setting] = fresh.settings[setting]
            return known
        if len(self._snapshots) >= MAX_SNAPSHOTS:
            self._snapshots.clear()
        self._snapshots[key] = fresh
        return fresh

    async def _fetch(self, key: tuple[str, str], setting: str) -> Snapshot:
        account, scope = key
        sent_at = monotonic()
        reply = await self._store.call(_GET, *self.keys(account, scope), args=(scope, setting))
        received_at = monotonic()
        *fields, setting_text, now_ms = reply
        evidence = decode_evidence(scope, fields, learn_from=self._learn_from)
        settings = {setting: decode_setting(setting_text, evidence.epoch)}
        return Snapshot(evidence, settings, now_ms, sent_at, received_at)


def _setting(reduced: Reduced, left: str) -> str:
    """The id of a body's setting; empty if nothing is known about its scope."""
    return setting_id(reduced, left) if left else ""


def _is_alike(known: Evidence, fresh: Evidence) -> bool:
    """Whether the same settings have prices, and nothing is newly in doubt."""
    return (known.epoch, known.left, known.in_doubt) == (fresh.epoch, fresh.left, fresh.in_doubt)
