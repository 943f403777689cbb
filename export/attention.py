"""The three attentions of the graphs: ONNX Runtime's operators while tracing, plain PyTorch otherwise.

Both branches of a function mean the same; ``verify.py`` measures how far they are apart. The operators were chosen by
measurement: each row's cost follows its own length, and its result does not depend on its neighbours in any bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The runtime's own operators.
CONTRIB_DOMAIN = "com.microsoft"
GROUP_QUERY_ATTENTION = "GroupQueryAttention"
# It takes heads whose width is a multiple of this.
HEAD_DIM_STEP = 8
# Its optional inputs between the lengths and the scales: rotation (two), positions, bias, sinks; and which of them the bias is.
NUM_UNUSED_INPUTS = 5
BIAS_INPUT = 3
# The runtime's softmax sums up so many numbers at a time, or a divisor of it, and what is left in another order: in rows of
# multiples of this the sum over a source does not depend on how far a lane is padded.
_SOFTMAX_STEP = 64
# What is left of a score that does not count.
_HIDDEN = -1e9

# The operator that stands for ragged cross-attention in a traced graph, until ``beam_widths.py`` puts real ones in its place.
RAGGED_DOMAIN = "onnxlate"
RAGGED_CROSS_ATTENTION = "RaggedCrossAttention"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLengths:
    """How far the rows of a step are, where their new keys go, and how long their sources are."""

    positions: Tensor  # [R] int32, keys in the row's cache before this step
    longest: Tensor  # int32 scalar, keys of the longest row after this step
    places: Tensor  # [R, h, 3] int64, of each row and head where its new key goes: row, head, position
    source: Tensor  # [B] int32
    # The same for the operator that takes a row's last position and the longest row: [B] int32 and int32 scalar.
    last_source: Tensor
    longest_source: Tensor
    # In the place of new keys, where the cache has all of them: of cross-attention [B, 0, h * head_dim], of self-attention
    # [R, 0, h * head_dim].
    no_keys: Tensor
    no_own_keys: Tensor
    # What relative positions add to the scores of self-attention: [R, h, 1, longest]. None where they are in the embedding.
    bias: Tensor | None


class CacheScales(nn.Module):
    """What the bytes of an int8 cache stand for: one scale for each channel."""

    key: Tensor  # [1, h, 1, head_dim] float32
    value: Tensor

    def __init__(self, key: Tensor, value: Tensor, num_heads: int) -> None:
        """Of each channel: [d_model]."""
        super().__init__()
        self.register_buffer("key", key.reshape(1, num_heads, 1, -1))
        self.register_buffer("value", value.reshape(1, num_heads, 1, -1))


def self_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, num_heads: int, bias: Tensor | None = None
) -> Tensor:
    """Bidirectional attention within each source: [B, S, h * head_dim] each, lengths [B] int32 -> [B, S, h * head_dim].

    ``bias`` [1, h, S, S] is added to the scores.
    """
    if torch.onnx.is_in_onnx_export():
        return _multi_head_attention(query, key, value, lengths, num_heads, bias)
    return _attend(_split(query, num_heads), _split(key, num_heads), _split(value, num_heads), lengths, bias)


class CrossAttention(nn.Module):
    """What both ways to attend to the sources have in common."""

    # Whether the operator returns the caches as they came, to be bound in place.
    keeps_caches = False

    def __init__(self, num_heads: int, scales: CacheScales | None = None) -> None:
        """Over floating-point caches, or int8 ones with their scales."""
        super().__init__()
        self.num_heads = num_heads
        self.scales = scales

    def weights(self, wanted: Tensor, query: Tensor, key: Tensor, step: StepLengths, mean_of: int) -> Tensor:
        """How much each source token is attended to; the operators do not tell, so it is computed anew.

        Args:
            wanted: bool scalar; where it is false this costs nothing, and says nothing.
            query: [B, W, h * head_dim].
            key: [B, h, S, head_dim].
            step: the sources' lengths.
            mean_of: so many heads, the first ones.

        Returns:
            [B, W, S] float32: sums to 1 over a source's tokens, 0 beyond them.
        """

        def attend(query: Tensor, key: Tensor, lengths: Tensor, *key_scale: Tensor) -> Tensor:
            for scale in key_scale:  # of bytes; a query takes it as well as all the keys do
                query = query * scale
            return _attention_weights(_split(query, self.num_heads)[:, :mean_of].float(), key[:, :mean_of].float(), lengths)

        def nothing(query: Tensor, key: Tensor, lengths: Tensor, *key_scale: Tensor) -> Tensor:
            return torch.zeros(*query.shape[:2], key.shape[2], dtype=torch.float32)

        inputs = (query, key, step.source, *(() if self.scales is None else (self.scales.key.flatten(),)))
        if torch.onnx.is_in_onnx_export():
            weights: Tensor = torch.cond(wanted, attend, nothing, inputs)
            return weights
        return attend(*inputs) if wanted else nothing(*inputs)


class PaddedCrossAttention(CrossAttention):
    """Attends to the sources at the cost of the longest."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, step: StepLengths) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, W, d_model]; key, value [B, h, S, head_dim] -> attended, as query, and both caches."""
        if torch.onnx.is_in_onnx_export():
            return _multi_head_attention(query, key, value, step.source, self.num_heads), key, value
        return _attend(_split(query, self.num_heads), key, value, step.source), key, value


