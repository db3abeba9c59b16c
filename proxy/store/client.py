"""The Redis and Valkey client of one role: calls Lua scripts, in batches.

* Calls made in the same iteration of the event loop are sent together: one round trip to each server that they need.
* A call is sent again only if that is harmless. A call whose reply was lost fails, unless its script only reads. A call
  that a server refused without running it is sent again: to the redirect's target, or to the server that the
  refreshed topology or host name gives.
* A failed call says whether a server may have run it: `StoreOutcomeUnknown` if it was sent.
* A try takes at most `access.timeout_s` and two ticks, including the wait for a connection and topology refreshes.
"""

import asyncio
import re
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from functools import partial
from time import time
from typing import Any

from redis.exceptions import AskError, MovedError, RedisError
from redis.exceptions import ConnectionError as NotConnectedError

from proxy.problems import StoreOutcomeUnknown, StoreUnavailable
from proxy.store.access import NO_ACCESS, TIMEOUT_S, Role, StoreAccess
from proxy.store.coarse_timeout import CoarseTimeout
from proxy.store.connection_pool import HEALTH_CHECK_S
from proxy.store.health import COOLDOWN_S, Cooldowns, StoreHealth, failure_of
from proxy.store.persistence import Persistence
from proxy.store.redirects import is_not_serving, may_pass, target_of
from proxy.store.scripts import NO_REPLY, Call, Node, Script, execute, load, query_node
from proxy.store.topology import CONNECTION, topology_of
from proxy.telemetry.metrics import Metrics

__all__ = ["COOLDOWN_S", "TIMEOUT_S", "Script", "Store"]

TICK_S = 0.025
"""Resolution of a call's timeout. Shorter ticks cost processor time and make timeouts hardly more precise."""

RETRY_PAUSE_S = 0.01
"""Pause before a server that could not run a call gets it again. It grows by this with each round."""

ROUNDS_WITHOUT_PAUSE = 2
"""Limits redirects without a pause: servers that disagree could redirect a call to each other for ever."""

REFRESH_SHARE = 0.8
"""Share of a call's time that it may wait for a topology refresh. The rest is for a try with the topology as it was."""

WRITE_CHECK_AFTER_S = 2.0
"""Time after the last failed call until a write check tests for recovery. Calls show it earlier, if there are any."""

WRITE_CHECK = Script("proxy.store", "write_check")

_NO_SERVER = NotConnectedError("no server has these keys")


