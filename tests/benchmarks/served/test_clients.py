from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from benchmarks.served.clients import GrpcClient, HttpClient, RequestFailedError, make_client
from tests.fakes import PATIENCE_S, ScriptedEngine
from tests.servers import running_server

Handler = Callable[[bytes], Awaitable[bytes]]


class HttpServer:
    """Reads requests and writes what it is told to, byte by byte as it is."""

    def __init__(self, answer: Handler) -> None:
        self.connections = 0
        self.heads: list[str] = []
        self.target = ""
        self._answer = answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.heads.append(head)
                length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
                answer = await self._answer(await reader.readexactly(length))
                if not answer:
                    return
                writer.write(answer)
        except asyncio.IncompleteReadError:
            return
        finally:
            writer.close()


@asynccontextmanager
async def http_server(answer: Handler) -> AsyncIterator[HttpServer]:
    server = HttpServer(answer)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.target = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()
        await listening.wait_closed()


def response(text: str, *, status: str = "200 OK", more: str = "") -> bytes:
    body = json.dumps({"text": text}).encode()
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def echo(body: bytes) -> bytes:
    return response(json.loads(body)["text"].upper())


async def test_http_keeps_its_connection() -> None:
    async with http_server(echo) as server:
        client = HttpClient(server.target, ["a", "größe"])
        assert [(await client.send(text, PATIENCE_S)).text for text in (0, 1, 0)] == ["A", "GRÖSSE", "A"]
        await client.close()
        assert server.connections == 1
        assert server.heads[0].startswith(f"POST /translate HTTP/1.1\r\nhost: {server.target}\r\n")


async def test_http_opens_as_many_connections_as_there_are_requests_at_a_time() -> None:
    together = asyncio.Barrier(3)

    async def meet(body: bytes) -> bytes:
        await together.wait()
        return await echo(body)

    async with http_server(meet) as server:
        client = HttpClient(server.target, ["a"])
        for _ in range(2):
            await asyncio.gather(*(client.send(0, PATIENCE_S) for _ in range(3)))
        await client.close()
        assert server.connections == 3


async def test_http_takes_a_new_connection_when_the_server_closes_one() -> None:
    async def closing(body: bytes) -> bytes:
        return response("x", more="Connection: close\r\n")

    async with http_server(closing) as server:
        client = HttpClient(server.target, ["a"])
        for _ in range(2):
            await client.send(0, PATIENCE_S)
        await client.close()
        assert server.connections == 2


async def test_http_errors_by_kind() -> None:
    async def busy(body: bytes) -> bytes:
        return response("", status="429 Too Many Requests")

    async def gone(body: bytes) -> bytes:
        return b""

    async with http_server(busy) as server:
        client = HttpClient(server.target, ["a"])
        with pytest.raises(RequestFailedError, match=r"^HTTP 429$"):
            await client.send(0, PATIENCE_S)
        await client.close()
    async with http_server(gone) as server:
        with pytest.raises(RequestFailedError, match=r"^UNAVAILABLE$"):
            await HttpClient(server.target, ["a"]).send(0, PATIENCE_S)
    with pytest.raises(RequestFailedError, match=r"^UNAVAILABLE$"):
        await HttpClient(server.target, ["a"]).send(0, PATIENCE_S)


async def test_http_gives_up_in_time() -> None:
    async def never(body: bytes) -> bytes:
        await released.wait()
        return b""

    released = asyncio.Event()
    async with http_server(never) as server:
        with pytest.raises(RequestFailedError, match=r"^DEADLINE_EXCEEDED$"):
            await HttpClient(server.target, ["a"]).send(0, 0.01)
        released.set()


async def test_grpc_sends_its_beam() -> None:
    engine = ScriptedEngine()
    with running_server(engine) as server:
        client = make_client("grpc", server.address, ["ein hund"], beam_size=3)
        assert (await client.send(0, PATIENCE_S)).text == "EIN HUND"
        await client.close()
    assert [sequence.options.beam_size for sequence in engine.submitted] == [3]


async def test_grpc_without_a_server() -> None:
    with running_server() as server:
        address = server.address
    client = GrpcClient(address, ["a"], beam_size=1)
    with pytest.raises(RequestFailedError, match=r"^UNAVAILABLE$"):
        await client.send(0, PATIENCE_S)
    await client.close()


def test_the_wire_chooses_the_client() -> None:
    assert isinstance(make_client("http", "127.0.0.1:1", ["a"], beam_size=4), HttpClient)
