from __future__ import annotations

import asyncio
import dataclasses
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from serving.bundle import Bundle
from serving.client import RetryPolicy, TranslationClient
from serving.config import EngineConfig, RequestLimits
from serving.engine import Engine
from serving.errors import BundleError, InvalidRequestError, OverloadedError, RemoteError, ServerStartError, ShuttingDownError
from serving.metrics import ServiceMetrics
from serving.model import ServedModel, limits_of, load_model
from serving.observer import NullObserver
from serving.pb import translation_pb2 as pb
from serving.request import DecodingOptions
from serving.request_options import RequestOptions
from serving.server import TranslationServer, _channel_options
from serving.servicer import SERVICE_NAME
from tests.fakes import PATIENCE_S, ScriptedEngine, fake_model, hold
from tests.servers import LOCAL, Running, running_server
from tests.serving.test_engine import translate

ROOT = Path(__file__).parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NO_RETRY = RetryPolicy(max_attempts=1)


def metric(server: Running, line: str) -> str:
    """The value of a line of the metrics page."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server.metrics_port}/metrics", timeout=PATIENCE_S) as page:
        found = re.search(rf"^{re.escape(line)} (\S+)$", page.read().decode(), re.MULTILINE)
    assert found is not None, line
    return found[1]


def health(address: str, service: str = SERVICE_NAME) -> int:
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        status: int = check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S).status
        return status


@contextmanager
def health_changes(address: str) -> Iterator[Iterator[int]]:
    """The statuses of the service, from now on."""
    with grpc.insecure_channel(address) as channel:
        watch: Any = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        call = watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=PATIENCE_S)
        yield (response.status for response in call)
        call.cancel()


# Starting.


def test_the_port_answers_before_the_model_is_there() -> None:
    loading, may_load = threading.Event(), threading.Event()

    def load(_: ServiceMetrics) -> ServedModel:
        loading.set()
        assert may_load.wait(PATIENCE_S)
        return fake_model(ScriptedEngine())

    with running_server(load=load, wait=False) as server:
        assert loading.wait(PATIENCE_S)
        assert [health(server.address, ""), health(server.address)] == [NOT_SERVING, NOT_SERVING]
        with TranslationClient(server.address, retry=NO_RETRY) as client, pytest.raises(RemoteError, match="still loading"):
            client.model_info()
        assert metric(server, 'onnxlate_rejections_total{reason="loading"}') == "1.0"
        with health_changes(server.address) as changes:
            assert next(changes) == NOT_SERVING
            may_load.set()
            assert next(changes) == SERVING
        assert health(server.address, "") == SERVING


@pytest.mark.parametrize(("option", "field"), [("--port", "port"), ("--metrics-port", "metrics_port")])
async def test_a_taken_port_is_named_with_the_option_that_changes_it(option: str, field: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = TranslationServer(dataclasses.replace(LOCAL, **{field: port}), RequestLimits(), never_loads)
        with pytest.raises(ServerStartError, match=rf"127\.0\.0\.1:{port}: the port is taken; choose another with {option}$"):
            await server.start()
    # Neither port is kept by a server that did not start.
    other = server.metrics_port if option == "--port" else server.port
    if other:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", other))


async def test_two_servers_do_not_share_a_port() -> None:
    with running_server() as first:
        config = dataclasses.replace(LOCAL, port=first.server.port)
        with pytest.raises(ServerStartError, match="the port is taken"):
            await TranslationServer(config, RequestLimits(), never_loads).start()


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
async def test_an_address_that_is_not_ours_is_named(host: str) -> None:
    server = TranslationServer(dataclasses.replace(LOCAL, host=host), RequestLimits(), never_loads)
    with pytest.raises(ServerStartError, match=rf"{host} is not an address of this machine; choose another with --host"):
        await server.start()


def never_loads(_: ServiceMetrics) -> ServedModel:
    raise AssertionError("a server that could not start must not load")


async def test_a_model_that_cannot_be_loaded_is_an_error_of_load() -> None:
    def load(_: ServiceMetrics) -> ServedModel:
        raise BundleError("somewhere", ["a fault"])

    server = TranslationServer(LOCAL, RequestLimits(), load)
    await server.start()
    try:
        with pytest.raises(BundleError, match="a fault"):
            await server.load()
        assert await asyncio.to_thread(health, f"127.0.0.1:{server.port}") == NOT_SERVING
    finally:
        await server.stop()


def test_stopping_closes_the_engine_and_both_ports() -> None:
    engine = ScriptedEngine()
    with running_server(engine) as server:
        ports = [server.server.port, server.server.metrics_port]
    assert engine.closed
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


# What it tells.


def test_the_metrics_page_tells_of_requests_and_the_model() -> None:
    with running_server() as server, TranslationClient(server.address) as client:
        client.translate(["a"])
        assert metric(server, 'onnxlate_requests_total{code="OK",method="Translate"}') == "1.0"
        assert metric(server, 'onnxlate_requests_in_flight{method="Translate"}') == "0.0"
        client.score(["a"], ["b"])
        assert metric(server, 'onnxlate_requests_total{code="OK",method="Score"}') == "1.0"
        assert metric(server, 'onnxlate_rows_capacity{worker="1"}') == "16.0"
        labels = 'device="cpu",languages="en-de,en-fr,de-en",name="shout",precision="fp32",version="0123abcd"'
        assert metric(server, f"onnxlate_model_info{{{labels}}}") == "1.0"


def test_health_probes_are_not_counted_as_requests() -> None:
    with running_server() as server:
        health(server.address)
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server.metrics_port}/metrics", timeout=PATIENCE_S) as page:
            assert "Health" not in page.read().decode()


def reflected_services(address: str) -> list[str]:
    with grpc.insecure_channel(address) as channel:
        info: Any = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (response,) = info(requests, timeout=PATIENCE_S)
        return [service.name for service in response.list_services_response.service]


def test_reflection_answers_when_asked_for() -> None:
    with running_server(config=dataclasses.replace(LOCAL, reflection=True)) as server:
        assert {SERVICE_NAME, "grpc.health.v1.Health"} <= set(reflected_services(server.address))


def test_reflection_is_off_otherwise() -> None:
    with running_server() as server, pytest.raises(grpc.RpcError) as raised:
        reflected_services(server.address)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_bytes_that_are_no_message_are_an_invalid_argument() -> None:
    with running_server() as server, grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(f"/{SERVICE_NAME}/Translate", None, pb.TranslateResponse.FromString)
        with pytest.raises(grpc.RpcError) as raised:
            call(pb.TranslateRequest(texts=["abcdef"]).SerializeToString()[:-2], timeout=PATIENCE_S)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_health_answers_while_requests_are_refused() -> None:
    engine = ScriptedEngine()
    engine.refusal = OverloadedError("queue_full", 1.0)
    with running_server(engine) as server, TranslationClient(server.address, retry=NO_RETRY) as client:
        with pytest.raises(OverloadedError, match="queue_full"):
            client.translate(["a"])
        assert health(server.address) == SERVING
        assert metric(server, 'onnxlate_rejections_total{reason="queue_full"}') == "1.0"


@pytest.mark.parametrize(
    "option",
    ["grpc.max_connection_idle_ms", "grpc.max_connection_age_ms", "grpc.max_connection_age_grace_ms", "grpc.keepalive_time_ms"],
)
def test_connections_that_are_idle_or_half_open_are_freed(option: str) -> None:
    assert dict(_channel_options(RequestLimits()))[option] > 0


def test_a_connection_that_ages_lets_its_longest_request_finish() -> None:
    assert dict(_channel_options(RequestLimits(max_request_s=7.0)))["grpc.max_connection_age_grace_ms"] == 7000


def test_many_clients_at_once_each_get_their_own_answer() -> None:
    answers: dict[int, str] = {}
    with running_server() as server, TranslationClient(server.address, timeout_s=PATIENCE_S) as client:

        def call(number: int) -> None:
            answers[number] = client.translate([f"text {number}"])[0].text

        threads = [threading.Thread(target=call, args=(number,)) for number in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert answers == {number: f"TEXT {number}" for number in range(32)}


# Draining.


def test_a_drain_lets_what_was_admitted_finish_and_refuses_the_rest() -> None:
    engine = ScriptedEngine(hold)
    answers: list[str] = []
    with running_server(engine) as server, TranslationClient(server.address, retry=NO_RETRY, timeout_s=PATIENCE_S) as client:
        caller = threading.Thread(target=lambda: answers.append(client.translate(["ab"])[0].text))
        caller.start()
        (sequence,) = engine.wait_running(1)
        with health_changes(server.address) as changes:
            assert next(changes) == SERVING
            draining = asyncio.run_coroutine_threadsafe(server.server.drain(), server.loop)
            assert next(changes) == NOT_SERVING
        engine.wait_for(lambda: engine.draining)
        with pytest.raises(ShuttingDownError, match="shutting down"):
            client.translate(["b"])
        assert health(server.address, "") == NOT_SERVING
        assert not draining.done()
        engine.end(sequence)
        draining.result(PATIENCE_S)
        caller.join(PATIENCE_S)
    assert answers == ["AB"]


def test_a_drain_waits_no_longer_than_its_timeout_and_the_rest_is_told_why(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine(hold)
    config = dataclasses.replace(LOCAL, drain_timeout_s=0.05)
    with running_server(engine, config=config) as server, grpc.insecure_channel(server.address) as channel:
        call: Any = channel.unary_unary(f"/{SERVICE_NAME}/Translate", pb.TranslateRequest.SerializeToString, None)
        future = call.future(pb.TranslateRequest(texts=["a"]))
        engine.wait_running(1)
        asyncio.run_coroutine_threadsafe(server.server.drain(), server.loop).result(PATIENCE_S)
        asyncio.run_coroutine_threadsafe(server.server.stop(), server.loop).result(PATIENCE_S)
        assert future.exception(PATIENCE_S) is not None
    assert "1 requests did not finish in 0.05 s" in caplog.text
    assert engine.running == []
    assert future.code() is grpc.StatusCode.UNAVAILABLE


# The process: signals and exit statuses.

# Streams send their first piece and then nothing until the engine drains; a text that starts with "never" gets no more at all.
PROCESS = """
import sys
from serving.config import RequestLimits, ServerConfig
from serving.server import serve
from tests.fakes import ScriptedEngine, fake_model

