"""Clients that cost little, because they share the cores with the servers: gRPC of this project, and HTTP with JSON.

Both send one text and get one text; the bytes of every request are made before the run. Know the wire; do not know load,
schedules or statistics.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import grpc

from serving.pb import translation_pb2 as pb

Wire = Literal["grpc", "http"]

_METHOD = "/onnxlate.v1.Translation/"


class RequestFailedError(Exception):
    """A request had no answer; ``kind`` is one of few words, to be counted."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Answer:
    """A translation."""

    text: str
    # On the event loop's clock; of a streamed answer alone.
    first_token_s: float | None = None


class Client(Protocol):
    """Sends one of the texts it was made with."""

    async def send(self, text: int, timeout_s: float) -> Answer:
        """Translate the text of that index.

        Raises:
            RequestFailedError: the server refused, failed, or took longer than ``timeout_s``.
        """

    async def close(self) -> None:
        """Close all connections."""


class GrpcClient:
    """onnxlate's typed service, over one channel."""

    def __init__(self, target: str, texts: Sequence[str], *, beam_size: int, streamed: bool = False) -> None:
        """A client of ``target``, HOST:PORT; ``streamed`` takes TranslateStream."""
        self._channel = grpc.aio.insecure_channel(target)
        # Beams end by CTranslate2's rule, as the peer's do.
        options = pb.DecodingOptions(beam_size=beam_size, early_stopping=beam_size > 1)
        self._streamed = streamed
        if streamed:
            self._requests = [pb.TranslateStreamRequest(text=text, options=options).SerializeToString() for text in texts]
        else:
            self._requests = [pb.TranslateRequest(texts=[text], options=options).SerializeToString() for text in texts]
        # Requests are bytes already.
        self._translate: Any = self._channel.unary_unary(_METHOD + "Translate", bytes, pb.TranslateResponse.FromString)
        self._stream: Any = self._channel.unary_stream(_METHOD + "TranslateStream", bytes, pb.TranslateStreamResponse.FromString)

    async def send(self, text: int, timeout_s: float) -> Answer:
        """See ``Client.send``; an error's kind is its gRPC status."""
        try:
            if self._streamed:
                return await self._read(self._stream(self._requests[text], timeout=timeout_s))
            response = await self._translate(self._requests[text], timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise RequestFailedError(error.code().name) from error
        return Answer(response.translations[0].hypotheses[0].text)

    @staticmethod
    async def _read(call: Any) -> Answer:
        clock = asyncio.get_running_loop().time
        first_token_s: float | None = None
        pieces: list[str] = []
        async for message in call:
            first_token_s = clock() if first_token_s is None else first_token_s
            pieces.append(message.text_delta)
        return Answer("".join(pieces), first_token_s)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close(None)


class HttpClient:
    """HTTP/1.1 with JSON, {"text": ...} both ways, over connections that are kept.

    On asyncio's streams and not a library: it does what such a request needs, and takes a fraction of the CPU time.
    """

    def __init__(self, target: str, texts: Sequence[str], *, path: str = "/translate") -> None:
        """A client of ``target``, HOST:PORT."""
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._requests = [_post(target, path, json.dumps({"text": text}).encode()) for text in texts]
        self._idle: list[_Connection] = []

    async def send(self, text: int, timeout_s: float) -> Answer:
        """See ``Client.send``; an error's kind is HTTP and its status, or that of gRPC for a timeout or a lost connection."""
        try:
            async with asyncio.timeout(timeout_s):
                status, body = await self._exchange(self._requests[text])
        except TimeoutError as error:
            raise RequestFailedError("DEADLINE_EXCEEDED") from error
        except (OSError, asyncio.IncompleteReadError) as error:
            raise RequestFailedError("UNAVAILABLE") from error
        if status != 200:
            raise RequestFailedError(f"HTTP {status}")
        return Answer(json.loads(body)["text"])

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
        connection = self._idle.pop() if self._idle else await _Connection.open(self._host, self._port)
        try:
            status, body, reusable = await connection.exchange(request)
        except BaseException:
            # Half an answer may be on its way: nobody can use this connection again.
            connection.writer.close()
            raise
        if reusable:
            self._idle.append(connection)
        else:
            connection.writer.close()
        return status, body

    async def close(self) -> None:
        """Close the connections that are idle, which are all when no request is under way."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.writer.close()
            await connection.writer.wait_closed()


@dataclass(frozen=True, slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, host: str, port: int) -> Self:
        return cls(*await asyncio.open_connection(host, port))

    async def exchange(self, request: bytes) -> tuple[int, bytes, bool]:
        """Status, body, and whether the connection can be used again."""
        self.writer.write(request)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status_line, *lines = head.splitlines()
        headers = dict(line.split(": ", 1) for line in lines if ": " in line)
        body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return int(status_line.split()[1]), body, headers.get("connection") != "close"


def _post(host: str, path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def make_client(wire: Wire, target: str, texts: Sequence[str], *, beam_size: int, streamed: bool = False) -> Client:
    """A client of the wire named; ``beam_size`` and ``streamed`` are the gRPC service's (the peer's beam is its own option)."""
    if wire == "grpc":
        return GrpcClient(target, texts, beam_size=beam_size, streamed=streamed)
    return HttpClient(target, texts)
