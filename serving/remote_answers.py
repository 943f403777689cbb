"""What a server answers, as values of Python.

Knows the protocol's responses; does not know requests, channels, errors or retries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.pb import translation_pb2 as pb

_FINISH_REASONS = {pb.FINISH_REASON_EOS: "eos", pb.FINISH_REASON_LENGTH: "length"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteHypothesis:
    """One translation of one text."""

    text: str
    # None: ``return_scores`` did not ask for it.
    score: float | None
    # "eos" when the model ended the sentence, "length" when it was cut at max_target_tokens.
    finish_reason: str
    target_tokens: int
    # Where ``return_attention`` asked for it: its tokens as the vocabulary spells them, and of each one the share of its
    # attention that each of the source's pieces had.
    target_pieces: tuple[str, ...] = ()
    attention: tuple[tuple[float, ...], ...] = ()
    # Where ``return_token_scores`` asked for them: of its tokens, those of ``target_pieces``, and of the end-of-sentence token
    # where it was decoded.
    token_scores: tuple[float, ...] = ()

    @property
    def alignment(self) -> tuple[tuple[int, int], ...]:
        """Of each target piece, the place of the source piece that it attended to most, and its own."""
        return tuple((max(range(len(row)), key=row.__getitem__), place) for place, row in enumerate(self.attention))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTimings:
    """Where one text's time went on the server."""

    queue_s: float
    encode_s: float
    decode_s: float
    steps: int
    mean_rows_per_step: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTranslation:
    """The answer for one text; hypotheses are best first."""

    hypotheses: tuple[RemoteHypothesis, ...]
    source_tokens: int
    timings: TextTimings
    # Of the text, where ``return_attention`` asked for attention.
    source_pieces: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The best hypothesis' text."""
        return self.hypotheses[0].text


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteScore:
    """How probable the model finds one target."""

    # As the vocabulary spells them, the end-of-sentence token last; none where text and target are blank.
    tokens: tuple[str, ...]
    # Of each token, natural logarithm, and their sum.
    log_probs: tuple[float, ...]
    log_prob: float
    source_tokens: int
    timings: TextTimings

    @property
    def mean_log_prob(self) -> float:
        """Of a token, the end-of-sentence token counted; 0 where there are none."""
        return self.log_prob / max(1, len(self.tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedPiece:
    """A piece of a streamed translation."""

    # To append to what came before; never taken back.
    text_delta: str
    # In the last piece only.
    translation: RemoteTranslation | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a server serves, and what it allows."""

    name: str
    version: str
    server_version: str
    # (source, target) pairs.
    languages: tuple[tuple[str, str], ...]
    precision: str
    device: str
    max_texts_per_request: int
    max_source_tokens: int
    max_target_tokens: int
    max_beam_size: int
    max_request_s: float
    # What ends a translation, as a request's ``end_tokens`` name it.
    end_tokens: tuple[str, ...]


def translation_of(text: pb.TranslatedText) -> RemoteTranslation:
    """The answer for one text."""
    return RemoteTranslation(
        hypotheses=tuple(
            RemoteHypothesis(
                text=hypothesis.text,
                score=hypothesis.score if hypothesis.HasField("score") else None,
                finish_reason=_FINISH_REASONS.get(hypothesis.finish_reason, "unknown"),
                target_tokens=hypothesis.target_tokens,
                target_pieces=tuple(hypothesis.target_pieces),
                attention=_rows(hypothesis.attention, len(text.source_pieces)),
                token_scores=tuple(hypothesis.token_scores),
            )
            for hypothesis in text.hypotheses
        ),
        source_tokens=text.source_tokens,
        timings=_timings(text.timings),
        source_pieces=tuple(text.source_pieces),
    )


def score_of(score: pb.TargetScore) -> RemoteScore:
    """What the model thinks of one target."""
    return RemoteScore(
        tokens=tuple(score.tokens),
        log_probs=tuple(score.log_probs),
        log_prob=score.log_prob,
        source_tokens=score.source_tokens,
        timings=_timings(score.timings),
    )


def _timings(timings: pb.TextTimings) -> TextTimings:
    return TextTimings(
        queue_s=timings.queue_seconds,
        encode_s=timings.encode_seconds,
        decode_s=timings.decode_seconds,
        steps=timings.steps,
        mean_rows_per_step=timings.mean_rows_per_step,
    )


def _rows(values: Sequence[float], columns: int) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(values[start : start + columns]) for start in range(0, len(values), columns)) if columns else ()


def model_info_of(info: pb.GetModelInfoResponse) -> ModelInfo:
    """What the server serves."""
    return ModelInfo(
        name=info.model_name,
        version=info.model_version,
        server_version=info.server_version,
        languages=tuple((pair.source, pair.target) for pair in info.languages),
        precision=info.precision,
        device=info.device,
        max_texts_per_request=info.limits.max_texts_per_request,
        max_source_tokens=info.limits.max_source_tokens,
        max_target_tokens=info.limits.max_target_tokens,
        max_beam_size=info.limits.max_beam_size,
        max_request_s=info.limits.max_request_seconds,
        end_tokens=tuple(info.default_options.end_tokens),
    )
