"""A network of the test's own between two parts that speak TCP: it can be cut, swallow what is sent, be slow, and heal.

What is swallowed is held, and delivered once the network has healed, as TCP's own repetition does: what was sent before may
arrive late, and after what was sent in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Direction = Literal["there", "back"]
"""`there` is towards the target."""
BOTH: tuple[Direction, ...] = ("there", "back")
Result = TypeVar("Result")
_CHUNK = 65536


@dataclass(eq=False)
class _Connection:
    client: asyncio.StreamWriter
    task: asyncio.Task[Any] | None
    target: asyncio.StreamWriter | None = None


@dataclass
class TcpProxy:
    """A proxy on loopback for one address; its methods are called from any thread."""

    target: tuple[str, int]
    port: int = 0
    held: int = 0
    """Pieces and new connections that the network has swallowed so far, those that it has delivered since included."""
    _connections: set[_Connection] = field(default_factory=set, repr=False)
    _open: dict[Direction, asyncio.Event] = field(default_factory=dict, repr=False)
    _delay_s: float = 0.0
    _trigger: tuple[bytes, tuple[Direction, ...]] | None = None
    _server: asyncio.Server | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)
        self.triggered = threading.Event()
        """Set once the network has swallowed what `black_hole_at` waits for."""

    def start(self) -> None:
        self._thread.start()
        self._call(self._start())

    def stop(self) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        self._loop.close()

    def cut(self) -> None:
        """Drop all connections, and refuse new ones."""
        self._call(self._cut())

    def black_hole(self, *directions: Direction) -> None:
        """Accept everything and forward nothing. Args: directions: both, if none is named."""
        self._call(self._swallow(directions or BOTH))

    def black_hole_at(self, sent: bytes, *directions: Direction) -> None:
        """Become a black hole in the middle of something: once a piece with these bytes is sent, which is swallowed."""
        self.triggered.clear()
        self._call(self._arm(sent, directions or BOTH))

    def delay(self, seconds: float) -> None:
        """Hold every piece for so long."""
        self._call(self._slow(seconds))

    def heal(self) -> None:
        """Forward everything again, what was held first."""
        self._call(self._heal())

    # ------------------------------------------------------------------------------------------------------ inside

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10.0)

    async def _start(self) -> None:
        for direction in BOTH:
            self._open[direction] = asyncio.Event()
            self._open[direction].set()
        await self._listen()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self._connections):
            for writer in (connection.client, connection.target):
                if writer is not None:
                    # A reset: whoever waits for an answer learns of it.
                    writer.transport.abort()
            if connection.task is not None:
                connection.task.cancel()

    async def _stop(self) -> None:
        await self._cut()
        tasks = [each.task for each in self._connections if each.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _swallow(self, directions: tuple[Direction, ...]) -> None:
        for direction in directions:
            self._open[direction].clear()

    async def _arm(self, sent: bytes, directions: tuple[Direction, ...]) -> None:
        self._trigger = sent, directions

    async def _slow(self, seconds: float) -> None:
        self._delay_s = seconds

    async def _heal(self) -> None:
        self._delay_s, self._trigger = 0.0, None
        for event in self._open.values():
            event.set()
        if self._server is None:
            await self._listen()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer, asyncio.current_task())
        self._connections.add(connection)
        try:
            # A handshake, too, needs both ways.
            self.held += not all(event.is_set() for event in self._open.values())
            for event in self._open.values():
                await event.wait()
            from_target, connection.target = await asyncio.open_connection(*self.target)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, connection.target, "there"))
                pumps.create_task(self._pump(from_target, writer, "back"))
        except* (OSError, asyncio.CancelledError):
            # Either side went away, or the network was cut: so is the other.
            pass
        finally:
            self._connections.discard(connection)
            for each in (writer, connection.target):
                if each is not None:
                    each.transport.abort() if self._server is None else each.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        while chunk := await reader.read(_CHUNK):
            await self._forwarded(chunk, direction)
            writer.write(chunk)
            await writer.drain()
        # The end of what is sent travels as the rest does.
        await self._forwarded(b"", direction)
        with contextlib.suppress(OSError):
            writer.write_eof()

    async def _forwarded(self, chunk: bytes, direction: Direction) -> None:
        """Wait until the network lets a piece through."""
        if self._trigger is not None and direction == "there" and self._trigger[0] in chunk:
            directions, self._trigger = self._trigger[1], None
            await self._swallow(directions)
            self.triggered.set()
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        if not self._open[direction].is_set():
            self.held += bool(chunk)
            await self._open[direction].wait()


@contextmanager
def tcp_proxy(port: int, host: str = "127.0.0.1") -> Iterator[TcpProxy]:
    """A network in front of an address, whole at first."""
    proxy = TcpProxy((host, port))
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


def faults(proxy: TcpProxy) -> dict[str, Callable[[], None]]:
    """What can happen to a network, by name."""
    return {
        "cut": proxy.cut,
        "black_hole": proxy.black_hole,
        "no_answers": lambda: proxy.black_hole("back"),
    }
