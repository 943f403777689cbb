"""Graphs as files, with their weights in one file that they share."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from export import pipeline, verify
from export.calibration import calibrated_graphs
from export.graph_files import TracedGraph, write_graphs
from export.graphs import DecoderStepGraph, EncoderGraph, PlainLinear, lay_out
from export.onnx_export import export_decoder, export_encoder
from export.pipeline import export_bundle
from export.samples import Sample
from serving.bundle import Bundle
from serving.errors import ExportError
from tests.support import TINY_VOCAB_SIZE, tiny_config, tiny_model

ENCODER, DECODER, LONE_DECODER, WEIGHTS = "encoder.onnx", "decoder.onnx", "lone_decoder.onnx", "weights.data"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in the file of weights."""

    offset: int
    length: int


def graph_of(**weights: Tensor) -> TracedGraph:
    """A graph that does nothing and has these weights."""
    types = {torch.float32: TensorProto.FLOAT, torch.int8: TensorProto.INT8, torch.float16: TensorProto.FLOAT16}
    model = helper.make_model(helper.make_graph([], "g", [], []))
    for name, weight in weights.items():
        model.graph.initializer.append(TensorProto(name=name, dims=weight.shape, data_type=types[weight.dtype]))
    return TracedGraph(model, weights)


def places(path: Path) -> dict[str, Place]:
    """Every tensor of a graph that is not in the graph's own file."""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == WEIGHTS
            assert not tensor.raw_data
            found[tensor.name] = Place(int(entries["offset"]), int(entries["length"]))
    return found


def values(path: Path) -> dict[str, NDArray[np.generic]]:
    model: ModelProto = onnx.load(path)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_graphs_have_a_file_of_weights_beside_them(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    files = write_graphs(tmp_path / "g", {ENCODER: graph_of(w=weight), DECODER: graph_of(v=weight)})
    assert files == {name: tmp_path / "g" / name for name in (ENCODER, DECODER, WEIGHTS)}
    assert np.array_equal(values(files[DECODER])["v"], weight.numpy())


@pytest.mark.parametrize("chunk_values", [1, 7, 1 << 22])
@pytest.mark.parametrize(
    "weight",
    [
        torch.arange(15.0).reshape(3, 5),
        torch.arange(15.0).reshape(3, 5).t(),
        torch.arange(30).reshape(5, 6)[1:4, ::2].to(torch.int8),
        torch.arange(24.0).reshape(2, 3, 4).half().permute(2, 0, 1),
        torch.arange(7.0),
        torch.ones(1, 1, 9).expand(2, 3, 9),
    ],
    ids=["rows", "turned", "bytes", "halves", "vector", "expanded"],
)
def test_values_are_in_the_order_of_elements_whatever_the_strides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: Tensor, chunk_values: int
) -> None:
    monkeypatch.setattr("export.graph_files._CHUNK_VALUES", chunk_values)
    files = write_graphs(tmp_path / "g", {ENCODER: graph_of(first=torch.ones(3), w=weight)})
    assert np.array_equal(values(files[ENCODER])["w"], weight.numpy())


def test_weights_begin_where_pages_begin_and_do_not_overlap(tmp_path: Path) -> None:
    graph = graph_of(a=torch.ones(3), b=torch.ones(2000), c=torch.ones(5))
    files = write_graphs(tmp_path / "g", {ENCODER: graph})
    assert places(files[ENCODER]) == {"a": Place(0, 12), "b": Place(4096, 8000), "c": Place(12288, 20)}
    assert files[WEIGHTS].stat().st_size == 12288 + 20


def test_what_graphs_share_is_written_once(tmp_path: Path) -> None:
    shared = torch.arange(15.0).reshape(3, 5)
    encoder = graph_of(w=shared, same=shared[:], turned=shared.t(), copy=shared.clone())
    files = write_graphs(tmp_path / "g", {ENCODER: encoder, DECODER: graph_of(v=shared)})
    first, second = places(files[ENCODER]), places(files[DECODER])
    assert second["v"] == first["w"] == first["same"]
    assert len({place.offset for place in first.values()}) == 3, "another layout, and other memory, are other tensors"
    assert np.array_equal(values(files[ENCODER])["turned"], shared.t().numpy())