class Engine(ScriptedEngine):
    def drain(self):
        super().drain()
        for sequence in self.running:
            if sequence.source_ids[0] != 10 + ord("n"):
                self.end(sequence)

def first_piece(sequence):
    sequence.on_token(sequence.source_ids[0])

def load(metrics):
    print(f"switch interval {sys.getswitchinterval():g}", file=sys.stderr, flush=True)
    if "wait" in sys.argv:
        sys.stdin.readline()
    return fake_model(Engine(first_piece))

config = ServerConfig(host="127.0.0.1", port=0, metrics_port=0)
sys.exit(serve(config, RequestLimits(), load))
"""


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROCESS, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line_with(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """Reads what the process says until a line matches."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"it ended without saying {pattern!r}")


READY = r"^serving shout on (127\.0\.0\.1:\d+), metrics on 127\.0\.0\.1:\d+$"


def test_the_event_loop_gives_the_interpreter_back_soon() -> None:
    with process() as server:
        assert line_with(server, r"^switch interval (\S+)$")[1] == "0.0001"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_with_0_after_what_was_admitted(number: signal.Signals) -> None:
    with process() as server:
        address = line_with(server, READY)[1]
        with TranslationClient(address, retry=NO_RETRY, timeout_s=PATIENCE_S) as client:
            stream = client.translate_stream("ab")
            assert next(stream).text_delta == "a"
            server.send_signal(number)
            rest = list(stream)
        assert rest[-1].translation is not None
        assert rest[-1].translation.text == "AB"
        assert server.wait(PATIENCE_S) == 0


