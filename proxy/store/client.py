"""The client of Redis or Valkey: scripts, batched.

* Calls made in the same turn of the event loop go out together, in one round trip to each server that they need.
* Nothing is sent twice unless that is known to be harmless. A script whose reply is lost fails, but for scripts that
  only look. What a server has refused without running it is sent again, to where the server says, or to where the
  topology or the server's name leads by then.
* A call that fails says whether a server may have run it: `StoreOutcomeUnknown` if it was sent.
* A try takes `access.timeout_s` and two ticks at the most, waiting for connections and looking for servers included.
"""

import asyncio
import re
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from redis.exceptions import ConnectionError as NotConnectedError
from redis.exceptions import RedisError

from proxy.problems import StoreOutcomeUnknown, StoreUnavailable
from proxy.store.access import NO_ACCESS, TIMEOUT_S, Role, StoreAccess
from proxy.store.coarse_timeout import CoarseTimeout
from proxy.store.connection_pool import HEALTH_CHECK_S
from proxy.store.health import COOLDOWN_S, Cooldowns, StoreHealth, failure_of, kind_of_call
from proxy.store.persistence import Persistence
from proxy.store.redirects import Ask, Done, Moved, NotSent, NotServing, TryAgain
from proxy.store.scripts import UNSAID, Call, Node, Script, ask_node, exchange, load
from proxy.store.topology import CONNECTION, servers_of
from proxy.telemetry.metrics import Metrics

__all__ = ["COOLDOWN_S", "TIMEOUT_S", "Script", "Store"]

TICK_S = 0.025
PAUSE_S = 0.01
"""Before a server that could not run a call is asked again; each time it is longer."""

ROUNDS_AT_ONCE = 2
"""Servers that disagree could send a call from one to the other for ever."""

LEARN_SHARE = 0.8
"""Of a call's time, for which it waits to learn where the servers are. Then what was known is tried."""

CHECK_AFTER_S = 2.0
"""So long after the last call that failed, a check finds out whether it would work. Where there are calls, they do."""

WRITE_CHECK = Script("proxy.store", "write_check")

_NOBODY = NotConnectedError("no server has these keys")


