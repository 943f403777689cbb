"""A native checkpoint as a Hugging Face Marian directory: the same function, written down in another order.

``MarianMTModel`` is the paper's post-norm Transformer with one difference: its position table has all sines first, then all
cosines, where the paper interleaves them. Everything that reads or writes the residual stream (embeddings, projections, norms) is
linear or acts on each coordinate alike, so the coordinates can be put into any order, as long as all of them follow. The order
that turns one table into the other turns our model into Marian's, to the last bit of each weight.

Knows names and orders of tensors; needs none of the packages that read the result.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from export.checkpoint import Checkpoint
from export.checkpoint.marian import parameter_names
from export.graphs import NEVER

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "gelu_sigmoid": "quick_gelu", "silu": "swish"}
_WRITERS = (".output", ".outer", "_residual.norm")
_EMBEDDING = "decoder.embedding.tokens.weight"


def concatenated_order(d_model: int) -> Tensor:
    """[d_model]: the place in the interleaved table of each coordinate of the concatenated one."""
    return torch.cat((torch.arange(0, d_model, 2), torch.arange(1, d_model, 2)))


def write_marian(checkpoint: Checkpoint, directory: Path) -> Path:
    """Write ``config.json``, ``generation_config.json`` and ``model.safetensors`` (float32).

    Padding and start token get the bias on their logits that they have in a bundle, in Marian's own tensor for such biases.

    Raises:
        ValueError: Marian has no such variation of the architecture.
    """
    _check(checkpoint)
    config = checkpoint.config
    ids = {
        "pad_token_id": config.pad_id,
        "bos_token_id": None,
        "eos_token_id": config.eos_id,
        "decoder_start_token_id": config.decoder_start_id,
        # Marian's default would force its own end token on hypotheses that reach the limit.
        "forced_eos_token_id": None,
    }
    architecture = {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        "is_encoder_decoder": True,
        "vocab_size": config.target_vocab_size,
        "d_model": config.d_model,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.encoder_d_ff,
        "decoder_ffn_dim": config.decoder_d_ff,
        "activation_function": _ACTIVATIONS[config.activation],
        "normalize_before": False,
        "normalize_embedding": False,
        "static_position_embeddings": True,
        "scale_embedding": config.scale_embedding,
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
        "max_position_embeddings": config.max_positions,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**architecture, **ids}))
    (directory / "generation_config.json").write_text(json.dumps(ids))
    save_file(marian_tensors(checkpoint), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def marian_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor by Marian's name."""
    stream = concatenated_order(checkpoint.config.d_model)
    tensors = checkpoint.tensors
    bias = torch.zeros(1, checkpoint.config.target_vocab_size)
    bias[:, checkpoint.config.never_decoded] = NEVER
    renamed = {"model.shared.weight": tensors[_EMBEDDING][:, stream], "final_logits_bias": bias}
    left = set(tensors) - {_EMBEDDING}
    for theirs, ours in parameter_names(checkpoint.config):
        # A projection or norm either writes the residual stream or reads it.
        writes = ours.endswith(_WRITERS)
        weight = tensors[f"{ours}.weight"][stream] if writes else tensors[f"{ours}.weight"][:, stream]
        renamed[f"{theirs}.weight"] = weight
        renamed[f"{theirs}.bias"] = tensors[f"{ours}.bias"][stream] if writes else tensors[f"{ours}.bias"]
        left -= {f"{ours}.weight", f"{ours}.bias"}
    assert not left, f"no place in Marian for {sorted(left)}"
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


def _check(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    needed = {
        "d_head": None,
        "norm": "post",
        "norm_kind": "layer",
        "gated": False,
        "positions": "sinusoidal",
        "bias": True,
        "output_bias": False,
        "share_embeddings": True,
        "tie_output": True,
        "embedding_norm": False,
        "layer_norm_eps": 1e-5,
    }
    if faults := [f"{name} {getattr(config, name)}" for name, value in needed.items() if getattr(config, name) != value]:
        raise ValueError(f"{checkpoint.name}: Marian has no {', no '.join(faults)}")
