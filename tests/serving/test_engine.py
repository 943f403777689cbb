"""The engine on real graphs of a tiny random model: what it decodes, beside whom, and what happens when things go wrong."""

from __future__ import annotations

import dataclasses
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from serving.bundle import Bundle
from serving.config import EngineConfig
from serving.engine import Engine
from serving.errors import DeadlineExceededError, EngineError, RequestCancelledError, ShuttingDownError
from serving.kv_cache import LaneCache
from serving.lane import Lane
from serving.observer import NullObserver
from serving.request import DecodingOptions, FinishReason, Hypothesis, Outcome, Sampling, Sequence
from serving.runtime import LaneDecoder, ModelSession, open_session, pad_sources
from serving.runtime.host import HostModelSession
from serving.scheduler import Admission, Scheduler

TIMEOUT_S = 60.0
FAR_AWAY_S = 1e9


class Waiter:
    """Collects outcomes of sequences it made."""

    def __init__(self) -> None:
        self._outcomes: queue.Queue[tuple[Sequence, Outcome]] = queue.Queue()

    def sequence(
        self,
        source_ids: tuple[int, ...],
        options: DecodingOptions,
        *,
        expires_at_s: float = FAR_AWAY_S,
        on_token: Callable[[int], None] | None = None,
    ) -> Sequence:
        made = Sequence(
            source_ids=source_ids,
            options=options,
            arrived_at_s=time.monotonic(),
            expires_at_s=expires_at_s,
            on_outcome=lambda outcome: self._outcomes.put((made, outcome)),
            on_token=on_token,
        )
        return made

    def next(self) -> tuple[Sequence, Outcome]:
        return self._outcomes.get(timeout=TIMEOUT_S)

    def wait(self, sequences: list[Sequence]) -> list[Outcome]:
        """The outcomes of these, in their order; any other outcome is a failure."""
        got = dict(self.next() for _ in sequences)
        assert self._outcomes.empty()
        return [got[sequence] for sequence in sequences]


@pytest.fixture
def engine(tiny_bundle: Bundle) -> Iterator[Engine]:
    engine = Engine(tiny_bundle, EngineConfig(threads=2, max_rows_per_worker=16, encoder_batch_tokens=64))
    engine.start()
    yield engine
    engine.close()


def translate(engine: Engine, work: list[tuple[tuple[int, ...], DecodingOptions]]) -> list[Outcome]:
    waiter = Waiter()
    sequences = [waiter.sequence(*one) for one in work]
    engine.submit(sequences)
    return waiter.wait(sequences)


def random_work(count: int, seed: int) -> list[tuple[tuple[int, ...], DecodingOptions]]:
    """Sources of 1 to 70 tokens, each with its own options."""
    rng = random.Random(seed)
    work = []
    for _ in range(count):
        ids = (*(rng.randrange(4, 64) for _ in range(rng.choice([1, 3, 5, 8, 12, 30, 31, 70]))), 3)
        beam = rng.choice([1, 1, 1, 2, 3, 4])
        least = rng.choice([0, 0, 4])
        options = DecodingOptions(
            beam_size=beam,
            num_hypotheses=rng.randint(1, beam),
            length_penalty=rng.choice([0.0, 0.6, 1.0, 2.0]),
            min_target_tokens=least,
            max_target_tokens=least + rng.choice([1, 7, 20, 80]),
        )
        work.append((ids, options))
    return work


def test_answers_do_not_depend_on_neighbours_in_any_bit(engine: Engine) -> None:
    work = random_work(60, seed=1)
    alone = [translate(engine, [one])[0].hypotheses for one in work]
    together = [outcome.hypotheses for outcome in translate(engine, work)]
    order = list(range(len(work)))
    random.Random(2).shuffle(order)
    shuffled = translate(engine, [work[i] for i in order])
    # Scores are compared as they are: equal floats, not close ones.
    assert together == alone
    assert [outcome.hypotheses for outcome in shuffled] == [alone[i] for i in order]


