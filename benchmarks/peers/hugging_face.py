"""Hugging Face transformers, through ``MarianMTModel.generate``: padded batches, one after the other, sorted by length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers

from benchmarks.peers.base import Job, PeerSpec, longest_first

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class HuggingFacePeer:
    """A loaded Marian model."""

    def __init__(self, spec: PeerSpec) -> None:
        torch.set_num_threads(spec.split.threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model = transformers.MarianMTModel.from_pretrained(spec.directory, dtype=_DTYPES[spec.precision])
        self._model = model.to(spec.device).eval()
        # The others do not force an end on what reaches the limit.
        self._model.generation_config.forced_eos_token_id = None
        self._spec = spec

    def prepare(self, job: Job) -> None:
        """There is nothing to prepare."""

    def translate(self, sources: Sequence[tuple[int, ...]], job: Job) -> list[tuple[int, ...]]:
        """As ``Peer`` says."""
        order = longest_first(sources)
        found: dict[int, tuple[int, ...]] = {}
        for start in range(0, len(order), job.batch):
            places = order[start : start + job.batch]
            found.update(zip(places, self._generate([sources[i] for i in places], job), strict=True))
        return [found[i] for i in range(len(sources))]

    def _generate(self, sources: list[tuple[int, ...]], job: Job) -> list[tuple[int, ...]]:
        config = self._model.generation_config
        longest = max(map(len, sources))
        padded = [[*source, *[config.pad_token_id] * (longest - len(source))] for source in sources]
        ids = torch.tensor(padded, device=self._spec.device)  # [batch, longest]
        real = [[int(j < len(source)) for j in range(longest)] for source in sources]
        with torch.inference_mode():
            generated = self._model.generate(
                input_ids=ids,
                attention_mask=torch.tensor(real, device=self._spec.device),
                num_beams=job.beam_size,
                do_sample=False,
                # As the others end a beam search.
                early_stopping=True,
                min_new_tokens=job.min_target_tokens,
                max_new_tokens=job.max_target_tokens,
                max_length=None,
            )
        return [self._cut(row) for row in generated.tolist()]

    def _cut(self, row: list[int]) -> tuple[int, ...]:
        """What is between the start token and the end-of-sentence token or the limit."""
        config = self._model.generation_config
        target = row[1:]
        if config.eos_token_id in target:
            target = target[: target.index(config.eos_token_id)]
        return tuple(i for i in target if i != config.pad_token_id)

    def describe(self) -> str:
        """The settings it runs with."""
        return f"torch threads {self._spec.split.threads}, {self._spec.precision}, batches sorted by length"

    def close(self) -> None:
        """There is nothing to stop."""


def open_model(spec: PeerSpec) -> HuggingFacePeer:
    """Load a Marian directory."""
    return HuggingFacePeer(spec)
