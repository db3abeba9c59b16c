"""The way to Redis or Valkey: scripts, batched.

* Calls made in the same turn of the event loop go out together, in one round trip to each server that they need.
* Nothing is sent twice unless that is known to be harmless. redis-py would run any script again after a late reply;
  here that is a failure, but for scripts that only look. What a server has not run goes again, to where it says, or to
  where the topology has it by then.
* A call that fails says whether a server may have run it: `StoreUnanswered` if it was sent.
* A try takes `TIMEOUT_S` and two ticks at the most, waiting for connections and looking for servers included. After a
  failure that server is left alone for `REST_S`, and its calls fail at once: a hanging one costs one wait, not one a
  request. Where it has both roles, the failure of one is that of the other.
"""

import asyncio
import logging
import re
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from redis.exceptions import ConnectionError as NotConnectedError
from redis.exceptions import MovedError, RedisError, ResponseError

from proxy.descriptors import ran_out
from proxy.embedded import Role
from proxy.limits import TimeLimit
from proxy.metrics import Metrics
from proxy.persistence import Persistence
from proxy.problems import StoreUnanswered, StoreUnavailable
from proxy.redirects import Ask, Elsewhere, Final, Later, Meaning, Moved, Unreached, may_have_run, meaning_of
from proxy.scripts import UNSAID, Call, Node, Script, Unsaid, ask_node, exchange
from proxy.servers import CONNECTION, NO_ACCESS, Access, servers_of
from proxy.settings import Settings
from proxy.troubles import Troubles

__all__ = ["EmbeddedUrls", "Script", "Store", "open_book_store", "open_ledger_store"]

TIMEOUT_S = 0.25
TICK_S = 0.025
REST_S = 0.5
PAUSE_S = 0.01
"""Before a server that could not run a call is asked again; each time it is longer."""

ROUNDS_AT_ONCE = 2
"""Servers that disagree could send a call from one to the other for ever."""

OLDEST_REDIS = (7, 0)

EmbeddedUrls = Mapping[Role, str]

Rests = dict[str, float]
"""Until when a server is left alone, by its label, on the event loop's clock; `CONNECTION` stands for all of them."""

_NOBODY = NotConnectedError("no server has these keys")

log = logging.getLogger(__name__)


