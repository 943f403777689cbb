"""One whole point: a real generator process on a real socket, and a real process to account for."""

from __future__ import annotations

import pytest

from benchmarks.served.generator import ClosedLoad, OpenLoad
from benchmarks.served.point import Bench, Corpus, Times
from benchmarks.served.soak import MemorySample, Soak, slope_after_settling, soak
from tests.benchmarks.served.support import fake_peer

CORPUS = Corpus(texts=("ein hund läuft im park", "zwei katzen"), references=("EIN HUND LÄUFT IM PARK", "NICHTS"))
BENCH = Bench(model="small", corpus=CORPUS)


@pytest.mark.slow
def test_a_point() -> None:
    with fake_peer() as peer, fake_peer() as idle:
        measured = BENCH.measure(
            peer, ClosedLoad(clients=2, max_requests=50), Times(warmup_s=0.0, duration_s=20.0), beam_size=1, idle=[idle]
        )
        opened = BENCH.measure(peer, OpenLoad(rate_per_s=100.0), Times(warmup_s=0.1, duration_s=0.2), beam_size=4)
    assert (measured.server, measured.settings) == ("fake peer", "batches up to 16, wait 2 ms")
    assert (measured.clients, measured.rate_per_s) == (2, None)
    assert (measured.requests, measured.errors, measured.texts, measured.texts_with_several_answers) == (50, {}, 2, 0)
    assert measured.throughput_per_s == pytest.approx(2.5)
    assert measured.mean_batch == 1.0
    assert measured.memory_bytes > 2**20
    assert measured.cpu_s_per_sentence is not None
    assert measured.first_token_s is None
    assert measured.bleu is not None
    assert 50 < measured.bleu < 100
    assert measured.idle_cpus < 0.5
    assert (opened.clients, opened.rate_per_s, opened.beam_size) == (None, 100.0, 4)
    assert opened.seconds == pytest.approx(0.2)


def test_no_score_without_references_or_answers() -> None:
    assert Corpus(texts=("a",)).bleu({0: "A"}) is None
    assert CORPUS.bleu({}) is None
    assert CORPUS.bleu({0: "EIN HUND LÄUFT IM PARK"}) == pytest.approx(100)


@pytest.mark.slow
def test_a_soak() -> None:
    said: list[str] = []
    with fake_peer() as peer:
        found = soak(peer, CORPUS, requests=2000, clients=4, every_s=0.001, say=said.append)
    assert (found.requests, found.errors) == (2000, {})
    assert found.samples[-1].requests - found.samples[0].requests == 2000
    assert found.bytes_per_1000_requests is not None
    assert any(line.endswith(" MiB") for line in said)
    assert str(found).startswith("fake peer: 2000 requests in ")


def test_growth_is_told_once_memory_has_settled() -> None:
    filling = [MemorySample(requests, 1_000_000 + 500 * requests) for requests in range(0, 200, 20)]
    settled = [MemorySample(requests, 1_100_000 + requests) for requests in range(200, 1001, 100)]
    assert slope_after_settling([*filling, *settled]) == pytest.approx(1000)


@pytest.mark.parametrize("samples", [[], [MemorySample(5, 1)], [MemorySample(5, 1), MemorySample(5, 2)]], ids=["0", "1", "same"])
def test_no_slope_of_too_few_samples(samples: list[MemorySample]) -> None:
    assert slope_after_settling(samples) is None


def test_a_soak_in_one_line() -> None:
    found = Soak(
        server="onnxlate",
        requests=50_000,
        seconds=120.4,
        errors={"INTERNAL": 2},
        samples=(MemorySample(0, 100 * 2**20), MemorySample(9, 130 * 2**20), MemorySample(50_000, 120 * 2**20)),
        bytes_per_1000_requests=-512.0,
    )
    assert str(found) == (
        "onnxlate: 50000 requests in 120 s, errors {'INTERNAL': 2}; memory 100.0 MiB at the start, 120.0 at the end, "
        "130.0 at most, -0.5 KiB per 1000 requests once settled"
    )
