from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from serving import health_probe
from serving.config import ServerConfig

Status = health_pb2.HealthCheckResponse.ServingStatus


@pytest.fixture
def servicer() -> health.HealthServicer:
    return health.HealthServicer()


@pytest.fixture
def port(servicer: health.HealthServicer) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(grace=None).wait()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port on which connections are accepted by the system and answered by nobody."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_serving_server_is_healthy(servicer: health.HealthServicer, port: int) -> None:
    servicer.set("", Status.SERVING)
    result = CliRunner().invoke(health_probe.main, ["--port", str(port)])
    assert (result.exit_code, result.output) == (0, "")


def test_a_server_that_loads_or_drains_is_not(servicer: health.HealthServicer, port: int) -> None:
    servicer.set("", Status.NOT_SERVING)
    result = CliRunner().invoke(health_probe.main, ["--port", str(port)])
    assert result.exit_code == 1
    assert f"127.0.0.1:{port} is not ready: NOT_SERVING" in result.output


def test_a_port_that_nobody_holds_is_not() -> None:
    # Bound and not listening: nobody else can take it while the probe tries.
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        result = CliRunner().invoke(health_probe.main, ["--port", str(held.getsockname()[1])])
    assert result.exit_code == 1
    assert "UNAVAILABLE" in result.output


def test_a_server_that_does_not_answer_in_time_is_not(silent_port: int) -> None:
    found = health_probe.fault(f"127.0.0.1:{silent_port}", timeout_s=0.05)
    assert found is not None
    assert found.startswith("DEADLINE_EXCEEDED")


def test_proxies_of_the_environment_are_passed_by(
    servicer: health.HealthServicer, port: int, silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{silent_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    servicer.set("", Status.SERVING)
    assert health_probe.fault(f"127.0.0.1:{port}", timeout_s=5) is None


def test_the_default_port_is_the_servers() -> None:
    context = health_probe.main.make_context("health_probe", [])
    assert context.params["port"] == ServerConfig().port


@pytest.mark.parametrize("arguments", [["--port", "0"], ["--timeout-s", "0"], ["--port", "x"]], ids=" ".join)
def test_options_out_of_bounds_are_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(health_probe.main, arguments).exit_code == 2