class Store:
    """Redis or Valkey in one role, such as `ledger`: what `url` names. `close` must be called.

    `rests` is shared with the other role, where that is on the same servers.
    """

    def __init__(
        self,
        url: str,
        role: Role,
        metrics: Metrics | None = None,
        *,
        access: Access = NO_ACCESS,
        rests: Rests | None = None,
    ) -> None:
        self.role = role
        self._metrics = metrics
        self._servers = servers_of(url, access)
        self._waiting: list[Call] = []
        self._running: set[asyncio.Task[None]] = set()
        self.rests: Rests = {} if rests is None else rests
        self._doubted: set[str] = set()
        """Servers that may be the wrong ones, by their names."""
        self._limit = TimeLimit(TIMEOUT_S, tick_s=TICK_S)
        self._troubles = Troubles()
        self._down: set[str] = set()
        self._known_up: bool | None = None
        self._note_up()

    async def call(self, script: Script, *keys: str, args: tuple[bytes | int | str, ...] = ()) -> Any:
        """The reply of `script`, whose keys are in one slot. Raises `StoreUnavailable`."""
        call = self._new_call(script, keys, args)
        self._waiting.append(call)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._send)
        return await call.reply

    async def call_at_once(self, script: Script, *keys: str, args: tuple[bytes | int | str, ...] = ()) -> Any:
        """As `call`, for what is a batch by itself: it waits for nothing that others want. It must not be cancelled."""
        call = self._new_call(script, keys, args)
        await self._run([call])
        return call.reply.result()

    def _new_call(self, script: Script, keys: tuple[str, ...], args: tuple[bytes | int | str, ...]) -> Call:
        loop = asyncio.get_running_loop()
        call = Call(script, keys, args, loop.create_future(), loop.time())
        if self._is_resting(label := self._label_of(call), call.began):
            self._note_down(label, "it failed in its other role")
            raise StoreUnavailable("left alone for a moment after a failure")
        return call

    async def ping(self) -> bool:
        """Whether every server answers now."""
        return None not in await self._of_all("PING")

    async def version(self) -> tuple[int, ...] | None:
        """The oldest Redis version that a server is or is compatible with; None if none of them says."""
        found = await self._facts("server", "redis_version")
        known = [tuple(map(int, text.split("."))) for text in found if re.fullmatch(r"[0-9]+(\.[0-9]+)*", text)]
        return min(known, default=None)

    async def eviction_policy(self) -> str | None:
        """`maxmemory-policy`, of several the first that evicts; None if no server says."""
        found = await self._facts("memory", "maxmemory_policy")
        return next((policy for policy in found if policy != "noeviction"), found[0] if found else None)

    async def persistence(self) -> list[Persistence]:
        """What each server says about writing its data to disk."""
        infos = await self._of_all("INFO", "persistence")
        configs = await self._of_all("CONFIG", "GET", "save", "appendfsync")
        return [_persistence_of(info, config) for info, config in zip(infos, configs, strict=False)]

    async def close(self) -> None:
        while self._running:
            await asyncio.wait(self._running)
        await self._servers.close()

    async def _facts(self, section: str, name: str) -> list[str]:
        """What the servers say of one thing in a section of INFO."""
        told = [text.decode() for text in await self._of_all("INFO", section) if text is not None]
        return [fact for text in told for fact in re.findall(rf"^{name}:(.*?)\r?$", text, re.MULTILINE)]

    async def _of_all(self, *command: str) -> list[Any]:
        """What each server says to a command; None of one that does not answer, or for all if none is known."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                if not self._servers.primaries():
                    await self._servers.learn()
        except (RedisError, OSError, TimeoutError):
            return [None]
        said = await asyncio.gather(*(_of_one(node, *command) for node in self._servers.primaries()))
        if None in said:
            with suppress(
                RedisError, OSError
            ):  # where nothing is called, nothing else finds out that they have changed
                await self._servers.learn()
        return said

    def _label_of(self, call: Call) -> str:
        home = self._servers.home(call.key)
        return CONNECTION if home is None else home.label

    def _is_resting(self, label: str, now: float) -> bool:
        return now < self.rests.get(label, now) or now < self.rests.get(CONNECTION, now)

    def _send(self) -> None:
        """One batch for each server: one that hangs keeps nobody waiting who needs another."""
        waiting, self._waiting = self._waiting, []
        batches: dict[str, list[Call]] = {}
        for call in waiting:
            batches.setdefault(self._label_of(call), []).append(call)
        for calls in batches.values():
            task = asyncio.get_running_loop().create_task(self._run(calls))
            self._running.add(task)
            task.add_done_callback(partial(self._finish, calls))

    def _finish(self, calls: Sequence[Call], task: asyncio.Task[None]) -> None:
        """Nobody waits for a reply that a defect has lost."""
        self._running.discard(task)
        for call in calls:
            if not call.reply.done():
                call.reply.set_exception(StoreUnanswered("the store's client failed"))

    async def _run(self, calls: Sequence[Call]) -> None:
        with suppress(TimeoutError):  # each call knows how far it came
            await self._converse_in_time(calls)
        self._take_note(calls)
        for call in calls:
            self._deliver(call)
        if self._metrics is not None:
            now = asyncio.get_running_loop().time()
            for call in calls:
                self._metrics.note_store(call.script.name, now - call.began)

    async def _converse_in_time(self, calls: Sequence[Call]) -> None:
        """What may be repeated has a second try, so that one hiccup costs no upstream call."""
        try:
            await self._limit.hold(self._converse(calls))
        except TimeoutError:
            late = [call for call in calls if call.word is UNSAID]
            if self._servers.learns:
                self._doubted |= {call.node.name for call in late if call.node}
            if not late or not all(call.script.repeatable for call in calls):
                raise
            await self._limit.hold(self._converse(late))

    async def _converse(self, calls: Sequence[Call]) -> None:
        """Until each call has its last word: what was not run goes again, while there is time."""
        if not self._servers.learns:  # there is one place, and its word is the last one
            await exchange(self._servers.primaries()[0], calls)
            return
        rounds = 0
        while groups := await self._placed(calls):
            await _together([exchange(node, group) for node, group in groups.items()])
            calls = [call for group in groups.values() for call in group if self._goes_on(call)]
            rounds += 1
            if rounds > ROUNDS_AT_ONCE or any(isinstance(_meaning_of(call), Later | Elsewhere) for call in calls):
                await asyncio.sleep(rounds * PAUSE_S)

    async def _placed(self, calls: Sequence[Call]) -> dict[Node, list[Call]]:
        """The calls by where they go now, but for those that have nowhere to go, or nowhere else."""
        nobody = await self._look_again(calls)
        groups: dict[Node, list[Call]] = {}
        for call in calls:
            place = self._place_of(call)
            if place is None:
                call.word, call.sent = nobody, False
            elif place is not call.node or _meaning_of(call) != Unreached():
                groups.setdefault(place, []).append(call)
        return groups

    async def _look_again(self, calls: Sequence[Call]) -> Exception:
        """Learns where the servers are, if one is not known or in doubt. Why one may not be known then."""
        nobody: Exception = _NOBODY
        places = [self._place_of(call) for call in calls]
        if any(place is None or place.name in self._doubted for place in places):
            try:
                await self._servers.learn()
            except (RedisError, OSError) as error:  # TimeoutError is an OSError: what was known is tried
                nobody = error
            self._doubted.clear()
        return nobody

    def _place_of(self, call: Call) -> Node | None:
        return self._servers.at(call.asks) if call.asks else self._servers.home(call.key)

    def _goes_on(self, call: Call) -> bool:
        """Whether the call was not run and may be, after what this word has taught about the servers."""
        call.asks = None
        if not self._servers.learns:
            return False
        match _meaning_of(call):
            case Moved(to):
                self._servers.move(call.key, to)
            case Ask(to):
                call.asks = to
            case Elsewhere() | Unreached():
                self._doubted.add(_name_of(call))
            case Later():
                pass
            case Final():
                return False
        return True

    def _take_note(self, calls: Sequence[Call]) -> None:
        """Which servers have served, and which are to be left alone."""
        if not self._down and not any(map(self._is_unserved, calls)):
            return
        by_label: dict[str, list[Call]] = {}
        for call in calls:
            by_label.setdefault(call.node.label if call.node else CONNECTION, []).append(call)
        for label, group in by_label.items():
            unserved = next((call for call in group if self._is_unserved(call)), None)
            if unserved is None:
                self._note_served(label)
            elif not _has_answered_since(unserved):
                self._note_descriptors(unserved)
                self._leave_alone(label, _reason_of(unserved))
        self._note_up()

    def _note_descriptors(self, call: Call) -> None:
        if self._metrics is not None and isinstance(call.word, Exception) and ran_out(call.word):
            self._metrics.record_descriptors_exhausted()

    def _is_unserved(self, call: Call) -> bool:
        """Whether the call's word, or that there is none, says that its server is out of order."""
        if isinstance(call.word, ResponseError):
            return self._servers.learns and _meaning_of(call) == Elsewhere()
        return isinstance(call.word, Exception | Unsaid)

    def _leave_alone(self, label: str, reason: str) -> None:
        self.rests[label] = asyncio.get_running_loop().time() + REST_S
        self._down.add(label)
        self._trouble(label, reason)

    def _note_down(self, label: str, reason: str) -> None:
        """Of a server that is left alone already: mostly its trouble is known."""
        if not self._down:
            self._down.add(label)
            self._trouble(label, reason)
            self._note_up()

    def _note_served(self, label: str) -> None:
        """Nothing is said any more of servers that are none of ours by now."""
        if not self._down:
            return
        ours = {node.label for node in self._servers.primaries()}
        for served in ({label, CONNECTION} | (self._down - ours)) & self._down:
            self._down.discard(served)
            self.rests.pop(served, None)
            self._recovered(served, "works again" if served in {label, CONNECTION} else "is needed no more")

    def _deliver(self, call: Call) -> None:
        failure = _failure_of(call)
        if failure is None:
            self._recovered(call.script.name)
        elif isinstance(call.word, ResponseError) and not self._is_unserved(call):
            self._trouble(call.script.name, _reason_of(call))
        if call.reply.done():  # its request has gone
            return
        if failure is None:
            call.reply.set_result(call.word)
        else:
            call.reply.set_exception(failure)

    def _note_up(self) -> None:
        is_up = not self._down
        if self._metrics is not None and is_up != self._known_up:
            self._known_up = is_up
            self._metrics.store_up.labels(self.role).set(is_up)

    def _trouble(self, part: str, reason: str) -> None:
        if self._troubles.begins(part, reason, asyncio.get_running_loop().time()):
            log.error("the %s's %s fails: %s", self.role, part, reason)

    def _recovered(self, part: str, how: str = "works again") -> None:
        if self._troubles and self._troubles.ends(part, asyncio.get_running_loop().time()):
            log.info("the %s's %s %s", self.role, part, how)


