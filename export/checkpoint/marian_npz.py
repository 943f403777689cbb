"""Marian's own models: what marian-nmt trains and OPUS-MT publishes.

A directory with the model (``model.npz``, which has its settings inside as ``special:model.yml``), its vocabularies (YAML:
token -> id, or SentencePiece models) and, as a rule, ``decoder.yml``, which names them; or the ``.npz`` itself, with the others
beside it. Where the vocabularies are YAML, ``source.spm`` and ``target.spm`` (or byte-pair codes) cut the text. Knows these
files, Marian's settings and the names of its tensors; does not know what a checkpoint becomes.

**Settings** that make the architecture are read, with Marian's defaults; those that would make one that this project's module has
no place for are refused, all at once. Dropout and the like are for training only, and how to search is a request's business. An
ensemble is refused.

**What Marian does its own way** (marian-dev: src/models/transformer.h, src/layers/generic.h, src/tensors/cpu): the decoder starts
from a vector of zeros instead of a token, for which a token without embedding is added here; positions are sines, then cosines,
with rates 10000^(-i / (d/2 - 1)), not 10000^(-i / (d/2)) as in the conversions of such models to Hugging Face and CTranslate2;
LayerNorm adds 1e-6; its ``gelu`` is x * sigmoid(1.702 x), which is the ``silu`` of 1.702 x, divided by 1.702.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any

import numpy as np
import sentencepiece
import torch
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from export.checkpoint.archives import file_sha256, read_npz
from export.checkpoint.base import Checkpoint, read_samples
from export.checkpoint.hugging_face import rename, setting_faults
from export.checkpoint.vocabulary import END_TOKEN, Vocabularies, choose_tokenizer
from export.model import Activation, ModelConfig, NormPlacement
from serving.bundle import field_faults
from serving.errors import CheckpointError

MODEL_NAME = "model.npz"
DECODER_CONFIG_NAME = "decoder.yml"
MODEL_CONFIG_NAME = "special:model.yml"

# Marian has a table for any length; this is far beyond a sentence, and takes a few megabytes.
_MAX_POSITIONS = 1024
_LAYER_NORM_EPS = 1e-6
_GELU_RATE = 1.702
# Settings are a few kilobytes.
_MAX_CONFIG_BYTES = 2**20
_MAX_YAML_DEPTH = 8

_ACTIVATIONS: dict[str, Activation] = {"swish": "silu", "relu": "relu", "gelu": "silu"}
# Operations before a sub-layer, after it and after the last layer, without dropout.
_NORMS: dict[tuple[str, str, str], NormPlacement] = {("", "an", ""): "post", ("n", "a", "n"): "pre"}
_OFF = ("false", "")
_NONE: tuple[Any, ...] = ("", [])
# Settings that would make another architecture, and the values with which they do not. Text, as the file has it.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "type": ("transformer",),
    "transformer-decoder-autoreg": ("self-attention",),
    "transformer-ffn-depth": ("2",),
    "transformer-decoder-ffn-depth": ("2", "0"),
    "transformer-no-projection": _OFF,
    "transformer-no-bias": _OFF,
    "transformer-no-affine": _OFF,
    "transformer-pool": _OFF,
    "transformer-tied-layers": _NONE,
    "factors-dim-emb": ("0", ""),
    "lemma-dim-emb": ("0", ""),
    "lemma-dependency": _NONE,
    "input-types": (*_NONE, ["sequence", "sequence"]),
    "right-left": _OFF,
    "ulr": _OFF,
}
_VOCABULARY_NAMES = (
    ("vocab.yml",),
    ("vocab.spm",),
    ("source.yml", "target.yml"),
    ("vocab.src.yml", "vocab.trg.yml"),
    ("vocab.src.spm", "vocab.trg.spm"),
)
_FURTHER_MARKERS = ("<s>", "<pad>", "</s>", "<unk>")
_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "output"}
_ATTENTIONS = {
    "encoder": {"self": "self_attention"},
    "decoder": {"self": "self_attention", "context": "cross_attention"},
}

_Size = Annotated[int, Field(gt=0, le=2**24)]
_Depth = Annotated[int, Field(gt=0, le=2**10)]


class _MarianConfig(BaseModel):
    """The settings that make the architecture, with Marian's defaults; they come as text."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=lambda name: name.replace("_", "-"))

    dim_emb: _Size = 512
    dim_vocabs: Annotated[list[_Size], Field(min_length=2, max_length=2)]
    enc_depth: _Depth = 1
    dec_depth: _Depth = 1
    transformer_heads: _Size = 8
    transformer_dim_ffn: _Size = 2048
    # 0: as the encoder's.
    transformer_decoder_dim_ffn: Annotated[int, Field(ge=0, le=2**24)] = 0
    transformer_ffn_activation: str = "swish"
    transformer_preprocess: str = ""
    transformer_postprocess_emb: str = "d"
    transformer_postprocess: str = "dan"
    transformer_postprocess_top: str = ""
    tied_embeddings: bool = False
    tied_embeddings_src: bool = False
    tied_embeddings_all: bool = False
    output_omit_bias: bool = False

    @property
    def norms(self) -> tuple[str, str, str]:
        """Operations before a sub-layer, after it and after the last layer; dropout does nothing here."""
        stages = (self.transformer_preprocess, self.transformer_postprocess, self.transformer_postprocess_top)
        before, after, top = (operations.replace("d", "") for operations in stages)
        return before, after, top

    @property
    def embedding_operations(self) -> str:
        """Operations after the embedding, without dropout."""
        return self.transformer_postprocess_emb.replace("d", "")

    @property
    def shares_embeddings(self) -> bool:
        """Whether there is one embedding for both sides."""
        return self.tied_embeddings_all or self.tied_embeddings_src

    def architecture_faults(self) -> list[str]:
        """Every setting that contradicts another, or that this project's module has no place for."""
        faults = []
        if self.transformer_ffn_activation not in _ACTIVATIONS:
            supported = " or ".join(map(repr, _ACTIVATIONS))
            faults.append(f"transformer-ffn-activation: {self.transformer_ffn_activation!r} is not supported, only {supported}")
        if self.norms not in _NORMS:
            found = (self.transformer_preprocess, self.transformer_postprocess, self.transformer_postprocess_top)
            faults.append(
                "transformer-preprocess, transformer-postprocess, transformer-postprocess-top: "
                f"{', '.join(map(repr, found))} are not supported, only '', 'dan', '' or 'n', 'da', 'n'"
            )
        if self.embedding_operations not in ("", "n"):
            faults.append(
                f"transformer-postprocess-emb: {self.transformer_postprocess_emb!r} is not supported, only '', 'd', 'n' or 'nd'"
            )
        if self.dim_emb % self.transformer_heads or self.dim_emb % 2 or self.dim_emb < 4:
            faults.append(f"dim-emb: {self.dim_emb} is no multiple of 2 and of transformer-heads {self.transformer_heads}")
        if self.shares_embeddings and self.dim_vocabs[0] != self.dim_vocabs[1]:
            faults.append(f"dim-vocabs: {self.dim_vocabs} differ, and the embeddings are tied")
        return faults

    def architecture(self, eos_id: int, num_positions: int, *, trained_positions: bool) -> ModelConfig:
        """The same for ``Transformer``, as Marian has it: without a start token. Only where there are no faults."""
        return ModelConfig(
            source_vocab_size=self.dim_vocabs[0],
            target_vocab_size=self.dim_vocabs[1],
            d_model=self.dim_emb,
            num_heads=self.transformer_heads,
            num_encoder_layers=self.enc_depth,
            num_decoder_layers=self.dec_depth,
            encoder_d_ff=self.transformer_dim_ffn,
            decoder_d_ff=self.transformer_decoder_dim_ffn or self.transformer_dim_ffn,
            norm=_NORMS[self.norms],
            activation=_ACTIVATIONS[self.transformer_ffn_activation],
            positions="learned",
            max_positions=num_positions,
            output_bias=True,
            scale_embedding=not trained_positions,
            share_embeddings=self.shares_embeddings,
            tie_output=self.tied_embeddings or self.tied_embeddings_all,
            embedding_norm=self.embedding_operations == "n",
            layer_norm_eps=_LAYER_NORM_EPS,
            # What Marian pads with; behind a source's end nothing is looked at.
            pad_id=eos_id,
            eos_id=eos_id,
            decoder_start_id=eos_id,
        )


