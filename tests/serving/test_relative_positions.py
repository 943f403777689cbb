"""T5's and umT5's bias on the scores of self-attention, in the engine: whoever else is there, however far a target goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from export import verify
from export.checkpoint import build_model, read_checkpoint
from export.pipeline import export_bundle
from export.samples import Sample
from serving.bundle import Bundle
from serving.config import EngineConfig
from serving.engine import Engine
from serving.request import DecodingOptions, Hypothesis
from tests.serving.test_engine import translate
from tests.serving.test_source_lengths import Work, alone, answers, mixed_work, source
from tests.support import T5, tiny_config, write_tiny_checkpoint

# Targets go far beyond the distance from which on all keys are alike.
FURTHEST = 20
LONG_TARGET_TOKENS = 70


def write(directory: Path, *, per_layer: bool) -> Path:
    sizes = {"relative_distance": FURTHEST, "max_positions": 192, "num_decoder_layers": 2, "relative_per_layer": per_layer}
    return write_tiny_checkpoint(directory, tiny_config(**{**T5, **sizes}))


@pytest.fixture(scope="module", params=[("fp32", False), ("int8", True)], ids=["fp32", "int8 per layer"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    work = tmp_path_factory.mktemp("t5")
    precision, per_layer = request.param
    return export_bundle(
        write(work / "checkpoint", per_layer=per_layer), work / "bundle", precision=precision, show_progress=False
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_neighbours_change_nobodys_answer_in_any_bit(bundle: Bundle, workers: int) -> None:
    work = mixed_work(seed=workers)
    together = answers(bundle, work, threads=workers)
    assert together == alone(bundle, work)
    assert answers(bundle, work[::-1], threads=workers, rows=7)[::-1] == together


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_long_targets_of_any_width_do_not_depend_on_neighbours(bundle: Bundle, width: int) -> None:
    options = DecodingOptions(
        beam_size=width, min_target_tokens=LONG_TARGET_TOKENS, max_target_tokens=LONG_TARGET_TOKENS, return_scores=True
    )
    short = DecodingOptions(beam_size=width, max_target_tokens=5)
    work: Work = [(source(5), options), (source(17), short), (source(33), options), (source(9), short)]
    together = answers(bundle, work)
    assert len(together[0][0].target_ids) >= LONG_TARGET_TOKENS - 1
    assert together == alone(bundle, work)


def test_a_lone_request_on_all_threads_has_the_same_answer(bundle: Bundle) -> None:
    work: Work = [(source(n), DecodingOptions(beam_size=2, max_target_tokens=30)) for n in (5, 40)]
    expected = answers(bundle, work)
    got: list[tuple[Hypothesis, ...]] = []
    engine = Engine(bundle, EngineConfig(threads=2, threads_when_alone=2))
    engine.start()
    try:
        for one in work:
            got += [outcome.hypotheses for outcome in translate(engine, [one])]
    finally:
        engine.close()
    assert got == expected


@pytest.mark.parametrize("per_layer", [False, True])
def test_greedy_answers_are_those_of_the_uncached_model(tmp_path: Path, per_layer: bool) -> None:
    """At every position, far beyond the distance from which on all keys are alike."""
    checkpoint = write(tmp_path / "checkpoint", per_layer=per_layer)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", show_progress=False)
    model = build_model(read_checkpoint(checkpoint))
    sources = [source(n) for n in (5, 60, 150)]
    references = verify.make_references(model, [Sample(ids) for ids in sources])
    assert max(len(reference.target_ids) for reference in references) > 2 * FURTHEST
    options = DecodingOptions(max_target_tokens=max(len(reference.target_ids) for reference in references) - 1)
    for (best,), reference in zip(answers(bundle, [(ids, options) for ids in sources]), references, strict=True):
        assert best.target_ids == reference.target_ids[1:]
