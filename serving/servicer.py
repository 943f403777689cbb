"""Messages to commands and back.

Knows the protocol's messages and the call's deadline; does not know how a translation is made, nor status codes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import grpc

from serving.errors import ModelLoadingError
from serving.pb import translation_pb2 as pb
from serving.pb import translation_pb2_grpc as pb_grpc
from serving.preparation import ModelDescription, TextHypothesis, Translation
from serving.request import Alternatives, FinishReason, Sampling, SequenceTimings
from serving.request_options import RequestOptions
from serving.scoring import ScoredTarget
from serving.translator import ScoreCommand, StreamCommand, StreamPiece, TranslateCommand, Translator

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Translation"].full_name

Context = grpc.aio.ServicerContext[Any, Any]

# Bytes. What is longer holds lists, and is read each time.
_LONGEST_KNOWN_OPTIONS = 256

_FINISH_REASONS = {
    FinishReason.EOS: pb.FINISH_REASON_EOS,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class TranslationServicer(pb_grpc.TranslationServicer):
    """The Translation service. It answers once ``serve`` was called; until then ModelLoadingError."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """A servicer without a model yet."""
        self._clock = clock
        self._translator: Translator | None = None
        self._description: ModelDescription | None = None

    def serve(self, translator: Translator, description: ModelDescription) -> None:
        """From now on answer with this."""
        self._translator = translator
        self._description = description

    def _ready(self) -> Translator:
        if self._translator is None:
            raise ModelLoadingError("the model is still loading")
        return self._translator

    async def Translate(self, request: pb.TranslateRequest, context: Context) -> pb.TranslateResponse:
        """See translation.proto."""
        translator = self._ready()
        started_at_s = self._clock()
        command = TranslateCommand(
            texts=request.texts,
            target_prefixes=request.target_prefixes,
            source_language=request.source_language,
            target_language=request.target_language,
            options=_options(request.options),
            deadline_s=self._deadline_s(context, translator),
        )
        translations = await translator.translate(command)
        return pb.TranslateResponse(
            translations=[_translated_text(translation) for translation in translations],
            timings=_request_timings(self._clock() - started_at_s, [t.timings for t in translations]),
        )

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """See translation.proto."""
        translator = self._ready()
        started_at_s = self._clock()
        command = ScoreCommand(
            texts=request.texts,
            targets=request.targets,
            target_tokens=[sequence.tokens for sequence in request.target_tokens],
            source_language=request.source_language,
            target_language=request.target_language,
            deadline_s=self._deadline_s(context, translator),
        )
        scored = await translator.score(command)
        return pb.ScoreResponse(
            scores=[_target_score(target) for target in scored],
            timings=_request_timings(self._clock() - started_at_s, [target.timings for target in scored]),
        )

    async def TranslateStream(
        self, request: pb.TranslateStreamRequest, context: Context
    ) -> AsyncGenerator[pb.TranslateStreamResponse, None]:
        """See translation.proto."""
        translator = self._ready()
        command = StreamCommand(
            text=request.text,
            target_prefix=request.target_prefix,
            source_language=request.source_language,
            target_language=request.target_language,
            options=_options(request.options),
            deadline_s=self._deadline_s(context, translator),
        )
        async with aclosing(translator.stream(command)) as pieces:
            async for piece in pieces:
                yield _stream_response(piece)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        """See translation.proto."""
        preparer = self._ready().preparer
        description = self._description
        assert description is not None
        # max_target_tokens has no single default: it follows each text's length.
        default = preparer.decoding_options(RequestOptions(), 0)
        return pb.GetModelInfoResponse(
            model_name=description.name,
            model_version=description.version,
            server_version=description.server_version,
            languages=[pb.LanguagePair(source=source, target=target) for source, target in preparer.languages],
            precision=description.precision,
            device=description.device,
            limits=pb.Limits(
                max_texts_per_request=preparer.limits.max_texts_per_request,
                max_source_tokens=preparer.limits.max_source_tokens,
                max_target_tokens=preparer.limits.max_target_tokens,
                max_beam_size=preparer.limits.max_beam_size,
                max_request_seconds=preparer.limits.max_request_s,
            ),
            default_options=pb.DecodingOptions(
                beam_size=default.beam_size,
                num_hypotheses=default.num_hypotheses,
                length_penalty=default.length_penalty,
                min_target_tokens=default.min_target_tokens,
                return_scores=default.return_scores,
                early_stopping=default.early_stopping,
                patience=default.patience,
                shrinking_beam=default.shrinking_beam,
                repetition_penalty=default.repetition_penalty,
                no_repeat_ngram_size=default.no_repeat_ngram_size,
                end_tokens=preparer.end_tokens,
                suppress_unknown=default.passed_over_id is not None,
            ),
        )

    def _deadline_s(self, context: Context, translator: Translator) -> float:
        """When this call is over, in monotonic seconds.

        ``time_remaining`` follows the wall clock, which may jump, so it is read once. A Python client's ``timeout=0`` arrives as
        no deadline at all; the server has a longest request of its own.
        """
        longest_s = translator.preparer.limits.max_request_s
        # None without a deadline, whatever the stubs say.
        remaining_s: float | None = context.time_remaining()
        return self._clock() + (longest_s if remaining_s is None else min(remaining_s, longest_s))


def _options(options: pb.DecodingOptions) -> RequestOptions:
    """A client asks for the same options again and again: they are read once."""
    if options.ByteSize() > _LONGEST_KNOWN_OPTIONS:
        return _read_options(options)
    return _known_options(options.SerializeToString())


@functools.lru_cache(maxsize=256)
def _known_options(serialized: bytes) -> RequestOptions:
    return _read_options(pb.DecodingOptions.FromString(serialized))


def _read_options(options: pb.DecodingOptions) -> RequestOptions:
    def value(name: str) -> Any:
        return getattr(options, name) if options.HasField(name) else None

    return RequestOptions(
        beam_size=value("beam_size"),
        num_hypotheses=value("num_hypotheses"),
        length_penalty=value("length_penalty"),
        min_target_tokens=value("min_target_tokens"),
        max_target_tokens=value("max_target_tokens"),
        return_scores=value("return_scores"),
        early_stopping=value("early_stopping"),
        patience=value("patience"),
        shrinking_beam=value("shrinking_beam"),
        repetition_penalty=value("repetition_penalty"),
        no_repeat_ngram_size=value("no_repeat_ngram_size"),
        sampling=_sampling(options.sampling) if options.HasField("sampling") else None,
        prefix_bias=value("prefix_bias"),
        suppressed_texts=tuple(options.suppressed_texts),
        suppressed_sequences=tuple(tuple(sequence.tokens) for sequence in options.suppressed_sequences),
        suppress_unknown=value("suppress_unknown"),
        min_target_ratio=value("min_target_ratio"),
        max_target_ratio=value("max_target_ratio"),
        end_tokens=tuple(options.end_tokens),
        return_end_token=value("return_end_token"),
        return_attention=value("return_attention"),
        replace_unknowns=value("replace_unknowns"),
        coverage_penalty=value("coverage_penalty"),
        return_token_scores=value("return_token_scores"),
        alternatives=_alternatives(options.alternatives) if options.HasField("alternatives") else None,
        max_source_tokens=value("max_source_tokens"),
    )


def _alternatives(alternatives: pb.Alternatives) -> Alternatives:
    return Alternatives(min_probability=alternatives.min_probability)


def _sampling(sampling: pb.Sampling) -> Sampling:
    default = Sampling()

    def value(name: str) -> Any:
        return getattr(sampling if sampling.HasField(name) else default, name)

    return Sampling(top_k=value("top_k"), top_p=value("top_p"), temperature=value("temperature"), seed=value("seed"))


def _request_timings(total_s: float, timings: list[SequenceTimings]) -> pb.RequestTimings:
    return pb.RequestTimings(
        total_seconds=total_s,
        queue_seconds=max(of_text.queue_s for of_text in timings),
        encode_seconds=max(of_text.encode_s for of_text in timings),
        decode_seconds=max(of_text.decode_s for of_text in timings),
    )


def _text_timings(timings: SequenceTimings) -> pb.TextTimings:
    return pb.TextTimings(
        queue_seconds=timings.queue_s,
        encode_seconds=timings.encode_s,
        decode_seconds=timings.decode_s,
        steps=timings.steps,
        mean_rows_per_step=timings.mean_rows_per_step,
    )


def _target_score(scored: ScoredTarget) -> pb.TargetScore:
    return pb.TargetScore(
        tokens=scored.tokens,
        log_probs=scored.log_probs,
        log_prob=scored.log_prob,
        source_tokens=scored.source_tokens,
        timings=_text_timings(scored.timings),
    )


def _translated_text(translation: Translation) -> pb.TranslatedText:
    return pb.TranslatedText(
        hypotheses=[_hypothesis(hypothesis) for hypothesis in translation.hypotheses],
        source_tokens=translation.source_tokens,
        timings=_text_timings(translation.timings),
        source_pieces=translation.source_pieces,
    )


def _hypothesis(hypothesis: TextHypothesis) -> pb.Hypothesis:
    return pb.Hypothesis(
        text=hypothesis.text,
        score=hypothesis.score,
        finish_reason=_FINISH_REASONS[hypothesis.finish_reason],
        target_tokens=hypothesis.target_tokens,
        target_pieces=hypothesis.target_pieces,
        attention=None if hypothesis.attention is None else hypothesis.attention.ravel().tolist(),
        token_scores=hypothesis.token_scores,
    )


def _stream_response(piece: StreamPiece) -> pb.TranslateStreamResponse:
    response = pb.TranslateStreamResponse(text_delta=piece.text_delta)
    if piece.translation is not None:
        response.translation.CopyFrom(_translated_text(piece.translation))
    return response
