"""The simulated RenderNet with what only tests need: scripted and delayed answers, missing assets, and the requests.

Its app runs on one event loop. Tests control it from any thread.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final, Self

import orjson
from starlette.requests import Request
from starlette.responses import Response

from proxy.demo import simulator
from proxy.demo.simulator import Received, Responder, envelope, ordinary, read

_MAX_RECEIVED: Final = 10_000


class Hold:
    """Delays answers from `Simulator.hold()` until `release()`, or the end of its `with` block."""

    def __init__(self) -> None:
        self._released: Future[None] = Future()

    def release(self) -> None:
        with suppress(InvalidStateError):  # a second release changes nothing
            self._released.set_result(None)

    async def passed(self) -> None:
        # Shielded: otherwise a cancelled request would cancel the hold for all others.
        await asyncio.shield(asyncio.wrap_future(self._released))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Simulator(simulator.Simulator):
    """`received` are the newest requests, to any path."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.received: deque[Received] = deque(maxlen=_MAX_RECEIVED)
        self._script: deque[Responder | None] = deque()
        self._hold: Hold | None = None
        self._arrival = threading.Condition()

    def script(self, *answers: Responder | None) -> None:
        """Sets the answers to the next requests, in the order in which these arrive. None: the ordinary answer."""
        self._script.extend(answers)

    def hold(self) -> Hold:
        """Requests that arrive from now on are answered only after a release."""
        self._hold = Hold()
        return self._hold

    def arrived(self, calls: int, *, within_s: float = 5.0) -> bool:
        """Waits until that many calls have arrived in total. Not for the app's own thread."""
        with self._arrival:
            return self._arrival.wait_for(lambda: self.calls >= calls, within_s)

    async def not_found(self, request: Request, error: Exception) -> Response:
        self.received.append(await read(request))
        return await super().not_found(request, error)

    async def accept(self, received: Received) -> Responder:
        hold = self._hold  # read first: a hold made after this request has arrived is for later ones
        with self._arrival:
            self.received.append(received)
            respond = await super().accept(received)  # does not wait
            if self._script:
                respond = self._script.popleft() or ordinary
            self._arrival.notify_all()
        if hold is not None:
            await hold.passed()
        return respond

    def ordinary_answer(self, received: Received) -> tuple[int, bytes]:
        """Assets whose id begins with `ast_missing` do not exist."""
        status, body = super().ordinary_answer(received)
        texts = _texts(orjson.loads(received.body)) if status == HTTPStatus.OK else iter(())
        missing = next((text for text in texts if text.startswith("ast_missing")), None)
        if missing is None:
            return status, body
        return 404, envelope("not_found", f"Asset {missing} not found")


def _texts(value: Any) -> Iterator[str]:
    """All strings in a JSON value, without member names. Not recursive: a body may nest deeper than Python's stack."""
    rest = [value]
    while rest:
        match rest.pop():
            case str(text):
                yield text
            case dict(members):
                rest.extend(members.values())
            case list(elements):
                rest.extend(elements)
