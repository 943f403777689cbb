"""A peer in a process of its own, so that thread pools, allocators and memory do not mix; it waits without spinning.

Knows pipes and processes; does not know what a peer does.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
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
    """A peer as the benchmark talks to it. ``with`` starts and ends its process; one that was closed can be started again."""

    def __init__(self, spec: PeerSpec) -> None:
        self.spec = spec
        # Of the last start.
        self.loaded: Loaded | None = None
        self._running: _Running | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started, and not closed since."""
        return self._running is not None

    def start(self) -> Loaded:
        """Start the process and wait until the model is loaded.

        Raises:
            PeerUnavailableError: the library or the model cannot be loaded.
        """
        assert self._running is None, "it runs already"
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        process = context.Process(target=serve_peer, args=(self.spec, theirs), daemon=True)
        process.start()
        # Or the end of the process would not be seen on this side.
        theirs.close()
        self._running = _Running(process, connection)
        reply = self._running.receive()
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
        assert self._running is not None, "not started"
        try:
            self._running.connection.send(job)
        except OSError as error:
            raise PeerUnavailableError(f"its process has ended ({one_line(error)})") from error
        reply = self._running.receive()
        if not isinstance(reply, Answer):
            raise PeerUnavailableError(reply.reason if isinstance(reply, Failed) else "it gave no answer")
        return reply

    def close(self) -> None:
        """End the process, if there is one."""
        running, self._running = self._running, None
        if running is not None:
            running.end()

    def __enter__(self) -> PeerProcess:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Running:
    """A process and our end of its pipe."""

    process: SpawnProcess
    connection: Connection

    def receive(self) -> object:
        """Its next message, or that there is none."""
        try:
            if not self.connection.poll(_PATIENCE_S):
                return Failed(f"no answer in {_PATIENCE_S:g} seconds")
            reply: object = self.connection.recv()
            return reply
        except (EOFError, ConnectionError):
            self.process.join(timeout=10)
            return Failed(f"its process ended with exit status {self.process.exitcode}")

    def end(self) -> None:
        """Ask it to end, and kill it when it does not."""
        self.connection.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()