class MarianNpzReader:
    """Reads this format; see ``CheckpointReader``."""

    description = f"Marian's own ({MODEL_NAME} with its vocabularies, and {DECODER_CONFIG_NAME} that names them; or the .npz)"

    def recognizes(self, path: Path) -> bool:
        """Whether it is an ``.npz``, or a directory that has one or that says so in ``decoder.yml``."""
        if path.is_dir():
            return (path / DECODER_CONFIG_NAME).is_file() or bool(_models_in(path))
        return path.suffix == ".npz" and path.is_file()

    def read(self, path: Path) -> Checkpoint:
        """Read and check the whole checkpoint.

        Raises:
            CheckpointError: with every fault. Tensors are looked at only when settings and vocabularies are known.
        """
        faults: list[str] = []
        directory = path if path.is_dir() else path.parent
        decoder_settings = _decoder_settings(directory, None if path.is_dir() else path.name, faults)
        model_path = _model_path(directory, decoder_settings, faults) if path.is_dir() else path
        vocabulary_paths = _vocabulary_paths(directory, decoder_settings, faults)
        vocabularies = _read_vocabularies(vocabulary_paths, faults) if vocabulary_paths else None
        arrays = read_npz(model_path, faults) if model_path else {}
        settings = _model_settings(model_path, arrays, faults) if model_path and arrays else None
        sample_lines = read_samples(directory, faults)
        if model_path is None or settings is None or vocabularies is None:
            raise CheckpointError(path, faults)
        own_faults = vocabularies.faults(*settings.dim_vocabs)
        if not own_faults and vocabularies.source[END_TOKEN] != vocabularies.target[END_TOKEN]:
            own_faults.append(f"{END_TOKEN} has another id in the source vocabulary than in the target vocabulary")
        faults += own_faults
        if own_faults:
            raise CheckpointError(path, faults)
        config, tensors = _model(settings, arrays, vocabularies.target[END_TOKEN], model_path.name, faults)
        own_models = tuple(path.name for path in vocabulary_paths or () if path.suffix == ".spm")
        pairs = [(own_models[0], own_models[1])] if len(own_models) == 2 else []
        choice = choose_tokenizer(directory, vocabularies, faults, sentencepiece=pairs)
        if faults or choice is None:
            raise CheckpointError(path, faults)
        warnings = choice.warnings
        if config.norm == "pre":
            warnings = (
                *warnings,
                "transformer-preprocess: the norm is applied to all keys and values of the decoder's self-attention, as in "
                "training; marian-decoder leaves it out from the second token on, so that its translations differ",
            )
        return Checkpoint(
            name=directory.resolve().name if path.is_dir() else model_path.stem,
            config=config,
            tensors=tensors,
            languages=[],
            language_tokens=vocabularies.language_tokens(),
            tokenizer=choice.spec,
            tokenizer_files=choice.files,
            weights_sha256=file_sha256(model_path),
            sample_lines=sample_lines,
            warnings=warnings,
        )


