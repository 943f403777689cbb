"""Which sources an export is measured on: the certificate's, and those that the scales of int8 come from.

Knows a checkpoint's sample lines, its tokenizer and how it is told of languages; does not know what is measured. No source is
on both sides: a graph is exact on what its scales were made for, and a certificate measured there would say too much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from export.checkpoint import SAMPLES_NAME, Checkpoint
from serving.errors import ExportError
from serving.manifest import SampleSource
from serving.tokenizers import open_tokenizer

# Sources of a certificate alone, and of one and scales together: an export to int8 takes as long as if 32 were for both.
_MAX_ALONE = 32
_MAX_TOGETHER = 48
# A random source has fewer tokens, without the end-of-sentence token.
_LONGEST_RANDOM = 40


@dataclass(frozen=True, slots=True)
class Sample:
    """One source, and what its target starts with."""

    # With what sources start and end with.
    source_ids: tuple[int, ...]
    # Tokens after the start token that the model does not choose.
    target_prefix: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples whose sources are all different."""

    source: SampleSource
    certify: list[Sample]
    # For the scales of int8; empty where none are wanted.
    calibrate: list[Sample]


def draw_samples(checkpoint: Checkpoint, *, calibrate: bool) -> Samples:
    """The checkpoint's own sample sentences or, where it has none, ids drawn from its vocabulary.

    Args:
        checkpoint: what is exported.
        calibrate: whether scales are wanted too: of the first 48 different samples every other one is for the scales, beginning
            with the first, and the rest for the certificate. Without, the first 32 are for the certificate.

    Raises:
        ExportError: both sides are wanted, and there is but one sample; or what is around every text leaves no place for one.
    """
    wanted = _MAX_TOGETHER if calibrate else _MAX_ALONE
    source: SampleSource = "sentences" if checkpoint.sample_lines else "random_ids"
    texts = _sentences(checkpoint) if checkpoint.sample_lines else _random_ids(checkpoint, wanted)
    # Which languages the lines are of is not known: each direction has its turn.
    templates, longest = _templates(checkpoint), checkpoint.config.max_positions
    if (taken := max(template.num_tokens for template in templates)) >= longest:
        raise ExportError(f"source_prefix: takes {taken} of a source's {longest} tokens, with language and end; no text fits in")
    # By their ids: two lines may differ in nothing that the model sees.
    drawn: dict[tuple[int, ...], Sample] = {}
    for number, text in enumerate(texts):
        sample = templates[number % len(templates)].around(text, longest)
        drawn.setdefault(sample.source_ids, sample)
    different = list(drawn.values())[:wanted]
    if not calibrate:
        return Samples(source, certify=different, calibrate=[])
    if len(different) < 2:
        raise ExportError(
            f"{SAMPLES_NAME}: int8 needs two different sentences or more, one a line: its scales are measured on every other "
            "one, the certificate on the rest; with --int8-scales row it needs none"
        )
    return Samples(source, certify=different[1::2], calibrate=different[::2])


@dataclass(frozen=True, slots=True)
class _Template:
    """What is put around a text of one direction."""

    before_source: tuple[int, ...]
    after_source: tuple[int, ...]
    target_prefix: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Of a source, without its text."""
        return len(self.before_source) + len(self.after_source)

    def around(self, text: Sequence[int], longest: int) -> Sample:
        """The sample of a text, which is cut to fit into ``longest`` tokens: more than ``num_tokens``."""
        kept = text[: longest - self.num_tokens]
        return Sample((*self.before_source, *kept, *self.after_source), self.target_prefix)


def _templates(checkpoint: Checkpoint) -> list[_Template]:
    """That of each pair of languages or, of a model that translates any into any, of each language into the next."""
    told, end = checkpoint.language_tokens, (checkpoint.config.eos_id,) if checkpoint.source_ends_with_eos else ()
    if told is None:
        return [_Template(checkpoint.source_prefix, end, checkpoint.target_prefix)]
    known = sorted(told.tokens)
    pairs = [(pair.source, pair.target) for pair in checkpoint.languages]
    templates = []
    for source, target in pairs or zip(known, known[1:] + known[:1], strict=True):
        # Of a side that the model is not told there may be none.
        codes = {"source": source, "target": target}
        before, after = ((told.tokens[codes[side]],) if side else () for side in (told.before_source, told.after_source))
        templates.append(
            _Template(
                (*checkpoint.source_prefix, *before),
                (*end, *after),
                (*((told.tokens[target],) if told.before_target else ()), *checkpoint.target_prefix),
            )
        )
    return templates


def _sentences(checkpoint: Checkpoint) -> list[list[int]]:
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    return [tokenizer.encode(line) for line in checkpoint.sample_lines]


def _random_ids(checkpoint: Checkpoint, number: int) -> list[list[int]]:
    config = checkpoint.config
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, min(_LONGEST_RANDOM, config.max_positions - 1), number)
    return [rng.integers(0, config.source_vocab_size, n).tolist() for n in lengths]
