"""The server process: ports, health, loading, signals, drain.

Knows gRPC's server, the metrics page, and the order in which things start and stop; does not know messages, text or graphs.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, start_http_server

from serving.config import RequestLimits, ServerConfig
from serving.errors import ServerStartError
from serving.interceptors import RequestInterceptor
from serving.metrics import ServiceMetrics
from serving.model import ServedModel
from serving.pb import translation_pb2_grpc as pb_grpc
from serving.servicer import SERVICE_NAME, TranslationServicer
from serving.translator import Translator
from serving.version import package_version

logger = logging.getLogger(__name__)

# The event loop's Python holds the interpreter lock for up to this long while an engine's thread wants it back. At the default of
# 5 ms a busy loop made a decoder step of 4.95 ms take 15.5 ms; at 0.1 ms it took 5.3 ms.
_SWITCH_INTERVAL_S = 0.0001
# A request that arrives in the very moment of stopping still gets its answer, which is a refusal.
_LAST_ANSWERS_S = 0.5

Load = Callable[[ServiceMetrics], ServedModel]


def _channel_options(limits: RequestLimits) -> list[tuple[str, int]]:
    return [
        # Two servers would share a port silently, and each get half of the requests.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", 4 << 20),
        ("grpc.max_send_message_length", 64 << 20),
        # Connections of clients that went away without a word are freed by these alone.
        ("grpc.max_connection_idle_ms", 5 * 60_000),
        ("grpc.max_connection_age_ms", 60 * 60_000),
        ("grpc.max_connection_age_grace_ms", int(limits.max_request_s * 1000)),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Clients may ping as often; more often is abuse.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]


class TranslationServer:
    """One server, from its ports to its end: ``start``, ``load``, then ``drain`` and ``stop``."""

    def __init__(self, config: ServerConfig, limits: RequestLimits, load: Load) -> None:
        """A server that will get its model from ``load``, which is called on a thread of its own and may block."""
        self._config = config
        self._limits = limits
        self._load = load
        self._metrics = ServiceMetrics(registry := CollectorRegistry())
        self._registry = registry
        self._interceptor = RequestInterceptor([SERVICE_NAME], self._metrics, longest_s=limits.max_request_s + _LAST_ANSWERS_S)
        self._servicer = TranslationServicer()
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stubs are older than asyncio
        self._server: grpc.aio.Server | None = None
        self._metrics_page: Any = None
        self._model: ServedModel | None = None
        # The ports in use, once started.
        self.port = config.port
        self.metrics_port = config.metrics_port

    @property
    def model_name(self) -> str:
        """Of the model that was loaded."""
        assert self._model is not None
        return self._model.description.name

    async def start(self) -> None:
        """Bind both ports and answer health with NOT_SERVING; requests are answered UNAVAILABLE until ``load`` is done.

        Raises:
            ServerStartError: a port is taken or not allowed; names it and the option that changes it.
        """
        config = self._config
        self._metrics.built_from(version=package_version())
        try:
            self._metrics_page, _ = start_http_server(config.metrics_port, config.host, self._registry)
        except OSError as error:
            raise _port_error(error, config.host, config.metrics_port, "--metrics-port") from error
        self.metrics_port = self._metrics_page.server_port
        try:
            await self._start_grpc()
        except ServerStartError:
            await self.stop()
            raise

    async def _start_grpc(self) -> None:
        config = self._config
        server = grpc.aio.server(interceptors=[self._interceptor], options=_channel_options(self._limits))
        pb_grpc.add_TranslationServicer_to_server(self._servicer, server)  # type: ignore[no-untyped-call]  # generated
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        for service in ("", SERVICE_NAME):
            await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        if config.reflection:
            reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        address = f"[{config.host}]:{config.port}" if ":" in config.host else f"{config.host}:{config.port}"
        try:
            self.port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise _port_error(_why_not(config.host, config.port), config.host, config.port, "--port") from error
        await server.start()
        self._server = server

    async def load(self) -> None:
        """Load the model and turn health to SERVING.

        On a thread, so that health is answered meanwhile; parts of loading hold the interpreter lock, and answers wait for those.

        Raises:
            BundleError, ServerStartError: from ``load``.
        """
        model = await asyncio.to_thread(self._load, self._metrics)
        self._model = model
        description = model.description
        self._metrics.serves(
            name=description.name,
            version=description.version,
            precision=description.precision,
            device=description.device,
            languages=",".join(f"{source}-{target}" for source, target in model.preparer.languages),
        )
        for worker, rows in enumerate(model.worker_rows):
            self._metrics.capacity(worker, rows)
        self._servicer.serve(Translator(model.preparer, model.engine, asyncio.get_running_loop()), description)
        for service in ("", SERVICE_NAME):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """Turn health to NOT_SERVING, refuse new requests, and wait for those in flight, up to the drain timeout.

        The ports stay open until the end: load balancers read NOT_SERVING there, and clients a refusal that says so.
        """
        if self._model is not None:
            self._model.engine.drain()
        logger.info("draining: %d requests in flight", self._interceptor.in_flight)
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                # Within the timeout too: it waits for health watchers, and one of them may not be reading.
                await self._health.enter_graceful_shutdown()
                await self._interceptor.wait_idle()
        except TimeoutError:
            unfinished = self._interceptor.in_flight
            logger.warning("%d requests did not finish in %g s", unfinished, self._config.drain_timeout_s)
            if self._model is not None:
                # So that they are told why, and that another server may take them.
                await asyncio.to_thread(self._model.engine.close)

    async def stop(self) -> None:
        """Close everything; requests still in flight are cancelled. Once is enough, twice is harmless."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(_LAST_ANSWERS_S)
            # Handlers hear of it a moment later; the engine should hear from them what they no longer wait for.
            await self._interceptor.wait_idle()
        model, self._model = self._model, None
        if model is not None:
            await asyncio.to_thread(model.engine.close)
        page, self._metrics_page = self._metrics_page, None
        if page is not None:
            await asyncio.to_thread(_close_page, page)


