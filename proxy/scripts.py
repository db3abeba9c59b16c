"""Scripts, and calls of them on one connection.

A call knows at each moment whether the server may have run it: it was sent, and no word of the server says otherwise.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha1
from importlib.resources import files
from typing import Any, Final

from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import BusyLoadingError, NoScriptError, RedisError, ResponseError

from proxy.settings_urls import Address


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


class Unsaid:
    """No word of a server."""


UNSAID: Final = Unsaid()


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A server. `label` is what the log calls the way there."""

    name: str
    label: str
    host: str
    pool: BlockingConnectionPool


@dataclass(slots=True, eq=False)
class Call:
    """A script with its arguments, on its way.

    sent: the server may have it, and may have run it unless its word says otherwise.
    word: the reply, an error that the server said, or why there is none.
    node: the server that was tried last.
    asks: where one try is to go with ASKING, instead of the home of its keys.
    """

    script: Script
    keys: tuple[str, ...]
    args: tuple[bytes | int | str, ...]
    reply: asyncio.Future[Any]
    began: float
    sent: bool = False
    word: Any = UNSAID
    node: Node | None = None
    asks: Address | None = None

    @property
    def key(self) -> str:
        """Which stands for them all: they are in one slot."""
        return self.keys[0] if self.keys else ""


async def exchange(node: Node, calls: Sequence[Call]) -> None:
    """Sends the calls to a server together; each has a word then, its own or why there is none."""
    for call in calls:
        call.node, call.sent, call.word = node, False, UNSAID
    try:
        connection = await node.pool.get_connection()  # type: ignore[no-untyped-call]  # redis-py's decorator
        try:
            await _exchange(connection, calls)
        finally:
            await node.pool.release(connection)
    except (RedisError, OSError) as error:
        for call in calls:
            if call.word is UNSAID:
                call.word = error


async def _exchange(connection: AbstractConnection, calls: Sequence[Call]) -> None:
    """A script that the server did not know has not run: it goes again."""
    await _converse(connection, calls)
    unknown = [call for call in calls if isinstance(call.word, NoScriptError)]
    if not unknown:
        return
    for text in {call.script.text for call in unknown}:
        await connection.send_packed_command(connection.pack_command("SCRIPT", "LOAD", text))
        await _read(connection)
    await _converse(connection, unknown)


async def _converse(connection: AbstractConnection, calls: Sequence[Call]) -> None:
    commands: list[tuple[bytes | int | str, ...]] = []
    for call in calls:
        if call.asks:
            commands.append(("ASKING",))
        commands.append(("EVALSHA", call.script.digest, len(call.keys), *call.keys, *call.args))
    packed = connection.pack_commands(commands)
    for call in calls:
        call.sent, call.word = True, UNSAID
    await connection.send_packed_command(packed)
    for call in calls:
        if call.asks:
            await _read(connection)
        call.word = await _read(connection)


async def _read(connection: AbstractConnection) -> Any:
    """A reply, or what the server refuses with. LOADING is such a word too, and more replies follow it."""
    try:
        return await connection.read_response(disconnect_on_error=False)
    except (ResponseError, BusyLoadingError) as error:
        return error
    except BaseException:  # the reply may still come, and would be taken for another one's
        await connection.disconnect(nowait=True)
        raise