def position_table(num_positions: int, d_model: int) -> Tensor:
    """Marian's positions: sines, then cosines, of p * 10000^(-i / (d/2 - 1)), computed in float32 as Marian does.

    Returns:
        [num_positions, d_model] float32.
    """
    num_rates = d_model // 2
    increment = np.float32(math.log(10000.0)) / np.float32(num_rates - 1)
    rate = np.exp(np.arange(num_rates, dtype=np.float32) * -increment)
    angle = np.arange(num_positions, dtype=np.float32)[:, None] * rate  # [num_positions, d_model / 2]
    return torch.from_numpy(np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32))


def tensor_names(config: ModelConfig, *, legacy_output: bool = False) -> dict[str, str]:
    """Marian's name -> ours, of every tensor but the positions; a shared matrix has one.

    Args:
        config: the architecture.
        legacy_output: the output's matrix is called as in old versions.
    """
    names = dict(_layer_names(config))
    if config.share_embeddings:
        names["Wemb"] = "decoder.embedding.tokens.weight"
    else:
        names["decoder_Wemb"] = "decoder.embedding.tokens.weight"
        names["encoder_Wemb"] = "encoder.embedding.tokens.weight"
    if not config.tie_output:
        names["decoder_ff_logit_out_W" if legacy_output else "decoder_ff_logit_out_Wt"] = "output.weight"
    names["decoder_ff_logit_out_b"] = "output.bias"
    for side in ("encoder", "decoder"):
        if config.norm == "pre":
            names |= _norm_names(f"{side}_top", f"{side}.final_norm")
        if config.embedding_norm:
            names |= _norm_names(f"{side}_emb", f"{side}.embedding.norm", "_pre")
    return names


