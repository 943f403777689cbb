"""Directories of BART's descendants for tests: a tiny model's tensors by their names, and tokenizers of a few pieces."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.checkpoint import read_checkpoint
from export.checkpoint.bart import Family, tensor_names
from export.model import ModelConfig
from serving.errors import CheckpointError
from tests.support import TINY_LINES, tiny_config, tiny_model

PIECES = 64
MAX_POSITIONS = 20
# Those of ``config.json``; what they have in common.
FIELDS: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": MAX_POSITIONS,
}


def fairseq_sentencepiece() -> bytes:
    """A SentencePiece model whose special pieces are numbered as fairseq's models number them."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TINY_LINES),
        model_writer=stream,
        vocab_size=PIECES,
        model_type="bpe",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=3,
    )
    return stream.getvalue()


def pieces_of(serialized: bytes) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_proto=serialized)
    return [model.id_to_piece(i) for i in range(model.get_piece_size())]


def family_config(family: Family, vocab_size: int, **overrides: Any) -> ModelConfig:
    """What the reader is to make of ``FIELDS``, without tables of positions."""
    fields: dict[str, Any] = {
        "source_vocab_size": vocab_size,
        "target_vocab_size": vocab_size,
        "positions": "sinusoidal_concatenated",
        "max_positions": MAX_POSITIONS,
        "norm": family.norm,
        "embedding_norm": family.embedding_norm,
        "output_bias": family.output_bias,
        "pad_id": 1,
        "eos_id": 2,
        "decoder_start_id": 2,
    }
    return tiny_config(**{**fields, **overrides})


def family_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """The tiny model's tensors by the family's names, shared ones once."""
    state = tiny_model(config, seed=3).state_dict()
    tensors = {theirs: state[ours].clone() for theirs, ours in tensor_names(config).items()}
    if config.share_embeddings:
        for side in ("encoder", "decoder"):
            del tensors[f"model.{side}.embed_tokens.weight"]
        del tensors["lm_head.weight"]
    if config.output_bias:
        tensors["final_logits_bias"] = tensors["final_logits_bias"][None]
    return tensors


def stored_tables() -> dict[str, Tensor]:
    """Tables of learned positions, with the two rows in front that no position has."""
    generator = torch.Generator().manual_seed(5)
    sides = ("encoder", "decoder")
    return {f"model.{side}.embed_positions.weight": torch.randn(MAX_POSITIONS + 2, 16, generator=generator) for side in sides}


def write_weights(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors")


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text()) if path.exists() else {}
    change(document)
    path.write_text(json.dumps(document))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    write_weights(directory, tensors)


def faults_of(directory: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError, match=r"checkpoint .* cannot be used") as caught:
        read_checkpoint(directory)
    return caught.value.faults


def assert_same_state(directory: Path, config: ModelConfig) -> None:
    """All but the tables of positions is the tiny model's."""
    checkpoint = read_checkpoint(directory)
    assert checkpoint.config == config.model_copy(update={"positions": "learned"})
    written = tiny_model(config, seed=3).state_dict()
    tables = {f"{side}.embedding.position_table" for side in ("encoder", "decoder")}
    own = {name for name in written if not (config.tie_output and name == "output.weight")}
    own -= {"encoder.embedding.tokens.weight"} if config.share_embeddings else set()
    assert checkpoint.tensors.keys() == own | tables
    for name in own:
        assert torch.equal(checkpoint.tensors[name], written[name]), name
