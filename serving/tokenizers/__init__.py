"""Text to token ids and back, also piece by piece: one module a kind of tokenizer, and ``streaming.py``.

Knows which kind a spec describes; does not know limits, the end-of-sentence token of a model, or requests. Libraries that only
some kinds need are imported when such a tokenizer is opened.
"""

from __future__ import annotations

from serving.bundle import Bundle
from serving.errors import BundleError
from serving.manifest import (
    AnyTokenizerSpec,
    HuggingFaceTokenizerSpec,
    MarianTokenizerSpec,
    SubwordNmtTokenizerSpec,
    TokenizerSpec,
    TokensTokenizerSpec,
)
from serving.tokenizers.base import ModelTokenizer, Tokenizer, TokenizerFiles
from serving.tokenizers.hugging_face import HuggingFaceTokenizer
from serving.tokenizers.marian import MarianTokenizer
from serving.tokenizers.sentence_piece import SentencePieceTokenizer
from serving.tokenizers.streaming import StreamingDetokenizer
from serving.tokenizers.subword_nmt import SubwordNmtTokenizer
from serving.tokenizers.tokens import TokensTokenizer

__all__ = ["ModelTokenizer", "StreamingDetokenizer", "Tokenizer", "TokenizerFiles", "load_tokenizer", "open_tokenizer"]


def open_tokenizer(spec: AnyTokenizerSpec, files: TokenizerFiles) -> ModelTokenizer:
    """The tokenizer that a spec describes; ``files`` has each of its ``file_names``.

    Raises:
        OSError: a file cannot be read.
        ValueError: files are not what the spec says they are, or a library that this kind needs is not installed; names them.
    """
    match spec:
        case TokenizerSpec():
            return SentencePieceTokenizer.load(spec, files)
        case MarianTokenizerSpec():
            return MarianTokenizer.load(spec, files)
        case TokensTokenizerSpec():
            return TokensTokenizer.load(spec, files)
        case HuggingFaceTokenizerSpec():
            return HuggingFaceTokenizer.load(spec, files)
        case SubwordNmtTokenizerSpec():
            return SubwordNmtTokenizer.load(spec, files)


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a bundle.

    Raises:
        BundleError: its files are no such tokenizer, or not this model's.
    """
    spec, sizes = bundle.manifest.tokenizer, bundle.manifest.architecture
    try:
        tokenizer = open_tokenizer(spec, {name: bundle.path(name) for name in spec.file_names})
    except (OSError, ValueError) as error:
        raise BundleError(bundle.directory, [str(error)]) from error
    if faults := tokenizer.vocabulary_faults(sizes.source_vocab_size, sizes.target_vocab_size):
        raise BundleError(bundle.directory, faults)
    return tokenizer
