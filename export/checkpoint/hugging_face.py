"""What directories of Hugging Face models have in common, whatever the family: JSON files and weights under several names.

Knows ``model.safetensors``, ``pytorch_model.bin`` and where special tokens are listed; does not know any architecture, nor what
settings of ``generate`` mean (``generation.py``). A reader of a family brings its own fields, its name map and its tokenizer
(``marian.py``, ``bart.py``).
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

from export.checkpoint.archives import first_line, load_pickle, state_dict
from export.checkpoint.base import expected_shapes, shared_names, tensor_faults
from export.model import Activation, ModelConfig
from serving.manifest import name_fault

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TOKENIZER_NAME = "tokenizer.json"
ADDED_TOKENS_NAME = "added_tokens.json"
SPECIAL_TOKENS_NAME = "special_tokens_map.json"
SAFETENSORS_NAME = "model.safetensors"
PICKLE_NAME = "pytorch_model.bin"

# The library's names; the three of the tanh approximation differ in rounding alone.
ACTIVATIONS: Mapping[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_sigmoid",
    "silu": "silu",
    "swish": "silu",
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


def read_weights(directory: Path, faults: list[str]) -> tuple[dict[str, Tensor], str, str]:
    """The tensors of ``model.safetensors`` or, where there is none, ``pytorch_model.bin``; either may be in several files.

    Those of several files are listed in an index, ``model.safetensors.index.json`` for example. A pickle is loaded with
    ``weights_only``, which runs none of its code.

    Returns:
        Tensors as they are stored, by their names in the file; the file's SHA-256, of several one after another; its name, or the
        index's. No tensors after a fault, which goes to ``faults``.
    """
    for name in (SAFETENSORS_NAME, PICKLE_NAME):
        if (directory / name).is_file():
            return *_read_files(directory, [name], faults), name
        index_name = f"{name}.index.json"
        if (directory / index_name).is_file():
            return *_read_indexed(directory, index_name, faults), index_name
    faults.append(f"{SAFETENSORS_NAME}: is missing, and so is {PICKLE_NAME}")
    return {}, "", SAFETENSORS_NAME


def _read_indexed(directory: Path, index_name: str, faults: list[str]) -> tuple[dict[str, Tensor], str]:
    """The tensors that an index lists, each from the file that it names, and the SHA-256 of these files."""
    index = read_json(directory / index_name, faults)
    if index is None:
        return {}, ""
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        faults.append(f"{index_name}: weight_map: is no object of tensors and their files")
        return {}, ""
    file_names = sorted(set(places.values()))
    if bad := [f"{index_name}: {fault}" for name in file_names if (fault := name_fault(name))]:
        faults += bad
        return {}, ""
    if missing := [f"{name}: is missing, and {index_name} lists it" for name in file_names if not (directory / name).is_file()]:
        faults += missing
        return {}, ""
    return _read_files(directory, file_names, faults, places)


def _read_files(
    directory: Path, file_names: list[str], faults: list[str], places: Mapping[str, str] | None = None
) -> tuple[dict[str, Tensor], str]:
    """The tensors of files, and the SHA-256 of the files in this order; no tensors after a fault.

    Args:
        directory: where the files are.
        file_names: each is there.
        faults: of the whole checkpoint so far.
        places: tensor -> its file, where an index says so; nothing else may be in the files.
    """
    sha256, tensors, found = hashlib.sha256(), dict[str, Tensor](), list[str]()
    for name in file_names:
        stored = _read_file(directory / name, sha256, found)
        if places is not None and stored:
            expected = {tensor for tensor, place in places.items() if place == name}
            found += [f"{name}: {tensor}: is not there, and the index says so" for tensor in sorted(expected - stored.keys())]
            found += [f"{name}: {tensor}: the index does not say so" for tensor in sorted(stored.keys() - expected)]
        tensors |= stored
    faults += found
    return ({} if found else tensors), sha256.hexdigest()


def _read_file(path: Path, sha256: hashlib._Hash, faults: list[str]) -> dict[str, Tensor]:
    """The tensors of one file, whose bytes go into ``sha256``; none after a fault, which goes to ``faults``."""
    try:
        stored: Any = load_file(path) if path.suffix == ".safetensors" else load_pickle(path)
        with path.open("rb") as stream:
            hashlib.file_digest(stream, lambda: sha256)
    # A broken or hostile pickle makes torch raise nearly anything.
    except Exception as error:
        faults.append(f"{path.name}: cannot be read: {first_line(error)}")
        return {}
    return state_dict(stored, path.name, faults)


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
    shared, shapes = shared_names(config), expected_shapes(config)
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
        elif stored[theirs].shape != shapes[own]:
            found.append(f"{theirs}: shape {list(stored[theirs].shape)}, expected {list(shapes[own])}")
        # The first, should its shape be wrong, is told of below.
        elif tensors[own].shape == shapes[own] and not _same(tensors[own], stored[theirs]):
            found.append(f"{theirs}: is shared with {called[own]}, and differs from it")
    # What is missing is told by the first name that it could have.
    first_names = {shared.get(ours, ours): theirs for theirs, ours in reversed(names.items())}
    extra = {name: tensor for name, tensor in stored.items() if name not in names}
    found += tensor_faults(config, {**tensors, **extra}, {**first_names, **called})
    faults += [f"{file_name}: {fault}" for fault in found]
    # Only what has the right shape is copied: one that is not may be of any size.
    return {} if found else {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def token_text(value: Any) -> Any:
    """A special token of ``tokenizer_config.json``, which may be spelled out as an object with its ``content``."""
    return value.get("content") if isinstance(value, dict) else value


def added_tokens(directory: Path, settings: Mapping[str, Any], faults: list[str]) -> dict[str, int]:
    """Tokens that a tokenizer has beside its model's pieces, and their ids, from every file that states such.

    Args:
        directory: may have ``tokenizer.json`` and ``added_tokens.json``.
        settings: what ``tokenizer_config.json`` holds.
        faults: of the whole checkpoint so far; files that contradict each other are one.
    """
    stated: list[tuple[str, Any, Any]] = []
    if TOKENIZER_NAME in (names := {path.name for path in directory.iterdir()}):
        listed = (read_json(directory / TOKENIZER_NAME, faults) or {}).get("added_tokens") or []
        listed = listed if isinstance(listed, list) else [listed]
        stated += [
            (TOKENIZER_NAME, token.get("content"), token.get("id")) if isinstance(token, dict) else (TOKENIZER_NAME, token, None)
            for token in listed
        ]
    if ADDED_TOKENS_NAME in names:
        ids = read_json(directory / ADDED_TOKENS_NAME, faults) or {}
        stated += [(ADDED_TOKENS_NAME, token, token_id) for token, token_id in ids.items()]
    decoder = settings.get("added_tokens_decoder") or {}
    for token_id, token in decoder.items() if isinstance(decoder, dict) else [(None, decoder)]:
        number = int(token_id) if isinstance(token_id, str) and token_id.isascii() and token_id.isdigit() else None
        stated.append((TOKENIZER_CONFIG_NAME, token_text(token), number))
    found: dict[str, int] = {}
    for name, token, token_id in stated:
        if not isinstance(token, str) or type(token_id) is not int or token_id < 0:
            faults.append(f"{name}: added token {str(token)[:40]!r} with id {token_id!r}: is no token with its id")
        elif found.setdefault(token, token_id) != token_id:
            faults.append(f"{name}: added token {token!r} has id {token_id}, elsewhere {found[token]}")
    return found


def tokenizer_ids(directory: Path, settings: Mapping[str, Any], faults: list[str]) -> dict[str, int]:
    """The ids of all tokens of a ``tokenizer.json``: the model's own, an object or a list of pieces and scores, and those added.

    A model of neither form is told of when the tokenizer is opened.

    Args:
        directory: has the file.
        settings: what ``tokenizer_config.json`` holds.
        faults: of the whole checkpoint so far.
    """
    document = read_json(directory / TOKENIZER_NAME, faults)
    if document is None:
        return {}
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        vocabulary = {entry[0]: i for i, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    pieces = vocabulary.items() if isinstance(vocabulary, dict) else ()
    own = {piece: i for piece, i in pieces if isinstance(piece, str) and type(i) is int}
    return own | added_tokens(directory, settings, faults)


def special_tokens(directory: Path, settings: Mapping[str, Any], faults: list[str]) -> list[str]:
    """Special tokens beside those with a name of their own, in the order in which a tokenizer adds them."""
    mapped = read_json(directory / SPECIAL_TOKENS_NAME, faults) or {}
    for name, fields in ((TOKENIZER_CONFIG_NAME, settings), (SPECIAL_TOKENS_NAME, mapped)):
        for field in ("additional_special_tokens", "extra_special_tokens"):
            tokens = fields.get(field)
            if not isinstance(tokens, list):
                # An object gives further tokens names of their own.
                continue
            texts = [token_text(token) for token in tokens]
            if not all(isinstance(text, str) for text in texts):
                faults.append(f"{name}: {field}: is no list of tokens")
                return []
            if texts:
                return texts
    return []


def first_of(values: Sequence[int] | int | None) -> Any:
    """The end-of-sentence token where several may end a target: sources end with the first."""
    return values[0] if isinstance(values, list) and values else values


def one_of(values: Sequence[int] | int | None) -> Any:
    """A token id that may be written as a list of one."""
    return values[0] if isinstance(values, list) and len(values) == 1 else values
