from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.served import servers
from benchmarks.served.clients import HttpClient
from benchmarks.served.processes import usage
from benchmarks.served.servers import Counters, Knobs, OnnxlateServer, ServerUnavailableError, answers, free_port, read_totals
from serving.bundle import Bundle
from serving.client import TranslationClient
from tests.benchmarks.served.support import fake_peer
from tests.fakes import PATIENCE_S

PAGE = """\
# HELP rows Rows that step together.
# TYPE rows histogram
rows_bucket{le="1.0"} 2.0
rows_bucket{le="+Inf"} 5.0
rows_count 5.0
rows_sum 12.5
# HELP asked Requests.
# TYPE asked counter
asked_total{code="OK"} 3.0
asked_total{code="CANCELLED"} 1.0
"""


def test_totals_are_summed_over_labels_without_buckets() -> None:
    assert read_totals(PAGE) == {"rows_count": 5.0, "rows_sum": 12.5, "asked_total": 4.0}


def test_the_difference_of_two_readings() -> None:
    earlier = Counters(batches=1, batched=4, first_tokens=2, first_token_s=0.5, requests=3)
    later = Counters(batches=3, batched=10, first_tokens=6, first_token_s=1.5, requests=8)
    happened = later.since(earlier)
    assert happened == Counters(batches=2, batched=6, first_tokens=4, first_token_s=1.0, requests=5)
    assert (happened.mean_batch, happened.mean_first_token_s) == (3.0, 0.25)
    nothing = later.since(later)
    assert (nothing.mean_batch, nothing.mean_first_token_s) == (None, None)


def test_settings_as_a_report_names_them() -> None:
    assert str(Knobs(batch=64)) == "64 rows a worker"
    assert str(Knobs(batch=16, wait_ms=2)) == "batches up to 16, wait 2 ms"


async def test_a_peer_starts_answers_counts_and_stops() -> None:
    with fake_peer() as peer:
        pid = peer.pid
        before = peer.counters()
        client = HttpClient(peer.target, ["ein hund"])
        assert (await client.send(0, PATIENCE_S)).text == "EIN HUND"
        await client.close()
        assert peer.counters().since(before) == Counters(batches=1, batched=1, requests=1)
        assert usage(pid).memory_bytes > 0
    assert not answers(peer.target)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    peer.stop()


def test_a_peer_whose_port_was_taken_gets_another(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with fake_peer(tmp_path) as peer:
        assert answers(peer.target)
    assert not (tmp_path / "taken").exists()


def test_a_peer_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(ServerUnavailableError, match=r"^fake peer ended with status 1: no such model$"), fake_peer(tmp_path):
        pass


def test_a_port_that_is_taken_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_PORT_TRIES", 1)
    (tmp_path / "taken").touch()
    with pytest.raises(ServerUnavailableError, match=r"in use$"), fake_peer(tmp_path):
        pass


def test_a_peer_that_is_never_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_START_S", 0.0)
    peer = fake_peer()
    with pytest.raises(ServerUnavailableError, match=r"^fake peer was not ready in 0 s: "), peer:
        pass
    with pytest.raises(AssertionError, match="not started"):
        assert peer.pid


class SilentServer(OnnxlateServer):
    """One that never says that it is ready, nor anything else."""

    def __init__(self) -> None:
        super().__init__(Path("bundle"), Knobs(batch=8), threads=1)
        self._command = [sys.executable, "-c", "import signal; signal.pause()"]


@pytest.mark.parametrize("log", [[], ["loading\n", "\n"]], ids=["silent", "its last line"])
def test_our_server_that_is_never_ready(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    monkeypatch.setattr(servers, "_START_S", 0.0)
    server = SilentServer()
    server._log.extend(log)
    with pytest.raises(ServerUnavailableError) as caught, server:
        pass
    assert str(caught.value) == f"onnxlate was not ready in 0 s: {'loading' if log else 'it wrote nothing'}"
    assert server._process is None


def test_our_servers_threads_are_told_to_its_command() -> None:
    plain = OnnxlateServer(Path("bundle"), Knobs(batch=8), threads=2)
    alone = OnnxlateServer(Path("bundle"), Knobs(batch=8), threads=2, threads_when_alone=1)
    assert alone._command == [*plain._command, "--threads-when-alone", "1"]
    assert plain._command[-4:] == ["--threads", "2", "--max-rows", "8"]


def test_a_peer_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_STOP_S", 0.1)
    (tmp_path / "stubborn").touch()
    with fake_peer(tmp_path) as peer:
        pid = peer.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_free_port_can_be_listened_on() -> None:
    assert 0 < free_port() < 65536


@pytest.mark.slow
def test_our_server_starts_answers_counts_and_stops(tiny_bundle: Bundle) -> None:
    with OnnxlateServer(tiny_bundle.directory, Knobs(batch=8), threads=1) as server:
        before = server.counters()
        with TranslationClient(server.target) as client:
            client.translate(["a man"], min_target_tokens=4, max_target_tokens=4)
        happened = server.counters().since(before)
    assert (happened.batches, happened.mean_batch, happened.requests, happened.first_tokens) == (4, 1.0, 1, 1)
    assert (happened.mean_first_token_s or 0) > 0


@pytest.mark.slow
def test_our_server_without_its_bundle(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerUnavailableError, match=r"^onnxlate ended with status 1: .*there is no such directory"),
        OnnxlateServer(tmp_path / "none", Knobs(batch=8), threads=1),
    ):
        pass
