"""Scripts, and calls of them on one connection.

A call knows at each moment whether the server may have run it: it was sent, and no word of the server says otherwise.
So nothing is sent where it is known to be lost, or likely: on a connection that has ended while it lay idle, or on one
that lay idle while another one to the same server broke or fell silent.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha1
from importlib.resources import files
from typing import Any, Final

from redis.exceptions import BusyLoadingError, NoScriptError, RedisError, ResponseError

from proxy.settings_urls import Address
from proxy.wires import Command, Wire, Wires


class Script:
    """One of the files in `proxy/lua`; its header says what it takes and gives.

    It is read at once: when it is first called there may be no file descriptor left.

    repeatable: to run it twice is the same as to run it once.
    digest: Redis' own name for the script.
    """

    def __init__(self, name: str, *, repeatable: bool = False) -> None:
        self.name = name
        self.repeatable = repeatable
        self.text = (files("proxy") / "lua" / f"{name}.lua").read_bytes()
        self.digest = sha1(self.text, usedforsecurity=False).hexdigest()


class Unsaid:
    """No word of a server."""


UNSAID: Final = Unsaid()


@dataclass(slots=True, eq=False)
class Node:
    """A server. `label` is what the log calls the way there.

    answered: when the latest call began that it has answered, on the loop's clock.
    """

    name: str
    label: str
    host: str
    wires: Wires
    answered: float = 0.0


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
        wire = await node.wires.take()
        try:
            await _exchange(wire, calls)
            node.answered = max(node.answered, calls[0].began)
        except BaseException:  # replies may still come, and would be taken for another's
            wire.close()
            node.wires.close_idle()
            raise
        finally:
            node.wires.give_back(wire)
    except (RedisError, OSError) as error:
        for call in calls:
            if call.word is UNSAID:
                call.word = error


async def ask(node: Node, *command: str) -> Any:
    """The reply to a command that is no script. Raises `RedisError`, `OSError`."""
    wire, replies = await node.wires.take(), list[Any]()
    try:
        await wire.say([command], replies)
    except BaseException:
        wire.close()
        raise
    finally:
        node.wires.give_back(wire)
    if isinstance(replies[0], Exception):
        raise replies[0]
    return replies[0]


async def _exchange(wire: Wire, calls: Sequence[Call]) -> None:
    """A script that the server did not know has not run: it goes again."""
    await _converse(wire, calls)
    unknown = [call for call in calls if isinstance(call.word, NoScriptError)]
    if unknown:
        await wire.say([("SCRIPT", "LOAD", text) for text in {call.script.text for call in unknown}], [])
        await _converse(wire, unknown)


async def _converse(wire: Wire, calls: Sequence[Call]) -> None:
    commands: list[Command] = []
    takers: list[Call | None] = []
    for call in calls:
        if call.asks:
            commands.append(("ASKING",))
            takers.append(None)
        commands.append(("EVALSHA", call.script.digest, len(call.keys), *call.keys, *call.args))
        takers.append(call)
        call.sent, call.word = True, UNSAID
    replies: list[Any] = []
    try:
        await wire.say(commands, replies)
    finally:
        for taker, reply in zip(takers, replies, strict=False):  # some may be missing
            if taker is not None:
                taker.word = reply
    for reply in replies:
        if isinstance(reply, Exception) and not isinstance(reply, (ResponseError, BusyLoadingError)):
            raise reply  # such as that we may no longer be here
