"""Learns which members decide a price, and infers prices from what was learned.

* All evidence is in the store, shared by all processes. An account's keys are in one cluster slot, so one script sees
  the account and a scope, and decides about doubts atomically: see `lua/learned_observe.lua`.
* `look_up` returns a ticket before upstream is asked. Its epoch and time show later whether the answer is outdated: it
  is ignored if a purge came in between, or if its setting started over.
"""

import asyncio
import secrets
from collections.abc import Collection
from contextlib import suppress
from typing import Protocol

import orjson

from proxy.cache.prices import Price
from proxy.learning.answers import data_digest
from proxy.learning.audits import Audits
from proxy.learning.counts import Counts
from proxy.learning.evidence import Scope, contradiction_of
from proxy.learning.leaves import Reduced, class_of, reduce, text_of
from proxy.learning.limits import MAX_REST_BYTES, limits_of
from proxy.learning.observation import Counted, Effect, Observation
from proxy.learning.snapshots import Snapshots
from proxy.learning.ticket import Ticket
from proxy.learning.verdict import Inferred, NotInferred, Reason, decide
from proxy.problems import StoreUnavailable
from proxy.store.client import Script, Store

_OBSERVE, _COUNT = Script("proxy.learning", "learned_observe"), Script("proxy.learning", "learned_count")
_DROP, _DROP_SETTING = Script("proxy.learning", "learned_drop"), Script("proxy.learning", "learned_drop_setting")
_FORGET, _LIST = Script("proxy.learning", "learned_forget"), Script("proxy.learning", "learned_list", repeatable=True)


