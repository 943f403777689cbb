"""Graphs that are traced once for all exports of the same module: a trace is nearly all that the export of a tiny model takes.

An export is its own in everything else: it reads, makes references, compares, writes. The same module is one of the same classes,
the same settings and the same numbers, down to the last bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from onnx import ModelProto
from torch import Tensor, nn

from export.graph_files import TracedGraph
from export.graphs import DecoderStepGraph, EncoderGraph
from export.model import ModelConfig
from export.onnx_export import TracedDecoder, export_decoder, export_encoder

_EVERY_MODULE_HAS = vars(nn.Module()).keys()
_T = TypeVar("_T")


class Traces:
    """Stands in for the two functions of ``export.onnx_export``."""

    def __init__(self) -> None:
        self._traced: dict[tuple[object, ...], Any] = {}

    def encoder(self, graph: EncoderGraph) -> TracedGraph:
        """``export_encoder``."""
        return self._once((fingerprint(graph),), lambda: export_encoder(graph))

    def decoder(self, graph: DecoderStepGraph, config: ModelConfig, cache_dtype: torch.dtype = torch.float32) -> TracedDecoder:
        """``export_decoder``."""
        key = (fingerprint(graph), repr(config), cache_dtype)
        return self._once(key, lambda: export_decoder(graph, config, cache_dtype))

    def _once(self, key: tuple[object, ...], trace: Callable[[], _T]) -> _T:
        if key not in self._traced:
            self._traced[key] = trace()
        traced: _T = self._traced[key]
        return traced


def fingerprint(graph: nn.Module) -> str:
    """A hash of all that a trace depends on: classes, what their instances were given, parameters and buffers."""
    digest = hashlib.sha256()
    for name, module in graph.named_modules():
        settings = {key: value for key, value in vars(module).items() if key not in _EVERY_MODULE_HAS}
        assert not any(isinstance(value, Tensor) for value in settings.values()), "a tensor's repr is not all of it"
        digest.update(repr((name, type(module), settings)).encode())
    for name, tensor in (*graph.named_parameters(), *graph.named_buffers()):
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def serialized(graph: TracedGraph) -> bytes:
    """A traced graph and its weights as one ONNX model."""
    model = ModelProto()
    model.CopyFrom(graph.model)
    for tensor in model.graph.initializer:
        if tensor.name in graph.weights:
            tensor.raw_data = graph.weights[tensor.name].contiguous().numpy().tobytes()
    return model.SerializeToString()
