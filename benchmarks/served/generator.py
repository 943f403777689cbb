"""The load generator, a process of its own: ``python -m benchmarks.served.generator < PLAN > TRACE``.

One event loop. Reads a plan as JSON, sends its load, writes what became of every request. Knows when to send; does not know what
the figures mean, nor anything of the servers but their address.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pydantic

from benchmarks.served.clients import Client, RequestFailedError, Wire, make_client
from benchmarks.served.points import UNANSWERED, Sample, Window, poisson_schedule, text_order


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoad:
    """Clients that each send the next request when the last one is answered."""

    clients: int
    # Requests of all clients together, at most; as many as fit into the time where it is left out.
    max_requests: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoad:
    """Requests at random times (Poisson), whether or not earlier ones are answered."""

    rate_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run."""

    wire: Wire
    # HOST:PORT.
    target: str
    texts: tuple[str, ...]
    load: ClosedLoad | OpenLoad
    beam_size: int = 1
    streamed: bool = False
    # Sent but not counted.
    warmup_s: float = 1.0
    duration_s: float = 10.0
    # For answers to the last requests; then they are given up.
    drain_s: float = 5.0
    # Of one request.
    timeout_s: float = 30.0
    seed: int = 1

    @property
    def window(self) -> Window:
        """The part of the run that counts."""
        return Window(starts_s=self.warmup_s, ends_s=self.warmup_s + self.duration_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What became of a plan."""

    # In the order of their ends.
    samples: tuple[Sample, ...]
    # CPU time of this process while it ran the plan.
    cpu_s: float
    # From the start to the last answer.
    elapsed_s: float


class Generator:
    """Runs one plan against one client."""

    def __init__(
        self,
        plan: Plan,
        client: Client,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """A generator; ``clock`` must be the event loop's own wherever answers are streamed."""
        self._plan = plan
        self._client = client
        self._clock = clock
        self._sleep = sleep
        self._order = text_order(len(plan.texts), plan.seed)
        self._samples: list[Sample] = []
        self._started_s = 0.0

    async def run(self) -> Trace:
        """Send the load and wait for the answers, the drain's time at most."""
        cpu_s = time.process_time()
        self._started_s = self._clock()
        match self._plan.load:
            case ClosedLoad(clients=clients, max_requests=limit):
                await self._closed(clients, limit)
            case OpenLoad(rate_per_s=rate_per_s):
                await self._open(poisson_schedule(rate_per_s, self._plan.window.ends_s, self._plan.seed))
        return Trace(samples=tuple(self._samples), cpu_s=time.process_time() - cpu_s, elapsed_s=self._now_s())

    def _now_s(self) -> float:
        return self._clock() - self._started_s

    async def _closed(self, clients: int, limit: int | None) -> None:
        left = iter(range(limit)) if limit is not None else None

        async def client() -> None:
            while (now_s := self._now_s()) < self._plan.window.ends_s and (left is None or next(left, None) is not None):
                await self._send(next(self._order), now_s)

        await self._finish([client() for _ in range(clients)], within_s=self._plan.window.ends_s + self._plan.drain_s)

    async def _open(self, schedule: list[float]) -> None:
        tasks = []
        for due_s in schedule:
            early_s = due_s - self._now_s()
            if early_s > 0:
                await self._sleep(early_s)
            tasks.append(asyncio.create_task(self._send(next(self._order), due_s)))
        await self._finish(tasks, within_s=max(self._now_s(), self._plan.window.ends_s) + self._plan.drain_s - self._now_s())

    async def _finish(self, work: list[Coroutine[Any, Any, None]] | list[asyncio.Task[None]], *, within_s: float) -> None:
        tasks = [asyncio.ensure_future(one) for one in work]
        if not tasks:
            return
        _, unanswered = await asyncio.wait(tasks, timeout=within_s)
        for task in unanswered:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def _send(self, text: int, due_s: float) -> None:
        sent_s = self._now_s()
        answer = error = first_token_s = None
        try:
            got = await self._client.send(text, self._plan.timeout_s)
            answer = got.text
            first_token_s = None if got.first_token_s is None else got.first_token_s - self._started_s
        except RequestFailedError as failure:
            error = failure.kind
        except asyncio.CancelledError:
            self._note(text, due_s, sent_s, None, None, UNANSWERED)
            raise
        self._note(text, due_s, sent_s, first_token_s, answer, error)

    def _note(
        self, text: int, due_s: float, sent_s: float, first_token_s: float | None, answer: str | None, error: str | None
    ) -> None:
        self._samples.append(
            Sample(
                text=text,
                due_s=due_s,
                sent_s=sent_s,
                ended_s=self._now_s(),
                first_token_s=first_token_s,
                answer=answer,
                error=error,
            )
        )


async def generate(plan: Plan) -> Trace:
    """Run a plan in this process."""
    client = make_client(plan.wire, plan.target, plan.texts, beam_size=plan.beam_size, streamed=plan.streamed)
    try:
        return await Generator(plan, client).run()
    finally:
        await client.close()


def generate_apart(plan: Plan) -> Trace:
    """Run a plan in a process of its own, and wait for it.

    Raises:
        RuntimeError: the process failed; holds what it wrote on stderr.
    """
    command = [sys.executable, "-m", "benchmarks.served.generator"]
    done = subprocess.run(command, input=pydantic.TypeAdapter(Plan).dump_json(plan), capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"the load generator failed: {done.stderr.decode(errors='replace')[-2000:]}")
    return pydantic.TypeAdapter(Trace).validate_json(done.stdout)


def main() -> None:
    """Plan on standard input, trace on standard output."""
    plan = pydantic.TypeAdapter(Plan).validate_json(sys.stdin.buffer.read())
    sys.stdout.buffer.write(pydantic.TypeAdapter(Trace).dump_json(asyncio.run(generate(plan))))


if __name__ == "__main__":
    main()
