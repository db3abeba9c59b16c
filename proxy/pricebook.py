"""The price book: what upstream said, kept for everybody who asks the same.

Ages are counted by the store's clock alone, so that gateways whose clocks differ tell the same. A balance belongs to
an account, never to a price: the newest one that any answer has shown is served with every estimate.
"""

import asyncio
from dataclasses import dataclass
from time import monotonic

from proxy.prices import Balance, Price, StoredPrice, decode_price, encode_price
from proxy.problems import StoreUnavailable
from proxy.store import Script, Store

BALANCE_REREAD_S = 1.0
"""How long a process may miss a balance that another one has seen."""

_PRICE_GET, _PRICE_PUT = Script("price_get"), Script("price_put")
_BALANCE_GET, _BALANCE_PUT = Script("balance_get"), Script("balance_put")


@dataclass(frozen=True, slots=True)
class _SeenBalance:
    amount: bytes
    born: float
    """On this process's monotonic clock."""


class PriceBook:
    """The prices of one upstream, shared by every process on the same store."""

    def __init__(self, store: Store, *, origin: str, ttl_s: float) -> None:
        self._store = store
        self._origin = origin
        self._ttl_ms = round(ttl_s * 1000)
        self._balances: dict[str, _SeenBalance] = {}
        self._balance_reread_at: dict[str, float] = {}

    @property
    def ttl_s(self) -> float:
        return self._ttl_ms / 1000

    async def look_up(self, key: str, account: str) -> tuple[StoredPrice | None, Balance | None]:
        """What is known for `key`, and the account's newest balance. Raises `StoreUnavailable`."""
        if monotonic() < self._balance_reread_at.get(account, 0.0):
            return await self._get(key), self.balance(account)
        stored, _ = await asyncio.gather(self._get(key), self._reread_balance(account))
        return stored, self.balance(account)

    async def put(self, key: str, price: Price) -> bool:
        """Whether the price could be stored."""
        text = encode_price(price, ttl_ms=self._ttl_ms)
        try:
            await self._store.call(_PRICE_PUT, _price_key(key), args=(text, self._ttl_ms))
        except StoreUnavailable:
            return False
        return True

    async def note_balance(self, account: str, amount: bytes) -> None:
        """Remembers the balance that upstream has just shown, here at once and for the fleet if it can."""
        self._balances[account] = _SeenBalance(amount, monotonic())
        try:
            await self._store.call(_BALANCE_PUT, self._book_key(account), args=(amount,))
        except StoreUnavailable:
            return

    def balance(self, account: str) -> Balance | None:
        """The newest balance that this process knows of."""
        seen = self._balances.get(account)
        return None if seen is None else Balance(seen.amount, max(0.0, monotonic() - seen.born))

    async def _get(self, key: str) -> StoredPrice | None:
        stored, now_ms = await self._store.call(_PRICE_GET, _price_key(key))
        return None if stored is None else decode_price(stored, now_ms=now_ms)

    async def _reread_balance(self, account: str) -> None:
        amount, age_ms = await self._store.call(_BALANCE_GET, self._book_key(account))
        now = monotonic()
        self._balance_reread_at[account] = now + BALANCE_REREAD_S
        if amount is None:
            return
        read = _SeenBalance(amount, now - age_ms / 1000)
        known = self._balances.get(account)
        if known is None or read.born > known.born:
            self._balances[account] = read

    def _book_key(self, account: str) -> str:
        return f"ep1:book:{self._origin}:{account}"


def _price_key(key: str) -> str:
    return f"ep1:{{{key}}}:price"