class Store:
    """Redis or Valkey in one role, such as `ledger`: what `url` names. `close` must be called.

    cooldowns: shared with the other role, where that is on the same servers.
    preload: scripts to load into each server before they are called.
    """

    def __init__(
        self,
        url: str,
        role: Role,
        metrics: Metrics | None = None,
        *,
        access: StoreAccess = NO_ACCESS,
        cooldowns: Cooldowns | None = None,
        preload: Sequence[Script] = (),
    ) -> None:
        self.role = role
        self._preload = (WRITE_CHECK, *preload)
        self._metrics = metrics
        self._access = access
        self._servers = servers_of(url, access)
        self._waiting: list[Call] = []
        self._running: set[asyncio.Task[None]] = set()
        self._tending: asyncio.Task[None] | None = None
        self.cooldowns: Cooldowns = {} if cooldowns is None else cooldowns
        self._health = StoreHealth(role, metrics, self._servers, cooldowns=self.cooldowns)
        self._doubted: set[str] = set()
        """Servers that may be the wrong ones, by their names."""
        self._limit = CoarseTimeout(access.timeout_s, tick_s=TICK_S)

    async def open(self) -> None:
        """Connects, for as long as setting up a connection may take, and keeps connections warm until `close`."""
        nodes = await self._known(self._patience_s)
        await asyncio.gather(self.ping(self._patience_s), *(self._prepare(node) for node in nodes))
        self._tending = asyncio.get_running_loop().create_task(self._tend())

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
        label = self._label_of(call)
        if self._health.is_cooling_down(label, call.began):
            call.node = self._servers.home(call.key)
            self._health.skipped(call, label)
            raise StoreUnavailable("left alone for a moment after a failure")
        return call

    async def is_up(self) -> bool:
        """Whether the last write was served, and every server answers now."""
        return self._health.is_up and await self.ping()

    async def ping(self, within_s: float | None = None) -> bool:
        """Whether every server answers, within the time of a call or another one."""
        return None not in await self._of_all("PING", within_s=within_s or self._access.timeout_s)

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
        infos = await self._of_all("INFO", "persistence", within_s=self._patience_s)
        configs = await self._of_all("CONFIG", "GET", "save", "appendfsync", within_s=self._patience_s)
        return [_persistence_of(info, config) for info, config in zip(infos, configs, strict=False)]

    async def close(self) -> None:
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.wait({self._tending})
        while self._running:
            await asyncio.wait(self._running)
        await self._servers.close()

    @property
    def _patience_s(self) -> float:
        """For what may need a new connection, and is not on the way of a request."""
        return self._access.connect_timeout_s + self._access.timeout_s

    async def _tend(self) -> None:
        """Keeps connections warm, and finds out whether what is down works again though nobody calls."""
        while True:
            await asyncio.gather(self._check_down(), *(self._prepare(node) for node in self._servers.primaries()))
            await asyncio.sleep(HEALTH_CHECK_S)

    async def _prepare(self, node: Node) -> None:
        """Keeps connections to a server warm, and loads the scripts into one that has just been found.

        The first call of a script then takes one round trip instead of two.
        """
        await node.pool.keep_warm(self._access.timeout_s)
        with suppress(RedisError, OSError):  # TimeoutError is an OSError; the next round tries again
            async with asyncio.timeout(self._patience_s):
                await load(node, self._preload)

    async def _check_down(self) -> None:
        loop = asyncio.get_running_loop()
        for part, failed in self._health.down_before(loop.time() - CHECK_AFTER_S):
            check = Call(WRITE_CHECK, failed.keys, (), loop.create_future(), loop.time())
            with suppress(TimeoutError):
                await self._converse_in_time([check])
            self._health.checked(part, check, loop.time())

    async def _facts(self, section: str, name: str) -> list[str]:
        """What the servers say of one thing in a section of INFO."""
        said = await self._of_all("INFO", section, within_s=self._patience_s)
        told = [text.decode() for text in said if text is not None]
        return [fact for text in told for fact in re.findall(rf"^{name}:(.*?)\r?$", text, re.MULTILINE)]

    async def _of_all(self, *command: str, within_s: float) -> list[Any]:
        """What each server says to a command; None of one that does not answer, or for all if none is known."""
        nodes = await self._known(within_s)
        said = await asyncio.gather(*(_of_one(node, *command, within_s=within_s) for node in nodes))
        if None in said:
            with suppress(RedisError, OSError):  # else nothing finds out that they have changed where nothing is called
                await self._servers.learn(within_s)
        return said or [None]

    async def _known(self, within_s: float) -> list[Node]:
        """The servers, which are asked for if none is known."""
        if not self._servers.primaries():
            with suppress(RedisError, OSError):  # TimeoutError is an OSError
                await self._servers.learn(within_s)
        return self._servers.primaries()

    def _label_of(self, call: Call) -> str:
        home = self._servers.home(call.key)
        return CONNECTION if home is None else home.label

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
                call.reply.set_exception(StoreOutcomeUnknown("the store's client failed"))

    async def _run(self, calls: Sequence[Call]) -> None:
        with suppress(TimeoutError):  # each call knows how far it came
            await self._converse_in_time(calls)
        now = asyncio.get_running_loop().time()
        self._health.ended(calls, now)
        for call in calls:
            _deliver(call)
            if self._metrics is not None:
                self._metrics.record_store_call(call.script.name, now - call.began)

    async def _converse_in_time(self, calls: Sequence[Call]) -> None:
        """What may be repeated has a second try, so that one hiccup costs no upstream call."""
        try:
            await self._limit.run(self._converse(calls))
        except TimeoutError:
            late = [call for call in calls if call.word is UNSAID]
            self._doubted |= {call.node.name for call in late if call.node}
            if not late or not all(call.script.repeatable for call in calls):
                raise
            await self._limit.run(self._converse(late))

    async def _converse(self, calls: Sequence[Call]) -> None:
        """Until each call has its last word: what was not run is sent again, while there is time."""
        rounds, loop = 0, asyncio.get_running_loop()
        while groups := await self._placed(calls):
            began = loop.time()
            await _together([exchange(node, group) for node, group in groups.items()])
            calls = [call for group in groups.values() for call in group if self._goes_on(call, began)]
            rounds += 1
            if calls and (rounds > ROUNDS_AT_ONCE or any(map(_is_to_wait, calls))):
                await asyncio.sleep(rounds * PAUSE_S)

    async def _placed(self, calls: Sequence[Call]) -> dict[Node, list[Call]]:
        """The calls by where they go now, but for those that have nowhere to go, or nowhere else."""
        nobody = await self._look_again(calls)
        groups: dict[Node, list[Call]] = {}
        for call in calls:
            place = self._place_of(call)
            if place is None:
                call.word, call.sent = nobody, False
            elif place is not call.node or kind_of_call(call) != NotSent():
                groups.setdefault(place, []).append(call)
        return groups

    async def _look_again(self, calls: Sequence[Call]) -> Exception:
        """Learns where the servers are, if one is not known or in doubt. Why one may not be known then."""
        nobody: Exception = _NOBODY
        places = [self._place_of(call) for call in calls]
        if any(place is None or place.name in self._doubted for place in places):
            try:
                await self._servers.learn(LEARN_SHARE * self._access.timeout_s)
            except (RedisError, OSError) as error:  # TimeoutError is an OSError: what was known is tried
                nobody = error
            self._doubted.clear()
        return nobody

    def _place_of(self, call: Call) -> Node | None:
        return self._servers.at(call.asks) if call.asks else self._servers.home(call.key)

    def _goes_on(self, call: Call, began: float) -> bool:
        """Whether the call was not run and may be, after what its word has taught about the servers.

        began: its last round. A single server that still refuses on a connection made since has said its last word.
        """
        call.asks = None
        if not isinstance(call.word, Exception) or call.node is None:
            return False
        kind = kind_of_call(call)
        if not self._servers.learns:
            return kind == NotServing() and call.node.pool.replaced_at >= began
        match kind:
            case Moved(to):
                self._servers.move(call.key, to)
            case Ask(to):
                call.asks = to
            case NotServing() | NotSent():
                self._doubted.add(call.node.name)
            case TryAgain():
                pass
            case Done():
                return False
        return True


def _is_to_wait(call: Call) -> bool:
    return isinstance(kind_of_call(call), TryAgain | NotServing)


def _deliver(call: Call) -> None:
    if call.reply.done():  # its request has gone
        return
    failure = failure_of(call)
    if failure is None:
        call.reply.set_result(call.word)
    else:
        call.reply.set_exception(failure)


def _persistence_of(info: bytes | None, config: Any) -> Persistence:
    enabled = re.search(rb"^aof_enabled:([01])", info or b"", re.MULTILINE)
    words = [word.decode() for word in config] if isinstance(config, list) else []
    settings = dict(zip(words[::2], words[1::2], strict=True))
    append_only = None if enabled is None else enabled[1] == b"1"
    return Persistence(append_only, settings.get("save"), settings.get("appendfsync"))


async def _of_one(node: Node, *command: str, within_s: float) -> Any:
    try:
        async with asyncio.timeout(within_s):
            return await ask_node(node, *command)
    except (RedisError, OSError):  # TimeoutError is an OSError
        return None


async def _together(exchanges: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Mostly it is one, which needs no task of its own."""
    if len(exchanges) == 1:
        await exchanges[0]
    else:
        await asyncio.gather(*exchanges)