def test_a_second_signal_ends_the_process_at_once() -> None:
    with process() as server:
        address = line_with(server, READY)[1]
        with TranslationClient(address, retry=NO_RETRY, timeout_s=PATIENCE_S) as client, health_changes(address) as changes:
            stream = client.translate_stream("never")
            assert next(stream).text_delta == "n"
            assert next(changes) == SERVING
            server.send_signal(signal.SIGTERM)
            assert next(changes) == NOT_SERVING
            server.send_signal(signal.SIGTERM)
            assert server.wait(PATIENCE_S) == 128 + signal.SIGTERM
            with pytest.raises(RemoteError, match="UNAVAILABLE"):
                next(stream)


def test_a_signal_while_loading_ends_the_process_without_serving() -> None:
    with process("wait") as server:
        assert server.stdin is not None
        line_with(server, r"loading the model$")
        server.send_signal(signal.SIGTERM)
        line_with(server, r"SIGTERM: stopping")
        _, said = server.communicate("\n", PATIENCE_S)
        assert server.returncode == 0
        assert "serving shout" not in said


def test_a_second_signal_while_loading_does_not_wait_for_the_model() -> None:
    with process("wait") as server:
        line_with(server, r"loading the model$")
        server.send_signal(signal.SIGTERM)
        line_with(server, r"SIGTERM: stopping")
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE_S) == 128 + signal.SIGINT


