"""The settings of Hugging Face's ``generate`` that come with a checkpoint, and what they become in a bundle.

``generation_config.json`` has them or, where there is none, ``config.json`` itself. Knows what each setting means and how its
counts differ from ours; does not know any architecture or tokenizer.

**Lengths.** ``max_length`` and ``min_length`` count every token of a target, the start token too; ``max_new_tokens`` and
``min_new_tokens`` all but that. A minimum is of tokens before the end-of-sentence token. A bundle's defaults count what is the
translation's own: no token that a target is made to start with.

**Search.** Penalties, lengths and when to stop are a bundle's defaults. The number of beams is not: it is recorded, and decoding
is greedy unless a request says otherwise, also where the checkpoint would draw tokens, of which the user is told. Settings for
single tasks (``task_specific_params``) are not looked at, as ``generate``
does not. With ``renormalize_logits`` rules are CTranslate2's, which is the same for all but ``repetition_penalty`` with beams.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from export.checkpoint.hugging_face import CONFIG_NAME, GENERATION_CONFIG_NAME, one_of, read_json, setting_faults
from export.model import ModelConfig
from serving.manifest import DefaultOptions, field_faults

# Settings that change what is decoded in a way that a bundle does not, and the values with which they change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "constraints": (None, []),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_decoder_ids": (None, []),
    "guidance_scale": (None, 1),
    "penalty_alpha": (None, 0),
    "sequence_bias": (None, {}, []),
    "stop_strings": (None, [], ""),
    "watermarking_config": (None,),
}
# Those of how to search, which is the request's choice, and the values with which it is greedy or by beams that do not differ.
_SEARCH: Mapping[str, tuple[Any, ...]] = {
    "diversity_penalty": (None, 0),
    "do_sample": (None, False),
    "num_beam_groups": (None, 1),
}
# Settings that are default options of a bundle under the same name.
_SAME = ("length_penalty", "early_stopping", "repetition_penalty", "no_repeat_ngram_size")
_START = "decoder_start_token_id"


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """What ``generate`` is told by a checkpoint alone. A setting that is None is not stated."""

    # The file that they come from, for faults.
    file_name: str
    values: Mapping[str, Any]
    # What ``config.json`` holds.
    document: Mapping[str, Any]

    @property
    def num_beams(self) -> int | None:
        """How many beams the checkpoint's makers chose; None: they did not."""
        number = self.values.get("num_beams")
        return number if type(number) is int and number > 0 else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user has to know of settings that are read as others, a line each."""
        warnings = []
        if self.values.get("early_stopping") == "never":
            warnings.append("early_stopping: 'never' is not supported; a beam search may end earlier, as with False")
        if chosen := [f"{name} {self.values[name]!r}" for name in _SEARCH if self.values.get(name) not in _SEARCH[name]]:
            warnings.append(f"{', '.join(chosen)}: decoding is greedy unless a request asks for beams or sampling")
        return tuple(f"{self.file_name}: {warning}" for warning in warnings)

    def start(self, *, has_default: bool) -> dict[str, Any]:
        """The field of ``config.json`` that states the start token, with the token that ``generate`` starts targets with.

        That is ``decoder_start_token_id`` or else ``bos_token_id``. Nothing where neither is stated.

        Args:
            has_default: whether the family has a start token for a ``config.json`` that does not mention any.
        """
        sources = [] if self.values is self.document else [self.values]
        if not has_default or _START in self.document:
            sources.append(self.document)
        stated = [source.get(name) for source in sources for name in (_START, "bos_token_id")]
        return next(({_START: token_id} for token_id in stated if token_id is not None), {})

    def forced_start(self, config: ModelConfig, faults: list[str]) -> int | None:
        """The token that every target is made to start with after the start token; None when there is none."""
        forced = one_of(self.values.get("forced_bos_token_id"))
        # What old versions wrote in the configuration instead.
        if forced is None and self.values.get("force_bos_token_to_be_generated"):
            forced = self.values.get("bos_token_id", 0)
        if forced is None:
            return None
        if type(forced) is not int or not 0 <= forced < config.target_vocab_size or forced in (config.eos_id, config.pad_id):
            faults.append(f"{self.file_name}: forced_bos_token_id: {forced!r} cannot start a target")
            return None
        return forced

    def defaults(self, config: ModelConfig, *, hidden_tokens: int, faults: list[str]) -> DefaultOptions:
        """What a bundle's defaults are.

        Args:
            config: the architecture.
            hidden_tokens: how many tokens a target is made to start with that are no part of its text.
            faults: of the whole checkpoint so far; every setting that a bundle has no place for is one.
        """
        found = setting_faults(self.values, _NEUTRAL)
        stated_ends = self._ends(config, found)
        suppressed = self._suppressed(config, stated_ends, found)
        ends = [token_id for token_id in stated_ends if [token_id] not in suppressed]
        if not ends:
            found.append(f"suppress_tokens: has {stated_ends}, all the tokens that end a target")
        forced = self._tokens("forced_eos_token_id", config, found)
        if not set(forced) <= set(ends):
            found.append(f"forced_eos_token_id: {forced} is not supported, only tokens that end a target, {ends}")
        chosen = {name: self.values[name] for name in _SAME if self.values.get(name) is not None}
        if chosen.get("early_stopping") == "never":
            del chosen["early_stopping"]
        chosen["ends_when_cut"] = self.values.get("forced_eos_token_id") is not None
        chosen["rules_of_generate"] = not self.values.get("renormalize_logits")
        chosen["end_ids"] = [] if ends == [config.eos_id] else ends
        chosen["suppressed"] = suppressed
        chosen["suppressed_first"] = self._tokens("begin_suppress_tokens", config, found)
        chosen |= self._lengths(hidden_tokens, found)
        try:
            options = DefaultOptions.model_validate(chosen)
        except ValidationError as error:
            found += field_faults(error.errors())
            options = DefaultOptions()
        faults += [f"{self.file_name}: {fault}" for fault in found]
        return options

    def _ends(self, config: ModelConfig, faults: list[str]) -> list[int]:
        """The tokens that end a target: those that are stated, or else that of the architecture."""
        stated = self._tokens("eos_token_id", config, faults)
        # As padding has no place in a target, it ends none either.
        return [token_id for token_id in dict.fromkeys(stated) if token_id not in config.never_decoded] or [config.eos_id]

    def _tokens(self, name: str, config: ModelConfig, faults: list[str]) -> list[int]:
        """Tokens that a setting states, one or a list of them; none where it does not, or after a fault."""
        stated = self.values.get(name)
        tokens = [] if stated is None else stated if isinstance(stated, list) else [stated]
        if not all(type(token_id) is int and 0 <= token_id < config.target_vocab_size for token_id in tokens):
            faults.append(f"{name}: {stated!r}: is no token of the vocabulary, nor a list of such")
            return []
        return tokens

    def _suppressed(self, config: ModelConfig, ends: list[int], faults: list[str]) -> list[list[int]]:
        """Sequences of tokens that no target has, without those that a bundle never decodes anyway.

        ``generate`` leaves ends out of ``bad_words_ids``, and takes them by ``suppress_tokens``.
        """
        sequences = list[list[int]]()
        for name in ("bad_words_ids", "suppress_tokens"):
            stated = self.values.get(name)
            # Tokens are sequences of one.
            listed = [one if name == "bad_words_ids" else [one] for one in stated] if isinstance(stated, list) else stated
            if not _are_sequences(listed or [], config.target_vocab_size):
                faults.append(f"{name}: {stated!r}: is no list of tokens of the vocabulary")
                continue
            without = [[token_id] for token_id in (*config.never_decoded, *(ends if name == "bad_words_ids" else ()))]
            sequences += [sequence for sequence in listed or [] if sequence not in without]
        return sequences

    def _lengths(self, hidden_tokens: int, faults: list[str]) -> dict[str, int]:
        """The shortest and the longest target, where they are stated."""

        def count(name: str, extra: int) -> int | None:
            number = self.values.get(name)
            if number is None:
                return None
            if type(number) is not int or number < 0:
                faults.append(f"{name}: {number!r}: is no number of tokens")
                return None
            return number - extra - hidden_tokens

        lengths = {}
        shortest = [number for number in (count("min_length", 1), count("min_new_tokens", 0)) if number is not None]
        if shortest and max(shortest) > 0:
            lengths["min_target_tokens"] = max(shortest)
        of_length, of_new = count("max_length", 1), count("max_new_tokens", 0)
        longest = of_length if of_new is None else of_new
        if longest is not None:
            if longest < max(1, lengths.get("min_target_tokens", 0)):
                faults.append("max_length, max_new_tokens: leave no room for a target, or for the shortest one")
            else:
                lengths["max_target_tokens"] = longest
        return lengths


def _are_sequences(value: Any, vocab_size: int) -> bool:
    """Whether a value is a list of lists of a vocabulary's ids, none of which is empty."""
    return isinstance(value, list) and all(
        isinstance(ids, list) and ids and all(type(token_id) is int and 0 <= token_id < vocab_size for token_id in ids)
        for ids in value
    )


def read_generation(directory: Path, document: Mapping[str, Any] | None, faults: list[str]) -> GenerationSettings:
    """The settings of a directory whose ``config.json`` holds ``document``."""
    document = document or {}
    own = read_json(directory / GENERATION_CONFIG_NAME, faults)
    if own is None:
        return GenerationSettings(CONFIG_NAME, document, document)
    return GenerationSettings(GENERATION_CONFIG_NAME, own, document)
