"""The manifest of a bundle: what ``manifest.json`` holds, and what of it contradicts itself.

Knows the manifest's fields, and how faults of such documents are told; does not know directories (``bundle.py``), what the graphs
compute or how a bundle is written (``export/writer.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import ErrorDetails

MANIFEST_NAME = "manifest.json"
ENCODER_NAME = "encoder.onnx"
DECODER_NAME = "decoder.onnx"
# The decoder for width 1, for a worker that is alone; bundles of int8 and fp32 may have one.
LONE_DECODER_NAME = "lone_decoder.onnx"
# Moves rows of the caches on a device; in a bundle of fp16 only, since the others run on a CPU.
CACHE_ROWS_NAME = "cache_rows.onnx"
# Raised when a reader of the old revision would misread the new one.
FORMAT_REVISION = 4
SUPPORTED_REVISIONS = (4,)
Precision = Literal["fp32", "int8", "fp16"]
# Of int8's activations: measured at export and the same for all, with caches in int8; or each row's own, found at run time, with
# caches in float32.
Int8Scales = Literal["constant", "row"]
# Real source sentences that came with the checkpoint, or ids drawn from its vocabulary.
SampleSource = Literal["sentences", "random_ids"]
Count = Annotated[int, Field(gt=0)]
TokenId = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Record(BaseModel):
    """What all of the manifest has in common: nothing is guessed, converted or left over."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Architecture(_Record):
    """Sizes that the caches and the search need."""

    d_model: Count
    num_heads: Count
    head_dim: Count
    num_encoder_layers: Count
    num_decoder_layers: Count
    source_vocab_size: Count
    target_vocab_size: Count


class SpecialIds(_Record):
    """Token ids with a meaning of their own."""

    pad: TokenId
    # Ends targets, unless ``DefaultOptions.end_ids`` do, and sources, unless ``source_ends_with_eos`` is false.
    eos: TokenId
    # Starts every target; never part of an answer.
    decoder_start: TokenId


class ModelLimits(_Record):
    """What the graphs allow, whatever the server would."""

    # Both with the end-of-sentence token.
    max_source_tokens: Count
    max_target_tokens: Count
    # Candidates that a decoder step can return for a row.
    max_candidates: Count
    max_beam_size: Count


class LanguagePair(_Record):
    """What the model translates from and into, for example ``en`` and ``de``."""

    source: Text
    target: Text


class LanguageTokens(_Record):
    """How a model of many languages is told which: by tokens, never by text."""

    # Language code, as the model's makers spell it -> its token.
    tokens: dict[Text, TokenId]
    # The language whose token a source starts with.
    before_source: Literal["source", "target"] | None
    # The language whose token a source ends with, after the end-of-sentence token.
    after_source: Literal["source", "target"] | None = None
    # Whether a target starts with its language's token.
    before_target: bool

    def needed(self, source: str, target: str) -> tuple[str, ...]:
        """Of the codes of a pair, those that the model is told."""
        sides = (self.before_source, self.after_source, "target" if self.before_target else None)
        return tuple(code for side, code in (("source", source), ("target", target)) if side in sides)


class DefaultOptions(_Record):
    """How targets are decoded where a request does not say: what the model's makers chose for it.

    Bounds and meanings are those of a request's options. Those from ``suppressed`` on are none of these, though a request's
    ``end_tokens`` take the place of ``end_ids``; see ``DecodingOptions``.
    """

    length_penalty: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] = 1.0
    early_stopping: bool = False
    shrinking_beam: bool = False
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 1.0
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    min_target_tokens: Annotated[int, Field(ge=0)] = 0
    # None: as long as the source makes it. A source that makes it shorter still does.
    max_target_tokens: Count | None = None
    # So many target tokens for each of the source, rounded up, in the place of the usual default of max_target_tokens.
    max_target_ratio: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    # Sequences of tokens that no target has.
    suppressed: list[Annotated[list[TokenId], Field(min_length=1)]] = []
    # Tokens that no target starts with, after its prefix.
    suppressed_first: list[TokenId] = []
    # Tokens that end a target; none: the end-of-sentence token alone.
    end_ids: list[TokenId] = []
    # The unknown token, where a request does not say that it may be taken or is to be replaced.
    passed_over_id: TokenId | None = None
    word_penalty: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] = 0.0
    ends_when_cut: bool = False
    rules_of_generate: bool = False