class RaggedCrossAttention(CrossAttention):
    """Attends to the sources, each at the cost of its own length; what lies beyond it is never read."""

    keeps_caches = True

    def forward(self, query: Tensor, key: Tensor, value: Tensor, step: StepLengths) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, W, d_model]; key, value [B, h, S, head_dim] -> attended, as query, and both caches as they were."""
        if torch.onnx.is_in_onnx_export():
            attended, key, value = torch.onnx.ops.symbolic_multi_out(
                f"{RAGGED_DOMAIN}::{RAGGED_CROSS_ATTENTION}",
                (query, step.no_keys, key, value, step.last_source, step.longest_source, *_scale_inputs(self.scales)),
                {"num_heads": self.num_heads},
                dtypes=(query.dtype, key.dtype, value.dtype),
                shapes=(query.shape, key.shape, value.shape),
                version=1,
            )
            return attended, key, value
        return _attend(_split(query, self.num_heads), *_dequantized(key, value, self.scales), step.source), key, value


class CachedSelfAttention(nn.Module):
    """Appends each row's new key and value at the row's own position, in place, and attends to the row's keys so far."""

    # Whether the operator that attends returns the caches as they came, beside another that appends; both to be bound in place.
    keeps_caches = False

    def __init__(self, num_heads: int) -> None:
        """Over floating-point caches."""
        super().__init__()
        self.num_heads = num_heads

    def forward(self, qkv: Tensor, step: StepLengths, key_cache: Tensor, value_cache: Tensor) -> tuple[Tensor, ...]:
        """Attend.

        Args:
            qkv: [B, W, 3 * h * head_dim]: query, key and value side by side.
            step: positions, the longest row, and the bias on the scores.
            key_cache: [R, h, C, head_dim].
            value_cache: the same.

        Returns:
            Attended [B, W, h * head_dim], and both caches.
        """
        sources, width, packed = qkv.shape
        rows = qkv.reshape(-1, 1, packed)
        if torch.onnx.is_in_onnx_export():
            attended, key_cache, value_cache = _group_query_attention(
                rows, None, key_cache, value_cache, step, self.num_heads, shape=(rows.shape[0], 1, packed // 3)
            )
        else:
            query, key, value = (_split(part, self.num_heads) for part in rows.chunk(3, dim=2))  # each [R, h, 1, head_dim]
            row = torch.arange(rows.shape[0])
            key_cache[row, :, step.positions] = key[:, :, 0]
            value_cache[row, :, step.positions] = value[:, :, 0]
            attended = _attend(query, key_cache, value_cache, step.positions + 1, _padded_bias(step.bias, key_cache))
        return attended.reshape(sources, width, packed // 3), key_cache, value_cache


class Int8SelfAttention(nn.Module):
    """The same over caches of bytes, for keys and values that come in bytes.

    They are written by an operator of their own: the one that attends makes bytes of them one number after another, which takes
    as long as attending to 8 to 16 keys.
    """

    keeps_caches = True

    def __init__(self, num_heads: int, scales: CacheScales) -> None:
        """With what the bytes stand for."""
        super().__init__()
        self.num_heads = num_heads
        self.scales = scales

    def forward(
        self, projected: tuple[Tensor, Tensor], step: StepLengths, key_cache: Tensor, value_cache: Tensor
    ) -> tuple[Tensor, ...]:
        """Attend.

        Args:
            projected: the query [B, W, h * head_dim], and key and value side by side [B, W, 2 * h * head_dim] int8.
            step: places, positions, the longest row, and the bias on the scores.
            key_cache: [R, h, C, head_dim] int8.
            value_cache: the same.

        Returns:
            Attended [B, W, h * head_dim], both caches with what was appended, and both again.
        """
        query, key_value = projected
        rows = query.reshape(-1, 1, query.shape[2])
        # Each [R, h, head_dim].
        key, value = key_value.reshape(-1, 2 * self.num_heads, query.shape[2] // self.num_heads).chunk(2, dim=1)
        if torch.onnx.is_in_onnx_export():
            key_cache, value_cache = (
                torch.onnx.ops.symbolic("ScatterND", (cache, step.places, new), dtype=cache.dtype, shape=cache.shape)
                for cache, new in ((key_cache, key), (value_cache, value))
            )
            attended, *kept = _group_query_attention(
                rows, step.no_own_keys, key_cache, value_cache, step, self.num_heads, shape=rows.shape, scales=self.scales
            )
            return attended.reshape(query.shape), key_cache, value_cache, *kept
        row = torch.arange(rows.shape[0])
        key_cache[row, :, step.positions] = key
        value_cache[row, :, step.positions] = value
        attended = _attend(
            _split(rows, self.num_heads),
            *_dequantized(key_cache, value_cache, self.scales),
            step.positions + 1,
            _padded_bias(step.bias, key_cache),
        )
        return attended.reshape(query.shape), key_cache, value_cache, key_cache, value_cache


def cache_places(positions: Tensor, num_heads: int) -> Tensor:
    """Positions [R] -> ``StepLengths.places``. A sum, because that takes fewer operators than putting them together."""
    device = positions.device
    row, head, position = torch.eye(3, dtype=torch.int64, device=device)
    heads = torch.arange(num_heads, device=device)[:, None] * head  # [h, 3]
    rows = torch.arange(positions.shape[0], device=device)
    places: Tensor = rows.reshape(-1, 1, 1) * row + positions.long().reshape(-1, 1, 1) * position + heads
    return places


def quantized_cache_attributes(quantized: bool) -> dict[str, str | int]:
    """Attributes of GroupQueryAttention that say how its caches are stored."""
    if not quantized:
        return {}
    return {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}


def _scale_inputs(scales: CacheScales | None) -> tuple[Tensor, ...]:
    return () if scales is None else (scales.key, scales.value)


def _padded_bias(bias: Tensor | None, cache: Tensor) -> Tensor | None:
    """What is added to the scores, for all positions of a cache."""
    return None if bias is None else F.pad(bias, (0, cache.shape[2] - bias.shape[3]))


def _group_query_attention(
    query: Tensor,
    no_keys: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    step: StepLengths,
    num_heads: int,
    *,
    shape: Sequence[int],
    scales: CacheScales | None = None,
) -> tuple[Tensor, ...]:
    """The operator: attended, of ``shape``, and both caches. Without ``no_keys`` the query has new keys and values beside it."""
    optional: list[Tensor | None] = [None] * NUM_UNUSED_INPUTS
    optional[BIAS_INPUT] = step.bias
    optional += _scale_inputs(scales)
    while optional and optional[-1] is None:
        optional.pop()
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            f"{CONTRIB_DOMAIN}::{GROUP_QUERY_ATTENTION}",
            (query, no_keys, no_keys, key_cache, value_cache, step.positions, step.longest, *optional),
            {"num_heads": num_heads, "kv_num_heads": num_heads, **quantized_cache_attributes(scales is not None)},
            dtypes=(query.dtype, key_cache.dtype, value_cache.dtype),
            shapes=(shape, key_cache.shape, value_cache.shape),
            version=1,
        )
    )


def _dequantized(key: Tensor, value: Tensor, scales: CacheScales | None) -> tuple[Tensor, Tensor]:
    return (key, value) if scales is None else (key * scales.key, value * scales.value)


def _multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, num_heads: int, bias: Tensor | None = None
) -> Tensor:
    """The operator: keys and values [B, S, h * head_dim] or [B, h, S, head_dim], of which the first ``lengths`` [B] count.

    Lengths are 1-D on purpose: a 2-D mask falls to a slow kernel on CUDA.
    """
    return torch.onnx.ops.symbolic(
        f"{CONTRIB_DOMAIN}::MultiHeadAttention",
        (query, key, value, None, lengths) if bias is None else (query, key, value, None, lengths, bias),
        {"num_heads": num_heads},
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )


