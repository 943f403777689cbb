"""Multi30k text and batches of ids. Knows the corpus's files and SentencePiece; does not know the model."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from examples.multi30k.recipe import Recipe

PAD_ID, UNKNOWN_ID, BOS_ID, EOS_ID = 0, 1, 2, 3


def read_lines(data: Path, split: str, language: str) -> list[str]:
    """The sentences of one split in one language, from ``SPLIT.LANGUAGE`` or its ``.gz``.

    Raises:
        FileNotFoundError: when neither is in ``data``.
    """
    for path in (data / f"{split}.{language}", data / f"{split}.{language}.gz"):
        if path.exists():
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            return [line.strip() for line in raw.decode("utf-8").splitlines()]
    raise FileNotFoundError(f"no {split}.{language} or {split}.{language}.gz in {data}; see examples/multi30k/README.md")


def train_tokenizer(lines: list[str], path: Path, recipe: Recipe) -> None:
    """Train the joint SentencePiece unigram model and write it to ``path``."""
    with path.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=stream,
            model_type="unigram",
            vocab_size=recipe.vocab_size,
            character_coverage=1.0,
            pad_id=PAD_ID,
            unk_id=UNKNOWN_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            minloglevel=2,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """One optimizer step's sentences, padded to the right."""

    source_ids: Tensor  # [batch, S]
    source_lengths: Tensor  # [batch]
    target_ids: Tensor  # [batch, T], starting with BOS
    next_ids: Tensor  # [batch, T], ending with EOS; PAD where there is no token


def pad(sequences: list[list[int]]) -> Tensor:
    """Ragged ids -> [len(sequences), longest], padded to the right."""
    longest = max(map(len, sequences))
    return torch.tensor([s + [PAD_ID] * (longest - len(s)) for s in sequences])


def make_batch(pairs: list[tuple[list[int], list[int]]]) -> Batch:
    """(source, target) ids without markers -> a padded batch with them."""
    sources = [[*source, EOS_ID] for source, _ in pairs]
    return Batch(
        source_ids=pad(sources),
        source_lengths=torch.tensor([len(s) for s in sources]),
        target_ids=pad([[BOS_ID, *target] for _, target in pairs]),
        next_ids=pad([[*target, EOS_ID] for _, target in pairs]),
    )


class ParallelText:
    """A split's sentence pairs, segmented on demand."""

    def __init__(self, data: Path, split: str, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        self.sources = read_lines(data, split, "en")
        self.targets = read_lines(data, split, "de")
        self._tokenizer = tokenizer

    def encoded(self, *, sampling_alpha: float = 0.0) -> list[tuple[list[int], list[int]]]:
        """Ids of every pair; a fresh sample of segmentations when ``sampling_alpha`` is above 0."""

        def encode(line: str) -> list[int]:
            ids: list[int] = self._tokenizer.encode(line, enable_sampling=sampling_alpha > 0, alpha=sampling_alpha, nbest_size=-1)
            return ids

        return [(encode(source), encode(target)) for source, target in zip(self.sources, self.targets, strict=True)]


def epoch_batches(pairs: list[tuple[list[int], list[int]]], batch_tokens: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Batches of alike lengths within a padded token budget, in random order."""
    noise = rng.random(len(pairs))  # ties, and near ties, fall differently each epoch
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][1]) + len(pairs[i][0]) / 4 + 2 * noise[i])
    groups: list[list[int]] = [[]]
    longest = 0
    for i in order:
        longest = max(longest, len(pairs[i][0]) + 1, len(pairs[i][1]) + 1)
        if groups[-1] and (len(groups[-1]) + 1) * longest > batch_tokens:
            groups.append([])
            longest = max(len(pairs[i][0]), len(pairs[i][1])) + 1
        groups[-1].append(i)
    for g in rng.permutation(len(groups)):
        yield make_batch([pairs[i] for i in groups[g]])
