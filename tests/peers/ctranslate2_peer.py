"""CTranslate2 as a peer: a converted model, what it answers, and how far our answers are from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from serving.manifest import Precision
from serving.request import DecodingOptions, Hypothesis
from tests.peers.subject import Subject
from tests.support import score_of

ctranslate2: Any = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed; make test-peers does it")

# By precision.
Peers = dict[Precision, "Peer"]


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
        prefix, bias = options.target_prefix, options.prefix_bias
        wished = prefix if bias is None else bias.tokens
        results = self._translator.translate_batch(
            [self._spelled(source) for source in sources],
            [self._spelled_target(wished)] * len(sources) if wished else None,
            beam_size=options.beam_size,
            patience=options.patience,
            length_penalty=options.length_penalty,
            coverage_penalty=options.coverage_penalty,
            repetition_penalty=options.repetition_penalty,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            suppress_sequences=[self._spelled_target(tokens) for tokens in options.suppressed] or None,
            prefix_bias_beta=0.0 if bias is None else bias.strength,
            min_decoding_length=options.min_target_tokens,
            max_decoding_length=options.max_target_tokens,
            return_scores=True,
            # Its coverage penalty changes with the padding of a batch, and crashes a greedy search that returns no attention
            # (4.8.5).
            return_attention=options.coverage_penalty != 0,
            max_batch_size=1 if options.coverage_penalty else 24,
        )
        return [self._answer(result.hypotheses[0], result.scores[0], options) for result in results]

    def alternatives(self, source: tuple[int, ...], options: DecodingOptions) -> list[tuple[tuple[int, ...], float]]:
        """Ids and scores of the alternatives after a prefix, in its order."""
        (result,) = self._translator.translate_batch(
            [self._spelled(source)],
            [self._spelled(options.target_prefix)],
            beam_size=options.beam_size,
            num_hypotheses=options.num_hypotheses,
            length_penalty=options.length_penalty,
            min_decoding_length=0,
            max_decoding_length=options.max_target_tokens,
            return_alternatives=True,
            return_scores=True,
        )
        spelled = [tuple(self._ids[piece] for piece in pieces) for pieces in result.hypotheses]
        return list(zip(spelled, result.scores, strict=True))

    def score(self, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[list[float]]:
        """Log-probabilities of the tokens of each source's target, and of its end."""
        results = self._translator.score_batch(
            [self._spelled(source) for source, _ in pairs], [self._spelled_target(target) for _, target in pairs]
        )
        return [result.log_probs for result in results]

    def _spelled(self, ids: tuple[int, ...]) -> list[str]:
        """The tokens of a source."""
        return self._spelled_target(ids)

    def _spelled_target(self, ids: tuple[int, ...]) -> list[str]:
        return [self._pieces[i] for i in ids]

    def _answer(self, pieces: list[str], score: float, options: DecodingOptions) -> Answer:
        ids = tuple(self._ids[piece] for piece in pieces)
        target_tokens = min(len(ids) + 1, options.max_target_tokens)
        return Answer(ids, target_tokens, score * target_tokens**options.length_penalty)


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
            abs(score_of(mine) - its.score(penalty)) * float(mine.target_tokens**penalty)
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
