"""Servers as child processes on loopback: onnxlate, and CTranslate2 behind mosec.

Knows commands, when a server is ready, how it is stopped and what its metrics page says; does not know load. A server ends with
the ``with`` block that started it, and, where the whole program is killed, with the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.served.clients import Wire
from benchmarks.served.processes import process_tree

_HOST = "127.0.0.1"
_ROOT = Path(__file__).parents[2]
# Loading a model takes seconds; on a busy machine more.
_START_S = 180.0
_STOP_S = 30.0
_PAGE_S = 10.0
# Between two tries whether a server answers.
_LOOK_AGAIN_S = 0.05
# Another process may take the free port that was found; so often another one is tried.
_PORT_TRIES = 5
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_Matches = SimpleQueue[re.Match[str] | None]


class ServerUnavailableError(Exception):
    """A server that does not start; its text is the reason, in one line."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Running totals of a server; the difference of two is what happened between them."""

    batches: float = 0.0
    # Of all batches: rows of a decoder step for onnxlate, texts of a batch for the others.
    batched: float = 0.0
    # From a text's arrival to its first token, in seconds; servers that answer whole texts do not count it.
    first_tokens: float = 0.0
    first_token_s: float = 0.0
    requests: float = 0.0

    def since(self, earlier: Counters) -> Counters:
        """What happened after ``earlier``."""
        return Counters(
            batches=self.batches - earlier.batches,
            batched=self.batched - earlier.batched,
            first_tokens=self.first_tokens - earlier.first_tokens,
            first_token_s=self.first_token_s - earlier.first_token_s,
            requests=self.requests - earlier.requests,
        )

    @property
    def mean_batch(self) -> float | None:
        """None without a batch."""
        return self.batched / self.batches if self.batches else None

    @property
    def mean_first_token_s(self) -> float | None:
        """None where it was not counted."""
        return self.first_token_s / self.first_tokens if self.first_tokens else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """What is tuned of a server."""

    # onnxlate: --max-rows of a worker. The others: texts of a batch, at most.
    batch: int
    # That a batch waits for more; onnxlate's do not wait.
    wait_ms: int | None = None

    def __str__(self) -> str:
        """As a report names it."""
        return f"{self.batch} rows a worker" if self.wait_ms is None else f"batches up to {self.batch}, wait {self.wait_ms} ms"


