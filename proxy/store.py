"""The way to Redis or Valkey: scripts, batched.

* Calls made in the same turn of the event loop go out together, in one round trip.
* Nothing is sent twice unless that is known to be harmless. redis-py would run any script again after a late reply;
  here that is a failure, but for scripts that only look. One that the server did not know has not run: it goes again.
* A try takes `TIMEOUT_S` at the most, waiting for a connection included. After a failure the store is left alone
  for `REST_S`, and calls fail at once, so that a hanging store costs one wait rather than one a request.
"""

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha1
from importlib.resources import files
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from proxy import settings
from proxy.problems import StoreUnavailable

TIMEOUT_S = 0.25
GRACE_S = 0.05
REST_S = 0.5
MAX_CONNECTIONS = 16
OLDEST_REDIS = (7, 0)

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


class Store:
    """One Redis or Valkey server. `url` must name it; `close` must be called."""

    def __init__(self, url: str, *, username: str | None = None, password: str | None = None) -> None:
        credentials = {"username": username, "password": password}
        pool = BlockingConnectionPool.from_url(
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
        self._client = Redis.from_pool(pool)
        self._waiting: list[_Call] = []
        self._running: set[asyncio.Task[None]] = set()
        self._rests_until = 0.0
        self._troubles: dict[str, str] = {}

    async def call(self, script: Script, *keys: str, args: tuple[bytes | int | str, ...] = ()) -> Any:
        """The reply of `script`. Raises `StoreUnavailable`."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._rests_until:
            raise StoreUnavailable("left alone for a moment after a failure")
        call = _Call(script, keys, args, loop.create_future())
        self._waiting.append(call)
        if len(self._waiting) == 1:
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
        try:
            async with asyncio.timeout(TIMEOUT_S):
                version = (await self._client.info("server"))["redis_version"]
            return tuple(int(part) for part in str(version).split("."))
        except (RedisError, OSError, TimeoutError, KeyError, ValueError):
            return None

    async def close(self) -> None:
        while self._running:
            await asyncio.wait(self._running)
        await self._client.aclose()

    def _send(self) -> None:
        batch, self._waiting = self._waiting, []
        task = asyncio.get_running_loop().create_task(self._run(batch))
        self._running.add(task)
        task.add_done_callback(partial(self._finish, batch))

    def _finish(self, batch: list[_Call], task: asyncio.Task[None]) -> None:
        """Nobody waits for a reply that a defect has lost."""
        self._running.discard(task)
        for call in batch:
            if not call.reply.done():
                call.reply.set_exception(StoreUnavailable("the store's client failed"))

    async def _run(self, batch: list[_Call]) -> None:
        try:
            replies = await self._replies(batch)
        except (RedisError, OSError, TimeoutError) as error:
            self._rests_until = asyncio.get_running_loop().time() + REST_S
            self._trouble(_CONNECTION, str(error) or "no answer in time")
            replies = [error] * len(batch)
        else:
            self._recovered(_CONNECTION)
        for call, reply in zip(batch, replies, strict=True):
            self._deliver(call, reply)

    async def _replies(self, batch: list[_Call]) -> list[Any]:
        """The replies in time; what may be repeated has a second try, so that one hiccup costs no upstream call."""
        try:
            return await _in_time(self._execute(batch))
        except TimeoutError:
            if not all(call.script.repeatable for call in batch):
                raise
            return await _in_time(self._execute(batch))

    async def _execute(self, batch: list[_Call]) -> list[Any]:
        replies = await self._pipeline(batch)
        unknown = [index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            for text in {batch[index].script.text for index in unknown}:
                await self._client.script_load(text)
            again = await self._pipeline([batch[index] for index in unknown])
            for index, reply in zip(unknown, again, strict=True):
                replies[index] = reply
        return replies

    async def _pipeline(self, batch: list[_Call]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for call in batch:
            pipeline.evalsha(call.script.digest, len(call.keys), *call.keys, *call.args)
        return await pipeline.execute(raise_on_error=False)

    def _deliver(self, call: _Call, reply: Any) -> None:
        if isinstance(reply, ResponseError):
            self._trouble(call.script.name, str(reply))
        elif not isinstance(reply, Exception):
            self._recovered(call.script.name)
        if call.reply.done():  # its request has gone
            return
        if isinstance(reply, Exception):
            call.reply.set_exception(StoreUnavailable(str(reply)))
        else:
            call.reply.set_result(reply)

    def _trouble(self, part: str, reason: str) -> None:
        """Logs a trouble when it begins or changes, not for every request."""
        if self._troubles.get(part) != reason:
            self._troubles[part] = reason
            log.error("the store's %s fails: %s", part, reason)

    def _recovered(self, part: str) -> None:
        if self._troubles.pop(part, None) is not None:
            log.info("the store's %s works again", part)


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


def open_store(configured: settings.Store, embedded_url: str | None) -> Store:
    """The store that the settings name, or else the embedded one."""
    if configured.url is None:
        if embedded_url is None:
            raise ValueError("no store: neither a URL nor an embedded server")
        return Store(embedded_url)
    password = None if configured.password is None else configured.password.get_secret_value()
    return Store(configured.url.get_secret_value(), username=configured.username, password=password)