def test_a_directory_that_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the graphs could not be written: .*File exists"):
        write_graphs(tmp_path, {ENCODER: graph_of(w=torch.ones(3))})


def test_all_weights_of_a_bundle_are_in_one_file(tiny_bundle: Bundle) -> None:
    assert WEIGHTS in tiny_bundle.manifest.files
    for name in (ENCODER, DECODER, LONE_DECODER):
        path = tiny_bundle.path(name)
        assert all(place.length >= 1024 for place in places(path).values())
        own = [tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer if tensor.raw_data]
        assert all(len(tensor.raw_data) < 1024 for tensor in own)


def test_the_decoders_of_a_bundle_share_their_weights(tiny_bundle: Bundle) -> None:
    assert places(tiny_bundle.path(DECODER)) == places(tiny_bundle.path(LONE_DECODER))


def test_a_table_of_tokens_that_both_sides_share_is_stored_once(tiny_bundle: Bundle) -> None:
    encoder, decoder = (places(tiny_bundle.path(name)) for name in (ENCODER, DECODER))
    assert encoder["embedding.tokens.rows"] == decoder["embedding.tokens.rows"]
    value_bytes = 4 if tiny_bundle.manifest.precision == "fp32" else 1
    assert encoder["embedding.tokens.rows"].length == TINY_VOCAB_SIZE * 16 * value_bytes


def test_sides_with_tables_of_their_own_keep_them() -> None:
    model = tiny_model(tiny_config(share_embeddings=False))
    for encoder, decoder in (lay_out(model), calibrated_graphs(model, verify.make_references(model, [Sample((5, 9, 3))]))):
        source, target = encoder.embedding.tokens, decoder.embedding.tokens
        assert source is not target
        assert not torch.equal(source(torch.arange(8)), target(torch.arange(8)))


def test_a_plain_product_is_a_view_of_the_models_weight() -> None:
    weight, bias, x = torch.randn(6, 4), torch.randn(6), torch.randn(2, 3, 4)
    product = PlainLinear(weight, bias)
    assert product.weight.data_ptr() == weight.data_ptr()
    torch.testing.assert_close(product(x), nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(PlainLinear(weight, None)(x), nn.functional.linear(x, weight))


def traced_encoder() -> tuple[nn.Module, TracedGraph]:
    graph = EncoderGraph(tiny_model()).eval()
    return graph, export_encoder(graph)


def traced_decoder() -> tuple[nn.Module, TracedGraph]:
    model = tiny_model()
    graph = DecoderStepGraph(model).eval()
    return graph, export_decoder(graph, model.config).every_width


@pytest.mark.parametrize("trace", [traced_encoder, traced_decoder])
def test_a_traced_graph_has_its_modules_own_weights(trace: Callable[[], tuple[nn.Module, TracedGraph]]) -> None:
    module, traced = trace()
    memory = {tensor.data_ptr() for tensor in itertools.chain(module.buffers(), module.parameters())}
    assert {weight.data_ptr() for weight in traced.weights.values()} <= memory
    assert not any(tensor.raw_data for tensor in traced.model.graph.initializer if tensor.name in traced.weights)
    assert "embedding.tokens.rows" in traced.weights


@pytest.mark.parametrize("trace", [traced_encoder, traced_decoder])
def test_what_was_traced_is_not_kept(trace: Callable[[], tuple[nn.Module, TracedGraph]]) -> None:
    module, traced = trace()
    # Smaller ones are constants of the graph, of which the tracer's tools may keep the last.
    weights = [weakref.ref(buffer) for buffer in module.buffers() if buffer.nbytes >= 1024]
    assert weights
    del module, traced
    gc.collect()
    assert [reference() for reference in weights if reference() is not None] == []


def test_a_disk_that_is_full_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_directory: Path, _graphs: object, **_options: object) -> None:
        raise ExportError("the graphs could not be written: [Errno 28] No space left on device")

    monkeypatch.setattr(pipeline, "write_graphs", full)
    with pytest.raises(ExportError, match="No space left"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", show_progress=False)
    assert list(tmp_path.iterdir()) == []
