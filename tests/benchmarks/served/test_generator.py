from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.served.clients import Answer, RequestFailedError
from benchmarks.served.generator import ClosedLoad, Generator, OpenLoad, Plan, Trace, generate, generate_apart
from benchmarks.served.points import UNANSWERED, poisson_schedule, summarize
from tests.benchmarks.served.support import fake_peer
from tests.fakes import FakeClock, ScriptedEngine, hold
from tests.servers import running_server

TEXTS = ("ein hund", "zwei katzen", "drei")


class FakeClient:
    """Answers at once, unless it is told otherwise for the number of the request."""

    def __init__(self, behave: Callable[[int], Any] | None = None) -> None:
        self.sent: list[int] = []
        self._behave = behave

    async def send(self, text: int, timeout_s: float) -> Answer:
        self.sent.append(text)
        if self._behave is not None:
            waits = self._behave(len(self.sent) - 1)
            if waits is not None:
                await waits
        return Answer(f"answer {text}")

    async def close(self) -> None:
        pass


def plan(load: ClosedLoad | OpenLoad, **fields: Any) -> Plan:
    return Plan(wire="grpc", target="nowhere", texts=TEXTS, load=load, **fields)


async def run_on(clock: FakeClock, load: ClosedLoad | OpenLoad, client: FakeClient, **fields: Any) -> Trace:
    """On a clock that only sleeping, and the client, move."""

    async def sleep(seconds: float) -> None:
        # Requests that were started run to their end.
        for _ in range(5):
            await asyncio.sleep(0)
        clock.now_s += seconds

    return await Generator(plan(load, **fields), client, clock=clock, sleep=sleep).run()


async def test_an_open_loop_sends_at_the_times_of_its_schedule() -> None:
    trace = await run_on(FakeClock(), OpenLoad(rate_per_s=20), FakeClient(), warmup_s=1.0, duration_s=2.0, seed=5)
    due = poisson_schedule(20, 3.0, seed=5)
    assert [sample.due_s for sample in trace.samples] == due
    assert [sample.sent_s for sample in trace.samples] == pytest.approx(due)
    assert {sample.answer for sample in trace.samples} == {"answer 0", "answer 1", "answer 2"}


async def test_a_generator_that_is_held_up_counts_from_the_time_requests_were_due() -> None:
    clock = FakeClock()

    def behave(number: int) -> None:
        if number == 3:
            # The whole process stands still.
            clock.now_s += 10.0

    trace = await run_on(clock, OpenLoad(rate_per_s=20), FakeClient(behave), warmup_s=0.0, duration_s=2.0, seed=5)
    due = poisson_schedule(20, 2.0, seed=5)
    assert len(trace.samples) == len(due)
    samples = sorted(trace.samples, key=lambda sample: sample.due_s)
    assert [sample.due_s for sample in samples] == due
    assert samples[3].latency_s == pytest.approx(10.0, abs=0.01)
    # Those that were due meanwhile are sent at once, and have waited.
    for sample in samples[4:]:
        assert sample.sent_s >= due[3] + 10.0
        assert sample.latency_s >= 8.0


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    done = asyncio.Event()
    client = FakeClient(lambda number: done.wait() if number < 5 else None)
    running = asyncio.create_task(run_on(FakeClock(), OpenLoad(rate_per_s=20), client, warmup_s=0.0, duration_s=2.0))
    while len(client.sent) < len(poisson_schedule(20, 2.0, seed=1)):
        await asyncio.sleep(0)
    done.set()
    assert all(sample.answer for sample in (await running).samples)


async def test_a_closed_loop_keeps_so_many_requests_in_flight() -> None:
    gate, in_flight, most = asyncio.Semaphore(0), 0, 0

    async def wait() -> None:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await gate.acquire()
        in_flight -= 1

    client = FakeClient(lambda _: wait())
    running = asyncio.create_task(run_on(FakeClock(), ClosedLoad(clients=3, max_requests=10), client))
    for number in range(10):
        while in_flight < min(3, 10 - number):
            await asyncio.sleep(0)
        gate.release()
    trace = await running
    assert (most, len(trace.samples)) == (3, 10)


