"""Text that comes as tokens, and leaves as tokens: somebody else cuts it and puts it together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from serving.manifest import TokensTokenizerSpec
from serving.tokenizers.base import (
    TokenizerFiles,
    check_special_tokens,
    contents_of,
    read_vocabulary,
    same_token,
    vocabulary_faults,
    without_tokens,
)


class TokensTokenizer:
    """Tokens are what has white space between; ids are those of the vocabularies. Any number of threads may use it."""

    def __init__(
        self,
        source_vocabulary: Mapping[str, int],
        target_vocabulary: Mapping[str, int],
        unknown_id: int,
        special_tokens: Sequence[str] = (),
    ) -> None:
        """From vocabularies, token -> id; see ``load``."""
        self._largest_ids = max(unknown_id, *source_vocabulary.values()), max(target_vocabulary.values())
        self._unknown_id = unknown_id
        self._ids = without_tokens(source_vocabulary, special_tokens)
        self._unknown_target_id = same_token(unknown_id, source_vocabulary, target_vocabulary)
        self._target_ids = without_tokens(target_vocabulary, special_tokens)
        self._tokens = {i: token for token, i in self._target_ids.items()}
        self._spelled = {i: token for token, i in target_vocabulary.items()}

    @classmethod
    def load(cls, spec: TokensTokenizerSpec, files: TokenizerFiles) -> TokensTokenizer:
        """Load the vocabularies.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is no vocabulary, or a special token is in none.
        """
        source, target = (
            read_vocabulary(name, contents_of(files, name)) for name in (spec.source_vocabulary, spec.target_vocabulary)
        )
        check_special_tokens(spec.special_tokens, source, target)
        return cls(source, target, spec.unknown_id, spec.special_tokens)

    def vocabulary_faults(self, source_vocab_size: int, target_vocab_size: int) -> list[str]:
        """See ``ModelTokenizer``."""
        return vocabulary_faults(*self._largest_ids, source_vocab_size, target_vocab_size)

    def encode(self, text: str) -> list[int]:
        """See ``Tokenizer.encode``. A token that the source vocabulary lacks, or that is no text, becomes the unknown one."""
        text.encode()  # a lone surrogate is refused, although it might be unknown like any other
        return [self._ids.get(token, self._unknown_id) for token in text.split()]

    @property
    def unknown_target_id(self) -> int | None:
        """See ``Tokenizer``."""
        return self._unknown_target_id

    def encode_target(self, text: str) -> list[int] | None:
        """See ``Tokenizer.encode_target``."""
        text.encode()  # as ``encode``
        tokens = text.split()
        ids = [self._target_ids[token] for token in tokens if token in self._target_ids]
        return None if len(ids) < len(tokens) or self._unknown_target_id in ids else ids

    def target_forms(self, text: str) -> list[list[int]]:
        """See ``Tokenizer.target_forms``."""
        return [ids] if (ids := self.encode_target(text)) else []

    def target_id(self, token: str) -> int | None:
        """See ``Tokenizer.target_id``."""
        return self._target_ids.get(token)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.decode``. Tokens with a space between each two."""
        return self.decode_with(ids, {})

    def decode_with(self, ids: Sequence[int], instead: Mapping[int, str]) -> str:
        """See ``Tokenizer.decode_with``."""
        return " ".join(token for place, i in enumerate(ids) if (token := instead.get(place) or self._tokens.get(i)))

    def source_pieces(self, text: str) -> list[str]:
        """See ``Tokenizer.source_pieces``."""
        text.encode()  # as ``encode``
        return text.split()

    def target_pieces(self, ids: Sequence[int]) -> list[str]:
        """See ``Tokenizer.target_pieces``."""
        return [self._spelled.get(i, "") for i in ids]

    def certain_text(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.certain_text``. All of it: what follows is appended."""
        return self.decode(ids)
