"""Real servers for tests: an ASGI application on a socket, in a thread of this process."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp

from proxy.server import Server


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Runs `app`, lifespan and all, and gives its base URL. The socket listens already: nobody waits for a start."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(app, drain_s=5, announce=lambda: None)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_until(condition: Callable[[], object], *, within_s: float = 10.0) -> None:
    """Returns as soon as `condition` holds; fails the test when it does not in time. For what sends no event."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not come true within {within_s} s"
        time.sleep(0.01)