def _layer_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    suffix = "_pre" if config.norm == "pre" else ""
    for side, depth in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        for i in range(depth):
            theirs, ours = f"{side}_l{i + 1}", f"{side}.layers.{i}"
            for kind, attention in _ATTENTIONS[side].items():
                for letter, projection in _PROJECTIONS.items():
                    yield f"{theirs}_{kind}_W{letter}", f"{ours}.{attention}.{projection}.weight"
                    yield f"{theirs}_{kind}_b{letter}", f"{ours}.{attention}.{projection}.bias"
                yield from _norm_names(f"{theirs}_{kind}_Wo", f"{ours}.{attention}_residual.norm", suffix).items()
            for number, product in (("1", "inner"), ("2", "outer")):
                yield f"{theirs}_ffn_W{number}", f"{ours}.feed_forward.{product}.weight"
                yield f"{theirs}_ffn_b{number}", f"{ours}.feed_forward.{product}.bias"
            yield from _norm_names(f"{theirs}_ffn_ffn", f"{ours}.feed_forward_residual.norm", suffix).items()


def _norm_names(theirs: str, ours: str, suffix: str = "") -> dict[str, str]:
    return {f"{theirs}_ln_scale{suffix}": f"{ours}.weight", f"{theirs}_ln_bias{suffix}": f"{ours}.bias"}


def _models_in(directory: Path) -> list[Path]:
    """Marian's models in a directory; beside one in training lie an optimizer's state and earlier ones."""
    if (directory / MODEL_NAME).is_file():
        return [directory / MODEL_NAME]
    return sorted(path for path in directory.glob("*.npz") if not path.name.endswith(".optimizer.npz"))


def _decoder_settings(directory: Path, model_name: str | None, faults: list[str]) -> dict[str, Any]:
    """Settings of ``decoder.yml``, or of the file that training writes for one model; empty where there is neither."""
    for name in (f"{model_name or MODEL_NAME}.{DECODER_CONFIG_NAME}", DECODER_CONFIG_NAME):
        try:
            return _read_yaml((directory / name).read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            faults.append(f"{name}: cannot be read: {error}")
            break
    return {}


def _model_path(directory: Path, decoder_settings: Mapping[str, Any], faults: list[str]) -> Path | None:
    """The one model of a directory; None after a fault."""
    named = decoder_settings.get("models")
    if isinstance(named, list) and len(named) > 1:
        faults.append(f"{DECODER_CONFIG_NAME}: models: an ensemble of {len(named)} is not supported, only one model")
        return None
    if isinstance(named, list) and named and isinstance(named[0], str):
        return _beside(directory, named[0], "models", faults)
    found = _models_in(directory)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or f"none, {MODEL_NAME} is missing"
        faults.append(f"one model is needed, and there are several: {names}" if found else f"a model is needed: {names}")
        return None
    return found[0]


def _vocabulary_paths(directory: Path, decoder_settings: Mapping[str, Any], faults: list[str]) -> tuple[Path, Path] | None:
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


def _read_vocabularies(paths: tuple[Path, Path], faults: list[str]) -> Vocabularies | None:
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
    for token, number in _read_yaml(path.read_bytes()).items():
        if not isinstance(number, str) or not (number.isascii() and number.isdigit() and len(number) < 10):
            raise ValueError(f"{token!r} has no id, but {number!r}")
        vocabulary[token] = int(number)
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError("two tokens have one id")
    return vocabulary


def _read_yaml(contents: bytes) -> dict[str, str | list[str] | None]:
    """A YAML mapping of text to text, or to a list of text; deeper values become None.

    Values stay text: a vocabulary has tokens like ``yes`` and ``1.5``, which YAML takes for something else. Read as events, so
    that aliases and depth of a hostile file cost nothing.

    Raises:
        ValueError: it is no such mapping.
    """
    found: dict[str, str | list[str] | None] = {}
    key: str | None = None
    items: list[str] | None = None
    # Of the values inside the mapping: 0 at its keys and plain values.
    depth = -1
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        for event in yaml.parse(contents, Loader=loader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("has aliases, which are not supported")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth == 0 and not isinstance(event, yaml.MappingStartEvent):
                    raise ValueError("is no YAML mapping")
                if depth > 0 and key is None:
                    raise ValueError("has a key that is no text")
                # To read on takes a time that grows with the square of the depth.
                if depth > _MAX_YAML_DEPTH:
                    raise ValueError("is nested too deeply")
                items = [] if depth == 1 and isinstance(event, yaml.SequenceStartEvent) else None
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
                if depth == 0:
                    assert key is not None
                    found[key], key, items = items, None, None
            elif isinstance(event, yaml.ScalarEvent):
                if depth < 0:
                    raise ValueError("is no YAML mapping")
                if depth == 1 and items is not None:
                    items.append(event.value)
                elif depth == 0 and key is None:
                    key = event.value
                    if key in found:
                        raise ValueError(f"has {key!r} twice")
                elif depth == 0:
                    assert key is not None
                    found[key] = "" if event.implicit[0] and event.value in ("~", "null") else event.value
                    key = None
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())}") from error
    return found


