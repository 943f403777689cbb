"""Models built around ``torch.nn.Transformer``: a state dict, and a ``config.json`` that says what is what in it.

A directory with ``config.json``, the state dict (``model.pt``, or another name; safetensors too), the tokenizer's files and, if
there is one, ``samples.txt``. torch's module has layers and no embeddings: what its user put around it, the config names.
Knows these files and the names of torch's tensors; does not know other formats or what becomes of a checkpoint.

**What torch does its own way** (torch/nn/modules/transformer.py): query, key and value are one product, ``in_proj_weight``; both
stacks end in a norm wherever the others are, unless the stacks were made without one, which is seen from the tensors.

**What the config says** beside ``ModelConfig``: under ``names``, what the model calls the parts; ``source_prefix``, ids that
every source starts with (``<bos>`` in torch's tutorial), and whether it ends in the end-of-sentence token. A table of positions,
learned or kept as a buffer, goes by ``source_positions`` and ``target_positions`` with ``"positions": "learned"``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from torch import Tensor

from export.checkpoint.archives import file_sha256, read_pickle, read_safetensors, state_dict, weights_of
from export.checkpoint.base import Checkpoint, read_samples
from export.checkpoint.described import CONFIG_NAME, Description, find_tokenizer_files, mentions, read_description
from export.checkpoint.hugging_face import rename
from export.model import ModelConfig, computed_positions
from serving.errors import CheckpointError
from serving.manifest import name_fault

_FORMAT: Literal["torch.nn.Transformer"] = "torch.nn.Transformer"
_SUPPORTED_REVISIONS = (1,)
_CONVERSION = "store the state dict alone: torch.save(model.state_dict(), FILE)"

_SAFETENSORS = ".safetensors"

_IN_PROJECTIONS = ("query", "key", "value")
_ATTENTIONS = {
    "encoder": {"self_attn": "self_attention"},
    "decoder": {"self_attn": "self_attention", "multihead_attn": "cross_attention"},
}
# Of a table that was computed in float32, or stored as float16; others differ by about 1.
_POSITION_TOLERANCE = 0.05
# The norms of a layer, from norm1 on: what they are around.
_NORMS = {
    "encoder": ("self_attention_residual", "feed_forward_residual"),
    "decoder": ("self_attention_residual", "cross_attention_residual", "feed_forward_residual"),
}


class _Names(BaseModel):
    """What a model calls its parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # The torch.nn.Transformer; its encoder and decoder where the model has two stacks of its own instead.
    transformer: str = "transformer"
    encoder: str | None = None
    decoder: str | None = None
    # Modules; the source's is not needed where it is the target's.
    source_embedding: str | None = None
    target_embedding: str
    # None: it is the target's embedding.
    output: str | None = None
    # Tables, [positions, d_model], maybe with dimensions of 1 more; None where positions are computed.
    source_positions: str | None = None
    target_positions: str | None = None
    # Norms right after the embeddings, where the model has such.
    source_embedding_norm: str | None = None
    target_embedding_norm: str | None = None
    # Tensors that are no weights.
    ignored: list[str] = []

    @property
    def is_one_embedding(self) -> bool:
        """Whether both sides have the same."""
        return self.source_embedding in (None, self.target_embedding)

    def stack(self, side: str) -> str:
        """What the encoder or the decoder is called."""
        own = self.encoder if side == "encoder" else self.decoder
        return f"{self.transformer}.{side}" if own is None else own


class _Config(Description):
    """What ``config.json`` holds."""

    format: Literal["torch.nn.Transformer"]
    weights: str = "model.pt"
    # Where in a file of more than weights the state dict is.
    state_dict: str | None = None
    names: _Names
    source_prefix: list[NonNegativeInt] = Field(default=[], max_length=16)
    source_ends_with_eos: bool = True


