"""Keep-alive clients that pause between requests, as browsers and connection pools do."""

import asyncio
import random
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What the clients saw."""

    answered: int = 0
    connections: int = 0
    failures: list[str] = field(default_factory=list)


def post(body: bytes, path: str = "/predict") -> bytes:
    """Build a request with a JSON body."""
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Read one response; return its status and whether the server closes the connection after it."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    await reader.readexactly(length)
    return int(head.split()[1]), b"\r\nconnection: close\r\n" in head


async def keep_alive(
    port: int, request: bytes, pause: float, stop: asyncio.Event, *, tally: Tally, seed: int
) -> None:
    """Send requests on one connection while the server keeps it, each after a pause of 0 to `pause` seconds.

    A connection that the server has closed by the time of the next request is replaced; one that it closes or
    resets after the request was sent is a failure.
    """
    chance = random.Random(seed)  # noqa: S311 - pauses, not secrets
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None
    while not stop.is_set():
        await asyncio.sleep(chance.uniform(0, pause))
        if reader is None or writer is None or reader.at_eof():
            if writer is not None:
                writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            tally.connections += 1
        try:
            writer.write(request)
            status, closes = await answer(reader)
        except (OSError, EOFError) as error:
            tally.failures.append(f"{type(error).__name__}: {error}")
            closes = True
        else:
            tally.answered += status == 200
            if status != 200:
                tally.failures.append(f"status {status}")
        if closes:
            writer.close()
            reader = None
    if writer is not None:
        writer.close()


async def crowd(port: int, request: bytes, clients: int, pause: float, stop: asyncio.Event) -> Tally:
    """Run clients until `stop`; return what they saw."""
    tally = Tally()
    async with asyncio.TaskGroup() as group:
        for seed in range(clients):
            group.create_task(keep_alive(port, request, pause, stop, tally=tally, seed=seed))
    return tally