async def test_a_closed_loop_ends_with_its_time() -> None:
    clock = FakeClock()

    def behave(number: int) -> None:
        clock.now_s += 0.25

    trace = await run_on(clock, ClosedLoad(clients=1), FakeClient(behave), warmup_s=0.5, duration_s=1.0)
    assert [sample.sent_s for sample in trace.samples] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    assert summarize(trace.samples, plan(ClosedLoad(clients=1), warmup_s=0.5, duration_s=1.0).window, 0.2).p50_s == 0.25


async def test_requests_without_an_answer_are_given_up_when_the_drain_is_over() -> None:
    forever = asyncio.Event()
    client = FakeClient(lambda number: forever.wait() if number % 2 else None)
    load = ClosedLoad(clients=4, max_requests=4)
    trace = await run_on(FakeClock(), load, client, warmup_s=0.0, duration_s=0.0001, drain_s=0.0)
    assert sorted(sample.error or "none" for sample in trace.samples) == ["none", "none", UNANSWERED, UNANSWERED]


async def test_errors_are_recorded_by_kind() -> None:
    def behave(number: int) -> None:
        if number == 1:
            raise RequestFailedError("HTTP 429")

    trace = await run_on(FakeClock(), ClosedLoad(clients=1, max_requests=3), FakeClient(behave))
    assert [sample.error for sample in trace.samples] == [None, "HTTP 429", None]
    assert trace.samples[1].answer is None


async def test_a_fault_of_the_generator_is_not_a_servers() -> None:
    def behave(number: int) -> None:
        raise KeyError("a fault")

    with pytest.raises(KeyError, match="a fault"):
        await run_on(FakeClock(), ClosedLoad(clients=2, max_requests=3), FakeClient(behave))


async def test_nothing_is_sent_where_nothing_is_due() -> None:
    trace = await run_on(FakeClock(), OpenLoad(rate_per_s=0.001), FakeClient(), warmup_s=0.0, duration_s=0.001)
    assert trace.samples == ()


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_load_on_a_server_of_ours(streamed: bool) -> None:
    with running_server() as server:
        load = ClosedLoad(clients=3, max_requests=30)
        trace = await generate(Plan(wire="grpc", target=server.address, texts=TEXTS, load=load, streamed=streamed))
    assert len(trace.samples) == 30
    assert {(sample.text, sample.answer) for sample in trace.samples} == {(i, text.upper()) for i, text in enumerate(TEXTS)}
    for sample in trace.samples:
        assert (sample.first_token_s is not None) == streamed
        assert sample.sent_s <= (sample.first_token_s or sample.sent_s) <= sample.ended_s


async def test_a_servers_refusal_is_an_error_by_its_status() -> None:
    with running_server(ScriptedEngine(hold)) as server:
        load = ClosedLoad(clients=1, max_requests=1)
        trace = await generate(Plan(wire="grpc", target=server.address, texts=TEXTS, load=load, timeout_s=0.01))
    assert [sample.error for sample in trace.samples] == ["DEADLINE_EXCEEDED"]


@pytest.mark.slow
def test_load_from_a_process_of_its_own() -> None:
    with running_server() as ours:
        load = OpenLoad(rate_per_s=200)
        trace = generate_apart(
            Plan(wire="grpc", target=ours.address, texts=TEXTS, load=load, warmup_s=0.0, duration_s=0.2, beam_size=2)
        )
        assert len(trace.samples) == len(poisson_schedule(200, 0.2, seed=1))
        assert {sample.error for sample in trace.samples} == {None}
        assert trace.cpu_s > 0
        assert trace.elapsed_s >= max(sample.ended_s for sample in trace.samples)
    with fake_peer() as peer:
        load_closed = ClosedLoad(clients=2, max_requests=20)
        trace = generate_apart(Plan(wire="http", target=peer.target, texts=TEXTS, load=load_closed))
        assert {sample.answer for sample in trace.samples} == {text.upper() for text in TEXTS}


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the load generator failed"):
        generate_apart(plan(ClosedLoad(clients=1)))