class TokenizerSpec(_Record):
    """SentencePiece models whose own numbers are the token ids; both names may be one file."""

    kind: Literal["sentencepiece"]
    source_model: Text
    target_model: Text

    @property
    def file_names(self) -> list[str]:
        """Its files, each once."""
        return list(dict.fromkeys((self.source_model, self.target_model)))


class MarianTokenizerSpec(_Record):
    """SentencePiece models and vocabularies (JSON: piece -> token id) that number their pieces anew; names may be one file."""

    kind: Literal["marian"]
    source_model: Text
    target_model: Text
    source_vocabulary: Text
    target_vocabulary: Text
    # Tokens of either vocabulary that are no text, beside ``<s>``, ``</s>``, ``<pad>``, ``<unk>`` and languages like ``>>deu<<``:
    # no text makes them, and they have none themselves.
    special_tokens: list[Text] = []

    @property
    def file_names(self) -> list[str]:
        """Its files, each once."""
        return list(dict.fromkeys((self.source_model, self.target_model, self.source_vocabulary, self.target_vocabulary)))


class TokensTokenizerSpec(_Record):
    """Text that comes as tokens, with spaces between them, and vocabularies (JSON: token -> token id); names may be one file."""

    kind: Literal["tokens"]
    source_vocabulary: Text
    target_vocabulary: Text
    # What a token that the source vocabulary lacks becomes.
    unknown_id: TokenId
    # Tokens of either vocabulary that are no text: no text makes them, and they have none themselves.
    special_tokens: list[Text]

    @property
    def file_names(self) -> list[str]:
        """Its files, each once."""
        return list(dict.fromkeys((self.source_vocabulary, self.target_vocabulary)))


class HuggingFaceTokenizerSpec(_Record):
    """A ``tokenizer.json``, as Hugging Face's tokenizers library reads it, for both sides."""

    kind: Literal["hugging_face"]
    tokenizer: Text
    # Tokens that are no text, beside those that the file itself calls special.
    special_tokens: list[Text] = []

    @property
    def file_names(self) -> list[str]:
        """Its file."""
        return [self.tokenizer]


class MosesSpec(_Record):
    """How Moses' scripts cut a source into words, and put the words of a target together. Letters keep their case."""

    # As Moses calls them, for example "en"; they tell abbreviations and quotation marks.
    source_language: Text
    target_language: Text
    # Whether quotation marks, dashes and the like become plain ones first, and characters that do not print are dropped.
    normalize_punctuation: bool
    # Whether a dash between letters becomes a word, ``@-@``.
    aggressive_dash_splits: bool
    # Whether ``& | < > ' " [ ]`` become XML entities.
    escape: bool


class SubwordNmtTokenizerSpec(_Record):
    """Codes of byte-pair encoding (subword-nmt's or fastBPE's) and vocabularies (JSON: piece -> token id); names may be one file.

    A piece that the next one continues ends in ``@@``.
    """

    kind: Literal["subword_nmt"]
    source_codes: Text
    # None: it only cuts sources, so that no text can be asked of a target.
    target_codes: Text | None = None
    source_vocabulary: Text
    target_vocabulary: Text
    # What a piece that the source vocabulary lacks becomes.
    unknown_id: TokenId
    # Tokens of either vocabulary that are no text: no text makes them, and they have none themselves.
    special_tokens: list[Text]
    # None: words are what has spaces between.
    moses: MosesSpec | None

    @property
    def file_names(self) -> list[str]:
        """Its files, each once."""
        codes = (self.source_codes, *(() if self.target_codes is None else (self.target_codes,)))
        return list(dict.fromkeys((*codes, self.source_vocabulary, self.target_vocabulary)))


# Which files cut text into tokens, and how; another kind is another class here and another module in ``tokenizers/``.
AnyTokenizerSpec = Annotated[
    TokenizerSpec | MarianTokenizerSpec | TokensTokenizerSpec | HuggingFaceTokenizerSpec | SubwordNmtTokenizerSpec,
    Field(discriminator="kind"),
]


