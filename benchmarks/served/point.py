"""One point of the experiment: a load on one server, and everything that is recorded of it.

Knows servers, the generator's process and the machine's accounts of CPU time and memory; does not know which points make an
experiment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.sentences import bleu_scorer
from benchmarks.served.generator import ClosedLoad, OpenLoad, Plan, generate_apart
from benchmarks.served.ladder import RateResult
from benchmarks.served.points import first_answers, summarize, texts_with_several_answers
from benchmarks.served.processes import Usage, usage
from benchmarks.served.servers import Server


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPoint:
    """What one load did to one server; the record of this experiment."""

    model: str
    server: str
    # The server's settings.
    settings: str
    beam_size: int
    # Answers were streamed; otherwise the whole text came at once.
    streamed: bool = False
    # Closed loop; None in the open loop.
    clients: int | None = None
    # Open loop: offered requests a second; None in the closed loop.
    rate_per_s: float | None = None
    # Counted, warm-up and drain left out.
    seconds: float
    requests: int
    errors: Mapping[str, int] = field(default_factory=dict)
    throughput_per_s: float
    # Answers within limit_s.
    goodput_per_s: float
    limit_s: float
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    # Streamed: seen by the client, its median. Otherwise by the server's own account, arrival to first token, the mean of the
    # run; None of a server that counts no tokens: its first one comes with the whole answer.
    first_token_s: float | None
    first_token_p95_s: float | None = None
    # Rows of a decoder step (onnxlate), texts of a batch (peers): the mean of the run.
    mean_batch: float | None
    # Of the server's processes, the whole run over all of its answers.
    cpu_s_per_sentence: float | None
    # Of the server's processes at the end of the run; shared pages count once.
    memory_bytes: int
    # The generator's CPU time per request, and by how much it was late, at the 95th percentile.
    generator_cpu_s_per_request: float
    generator_late_p95_s: float | None
    # CPUs that the idle servers used meanwhile.
    idle_cpus: float = 0.0
    # Of the first answer to every text, against the references.
    bleu: float | None = None
    # Texts answered, and those of them that were answered differently at different times.
    texts: int = 0
    texts_with_several_answers: int = 0

    @property
    def error_share(self) -> float:
        """Failed requests among all."""
        return sum(self.errors.values()) / self.requests if self.requests else 0.0

    @property
    def as_rate(self) -> RateResult:
        """What the search for the highest good rate is told; of an open loop alone."""
        assert self.rate_per_s is not None, "a closed loop has no rate"
        return RateResult(
            rate_per_s=self.rate_per_s,
            throughput_per_s=self.throughput_per_s,
            goodput_per_s=self.goodput_per_s,
            p95_s=self.p95_s,
            error_share=self.error_share,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What is sent."""

    texts: tuple[str, ...]
    # In the order of the texts; empty where there are none.
    references: tuple[str, ...] = ()

    def bleu(self, answers: Mapping[int, str]) -> float | None:
        """Of answers by their text's index; None without references or answers.

        Raises:
            ImportError: there are both, and sacrebleu is not installed.
        """
        if not self.references or not answers:
            return None
        return bleu_scorer()(list(answers.values()), [self.references[text] for text in answers])


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """How long a point takes."""

    warmup_s: float
    duration_s: float
    drain_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Everything that the points of one experiment have in common."""

    model: str
    corpus: Corpus
    # Of good answers.
    limit_s: float = 0.2
    seed: int = 1

    def measure(
        self,
        server: Server,
        load: ClosedLoad | OpenLoad,
        times: Times,
        *,
        beam_size: int,
        streamed: bool = False,
        idle: Sequence[Server] = (),
    ) -> LoadPoint:
        """Load one server.

        CPU time and counters are of the whole run, warm-up included, as are the answers that they are divided by.

        Args:
            server: started.
            load: what to send.
            times: how long.
            beam_size: of the server's answers.
            streamed: use the streaming method; gRPC and greedy only.
            idle: the other servers that are up; what they use meanwhile is recorded.
        """
        plan = Plan(
            wire=server.wire,
            target=server.target,
            texts=self.corpus.texts,
            load=load,
            beam_size=beam_size,
            streamed=streamed,
            warmup_s=times.warmup_s,
            duration_s=times.duration_s,
            drain_s=times.drain_s,
            seed=self.seed,
        )
        counted = server.counters()
        idle_before = [usage(other.pid) for other in idle]
        before = usage(server.pid)
        trace = generate_apart(plan)
        after = usage(server.pid)
        idle_s = sum((usage(other.pid).cpu_s - then.cpu_s for other, then in zip(idle, idle_before, strict=True)), 0.0)
        happened = server.counters().since(counted)
        summary = summarize(trace.samples, plan.window, self.limit_s)
        answers = first_answers(trace.samples)
        return LoadPoint(
            model=self.model,
            server=server.name,
            settings=str(server.knobs),
            beam_size=beam_size,
            streamed=streamed,
            clients=load.clients if isinstance(load, ClosedLoad) else None,
            rate_per_s=load.rate_per_s if isinstance(load, OpenLoad) else None,
            seconds=plan.window.length_s,
            requests=summary.requests,
            errors=summary.errors,
            throughput_per_s=summary.throughput_per_s,
            goodput_per_s=summary.goodput_per_s,
            limit_s=self.limit_s,
            p50_s=summary.p50_s,
            p95_s=summary.p95_s,
            p99_s=summary.p99_s,
            first_token_s=summary.first_token_p50_s if streamed else happened.mean_first_token_s,
            first_token_p95_s=summary.first_token_p95_s,
            mean_batch=happened.mean_batch,
            cpu_s_per_sentence=_share(before, after, sum(sample.answer is not None for sample in trace.samples)),
            memory_bytes=after.memory_bytes,
            generator_cpu_s_per_request=trace.cpu_s / max(1, len(trace.samples)),
            generator_late_p95_s=summary.late_p95_s,
            idle_cpus=idle_s / trace.elapsed_s,
            bleu=self.corpus.bleu(answers),
            texts=len(answers),
            texts_with_several_answers=texts_with_several_answers(trace.samples),
        )


def _share(before: Usage, after: Usage, answers: int) -> float | None:
    return (after.cpu_s - before.cpu_s) / answers if answers else None


def load_name(load: ClosedLoad | OpenLoad, *, streamed: bool) -> str:
    """A load as it is told."""
    if isinstance(load, OpenLoad):
        return f"{load.rate_per_s:g}/s offered"
    return f"{load.clients} clients{', streamed' if streamed else ''}"


def line_on(point: LoadPoint) -> str:
    """A point in one line, as it is told while the experiment runs."""
    if point.rate_per_s is None:
        assert point.clients is not None, "neither a closed nor an open loop"
        load = load_name(ClosedLoad(clients=point.clients), streamed=point.streamed)
    else:
        load = load_name(OpenLoad(rate_per_s=point.rate_per_s), streamed=point.streamed)
    p50, p95 = (f"{1e3 * value:.0f} ms" if value is not None else "none" for value in (point.p50_s, point.p95_s))
    errors = f", errors {dict(point.errors)}" if point.errors else ""
    return (
        f"{point.server} beam {point.beam_size}, {load}: {point.throughput_per_s:.1f}/s, "
        f"good {point.goodput_per_s:.1f}/s, p50 {p50}, p95 {p95}{errors}"
    )
