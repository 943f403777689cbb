"""A client for Python programs: one channel, deadlines, and retries of what may be retried.

Knows the protocol and its error details; needs neither a bundle nor ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from serving.errors import DeadlineExceededError, InvalidRequestError, RemoteError
from serving.pb import translation_pb2 as pb
from serving.remote_answers import (
    ModelInfo,
    RemoteHypothesis,
    RemoteScore,
    RemoteTranslation,
    StreamedPiece,
    TextTimings,
    model_info_of,
    score_of,
    translation_of,
)
from serving.remote_errors import call_of, error_of, server_wait_s
from serving.request import Alternatives, Sampling

__all__ = [
    "DecodingOptions",
    "ModelInfo",
    "RemoteHypothesis",
    "RemoteScore",
    "RemoteTranslation",
    "RetryPolicy",
    "StreamedPiece",
    "TextTimings",
    "TranslationClient",
]

_T = TypeVar("_T")

_LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\]):\d+$")

_SERVICE: str = pb.DESCRIPTOR.services_by_name["Translation"].full_name


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how patiently a refused call is tried again; always within its deadline."""

    max_attempts: int = 5
    # The wait before try n + 1 is drawn evenly from 0 to first_backoff_s * 2^(n - 1), at most max_backoff_s ("full jitter", so
    # that clients refused together do not come back together); never less than the server asks for.
    first_backoff_s: float = 0.1
    max_backoff_s: float = 5.0

    def wait_s(self, attempts: int, draw: float) -> float:
        """Seconds to wait after so many tries; ``draw`` is a random number from 0 to 1."""
        return draw * min(self.max_backoff_s, self.first_backoff_s * 2.0 ** (attempts - 1))


class DecodingOptions(TypedDict, total=False):
    """How to decode; one that is left out, or None, takes the server's default. README tells what each means."""

    # Hypotheses kept alive at each step; 1 decodes greedily.
    beam_size: int | None
    # Hypotheses returned for each text, best first: of one search, at most beam_size; or draws, or alternatives.
    num_hypotheses: int | None
    # score = log-probability / length^length_penalty.
    length_penalty: float | None
    # The end-of-sentence token is not taken before so many tokens; a hypothesis ends at so many.
    min_target_tokens: int | None
    max_target_tokens: int | None
    # Whether hypotheses carry their scores; greedy decoding is faster without.
    return_scores: bool | None
    early_stopping: bool | None
    patience: float | None
    shrinking_beam: bool | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    sampling: Sampling | None
    # How strongly target prefixes pull, above 0 and below 1; left out, they are forced.
    prefix_bias: float | None
    # What no translation has: texts, and tokens as the model's vocabulary spells them.
    suppressed_texts: Sequence[str] | None
    suppressed_sequences: Sequence[Sequence[str]] | None
    suppress_unknown: bool | None
    # Lengths for each token of the source.
    min_target_ratio: float | None
    max_target_ratio: float | None
    # Tokens that end a translation, and whether it keeps the one that did.
    end_tokens: Sequence[str] | None
    return_end_token: bool | None
    # Whether hypotheses carry their pieces and what these attended to in the source; whether unknown tokens become what they
    # attended to most.
    return_attention: bool | None
    replace_unknowns: bool | None
    # From 0 to 10; added to the score for source tokens that got less than 1 of the attention.
    coverage_penalty: float | None
    # Whether hypotheses carry their pieces and the score of each.
    return_token_scores: bool | None
    # num_hypotheses translations that differ in the token after the prefix.
    alternatives: Alternatives | None
    # Longer texts are cut to so many tokens; left out, those that are too long for the model are refused.
    max_source_tokens: int | None


