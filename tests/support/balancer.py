"""A TCP load balancer: sends each new connection to a replica whose /readyz answers 200, in turn."""

import asyncio
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count

from gateway_process import address_of

PROBE_EVERY_S = 0.1
CHUNK_BYTES = 65536


class Balancer:
    """`url` is where to ask. Replicas come and go by `add` and `remove`, called from any thread."""

    def __init__(self) -> None:
        self.url = ""
        self._ready: dict[str, bool] = {}
        self._turns = count()
        self._stopped = asyncio.Event()
        self._serves = threading.Event()
        self._loop: asyncio.AbstractEventLoop

    def add(self, url: str) -> None:
        """A replica that takes connections as soon as it is found ready."""
        self._loop.call_soon_threadsafe(self._begin, url)

    def remove(self, url: str) -> None:
        self._loop.call_soon_threadsafe(self._ready.pop, url, None)

    def is_ready(self, url: str) -> bool:
        return self._ready.get(url, False)

    def run(self) -> None:
        asyncio.run(self._run())

    def wait_until_serving(self) -> None:
        self._serves.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)

    def _begin(self, url: str) -> None:
        self._ready[url] = False

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._serves.set()
        probing = asyncio.create_task(self._probe())
        await self._stopped.wait()
        probing.cancel()
        server.close()

    async def _probe(self) -> None:
        while True:
            for url in list(self._ready):
                is_ready = await _says_ready(url)
                if url in self._ready:
                    self._ready[url] = is_ready
            await asyncio.sleep(PROBE_EVERY_S)

    async def _relay(self, reader: StreamReader, client: StreamWriter) -> None:
        ready = [url for url, is_ready in self._ready.items() if is_ready]
        if ready:
            with suppress(OSError, asyncio.CancelledError):  # cancelled by the end of the loop: nobody to tell
                host, port = address_of(ready[next(self._turns) % len(ready)])
                answers, replica = await asyncio.open_connection(host, port)
                try:
                    await asyncio.gather(_pump(reader, replica), _pump(answers, client))
                finally:
                    replica.close()
        client.close()


async def _pump(source: StreamReader, sink: StreamWriter) -> None:
    """Until one side ends; the other side's end is told."""
    with suppress(OSError):
        while chunk := await source.read(CHUNK_BYTES):
            sink.write(chunk)
            await sink.drain()
    sink.close()


async def _says_ready(url: str) -> bool:
    host, port = address_of(url)
    try:
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_connection(host, port)
            with closing(writer):
                writer.write(b"GET /readyz HTTP/1.1\r\nhost: replica\r\nconnection: close\r\n\r\n")
                answer = await reader.read()
            return answer.startswith(b"HTTP/1.1 200 ")
    except (OSError, TimeoutError):
        return False


@contextmanager
def balancing(*urls: str) -> Iterator[Balancer]:
    balancer = Balancer()
    thread = threading.Thread(target=balancer.run)
    thread.start()
    balancer.wait_until_serving()
    for url in urls:
        balancer.add(url)
    yield balancer
    balancer.stop()
    thread.join()
