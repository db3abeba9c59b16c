"""The way to Redis or Valkey: scripts, batched.

* Calls made in the same turn of the event loop go out together, in one round trip.
* Nothing is sent twice unless that is known to be harmless. redis-py would run any script again after a late reply;
  here that is a failure, but for scripts that only look. One that the server did not know has not run: it goes again.
* A call that fails says whether the server may have run it: `StoreUnanswered` if it was sent.
* A try takes `TIMEOUT_S` at the most, waiting for a connection included. After a failure the store is left alone
  for `REST_S`, and calls fail at once, so that a hanging store costs one wait rather than one a request.
"""

import asyncio
import logging
import re
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import sha1
from importlib.resources import files
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, NoScriptError, RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from proxy.embedded import Role
from proxy.metrics import Metrics
from proxy.problems import StoreUnanswered, StoreUnavailable
from proxy.settings import SecretUrl, Settings
from proxy.settings import Store as StoreSettings

TIMEOUT_S = 0.25
GRACE_S = 0.05
REST_S = 0.5
MAX_CONNECTIONS = 16
OLDEST_REDIS = (7, 0)

EmbeddedUrls = Mapping[Role, str]

_CONNECTION = "connection"

log = logging.getLogger(__name__)


class Script:
    """One of the files in `proxy/lua`; its header says what it takes and gives.

    repeatable: to run it twice is the same as to run it once.
    """

    def __init__(self, name: str, *, repeatable: bool = False) -> None:
        self.name = name
        self.repeatable = repeatable

    @cached_property
    def text(self) -> bytes:
        return (files("proxy") / "lua" / f"{self.name}.lua").read_bytes()

    @cached_property
    def digest(self) -> str:
        return sha1(self.text, usedforsecurity=False).hexdigest()  # Redis' own name for a script


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    script: Script
    keys: tuple[str, ...]
    args: tuple[bytes | int | str, ...]
    reply: asyncio.Future[Any]
    began: float


@dataclass(slots=True)
class _Batch:
    """Calls that go out together. `sent`: some of it may have been run, as far as can be known."""

    calls: list[_Call] = field(default_factory=list)
    sent: bool = False

    @property
    def repeatable(self) -> bool:
        return all(call.script.repeatable for call in self.calls)


