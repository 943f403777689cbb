"""Sources of all lengths together: in one lane where a source costs its own length, in lanes by length elsewhere."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.checkpoint import build_model, read_checkpoint
from export.graphs import DecoderStepGraph
from export.onnx_export import export_decoder
from export.pipeline import export_bundle
from serving.bundle import Bundle
from serving.config import EngineConfig
from serving.engine import Engine
from serving.lane import Lane
from serving.request import DecodingOptions, Hypothesis
from serving.runtime.host import HostModelSession
from tests.serving.test_engine import Gate, Waiter, translate
from tests.support import tiny_config, write_tiny_checkpoint
from tests.traces import serialized

Work = list[tuple[tuple[int, ...], DecodingOptions]]

MAX_POSITIONS = 192


@pytest.fixture(scope="module")
def roomy_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that takes sources of up to 192 tokens."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("roomy") / "checkpoint", tiny_config(max_positions=MAX_POSITIONS))


@pytest.fixture(
    scope="module", params=[("fp32", None), ("int8", "constant"), ("int8", "row")], ids=["fp32", "int8", "int8 by row"]
)
def roomy_bundle(request: pytest.FixtureRequest, roomy_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    precision, int8_scales = request.param
    directory = tmp_path_factory.mktemp("roomy") / "bundle"
    return export_bundle(roomy_checkpoint, directory, precision=precision, int8_scales=int8_scales, show_progress=False)


@pytest.fixture(scope="module")
def padded_bundle(roomy_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """In fp32, which runs on a CPU, with a decoder laid out as for CUDA."""
    bundle = export_bundle(roomy_checkpoint, tmp_path_factory.mktemp("roomy") / "padded", show_progress=False)
    model = build_model(read_checkpoint(roomy_checkpoint))
    bundle.decoder_path.write_bytes(serialized(export_decoder(DecoderStepGraph(model, device="cuda"), model.config).every_width))
    return bundle


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> list[Lane]:
    """Every lane that is made."""
    made: list[Lane] = []
    make = Lane.__init__

    def counted(lane: Lane, *args: object, **kwargs: object) -> None:
        made.append(lane)
        make(lane, *args, **kwargs)  # type: ignore[arg-type]  # whatever the engine hands in

    monkeypatch.setattr(Lane, "__init__", counted)
    return made


def source(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(1000 * seed + length)
    return (*(rng.randrange(4, 64) for _ in range(length - 1)), 3)


def mixed_work(seed: int) -> Work:
    """Sources of 5 to 150 tokens, greedy and beams of 3, in random order."""
    rng = random.Random(seed)
    lengths = [5, 6, 9, 17, 31, 32, 33, 48, 63, 64, 65, 90, 127, 128, 129, 150] * 2
    rng.shuffle(lengths)
    return [
        (source(n, seed), DecodingOptions(beam_size=rng.choice([1, 3]), max_target_tokens=rng.choice([4, 12, 20])))
        for n in lengths
    ]


def answers(
    bundle: Bundle, work: Work, *, threads: int = 1, rows: int = 24, batch_tokens: int = 512, one_by_one: bool = False
) -> list[tuple[Hypothesis, ...]]:
    """Of an engine of its own."""
    engine = Engine(bundle, EngineConfig(threads=threads, max_rows_per_worker=rows, encoder_batch_tokens=batch_tokens))
    engine.start()
    try:
        outcomes = [translate(engine, [one])[0] for one in work] if one_by_one else translate(engine, work)
    finally:
        engine.close()
    assert [outcome.error for outcome in outcomes] == [None] * len(work)
    return [outcome.hypotheses for outcome in outcomes]


def alone(bundle: Bundle, work: Work) -> list[tuple[Hypothesis, ...]]:
    """Of an engine for each, so that no lane was ever grown by another."""
    return [answers(bundle, [one])[0] for one in work]


@pytest.mark.parametrize("workers", [1, 2])
def test_mixed_lengths_change_nobodys_answer_in_any_bit(roomy_bundle: Bundle, workers: int) -> None:
    work = mixed_work(seed=workers)
    assert answers(roomy_bundle, work, threads=workers) == alone(roomy_bundle, work)


def test_order_and_batches_of_mixed_lengths_change_nothing(roomy_bundle: Bundle) -> None:
    work = mixed_work(seed=3)
    together = answers(roomy_bundle, work, threads=2)
    assert answers(roomy_bundle, work[::-1], threads=2)[::-1] == together
    assert answers(roomy_bundle, work, one_by_one=True) == together
    assert answers(roomy_bundle, work, rows=3, batch_tokens=1) == together


def attention_of(answered: list[tuple[Hypothesis, ...]]) -> list[list[bytes | None]]:
    """To the last bit."""
    return [[None if one.attention is None else one.attention.tobytes() for one in hypotheses] for hypotheses in answered]


def test_attention_that_some_ask_for_changes_nobodys_answer_and_is_ones_own(roomy_bundle: Bundle) -> None:
    plain = mixed_work(seed=4)
    work = [(ids, replace(options, return_attention=i % 2 == 0)) for i, (ids, options) in enumerate(plain)]
    together = answers(roomy_bundle, work, threads=2)
    assert together == answers(roomy_bundle, plain, threads=2)
    assert attention_of(answers(roomy_bundle, work[::-1], threads=2)[::-1]) == attention_of(together)
    assert attention_of(answers(roomy_bundle, work, rows=3, batch_tokens=1)) == attention_of(together)
    assert attention_of(alone(roomy_bundle, work[:8])) == attention_of(together[:8])
    for (ids, options), hypotheses in zip(work, together, strict=True):
        for hypothesis in hypotheses:
            assert (hypothesis.attention is not None) == options.return_attention
            if hypothesis.attention is not None:
                assert hypothesis.attention.shape == (len(hypothesis.target_ids), len(ids))
                np.testing.assert_allclose(hypothesis.attention.sum(axis=1), 1, atol=1e-6)


def test_sources_of_5_to_128_tokens_share_one_lane(roomy_bundle: Bundle, lanes: list[Lane]) -> None:
    work = [(source(n), DecodingOptions(max_target_tokens=6)) for n in (5, 20, 33, 70, 90, 121)]
    answers(roomy_bundle, work)
    (lane,) = lanes
    assert lane.cache.source_capacity == 128
    # All of them stepped together: nobody waited for a lane of his own.
    assert lane._steps == 6


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_long_source_that_joins_in_mid_decode_changes_nobodys_answer(
    roomy_bundle: Bundle, lanes: list[Lane], monkeypatch: pytest.MonkeyPatch, beam_size: int
) -> None:
    options = DecodingOptions(beam_size=beam_size, num_hypotheses=beam_size, min_target_tokens=30, max_target_tokens=40)
    work = [(source(n), options) for n in (5, 20, 31, 97)]
    expected = alone(roomy_bundle, work)
    lanes.clear()
    engine = Engine(roomy_bundle, EngineConfig(threads=1, max_rows_per_worker=24, encoder_batch_tokens=512))
    engine.start()
    gate, waiter = Gate(monkeypatch), Waiter()
    short = [waiter.sequence(*one) for one in work[:-1]]
    engine.submit(short)
    for _ in range(5):
        gate.wait_for_step()
        gate.let_steps_pass()
    gate.wait_for_step()
    (lane,) = lanes
    assert (lane.cache.source_capacity, len(lane.sequences)) == (32, 3)
    long = waiter.sequence(*work[-1])
    engine.submit([long])
    gate.let_steps_pass(1000)
    got = [outcome.hypotheses for outcome in waiter.wait([*short, long])]
    engine.close()
    assert len(lanes) == 1
    assert lane.cache.source_capacity == 104
    assert got == expected


def test_a_longer_source_has_a_lane_of_its_own_that_gives_its_memory_back(roomy_bundle: Bundle, lanes: list[Lane]) -> None:
    options = DecodingOptions(min_target_tokens=6, max_target_tokens=6)
    work = [(source(n), options) for n in (5, 150, 20)]
    assert answers(roomy_bundle, work) == alone(roomy_bundle, work)
    short, long = sorted(lanes[:2], key=lambda lane: lane.cache.source_capacity)
    assert (short.cache.source_capacity, long.cache.source_capacity) == (32, 152)
    assert (short.is_large, long.is_large) == (False, True)


def test_short_sources_follow_a_long_one_in_its_slot(roomy_bundle: Bundle) -> None:
    """A slot holds what is left of a longer source; nobody reads it."""
    options = DecodingOptions(max_target_tokens=8)
    work = [(source(n), options) for n in (150, 5, 149, 6, 7)]
    engine = Engine(roomy_bundle, EngineConfig(threads=1, max_rows_per_worker=1))
    engine.start()
    got = [translate(engine, [one])[0].hypotheses for one in work]
    engine.close()
    assert got == alone(roomy_bundle, work)


def test_buckets_of_ragged_and_of_padded_graphs(roomy_bundle: Bundle, padded_bundle: Bundle) -> None:
    lengths = [1, 5, 32, 33, 64, 65, 150]
    ragged, padded = HostModelSession(roomy_bundle), HostModelSession(padded_bundle)
    assert [ragged.source_bucket(n) for n in lengths] == [128] * 6 + [256]
    assert [ragged.source_capacity(n) for n in lengths] == [32, 32, 32, 40, 64, 72, 152]
    assert [padded.source_bucket(n) for n in lengths] == [32, 32, 32, 64, 64, 128, 256]
    assert [padded.source_capacity(n) for n in lengths] == [32, 32, 32, 64, 64, 128, 256]


def test_padded_graphs_have_lanes_by_length_and_change_nobodys_answer(padded_bundle: Bundle, lanes: list[Lane]) -> None:
    work = [(ids, replace(options, beam_size=1)) for ids, options in mixed_work(seed=4)]
    together = answers(padded_bundle, work, rows=64)
    assert sorted(lane.cache.source_capacity for lane in lanes) == [32, 64, 128, 256]
    assert together == alone(padded_bundle, work)