class Question(Protocol):
    """What is learned from; `proxy.gateway.canonical_request.CanonicalRequest` is one."""

    @property
    def account(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def query(self) -> str: ...
    @property
    def ignored(self) -> tuple[str, ...]: ...
    @property
    def canonical(self) -> bytes: ...


class Learner:
    """What all processes have learned, for one of them.

    origin: of upstream. ttl_s: of prices. learn_from, audit_one_in: see the settings of `cache`.
    """

    def __init__(self, store: Store, *, origin: str, ttl_s: float, learn_from: int, audit_one_in: int) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._snapshots = Snapshots(store, origin=origin, learn_from=learn_from)
        self._audits = Audits(audit_one_in)
        self._counts = Counts()
        self._limits = limits_of(learn_from=learn_from, ttl_s=ttl_s).encode()

    async def look_up(
        self, question: Question, never_learn: Collection[str] = (), *, pays_audit: bool = True
    ) -> Inferred | NotInferred:
        """What is known about the price of a body that is not known exactly. Does not raise `StoreUnavailable`.

        Call it before upstream is asked: `observe` needs its ticket.

        pays_audit: an audit that the setting owes is no longer owed, because this body is then asked.
        """
        reduced = _reduced(question, never_learn)
        if reduced is None:
            return NotInferred(Reason.NOT_LEARNABLE)
        if self._counts.is_due((question.account, reduced.scope)):
            await self._store_counts(question.account, reduced.scope)
        try:
            snapshot, setting, known = await self._snapshots.read(question.account, reduced)
        except StoreUnavailable:
            return NotInferred(Reason.UNAVAILABLE)
        ticket = Ticket(question.account, reduced, question.key, snapshot.evidence.epoch, snapshot.store_ms())
        verdict = decide(ticket, snapshot.evidence, known, setting=setting, ttl_s=self._ttl_s)
        if pays_audit and isinstance(verdict, Inferred) and self._audits.pay(_name(ticket, setting)):
            return NotInferred(Reason.AUDIT_OWED, verdict.scope, ticket)
        return verdict

    def count(self, inferred: Inferred, counted: Counted) -> bool:
        """Counts an inferred price that was answered, or in observe mode was compared with upstream's.

        Returns whether this answer must be audited: asked in the background, and observed.
        """
        ticket = inferred.ticket
        key = ticket.account, ticket.reduced.scope
        self._counts.add(key, counted)
        return counted is Counted.ANSWERED and self._audits.is_due(" ".join(key))

    def owe_audit(self, inferred: Inferred) -> None:
        """An audit that was due could not be asked: the next price of this setting is not inferred."""
        self._audits.owe(_name(inferred.ticket, inferred.setting))

    async def observe(self, ticket: Ticket, price: Price, *, team: str, is_audit: bool = False) -> Observation:
        """Learns from upstream's answer. Raises `StoreUnavailable`."""
        reduced, account = ticket.reduced, ticket.account
        if len(price.rest) > MAX_REST_BYTES:
            return Observation(Effect.IGNORED, reduced.scope, "", None, None)
        args = (
            *(self._limits, reduced.scope, team, secrets.token_urlsafe(9), ticket.epoch, ticket.asked_at_ms),
            *(int(is_audit), ticket.body, data_digest(price), price.estimated, price.rest),
            *(orjson.dumps({"items": reduced.items, "paths": reduced.paths}), _encoded_leaves(reduced)),
        )
        keys = self._snapshots.keys(account, reduced.scope)
        _, reply = await asyncio.gather(  # counts first: a test that agrees resets those of unchecked answers
            self._store_counts(account, reduced.scope), self._store.call(_OBSERVE, *keys, args=args)
        )
        effect, setting, estimated, rest, contradiction, _, evicted = reply
        for scope in evicted:
            await self._forget(account, scope.decode(), only_unlisted=True)
        observation = Observation(
            Effect(effect.decode()),
            reduced.scope,
            setting.decode(),
            Price(estimated, rest) if estimated else None,
            contradiction_of(orjson.loads(contradiction)) if contradiction else None,
        )
        if observation.effect in _OUTDATES or observation.contradiction is not None or not ticket.epoch:
            self._snapshots.forget(account)
        return observation

    async def scopes(self, account: str) -> list[Scope]:
        """What was learned in each scope of an account, the last used first. Raises `StoreUnavailable`."""
        ids = await self._list(account)
        evidence = await asyncio.gather(*(self._snapshots.read_scope(account, scope) for scope in ids))
        return [each.scope for each in evidence if each.scope is not None]

    async def forget(self, account: str, scope: str | None = None) -> int:
        """Forgets a scope, or all of the account's. Returns how many were known. Raises `StoreUnavailable`."""
        ids = await self._list(account) if scope is None else [scope]
        forgotten = await asyncio.gather(*(self._forget(account, each) for each in ids))
        self._snapshots.forget(account)
        return sum(forgotten)

    async def drop_setting(self, question: Question, never_learn: Collection[str] = ()) -> None:
        """Drops the price of a body's setting, because the question was purged. Raises `StoreUnavailable`."""
        reduced = _reduced(question, never_learn)
        if reduced is None:
            return
        account = question.account
        self._snapshots.forget(account)
        _, setting, _ = await self._snapshots.read(account, reduced)
        await self._store.call(_DROP_SETTING, *self._snapshots.keys(account, reduced.scope), args=(setting,))
        self._snapshots.forget(account)

    async def drop_prices(self, account: str) -> None:
        """Drops the prices of all settings, because the account was purged or repriced. Raises `StoreUnavailable`."""
        key, _ = self._snapshots.keys(account, "")
        await self._store.call(_DROP, key, args=(secrets.token_urlsafe(9),))
        self._snapshots.forget(account)

    async def close(self) -> None:
        """Stores the counts that are still in memory, if the store is available."""
        await asyncio.gather(*(self._store_counts(*key) for key in self._counts.pending()))

    async def _list(self, account: str) -> list[str]:
        key, _ = self._snapshots.keys(account, "")
        return [scope.decode() for scope in await self._store.call(_LIST, key)]

    async def _forget(self, account: str, scope: str, *, only_unlisted: bool = False) -> int:
        args = (scope, int(only_unlisted))
        return int(await self._store.call(_FORGET, *self._snapshots.keys(account, scope), args=args))

    async def _store_counts(self, account: str, scope: str) -> None:
        """Adds this process's counts of a scope to the store's."""
        counts = self._counts.take((account, scope))
        if counts:
            with suppress(StoreUnavailable):
                await self._store.call(_COUNT, self._snapshots.keys(account, scope)[1], args=counts)


_OUTDATES = frozenset((Effect.IGNORED, Effect.DOUBT, Effect.LIST_MOVED, Effect.CONTRADICTED))
"""Effects after which this process's snapshots of the account are out of date, or were."""


def _reduced(question: Question, never_learn: Collection[str]) -> Reduced | None:
    return reduce(question.canonical, query=question.query, ignored=question.ignored, never_learn=never_learn)


def _name(ticket: Ticket, setting: str) -> str:
    return f"{ticket.account} {ticket.reduced.scope} {setting}"


def _encoded_leaves(reduced: Reduced) -> bytes:
    """The leaves as `learned_observe.lua` takes them."""
    leaves = []
    for value, never_left_out in zip(reduced.values, reduced.never_left_out, strict=True):
        leaf = class_of(value)
        number = "" if leaf.number is None else repr(leaf.number)
        length = "" if leaf.length is None else str(leaf.length)
        leaves.append((text_of(value), leaf.name, int(not leaf.is_sentinel), int(never_left_out), number, length))
    return orjson.dumps(leaves)
