"""What is translated: real captions with their references, or random ids of a given length."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TEST_SPLIT = "test_2016_flickr"


@dataclass(frozen=True, slots=True)
class Captions:
    """Sentences and their human translations, in the same order."""

    sources: tuple[str, ...]
    references: tuple[str, ...]

    def first(self, count: int) -> Captions:
        """The first ones."""
        return Captions(self.sources[:count], self.references[:count])


def read_captions(data: Path, split: str = TEST_SPLIT) -> Captions:
    """English captions with German references, from ``SPLIT.en.gz`` and ``SPLIT.de.gz``.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: they are not of the same length.
    """
    sources, references = (
        tuple(line.strip() for line in gzip.decompress((data / f"{split}.{language}.gz").read_bytes()).decode().splitlines())
        for language in ("en", "de")
    )
    if len(sources) != len(references):
        raise ValueError(f"{split}: {len(sources)} sources, but {len(references)} references")
    return Captions(sources, references)


def random_sources(count: int, length: int, ids: range, eos_id: int, *, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Sources of ``length`` tokens each, the end-of-sentence token counted; the same for the same arguments."""
    generator = random.Random(f"{seed} {count} {length}")
    return tuple((*(generator.choice(ids) for _ in range(length - 1)), eos_id) for _ in range(count))


def bleu_scorer() -> Callable[[Sequence[str], Sequence[str]], float]:
    """What scores answers against references: corpus BLEU as sacreBLEU defines it, 13a tokenization, cased.

    Ask for it before anything is measured: what is missing is better missed then.

    Raises:
        ImportError: sacrebleu is not installed.
    """
    import sacrebleu

    def bleu(answers: Sequence[str], references: Sequence[str]) -> float:
        return float(sacrebleu.corpus_bleu(list(answers), [list(references)]).score)

    return bleu
