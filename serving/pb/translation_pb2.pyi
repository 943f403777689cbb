from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_EOS: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_EOS: FinishReason
FINISH_REASON_LENGTH: FinishReason

class DecodingOptions(_message.Message):
    __slots__ = ("beam_size", "num_hypotheses", "length_penalty", "min_target_tokens", "max_target_tokens", "return_scores", "early_stopping", "patience", "repetition_penalty", "no_repeat_ngram_size", "shrinking_beam", "sampling", "prefix_bias", "suppressed_texts", "suppressed_sequences", "suppress_unknown", "min_target_ratio", "max_target_ratio", "end_tokens", "return_end_token", "return_attention", "replace_unknowns", "coverage_penalty", "return_token_scores", "alternatives", "max_source_tokens")
    BEAM_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_HYPOTHESES_FIELD_NUMBER: _ClassVar[int]
    LENGTH_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MIN_TARGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TARGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RETURN_SCORES_FIELD_NUMBER: _ClassVar[int]
    EARLY_STOPPING_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    NO_REPEAT_NGRAM_SIZE_FIELD_NUMBER: _ClassVar[int]
    SHRINKING_BEAM_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PREFIX_BIAS_FIELD_NUMBER: _ClassVar[int]
    SUPPRESSED_TEXTS_FIELD_NUMBER: _ClassVar[int]
    SUPPRESSED_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    SUPPRESS_UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    MIN_TARGET_RATIO_FIELD_NUMBER: _ClassVar[int]
    MAX_TARGET_RATIO_FIELD_NUMBER: _ClassVar[int]
    END_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RETURN_END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RETURN_ATTENTION_FIELD_NUMBER: _ClassVar[int]
    REPLACE_UNKNOWNS_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    RETURN_TOKEN_SCORES_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    MAX_SOURCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    beam_size: int
    num_hypotheses: int
    length_penalty: float
    min_target_tokens: int
    max_target_tokens: int
    return_scores: bool
    early_stopping: bool
    patience: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    shrinking_beam: bool
    sampling: Sampling
    prefix_bias: float
    suppressed_texts: _containers.RepeatedScalarFieldContainer[str]
    suppressed_sequences: _containers.RepeatedCompositeFieldContainer[TokenSequence]
    suppress_unknown: bool
    min_target_ratio: float
    max_target_ratio: float
    end_tokens: _containers.RepeatedScalarFieldContainer[str]
    return_end_token: bool
    return_attention: bool
    replace_unknowns: bool
    coverage_penalty: float
    return_token_scores: bool
    alternatives: Alternatives
    max_source_tokens: int
    def __init__(self, beam_size: _Optional[int] = ..., num_hypotheses: _Optional[int] = ..., length_penalty: _Optional[float] = ..., min_target_tokens: _Optional[int] = ..., max_target_tokens: _Optional[int] = ..., return_scores: _Optional[bool] = ..., early_stopping: _Optional[bool] = ..., patience: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., no_repeat_ngram_size: _Optional[int] = ..., shrinking_beam: _Optional[bool] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., prefix_bias: _Optional[float] = ..., suppressed_texts: _Optional[_Iterable[str]] = ..., suppressed_sequences: _Optional[_Iterable[_Union[TokenSequence, _Mapping]]] = ..., suppress_unknown: _Optional[bool] = ..., min_target_ratio: _Optional[float] = ..., max_target_ratio: _Optional[float] = ..., end_tokens: _Optional[_Iterable[str]] = ..., return_end_token: _Optional[bool] = ..., return_attention: _Optional[bool] = ..., replace_unknowns: _Optional[bool] = ..., coverage_penalty: _Optional[float] = ..., return_token_scores: _Optional[bool] = ..., alternatives: _Optional[_Union[Alternatives, _Mapping]] = ..., max_source_tokens: _Optional[int] = ...) -> None: ...