# Loading.


def test_a_bundle_is_loaded_with_its_own_limits(tiny_bundle: Bundle) -> None:
    config = EngineConfig(threads=1, max_rows_per_worker=3)
    model = load_model(tiny_bundle.directory, config, RequestLimits(), NullObserver())
    try:
        manifest = tiny_bundle.manifest
        assert (model.description.name, model.description.version) == (manifest.name, manifest.version())
        assert (model.preparer.languages, model.worker_rows) == ((("en", "de"),), (3,))
        assert model.preparer.limits.max_beam_size == 3
        assert model.preparer.limits.max_source_tokens == manifest.limits.max_source_tokens < RequestLimits().max_source_tokens
    finally:
        model.engine.close()


@pytest.mark.parametrize(
    ("rows", "server", "model", "candidates", "expected"),
    [(64, 16, 24, 1000, 16), (4, 16, 24, 1000, 4), (64, 1000, 24, 1000, 24), (64, 16, 24, 11, 5), (64, 16, 24, 2, 1)],
    ids=["the server's limit", "a worker's rows", "the graph's widths", "the graph's candidates", "two words"],
)
def test_the_widest_beam_is_what_all_allow(
    tiny_bundle: Bundle, rows: int, server: int, model: int, candidates: int, expected: int
) -> None:
    manifest = tiny_bundle.manifest
    own = manifest.limits.model_copy(update={"max_beam_size": model, "max_candidates": candidates})
    config = EngineConfig(threads=1, max_rows_per_worker=rows)
    limits = limits_of(manifest.model_copy(update={"limits": own}), config, RequestLimits(max_beam_size=server))
    assert limits.max_beam_size == expected


def test_a_beam_wider_than_the_graphs_is_refused_by_name_and_the_widest_is_translated(tiny_bundle: Bundle) -> None:
    widest = tiny_bundle.manifest.limits.max_beam_size
    model = load_model(tiny_bundle.directory, EngineConfig(threads=1), RequestLimits(max_beam_size=1000), NullObserver())
    try:
        prepare = model.preparer
        assert prepare.limits.max_beam_size == widest == 16
        with pytest.raises(InvalidRequestError, match=f"^options.beam_size: must be from 1 to {widest}, not {widest + 1}$"):
            prepare.check_options(RequestOptions(beam_size=widest + 1))
        prepare.check_options(RequestOptions(beam_size=widest))
        assert isinstance(model.engine, Engine)
        (outcome,) = translate(model.engine, [((5, 6, 3), DecodingOptions(beam_size=widest, max_target_tokens=3))])
        assert outcome.error is None
        assert outcome.hypotheses
    finally:
        model.engine.close()


def test_without_onnx_runtime_the_extras_are_named(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("serving.engine", "serving.lane", *(name for name in sys.modules if name.startswith("serving.runtime"))):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ServerStartError, match=r"install onnxlate\[cpu\], or onnxlate\[gpu\]"):
        load_model(tiny_bundle.directory, EngineConfig(), RequestLimits(), NullObserver())
