"""Servers for tests, on ports that the system chooses, with a scripted engine behind them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from serving.config import RequestLimits, ServerConfig
from serving.server import Load, TranslationServer
from tests.fakes import PATIENCE_S, ScriptedEngine, fake_model

LOCAL = ServerConfig(host="127.0.0.1", port=0, metrics_port=0, drain_timeout_s=PATIENCE_S)


@dataclass(slots=True)
class Running:
    """A server on a thread of its own."""

    server: TranslationServer
    loop: asyncio.AbstractEventLoop

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"


@contextmanager
def running_server(
    engine: ScriptedEngine | None = None, *, load: Load | None = None, config: ServerConfig = LOCAL, wait: bool = True
) -> Iterator[Running]:
    """A server, stopped at the end without a drain.

    Args:
        engine: behind it, unless ``load`` is given.
        load: instead of a fake model around ``engine``.
        config: where it listens.
        wait: for the model; otherwise it may still be loading.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def begin(work: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(work, loop)

    async def make() -> TranslationServer:
        return TranslationServer(config, RequestLimits(), load or (lambda _: fake_model(engine or ScriptedEngine())))

    try:
        server = asyncio.run_coroutine_threadsafe(make(), loop).result(PATIENCE_S)
        begin(server.start()).result(PATIENCE_S)
        loading = begin(server.load())
        try:
            if wait:
                loading.result(PATIENCE_S)
            yield Running(server, loop)
            loading.result(PATIENCE_S)
        finally:
            begin(server.stop()).result(PATIENCE_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.close()