class Store:
    """One Redis or Valkey server in one role, such as `ledger`. `url` must name it; `close` must be called."""

    def __init__(
        self,
        url: str,
        role: Role,
        metrics: Metrics | None = None,
        *,
        username: str | None = None,
        password: str | None = None,
    ) -> None:
        self.role = role
        self._metrics = metrics
        self._note_up(is_up=True)
        credentials = {"username": username, "password": password}
        self._pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=None,
            socket_timeout=None,  # a call's time is counted here, once
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            legacy_responses=False,
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
            **{name: value for name, value in credentials.items() if value is not None},
        )
        self._client = Redis.from_pool(self._pool)
        self._waiting = _Batch()
        self._running: set[asyncio.Task[None]] = set()
        self._rests_until = 0.0
        self._troubles: dict[str, str] = {}

    async def call(self, script: Script, *keys: str, args: tuple[bytes | int | str, ...] = ()) -> Any:
        """The reply of `script`. Raises `StoreUnavailable`."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._rests_until:
            raise StoreUnavailable("left alone for a moment after a failure")
        call = _Call(script, keys, args, loop.create_future(), loop.time())
        self._waiting.calls.append(call)
        if len(self._waiting.calls) == 1:
            loop.call_soon(self._send)
        return await call.reply

    async def ping(self) -> bool:
        """Whether the server answers now."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._client.ping()
        except (RedisError, OSError, TimeoutError):
            return False
        return True

    async def version(self) -> tuple[int, ...] | None:
        """The Redis version that the server is or is compatible with; None if it does not say."""
        found = str((await self._info("server")).get("redis_version"))
        return tuple(map(int, found.split("."))) if re.fullmatch(r"[0-9]+(\.[0-9]+)*", found) else None

    async def eviction_policy(self) -> str | None:
        """`maxmemory-policy`; None if the server does not say."""
        policy = (await self._info("memory")).get("maxmemory_policy")
        return None if policy is None else str(policy)

    async def _info(self, section: str) -> dict[str, Any]:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return dict(await self._client.info(section))
        except (RedisError, OSError, TimeoutError):
            return {}

    async def close(self) -> None:
        while self._running:
            await asyncio.wait(self._running)
        await self._client.aclose()

    def _send(self) -> None:
        batch, self._waiting = self._waiting, _Batch()
        task = asyncio.get_running_loop().create_task(self._run(batch))
        self._running.add(task)
        task.add_done_callback(partial(self._finish, batch))

    def _finish(self, batch: _Batch, task: asyncio.Task[None]) -> None:
        """Nobody waits for a reply that a defect has lost."""
        self._running.discard(task)
        for call in batch.calls:
            if not call.reply.done():
                call.reply.set_exception(StoreUnanswered("the store's client failed"))

    async def _run(self, batch: _Batch) -> None:
        try:
            replies = await self._replies(batch)
        except (RedisError, OSError, TimeoutError) as error:
            self._rests_until = asyncio.get_running_loop().time() + REST_S
            reason = str(error) or "no answer in time"
            self._trouble(_CONNECTION, reason)
            self._note_up(is_up=False)
            sent = batch.sent and not isinstance(error, BusyLoadingError)
            replies = [StoreUnanswered(reason) if sent else StoreUnavailable(reason)] * len(batch.calls)
        else:
            self._recovered(_CONNECTION)
            self._note_up(is_up=True)
        for call, reply in zip(batch.calls, replies, strict=True):
            self._deliver(call, reply)

    async def _replies(self, batch: _Batch) -> list[Any]:
        """The replies in time; what may be repeated has a second try, so that one hiccup costs no upstream call."""
        try:
            return await _in_time(self._execute(batch))
        except TimeoutError:
            if not batch.repeatable:
                raise
            return await _in_time(self._execute(batch))

    async def _execute(self, batch: _Batch) -> list[Any]:
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]  # redis-py's decorator
        try:
            batch.sent = True
            replies = await _exchange(connection, batch.calls)
            unknown = [index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
            if unknown:
                for text in {batch.calls[index].script.text for index in unknown}:
                    await _ask(connection, ("SCRIPT", "LOAD", text))
                again = await _exchange(connection, [batch.calls[index] for index in unknown])
                for index, reply in zip(unknown, again, strict=True):
                    replies[index] = reply
            return replies
        finally:
            await self._pool.release(connection)

    def _deliver(self, call: _Call, reply: Any) -> None:
        if self._metrics is not None:
            self._metrics.observe_store(call.script.name, asyncio.get_running_loop().time() - call.began)
        if isinstance(reply, ResponseError):
            self._trouble(call.script.name, str(reply))
        elif not isinstance(reply, Exception):
            self._recovered(call.script.name)
        if call.reply.done():  # its request has gone
            return
        if isinstance(reply, StoreUnavailable):
            call.reply.set_exception(reply)
        elif isinstance(reply, Exception):
            call.reply.set_exception(StoreUnavailable(str(reply)))
        else:
            call.reply.set_result(reply)

    def _note_up(self, *, is_up: bool) -> None:
        if self._metrics is not None:
            self._metrics.store_up.labels(self.role).set(is_up)

    def _trouble(self, part: str, reason: str) -> None:
        """Logs a trouble when it begins or changes, not for every request."""
        if self._troubles.get(part) != reason:
            self._troubles[part] = reason
            log.error("the %s's %s fails: %s", self.role, part, reason)

    def _recovered(self, part: str) -> None:
        if self._troubles.pop(part, None) is not None:
            log.info("the %s's %s works again", self.role, part)


async def _exchange(connection: AbstractConnection, calls: Sequence[_Call]) -> list[Any]:
    """Sends the calls together. The replies; one that the server refuses is an exception among them."""
    commands = (("EVALSHA", call.script.digest, len(call.keys), *call.keys, *call.args) for call in calls)
    await connection.send_packed_command(connection.pack_commands(commands))
    return [await _read(connection) for _ in calls]


async def _ask(connection: AbstractConnection, command: tuple[bytes | str, ...]) -> None:
    await connection.send_packed_command(connection.pack_command(*command))
    await _read(connection)


async def _read(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


async def _in_time(work: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """What `work` brings within `TIMEOUT_S`. Raises `TimeoutError`.

    An event loop that stood still is late itself: its timers and the replies that came meanwhile are due in the same
    turn, and a reply that is there already must count.
    """
    task = asyncio.ensure_future(work)
    for limit_s in (TIMEOUT_S, GRACE_S):
        await asyncio.wait({task}, timeout=limit_s)
        if task.done():
            return task.result()
    task.cancel()
    await asyncio.wait({task})
    raise TimeoutError


def open_ledger_store(settings: Settings, embedded_urls: EmbeddedUrls, metrics: Metrics | None = None) -> Store:
    """The store of quotas and usage: the one that the settings name, or else the embedded one."""
    configured = settings.store
    if configured.url is None:
        return Store(embedded_urls["ledger"], "ledger", metrics)
    return _named_store(configured.url, "ledger", configured, metrics)


def open_book_store(settings: Settings, embedded_urls: EmbeddedUrls, metrics: Metrics | None = None) -> Store:
    """The store of prices: one of their own, or else the ledger's, or else the embedded one."""
    if settings.cache.url is not None:
        return Store(settings.cache.url.get_secret_value(), "price-book", metrics)
    if settings.store.url is not None:
        return _named_store(settings.store.url, "price-book", settings.store, metrics)
    return Store(embedded_urls["price-book"], "price-book", metrics)


def _named_store(url: SecretUrl, role: Role, configured: StoreSettings, metrics: Metrics | None) -> Store:
    password = None if configured.password is None else configured.password.get_secret_value()
    return Store(url.get_secret_value(), role, metrics, username=configured.username, password=password)