class Alternatives(_message.Message):
    __slots__ = ("min_probability",)
    MIN_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    min_probability: float
    def __init__(self, min_probability: _Optional[float] = ...) -> None: ...

class TokenSequence(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tokens: _Optional[_Iterable[str]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("top_k", "top_p", "temperature", "seed")
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    top_k: int
    top_p: float
    temperature: float
    seed: int
    def __init__(self, top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class TranslateRequest(_message.Message):
    __slots__ = ("texts", "source_language", "target_language", "options", "target_prefixes")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    TARGET_LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    TARGET_PREFIXES_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    source_language: str
    target_language: str
    options: DecodingOptions
    target_prefixes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., source_language: _Optional[str] = ..., target_language: _Optional[str] = ..., options: _Optional[_Union[DecodingOptions, _Mapping]] = ..., target_prefixes: _Optional[_Iterable[str]] = ...) -> None: ...

class TranslateResponse(_message.Message):
    __slots__ = ("translations", "timings")
    TRANSLATIONS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    translations: _containers.RepeatedCompositeFieldContainer[TranslatedText]
    timings: RequestTimings
    def __init__(self, translations: _Optional[_Iterable[_Union[TranslatedText, _Mapping]]] = ..., timings: _Optional[_Union[RequestTimings, _Mapping]] = ...) -> None: ...

class TranslatedText(_message.Message):
    __slots__ = ("hypotheses", "source_tokens", "timings", "source_pieces")
    HYPOTHESES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_PIECES_FIELD_NUMBER: _ClassVar[int]
    hypotheses: _containers.RepeatedCompositeFieldContainer[Hypothesis]
    source_tokens: int
    timings: TextTimings
    source_pieces: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, hypotheses: _Optional[_Iterable[_Union[Hypothesis, _Mapping]]] = ..., source_tokens: _Optional[int] = ..., timings: _Optional[_Union[TextTimings, _Mapping]] = ..., source_pieces: _Optional[_Iterable[str]] = ...) -> None: ...

class Hypothesis(_message.Message):
    __slots__ = ("text", "score", "finish_reason", "target_tokens", "target_pieces", "attention", "token_scores")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TARGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TARGET_PIECES_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SCORES_FIELD_NUMBER: _ClassVar[int]
    text: str
    score: float
    finish_reason: FinishReason
    target_tokens: int
    target_pieces: _containers.RepeatedScalarFieldContainer[str]
    attention: _containers.RepeatedScalarFieldContainer[float]
    token_scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, text: _Optional[str] = ..., score: _Optional[float] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., target_tokens: _Optional[int] = ..., target_pieces: _Optional[_Iterable[str]] = ..., attention: _Optional[_Iterable[float]] = ..., token_scores: _Optional[_Iterable[float]] = ...) -> None: ...

class TextTimings(_message.Message):
    __slots__ = ("queue_seconds", "encode_seconds", "decode_seconds", "steps", "mean_rows_per_step")
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DECODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    MEAN_ROWS_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    queue_seconds: float
    encode_seconds: float
    decode_seconds: float
    steps: int
    mean_rows_per_step: float
    def __init__(self, queue_seconds: _Optional[float] = ..., encode_seconds: _Optional[float] = ..., decode_seconds: _Optional[float] = ..., steps: _Optional[int] = ..., mean_rows_per_step: _Optional[float] = ...) -> None: ...

class RequestTimings(_message.Message):
    __slots__ = ("total_seconds", "queue_seconds", "encode_seconds", "decode_seconds")
    TOTAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DECODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    total_seconds: float
    queue_seconds: float
    encode_seconds: float
    decode_seconds: float
    def __init__(self, total_seconds: _Optional[float] = ..., queue_seconds: _Optional[float] = ..., encode_seconds: _Optional[float] = ..., decode_seconds: _Optional[float] = ...) -> None: ...