class TorchTransformerReader:
    """Reads this format; see ``CheckpointReader``."""

    description = f'a model around torch.nn.Transformer ({CONFIG_NAME} with "format": "{_FORMAT}", its state dict)'

    def recognizes(self, directory: Path) -> bool:
        """Whether ``config.json`` mentions the format; a broken one is still this format, and ``read`` tells what is wrong."""
        return mentions(directory, _FORMAT)

    def read(self, directory: Path) -> Checkpoint:
        """Read and check the whole checkpoint.

        Raises:
            CheckpointError: with every fault. Other files are looked at only when ``config.json`` can be read.
        """
        described = read_description(directory, _Config, _SUPPORTED_REVISIONS)
        faults = _faults(described)
        tokenizer_files = find_tokenizer_files(directory, described, faults)
        stored = _read_state(directory, described, faults)
        sample_lines = read_samples(directory, faults)
        if not stored:
            raise CheckpointError(directory, faults)
        config = _with_final_norm(described, stored, faults)
        faults += _ignored_table_faults(described, stored)
        names = tensor_names(config, described.names)
        tensors = rename(config, dict(_apart(stored, described.names, config.max_positions)), names, described.weights, faults)
        if faults:
            raise CheckpointError(directory, faults)
        return Checkpoint(
            name=described.name,
            config=config,
            tensors=tensors,
            languages=described.languages,
            source_prefix=tuple(described.source_prefix),
            source_ends_with_eos=described.source_ends_with_eos,
            tokenizer=described.tokenizer,
            tokenizer_files=tokenizer_files,
            weights_sha256=file_sha256(directory / described.weights),
            sample_lines=sample_lines,
        )


def tensor_names(config: ModelConfig, names: _Names) -> dict[str, str]:
    """Name in the state dict, one product in three, -> ours, of every tensor; a shared matrix has several."""
    found = {f"{names.target_embedding}.weight": "decoder.embedding.tokens.weight"}
    if not names.is_one_embedding:
        found[f"{names.source_embedding}.weight"] = "encoder.embedding.tokens.weight"
    if names.output is not None:
        found |= {f"{names.output}.{kind}": f"output.{kind}" for kind in ("weight", "bias")}
    for side, table, norm in (
        ("encoder", names.source_positions, names.source_embedding_norm),
        ("decoder", names.target_positions, names.target_embedding_norm),
    ):
        if table is not None:
            found[_table_of(side, table)] = f"{side}.embedding.position_table"
        if norm is not None:
            found |= {f"{norm}.{kind}": f"{side}.embedding.norm.{kind}" for kind in ("weight", "bias")}
    return found | {
        f"{theirs}{kind}": f"{ours}.{kind[1:]}"
        for theirs, ours in _parameter_names(config, names)
        for kind in (".weight", ".bias")
    }


def _parameter_names(config: ModelConfig, names: _Names) -> Iterator[tuple[str, str]]:
    """(torch's name, ours) of every projection and norm of the layers, without ``.weight`` and ``.bias``."""
    for side, depth in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        stack = names.stack(side)
        for i in range(depth):
            theirs, ours = f"{stack}.layers.{i}", f"{side}.layers.{i}"
            for attn, attention in _ATTENTIONS[side].items():
                for projection in _IN_PROJECTIONS:
                    yield f"{theirs}.{attn}.{projection} of in_proj", f"{ours}.{attention}.{projection}"
                yield f"{theirs}.{attn}.out_proj", f"{ours}.{attention}.output"
            yield f"{theirs}.linear1", f"{ours}.feed_forward.inner"
            yield f"{theirs}.linear2", f"{ours}.feed_forward.outer"
            for number, residual in enumerate(_NORMS[side], start=1):
                yield f"{theirs}.norm{number}", f"{ours}.{residual}.norm"
        if config.final_norm:
            yield f"{stack}.norm", f"{side}.final_norm"


