"""What the tokens of a translation attended to, as text: pieces of both sides, and pieces of the source for what was unknown.

Knows the tokenizer and hypotheses; does not know requests, languages, messages or the engine.

Definitions are CTranslate2's. What is told is the attention to the tokens of the text alone, not to those that a model reads
before and after every source, so that the shares of a token need not add up to 1; and an unknown token becomes the piece that it
attended to most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.request import Hypothesis
from serving.tokenizers import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendedSource:
    """A source of which it is asked what attended to it."""

    # Of the text, as ``Tokenizer.source_pieces`` has them.
    pieces: tuple[str, ...]
    # Tokens that the model reads before them.
    tokens_before: int
    # Whether the attention itself is told.
    is_told: bool
    # Whether unknown tokens of the target are replaced.
    replaces_unknowns: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendedTarget:
    """A hypothesis as text."""

    text: str
    # Of each of its tokens; those that were replaced are pieces of the source.
    pieces: tuple[str, ...]
    # [its pieces, the source's pieces]
    attention: NDArray[np.float32]


def attended_target(hypothesis: Hypothesis, source: AttendedSource, tokenizer: Tokenizer) -> AttendedTarget:
    """The text of a hypothesis whose attention was asked for."""
    assert hypothesis.attention is not None, "it was not asked for"
    ids = list(hypothesis.target_ids)
    # [target tokens, source tokens] -> those of the text
    attention = hypothesis.attention[:, source.tokens_before : source.tokens_before + len(source.pieces)]
    instead: dict[int, str] = {}
    if source.replaces_unknowns:
        unknown_id = tokenizer.unknown_target_id
        instead = {place: source.pieces[int(attention[place].argmax())] for place, i in enumerate(ids) if i == unknown_id}
    pieces = tokenizer.target_pieces(ids)
    return AttendedTarget(
        text=tokenizer.decode_with(ids, instead) if instead else tokenizer.decode(ids),
        pieces=tuple(instead.get(place, piece) for place, piece in enumerate(pieces)),
        attention=attention,
    )
