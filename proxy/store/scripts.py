"""Scripts, and calls of them on one connection.

A call knows at each moment whether the server may have run it: it was sent, and no word of the server says otherwise.
So nothing is sent where it is known to be lost, or likely: on a connection that has ended while it lay idle, or on one
that lay idle while another one to the same server broke or fell silent.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha1
from importlib.resources import files
from typing import Any, Final

from hiredis import pack_command
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import BusyLoadingError, NoScriptError, RedisError, ResponseError

from proxy.store.connection_pool import ConnectionPool
from proxy.store.redirects import is_not_serving
from proxy.urls import Address

Command = tuple[bytes | int | str, ...]

_pack: Callable[[Command], bytes] = pack_command  # type: ignore[assignment] # its stub knows tuples of one member


class Script:
    """A Lua script: the file `lua/<name>.lua` of a package. Its header lists its keys, arguments and reply.

    It is read at once: when it is first called there may be no file descriptor left.

    repeatable: to run it twice is the same as to run it once.
    digest: Redis' own name for the script.
    """

    def __init__(self, package: str, name: str, *, repeatable: bool = False) -> None:
        self.name = name
        self.repeatable = repeatable
        self.text = (files(package) / "lua" / f"{name}.lua").read_bytes()
        self.digest = sha1(self.text, usedforsecurity=False).hexdigest()

    @cached_property
    def writes(self) -> bool:
        return b"no-writes" not in self._first_line

    @cached_property
    def tells_of_writes(self) -> bool:
        """Whether it is refused whenever the server refuses writes; flags such as `allow-oom` make exceptions."""
        return self._first_line == b"#!lua"

    @property
    def _first_line(self) -> bytes:
        return self.text.partition(b"\n")[0]


def scripts_in(package: str) -> list[Script]:
    """All Lua scripts of a package, to be loaded into a server ahead of their first call."""
    folder = files(package) / "lua"
    return [Script(package, path.name.removesuffix(".lua")) for path in folder.iterdir() if path.name.endswith(".lua")]


class Unsaid:
    """No word of a server."""


UNSAID: Final = Unsaid()


@dataclass(slots=True, eq=False)
class Node:
    """A server. `label` is what the log calls the way there.

    answered: when the latest call began that it has answered, on the loop's clock. answered_at: when it last answered.
    """

    name: str
    label: str
    host: str
    pool: ConnectionPool
    answered: float = 0.0
    answered_at: float = 0.0
    has_scripts: bool = False


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
    """Sends the calls to a server together; each has a word then, its own or why there is none.

    One that was refused here before, and cannot be sent now, keeps that word: it says more.
    """
    for call in calls:
        if node is not call.node or not is_not_serving(call.word):
            call.word = UNSAID
        call.node, call.sent = node, False
    try:
        connection = await node.pool.acquire()
        try:
            await _exchange(connection, calls)
            node.answered = max(node.answered, calls[0].began)
            node.answered_at = asyncio.get_running_loop().time()
            if any(is_not_serving(call.word) for call in calls):
                await node.pool.replace_all()
        except BaseException:  # replies may still come, and would be taken for another's
            await connection.disconnect(nowait=True)
            await node.pool.close_idle()
            raise
        finally:
            await node.pool.release(connection)
    except (RedisError, OSError) as error:
        for call in calls:
            if call.word is UNSAID:
                call.word = error


async def load(node: Node, scripts: Sequence[Script]) -> None:
    """Loads scripts into a server, once. Raises `RedisError`, `OSError` if it cannot be reached.

    A refusal, such as by an ACL, is not an error here: the calls will meet it, and say so.
    """
    if node.has_scripts:
        return
    connection = await node.pool.acquire()
    try:
        commands = b"".join(_pack(("SCRIPT", "LOAD", script.text)) for script in scripts)
        await connection.send_packed_command(commands, check_health=False)
        for _ in scripts:
            await _reply_on(connection)
        node.has_scripts = True
    except BaseException:  # replies may still come, and would be taken for those of another call
        await connection.disconnect(nowait=True)
        raise
    finally:
        await node.pool.release(connection)


async def ask(connection: AbstractConnection, *command: str) -> Any:
    """The reply to a command that is no script. Raises `RedisError`, `OSError`."""
    await connection.send_packed_command(_pack(command), check_health=False)
    return await connection.read_response()


async def ask_node(node: Node, *command: str) -> Any:
    """As `ask`, on one of the connections to a server."""
    connection = await node.pool.acquire()
    try:
        return await ask(connection, *command)
    finally:
        await node.pool.release(connection)


async def _exchange(connection: AbstractConnection, calls: Sequence[Call]) -> None:
    """A script that the server did not know has not run: it is sent again, after its text and in one round trip."""
    await _converse(connection, calls, texts={})
    unknown = [call for call in calls if isinstance(call.word, NoScriptError)]
    if unknown:
        await _converse(connection, unknown, texts={call.script.name: call.script.text for call in unknown})


async def _converse(connection: AbstractConnection, calls: Sequence[Call], *, texts: Mapping[str, bytes]) -> None:
    """Sends the calls, after the scripts in `texts`, and gives each its word."""
    commands: list[Command] = [("SCRIPT", "LOAD", text) for text in texts.values()]
    takers: list[Call | None] = []
    for call in calls:
        if call.asks:
            commands.append(("ASKING",))
            takers.append(None)
        commands.append(("EVALSHA", call.script.digest, len(call.keys), *call.keys, *call.args))
        takers.append(call)
        call.sent, call.word = True, UNSAID
    await connection.send_packed_command(b"".join(map(_pack, commands)), check_health=False)
    loaded = {name: await _reply_on(connection) for name in texts}
    for taker in takers:
        word = await _reply_on(connection)
        if taker is not None:  # of a script that could not be loaded, why is the word
            failure = loaded.get(taker.script.name) if isinstance(word, NoScriptError) else None
            taker.word = failure if isinstance(failure, Exception) else word


async def _reply_on(connection: AbstractConnection) -> Any:
    """The next reply, or an error that the server says. `LOADING` is one, though redis-py has it end the connection."""
    try:
        return await connection.read_response(disconnect_on_error=False)
    except (ResponseError, BusyLoadingError) as error:
        return error
