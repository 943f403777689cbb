"""onnxlate's own checkpoint format: what the training example writes and the export reads.

A directory with ``config.json`` (format, revision, name, languages, tokenizer, model), ``model.safetensors`` (tensors by the
names of ``base.py``, stored as float16 or float32), the tokenizer's files and, if there is one, ``samples.txt`` (real source
sentences, one a line). Knows these files; does not know other formats or what becomes of a checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from export.checkpoint.base import SAMPLES_NAME, Checkpoint, read_samples, shared_names, tensor_faults
from export.checkpoint.described import CONFIG_NAME, Description, find_tokenizer_files, mentions, read_description
from export.model import ModelConfig
from serving.errors import CheckpointError
from serving.manifest import AnyTokenizerSpec, LanguagePair
from serving.tokenizers.base import contents_of

WEIGHTS_NAME = "model.safetensors"
FORMAT_REVISION = 1

_SUPPORTED_REVISIONS = (1,)
_FORMAT: Literal["onnxlate-checkpoint"] = "onnxlate-checkpoint"
_STORED_TYPES = (torch.float16, torch.float32)


class _NativeConfig(Description):
    """What ``config.json`` holds."""

    format: Literal["onnxlate-checkpoint"]


class NativeReader:
    """Reads this format; see ``CheckpointReader``."""

    description = f'native ({CONFIG_NAME} with "format": "{_FORMAT}", {WEIGHTS_NAME}, tokenizer files)'

    def recognizes(self, directory: Path) -> bool:
        """Whether ``config.json`` mentions the format; a broken one is still this format, and ``read`` tells what is wrong."""
        return mentions(directory, _FORMAT)

    def read(self, directory: Path) -> Checkpoint:
        """Read and check the whole checkpoint.

        Raises:
            CheckpointError: with every fault. Other files are looked at only when ``config.json`` can be read.
        """
        config = read_description(directory, _NativeConfig, _SUPPORTED_REVISIONS)
        faults: list[str] = []
        tokenizer_files = find_tokenizer_files(directory, config, faults)
        tensors, weights_sha256 = _read_tensors(directory, config.model, faults)
        sample_lines = read_samples(directory, faults)
        if faults:
            raise CheckpointError(directory, faults)
        return Checkpoint(
            name=config.name,
            config=config.model,
            tensors=tensors,
            languages=config.languages,
            tokenizer=config.tokenizer,
            tokenizer_files=tokenizer_files,
            weights_sha256=weights_sha256,
            sample_lines=sample_lines,
        )


def write_native_checkpoint(
    directory: Path,
    *,
    name: str,
    config: ModelConfig,
    state_dict: Mapping[str, Tensor],
    languages: Sequence[LanguagePair],
    tokenizer: AnyTokenizerSpec,
    tokenizer_files: Mapping[str, Path | bytes],
    samples: Sequence[str] = (),
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a checkpoint into ``directory``, beside what else is there; ``config.json`` comes last.

    Args:
        directory: made when it is missing.
        name: how the model is called.
        config: its architecture.
        state_dict: of ``Transformer(config)``; shared matrices may have all their names.
        languages: what it translates from and into.
        tokenizer: which of the tokenizer's files is for which side.
        tokenizer_files: where they are now, or their contents, by the names that ``tokenizer`` uses.
        samples: real source sentences, for the certificate.
        dtype: how weights are stored: float16 or float32.

    Raises:
        CheckpointError: the checkpoint could not be read again; every fault is named, and nothing was written.
        OSError: a file cannot be read or written.
    """
    faults = []
    if dtype not in _STORED_TYPES:
        faults.append(f"{WEIGHTS_NAME}: weights are stored as float16 or float32, not as {dtype}")
    tensors = {key: tensor.detach().to("cpu", dtype, copy=True).contiguous() for key, tensor in state_dict.items()}
    for key, own in shared_names(config).items():
        alias = tensors.pop(key, None)
        if alias is not None and own in tensors and not torch.equal(alias, tensors[own]):
            faults.append(f"{key}: is shared with {own}, and differs from it")
    faults += tensor_faults(config, tensors)
    faults += [f"{key}: not among tokenizer_files" for key in tokenizer.file_names if key not in tokenizer_files]
    faults += [f"{SAMPLES_NAME}: a sample has more than one line: {line[:40]!r}" for line in samples if "\n" in line]
    if faults:
        raise CheckpointError(directory, faults)

    tokenizer_contents = {name: contents_of(tokenizer_files, name) for name in tokenizer.file_names}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS_NAME)
    for file_name, contents in tokenizer_contents.items():
        (directory / file_name).write_bytes(contents)
    if samples:
        (directory / SAMPLES_NAME).write_text("".join(f"{line}\n" for line in samples), encoding="utf-8")
    document = _NativeConfig(
        format=_FORMAT,
        format_revision=FORMAT_REVISION,
        name=name,
        languages=list(languages),
        tokenizer=tokenizer,
        model=config,
    )
    (directory / CONFIG_NAME).write_text(document.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _read_tensors(directory: Path, config: ModelConfig, faults: list[str]) -> tuple[dict[str, Tensor], str]:
    """Tensors as float32 and the SHA-256 of their file; what is wrong with them goes to ``faults``."""
    try:
        stored = (directory / WEIGHTS_NAME).read_bytes()
        tensors = load(stored)
    except FileNotFoundError:
        faults.append(f"{WEIGHTS_NAME}: is missing")
        return {}, ""
    except (OSError, SafetensorError) as error:
        faults.append(f"{WEIGHTS_NAME}: cannot be read: {error}")
        return {}, ""
    faults += [f"{WEIGHTS_NAME}: {fault}" for fault in tensor_faults(config, tensors)]
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}, hashlib.sha256(stored).hexdigest()