class Store:
    """Redis or Valkey at `url`, in one role. `close` must be called.

    cooldowns: shared with the other role, if that is on the same servers.
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
        self.uses_tls = url.startswith("rediss")
        self._preload = (WRITE_CHECK, *preload)
        self._metrics = metrics
        self._access = access
        self._topology = topology_of(url, access)
        self._waiting: list[Call] = []
        self._running: set[asyncio.Task[None]] = set()
        self._maintenance: asyncio.Task[None] | None = None
        self.cooldowns: Cooldowns = {} if cooldowns is None else cooldowns
        self._health = StoreHealth(role, metrics, self._topology, cooldowns=self.cooldowns)
        self._suspects: set[str] = set()
        """Names of servers that may no longer own their keys: the topology is refreshed before they are called."""
        self._timeout = CoarseTimeout(access.timeout_s, tick_s=TICK_S)

    async def open(self) -> None:
        """Connects, and maintains connections until `close`. A server that cannot be reached is not an error here."""
        nodes = await self._known_primaries(self._setup_timeout_s)
        pings = self._query_all("PING", within_s=self._setup_timeout_s)
        await asyncio.gather(pings, *(self._prepare(node) for node in nodes))
        self._maintenance = asyncio.get_running_loop().create_task(self._maintain())

    async def call(self, script: Script, *keys: str, args: tuple[bytes | int | str, ...] = ()) -> Any:
        """The reply of `script`. All keys must be in one slot. Raises `StoreUnavailable`."""
        call = self._new_call(script, keys, args)
        self._waiting.append(call)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._send)
        return await call.future

    async def call_at_once(self, script: Script, *keys: str, args: tuple[bytes | int | str, ...] = ()) -> Any:
        """As `call`, but without waiting for other calls, for callers that batch themselves. Must not be cancelled."""
        call = self._new_call(script, keys, args)
        await self._run([call])
        return call.future.result()

    def _new_call(self, script: Script, keys: tuple[str, ...], args: tuple[bytes | int | str, ...]) -> Call:
        loop = asyncio.get_running_loop()
        call = Call(script, keys, args, loop.create_future(), loop.time())
        label = self._owner_label(call)
        if self._health.is_cooling_down(label, call.started_at):
            call.node = self._topology.node_of(call.key)
            self._health.record_skipped(call, label)
            raise StoreUnavailable("not called: the server is in a cool-down after a failure")
        return call

    async def is_up(self) -> bool:
        """Whether the last write was served, and every server replies now."""
        return self._health.is_up and await self.ping()

    async def ping(self) -> bool:
        """Whether every server replies within the timeout of a call."""
        return None not in await self._query_all("PING", within_s=self._access.timeout_s)

    async def version(self) -> tuple[int, ...] | None:
        """The lowest Redis version of the servers, for Valkey the compatible one; None if unknown."""
        texts = await self._info_values("server", "redis_version")
        versions = [tuple(map(int, text.split("."))) for text in texts if re.fullmatch(r"[0-9]+(\.[0-9]+)*", text)]
        return min(versions, default=None)

    async def eviction_policy(self) -> str | None:
        """`maxmemory-policy`: that of a server that evicts, if there is one; None if unknown."""
        policies = await self._info_values("memory", "maxmemory_policy")
        return next((policy for policy in policies if policy != "noeviction"), policies[0] if policies else None)

    async def persistence(self) -> list[Persistence]:
        """The persistence settings of each server."""
        infos = await self._query_all("INFO", "persistence", within_s=self._setup_timeout_s)
        configs = await self._query_all("CONFIG", "GET", "save", "appendfsync", within_s=self._setup_timeout_s)
        return [_persistence_of(info, config) for info, config in zip(infos, configs, strict=False)]

    async def clock_lead_s(self) -> float | None:
        """How far a server's clock is ahead of this machine's: the largest difference of any; None if unknown."""
        sent_at = time()
        replies = await self._query_all("TIME", within_s=self._setup_timeout_s)
        here = (sent_at + time()) / 2
        leads = [int(reply[0]) + int(reply[1]) / 1e6 - here for reply in replies if isinstance(reply, list)]
        return max(leads, key=abs, default=None)

    async def check_writes(self, key: str) -> None:
        """Raises `StoreUnavailable`, with the reason, if the server of `key` cannot be reached or refuses writes."""
        await self.call(WRITE_CHECK, key)

    async def close(self) -> None:
        if self._maintenance is not None:
            self._maintenance.cancel()
            await asyncio.wait({self._maintenance})
        while self._running:
            await asyncio.wait(self._running)
        await self._topology.close()

    @property
    def _setup_timeout_s(self) -> float:
        """Limits what may need a new connection and is not part of a request."""
        return self._access.connect_timeout_s + self._access.timeout_s

    async def _maintain(self) -> None:
        """Keeps connections warm, and tests for recovery when there are no calls."""
        while True:
            await asyncio.gather(self._check_down(), *(self._prepare(node) for node in self._topology.primaries()))
            await asyncio.sleep(HEALTH_CHECK_S)

    async def _prepare(self, node: Node) -> None:
        """Keeps connections to a server warm, and loads the scripts into a server that is new in the topology.

        The first call of a script then takes one round trip instead of two.
        """
        await node.pool.keep_warm(self._access.timeout_s)
        with suppress(RedisError, OSError):  # TimeoutError is an OSError; the next round tries again
            async with asyncio.timeout(self._setup_timeout_s):
                await load(node, self._preload)

    async def _check_down(self) -> None:
        loop = asyncio.get_running_loop()
        for part, failed in self._health.down_before(loop.time() - WRITE_CHECK_AFTER_S):
            check = Call(WRITE_CHECK, failed.keys, (), loop.create_future(), loop.time())
            with suppress(TimeoutError):
                await self._execute_in_time([check])
            self._health.record_write_check(part, check, loop.time())

    async def _info_values(self, section: str, name: str) -> list[str]:
        """The value of one field of INFO, of each server that replies."""
        replies = await self._query_all("INFO", section, within_s=self._setup_timeout_s)
        texts = [reply.decode() for reply in replies if reply is not None]
        return [value for text in texts for value in re.findall(rf"^{name}:(.*?)\r?$", text, re.MULTILINE)]

    async def _query_all(self, *command: str, within_s: float) -> list[Any]:
        """Each server's reply to a command; None for one that does not reply. [None] if no server is known."""
        nodes = await self._known_primaries(within_s)
        replies = await asyncio.gather(*(_query_one(node, *command, within_s=within_s) for node in nodes))
        if None in replies:
            with suppress(RedisError, OSError):  # if there are no calls, nothing else notices a new topology
                await self._topology.refresh(within_s)
        return replies or [None]

    async def _known_primaries(self, within_s: float) -> list[Node]:
        """The primaries, after a topology refresh if none is known."""
        if not self._topology.primaries():
            with suppress(RedisError, OSError):  # TimeoutError is an OSError
                await self._topology.refresh(within_s)
        return self._topology.primaries()

    def _owner_label(self, call: Call) -> str:
        """The label of the server that has the call's keys."""
        node = self._topology.node_of(call.key)
        return CONNECTION if node is None else node.label

    def _send(self) -> None:
        """Sends one batch to each server, so that a server that hangs does not delay calls to the others."""
        waiting, self._waiting = self._waiting, []
        batches: dict[str, list[Call]] = {}
        for call in waiting:
            batches.setdefault(self._owner_label(call), []).append(call)
        for calls in batches.values():
            task = asyncio.get_running_loop().create_task(self._run(calls))
            self._running.add(task)
            task.add_done_callback(partial(self._finish, calls))

    def _finish(self, calls: Sequence[Call], task: asyncio.Task[None]) -> None:
        """Fails the calls that a defect in this client has left without a result."""
        self._running.discard(task)
        for call in calls:
            if not call.future.done():
                call.future.set_exception(StoreOutcomeUnknown("the store's client failed"))

    async def _run(self, calls: Sequence[Call]) -> None:
        with suppress(TimeoutError):  # each call has its state
            await self._execute_in_time(calls)
        now = asyncio.get_running_loop().time()
        self._health.record_ended(calls, now)
        for call in calls:
            _deliver(call)
            if self._metrics is not None:
                self._metrics.record_store_call(call.script.name, now - call.started_at)

    async def _execute_in_time(self, calls: Sequence[Call]) -> None:
        """Executes the calls within the timeout. A batch that may be repeated has a second try.

        Raises `TimeoutError`; the calls that had no reply in time have none as their result.
        """
        try:
            await self._timeout.run(self._execute(calls))
        except TimeoutError:
            late = [call for call in calls if call.result is NO_REPLY]
            self._suspects |= {call.node.name for call in late if call.node}
            if not late or not all(call.script.repeatable for call in calls):
                raise
            await self._timeout.run(self._execute(late))

    async def _execute(self, calls: Sequence[Call]) -> None:
        """Sends the calls, round by round, until all results are final."""
        rounds, loop = 0, asyncio.get_running_loop()
        while groups := await self._group_by_node(calls):
            round_started_at = loop.time()
            await _together([execute(node, group) for node, group in groups.items()])
            calls = [call for group in groups.values() for call in group if self._is_retried(call, round_started_at)]
            rounds += 1
            if calls and (rounds > ROUNDS_WITHOUT_PAUSE or any(map(_needs_pause, calls))):
                await asyncio.sleep(rounds * RETRY_PAUSE_S)

    async def _group_by_node(self, calls: Sequence[Call]) -> dict[Node, list[Call]]:
        """The calls by the server that gets them next.

        Without calls that have no server, and calls that this server could not be sent in the last round.
        """
        no_node_error = await self._refresh_if_needed(calls)
        groups: dict[Node, list[Call]] = {}
        for call in calls:
            node = self._next_node(call)
            if node is None:
                call.result, call.sent = no_node_error, False
            elif node is not call.node or not was_unreachable(call):
                groups.setdefault(node, []).append(call)
        return groups

    async def _refresh_if_needed(self, calls: Sequence[Call]) -> Exception:
        """Refreshes the topology if a call's server is unknown or suspect. Returns the error for calls without one."""
        no_node_error: Exception = _NO_SERVER
        nodes = [self._next_node(call) for call in calls]
        if any(node is None or node.name in self._suspects for node in nodes):
            try:
                await self._topology.refresh(REFRESH_SHARE * self._access.timeout_s)
            except (RedisError, OSError) as error:  # TimeoutError is an OSError; the old topology is used
                no_node_error = error
            self._suspects.clear()
        return no_node_error

    def _next_node(self, call: Call) -> Node | None:
        if call.ask_address:
            return self._topology.node_at(call.ask_address)
        return self._topology.node_of(call.key)

    def _is_retried(self, call: Call, round_started_at: float) -> bool:
        """Whether to send the call again; notes what its result says about the topology.

        A single server that refuses a call on a connection made in this round has refused it for good.
        """
        call.ask_address = None
        error = call.result
        if not isinstance(error, Exception) or call.node is None:
            return False
        if not self._topology.can_refresh:
            return is_not_serving(error) and call.node.pool.replaced_at >= round_started_at
        if isinstance(error, MovedError):
            self._topology.record_move(call.key, target_of(error, call.node.host))
        elif isinstance(error, AskError):
            call.ask_address = target_of(error, call.node.host)
        elif is_not_serving(error) or was_unreachable(call):
            self._suspects.add(call.node.name)
        else:
            return may_pass(error)
        return True


