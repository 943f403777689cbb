"""The files of a Marian model and where they are: the model itself, ``decoder.yml`` that names it, its vocabularies.

Knows usual names, and that paths in ``decoder.yml`` are those of the machine that wrote it; does not know what is in a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import sentencepiece

from export.checkpoint.plain_yaml import read_yaml
from export.checkpoint.vocabulary import Vocabularies

MODEL_NAME = "model.npz"
DECODER_CONFIG_NAME = "decoder.yml"

_VOCABULARY_NAMES = (
    ("vocab.yml",),
    ("vocab.spm",),
    ("source.yml", "target.yml"),
    ("vocab.src.yml", "vocab.trg.yml"),
    ("vocab.src.spm", "vocab.trg.spm"),
)
_FURTHER_MARKERS = ("<s>", "<pad>", "</s>", "<unk>")


def models_in(directory: Path) -> list[Path]:
    """Marian's models in a directory; beside one in training lie an optimizer's state and earlier ones."""
    if (directory / MODEL_NAME).is_file():
        return [directory / MODEL_NAME]
    return sorted(path for path in directory.glob("*.npz") if not path.name.endswith(".optimizer.npz"))


def read_decoder_settings(directory: Path, model_name: str | None, faults: list[str]) -> dict[str, Any]:
    """Settings of ``decoder.yml``, or of the file that training writes for one model; empty where there is neither."""
    for name in (f"{model_name or MODEL_NAME}.{DECODER_CONFIG_NAME}", DECODER_CONFIG_NAME):
        try:
            return read_yaml((directory / name).read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            faults.append(f"{name}: cannot be read: {error}")
            break
    return {}


def find_model(directory: Path, decoder_settings: Mapping[str, Any], faults: list[str]) -> Path | None:
    """The one model of a directory; None after a fault."""
    named = decoder_settings.get("models")
    if isinstance(named, list) and len(named) > 1:
        faults.append(f"{DECODER_CONFIG_NAME}: models: an ensemble of {len(named)} is not supported, only one model")
        return None
    if isinstance(named, list) and named and isinstance(named[0], str):
        return _beside(directory, named[0], "models", faults)
    found = models_in(directory)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or f"none, {MODEL_NAME} is missing"
        faults.append(f"one model is needed, and there are several: {names}" if found else f"a model is needed: {names}")
        return None
    return found[0]


def find_vocabularies(directory: Path, decoder_settings: Mapping[str, Any], faults: list[str]) -> tuple[Path, Path] | None:
    """Vocabularies of source and target, which may be one; None after a fault."""
    named = decoder_settings.get("vocabs")
    if isinstance(named, list) and named and all(isinstance(name, str) for name in named):
        if len(named) != 2:
            faults.append(f"{DECODER_CONFIG_NAME}: vocabs: {len(named)} vocabularies are not supported, only two")
            return None
        source, target = (_beside(directory, name, "vocabs", faults) for name in named)
        return (source, target) if source and target else None
    for names in _VOCABULARY_NAMES:
        paths = [directory / name for name in names]
        if all(path.is_file() for path in paths):
            return paths[0], paths[-1]
    expected = "; ".join(" and ".join(names) for names in _VOCABULARY_NAMES)
    faults.append(f"vocabularies: none is named in {DECODER_CONFIG_NAME}, and none is called {expected}")
    return None


def _beside(directory: Path, name: str, field: str, faults: list[str]) -> Path | None:
    """A file that ``decoder.yml`` names, by its last part: paths are those of the machine that it was written on."""
    path = directory / PureWindowsPath(name).name
    if path.is_file() and path.parent == directory:
        return path
    faults.append(f"{DECODER_CONFIG_NAME}: {field}: {name!r} is missing")
    return None


def read_vocabularies(paths: tuple[Path, Path], faults: list[str]) -> Vocabularies | None:
    """Of source and target; None after a fault."""
    ids: dict[Path, dict[str, int]] = {}
    for path in dict.fromkeys(paths):
        try:
            ids[path] = _read_vocabulary(path)
        except (OSError, ValueError) as error:
            faults.append(f"{path.name}: {error}")
    if len(ids) < len(set(paths)):
        return None
    return Vocabularies(source=ids[paths[0]], target=ids[paths[1]], special_tokens=_FURTHER_MARKERS)


def _read_vocabulary(path: Path) -> dict[str, int]:
    """Token -> id. Raises ValueError for what is no vocabulary."""
    if path.suffix == ".spm":
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"is no SentencePiece model: {error}") from error
        return {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    if path.suffix not in (".yml", ".yaml", ".json"):
        raise ValueError("is of no kind that is supported (.yml, .yaml, .json, .spm); factored vocabularies are not")
    vocabulary = {}
    for token, number in read_yaml(path.read_bytes()).items():
        if not isinstance(number, str) or not (number.isascii() and number.isdigit() and len(number) < 10):
            raise ValueError(f"{token!r} has no id, but {number!r}")
        vocabulary[token] = int(number)
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError("two tokens have one id")
    return vocabulary
