"""The three attentions of the graphs: ONNX Runtime's operators while tracing, plain PyTorch otherwise.

Both branches of a function mean the same; ``verify.py`` measures how far they are apart. The operators were chosen by
measurement: each row's cost follows its own length, and its result does not depend on its neighbours in any bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_DOMAIN = "com.microsoft"
# GroupQueryAttention takes heads whose width is a multiple of this.
HEAD_DIM_STEP = 8


# The operator that stands for ragged cross-attention in a traced graph, until ``beam_widths.py`` puts real ones in its place.
RAGGED_DOMAIN = "onnxlate"
RAGGED_CROSS_ATTENTION = "RaggedCrossAttention"


@dataclass(frozen=True, slots=True)
class StepLengths:
    """How far the rows of a step are, and how long their sources."""

    positions: Tensor  # [R] int32, keys in the row's cache before this step
    longest: Tensor  # int32 scalar, keys of the longest row after this step
    source: Tensor  # [B] int32
    # The same for the operator that takes a row's last position and the longest row: [B] int32 and int32 scalar.
    last_source: Tensor
    longest_source: Tensor
    no_keys: Tensor  # [B, 0, d_model]


@dataclass(frozen=True, slots=True)
class CacheScales:
    """What the bytes of an int8 cache stand for: one scale for each channel, [1, h, 1, head_dim] float32."""

    key: Tensor
    value: Tensor


def self_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, num_heads: int) -> Tensor:
    """Bidirectional attention within each source: [B, S, d_model] each, lengths [B] int32 -> [B, S, d_model]."""
    if torch.onnx.is_in_onnx_export():
        return _multi_head_attention(query, key, value, lengths, num_heads)
    return _attend(_split(query, num_heads), _split(key, num_heads), _split(value, num_heads), lengths)


def padded_cross_attention(query: Tensor, key: Tensor, value: Tensor, step: StepLengths, num_heads: int) -> Tensor:
    """Attend to the sources, at the cost of the longest: query [B, W, d_model]; key, value [B, h, S, head_dim] -> as query."""
    if torch.onnx.is_in_onnx_export():
        return _multi_head_attention(query, key, value, step.source, num_heads)
    return _attend(_split(query, num_heads), key, value, step.source)


def ragged_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, step: StepLengths, num_heads: int, scales: CacheScales | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to the sources, each at the cost of its own length; what lies beyond it is never read.

    Args:
        query: [B, W, d_model].
        key: [B, h, S, head_dim], int8 with ``scales``, else as query.
        value: the same.
        step: lengths.
        num_heads: h.
        scales: of int8 caches.

    Returns:
        Attended [B, W, d_model], and both caches as they were: the operator wants to own them.
    """
    if torch.onnx.is_in_onnx_export():
        attended, key, value = torch.onnx.ops.symbolic_multi_out(
            f"{RAGGED_DOMAIN}::{RAGGED_CROSS_ATTENTION}",
            (query, step.no_keys, key, value, step.last_source, step.longest_source, *_scale_inputs(scales)),
            {"num_heads": num_heads},
            dtypes=(query.dtype, key.dtype, value.dtype),
            shapes=(query.shape, key.shape, value.shape),
            version=1,
        )
        return attended, key, value
    attended = _attend(_split(query, num_heads), *_dequantized(key, value, scales), step.source)
    return attended, key, value


def append_and_attend(
    qkv: Tensor, step: StepLengths, key_cache: Tensor, value_cache: Tensor, num_heads: int, scales: CacheScales | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Append each row's new key and value at the row's own position, in place, and attend to the row's keys so far.

    Args:
        qkv: [B, W, 3 * d_model]: query, key and value side by side.
        step: positions and the longest row.
        key_cache: [R, h, C, head_dim], int8 with ``scales``, else as qkv.
        value_cache: the same.
        num_heads: h.
        scales: of int8 caches.

    Returns:
        Attended [B, W, d_model], and both caches.
    """
    sources, width, packed = qkv.shape
    d_model = packed // 3
    rows = qkv.reshape(-1, 1, packed)
    if torch.onnx.is_in_onnx_export():
        unused = () if scales is None else (None,) * 5  # rotation, positions, bias, sinks
        attended, key_cache, value_cache = torch.onnx.ops.symbolic_multi_out(
            f"{_DOMAIN}::GroupQueryAttention",
            (rows, None, None, key_cache, value_cache, step.positions, step.longest, *unused, *_scale_inputs(scales)),
            {"num_heads": num_heads, "kv_num_heads": num_heads, **quantized_cache_attributes(scales is not None)},
            dtypes=(qkv.dtype, key_cache.dtype, value_cache.dtype),
            shapes=((rows.shape[0], 1, d_model), key_cache.shape, value_cache.shape),
            version=1,
        )
    else:
        query, key, value = (_split(part, num_heads) for part in rows.chunk(3, dim=2))  # each [R, h, 1, head_dim]
        row = torch.arange(rows.shape[0])
        key_cache[row, :, step.positions] = _quantized(key, None if scales is None else scales.key)[:, :, 0]
        value_cache[row, :, step.positions] = _quantized(value, None if scales is None else scales.value)[:, :, 0]
        attended = _attend(query, *_dequantized(key_cache, value_cache, scales), step.positions + 1)
    return attended.reshape(sources, width, d_model), key_cache, value_cache


def quantized_cache_attributes(quantized: bool) -> dict[str, str | int]:
    """Attributes of GroupQueryAttention that say how its caches are stored."""
    if not quantized:
        return {}
    return {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}


def _scale_inputs(scales: CacheScales | None) -> tuple[Tensor, ...]:
    return () if scales is None else (scales.key, scales.value)


def _quantized(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else (x / scale).round().clamp(-128, 127).to(torch.int8)


def _dequantized(key: Tensor, value: Tensor, scales: CacheScales | None) -> tuple[Tensor, Tensor]:
    return (key, value) if scales is None else (key * scales.key, value * scales.value)


def _multi_head_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, num_heads: int) -> Tensor:
    """The operator: keys and values [B, S, d_model] or [B, h, S, head_dim], of which the first ``lengths`` [B] count.

    Lengths are 1-D on purpose: a 2-D mask falls to a slow kernel on CUDA.
    """
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::MultiHeadAttention",
        (query, key, value, None, lengths),
        {"num_heads": num_heads},
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )


def _split(x: Tensor, num_heads: int) -> Tensor:
    """[batch, length, d_model] -> [batch, heads, length, head_dim]."""
    return torch.unflatten(x, 2, (num_heads, -1)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    """Scaled dot-product attention over the first ``lengths`` keys -> [batch, length, d_model]."""
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    hidden = torch.arange(key.shape[2], device=key.device) >= lengths[:, None]
    weights = F.softmax(scores.masked_fill(hidden[:, None, None, :], float("-inf")), dim=3)
    return (weights @ value).transpose(1, 2).flatten(2)