def _needs_pause(call: Call) -> bool:
    return is_not_serving(call.result) or may_pass(call.result)


def was_unreachable(call: Call) -> bool:
    """Whether nothing was sent, because no connection could be opened."""
    return not call.sent and isinstance(call.result, RedisError | OSError) and not is_not_serving(call.result)


def _deliver(call: Call) -> None:
    if call.future.done():  # its caller was cancelled
        return
    failure = failure_of(call)
    if failure is None:
        call.future.set_result(call.result)
    else:
        call.future.set_exception(failure)


def _persistence_of(info: bytes | None, config: Any) -> Persistence:
    enabled = re.search(rb"^aof_enabled:([01])", info or b"", re.MULTILINE)
    texts = [text.decode() for text in config] if isinstance(config, list) else []
    settings = dict(zip(texts[::2], texts[1::2], strict=True))
    append_only = None if enabled is None else enabled[1] == b"1"
    return Persistence(append_only, settings.get("save"), settings.get("appendfsync"))


async def _query_one(node: Node, *command: str, within_s: float) -> Any:
    try:
        async with asyncio.timeout(within_s):
            return await query_node(node, *command)
    except (RedisError, OSError):  # TimeoutError is an OSError
        return None


async def _together(executions: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Runs the executions concurrently. A single one, the usual case, needs no task of its own."""
    if len(executions) == 1:
        await executions[0]
    else:
        await asyncio.gather(*executions)
