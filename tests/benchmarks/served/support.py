"""Literal points and a fake peer's server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.served.point import LoadPoint
from benchmarks.served.servers import ConvertedModel, Knobs, MosecServer, PeerOptions

NOWHERE = ConvertedModel(directory=Path("model"), source_tokenizer=Path("source"), target_tokenizer=Path("target"))


class FakePeer(MosecServer):
    """The fake peer's program, started as mosec's is."""

    name = "fake peer"
    program = str(Path(__file__).with_name("fake_peer.py"))


def fake_peer(directory: Path | None = None) -> FakePeer:
    environment = {} if directory is None else {"FAKE_PEER": str(directory)}
    return FakePeer(PeerOptions(model=NOWHERE, beam_size=1, workers=1, environment=environment), Knobs(batch=16, wait_ms=2))


def point(**fields: Any) -> LoadPoint:
    """A point, with everything that is not said filled in."""
    given: dict[str, Any] = {
        "model": "small",
        "server": "onnxlate",
        "settings": "64 rows a worker",
        "beam_size": 1,
        "seconds": 10.0,
        "requests": 1000,
        "throughput_per_s": 100.0,
        "goodput_per_s": 90.0,
        "limit_s": 0.2,
        "p50_s": 0.05,
        "p95_s": 0.15,
        "p99_s": 0.18,
        "first_token_s": 0.01,
        "mean_batch": 4.0,
        "cpu_s_per_sentence": 0.008,
        "memory_bytes": 300 * 2**20,
        "generator_cpu_s_per_request": 0.0003,
        "generator_late_p95_s": 0.001,
    }
    return LoadPoint(**(given | fields))