def _apart(stored: Mapping[str, Tensor], names: _Names, max_positions: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors by the names of ``tensor_names``: one product as three, a table of both sides as two, each in its shape here."""
    tables = {"encoder": names.source_positions, "decoder": names.target_positions}
    for name, tensor in stored.items():
        attention, _, kind = name.rpartition(".in_proj_")
        if name in names.ignored:
            continue
        if name in tables.values():
            table = _as_table(tensor)
            # What is none is told of by the shape that it has.
            table = tensor if table is None else table[:max_positions]
            yield from ((_table_of(side, name), table) for side, called in tables.items() if called == name)
        elif attention and tensor.dim() > 0:
            for projection, part in zip(_IN_PROJECTIONS, tensor.chunk(3), strict=False):
                yield f"{attention}.{projection} of in_proj.{kind}", part
        else:
            yield name, tensor


def _as_table(tensor: Tensor) -> Tensor | None:
    """A table as [positions, d_model], whose other dimensions are of 1; None when it is none."""
    rows = [length for length in tensor.shape[:-1] if length != 1]
    return tensor.flatten(0, -2) if tensor.dim() > 1 and len(rows) <= 1 else None


def _table_of(side: str, name: str) -> str:
    return f"{name} (of the {side})"


def _faults(described: _Config) -> list[str]:
    """Settings that contradict each other."""
    names, model = described.names, described.model
    faults = [f"weights: {fault}"] if (fault := name_fault(described.weights)) else []
    if described.state_dict is not None and described.weights.endswith(_SAFETENSORS):
        faults.append(f"state_dict: a {_SAFETENSORS} holds tensors alone")
    if names.output is None and not model.tie_output:
        faults.append("names.output: is needed where model.tie_output is false")
    if names.is_one_embedding and not model.share_embeddings:
        faults.append("names.source_embedding: is needed where model.share_embeddings is false")
    for field, named, setting, is_set in (
        ("source_positions", names.source_positions, '"positions": "learned"', model.positions == "learned"),
        ("target_positions", names.target_positions, '"positions": "learned"', model.positions == "learned"),
        ("source_embedding_norm", names.source_embedding_norm, '"embedding_norm": true', model.embedding_norm),
        ("target_embedding_norm", names.target_embedding_norm, '"embedding_norm": true', model.embedding_norm),
    ):
        if (named is not None) != is_set:
            faults.append(f"names.{field}: goes with {setting} of the model, and only with it")
    if outside := [i for i in described.source_prefix if i >= model.source_vocab_size]:
        faults.append(f"source_prefix: {outside} is outside the source vocabulary of {model.source_vocab_size}")
    if model.positions == "relative":
        faults.append("model.positions: torch's attention has no relative ones")
    if model.norm_kind != "layer":
        faults.append(f"model.norm_kind: {model.norm_kind!r} is not what torch's layers have, only 'layer'")
    if model.gated:
        faults.append("model.gated: torch's layers are not")
    return [f"{CONFIG_NAME}: {fault}" for fault in faults]


def _with_final_norm(described: _Config, stored: Mapping[str, Tensor], faults: list[str]) -> ModelConfig:
    """The architecture with norms after the last layers where the tensors have such; what it states otherwise is a fault."""
    norm = f"{described.names.stack('encoder')}.norm.weight"
    if described.model.final_norm not in (None, norm in stored):
        there_is = "there is" if norm in stored else "there is no"
        stated = str(described.model.final_norm).lower()
        faults.append(f"{CONFIG_NAME}: model.final_norm: is {stated}, and {there_is} {norm} in {described.weights}")
    return described.model.model_copy(update={"final_norm": norm in stored})


def _ignored_table_faults(described: _Config, stored: Mapping[str, Tensor]) -> Iterator[str]:
    """Tensors that are not looked at, and look like positions that are none of the computed ones."""
    model = described.model
    if model.positions not in ("sinusoidal", "sinusoidal_concatenated"):
        return
    for name in described.names.ignored:
        table = _as_table(stored[name]) if name in stored else None
        # As many rows as a vocabulary has are its tokens.
        if table is None or table.shape[1] != model.d_model or len(table) in (model.source_vocab_size, model.target_vocab_size):
            continue
        kept = table[: model.max_positions].to(torch.float32)
        if len(kept) == model.max_positions and not kept.allclose(computed_positions(model), rtol=0, atol=_POSITION_TOLERANCE):
            yield (
                f"{CONFIG_NAME}: names.ignored: {name} looks like a table of positions and is not the computed one: "
                "name it as source_positions and target_positions"
            )


def _read_state(directory: Path, described: _Config, faults: list[str]) -> dict[str, Tensor]:
    """The state dict as it is stored; none after a fault, which goes to ``faults``."""
    if name_fault(described.weights):
        return {}
    path = directory / described.weights
    if not path.is_file():
        faults.append(f"{described.weights}: is missing")
        return {}
    if path.suffix == _SAFETENSORS:
        return read_safetensors(path, faults)
    document: dict[str, Any] = read_pickle(path, (), _CONVERSION, faults)
    if not document:
        return {}
    if described.state_dict is None:
        return state_dict(document, path.name, faults)
    return weights_of(document, described.state_dict, path.name, faults)
