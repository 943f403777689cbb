"""From targets that are given to what the engine decodes, and back to how probable the model finds each of their tokens.

Knows targets, as text and as tokens, and the model's rules; does not know the engine, threads, event loops or messages.

What is told is CTranslate2's ``score_batch``: of each token of a target, and of the end-of-sentence token after them, the
log-probability after all that comes before it. A target that is blank has that end alone. What the model is told before every
target (its start, the token of a language) is given to it and not scored.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from serving.errors import InvalidRequestError
from serving.preparation import UNTOLD, Direction, TextPreparer
from serving.request import DecodingOptions, Outcome, SequenceTimings
from serving.target_tokens import named_id, prefix_ids

# Of all targets of a request together: in an answer that is to be below the 4 MiB that gRPC's clients take by default.
_MOST_SCORED = 2**17


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTarget:
    """How probable the model finds one target of one text."""

    # As the vocabulary spells them, the end-of-sentence token last; none where text and target are blank.
    tokens: tuple[str, ...] = ()
    # Of each token, natural logarithm.
    log_probs: tuple[float, ...] = ()
    # Their sum.
    log_prob: float = 0.0
    # Tokens the encoder read, the end-of-sentence token included; 0 for a blank text, which is not encoded.
    source_tokens: int = 0
    timings: SequenceTimings = field(default_factory=SequenceTimings)


def check_targets(num_texts: int, targets: Collection[str], target_tokens: Collection[Sequence[str]]) -> None:
    """Refuse targets that are not one a text, before any of them is looked at.

    Raises:
        InvalidRequestError: naming ``targets`` or ``target_tokens``.
    """
    if targets and target_tokens:
        raise InvalidRequestError("target_tokens", "are instead of targets: leave out one of the two")
    name, count = ("target_tokens", len(target_tokens)) if target_tokens else ("targets", len(targets))
    if count != num_texts:
        raise InvalidRequestError(name, f"must be as many as texts, {num_texts}, not {count}")


def check_size(num_tokens: int, field_name: str) -> None:
    """Refuse targets of so many tokens in all, their ends included.

    Raises:
        InvalidRequestError: naming ``field_name``: the answer could become too large.
    """
    if num_tokens > _MOST_SCORED:
        raise InvalidRequestError(field_name, f"have over {_MOST_SCORED} tokens together; that many can be scored in a request")


def scoring_options(target_ids: tuple[int, ...], direction: Direction = UNTOLD) -> DecodingOptions:
    """How a target is decoded, ids of ``TargetScorer.target_ids``: as the model has it, without any of its default options."""
    before = direction.before_target
    return DecodingOptions(
        # The score is a sum.
        length_penalty=0.0,
        max_target_tokens=len(before) + len(target_ids),
        return_token_scores=True,
        target_prefix=before,
        hidden_prefix_tokens=len(before),
        given_target=target_ids,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetScorer:
    """Targets of one model. Pure: the same text and target give the same ids."""

    preparer: TextPreparer

    def target_ids(self, target: str | Sequence[str], field_name: str, source_tokens: int) -> tuple[int, ...]:
        """All tokens of a target, the end-of-sentence token last; none where the text is blank too.

        Args:
            target: text, or tokens as the vocabulary spells them. That of unknown text is one of these, as an answer may hold it.
            field_name: how the protocol calls it, for example ``targets[3]``.
            source_tokens: of its text; 0: that is blank.

        Raises:
            InvalidRequestError: the target is longer than a translation may be, it is nothing that the model can write, or it is
                not blank and its text is. Nothing is cut silently.
        """
        preparer = self.preparer
        longest = preparer.limits.max_target_tokens
        if isinstance(target, str):
            ids = prefix_ids(target, field_name, preparer.tokenizer, longest)
            num_tokens = len(ids)
        else:
            # Before each is looked up.
            num_tokens = len(target)
            ids = () if num_tokens >= longest else self._named_ids(target, field_name)
        if num_tokens and not source_tokens:
            raise InvalidRequestError(field_name, "belongs to a blank text, whose translation is blank")
        if num_tokens >= longest:
            reason = f"has {num_tokens + 1} tokens with the end-of-sentence token; at most {longest} can be scored at once"
            raise InvalidRequestError(field_name, reason)
        return (*ids, preparer.eos_id) if source_tokens else ()

    def _named_ids(self, tokens: Sequence[str], field_name: str) -> tuple[int, ...]:
        tokenizer = self.preparer.tokenizer
        unknown_id = tokenizer.unknown_target_id
        unknown = {} if unknown_id is None else {tokenizer.target_pieces([unknown_id])[0]: unknown_id}
        return tuple(unknown[token] if token and token in unknown else named_id(token, field_name, tokenizer) for token in tokens)

    def scored(self, target_ids: tuple[int, ...], source_tokens: int, outcome: Outcome) -> ScoredTarget:
        """What a successful outcome says of a target's ids of ``target_ids``."""
        (hypothesis,) = outcome.hypotheses
        assert hypothesis.token_scores is not None, "they were asked for"
        assert hypothesis.score is not None, "it was asked for"
        return ScoredTarget(
            tokens=tuple(self.preparer.tokenizer.target_pieces(target_ids)),
            log_probs=hypothesis.token_scores,
            log_prob=hypothesis.score,
            source_tokens=source_tokens,
            timings=outcome.timings,
        )
