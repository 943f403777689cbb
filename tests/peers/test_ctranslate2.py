"""Our answers against CTranslate2's on the same weights.

Scores mean the same: both divide by the length with the end-of-sentence token, and both normalize over the tokens that may be
decoded. What differs is when a beam search ends, by CTranslate2's source (``src/decoding.cc``, 4.8): as soon as
``beam_size * patience`` hypotheses have ended, or, without a length penalty, as soon as the best continuation of a step is one
that ends. Ours goes on while the best running hypothesis, scored at its present length, beats the worst that is kept.

Which continuations run on is the same in both. So without a length penalty the best hypothesis is the same: log-probabilities
only fall, and none that runs overtakes one that ended as the best of its step. With one it may differ, but then ours has the
higher score: it never ends before ``beam_size`` hypotheses have, so it has seen all that CTranslate2 chose from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.conversion import convert_without_padding_rules, pieces_of
from serving.bundle import Precision
from serving.request import DecodingOptions, Hypothesis
from tests.peers.subject import Subject

ctranslate2: Any = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed; make test-peers does it")
transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed; make test-peers does it")

pytestmark = pytest.mark.slow

LOG_PROB_TOLERANCE = 1e-3
# Of scores of different hypotheses: closer ones are equally good.
SCORE_TOLERANCE = 1e-5
# Either program's int8 changes some 5 to 12 % of its own fp32 answers, and each rounds in its own way (CTranslate2 the embeddings
# too), so up to a quarter may differ where the two are unlucky in different places; more would be a fault of one of them.
LEAST_INT8_AGREEMENT = 0.75
# In fp32, with a length penalty of at most 1, on sentences a few words long: that a hypothesis wins although beam_size others
# ended before it is rare there. With a penalty of 2 it is not, because a longer one gains more by its length than it loses.
LEAST_BEAM_AGREEMENT = 0.9
MAX_TARGET_TOKENS = 40
# By precision.
Peers = dict[Precision, "Peer"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")


@dataclass(frozen=True)
class Answer:
    """CTranslate2's best hypothesis."""

    # Without the end-of-sentence token.
    ids: tuple[int, ...]
    # Tokens decoded, the end-of-sentence token included.
    target_tokens: int
    log_prob: float

    def score(self, length_penalty: float) -> float:
        """What our search would score it."""
        return self.log_prob / float(self.target_tokens**length_penalty)


class Peer:
    """A converted model."""

    def __init__(self, directory: Path, pieces: list[str], precision: Precision) -> None:
        self._pieces = pieces
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        compute_type = "float32" if precision == "fp32" else "int8"
        self._translator = ctranslate2.Translator(str(directory), compute_type=compute_type, intra_threads=1)

    def decode(self, sources: list[tuple[int, ...]], options: DecodingOptions) -> list[Answer]:
        """The best hypothesis of every source."""
        results = self._translator.translate_batch(
            [[self._pieces[i] for i in source] for source in sources],
            beam_size=options.beam_size,
            length_penalty=options.length_penalty,
            min_decoding_length=options.min_target_tokens,
            max_decoding_length=options.max_target_tokens,
            return_scores=True,
            max_batch_size=24,
        )
        return [self._answer(result.hypotheses[0], result.scores[0], options) for result in results]

    def _answer(self, pieces: list[str], score: float, options: DecodingOptions) -> Answer:
        ids = tuple(self._ids[piece] for piece in pieces)
        target_tokens = min(len(ids) + 1, options.max_target_tokens)
        return Answer(ids, target_tokens, score * target_tokens**options.length_penalty)


@pytest.fixture(scope="module")
def pieces(subject: Subject) -> list[str]:
    """The vocabulary, by id."""
    return pieces_of(subject.checkpoint)


@pytest.fixture(scope="module")
def peers(subject: Subject, marian_directory: Path, pieces: list[str], tmp_path_factory: pytest.TempPathFactory) -> Peers:
    """CTranslate2's model in both precisions."""
    work = tmp_path_factory.mktemp(f"ctranslate2-{subject.checkpoint.name}")
    return {
        precision: Peer(convert_without_padding_rules(marian_directory, pieces, work / precision, precision), pieces, precision)
        for precision in PRECISIONS
    }


@pytest.fixture(scope="module")
def sources(subject: Subject) -> list[tuple[int, ...]]:
    return subject.sources()