class Comparison(_Record):
    """How far one way of running the model is from another, measured on the certificate's samples."""

    # What it was compared with, for a person.
    reference: Text
    max_abs_logit_difference: NonNegative
    # Share of the greedy tokens that are the same.
    token_agreement: Annotated[float, Field(ge=0, le=1)]
    # The largest logit difference with which the export succeeds; None: measured and told, whatever it is.
    tolerance: NonNegative | None


class Certificate(_Record):
    """The parity certificate, measured at export on sources that no scale of int8 was measured on."""

    # None: made before this was stated, and before scales had sources of their own.
    sample_source: SampleSource | None = None
    sentences: Count
    decoded_tokens: Count
    # "cached_pytorch" and "onnx_fp32" always; "onnx_int8" or "onnx_fp16" where such graphs were made.
    comparisons: dict[str, Comparison]


class Provenance(_Record):
    """Where the graphs came from."""

    # The checkpoint's name; never a path.
    checkpoint: Text
    weights_sha256: Sha256
    onnxlate_version: Text
    torch_version: Text
    onnx_opset: Count
    # Hypotheses that the model's makers kept alive; None: not stated. Decoding is greedy unless a request says otherwise.
    num_beams: Count | None = None


class FileEntry(_Record):
    """What a file must be."""

    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]


class ManifestDraft(_Record):
    """A manifest before its files are written: everything but their hashes."""

    format_revision: int
    name: Text
    precision: Precision
    # None where the precision is not int8, and in bundles made before this was stated: constant.
    int8_scales: Int8Scales | None = None
    architecture: Architecture
    ids: SpecialIds
    limits: ModelLimits
    # The pairs that it translates; none of a model that is told by tokens and translates any of these codes into any other.
    languages: list[LanguagePair]
    language_tokens: LanguageTokens | None = None
    # What every source starts with, and every target after the start token; whether a source ends in the end-of-sentence token.
    source_prefix: list[TokenId] = []
    source_ends_with_eos: bool = True
    target_prefix: list[TokenId] = []
    defaults: DefaultOptions = DefaultOptions()
    tokenizer: AnyTokenizerSpec
    provenance: Provenance
    certificate: Certificate

    @property
    def has_int8_caches(self) -> bool:
        """Whether the graphs keep keys and values in bytes."""
        return self.precision == "int8" and self.int8_scales != "row"


class Manifest(ManifestDraft):
    """What ``manifest.json`` holds."""

    # Every file of the bundle but the manifest itself.
    files: dict[str, FileEntry]

    def version(self) -> str:
        """Twelve hexadecimal digits that tell two bundles of one name apart: of the SHA-256 of the manifest as canonical JSON."""
        # As it was written: a field that came later does not change the version of a bundle that lacks it.
        document = self.model_dump(mode="json", exclude_unset=True)
        canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def manifest_faults(manifest: ManifestDraft, file_names: Iterable[str]) -> list[str]:
    """What is wrong with a manifest whose fields are well formed, for a bundle of these files; empty when nothing is."""
    names = set(file_names)
    faults = [fault for name in sorted(names) if (fault := name_fault(name)) is not None]
    if MANIFEST_NAME in names:
        faults.append(f"{MANIFEST_NAME}: cannot list itself")
    required = [ENCODER_NAME, DECODER_NAME, *manifest.tokenizer.file_names]
    if manifest.precision == "fp16":
        required.append(CACHE_ROWS_NAME)
    faults += [f"{name}: needed, and not among the bundle's files" for name in required if name not in names]
    if manifest.int8_scales is not None and manifest.precision != "int8":
        faults.append(f"{MANIFEST_NAME}: int8_scales: {manifest.int8_scales} in a bundle of {manifest.precision}")
    ids, sizes = manifest.ids, manifest.architecture
    for field, token_id, size in (
        ("pad", ids.pad, min(sizes.source_vocab_size, sizes.target_vocab_size)),
        ("eos", ids.eos, min(sizes.source_vocab_size, sizes.target_vocab_size)),
        ("decoder_start", ids.decoder_start, sizes.target_vocab_size),
    ):
        if token_id >= size:
            faults.append(f"{MANIFEST_NAME}: ids.{field}: {token_id} is outside a vocabulary of {size}")
    return faults + [f"{MANIFEST_NAME}: {fault}" for fault in (*_prefix_faults(manifest), *_default_faults(manifest))]