def serve(config: ServerConfig, limits: RequestLimits, load: Load) -> int:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the process at once.

    Returns:
        The exit status, 0.

    Raises:
        ServerStartError: a port or the device cannot be had.
        BundleError: the bundle cannot be served.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    return asyncio.run(_serve(config, limits, load))


async def _serve(config: ServerConfig, limits: RequestLimits, load: Load) -> int:
    stopping = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stopping.is_set():
            # Nothing that could wait: not the drain, not the model that is being loaded on a thread.
            os._exit(128 + number)
        logger.info("%s: stopping; once more stops at once", number.name)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    server = TranslationServer(config, limits, load)
    await server.start()
    try:
        logger.info("listening on %s:%d; loading the model", config.host, server.port)
        await server.load()
        if not stopping.is_set():
            ready = f"on {config.host}:{server.port}, metrics on {config.host}:{server.metrics_port}"
            print(f"serving {server.model_name} {ready}", file=sys.stderr, flush=True)
        await stopping.wait()
        await server.drain()
    finally:
        await server.stop()
    logger.info("stopped")
    return 0


def _close_page(page: Any) -> None:
    # Wakes the page's thread, which otherwise looks only twice a second whether it has to end.
    page.socket.shutdown(socket.SHUT_RDWR)
    page.shutdown()
    page.server_close()


def _why_not(host: str, port: int) -> OSError:
    """GRPC does not say why it could not bind; a plain socket does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((host, port))
    except OSError as error:
        return error
    return OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _port_error(error: OSError, host: str, port: int, option: str) -> ServerStartError:
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        reason, option = f"{host} is not an address of this machine", "--host"
    elif error.errno == errno.EADDRINUSE:
        reason = "the port is taken"
    else:
        reason = (error.strerror or str(error)).lower()
    return ServerStartError(f"cannot listen on {host}:{port}: {reason}; choose another with {option}")
