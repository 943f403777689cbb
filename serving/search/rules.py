"""What a request asks of single tokens: forbidden ones, repeated ones, wished-for ones, drawn ones.

Knows one row: its logits, the tokens it has decoded and the options of its sequence; does not know slots, beams or other rows. So
whatever is asked for here changes nobody else's answer, and costs only those who ask.

Definitions are CTranslate2's: a rule changes the logits, and the log-probabilities are of what it leaves. With
``rules_of_generate`` they are Hugging Face's, whose beam search changes the log-probabilities and does not make them sum to one
again. The order is: repeated tokens, repeated n-grams,
forbidden sequences, an end that would come too early, then the wished-for prefix. Only that end is taken out after the softmax,
as Hugging Face does, with rules and without; so is a token that is passed over, as in Marian.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serving.request import DecodingOptions

_NEVER = -np.inf
# Graphs give tokens that are never decoded a logit below this.
_LEAST_LOGIT = -1e4


class TokenRules:
    """The rules of one sequence."""

    def __init__(self, options: DecodingOptions, eos_id: int, decoder_start_id: int) -> None:
        """Of options that have any; see ``DecodingOptions.has_token_rules``."""
        self._options = options
        self._is_after_softmax = options.rules_of_generate and options.beam_size > 1
        # Counted as decoded already.
        self._first = [decoder_start_id] if options.rules_of_generate else []
        self._end_ids = np.array(options.end_ids or (eos_id,), np.int64)
        self._forbidden = np.array([tokens[0] for tokens in options.suppressed if len(tokens) == 1], np.int64)
        self._forbidden_first = np.array(options.suppressed_first, np.int64)
        self._forbidden_sequences = [tokens for tokens in options.suppressed if len(tokens) > 1]

    def candidates(
        self, logits: NDArray[np.float32], decoded: list[int], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The next tokens of a row.

        Args:
            logits: [V], of all tokens; those that are never decoded have very small ones.
            decoded: the tokens so far, without the start token.
            k: how many are wanted.

        Returns:
            Ids and log-probabilities [k], best first, equal ones by id. Of a sequence that is drawn, the first is what was drawn.
            A token that is forbidden has minus infinity.
        """
        log_probs = self.log_probs(logits, decoded)
        self._drop_needless_ends(log_probs)
        best = np.argpartition(-log_probs, k - 1)[:k] if k < len(log_probs) else np.arange(len(log_probs))
        best = best[np.lexsort((best, -log_probs[best]))]
        if self._options.sampling is not None:
            drawn = self._draw(log_probs, len(decoded))
            best = np.concatenate(([drawn], best[best != drawn]))[:k]
        return best, log_probs[best].astype(np.float32)

    def log_probs(self, logits: NDArray[np.float32], decoded: list[int]) -> NDArray[np.float64]:
        """[V] as ``candidates``; the log-probability of every token after these."""
        options = self._options
        scores = logits.astype(np.float64)
        if self._is_after_softmax:
            scores = _log_softmax(scores)
        if options.repetition_penalty != 1.0 and (seen := np.unique(np.array(self._first + decoded, np.int64))).size:
            kept = scores[seen]
            scores[seen] = np.where(kept < 0, kept * options.repetition_penalty, kept / options.repetition_penalty)
        if options.no_repeat_ngram_size:
            scores[_ends_of_repeated_ngrams(decoded, options.no_repeat_ngram_size)] = _NEVER
        scores[self._forbidden] = _NEVER
        for tokens in self._forbidden_sequences:
            if tuple(decoded[1 - len(tokens) :]) == tokens[:-1]:
                scores[tokens[-1]] = _NEVER
        if len(decoded) == len(options.target_prefix):
            scores[self._forbidden_first] = _NEVER
        scores[logits < _LEAST_LOGIT] = _NEVER
        if scores.max() == _NEVER:
            # Nothing may follow: that is the end.
            scores[self._end_ids[0]] = 0.0
        log_probs = scores if self._is_after_softmax else _log_softmax(scores)
        # As where there are no rules: an end that comes too early keeps its share.
        if len(decoded) < options.min_target_tokens and log_probs[self._end_ids[0]] < 0:
            log_probs[self._end_ids] = _NEVER
        if options.passed_over_id is not None:
            log_probs[options.passed_over_id] = _NEVER
        wished = options.prefix_bias
        if wished is not None and len(decoded) < len(wished.tokens) and tuple(decoded) == wished.tokens[: len(decoded)]:
            probs = np.exp(log_probs) * (1.0 - wished.strength)
            probs[wished.tokens[len(decoded)]] += wished.strength
            with np.errstate(divide="ignore"):
                log_probs = np.log(probs)
        return log_probs

    def _drop_needless_ends(self, log_probs: NDArray[np.float64]) -> None:
        """Leave as many ends as a source has rows: no more are ever kept, and they would take the places of what runs on."""
        width = self._options.beam_size
        if width > 1 and len(self._end_ids) > width:
            order = np.argsort(-log_probs[self._end_ids], kind="stable")
            log_probs[self._end_ids[order[width:]]] = _NEVER

    def _draw(self, log_probs: NDArray[np.float64], position: int) -> int:
        """One token at random, among the ``top_k`` best and of these the fewest that make up ``top_p``.

        What is drawn follows from the seed, the number of the draw and the position alone.
        """
        sampling = self._options.sampling
        assert sampling is not None
        order = np.lexsort((np.arange(len(log_probs)), -log_probs))
        if sampling.top_k:
            order = order[: sampling.top_k]
        scores = log_probs[order]
        probs = np.exp(scores)
        if sampling.top_p < 1.0:
            # The fewest whose sum reaches top_p of the whole; the first always.
            shares = np.cumsum(probs) / probs.sum()
            order = order[: 1 + int(np.searchsorted(shares, sampling.top_p))]
            scores = scores[: len(order)]
        weights = np.exp((scores - scores.max()) / sampling.temperature)
        borders = np.cumsum(weights)
        draw = np.random.Generator(np.random.Philox(key=sampling.seed, counter=position + (self._options.draw << 64))).random()
        return int(order[min(int(np.searchsorted(borders, draw * borders[-1], side="right")), len(order) - 1)])


def _log_softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """[V] -> [V]; one that is minus infinity stays so."""
    scores = scores - scores.max()
    log_probs: NDArray[np.float64] = scores - np.log(np.exp(scores).sum())
    return log_probs


def _ends_of_repeated_ngrams(decoded: list[int], size: int) -> list[int]:
    """Tokens that would make the last ``size`` tokens equal to some that came before."""
    if len(decoded) < size:
        return []
    tail = decoded[len(decoded) - size + 1 :]
    return [decoded[i + size - 1] for i in range(len(decoded) - size + 1) if decoded[i : i + size - 1] == tail]
