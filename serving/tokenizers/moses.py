"""Words of a text and the text of words, as the scripts of the Moses toolkit have them; sacremoses does the work.

Knows what sacremoses does wrong or slowly, and from which word on its text may still change.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serving.manifest import MosesSpec

if TYPE_CHECKING:
    from sacremoses import MosesPunctNormalizer, MosesTokenizer

# Between the halves of a word that was cut at its dash.
_DASH = "@-@"
# What sacremoses makes of a Czech word depends on the last words of the sentence.
_UNCERTAIN_LANGUAGES = frozenset(("cs",))
# sacremoses takes time that grows with the square of such a run's length. None as long as this is language: it may be cut.
_LONG_RUN = re.compile(r"([.\u2026]{100}|(?:DOT){100})(?=[.\u2026D])")


class Moses:
    """One model's rules. Any number of threads may use it."""

    def __init__(self, spec: MosesSpec) -> None:
        """Load the rules.

        Raises:
            ImportError: sacremoses is not installed.
        """
        from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer

        self._spec = spec
        self._normalizer = MosesPunctNormalizer(
            spec.source_language, pre_replace_unicode_punct=True, post_remove_control_chars=True
        )
        self._target_normalizer = MosesPunctNormalizer(
            spec.target_language, pre_replace_unicode_punct=True, post_remove_control_chars=True
        )
        self._tokenizer = MosesTokenizer(spec.source_language)
        self._target_tokenizer = MosesTokenizer(spec.target_language)
        _hasten(self._tokenizer)
        _hasten(self._target_tokenizer)
        self._detokenizer = MosesDetokenizer(spec.target_language)
        self._simple_detokenizer = MosesDetokenizer("")

    def split(self, text: str) -> list[str]:
        """The words of a source; those of Moses have no white space."""
        return self._split(text, self._normalizer, self._tokenizer)

    def split_target(self, text: str) -> list[str]:
        """The words of a target."""
        return self._split(text, self._target_normalizer, self._target_tokenizer)

    def _split(self, text: str, normalizer: MosesPunctNormalizer, tokenizer: MosesTokenizer) -> list[str]:
        text = _LONG_RUN.sub(r"\1 ", text)
        if self._spec.normalize_punctuation:
            text = normalizer.normalize(text)
        tokenized: str = tokenizer.tokenize(
            text, aggressive_dash_splits=self._spec.aggressive_dash_splits, return_str=True, escape=self._spec.escape
        )
        return tokenized.split()

    def join(self, words: Sequence[str]) -> str:
        """The text of words."""
        try:
            text: str = self._detokenizer.detokenize(words)
        except TypeError:
            # sacremoses 0.2.0 stumbles over "e' - mail" and the like in Czech; without rules for a language it does not.
            text = self._simple_detokenizer.detokenize(words)
        return text

    def certain_words(self, words: Sequence[str]) -> Sequence[str]:
        """The first words: those whose text is how the text of these words begins, and of any more of them.

        Words are put together from the left, and each at most takes away the space before the next, so that the text of a word is
        certain when the next one is there and is none that a dash makes one with it.
        """
        if self._spec.target_language in _UNCERTAIN_LANGUAGES:
            return ()
        for certain in range(len(words) - 1, 0, -1):
            if _DASH not in words[certain - 1 : certain + 1]:
                return words[:certain]
        return ()


def _hasten(tokenizer: MosesTokenizer) -> None:
    """Replace what makes a set of all letters anew for each word that ends in a full stop: milliseconds for a sentence."""
    letters, small_letters = frozenset(tokenizer.IsAlpha), frozenset(tokenizer.IsLower)
    tokenizer.isanyalpha = lambda text: not letters.isdisjoint(text)
    tokenizer.islower = small_letters.issuperset
