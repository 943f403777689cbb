"""A peer in a process of its own, so that thread pools, allocators and memory do not mix; it waits without spinning.

Knows pipes and processes; does not know what a peer does.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType

from benchmarks.peers import open_peer
from benchmarks.peers.base import Answer, Job, PeerSpec, perform, resident_bytes

# A model that takes longer to load, or a job that takes longer, is given up.
_PATIENCE_S = 1800.0
_LONGEST_REASON = 200


class PeerUnavailableError(Exception):
    """A peer that cannot run; its text is the reason, in one line."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a peer says once its model is loaded."""

    description: str
    # From before the library was imported, and from after that.
    import_and_load_s: float
    load_s: float
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class Failed:
    """What a peer says when it cannot."""

    reason: str


def one_line(error: BaseException) -> str:
    """An error as the report names it."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:_LONGEST_REASON]


def serve_peer(spec: PeerSpec, connection: Connection) -> None:
    """Run in the peer's process: load, then answer jobs until the other end closes or sends None."""
    os.environ.update(spec.environment)
    started = time.perf_counter()
    try:
        preload(spec)
        imported = time.perf_counter()
        peer = open_peer(spec)
        ended = time.perf_counter()
    except Exception as error:  # whatever a library raises is its reason not to run
        connection.send(Failed(one_line(error)))
        return
    connection.send(Loaded(peer.describe(), ended - started, ended - imported, resident_bytes()[0]))
    try:
        while (job := _next_job(connection)) is not None:
            try:
                answer: Answer | Failed = perform(peer, job)
            except Exception as error:  # whatever a library raises is this job's failure, and the next job may do
                answer = Failed(one_line(error))
            connection.send(answer)
    finally:
        peer.close()


def preload(spec: PeerSpec) -> None:
    """Import what the peer needs, so that loading the model is timed by itself."""
    __import__(f"benchmarks.peers.{spec.peer}")


def _next_job(connection: Connection) -> Job | None:
    try:
        job: Job | None = connection.recv()
    except EOFError:
        return None
    return job


class PeerProcess:
    """A peer as the benchmark talks to it. ``with`` starts and ends its process."""

    def __init__(self, spec: PeerSpec) -> None:
        self.spec = spec
        self.loaded: Loaded | None = None
        context = multiprocessing.get_context("spawn")
        self._connection, self._theirs = context.Pipe()
        self._process = context.Process(target=serve_peer, args=(spec, self._theirs), daemon=True)

    def start(self) -> Loaded:
        """Start the process and wait until the model is loaded.

        Raises:
            PeerUnavailableError: the library or the model cannot be loaded.
        """
        self._process.start()
        # Or the end of the process would not be seen on this side.
        self._theirs.close()
        reply = self._receive()
        if not isinstance(reply, Loaded):
            self.close()
            raise PeerUnavailableError(reply.reason if isinstance(reply, Failed) else "it answered before it was asked")
        self.loaded = reply
        return reply

    def translate(self, job: Job) -> Answer:
        """Do a job.

        Raises:
            PeerUnavailableError: the job failed, or the process ended.
        """
        try:
            self._connection.send(job)
        except OSError as error:
            raise PeerUnavailableError(f"its process has ended ({one_line(error)})") from error
        reply = self._receive()
        if not isinstance(reply, Answer):
            raise PeerUnavailableError(reply.reason if isinstance(reply, Failed) else "it gave no answer")
        return reply

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        if self._process.pid is not None:
            self._process.join(timeout=10)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process.close()

    def __enter__(self) -> PeerProcess:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _receive(self) -> object:
        try:
            if not self._connection.poll(_PATIENCE_S):
                return Failed(f"no answer in {_PATIENCE_S:g} seconds")
            reply: object = self._connection.recv()
            return reply
        except (EOFError, ConnectionError):
            self._process.join(timeout=10)
            return Failed(f"its process ended with exit status {self._process.exitcode}")
