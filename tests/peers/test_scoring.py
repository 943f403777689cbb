"""Scores of given targets against CTranslate2's ``score_batch`` and Hugging Face's logits, on the same weights.

Theirs are computed in one pass over a target; ours step by step, beside other targets. Padding and start, which no translation
has, are out of our softmax; so they are taken out of Hugging Face's, and the models of CTranslate2 have them as good as never.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serving.config import EngineConfig, RequestLimits
from serving.model import ServedModel, load_model
from serving.observer import NullObserver
from serving.preparation import Direction
from serving.request import DecodingOptions
from serving.scoring import ScoredTarget, scoring_options
from serving.translator import ScoreCommand, Translator
from tests.fakes import PATIENCE_S
from tests.peers.ctranslate2_peer import Peers
from tests.peers.subject import Subject
from tests.peers.test_ctranslate2_import import Imported, exact, model, only_ours
from tests.peers.test_hugging_face_families import KINDS, write_model
from tests.peers.test_target_options import SENTENCES, Pair, pair
from tests.support import ENGLISH_LINES, GERMAN_LINES, SAMPLE_LINES

ctranslate2: Any = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed; make test-peers does it")
transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed; make test-peers does it")

pytestmark = pytest.mark.slow

# Fixtures of theirs.
__all__ = ["exact", "model", "pair"]

LOG_PROB_TOLERANCE = 1e-3
PAIRS = 40


def scores(served: ServedModel, command: ScoreCommand) -> list[ScoredTarget]:
    """The whole way of a request, but for messages."""

    async def answer() -> list[ScoredTarget]:
        return await Translator(served.preparer, served.engine, asyncio.get_running_loop()).score(command)

    return asyncio.run(answer())


def token_scores(subject: Subject, asked: list[tuple[tuple[int, ...], DecodingOptions]]) -> list[tuple[float, ...]]:
    """Ours, of targets that are all decoded together."""
    return [outcome.hypotheses[0].token_scores or () for outcome in subject.outcomes(asked)]


def apart(mine: list[tuple[float, ...]], its: list[list[float]]) -> float:
    """Largest difference."""
    differences = [np.abs(np.array(one) - np.array(other)) for one, other in zip(mine, its, strict=True)]
    return float(np.concatenate(differences).max())


def pairs_of(subject: Subject) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Sources with their translations, with those of others, and with none."""
    sources = subject.sources()[:PAIRS]
    decoded = [best.target_ids for (best,) in subject.decode(sources, DecodingOptions(max_target_tokens=30))]
    others = [*decoded[1:], ()]
    random.Random(1).shuffle(others)
    return [*zip(sources, decoded, strict=True), *zip(sources, others, strict=True)]


def teacher_forced(module: Any, source: tuple[int, ...], target: list[int], start: int, never: list[int]) -> list[float]:
    """Hugging Face's log-probabilities of a target, its end included, among all tokens but those that never come."""
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[start, *target[:-1]]])).logits[0]
    logits[:, never] = -math.inf
    log_probs: list[float] = logits.double().log_softmax(1).gather(1, torch.tensor(target)[:, None])[:, 0].tolist()
    return log_probs


def test_scores_are_those_of_ctranslate2(subject: Subject, ctranslate2_peers: Peers) -> None:
    pairs, eos_id = pairs_of(subject), subject.checkpoint.config.eos_id
    mine = token_scores(subject, [(source, scoring_options((*target, eos_id))) for source, target in pairs])
    its = ctranslate2_peers["fp32"].score(pairs)
    print(f"{subject.checkpoint.name}: {apart(mine, its):.1e} from CTranslate2's")
    assert apart(mine, its) <= LOG_PROB_TOLERANCE


def test_scores_are_those_of_hugging_face(subject: Subject, marian_directory: Path) -> None:
    config, pairs = subject.checkpoint.config, pairs_of(subject)
    module = transformers.MarianMTModel.from_pretrained(marian_directory).eval()
    mine = token_scores(subject, [(source, scoring_options((*target, config.eos_id))) for source, target in pairs])
    its = [
        teacher_forced(module, source, [*target, config.eos_id], config.decoder_start_id, config.never_decoded)
        for source, target in pairs
    ]
    print(f"{subject.checkpoint.name}: {apart(mine, its):.1e} from Hugging Face's")
    assert apart(mine, its) <= LOG_PROB_TOLERANCE


