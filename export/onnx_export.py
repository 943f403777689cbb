"""Trace the graphs: names, dynamic axes, opset. Knows torch.onnx; does not know checkpoints, precision or bundles."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from onnx import ModelProto, TensorProto
from onnxscript import ir
from torch import Tensor, nn

from export.beam_widths import attend_by_row, expand_cross_attention
from export.graph_files import TracedGraph
from export.graphs import DecoderStepGraph, EncoderGraph
from export.model import ModelConfig

# LayerNormalization (17) and everything else the graphs use; ONNX Runtime's own operators come from its domain. No later one:
# its CUDA kernels of ReduceMax and Equal are for the versions that 18 has, and a graph with newer ones runs those on the CPU.
OPSET = 18

# Widest beam of a decoder for a CPU, which has a branch for each width.
MAX_BEAM_SIZE = 16

# Tensors of fewer bytes are constants of the graph and no weights.
_SMALLEST_WEIGHT_BYTES = 1024

_ANY = torch.export.Dim.DYNAMIC


def export_encoder(graph: EncoderGraph) -> TracedGraph:
    """Trace the encoder: ``source_ids``, ``source_lengths`` -> ``cross_cache``; sources and source length are dynamic."""
    example = (torch.ones(3, 7, dtype=torch.int64), torch.tensor([7, 5, 2], dtype=torch.int32))
    return _trace(
        graph,
        example,
        dynamic_shapes=({0: _ANY, 1: _ANY}, {0: _ANY}),
        input_names=["source_ids", "source_lengths"],
        output_names=["cross_cache"],
    )


def example_step(
    config: ModelConfig, *, sources: int, width: int, source_capacity: int, target_capacity: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Arguments of ``DecoderStepGraph.forward`` for the first step of a lane with empty caches."""
    tensors = 2 * config.num_decoder_layers
    own = (sources * width, config.num_heads, target_capacity, config.head_dim)
    cross = (sources, config.num_heads, source_capacity, config.head_dim)
    return (
        torch.full((sources, width), config.decoder_start_id, dtype=torch.int64),
        torch.zeros(sources, width, dtype=torch.int32),
        torch.tensor(1, dtype=torch.int32),
        torch.full((sources,), source_capacity, dtype=torch.int32),
        torch.arange(2),
        torch.tensor(True),
        torch.tensor(True),
        [torch.zeros(own, dtype=dtype) for _ in range(tensors)],
        [torch.zeros(cross, dtype=dtype) for _ in range(tensors)],
    )


class TracedDecoder(NamedTuple):
    """A decoder step in the forms that a bundle has."""

    every_width: TracedGraph
    # The same weights, for width 1 alone: a row gets the same bits, if it has a source with the same keys and values, and there
    # is no branch for that. None in a graph for CUDA, which has none in any case.
    by_row: TracedGraph | None


def export_decoder(graph: DecoderStepGraph, config: ModelConfig, cache_dtype: torch.dtype = torch.float32) -> TracedDecoder:
    """Trace one decoder step; sources, beam width, source capacity, target capacity and candidates are dynamic.

    Inputs: ``target_ids``, ``positions``, ``longest``, ``source_lengths``, ``candidate_ranks``, ``log_probs_wanted``,
    ``attention_wanted``, ``self_cache.N``, ``cross_cache.N``. Outputs: ``candidate_ids``, ``candidate_log_probs``, ``logits``,
    ``attention``, ``self_cache_appended.N``, of one with int8 caches ``self_cache_kept.N``, of a graph for a CPU
    ``cross_cache_kept.N``: all caches are to be bound to the very memory of those that came in.
    """
    traced = _trace_decoder(graph, config, cache_dtype)
    if not graph.keeps_cross_cache:
        return TracedDecoder(traced, None)
    by_row = TracedGraph(ModelProto(), traced.weights)
    by_row.model.CopyFrom(traced.model)
    attend_by_row(by_row.model)
    expand_cross_attention(traced.model, target_ids="target_ids", head_dim=config.head_dim, max_width=MAX_BEAM_SIZE)
    return TracedDecoder(traced, by_row)


def _trace_decoder(graph: DecoderStepGraph, config: ModelConfig, cache_dtype: torch.dtype) -> TracedGraph:
    """With stand-ins for ragged cross-attention."""
    tensors = 2 * config.num_decoder_layers
    rows: dict[int, Any] = {0: _ANY, 1: _ANY}
    cache: dict[int, Any] = {0: _ANY, 2: _ANY}
    # Sizes of the example are all different, so that the tracer takes none for another.
    example = example_step(config, sources=3, width=2, source_capacity=7, target_capacity=11, dtype=cache_dtype)
    return _trace(
        graph,
        example,
        dynamic_shapes=(rows, rows, {}, {0: _ANY}, {0: _ANY}, {}, {}, [cache] * tensors, [cache] * tensors),
        input_names=[
            *("target_ids", "positions", "longest", "source_lengths", "candidate_ranks", "log_probs_wanted", "attention_wanted"),
            *(f"self_cache.{i}" for i in range(tensors)),
            *(f"cross_cache.{i}" for i in range(tensors)),
        ],
        output_names=[
            *("candidate_ids", "candidate_log_probs", "logits", "attention"),
            *(f"self_cache_appended.{i}" for i in range(tensors)),
            *(f"self_cache_kept.{i}" for i in range(tensors) if graph.keeps_self_cache),
            *(f"cross_cache_kept.{i}" for i in range(tensors) if graph.keeps_cross_cache),
        ],
    )


def _trace(
    graph: nn.Module,
    example: tuple[Tensor | list[Tensor], ...],
    *,
    dynamic_shapes: Any,
    input_names: list[str],
    output_names: list[str],
) -> TracedGraph:
    try:
        # With gradients, the tracer does not bring a length that it finds in a tensor through a branch.
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph.eval(),
                example,
                dynamo=True,
                dynamic_shapes=dynamic_shapes,
                opset_version=OPSET,
                input_names=input_names,
                output_names=output_names,
                verbose=False,
            )
    finally:
        # The tracer of branches would keep the module, and all of its weights with it, for as long as the process lives.
        torch.compiler.reset()
    assert program is not None
    # Of each operator, the lines of code that it was traced from, in whichever directory they were.
    ir.passes.common.ClearMetadataAndDocStringPass()(program.model)
    return _without_weights(program.model)


def _without_weights(model: ir.Model) -> TracedGraph:
    """Take the weights out of a graph before anything copies them."""
    weights: dict[str, Tensor] = {}
    for name, value in model.graph.initializers.items():
        constant = value.const_value
        if constant is not None and constant.nbytes >= _SMALLEST_WEIGHT_BYTES:
            raw = constant.raw
            weights[name] = raw.detach() if isinstance(raw, Tensor) else torch.from_numpy(constant.numpy())
            # Written as a tensor that lies elsewhere; where, nobody knows yet.
            shape = ir.Shape(constant.shape.numpy())
            value.const_value = ir.ExternalTensor("", 0, constant.nbytes, constant.dtype, shape=shape, name=name)
    proto = ir.serde.serialize_model(model)
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            del tensor.external_data[:]
            tensor.data_location = TensorProto.DEFAULT
    return TracedGraph(proto, weights)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's notes on packages that are not installed and on its own deprecations are nobody's business here."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
