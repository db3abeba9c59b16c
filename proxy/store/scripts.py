"""Lua scripts, and calls of them over one connection.

A call always knows whether the server may have run it: yes if it was sent and no reply says that it was refused.
A call is not sent where it is likely to be lost: on a connection that was closed while it was idle, or on one that was
idle while another connection to the same server broke or timed out.
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

_pack: Callable[[Command], bytes] = pack_command  # type: ignore[assignment] # its stub allows tuples of one member only


class Script:
    """A Lua script: the file `lua/<name>.lua` of a package. Its header lists its keys, arguments and reply.

    It reads each key that can expire before its first write, or may run twice: see `proxy.store.redirects`.

    The file is read at once: at the first call there may be no file descriptor left.

    repeatable: to run it twice has the same effect as to run it once.
    digest: its SHA-1, by which Redis calls it.
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
    def proves_writes(self) -> bool:
        """Whether a reply shows that the server accepts writes. Flags such as `allow-oom` make exceptions."""
        return self._first_line == b"#!lua"

    @property
    def _first_line(self) -> bytes:
        return self.text.partition(b"\n")[0]


def scripts_in(package: str) -> list[Script]:
    """All Lua scripts of a package."""
    folder = files(package) / "lua"
    return [Script(package, path.name.removesuffix(".lua")) for path in folder.iterdir() if path.name.endswith(".lua")]


class NoReplyError(Exception):
    """There is no reply yet."""


NO_REPLY: Final = NoReplyError("no answer in time")
"""The result of a call until there is another."""


@dataclass(slots=True, eq=False)
class Node:
    """A server. `label` names its connection in the log, and its cool-down.

    served_call_started_at: start of the latest call that it replied to, on the event loop's clock.
    replied_at: time of its last reply.
    has_scripts: whether the scripts have been loaded into it.
    """

    name: str
    label: str
    host: str
    pool: ConnectionPool
    served_call_started_at: float = 0.0
    replied_at: float = 0.0
    has_scripts: bool = False


@dataclass(slots=True, eq=False)
class Call:
    """A script with its arguments, and what has become of it.

    started_at: on the event loop's clock.
    sent: whether a server may have received it, and may have run it unless `result` is a refusal.
    result: the reply, the server's error, or the reason why there is no reply.
    node: the server of the last try.
    ask_address: the server of the next try, with ASKING; None for the owner of the keys' slot.
    """

    script: Script
    keys: tuple[str, ...]
    args: tuple[bytes | int | str, ...]
    future: asyncio.Future[Any]
    started_at: float
    sent: bool = False
    result: Any = NO_REPLY
    node: Node | None = None
    ask_address: Address | None = None

    @property
    def key(self) -> str:
        """The first key; all keys are in one slot."""
        return self.keys[0] if self.keys else ""


async def execute(node: Node, calls: Sequence[Call]) -> None:
    """Sends the calls to a server in one batch, and sets the result of each.

    A call that this server refused as not serving, and that cannot be sent now, keeps that refusal: it explains more
    than the failed retry.
    """
    for call in calls:
        if node is not call.node or not is_not_serving(call.result):
            call.result = NO_REPLY
        call.node, call.sent = node, False
    try:
        connection = await node.pool.acquire()
        try:
            await _execute_on(connection, calls)
            node.served_call_started_at = max(node.served_call_started_at, calls[0].started_at)
            node.replied_at = asyncio.get_running_loop().time()
            if any(is_not_serving(call.result) for call in calls):
                await node.pool.replace_all()
        except BaseException:  # late replies would be taken for those of another call
            await connection.disconnect(nowait=True)
            await node.pool.close_idle()
            raise
        finally:
            await node.pool.release(connection)
    except (RedisError, OSError) as error:
        for call in calls:
            if call.result is NO_REPLY:
                call.result = error


async def load(node: Node, scripts: Sequence[Script]) -> None:
    """Loads scripts into a server, once. Raises `RedisError`, `OSError` if the server cannot be reached.

    A refusal, such as by an ACL, is not an error here: the calls get it too, and report it.
    """
    if node.has_scripts:
        return
    connection = await node.pool.acquire()
    try:
        commands = b"".join(_pack(("SCRIPT", "LOAD", script.text)) for script in scripts)
        await connection.send_packed_command(commands, check_health=False)
        for _ in scripts:
            await _read_reply(connection)
        node.has_scripts = True
    except BaseException:  # late replies would be taken for those of another call
        await connection.disconnect(nowait=True)
        raise
    finally:
        await node.pool.release(connection)


async def query(connection: AbstractConnection, *command: str) -> Any:
    """The reply to a command. Raises `RedisError`, `OSError`."""
    await connection.send_packed_command(_pack(command), check_health=False)
    return await connection.read_response()


async def query_node(node: Node, *command: str) -> Any:
    """The reply to a command, over a connection of the server's pool. Raises `RedisError`, `OSError`."""
    connection = await node.pool.acquire()
    try:
        return await query(connection, *command)
    finally:
        await node.pool.release(connection)


async def _execute_on(connection: AbstractConnection, calls: Sequence[Call]) -> None:
    """Sends the calls. A script that the server does not have did not run: it is loaded and sent again, together."""
    await _send_and_read(connection, calls, texts={})
    unknown = [call for call in calls if isinstance(call.result, NoScriptError)]
    if unknown:
        await _send_and_read(connection, unknown, texts={call.script.name: call.script.text for call in unknown})


async def _send_and_read(connection: AbstractConnection, calls: Sequence[Call], *, texts: Mapping[str, bytes]) -> None:
    """Sends the scripts in `texts` to be loaded, then the calls, and sets the result of each call."""
    commands: list[Command] = [("SCRIPT", "LOAD", text) for text in texts.values()]
    receivers: list[Call | None] = []
    for call in calls:
        if call.ask_address:
            commands.append(("ASKING",))
            receivers.append(None)
        commands.append(("EVALSHA", call.script.digest, len(call.keys), *call.keys, *call.args))
        receivers.append(call)
        call.sent, call.result = True, NO_REPLY
    await connection.send_packed_command(b"".join(map(_pack, commands)), check_health=False)
    loaded = {name: await _read_reply(connection) for name in texts}
    for receiver in receivers:
        reply = await _read_reply(connection)
        if receiver is not None:  # if the script could not be loaded, that error is the result
            load_reply = loaded.get(receiver.script.name) if isinstance(reply, NoScriptError) else None
            receiver.result = load_reply if isinstance(load_reply, Exception) else reply


async def _read_reply(connection: AbstractConnection) -> Any:
    """The next reply, or the server's error. `LOADING` is one too, although redis-py raises it as a lost connection."""
    try:
        return await connection.read_response(disconnect_on_error=False)
    except (ResponseError, BusyLoadingError) as error:
        return error
