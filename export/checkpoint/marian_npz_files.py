"""The files of a Marian model and where they are: the model itself, ``decoder.yml`` that names it, its vocabularies.

Knows usual names, and that paths in ``decoder.yml`` are those of the machine that wrote it; does not know what is in a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

import sentencepiece

from export.checkpoint.plain_yaml import read_yaml
from export.checkpoint.vocabulary import Vocabularies
from serving.manifest import DefaultOptions, LanguagePair

MODEL_NAME = "model.npz"
DECODER_CONFIG_NAME = "decoder.yml"

# Names of vocabularies where nothing says which: (source, target), or one for both; the most telling first.
_VOCABULARY_PATTERNS = (
    ("vocab.yml",),
    ("vocab.spm",),
    ("source.yml", "target.yml"),
    ("vocab.src.yml", "vocab.trg.yml"),
    ("vocab.src.spm", "vocab.trg.spm"),
    # OPUS-MT's, which have the name of the training data before.
    ("*.src.vocab.yml", "*.trg.vocab.yml"),
    ("*.src.vocab", "*.trg.vocab"),
    ("*.vocab.yml",),
    ("*.vocab",),
    # Those of Bergamot's students, which have the languages in them.
    ("srcvocab.*.spm", "trgvocab.*.spm"),
    ("vocab.*.spm",),
    ("vocab.json",),
)
# What a flag is as a number.
_FLAGS = {"true": "1", "false": "0"}
# Of marian-decoder, where nothing is said.
_NORMALIZE, _MAX_LENGTH_FACTOR, _WORD_PENALTY = "0", "3", "0"
# Settings of a search that are none of a bundle's, and the values with which they do nothing.
_LEFT_OUT = {"shortlist": ("", []), "output-sampling": ("", []), "output-approx-knn": ("", []), "force-decode": ("", "false")}
_FURTHER_MARKERS = ("<s>", "<pad>", "</s>", "<unk>")


def models_in(directory: Path) -> list[Path]:
    """Marian's models in a directory; beside one in training lie an optimizer's state and earlier ones."""
    if (directory / MODEL_NAME).is_file():
        return [directory / MODEL_NAME]
    return sorted(path for path in directory.glob("*.npz") if not path.name.endswith(".optimizer.npz"))


def read_decoder_settings(path: Path, faults: list[str]) -> dict[str, Any]:
    """Settings of ``decoder.yml``, or of the file that training writes for one model; empty where there is neither.

    Args:
        path: of a directory, or of one model.
        faults: of the whole checkpoint so far.
    """
    if path.is_dir():
        models = models_in(path)
        names = [DECODER_CONFIG_NAME, *(f"{model.name}.{DECODER_CONFIG_NAME}" for model in models if len(models) == 1)]
    else:
        names = [f"{path.name}.{DECODER_CONFIG_NAME}", DECODER_CONFIG_NAME]
    for name in names:
        try:
            return read_yaml(((path if path.is_dir() else path.parent) / name).read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            faults.append(f"{name}: cannot be read: {error}")
            break
    return {}


def search_options(
    decoder_settings: Mapping[str, Any], unknown_id: int | None, faults: list[str]
) -> tuple[DefaultOptions, int | None]:
    """How the model's makers search, as marian-decoder does with these settings (src/translator/beam_search.cpp, history.h).

    Args:
        decoder_settings: of ``decoder.yml``.
        unknown_id: of the target vocabulary.
        faults: of the whole checkpoint so far.

    Returns:
        What a bundle has as defaults, and the number of beams; None where they do not say.
    """
    chosen: dict[str, Any] = {"shrinking_beam": True}
    for key, name, otherwise, meaning in (
        ("normalize", "length_penalty", _NORMALIZE, "exponent of a length, at most 10"),
        ("word-penalty", "word_penalty", _WORD_PENALTY, "penalty of a token, at most 10"),
        (
            "max-length-factor",
            "max_target_ratio",
            _MAX_LENGTH_FACTOR,
            "number of target tokens to one of the source, at most 100",
        ),
    ):
        value = decoder_settings.get(key, otherwise)
        try:
            chosen[name] = float(_FLAGS.get(value, value))
            DefaultOptions(**{name: chosen[name]})
        except (TypeError, ValueError):
            chosen.pop(name, None)
            faults.append(f"{DECODER_CONFIG_NAME}: {key}: {value!r} is no {meaning}")
    if decoder_settings.get("allow-unk", "false") != "true":
        chosen["passed_over_id"] = unknown_id
    defaults, num_beams = DefaultOptions(**chosen), None
    beam_size = decoder_settings.get("beam-size")
    if isinstance(beam_size, str) and re.fullmatch("[1-9][0-9]{0,3}", beam_size):
        num_beams = int(beam_size)
    elif beam_size is not None:
        faults.append(f"{DECODER_CONFIG_NAME}: beam-size: {beam_size!r} is no number of beams")
    return defaults, num_beams


def search_warnings(decoder_settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What of these settings a bundle does not do."""
    return tuple(
        f"{DECODER_CONFIG_NAME}: {key}: {decoder_settings[key]!r} is left out; translations differ from marian-decoder's"
        for key, values in _LEFT_OUT.items()
        if key in decoder_settings and decoder_settings[key] not in values
    )


