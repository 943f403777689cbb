"""int8 graphs whose scales were measured beforehand, on a model's own translations of sample sentences.

Knows the graph modules and what of them is quantized: the tables of tokens, every product, and both caches with one scale for
each channel. A scale is a constant of the graph, so that a row's result cannot depend on its neighbours, and a product needs one
small operator where scales found at run time need eight. A cache in bytes is a quarter of the memory that a step has to read.
Does not know ONNX, files, or where the sentences come from.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from export.attention import CacheScales, Int8SelfAttention, RaggedCrossAttention
from export.graphs import DecoderStepGraph, EncoderGraph, GraphDecoderLayer, TokenTable, lay_out
from export.model import Transformer
from export.quantize import SMALLEST_MAXIMUM, CalibratedInt8Linear, Int8TokenTable, ObservedLinear, RoundToInt8
from export.verify import Reference, module_stepper


def calibrated_graphs(model: Transformer, references: Iterable[Reference]) -> tuple[EncoderGraph, DecoderStepGraph]:
    """Both graphs with int8 products and int8 caches.

    Args:
        model: trained, in float32.
        references: sources and the model's translations of them; activations are measured on these.
    """
    encoder, decoder = lay_out(model, ObservedLinear)
    step_through = module_stepper(model.config, encoder, decoder)
    for reference in references:
        step_through(reference)
    _quantize_caches(encoder, decoder, model.config.num_heads)
    quantize_tables(encoder, decoder)
    for graph in (encoder, decoder):
        _quantize_products(graph)
    return encoder, decoder


def quantize_tables(encoder: EncoderGraph, decoder: DecoderStepGraph) -> None:
    """Put tables of bytes in the place of the tables of tokens: one in the place of a shared one."""
    source, target = encoder.embedding.tokens, decoder.embedding.tokens
    assert isinstance(source, TokenTable)
    assert isinstance(target, TokenTable)
    encoder.embedding.tokens = Int8TokenTable(source.rows)
    decoder.embedding.tokens = encoder.embedding.tokens if target is source else Int8TokenTable(target.rows)


def _quantize_caches(encoder: EncoderGraph, decoder: DecoderStepGraph, num_heads: int) -> None:
    """Give every cache its scales, and let the encoder end in bytes."""
    cross = _observed(encoder.cross)
    cross_scales = _cache_scale(cross.output_magnitude)
    encoder.cross = nn.Sequential(CalibratedInt8Linear(cross, output_scale=cross_scales), RoundToInt8())
    scales = cross_scales.chunk(encoder.num_tensors)
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, GraphDecoderLayer)
        qkv = _observed(layer.qkv)
        _, key, value = _cache_scale(qkv.output_magnitude).chunk(3)
        layer.qkv = QueryAndBytes(qkv, torch.cat((key, value)))
        layer.self_attention = Int8SelfAttention(num_heads, CacheScales(key, value, num_heads))
        layer.cross_attention = RaggedCrossAttention(num_heads, CacheScales(scales[2 * i], scales[2 * i + 1], num_heads))


class QueryAndBytes(nn.Module):
    """A decoder layer's query in floating point, and its key and value as their caches keep them."""

    def __init__(self, qkv: ObservedLinear, key_value_scale: Tensor) -> None:
        """Of a product that makes all three side by side; key_value_scale: [2 * h * head_dim]."""
        super().__init__()
        size = len(key_value_scale) // 2
        self.query = CalibratedInt8Linear(qkv.columns(0, size))
        self.key_value = CalibratedInt8Linear(qkv.columns(size, 3 * size), output_scale=key_value_scale)
        self.round = RoundToInt8()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., d_model] -> [..., h * head_dim] float32 and [..., 2 * h * head_dim] int8."""
        return self.query(x), self.round(self.key_value(x))


def _quantize_products(module: nn.Module) -> None:
    """Put an int8 product in the place of every one that was observed."""
    for name, child in module.named_children():
        if isinstance(child, ObservedLinear):
            setattr(module, name, CalibratedInt8Linear(child))
        else:
            _quantize_products(child)


def _cache_scale(magnitude: Tensor) -> Tensor:
    """The largest absolute value of each channel -> what one step of its byte stands for."""
    return magnitude.clamp(min=SMALLEST_MAXIMUM) / 127


def _observed(module: nn.Module) -> ObservedLinear:
    assert isinstance(module, ObservedLinear)
    return module