class TranslationClient:
    """Calls one server. Threads may share it."""

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = 30.0,
        retry: RetryPolicy | None = None,
        sleep: Callable[[float], None] = time.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """A client of ``target``, connected at its first call.

        Args:
            target: HOST:PORT.
            timeout_s: of a call, all its tries and waits together.
            retry: by default 5 tries; ``RetryPolicy(max_attempts=1)`` never tries again.
            sleep: waits between tries.
            draw: a random number from 0 to 1, for the jitter.

        Raises:
            ValueError: ``timeout_s`` is not above 0. (gRPC would take 0 for no deadline at all.)
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, not {timeout_s}")
        self._target = target
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()
        self._sleep = sleep
        self._draw = draw
        self._channel = grpc.insecure_channel(
            target,
            options=[
                # gRPC's own retries do not read RetryInfo, and they would multiply with ours.
                ("grpc.enable_retries", 0),
                # A proxy named in the environment is not for this machine itself.
                ("grpc.enable_http_proxy", int(not _LOOPBACK.match(target))),
                ("grpc.max_receive_message_length", 64 << 20),
                ("grpc.keepalive_time_ms", 60_000),
                # While a server is coming up: the defaults grow to two minutes.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 2_000),
            ],
        )
        self._translate = self._method("Translate", pb.TranslateResponse)
        self._score = self._method("Score", pb.ScoreResponse)
        self._model_info = self._method("GetModelInfo", pb.GetModelInfoResponse)
        self._translate_stream: Any = self._channel.unary_stream(
            f"/{_SERVICE}/TranslateStream",
            request_serializer=_serialize,
            response_deserializer=pb.TranslateStreamResponse.FromString,
        )
        self._watch_health: Any = self._channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=_serialize,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

    def _method(self, name: str, response: type[Message]) -> Any:
        return self._channel.unary_unary(
            f"/{_SERVICE}/{name}", request_serializer=_serialize, response_deserializer=response.FromString
        )

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def translate(
        self,
        texts: Sequence[str],
        *,
        target_prefixes: Sequence[str] = (),
        source_language: str = "",
        target_language: str = "",
        timeout_s: float | None = None,
        **options: Unpack[DecodingOptions],
    ) -> list[RemoteTranslation]:
        """Translate texts; answers are in their order. Options left None take the server's defaults.

        Args:
            texts: any number up to the server's limit; they are admitted together or not at all.
            target_prefixes: none, or one for each text: what its translation starts with; an empty one leaves that text free.
            source_language: empty for whatever the model translates.
            target_language: likewise.
            timeout_s: instead of the client's.
            options: how to decode; see ``DecodingOptions``.

        Raises:
            InvalidRequestError: the request is out of bounds; names the field.
            OverloadedError: the server had no room, at every try.
            ShuttingDownError: the server is stopping, at every try.
            DeadlineExceededError: no answer in time.
            RemoteError: anything else, for example that there is no server.
        """
        request = _message(
            pb.TranslateRequest,
            texts=texts,
            target_prefixes=_strings("target_prefixes", target_prefixes),
            source_language=source_language,
            target_language=target_language,
            options=_options(options),
        )
        response: pb.TranslateResponse = self._call(lambda left_s: self._translate(request, timeout=left_s), timeout_s)
        return [translation_of(text) for text in response.translations]

    def translate_stream(
        self,
        text: str,
        *,
        target_prefix: str = "",
        source_language: str = "",
        target_language: str = "",
        timeout_s: float | None = None,
        **options: Unpack[DecodingOptions],
    ) -> Iterator[StreamedPiece]:
        """Translate one text and yield its pieces as they are decided; the last one carries the whole translation.

        Closing the iterator early cancels the call. It is tried again only while nothing has been yielded.

        Args:
            text: what to translate.
            target_prefix: what the translation starts with; it is streamed too.
            source_language: as for ``translate``.
            target_language: likewise.
            timeout_s: instead of the client's; of the whole stream.
            options: how to decode.

        Raises:
            OnnxlateError: as ``translate``.
        """
        request = _message(
            pb.TranslateStreamRequest,
            text=text,
            target_prefix=target_prefix,
            source_language=source_language,
            target_language=target_language,
            options=_options(options),
        )

        def first(left_s: float) -> tuple[Any, pb.TranslateStreamResponse]:
            call = self._translate_stream(request, timeout=left_s)
            return call, next(call)

        call, response = self._call(first, timeout_s)
        try:
            while True:
                translation = translation_of(response.translation) if response.HasField("translation") else None
                yield StreamedPiece(text_delta=response.text_delta, translation=translation)
                try:
                    response = next(call)
                except StopIteration:
                    return
                except grpc.RpcError as error:
                    raise error_of(call_of(error)) from error
        finally:
            call.cancel()

    def score(
        self,
        texts: Sequence[str],
        targets: Sequence[str] = (),
        *,
        target_tokens: Sequence[Sequence[str]] = (),
        source_language: str = "",
        target_language: str = "",
        timeout_s: float | None = None,
    ) -> list[RemoteScore]:
        """How probable the model finds given translations; answers are in their order.

        Args:
            texts: as for ``translate``.
            targets: one for each text.
            target_tokens: instead of ``targets``, as the model's vocabulary spells them; without the end of the sentence.
            source_language: as for ``translate``.
            target_language: likewise.
            timeout_s: instead of the client's.

        Raises:
            OnnxlateError: as ``translate``.
        """
        request = _message(
            pb.ScoreRequest,
            texts=texts,
            targets=_strings("targets", targets),
            target_tokens=_token_sequences("target_tokens", target_tokens),
            source_language=source_language,
            target_language=target_language,
        )
        response: pb.ScoreResponse = self._call(lambda left_s: self._score(request, timeout=left_s), timeout_s)
        return [score_of(score) for score in response.scores]

    def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """What the server serves, and what it allows.

        Raises:
            OnnxlateError: as ``translate``.
        """
        request = pb.GetModelInfoRequest()
        info: pb.GetModelInfoResponse = self._call(lambda left_s: self._model_info(request, timeout=left_s), timeout_s)
        return model_info_of(info)

    def wait_ready(self, timeout_s: float) -> None:
        """Return once the server is up and its model loaded.

        Raises:
            DeadlineExceededError: it was not within ``timeout_s``.
            RemoteError: what answers there is not this service.
        """
        request = health_pb2.HealthCheckRequest(service=_SERVICE)

        def watch(left_s: float) -> None:
            call = self._watch_health(request, timeout=left_s, wait_for_ready=True)
            for response in call:
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    call.cancel()
                    return
            raise RemoteError("UNAVAILABLE", "the server ended its health watch without being ready")

        try:
            self._call(watch, timeout_s)
        except DeadlineExceededError as error:
            raise DeadlineExceededError(f"{self._target} was not ready within {timeout_s:g} s") from error

    def _call(self, attempt: Callable[[float], _T], timeout_s: float | None) -> _T:
        """Call ``attempt`` with the seconds left, again and again as the policy allows."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, not {timeout_s}")
        left_s = timeout_s
        ends_at_s = time.monotonic() + timeout_s
        for attempts in itertools.count(1):
            try:
                return attempt(left_s)
            except grpc.RpcError as error:
                call = call_of(error)
                wait_s = self._retry.wait_s(attempts, self._draw()) if attempts < self._retry.max_attempts else math.inf
                wait_s = max(wait_s, server_wait_s(call))
                left_s = ends_at_s - time.monotonic() - wait_s
                if left_s <= 0:
                    raise error_of(call) from error
                self._sleep(wait_s)
        raise AssertionError("itertools.count ends")


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _message(kind: type[_T], **fields: Any) -> _T:
    try:
        return kind(**fields)
    except ValueError as error:  # a lone surrogate, or a number that the field cannot hold
        raise InvalidRequestError("request", str(error)) from error


def _strings(field: str, values: Sequence[str]) -> Sequence[str]:
    if isinstance(values, str):  # which would pass for one string a character
        raise InvalidRequestError(field, "must be strings, not one string")
    return values


def _token_sequences(field: str, sequences: Sequence[Sequence[str]]) -> list[pb.TokenSequence]:
    named = [_strings(f"{field}[{place}]", tokens) for place, tokens in enumerate(sequences)]
    return [_message(pb.TokenSequence, tokens=tokens) for tokens in named]


def _options(options: DecodingOptions) -> pb.DecodingOptions:
    # The protocol's fields know presence: None leaves one unset.
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if (alternatives := options.get("alternatives")) is not None:
        given["alternatives"] = _message(pb.Alternatives, **dataclasses.asdict(alternatives))
    if (sampling := options.get("sampling")) is not None:
        given["sampling"] = _message(pb.Sampling, **dataclasses.asdict(sampling))
    for name in ("suppressed_texts", "end_tokens"):
        if name in given:
            given[name] = _strings(f"options.{name}", given[name])
    if (sequences := options.get("suppressed_sequences")) is not None:
        given["suppressed_sequences"] = _token_sequences("options.suppressed_sequences", sequences)
    return _message(pb.DecodingOptions, **given)
