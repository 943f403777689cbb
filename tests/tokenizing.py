"""What tests of all kinds of tokenizers need: text that is hard on them, and what a stream tells."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from hypothesis import strategies as st

from serving.tokenizers import StreamingDetokenizer, Tokenizer
from tests.support import GERMAN_LINES, train_sentencepiece

# Text that a client may send and that nobody had in mind.
ODD_TEXTS = (
    "a\0man",
    "a\x07man",
    "line\nline",
    "a\u00a0\u3000b",
    "\u200b\ufeff",
    "\ufffd",
    "\U0001f600",
    "\U0001f469\u200d\U0001f4bb",
    "e\u0301\u0323",
    "\u0301",
    "\u202emirrored\u202c",
    "\u0634\u0643\u0631\u0627",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u4e00\u4e8c\u4e09\u56db",
    "\U0010ffff",
    "a" * 5000,
)
# All of Unicode but surrogates, and often what some kind of tokenizer treats in a way of its own.
ANY_TEXT = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(
            ["a man", " ", "  ", "@@", "@-@", "</w>", "\u2581", "&apos;", "'s", '"', ",", "</s>", "<unk>", "<0xE2>", ">>deu<<"]
        ),
    ),
    max_size=8,
).map("".join)


def stream(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What is told after each token, and at the end."""
    detokenizer = StreamingDetokenizer(tokenizer)
    return [*(detokenizer.push([i]) for i in ids), detokenizer.finish()]


@functools.cache
def with_byte_pieces() -> bytes:
    """Characters that training did not see become the pieces of their UTF-8 bytes."""
    return train_sentencepiece(vocab_size=320, byte_fallback=True)


@functools.cache
def german_sentencepiece() -> bytes:
    """A model of another size than the tiny one."""
    return train_sentencepiece(GERMAN_LINES, vocab_size=50)