def _split(x: Tensor, num_heads: int) -> Tensor:
    """[batch, length, h * head_dim] -> [batch, heads, length, head_dim]."""
    return torch.unflatten(x, 2, (num_heads, -1)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention over the first ``lengths`` keys -> [batch, length, h * head_dim]."""
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    if bias is not None:
        scores = scores + bias
    hidden = torch.arange(key.shape[2], device=key.device) >= lengths[:, None]
    weights = F.softmax(scores.masked_fill(hidden[:, None, None, :], float("-inf")), dim=3)
    return (weights @ value).transpose(1, 2).flatten(2)


def _attention_weights(query: Tensor, key: Tensor, lengths: Tensor) -> Tensor:
    """[B, heads, W, head_dim], [B, heads, S, head_dim], [B] -> the mean over the heads [B, W, S], 0 beyond the lengths.

    Bit for bit the same whatever B, W and S are, if S is a multiple of 4, as lanes have it: each query has a product of its own,
    whose kernel takes so many keys at a time, softmax gets whole steps, and the heads are added up one by one.
    """
    scores = (key[:, :, None] @ query[..., None])[..., 0] / math.sqrt(query.shape[3])  # [B, heads, W, S]
    hidden = (torch.arange(key.shape[2], device=key.device) >= lengths[:, None])[:, None, :]  # [B, 1, S]
    scores = scores.masked_fill(hidden[:, None], _HIDDEN)
    padded = F.pad(scores, (0, -key.shape[2] % _SOFTMAX_STEP), value=_HIDDEN)
    heads = F.softmax(padded, dim=3)[..., : key.shape[2]].unbind(dim=1)
    total = heads[0]
    for weights in heads[1:]:
        total = total + weights
    # The runtime's softmax leaves a trace of what is hidden.
    return (total / len(heads)).masked_fill(hidden, 0.0)