def test_answers_do_not_depend_on_the_size_of_the_engine(tiny_bundle: Bundle) -> None:
    work = random_work(30, seed=3)
    answers = []
    for config in (
        EngineConfig(threads=1, max_rows_per_worker=4, encoder_batch_tokens=1),
        EngineConfig(threads=3, max_rows_per_worker=64, encoder_batch_tokens=4096),
        EngineConfig(threads=3, threads_when_alone=1, max_rows_per_worker=64, encoder_batch_tokens=4096),
        EngineConfig(threads=1, threads_when_alone=3, max_rows_per_worker=4, encoder_batch_tokens=1),
    ):
        engine = Engine(tiny_bundle, config)
        engine.start()
        answers.append([outcome.hypotheses for outcome in translate(engine, work)])
        engine.close()
    assert answers[0] == answers[1] == answers[2] == answers[3]


@pytest.mark.parametrize(
    ("options", "workers", "lone_threads"),
    [
        ({"threads": 4}, 4, 4),
        ({"threads": 4, "threads_when_alone": 1}, 4, 1),
        ({"threads": 1, "threads_when_alone": 3}, 1, 3),
        ({"threads": 8, "device": "cuda"}, 1, 1),
    ],
)
def test_a_worker_for_each_thread_and_all_threads_for_a_lone_one(
    options: dict[str, Any], workers: int, lone_threads: int
) -> None:
    config = EngineConfig(**options)
    assert (config.num_workers, config.lone_threads) == (workers, lone_threads)


UNRULED: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "suppressed": (),
    "target_prefix": (),
    "hidden_prefix_tokens": 0,
    "sampling": None,
}
RULED = [
    DecodingOptions(max_target_tokens=20, repetition_penalty=1.7),
    DecodingOptions(max_target_tokens=20, no_repeat_ngram_size=2, return_scores=False),
    DecodingOptions(max_target_tokens=20, suppressed=((9,), (5, 5))),
    DecodingOptions(max_target_tokens=20, target_prefix=(40, 41), hidden_prefix_tokens=1),
    DecodingOptions(max_target_tokens=20, sampling=Sampling(seed=3, top_k=8)),
    DecodingOptions(beam_size=3, num_hypotheses=3, max_target_tokens=20, no_repeat_ngram_size=2),
    DecodingOptions(beam_size=3, num_hypotheses=2, max_target_tokens=20, target_prefix=(40,), early_stopping=True),
]


def test_what_some_ask_of_single_tokens_changes_nobody_elses_answer(engine: Engine) -> None:
    sources = [ids for ids, _ in random_work(len(RULED), seed=8)]
    ruled = list(zip(sources, RULED, strict=True))
    plain = random_work(20, seed=9)
    work = [*plain[:10], *ruled, *plain[10:]]
    alone = [translate(engine, [one])[0].hypotheses for one in work]
    assert [outcome.hypotheses for outcome in translate(engine, work)] == alone
    unruled = [translate(engine, [(ids, dataclasses.replace(options, **UNRULED))])[0].hypotheses for ids, options in ruled]
    changed = [a[0].target_ids != b[0].target_ids for a, b in zip(alone[10 : 10 + len(ruled)], unruled, strict=True)]
    assert all(changed), "each option does something here"


def test_scores_that_nobody_asked_for_cost_nothing_and_change_no_token(engine: Engine) -> None:
    work = random_work(30, seed=10)
    scored = translate(engine, work)
    silent = translate(engine, [(ids, dataclasses.replace(options, return_scores=False)) for ids, options in work])
    mixed = translate(
        engine, [(ids, dataclasses.replace(options, return_scores=i % 2 == 0)) for i, (ids, options) in enumerate(work)]
    )
    for i, (a, b, c) in enumerate(zip(scored, silent, mixed, strict=True)):
        assert [replace_score(h) for h in a.hypotheses] == list(b.hypotheses)
        assert list(c.hypotheses) == list(a.hypotheses if i % 2 == 0 else b.hypotheses)


def replace_score(hypothesis: Hypothesis) -> Hypothesis:
    return dataclasses.replace(hypothesis, score=None)