def find_model(directory: Path, decoder_settings: Mapping[str, Any], faults: list[str]) -> Path | None:
    """The one model of a directory; None after a fault."""
    named = decoder_settings.get("models")
    if isinstance(named, list) and len(named) > 1:
        faults.append(
            f"{DECODER_CONFIG_NAME}: models: an ensemble of {len(named)} is not supported, only one model; give one's .npz"
        )
        return None
    if isinstance(named, list) and named and isinstance(named[0], str):
        return _beside(directory, named[0], "models", faults)
    found = models_in(directory)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        faults.append(f"one model is needed, and there are several: {names}; give one of them instead of the directory")
    elif not found:
        faults.append(f"a model is needed: none, {MODEL_NAME} is missing")
    return found[0] if len(found) == 1 else None


def find_vocabularies(directory: Path, decoder_settings: Mapping[str, Any], faults: list[str]) -> tuple[Path, Path] | None:
    """Vocabularies of source and target, which may be one; None after a fault."""
    named = decoder_settings.get("vocabs")
    if isinstance(named, list) and named and all(isinstance(name, str) for name in named):
        if len(named) != 2:
            faults.append(f"{DECODER_CONFIG_NAME}: vocabs: {len(named)} vocabularies are not supported, only two")
            return None
        source, target = (_beside(directory, name, "vocabs", faults) for name in named)
        return (source, target) if source and target else None
    for patterns in _VOCABULARY_PATTERNS:
        matches = [sorted(path for path in directory.glob(pattern) if path.is_file()) for pattern in patterns]
        if all(len(paths) == 1 for paths in matches):
            return matches[0][0], matches[-1][0]
    expected = "; ".join(" and ".join(patterns) for patterns in _VOCABULARY_PATTERNS)
    faults.append(f"vocabularies: none is named in {DECODER_CONFIG_NAME}, and none is called {expected}")
    return None


def read_languages(model_path: Path) -> list[LanguagePair]:
    """What a model translates from and into, by the description that OPUS-MT packs with it; none where that does not say.

    A model of several languages is told them by tokens, which are in its vocabulary.
    """
    try:
        description = read_yaml(model_path.with_suffix(".yml").read_bytes())
    except (OSError, ValueError):
        return []
    sides = [description.get(f"{side}-languages") for side in ("source", "target")]
    codes = [side[0] for side in sides if isinstance(side, list) and len(side) == 1 and side[0]]
    return [LanguagePair(source=codes[0], target=codes[1])] if len(codes) == 2 else []


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


def cut_vocabularies(
    vocabularies: Vocabularies, paths: tuple[Path, Path], dim_vocabs: Sequence[int]
) -> tuple[Vocabularies, tuple[str, ...]]:
    """The same without tokens that the model has no place for, and what there is to tell of that.

    Marian reads the first ``dim-vocabs`` lines of a vocabulary that was made for larger models; the others are unknown to it. A
    SentencePiece model is not cut.
    """
    sides: list[Mapping[str, int]] = []
    warnings = []
    for ids, path, size in zip((vocabularies.source, vocabularies.target), paths, dim_vocabs, strict=True):
        kept = {token: i for token, i in ids.items() if i < size or path.suffix == ".spm"}
        sides.append(kept)
        if len(kept) < len(ids):
            warnings.append(
                f"{path.name}: {len(ids) - len(kept)} of its {len(ids)} tokens are left out: the model's are {size}, by "
                "dim-vocabs; is it the model's vocabulary?"
            )
    return replace(vocabularies, source=sides[0], target=sides[1]), tuple(dict.fromkeys(warnings))


def _read_vocabulary(path: Path) -> dict[str, int]:
    """Token -> id. Raises ValueError for what is no vocabulary."""
    if path.suffix == ".spm":
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"is no SentencePiece model: {error}") from error
        return {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    if path.suffix in (".vocab", ".txt"):
        return _read_lines(path.read_bytes())
    if path.suffix not in (".yml", ".yaml", ".json"):
        raise ValueError("is of no kind that is supported (.yml, .yaml, .json, .spm, .vocab, .txt); factored ones are not")
    vocabulary = {}
    for token, number in read_yaml(path.read_bytes()).items():
        if not isinstance(number, str) or not (number.isascii() and number.isdigit() and len(number) < 10):
            raise ValueError(f"{token!r} has no id, but {number!r}")
        vocabulary[token] = int(number)
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError("two tokens have one id")
    return vocabulary


def _read_lines(contents: bytes) -> dict[str, int]:
    """One token a line. As in Marian, one that is there already takes no number."""
    tokens = contents.decode().removesuffix("\n").split("\n")
    if "" in tokens:
        raise ValueError("has an empty line")
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}