class Server(ABC):
    """One server. ``with`` starts and stops it."""

    name: str
    wire: Wire

    def __init__(self, knobs: Knobs) -> None:
        self.knobs = knobs
        # HOST:PORT, and the metrics page, once started.
        self.target = ""
        self.metrics_url = ""
        self._process: subprocess.Popen[str] | None = None
        self._log: deque[str] = deque(maxlen=50)
        self._reader: Thread | None = None

    @property
    def pid(self) -> int:
        """Of the process at the top."""
        assert self._process is not None, "not started"
        return self._process.pid

    @abstractmethod
    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            ServerUnavailableError: it ended, or did not answer in time.
        """

    @abstractmethod
    def counters(self) -> Counters:
        """Its totals by now."""

    def stop(self) -> None:
        """Ask it to end; kill it when it does not."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            # Its children too: nobody else would end them.
            for pid in list(process_tree(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        if self._reader is not None:
            self._reader.join(_STOP_S)
        if process.stderr is not None:
            process.stderr.close()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _spawn(self, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            preexec_fn=_end_with_parent,
        )
        return self._process

    def _read_log(self, process: subprocess.Popen[str], ready: re.Pattern[str] | None = None) -> _Matches:
        """Keep reading what it logs, for a full pipe would stop it; out come its lines like ``ready``, and None at the end."""
        stream = process.stderr
        assert stream is not None
        found: _Matches = SimpleQueue()

        def read() -> None:
            for line in stream:
                self._log.append(line)
                if ready is not None and (match := ready.match(line.strip())):
                    found.put(match)
            found.put(None)

        self._reader = Thread(target=read, daemon=True)
        self._reader.start()
        return found

    def _ended(self, process: subprocess.Popen[str]) -> ServerUnavailableError:
        if self._reader is not None:
            self._reader.join(_STOP_S)
        return ServerUnavailableError(f"{self.name} ended with status {process.wait()}: {self._last_line()}")

    def _not_ready(self) -> ServerUnavailableError:
        return ServerUnavailableError(f"{self.name} was not ready in {_START_S:g} s: {self._last_line()}")

    def _last_line(self) -> str:
        """Of its log."""
        written = [line.strip() for line in tuple(self._log) if line.strip()]
        return written[-1][:200] if written else "it wrote nothing"

    def metrics_page(self) -> str:
        """Its Prometheus page."""
        with urllib.request.urlopen(self.metrics_url, timeout=_PAGE_S) as page:
            text: str = page.read().decode()
            return text


class OnnxlateServer(Server):
    """``onnxlate serve`` on ports that the system chooses."""

    name = "onnxlate"
    wire: Wire = "grpc"
    # Where it says its ports.
    _READY = re.compile(r"^serving .+ on (?P<target>\S+), metrics on (?P<metrics>\S+)$")

    def __init__(
        self,
        bundle: Path,
        knobs: Knobs,
        *,
        threads: int,
        threads_when_alone: int | None = None,
        module: str = "serving.cli",
    ) -> None:
        """A server of ``bundle``; ``module`` is run as the command, and takes the command's options."""
        super().__init__(knobs)
        self._command = [
            *(sys.executable, "-m", module, "serve", str(bundle)),
            *("--host", _HOST, "--port", "0", "--metrics-port", "0"),
            *("--threads", str(threads), "--max-rows", str(knobs.batch)),
            *(() if threads_when_alone is None else ("--threads-when-alone", str(threads_when_alone))),
        ]

    def start(self) -> None:
        """See ``Server.start``."""
        process = self._spawn(self._command, {})
        try:
            ready = self._read_log(process, self._READY).get(timeout=_START_S)
        except Empty as error:
            raise self._not_ready() from error
        if ready is None:
            raise self._ended(process)
        self.target, self.metrics_url = ready["target"], f"http://{ready['metrics']}/metrics"

    def counters(self) -> Counters:
        """See ``Server.counters``."""
        totals = read_totals(self.metrics_page())
        return Counters(
            batches=totals.get("onnxlate_rows_per_step_count", 0.0),
            batched=totals.get("onnxlate_rows_per_step_sum", 0.0),
            first_tokens=totals.get("onnxlate_time_to_first_token_seconds_count", 0.0),
            first_token_s=totals.get("onnxlate_time_to_first_token_seconds_sum", 0.0),
            requests=totals.get("onnxlate_requests_total", 0.0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedModel:
    """A model for CTranslate2, and its tokenizers."""

    directory: Path
    source_tokenizer: Path
    target_tokenizer: Path
    compute_type: str = "int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOptions:
    """How a peer's program is started."""

    model: ConvertedModel
    beam_size: int
    # Processes of one thread.
    workers: int
    # Environment variables that choose its kernels.
    environment: Mapping[str, str] = field(default_factory=dict)


class PeerServer(Server):
    """A program beside this file that takes the port it is given."""

    wire: Wire = "http"
    program: str

    def __init__(self, options: PeerOptions, knobs: Knobs) -> None:
        super().__init__(knobs)
        self._options = options

    @abstractmethod
    def _listen_on(self, port: int) -> list[str]:
        """The options that tell the program its port; sets ``target`` and ``metrics_url``."""

    def start(self) -> None:
        """See ``Server.start``. The program takes no port 0: a free one is looked for, another when it is taken."""
        for attempt in range(_PORT_TRIES):
            process = self._spawn(self._command(free_port()), {"OMP_NUM_THREADS": "1", **self._options.environment})
            self._read_log(process)
            if self._wait_ready(process):
                return
            ended = self._ended(process)
            if attempt + 1 == _PORT_TRIES or "in use" not in "".join(self._log):
                raise ended
            self.stop()

    def _command(self, port: int) -> list[str]:
        options, model = self._options, self._options.model
        return [
            *(sys.executable, str(Path(__file__).parent / self.program), "--model", str(model.directory)),
            *("--source-tokenizer", str(model.source_tokenizer), "--target-tokenizer", str(model.target_tokenizer)),
            *("--compute-type", model.compute_type, "--beam-size", str(options.beam_size), "--workers", str(options.workers)),
            *("--batch-size", str(self.knobs.batch), "--wait-ms", str(self.knobs.wait_ms or 0)),
            *self._listen_on(port),
        ]

    def _wait_ready(self, process: subprocess.Popen[str]) -> bool:
        """Whether it answers a translation; False when its process ended.

        Raises:
            ServerUnavailableError: not in time.
        """
        ends_at_s = time.monotonic() + _START_S
        while time.monotonic() < ends_at_s:
            if process.poll() is not None:
                return False
            if answers(self.target):
                return True
            select.select([], [], [], _LOOK_AGAIN_S)
        raise self._not_ready()


class MosecServer(PeerServer):
    """CTranslate2 behind mosec."""

    name = "CTranslate2 + mosec"
    program = "mosec_app.py"

    def _listen_on(self, port: int) -> list[str]:
        self.target, self.metrics_url = f"{_HOST}:{port}", f"http://{_HOST}:{port}/metrics"
        # mosec's own timeout, 3 s, would turn the slow answers of an overloaded server into errors.
        return ["--address", _HOST, "--port", str(port), "--timeout", "60000", "--log-level", "warning"]

    def counters(self) -> Counters:
        """See ``Server.counters``."""
        totals = read_totals(self.metrics_page())
        return Counters(
            batches=totals.get("mosec_service_batch_size_count", 0.0),
            batched=totals.get("mosec_service_batch_size_sum", 0.0),
            requests=totals.get("mosec_service_throughput_total", 0.0),
        )


def answers(target: str) -> bool:
    """Whether an HTTP peer translates."""
    request = urllib.request.Request(f"http://{target}/translate", data=b'{"text": "A dog."}')
    request.add_header("content-type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=_PAGE_S) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def read_totals(page: str) -> dict[str, float]:
    """Name -> the sum over all labels, of every sample of a Prometheus page but the buckets."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def free_port() -> int:
    """A port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _end_with_parent() -> None:
    """Run in the child before its program: the kernel ends it when the process that started it dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
