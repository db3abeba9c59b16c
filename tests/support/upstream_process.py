"""A small upstream in its own process, so that it can be killed and suspended.

It gives each question the same price; to a body with `busy` it answers 429 with `Retry-After: 1`.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2

from serving import NO_TLS, free_port, wait_until

PROGRAM = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Upstream(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        is_busy = b"busy" in self.rfile.read(int(self.headers["content-length"]))
        answer = b'{"data":{"estimated":3,"balance":7},"error":{}}'
        self.send_response(429 if is_busy else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", len(answer))
        if is_busy:
            self.send_header("retry-after", "1")
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass

class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        pass  # a client that has gone

Server(("127.0.0.1", int(sys.argv[1])), Upstream).serve_forever()
"""


class UpstreamProcess:
    """It can be killed, and started again under its URL."""

    def __init__(self) -> None:
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-S", "-c", PROGRAM, str(self._port)])
        wait_until(self._answers)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _answers(self) -> bool:
        try:
            return httpx2.post(self.url, content=b"[]", trust_env=False, verify=NO_TLS).status_code == 200
        except httpx2.TransportError:
            return False


@contextmanager
def upstream_process() -> Iterator[UpstreamProcess]:
    """A running one."""
    upstream = UpstreamProcess()
    try:
        upstream.start()
        yield upstream
    finally:
        upstream.kill()
