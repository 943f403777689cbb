"""What a request asks of targets, as tokens: how they start, what they never hold, what ends them.

Knows options and the tokenizer; does not know sources, languages, lengths or the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from serving.errors import InvalidRequestError
from serving.request_options import MOST_SUPPRESSED_TOKENS, RequestOptions
from serving.tokenizers import Tokenizer

_T = TypeVar("_T")

# A text of more characters than this for each token it may have is refused before it is tokenized, because tokenizing megabytes
# would hold up everybody else. A SentencePiece piece has at most 16 characters unless a model was trained otherwise.
MAX_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTokens:
    """What the options of a request come to in tokens, the same for each of its texts."""

    suppressed: tuple[tuple[int, ...], ...] = ()
    # Empty: those of the model.
    end_ids: tuple[int, ...] = ()


# Of options that ask for none.
NO_TOKENS = TargetTokens()


def target_tokens(options: RequestOptions, tokenizer: Tokenizer, model_end_ids: tuple[int, ...]) -> TargetTokens:
    """What checked options suppress, and what they end at, as tokens.

    Args:
        options: of the request.
        tokenizer: of the model.
        model_end_ids: the tokens that end a target by themselves, which may be named as ends though they are no text.

    Raises:
        InvalidRequestError: naming the option: a text that is blank or too long, a token that the target does not have, or a
            tokenizer that cuts no text of the target.
    """
    suppressed: list[tuple[int, ...]] = []
    if options.suppress_unknown and tokenizer.unknown_target_id is not None:
        suppressed.append((tokenizer.unknown_target_id,))
    for place, text in enumerate(options.suppressed_texts):
        suppressed += _suppressed_forms(text, f"options.suppressed_texts[{place}]", tokenizer)
    for place, tokens in enumerate(options.suppressed_sequences):
        suppressed.append(_named_ids(tokens, f"options.suppressed_sequences[{place}]", tokenizer))
    end_ids = _end_ids(options.end_tokens, tokenizer, model_end_ids) if options.end_tokens else ()
    return TargetTokens(suppressed=tuple(suppressed), end_ids=end_ids)


def _suppressed_forms(text: str, field_name: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    most = MOST_SUPPRESSED_TOKENS
    if not text or text.isspace():
        raise InvalidRequestError(field_name, "is blank")
    forms = tokenized(tokenizer.target_forms, text, field_name)
    longest = max(map(len, forms), default=0)
    if longest > most:
        raise InvalidRequestError(field_name, f"has {longest} tokens; at most {most} can be suppressed together")
    # None where the target cannot write it.
    return [tuple(form) for form in forms]


def _end_ids(tokens: Iterable[str], tokenizer: Tokenizer, model_end_ids: tuple[int, ...]) -> tuple[int, ...]:
    own = dict(zip(tokenizer.target_pieces(model_end_ids), model_end_ids, strict=True))
    own.pop("", None)  # of a model whose vocabulary does not spell it
    ids = [own.get(token, tokenizer.target_id(token)) for token in tokens]
    if unknown := [token for token, found in zip(tokens, ids, strict=True) if found is None]:
        reason = f"{unknown[0][:40]!r} is no token of text in the model's target vocabulary"
        if own:
            reason += f", nor the model's own end, {' or '.join(map(repr, own))}"
        raise InvalidRequestError("options.end_tokens", reason)
    # Each once: a search counts them.
    return tuple(dict.fromkeys(found for found in ids if found is not None))


def _named_ids(tokens: Iterable[str], field_name: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(named_id(token, field_name, tokenizer) for token in tokens)


def named_id(token: str, field_name: str, tokenizer: Tokenizer) -> int:
    """The id of a token as the vocabulary spells it.

    Raises:
        InvalidRequestError: naming ``field_name``: the target does not have it, or it is no text.
    """
    found = tokenizer.target_id(token)
    if found is None:
        raise InvalidRequestError(field_name, f"{token[:40]!r} is no token of text in the model's target vocabulary")
    return found


def prefix_ids(text: str, field_name: str, tokenizer: Tokenizer, most_tokens: int) -> tuple[int, ...]:
    """Tokens of what a target starts with; empty for blank text.

    Raises:
        InvalidRequestError: naming ``field_name``: the model cannot write the text, or it is far longer than so many tokens.
    """
    if not text or text.isspace():
        return ()
    if len(text) > most_tokens * MAX_CHARACTERS_PER_TOKEN:
        raise InvalidRequestError(field_name, f"has {len(text)} characters; a translation has at most {most_tokens} tokens")
    ids = tokenized(tokenizer.encode_target, text, field_name)
    if ids is None:
        raise InvalidRequestError(field_name, "holds characters that the model's target vocabulary does not have")
    return tuple(ids)


def tokenized(encode: Callable[[str], _T], text: str, field_name: str) -> _T:
    """What a tokenizer makes of a text of this name, or an error that names it."""
    try:
        return encode(text)
    except UnicodeEncodeError as error:
        raise InvalidRequestError(field_name, "holds a lone surrogate, which is not text") from error
    except ValueError as error:  # of a tokenizer that only cuts sources
        raise InvalidRequestError(field_name, str(error)) from error