def _meaning_of(call: Call) -> Meaning:
    return meaning_of(call.word, sent=call.sent, host=call.node.host if call.node else "")


def _has_answered_since(call: Call) -> bool:
    """Whether the call's server has answered a later one: then it was the connection that led nowhere."""
    return call.node is not None and call.node.answered > call.began


def _name_of(call: Call) -> str:
    return call.node.name if call.node else ""


def _failure_of(call: Call) -> StoreUnavailable | None:
    if not isinstance(call.word, Exception | Unsaid):
        return None
    kind = StoreUnanswered if may_have_run(call.word, sent=call.sent) else StoreUnavailable
    return kind(_reason_of(call))


def _reason_of(call: Call) -> str:
    if isinstance(call.word, MovedError):
        return "the keys are on another server of a cluster, which is found if the URL begins with redis+cluster"
    if isinstance(call.word, Exception) and ran_out(call.word):
        return "this gateway has no file descriptor left for a connection"
    return "no answer in time" if call.word is UNSAID else str(call.word) or "no answer in time"


def _persistence_of(info: bytes | None, config: Any) -> Persistence:
    enabled = re.search(rb"^aof_enabled:([01])", info or b"", re.MULTILINE)
    words = [word.decode() for word in config] if isinstance(config, list) else []
    settings = dict(zip(words[::2], words[1::2], strict=True))
    append_only = None if enabled is None else enabled[1] == b"1"
    return Persistence(append_only, settings.get("save"), settings.get("appendfsync"))