def _model_settings(path: Path, arrays: dict[str, NDArray[Any]], faults: list[str]) -> _MarianConfig | None:
    """The settings inside the model, which are taken out of ``arrays``; None after a fault."""
    stored = arrays.pop(MODEL_CONFIG_NAME, None)
    if stored is None:
        faults.append(f"{path.name}: has no {MODEL_CONFIG_NAME}, so it is no model of Marian's")
        return None
    if stored.dtype.itemsize != 1 or stored.nbytes > _MAX_CONFIG_BYTES:
        faults.append(f"{path.name}: {MODEL_CONFIG_NAME}: is no text of at most {_MAX_CONFIG_BYTES} bytes")
        return None
    called = f"{path.name}: {MODEL_CONFIG_NAME}"
    try:
        document = _read_yaml(stored.tobytes().rstrip(b"\0"))
    except ValueError as error:
        faults.append(f"{called}: {error}")
        return None
    found = setting_faults({"type": None, **document}, _ONLY)
    settings = None
    try:
        settings = _MarianConfig.model_validate(document)
        found += settings.architecture_faults()
    except ValidationError as error:
        found += field_faults(error.errors())
    faults += [f"{called}: {fault}" for fault in found]
    return None if found else settings


def _model(
    settings: _MarianConfig, arrays: Mapping[str, NDArray[Any]], eos_id: int, file_name: str, faults: list[str]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The architecture and its tensors, with the start token; what is wrong with them goes to ``faults``."""
    trained = arrays.get("Wpos")
    # More rows than a table of positions ever has would only be a fault that leads astray.
    rows = trained.shape[-2] if trained is not None and trained.ndim >= 2 else _MAX_POSITIONS
    config = settings.architecture(eos_id, min(max(rows, 1), _MAX_POSITIONS), trained_positions=trained is not None)
    names = tensor_names(config, legacy_output="decoder_ff_logit_out_W" in arrays)
    stored = {name: _tensor(name, array) for name, array in arrays.items()}
    computed = position_table(config.max_positions, config.d_model)
    table = computed if trained is None else stored.pop("Wpos")[: config.max_positions]
    for side, called in (("encoder", "Wpos"), ("decoder", "Wpos of the decoder")):
        stored[called] = table
        names[called] = f"{side}.embedding.position_table"
    if settings.output_omit_bias:
        stored.setdefault("decoder_ff_logit_out_b", torch.zeros(config.target_vocab_size))
    tensors = rename(config, stored, names, file_name, faults)
    if not tensors:
        return config, {}
    if settings.transformer_ffn_activation == "gelu":
        _fold_gelu(tensors)
    return _with_start_token(config, tensors)


def _tensor(name: str, array: NDArray[Any]) -> Tensor:
    """A tensor as the module has it: a product's matrix is stored as [in, out], a vector as [1, size]."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    # A type that torch has not is told of as any other wrong one.
    tensor = torch.from_numpy(array) if array.dtype.kind in "fiub" else torch.zeros(array.shape, dtype=torch.complex64)
    if tensor.dim() == 2 and tensor.shape[0] == 1 and ("_b" in name or "_ln_" in name):
        return tensor[0]
    is_product = "_W" in name and not name.endswith(("_Wt", "_Wemb"))
    return tensor.T.contiguous() if is_product and tensor.dim() == 2 and "_ln_" not in name else tensor


def _fold_gelu(tensors: dict[str, Tensor]) -> None:
    """Make Marian's gelu of the module's silu: x * sigmoid(r x) = silu(r x) / r."""
    for name in tensors:
        if ".feed_forward.inner." in name:
            tensors[name] = tensors[name] * _GELU_RATE
        elif name.endswith(".feed_forward.outer.weight"):
            tensors[name] = tensors[name] / _GELU_RATE


def _with_start_token(config: ModelConfig, tensors: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same with one more target token, whose embedding is zero: what Marian's decoder starts from. It is never decoded."""
    size = config.target_vocab_size
    for name in ("decoder.embedding.tokens.weight", "output.weight", "output.bias"):
        if name in tensors:
            tensors[name] = torch.cat([tensors[name], torch.zeros_like(tensors[name][:1])])
    sizes = {"target_vocab_size": size + 1, "decoder_start_id": size}
    if config.share_embeddings:
        sizes["source_vocab_size"] = size + 1
    return ModelConfig(**{**config.model_dump(), **sizes}), tensors