def test_scores_of_imported_models_are_those_of_ctranslate2(exact: Imported) -> None:
    """Marian, M2M100, BART and OpenNMT's: with what each reads before and after a source, and before a target."""
    config, pieces, rng = exact.subject.checkpoint.config, exact.target_pieces, np.random.default_rng(3)
    unsaid = {config.eos_id, *config.never_decoded}
    known = [i for i, piece in enumerate(pieces) if piece != only_ours(i) and i not in unsaid]
    sources, before = exact.sources(PAIRS), exact.target_prefix
    targets = [tuple(rng.choice(known, rng.integers(0, 15)).tolist()) for _ in sources]
    told = Direction(before_target=before)
    asked = [(source, scoring_options((*target, config.eos_id), told)) for source, target in zip(sources, targets, strict=True)]
    found = ctranslate2.Translator(str(exact.directory), compute_type="float32").score_batch(
        [exact.spelled(source) for source in sources],
        [[pieces[i] for i in (*before, *target)] for target in targets],
        # What the model is told is no part of the target.
        offset=len(before),
    )
    mine, its = token_scores(exact.subject, asked), [result.log_probs for result in found]
    print(f"{exact.directory.name}: {apart(mine, its):.1e} from CTranslate2's")
    assert apart(mine, its) <= LOG_PROB_TOLERANCE


def test_texts_are_scored_as_by_ctranslate2(pair: Pair) -> None:
    """Marian with its real tokenizer, from text."""
    lines = [*GERMAN_LINES, *(prefix for prefix in pair.prefixes if prefix)]
    targets = [lines[place % len(lines)] if place % 10 else "" for place in range(SENTENCES)]
    deadline_s = time.monotonic() + 10 * PATIENCE_S
    mine = scores(pair.ours, ScoreCommand(texts=pair.sources, targets=targets, deadline_s=deadline_s))
    found = pair.theirs.score_batch(
        [[*pair.pieces(text), "</s>"] for text in pair.sources], [pair.pieces(target, is_target=True) for target in targets]
    )
    assert [list(one.tokens) for one in mine] == [result.tokens for result in found]
    its = [result.log_probs for result in found]
    print(f"{apart([one.log_probs for one in mine], its):.1e} from CTranslate2's")
    assert apart([one.log_probs for one in mine], its) <= LOG_PROB_TOLERANCE


@pytest.mark.parametrize("name", ["m2m100", "nllb", "mbart50", "bart", "pegasus"])
def test_texts_are_scored_as_by_hugging_face(name: str, tmp_path: Path) -> None:
    """Models that are told languages, or a first token, from text."""
    kind, directory = KINDS[name], tmp_path / "checkpoint"
    directory.mkdir()
    module = write_model(directory, kind)
    (directory / "samples.txt").write_text("\n".join(SAMPLE_LINES[:2]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    subject = Subject(directory, tmp_path)
    config = subject.checkpoint.config
    served = load_model(subject.bundle("fp32").directory, EngineConfig(threads=1), RequestLimits(), NullObserver())
    try:
        for languages in kind.pairs:
            command = ScoreCommand(
                texts=ENGLISH_LINES,
                targets=GERMAN_LINES,
                source_language=languages[0] if languages else "",
                target_language=languages[1] if languages else "",
                deadline_s=time.monotonic() + 10 * PATIENCE_S,
            )
            mine = scores(served, command)
            if languages is not None:
                tokenizer.src_lang, tokenizer.tgt_lang = languages
            its = []
            for text, target, one in zip(ENGLISH_LINES, GERMAN_LINES, mine, strict=True):
                source, labels = tokenizer(text).input_ids, tokenizer(text_target=target).input_ids
                theirs = teacher_forced(module, source, labels, config.decoder_start_id, config.never_decoded)
                # Without the language, or the first token.
                assert list(one.tokens) == tokenizer.convert_ids_to_tokens(labels)[-len(one.tokens) :]
                assert len(labels) - len(one.tokens) == (languages is not None or kind.forced is not None)
                its.append(theirs[-len(one.tokens) :])
            print(f"{name}: {apart([one.log_probs for one in mine], its):.1e} from Hugging Face's")
            assert apart([one.log_probs for one in mine], its) <= LOG_PROB_TOLERANCE
    finally:
        served.engine.close()