def plain_greedy(session: ModelSession, source_ids: tuple[int, ...], options: DecodingOptions) -> Hypothesis:
    """Greedy decoding written out over the session, one source, nothing shared with the engine but the graphs."""
    ids, lengths = pad_sources([source_ids], session.pad_id)
    encoded = session.encode(ids, lengths)
    cache = LaneCache(session.geometry, num_slots=1, width=1, target_capacity=200, source_capacity=len(source_ids))
    cache.write_source(0, encoded[0], len(source_ids))
    target_ids, positions = np.full((1, 1), session.decoder_start_id), np.zeros((1, 1), np.int32)
    decoder = session.bind(cache, target_ids, positions, 2)
    tokens: list[int] = []
    score = 0.0
    while True:
        stepped = decoder.step(1, int(positions.max()) + 1)
        candidate_ids, log_probs = stepped.candidate_ids, stepped.candidate_log_probs
        choice = int(candidate_ids[0, 0, 0] == session.eos_id and len(tokens) < options.min_target_tokens)
        token = int(candidate_ids[0, 0, choice])
        score += float(log_probs[0, 0, choice])
        tokens.append(token)
        ended = token == session.eos_id
        if ended or len(tokens) == options.max_target_tokens:
            return Hypothesis(
                target_ids=tuple(tokens[:-1] if ended else tokens),
                score=score / len(tokens) ** options.length_penalty,
                finish_reason=FinishReason.EOS if ended else FinishReason.LENGTH,
                target_tokens=len(tokens),
            )
        target_ids[...] = token
        positions += 1


def test_greedy_equals_a_plain_loop(engine: Engine, tiny_bundle: Bundle) -> None:
    session = open_session(tiny_bundle)
    work = [(ids, o) for ids, o in random_work(40, seed=5) if o.beam_size == 1]
    for (ids, options), outcome in zip(work, translate(engine, work), strict=True):
        assert outcome.hypotheses == (plain_greedy(session, ids, options),)


def given(target: tuple[int, ...], prefix: tuple[int, ...] = ()) -> DecodingOptions:
    """As a target is scored after a prefix that is the model's own."""
    return DecodingOptions(
        length_penalty=0.0,
        max_target_tokens=len(prefix) + len(target) + 1,
        return_token_scores=True,
        target_prefix=prefix,
        hidden_prefix_tokens=len(prefix),
        given_target=(*target, 3),
    )


def given_work(count: int, seed: int) -> list[tuple[tuple[int, ...], DecodingOptions]]:
    rng = random.Random(seed)
    lengths = [0, 1, 4, 9, 20, 70]
    targets = [tuple(rng.randrange(4, 64) for _ in range(rng.choice(lengths))) for _ in range(count)]
    sources = [ids for ids, _ in random_work(count, seed)]
    return [(ids, given(target, (40,) * (i % 2))) for i, (ids, target) in enumerate(zip(sources, targets, strict=True))]


def test_targets_that_are_given_are_scored_alike_alone_and_among_any_neighbours(engine: Engine) -> None:
    asked, others = given_work(30, seed=11), random_work(20, seed=12)
    others += list(zip([ids for ids, _ in others], RULED, strict=False))
    work = [*asked, *others]
    alone = [translate(engine, [one])[0].hypotheses for one in work]
    random.Random(13).shuffle(order := list(range(len(work))))
    assert [outcome.hypotheses for outcome in translate(engine, [work[i] for i in order])] == [alone[i] for i in order]


def teacher_forced(session: ModelSession, source_ids: tuple[int, ...], options: DecodingOptions) -> list[float]:
    """Log-probabilities of a given target off the decoder's logits alone, one source, nothing shared but the graphs."""
    ids, lengths = pad_sources([source_ids], session.pad_id)
    cache = LaneCache(session.geometry, num_slots=1, width=1, target_capacity=200, source_capacity=len(source_ids))
    cache.write_source(0, session.encode(ids, lengths)[0], len(source_ids))
    target_ids, positions = np.full((1, 1), session.decoder_start_id), np.zeros((1, 1), np.int32)
    decoder = session.bind(cache, target_ids, positions, 2)
    log_probs = []
    for token in (*options.target_prefix, *options.given_target):
        logits = decoder.step(1, int(positions.max()) + 1, logits_wanted=True).logits
        assert logits is not None
        row = logits[0, 0].astype(np.float64)
        log_probs.append(float(row[token] - row.max() - np.log(np.exp(row - row.max()).sum())))
        target_ids[...] = token
        positions += 1
    return log_probs[len(options.target_prefix) :]