@dataclass(frozen=True)
class Comparison:
    """The best hypotheses of both for the same sources."""

    ours: list[Hypothesis]
    theirs: list[Answer]
    options: DecodingOptions

    @property
    def different(self) -> list[tuple[Hypothesis, Answer]]:
        """Those that are not the same tokens."""
        return [(mine, its) for mine, its in zip(self.ours, self.theirs, strict=True) if mine.target_ids != its.ids]

    @property
    def agreement(self) -> float:
        """Share of the sources whose answers are the same tokens."""
        return 1 - len(self.different) / len(self.ours)

    @property
    def apart(self) -> float:
        """Largest difference of the log-probabilities of the same tokens."""
        penalty = self.options.length_penalty
        apart = [
            abs(mine.score - its.score(penalty)) * float(mine.target_tokens**penalty)
            for mine, its in zip(self.ours, self.theirs, strict=True)
            if mine.target_ids == its.ids
        ]
        return max(apart, default=0.0)

    def tell(self, setting: str) -> None:
        """Print the figures."""
        print(
            f"{setting}, beam {self.options.beam_size}, length penalty {self.options.length_penalty}: {self.agreement:.1%} of "
            f"{len(self.ours)} the same, largest difference of their log-probabilities {self.apart:.1e}"
        )


def compare(
    subject: Subject, peer: Peer, sources: list[tuple[int, ...]], options: DecodingOptions, precision: Precision = "fp32"
) -> Comparison:
    ours = [hypotheses[0] for hypotheses in subject.decode(sources, options, precision)]
    comparison = Comparison(ours, peer.decode(sources, options), options)
    comparison.tell(f"{subject.checkpoint.name}, {precision}")
    return comparison


@pytest.mark.parametrize("max_target_tokens", [7, MAX_TARGET_TOKENS])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_greedy_is_the_same(
    subject: Subject, peers: Peers, sources: list[tuple[int, ...]], length_penalty: float, max_target_tokens: int
) -> None:
    options = DecodingOptions(length_penalty=length_penalty, max_target_tokens=max_target_tokens)
    comparison = compare(subject, peers["fp32"], sources, options)
    assert comparison.different == []
    assert comparison.apart <= LOG_PROB_TOLERANCE


@pytest.mark.parametrize("beam_size", [2, 4, 5])
def test_beams_are_the_same_without_a_length_penalty(
    subject: Subject, peers: Peers, sources: list[tuple[int, ...]], beam_size: int
) -> None:
    options = DecodingOptions(beam_size=beam_size, length_penalty=0.0, max_target_tokens=MAX_TARGET_TOKENS)
    comparison = compare(subject, peers["fp32"], sources, options)
    assert comparison.different == []
    assert comparison.apart <= LOG_PROB_TOLERANCE


@pytest.mark.parametrize(("beam_size", "length_penalty"), [(2, 1.0), (4, 0.6), (4, 1.0), (4, 2.0), (5, 1.0)])
def test_beams_differ_only_where_ours_searched_on_and_found_better(
    subject: Subject, peers: Peers, sources: list[tuple[int, ...]], beam_size: int, length_penalty: float
) -> None:
    options = DecodingOptions(beam_size=beam_size, length_penalty=length_penalty, max_target_tokens=MAX_TARGET_TOKENS)
    comparison = compare(subject, peers["fp32"], sources, options)
    assert comparison.apart <= LOG_PROB_TOLERANCE
    found = [(mine, its) for mine, its in comparison.different if mine.score < its.score(length_penalty) - SCORE_TOLERANCE]
    assert found == []


@pytest.mark.parametrize("subject", ["trained"], indirect=True)
@pytest.mark.parametrize("length_penalty", [0.6, 1.0])
def test_beams_of_a_trained_model_are_mostly_the_same(
    subject: Subject, peers: Peers, sources: list[tuple[int, ...]], length_penalty: float
) -> None:
    options = DecodingOptions(beam_size=4, length_penalty=length_penalty, max_target_tokens=MAX_TARGET_TOKENS)
    assert compare(subject, peers["fp32"], sources, options).agreement >= LEAST_BEAM_AGREEMENT


@pytest.mark.parametrize("subject", ["trained"], indirect=True)
@pytest.mark.parametrize(("beam_size", "length_penalty"), [(1, 1.0), (4, 0.0), (4, 1.0)])
def test_int8_answers_of_a_trained_model_are_mostly_the_same(
    subject: Subject, peers: Peers, sources: list[tuple[int, ...]], beam_size: int, length_penalty: float
) -> None:
    options = DecodingOptions(beam_size=beam_size, length_penalty=length_penalty, max_target_tokens=MAX_TARGET_TOKENS)
    comparison = compare(subject, peers["int8"], sources, options, "int8")
    exact = [hypotheses[0] for hypotheses in subject.decode(sources, options)]
    kept_by_ours = sum(mine.target_ids == one.target_ids for mine, one in zip(comparison.ours, exact, strict=True)) / len(exact)
    kept_by_theirs = Comparison(exact, comparison.theirs, options).agreement
    print(f"    int8 leaves {kept_by_ours:.1%} of our fp32 answers as they are, CTranslate2's {kept_by_theirs:.1%}")
    assert comparison.agreement >= LEAST_INT8_AGREEMENT
    # Ours rounds no more coarsely than CTranslate2.
    assert kept_by_ours >= kept_by_theirs - 0.1
