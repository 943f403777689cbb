"""Which sources an export is measured on: the certificate's, and those that the scales of int8 come from.

Knows a checkpoint's sample lines and its tokenizer; does not know what is measured on them. No source is on both sides: a graph
is exact on what its scales were made for, and a certificate measured there would say too much.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from export.checkpoint import SAMPLES_NAME, Checkpoint
from serving.bundle import SampleSource
from serving.errors import ExportError
from serving.tokenizers import open_tokenizer

# Sources of a certificate alone, and of one and scales together: an export to int8 takes as long as if 32 were for both.
_MAX_ALONE = 32
_MAX_TOGETHER = 48
# A random source has fewer tokens, without the end-of-sentence token.
_LONGEST_RANDOM = 40


@dataclass(frozen=True, slots=True)
class Samples:
    """Source ids, each with what sources start and end with; all of them different."""

    source: SampleSource
    certify: list[list[int]]
    # For the scales of int8; empty where none are wanted.
    calibrate: list[list[int]]


def draw_samples(checkpoint: Checkpoint, *, calibrate: bool) -> Samples:
    """The checkpoint's own sample sentences or, where it has none, ids drawn from its vocabulary.

    Args:
        checkpoint: what is exported.
        calibrate: whether scales are wanted too: of the first 48 different samples every other one is for the scales, beginning
            with the first, and the rest for the certificate. Without, the first 32 are for the certificate.

    Raises:
        ExportError: both sides are wanted, and there is but one sample.
    """
    wanted = _MAX_TOGETHER if calibrate else _MAX_ALONE
    source: SampleSource = "sentences" if checkpoint.sample_lines else "random_ids"
    drawn = _sentences(checkpoint) if checkpoint.sample_lines else _random_ids(checkpoint, wanted)
    # By their ids: two lines may differ in nothing that the model sees.
    different = list(map(list, dict.fromkeys(map(tuple, drawn))))[:wanted]
    if not calibrate:
        return Samples(source, certify=different, calibrate=[])
    if len(different) < 2:
        raise ExportError(
            f"{SAMPLES_NAME}: int8 needs two different sentences or more, one a line: its scales are measured on every other "
            "one, the certificate on the rest"
        )
    return Samples(source, certify=different[1::2], calibrate=different[::2])


def _sentences(checkpoint: Checkpoint) -> list[list[int]]:
    config = checkpoint.config
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    told = checkpoint.language_tokens
    # Which languages the lines are of is not known: each of the model's has its turn.
    tokens = [] if told is None or told.before_source is None else [told.tokens[code] for code in sorted(told.tokens)]
    end = [config.eos_id] if checkpoint.source_ends_with_eos else []
    sources = []
    for number, line in enumerate(checkpoint.sample_lines):
        first = [*checkpoint.source_prefix, *tokens[number % len(tokens) :][:1]] if tokens else [*checkpoint.source_prefix]
        sources.append([*first, *tokenizer.encode(line)[: config.max_positions - len(first) - len(end)], *end])
    return sources


def _random_ids(checkpoint: Checkpoint, number: int) -> list[list[int]]:
    config = checkpoint.config
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, min(_LONGEST_RANDOM, config.max_positions - 1), number)
    end = [config.eos_id] if checkpoint.source_ends_with_eos else []
    return [[*rng.integers(0, config.source_vocab_size, n).tolist(), *end] for n in lengths]