def test_scores_of_a_given_target_are_the_graphs_own(engine: Engine, tiny_bundle: Bundle) -> None:
    session, work = open_session(tiny_bundle), given_work(30, seed=14)
    for (ids, options), outcome in zip(work, translate(engine, work), strict=True):
        (hypothesis,) = outcome.hypotheses
        assert (*hypothesis.target_ids, 3) == options.given_target
        assert hypothesis.token_scores == pytest.approx(teacher_forced(session, ids, options), abs=1e-5)
        assert hypothesis.score == pytest.approx(sum(hypothesis.token_scores or ()), rel=1e-12)
        assert outcome.timings.steps == len(options.target_prefix) + len(options.given_target)


def test_what_was_decoded_greedily_is_scored_as_it_was_then(engine: Engine) -> None:
    decoding = DecodingOptions(max_target_tokens=30, return_token_scores=True)
    sources = [ids for ids, _ in random_work(20, seed=15)]
    decoded = [outcome.hypotheses[0] for outcome in translate(engine, [(ids, decoding) for ids in sources])]
    scored = translate(engine, [(ids, given(one.target_ids)) for ids, one in zip(sources, decoded, strict=True)])
    for one, outcome in zip(decoded, scored, strict=True):
        (again,) = outcome.hypotheses
        # The random model does not end its sentences.
        assert one.finish_reason is FinishReason.LENGTH
        assert (again.target_ids, (again.token_scores or ())[:-1]) == (one.target_ids, one.token_scores)


def test_targets_longer_than_the_first_cache(engine: Engine) -> None:
    options = DecodingOptions(beam_size=3, num_hypotheses=3, min_target_tokens=150, max_target_tokens=200)
    (outcome,) = translate(engine, [((5, 6, 7, 3), options)])
    assert all(150 <= len(h.target_ids) <= 200 for h in outcome.hypotheses)


def test_timings_and_counts(engine: Engine) -> None:
    options = DecodingOptions(min_target_tokens=5, max_target_tokens=5)
    outcomes = translate(engine, [((5, 6, 7, 3), options)] * 4)
    for outcome in outcomes:
        timings = outcome.timings
        assert timings.steps == outcome.hypotheses[0].target_tokens == 5
        assert 1 <= timings.mean_rows_per_step <= 4
        assert min(timings.queue_s, timings.encode_s, timings.decode_s) > 0


@pytest.mark.parametrize("beam_size", [1, 3])
def test_tokens_are_streamed_as_they_are_decided(engine: Engine, beam_size: int) -> None:
    tokens: list[int] = []
    waiter = Waiter()
    options = DecodingOptions(
        beam_size=beam_size, min_target_tokens=6, max_target_tokens=9, target_prefix=(7, 8), hidden_prefix_tokens=1
    )
    sequence = waiter.sequence((5, 6, 7, 3), options, on_token=tokens.append)
    engine.submit([sequence])
    (hypothesis,) = waiter.wait([sequence])[0].hypotheses
    assert tuple(tokens) == hypothesis.target_ids
    assert tokens[0] == 8