def _prefix_faults(manifest: ManifestDraft) -> Iterator[str]:
    """Tokens around sources and targets that the model does not have, or that already mean something else."""
    sizes, told = manifest.architecture, manifest.language_tokens
    meant = {manifest.ids.pad: "padding", manifest.ids.eos: "the end-of-sentence token"}
    placed = [("source_prefix", token_id, sizes.source_vocab_size) for token_id in manifest.source_prefix]
    placed += [("target_prefix", token_id, sizes.target_vocab_size) for token_id in manifest.target_prefix]
    if told is not None:
        size = sizes.target_vocab_size if told.before_target else sizes.source_vocab_size
        if told.before_source or told.after_source:
            size = min(size, sizes.source_vocab_size)
        placed += [(f"language_tokens.tokens.{code}", token_id, size) for code, token_id in told.tokens.items()]
    for field, token_id, size in placed:
        if token_id >= size:
            yield f"{field}: {token_id} is outside a vocabulary of {size}"
        # A source may start with any token of the model's, for example with its end-of-sentence token.
        elif field != "source_prefix" and token_id in meant:
            yield f"{field}: {token_id} is {meant[token_id]}"
    if told is not None:
        codes = dict.fromkeys(code for pair in manifest.languages for code in told.needed(pair.source, pair.target))
        yield from (f"languages: {code} has no token" for code in codes if code not in told.tokens)


def _default_faults(manifest: ManifestDraft) -> Iterator[str]:
    """Default options that contradict each other or the model."""
    defaults, size = manifest.defaults, manifest.architecture.target_vocab_size
    longest = min(defaults.max_target_tokens or manifest.limits.max_target_tokens, manifest.limits.max_target_tokens)
    if defaults.min_target_tokens > longest:
        yield f"defaults.min_target_tokens: {defaults.min_target_tokens} is more than a target may have, {longest}"
    for tokens in defaults.suppressed:
        if max(tokens) >= size:
            yield f"defaults.suppressed: {tokens} is outside a vocabulary of {size}"
        elif tokens in [[token_id] for token_id in defaults.end_ids or (manifest.ids.eos,)]:
            yield f"defaults.suppressed: {tokens} is a token that ends targets"
    for field, ids in (("suppressed_first", defaults.suppressed_first), ("end_ids", defaults.end_ids)):
        yield from (f"defaults.{field}: {i} is outside a vocabulary of {size}" for i in ids if i >= size)
    never = {manifest.ids.pad, manifest.ids.decoder_start} - {manifest.ids.eos}
    yield from (f"defaults.end_ids: {i} is never decoded" for i in defaults.end_ids if i in never)
    if defaults.passed_over_id is not None and defaults.passed_over_id >= size:
        yield f"defaults.passed_over_id: {defaults.passed_over_id} is outside a vocabulary of {size}"
    if defaults.passed_over_id in (defaults.end_ids or [manifest.ids.eos]):
        yield f"defaults.passed_over_id: {defaults.passed_over_id} is a token that ends targets"


def name_fault(name: str) -> str | None:
    """Why ``name`` cannot be a file's name in a bundle or checkpoint; None when it can."""
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        return f"{name!r}: is not a plain file name; nothing outside the directory is read"
    return None


def revision_fault(raw: Any, supported: tuple[int, ...], remedy: str) -> str | None:
    """Why a document of another revision cannot be read; None when it can be, or states no revision at all.

    Looked at before the fields: those of another revision would only give faults that lead astray.
    """
    revision = raw.get("format_revision") if isinstance(raw, dict) else None
    if not isinstance(revision, int) or revision in supported:
        return None
    known = ", ".join(map(str, supported))
    return f"format_revision: {revision} is not supported (supported: {known}); {remedy}"


def field_faults(errors: Iterable[ErrorDetails]) -> list[str]:
    """A pydantic error as lines, each ``path.of.field: what is wrong``."""
    faults = []
    for error in errors:
        path = ".".join(map(str, error["loc"]))
        if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
            # The fault is in the field that tells which of several records this is; pydantic names the record.
            path += "." + error["ctx"]["discriminator"].strip("'")
        faults.append(f"{path}: {error['msg']}" if path else error["msg"])
    return faults