async def _of_one(node: Node, *command: str) -> Any:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await ask_node(node, *command)
    except (RedisError, OSError):  # TimeoutError is an OSError
        return None


async def _together(exchanges: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Mostly it is one, which needs no task of its own."""
    if len(exchanges) == 1:
        await exchanges[0]
    else:
        await asyncio.gather(*exchanges)


def open_ledger_store(settings: Settings, embedded_urls: EmbeddedUrls, metrics: Metrics | None = None) -> Store:
    """The store of quotas and usage: the one that the settings name, or else the embedded one."""
    if settings.store.url is None:
        return Store(embedded_urls["ledger"], "ledger", metrics)
    return Store(settings.store.url.get_secret_value(), "ledger", metrics, access=_access_to_store(settings))


def open_book_store(
    settings: Settings, embedded_urls: EmbeddedUrls, metrics: Metrics | None = None, *, ledger: Store | None = None
) -> Store:
    """The store of prices: one of their own, or else the ledger's, which may be open already, or the embedded one."""
    if settings.cache.url is not None:
        return Store(settings.cache.url.get_secret_value(), "price-book", metrics, access=_access_to_cache(settings))
    if settings.store.url is not None:
        url, access = settings.store.url.get_secret_value(), _access_to_store(settings)
        return Store(url, "price-book", metrics, access=access, rests=None if ledger is None else ledger.rests)
    return Store(embedded_urls["price-book"], "price-book", metrics)


def _access_to_store(settings: Settings) -> Access:
    store = settings.store
    return replace(
        _access_to_cache(settings),
        username=store.username,
        password=None if store.password is None else store.password.get_secret_value(),
        sentinel_password=None if store.sentinel_password is None else store.sentinel_password.get_secret_value(),
    )


def _access_to_cache(settings: Settings) -> Access:
    """Whom to believe is one question for both, the credentials are not: those of `cache.url` stand in it."""
    store = settings.store
    return Access(ca_file=store.ca_file, cert_file=store.cert_file, key_file=store.key_file)