class Gate:
    """Stops every decoder step until it is opened, so that a test acts in the middle of a decode."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self._open = threading.Semaphore(0), threading.Semaphore(0)
        step = LaneDecoder.step

        def gated(decoder: LaneDecoder, *args: Any, **options: Any) -> object:
            self.reached.release()
            assert self._open.acquire(timeout=TIMEOUT_S)
            return step(decoder, *args, **options)

        monkeypatch.setattr(LaneDecoder, "step", gated)

    def wait_for_step(self) -> None:
        assert self.reached.acquire(timeout=TIMEOUT_S)

    def let_steps_pass(self, count: int = 1) -> None:
        self._open.release(count)


LONG = DecodingOptions(min_target_tokens=100, max_target_tokens=120)


@pytest.fixture
def one_worker(tiny_bundle: Bundle) -> Iterator[Engine]:
    engine = Engine(tiny_bundle, EngineConfig(threads=1, max_rows_per_worker=4, encoder_batch_tokens=64))
    engine.start()
    yield engine
    engine.close()


def test_a_cancelled_sequence_leaves_at_the_next_step_and_others_go_on(
    one_worker: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = translate(one_worker, [((9, 8, 3), LONG)])[0].hypotheses
    gate, waiter = Gate(monkeypatch), Waiter()
    leaving, staying = waiter.sequence((5, 6, 7, 3), LONG), waiter.sequence((9, 8, 3), LONG)
    one_worker.submit([leaving, staying])
    for _ in range(3):
        gate.wait_for_step()
        gate.let_steps_pass()
    gate.wait_for_step()
    one_worker.cancel([leaving])
    gate.let_steps_pass()
    sequence, outcome = waiter.next()
    assert sequence is leaving
    assert isinstance(outcome.error, RequestCancelledError)
    assert outcome.timings.steps == 4
    gate.let_steps_pass(1000)
    sequence, outcome = waiter.next()
    assert sequence is staying
    assert outcome.hypotheses == alone


def test_a_worker_asks_the_scheduler_only_when_there_is_something_to_say(
    one_worker: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Admission] = []
    take = Scheduler.take

    def counted(scheduler: Scheduler, worker: int, now_s: float) -> Admission:
        taken.append(take(scheduler, worker, now_s))
        return taken[-1]

    monkeypatch.setattr(Scheduler, "take", counted)
    gate, waiter = Gate(monkeypatch), Waiter()
    leaving, staying = waiter.sequence((5, 6, 7, 3), LONG), waiter.sequence((9, 8, 3), LONG)
    one_worker.submit([leaving, staying])
    for _ in range(5):
        gate.wait_for_step()
        assert [admission.admitted for admission in taken] == [[leaving, staying]]
        gate.let_steps_pass()
    gate.wait_for_step()
    one_worker.cancel([leaving])
    gate.let_steps_pass(1000)
    assert waiter.next()[0] is leaving
    assert waiter.next()[0] is staying
    assert [admission.cancelled_some for admission in taken[:2]] == [False, True]
    assert len(taken) == 2


def test_an_expired_sequence_frees_its_rows_for_the_next_in_the_queue(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    engine = Engine(tiny_bundle, EngineConfig(threads=1, max_rows_per_worker=1), clock=lambda: now[0])
    gate, waiter = Gate(monkeypatch), Waiter()
    engine.start()
    expiring = waiter.sequence((5, 6, 3), LONG, expires_at_s=1.0)
    following = waiter.sequence((5, 6, 3), DecodingOptions(max_target_tokens=1))
    engine.submit([expiring])
    engine.submit([following])
    gate.wait_for_step()
    now[0] = 2.0
    gate.let_steps_pass(1000)
    sequence, outcome = waiter.next()
    assert sequence is expiring
    assert isinstance(outcome.error, DeadlineExceededError)
    assert waiter.next()[0] is following
    engine.close()


def test_sequences_of_one_lane_expire_one_after_another(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    engine = Engine(tiny_bundle, EngineConfig(threads=1, max_rows_per_worker=4), clock=lambda: now[0])
    gate, waiter = Gate(monkeypatch), Waiter()
    engine.start()
    later, first, never = (waiter.sequence((5, 6, 3), LONG, expires_at_s=at) for at in (3.0, 1.0, FAR_AWAY_S))
    engine.submit([later, first, never])
    for expired, at in ((first, 2.0), (later, 4.0)):
        gate.wait_for_step()
        now[0] = at
        gate.let_steps_pass(2)
        sequence, outcome = waiter.next()
        assert sequence is expired
        assert isinstance(outcome.error, DeadlineExceededError)
    gate.let_steps_pass(1000)
    sequence, outcome = waiter.next()
    assert sequence is never
    assert outcome.error is None
    engine.close()


def test_a_failing_step_fails_its_lane_and_nothing_else(one_worker: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    work = ((5, 6, 7, 3), DecodingOptions(max_target_tokens=3))
    before = translate(one_worker, [work])[0].hypotheses
    step = LaneDecoder.step
    failures = iter([True])

    def failing(decoder: LaneDecoder, *args: Any, **options: Any) -> object:
        if next(failures, False):
            raise EngineError("a graph failed: out of memory")
        return step(decoder, *args, **options)

    monkeypatch.setattr(LaneDecoder, "step", failing)
    failed, again = translate(one_worker, [work])[0], translate(one_worker, [work])[0]
    assert isinstance(failed.error, EngineError)
    assert again.hypotheses == before


def test_a_failing_encoder_fails_its_batch_and_nothing_else(one_worker: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    work = ((5, 6, 7, 3), DecodingOptions(max_target_tokens=3))
    with monkeypatch.context() as patched:
        patched.setattr(HostModelSession, "encode", lambda *_, **__: 1 / 0)
        failed = translate(one_worker, [work])[0]
    assert isinstance(failed.error, EngineError)
    assert translate(one_worker, [work])[0].hypotheses
    assert one_worker.wait_idle(TIMEOUT_S)


def test_what_nobody_foresaw_loses_no_sequence_and_no_worker(one_worker: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    work = ((5, 6, 7, 3), DecodingOptions(max_target_tokens=3))
    for place in ("add", "step"):
        with monkeypatch.context() as patched:
            patched.setattr(Lane, place, lambda *_: 1 / 0)
            waiter = Waiter()
            sequences = [waiter.sequence(*work) for _ in range(3)]
            one_worker.submit(sequences)
            assert {type(outcome.error) for outcome in waiter.wait(sequences)} == {EngineError}
        assert translate(one_worker, [work])[0].hypotheses
    assert one_worker.wait_idle(TIMEOUT_S)


def test_a_caller_that_raises_does_not_stop_the_worker(one_worker: Engine) -> None:
    def raising(_: Outcome) -> None:
        raise RuntimeError("the caller's own fault")

    bad = Sequence(
        source_ids=(5, 3),
        options=DecodingOptions(max_target_tokens=2),
        arrived_at_s=0,
        expires_at_s=FAR_AWAY_S,
        on_outcome=raising,
    )
    one_worker.submit([bad])
    assert translate(one_worker, [((5, 3), DecodingOptions(max_target_tokens=2))])[0].hypotheses


def test_draining_finishes_what_was_admitted(one_worker: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, waiter = Gate(monkeypatch), Waiter()
    sequences = [waiter.sequence((5, 6, 3), DecodingOptions(max_target_tokens=4)) for _ in range(6)]
    one_worker.submit(sequences)
    gate.wait_for_step()
    one_worker.drain()
    with pytest.raises(ShuttingDownError):
        one_worker.submit([waiter.sequence((5, 3), LONG)])
    assert not one_worker.wait_idle(0)
    gate.let_steps_pass(1000)
    assert all(outcome.hypotheses for outcome in waiter.wait(sequences))
    assert one_worker.wait_idle(TIMEOUT_S)


def test_closing_tells_everybody(one_worker: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, waiter = Gate(monkeypatch), Waiter()
    sequences = [waiter.sequence((5, 6, 3), LONG) for _ in range(9)]
    one_worker.submit(sequences)
    gate.wait_for_step()
    closing = threading.Thread(target=one_worker.close)
    closing.start()
    while True:  # closing has begun once nothing more is admitted; the worker is still in its step
        try:
            one_worker.check_room(1)
        except ShuttingDownError:
            break
    gate.let_steps_pass()
    closing.join(TIMEOUT_S)
    assert {type(outcome.error) for outcome in waiter.wait(sequences)} == {ShuttingDownError}


def test_closing_an_engine_that_never_started(tiny_bundle: Bundle) -> None:
    engine, waiter = Engine(tiny_bundle, EngineConfig(threads=1)), Waiter()
    sequence = waiter.sequence((5, 3), LONG)
    engine.submit([sequence])
    engine.close()
    assert isinstance(waiter.wait([sequence])[0].error, ShuttingDownError)


class Recorder(NullObserver):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.in_use: list[int] = []
        self.reasons: list[str] = []
        self.first_tokens = 0

    def stepped(self, seconds: float, rows: int) -> None:
        self.rows.append(rows)

    def rows_in_use(self, worker: int, rows: int) -> None:
        self.in_use.append(rows)

    def finished(self, reason: str, target_tokens: int, queue_seconds: float) -> None:
        self.reasons.append(reason)

    def first_token(self, seconds_since_arrival: float) -> None:
        self.first_tokens += 1


@pytest.mark.parametrize("alone", [False, True])
def test_every_cache_that_the_graph_returns_is_bound_to_the_memory_it_came_in(tiny_bundle: Bundle, alone: bool) -> None:
    """One that is not would be copied whole in each step."""

    class Binding:
        def __init__(self) -> None:
            self.inputs: dict[str, int] = {}
            self.outputs: dict[str, int] = {}

        def bind_ortvalue_input(self, name: str, value: Any) -> None:
            self.inputs[name] = value.data_ptr()

        def bind_ortvalue_output(self, name: str, value: Any) -> None:
            self.outputs[name] = value.data_ptr()

    session = HostModelSession(tiny_bundle, threads=1, lone_threads=2)
    graph = (session._lone if alone else session._shared).decoder
    cache = session.make_cache(num_slots=3, width=2, target_capacity=16, source_capacity=8)
    decoder = session.bind(cache, np.zeros((3, 2), np.int64), np.zeros((3, 2), np.int32), 5)
    decoder._bind_memory(binding := Binding(), 2, graph)
    returned = {output.name for output in graph.get_outputs() if "_cache_" in output.name}
    assert set(binding.outputs) == returned
    assert {name.partition("_cache_")[0] for name in returned} == {"self", "cross"}
    for name, address in binding.outputs.items():
        kind, _, rest = name.partition("_cache_")
        assert address == binding.inputs[f"{kind}_cache.{rest.partition('.')[2]}"]


def test_rows_join_and_leave_between_steps(tiny_bundle: Bundle) -> None:
    """Six sources through four rows: the fifth joins as soon as the first one leaves, in the middle of the others."""
    recorder = Recorder()
    engine = Engine(tiny_bundle, EngineConfig(threads=1, max_rows_per_worker=4), recorder)
    waiter = Waiter()
    lengths = [2, 6, 6, 6, 4, 4]
    sequences = [waiter.sequence((5, 6, 3), DecodingOptions(min_target_tokens=n, max_target_tokens=n)) for n in lengths]
    engine.submit(sequences)
    engine.start()
    waiter.wait(sequences)
    engine.close()
    assert recorder.rows == [4, 4, 4, 4, 4, 4, 1, 1, 1, 1]
    assert max(recorder.in_use) == 4
    assert recorder.in_use[-1] == 0
    assert len(recorder.reasons) == recorder.first_tokens == 6


def test_memory_of_lanes_that_nobody_uses_is_given_back(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Lane] = []
    make = Lane.__init__

    def counted(lane: Lane, *args: object, **kwargs: object) -> None:
        made.append(lane)
        make(lane, *args, **kwargs)  # type: ignore[arg-type]  # whatever the engine hands in

    monkeypatch.setattr(Lane, "__init__", counted)
    engine = Engine(tiny_bundle, EngineConfig(threads=1, max_rows_per_worker=16))
    engine.start()
    for beam in range(1, 11):
        translate(engine, [((5, 3), DecodingOptions(beam_size=beam, max_target_tokens=2))])
    assert engine.wait_idle(TIMEOUT_S)
    assert len(made) == 10
    assert sum(len(worker._lanes) for worker in engine._workers) <= 5
    engine.close()
