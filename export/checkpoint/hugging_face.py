"""What directories of Hugging Face models have in common, whatever the family: JSON files and weights under several names.

Knows ``model.safetensors``, ``pytorch_model.bin`` and settings of ``generate``; does not know any architecture. A reader of a
family brings its own fields, its name map and its tokenizer (``marian.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic_core import from_json
from safetensors.torch import load_file
from torch import Tensor

from export.checkpoint.base import shared_names, tensor_faults
from export.model import ModelConfig

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
SAFETENSORS_NAME = "model.safetensors"
PICKLE_NAME = "pytorch_model.bin"

# Settings of ``generate`` that change what may be decoded, and the values with which they change nothing. How to search (beams,
# length penalty, lengths, when to stop) is a request's business and not looked at.
_NEUTRAL_GENERATION: Mapping[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": (None, []),
    "constraints": (None, []),
    "diversity_penalty": (None, 0),
    "do_sample": (None, False),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_decoder_ids": (None, []),
    "guidance_scale": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0),
    "repetition_penalty": (None, 1),
    "sequence_bias": (None, {}, []),
    "suppress_tokens": (None, []),
}


def is_of_type(directory: Path, model_type: str) -> bool:
    """Whether ``config.json`` states this ``model_type``; one that is broken does when its text mentions it so."""
    try:
        contents = (directory / CONFIG_NAME).read_bytes()
    except OSError:
        return False
    try:
        document = from_json(contents)
    except ValueError:
        return b'"model_type"' in contents and f'"{model_type}"'.encode() in contents
    return isinstance(document, dict) and document.get("model_type") == model_type


def read_json(path: Path, faults: list[str]) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is no such file, or a fault, which goes to ``faults``."""
    try:
        document = from_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        faults.append(f"{path.name}: cannot be read: {error.strerror}")
        return None
    except ValueError as error:
        faults.append(f"{path.name}: is not JSON: {error}")
        return None
    if not isinstance(document, dict):
        faults.append(f"{path.name}: is no JSON object")
        return None
    return document


def setting_faults(settings: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Every setting that has another value than those supported; one that is not there has its default, which is."""
    return [
        f"{name}: {settings[name]!r} is not supported, only {' or '.join(map(repr, values))}"
        for name, values in supported.items()
        if name in settings and settings[name] not in values
    ]


def generation_faults(settings: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """Every setting of ``generate`` that changes what may be decoded in a way that a bundle does not.

    A bundle never decodes padding and start, so ``bad_words_ids`` may name these. An end that is forced at the longest length has
    no text: ``forced_eos_token_id`` may be the model's own.
    """
    faults = setting_faults(settings, _NEUTRAL_GENERATION)
    never = [[token_id] for token_id in config.never_decoded]
    bad_words = settings.get("bad_words_ids") or []
    if not isinstance(bad_words, list) or any(words not in never for words in bad_words):
        faults.append(f"bad_words_ids: {bad_words!r} is not supported, only tokens that are never decoded: {never!r}")
    expected = {
        "forced_eos_token_id": (None, config.eos_id, [config.eos_id]),
        "eos_token_id": (None, config.eos_id, [config.eos_id]),
        "pad_token_id": (None, config.pad_id),
        "decoder_start_token_id": (None, config.decoder_start_id),
    }
    return faults + setting_faults(settings, expected)


def read_weights(directory: Path, faults: list[str]) -> tuple[dict[str, Tensor], str, str]:
    """The tensors of ``model.safetensors`` or, where there is none, ``pytorch_model.bin``.

    A pickle is loaded with ``weights_only``, which runs none of its code.

    Returns:
        Tensors as they are stored, by their names in the file; the file's SHA-256; its name. No tensors after a fault, which goes
        to ``faults``.
    """
    path = directory / SAFETENSORS_NAME
    if not path.is_file():
        path = directory / PICKLE_NAME
    if not path.is_file():
        faults.append(f"{SAFETENSORS_NAME}: is missing, and so is {PICKLE_NAME}")
        return {}, "", SAFETENSORS_NAME
    try:
        stored: Any = (
            load_file(path) if path.name == SAFETENSORS_NAME else torch.load(path, map_location="cpu", weights_only=True)
        )
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    # A broken or hostile pickle makes torch raise nearly anything.
    except Exception as error:
        faults.append(f"{path.name}: cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return {}, "", path.name
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
        faults.append(f"{path.name}: is no state dict")
        return {}, "", path.name
    odd = [
        f"{path.name}: {name}: is no dense tensor"
        for name, tensor in stored.items()
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu"
    ]
    faults += odd
    return ({} if odd else stored), sha256, path.name


def rename(
    config: ModelConfig, stored: Mapping[str, Tensor], names: dict[str, str], file_name: str, faults: list[str]
) -> dict[str, Tensor]:
    """Tensors by the names of ``base.py``, as float32; what is wrong with them goes to ``faults``, by their names in the file.

    A matrix that the model shares may be stored under any of its names, or under several if it is the same everywhere.

    Args:
        config: the architecture.
        stored: tensors by their names in the file.
        names: the file's name -> ours, of every tensor that the model may have.
        file_name: for the faults.
        faults: of the whole checkpoint so far.
    """
    shared = shared_names(config)
    tensors: dict[str, Tensor] = {}
    called: dict[str, str] = {}
    found: list[str] = []
    for theirs, ours in names.items():
        own = shared.get(ours, ours)
        if theirs not in stored:
            continue
        if own not in tensors:
            tensors[own] = stored[theirs]
            called[own] = theirs
        elif tensors[own].dtype != stored[theirs].dtype or not torch.equal(tensors[own], stored[theirs]):
            found.append(f"{theirs}: is shared with {called[own]}, and differs from it")
    # What is missing is told by the first name that it could have.
    first_names = {shared.get(ours, ours): theirs for theirs, ours in reversed(names.items())}
    extra = {name: tensor for name, tensor in stored.items() if name not in names}
    found += tensor_faults(config, {**tensors, **extra}, {**first_names, **called})
    faults += [f"{file_name}: {fault}" for fault in found]
    # Only what has the right shape is copied: one that is not may be of any size.
    return {} if found else {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


def token_text(value: Any) -> Any:
    """A special token of ``tokenizer_config.json``, which may be spelled out as an object with its ``content``."""
    return value.get("content") if isinstance(value, dict) else value


def one_of(values: Sequence[int] | int | None) -> Any:
    """A token id that may be written as a list of one."""
    return values[0] if isinstance(values, list) and len(values) == 1 else values
