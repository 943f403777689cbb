"""Options of the engine and of the server: frozen, each with its unit.

Knows defaults and bounds of the service; does not know what a bundle holds or how a request looks.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs this process may use: the least of its affinity and its (version 2) cgroup's quota, at least 1.

    ONNX Runtime counts the host's cores; in a container with a quota that is too many.
    """
    affinity = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()[:2]
    except (OSError, ValueError):
        return affinity
    if quota == "max":
        return affinity
    return max(1, min(affinity, math.ceil(int(quota) / int(period))))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How sequences are scheduled and run."""

    # "cpu" or "cuda".
    device: str = "cpu"
    # Workers on the CPU, each with one thread for the graphs: that gives the most translations a second.
    threads: int = field(default_factory=available_cpus)
    # CPU threads that a worker uses while no other has anything to do, so that a lone request is answered sooner; None: as many
    # as there are workers. More than one loads encoder and decoder a second time, unless there is one worker only.
    threads_when_alone: int | None = None
    # Cache rows of one worker: hypotheses that step together at most.
    max_rows_per_worker: int = 128
    # Padded source tokens of one encoder batch; a longer single source goes alone.
    encoder_batch_tokens: int = 1024
    # Sequences that may wait; more are refused as overload.
    max_waiting_sequences: int = 2048
    # Source tokens that may wait.
    max_waiting_tokens: int = 131_072

    @property
    def num_workers(self) -> int:
        """Workers: one for each CPU thread, or one for the GPU."""
        return self.threads if self.device == "cpu" else 1

    @property
    def lone_threads(self) -> int:
        """CPU threads of a worker while no other has anything to do."""
        return self.num_workers if self.threads_when_alone is None else self.threads_when_alone


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What one request may ask for."""

    max_texts_per_request: int = 256
    max_beam_size: int = 16
    # Longest request, whatever deadline its client set; a client may set none.
    max_request_s: float = 60.0
    # Lowered to what the model's positions allow.
    max_source_tokens: int = 1024
    max_target_tokens: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where and how the server listens."""

    host: str = "0.0.0.0"
    # 0 lets the system choose.
    port: int = 50051
    metrics_port: int = 8002
    reflection: bool = False
    # After SIGTERM, admitted requests get so long to finish.
    drain_timeout_s: float = 60.0