class TranslateStreamRequest(_message.Message):
    __slots__ = ("text", "source_language", "target_language", "options", "target_prefix")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    TARGET_LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    TARGET_PREFIX_FIELD_NUMBER: _ClassVar[int]
    text: str
    source_language: str
    target_language: str
    options: DecodingOptions
    target_prefix: str
    def __init__(self, text: _Optional[str] = ..., source_language: _Optional[str] = ..., target_language: _Optional[str] = ..., options: _Optional[_Union[DecodingOptions, _Mapping]] = ..., target_prefix: _Optional[str] = ...) -> None: ...

class TranslateStreamResponse(_message.Message):
    __slots__ = ("text_delta", "translation")
    TEXT_DELTA_FIELD_NUMBER: _ClassVar[int]
    TRANSLATION_FIELD_NUMBER: _ClassVar[int]
    text_delta: str
    translation: TranslatedText
    def __init__(self, text_delta: _Optional[str] = ..., translation: _Optional[_Union[TranslatedText, _Mapping]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("texts", "targets", "target_tokens", "source_language", "target_language")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    TARGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    TARGET_LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    targets: _containers.RepeatedScalarFieldContainer[str]
    target_tokens: _containers.RepeatedCompositeFieldContainer[TokenSequence]
    source_language: str
    target_language: str
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., targets: _Optional[_Iterable[str]] = ..., target_tokens: _Optional[_Iterable[_Union[TokenSequence, _Mapping]]] = ..., source_language: _Optional[str] = ..., target_language: _Optional[str] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("scores", "timings")
    SCORES_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    scores: _containers.RepeatedCompositeFieldContainer[TargetScore]
    timings: RequestTimings
    def __init__(self, scores: _Optional[_Iterable[_Union[TargetScore, _Mapping]]] = ..., timings: _Optional[_Union[RequestTimings, _Mapping]] = ...) -> None: ...

class TargetScore(_message.Message):
    __slots__ = ("tokens", "log_probs", "log_prob", "source_tokens", "timings")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    LOG_PROB_FIELD_NUMBER: _ClassVar[int]
    SOURCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    log_probs: _containers.RepeatedScalarFieldContainer[float]
    log_prob: float
    source_tokens: int
    timings: TextTimings
    def __init__(self, tokens: _Optional[_Iterable[str]] = ..., log_probs: _Optional[_Iterable[float]] = ..., log_prob: _Optional[float] = ..., source_tokens: _Optional[int] = ..., timings: _Optional[_Union[TextTimings, _Mapping]] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LanguagePair(_message.Message):
    __slots__ = ("source", "target")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    source: str
    target: str
    def __init__(self, source: _Optional[str] = ..., target: _Optional[str] = ...) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("model_name", "model_version", "server_version", "languages", "precision", "device", "limits", "default_options")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    LANGUAGES_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    server_version: str
    languages: _containers.RepeatedCompositeFieldContainer[LanguagePair]
    precision: str
    device: str
    limits: Limits
    default_options: DecodingOptions
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., server_version: _Optional[str] = ..., languages: _Optional[_Iterable[_Union[LanguagePair, _Mapping]]] = ..., precision: _Optional[str] = ..., device: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., default_options: _Optional[_Union[DecodingOptions, _Mapping]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_texts_per_request", "max_source_tokens", "max_target_tokens", "max_beam_size", "max_request_seconds")
    MAX_TEXTS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_SOURCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TARGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BEAM_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_SECONDS_FIELD_NUMBER: _ClassVar[int]
    max_texts_per_request: int
    max_source_tokens: int
    max_target_tokens: int
    max_beam_size: int
    max_request_seconds: float
    def __init__(self, max_texts_per_request: _Optional[int] = ..., max_source_tokens: _Optional[int] = ..., max_target_tokens: _Optional[int] = ..., max_beam_size: _Optional[int] = ..., max_request_seconds: _Optional[float] = ...) -> None: ...
