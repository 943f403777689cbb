"""int8 with one scale a row: the layer against whole numbers, and graphs of a tiny model, eager and traced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import nn

from export import verify
from export.onnx_export import export_decoder, export_encoder
from export.pipeline import export_bundle
from export.quantize import Int8TokenTable
from export.row_scales import RowScaledInt8Linear, row_scaled_graphs
from serving.errors import ExportError
from serving.manifest import Int8Scales, Precision
from serving.runtime import load_graph
from tests.export.int8_graphs import SAMPLES, Int8Graphs, assert_near_float32, small_model
from tests.export.test_quantize import normal, traced
from tests.support import SAMPLE_LINES, T5, write_tiny_checkpoint
from tests.traces import serialized

# The layer.


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_a_product_is_exact_in_whole_numbers(with_bias: bool) -> None:
    weight, x = normal(32, 600), normal(7, 600, seed=2) * torch.logspace(-3, 3, 7)[:, None]
    bias = normal(32, seed=1) if with_bias else None
    scale = x.double().abs().amax(dim=1).numpy()[:, None] / 127
    columns = weight.double().abs().amax(dim=1).numpy() / 127
    sums = np.rint(x.double().numpy() / scale).astype(np.int64) @ np.rint(weight.double().numpy().T / columns).astype(np.int64)
    expected = sums * scale * columns + (0 if bias is None else bias.double().numpy())
    layer = RowScaledInt8Linear(weight, bias)
    np.testing.assert_allclose(layer(x).numpy(), expected, rtol=1e-4, atol=1e-4)
    # And it is a rounding of the product, in every row alike: off, but not far.
    exact = x @ weight.T + (0 if bias is None else bias)
    off = (layer(x) - exact).abs().amax(dim=1) / (x @ weight.T).abs().amax(dim=1)
    assert ((off > 0) & (off < 0.03)).all()


def test_a_louder_row_is_the_same_row_louder() -> None:
    layer, x = RowScaledInt8Linear(normal(6, 16), None), normal(3, 16, seed=2)
    assert torch.equal(layer(1024 * x), 1024 * layer(x))
    assert torch.equal(layer(-x), -layer(x))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_a_traced_product_equals_its_layer(with_bias: bool) -> None:
    layer = RowScaledInt8Linear(normal(24, 40), normal(24, seed=1) if with_bias else None)
    x = normal(2, 9, 40, seed=2)
    session = load_graph(traced(layer, x))
    for given in (x, x.relu(), 1000 * x, torch.zeros(3, 9, 40)):
        (got,) = session.run(["y"], {"x": given.numpy()})
        np.testing.assert_allclose(got, layer(given).numpy(), rtol=1e-5, atol=1e-5 * float(layer(given).abs().max()))


def test_a_row_of_zeros_makes_the_bias_and_nothing_else() -> None:
    weight, bias, x = normal(6, 16), normal(6, seed=1), normal(3, 16, seed=2)
    x[1] = 0.0
    for layer, expected in ((RowScaledInt8Linear(weight, bias), bias), (RowScaledInt8Linear(weight, None), torch.zeros(6))):
        (from_graph,) = load_graph(traced(layer, x)).run(["y"], {"x": x.numpy()})
        for y in (layer(x), torch.from_numpy(from_graph)):
            assert torch.equal(y[1], expected)
            assert y.isfinite().all()


def test_a_row_does_not_depend_on_loud_neighbours_in_any_bit() -> None:
    layer = RowScaledInt8Linear(normal(24, 64), normal(24, seed=1))
    quiet, loud = normal(1, 64, seed=3), 1e4 * normal(40, 64, seed=4)
    loud[7] = 0.0
    session = load_graph(traced(layer, loud))
    (alone,) = session.run(["y"], {"x": quiet.numpy()})
    for place in (0, 20, 40):
        rows = torch.cat([loud[:place], quiet, loud[place:]])
        (together,) = session.run(["y"], {"x": rows.numpy()})
        assert np.array_equal(together[place], alone[0])
        assert torch.equal(layer(rows)[place], layer(quiet)[0])


# The graphs.


@pytest.fixture(scope="module", params=[{}, T5], ids=["paper", "t5"])
def row_scaled(request: pytest.FixtureRequest) -> Int8Graphs:
    model = small_model(**request.param)
    encoder, decoder = row_scaled_graphs(model)
    encoder_onnx, decoder_onnx = (
        serialized(export_encoder(encoder)),
        serialized(export_decoder(decoder, model.config).every_width),
    )
    return Int8Graphs(model, verify.make_references(model, SAMPLES), encoder, decoder, encoder_onnx, decoder_onnx)


def test_every_product_and_table_is_in_bytes(row_scaled: Int8Graphs) -> None:
    gates = 2 if row_scaled.model.config.gated else 0
    for graph in (row_scaled.encoder, row_scaled.decoder):
        modules = list(graph.modules())
        assert not [module for module in modules if isinstance(module, nn.Linear)]
        assert isinstance(graph.embedding.tokens, Int8TokenTable)
        # Six products in each of two layers, and what comes after them.
        assert len([module for module in modules if isinstance(module, RowScaledInt8Linear)]) == 2 * 6 + gates + 1


def test_logits_are_near_those_of_float32(row_scaled: Int8Graphs) -> None:
    # The best tokens of a random model are often nearly equal.
    assert_near_float32(row_scaled, token_agreement=0.75)


def test_caches_come_and_go_in_float32(row_scaled: Int8Graphs) -> None:
    encoder, decoder = (onnx.load_from_string(m).graph for m in (row_scaled.encoder_onnx, row_scaled.decoder_onnx))
    types = {v.name: v.type.tensor_type.elem_type for v in (*encoder.output, *decoder.input, *decoder.output)}
    assert {kind for name, kind in types.items() if "cache" in name} == {TensorProto.FLOAT}


def test_what_several_products_read_is_quantized_once(row_scaled: Int8Graphs, tmp_path: Path) -> None:
    config = row_scaled.model.config
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4  # it warns that such a file is for this machine
    ort.InferenceSession(row_scaled.encoder_onnx, options, ["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    layers = config.num_encoder_layers
    assert kinds.count("MatMulIntegerToFloat") == layers * (7 if config.gated else 6) + 1
    # For query, key and value; for what attention ends in; for the network's first products, and its last; for the caches.
    for kind in ("QuantizeLinear", "Abs", "ReduceMax"):
        assert kinds.count(kind) == layers * 4 + 1


def test_a_source_is_the_same_among_any_neighbours(row_scaled: Int8Graphs) -> None:
    session, rng = load_graph(row_scaled.encoder_onnx), np.random.default_rng(0)
    ids, lengths = rng.integers(4, 64, (9, 13)), np.array([13, 1, 7, 9, 2, 12, 13, 4, 8], np.int32)
    (together,) = session.run(["cross_cache"], {"source_ids": ids, "source_lengths": lengths})
    for i, length in enumerate(lengths):
        (alone,) = session.run(["cross_cache"], {"source_ids": ids[i : i + 1, :length], "source_lengths": lengths[i : i + 1]})
        assert np.array_equal(alone[:, 0], together[:, i, :, :length])


def test_a_step_is_the_same_among_any_neighbours(row_scaled: Int8Graphs) -> None:
    session, rng = load_graph(row_scaled.decoder_onnx), np.random.default_rng(1)
    positions = rng.integers(0, 9, (32, 1)).astype(np.int32)
    loudness = np.logspace(-3, 3, 32)[:, None, None, None]
    feeds: dict[str, NDArray[np.generic]] = {
        "target_ids": rng.integers(4, 64, (32, 1)),
        "positions": positions,
        "longest": np.array(positions.max() + 1, np.int32),
        "source_lengths": rng.integers(1, 12, 32).astype(np.int32),
        "candidate_ranks": np.arange(3),
        "log_probs_wanted": np.array(True),
        "attention_wanted": np.array(False),
        **{
            f"{kind}_cache.{i}": (loudness * rng.normal(size=(32, 2, n, 16))).astype(np.float32)
            for kind, n in (("self", 9), ("cross", 12))
            for i in range(4)
        },
    }
    (together,) = session.run(["logits"], {name: np.copy(array) for name, array in feeds.items()})
    for i in (0, 13, 31):
        alone = {name: a[i : i + 1] if a.ndim > 1 or name == "source_lengths" else a for name, a in feeds.items()}
        alone["longest"] = np.array(positions[i, 0] + 1, np.int32)
        assert np.array_equal(session.run(["logits"], alone)[0][0], together[i])


def test_weights_that_were_in_bytes_are_the_same_bytes() -> None:
    """What an int8 model of CTranslate2 becomes: its integers, each divided by its row's scale, and quantized again."""
    integers = torch.from_numpy(np.random.default_rng(0).integers(-127, 128, (48, 96)))
    integers[:, 0] = 127
    scales = normal(48, seed=1).abs() * 1000 + 1
    layer = RowScaledInt8Linear(integers.float() / scales[:, None], None)
    assert torch.equal(layer.weight.t().long(), integers)
    torch.testing.assert_close(layer.weight_scale, 1 / scales, rtol=1e-6, atol=0.0)


# The export.


def export(
    checkpoint: Path, bundle: Path, *, precision: Precision = "int8", int8_scales: Int8Scales | None = None
) -> Int8Scales | None:
    """What the bundle says of its scales."""
    made = export_bundle(checkpoint, bundle, precision=precision, int8_scales=int8_scales, show_progress=False)
    stated = made.manifest.int8_scales
    decoder = onnx.load(made.decoder_path).graph
    cache_types = {value.type.tensor_type.elem_type for value in decoder.input if "cache" in value.name}
    assert cache_types == {TensorProto.INT8 if made.manifest.has_int8_caches else TensorProto.FLOAT}
    return stated


def test_scales_are_constant_where_there_are_sentences(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert export(tiny_checkpoint, tmp_path / "by default") == "constant"
    assert export(tiny_checkpoint, tmp_path / "row", int8_scales="row") == "row"
    assert export(tiny_checkpoint, tmp_path / "fp32", precision="fp32") is None


def test_scales_are_of_rows_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.samples._MAX_ALONE", 2)
    monkeypatch.setattr("export.samples._MAX_TOGETHER", 4)
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny")
    (checkpoint / "samples.txt").unlink()
    assert export(checkpoint, tmp_path / "by default") == "row"
    assert export(checkpoint, tmp_path / "constant", int8_scales="constant") == "constant"


def test_all_sentences_are_for_the_certificate(tiny_checkpoint: Path, tmp_path: Path) -> None:
    made = export_bundle(tiny_checkpoint, tmp_path / "bundle", precision="int8", int8_scales="row", show_progress=False)
    certificate = made.manifest.certificate
    assert (certificate.sample_source, certificate.sentences) == ("sentences", len(SAMPLE_LINES))
    assert certificate.comparisons["onnx_int8"].token_agreement > 0.9


def test_one_sentence_is_enough(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny")
    (checkpoint / "samples.txt").write_text("a man runs\n")
    assert export(checkpoint, tmp_path / "bundle", int8_scales="row") == "row"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("int8_scales", ["constant", "row"])
def test_scales_for_another_precision_are_refused(tmp_path: Path, precision: Precision, int8_scales: Int8Scales) -> None:
    with pytest.raises(ExportError, match=f"^int8_scales: {int8_scales} is for int8, and the precision is {precision}$"):
        export(tmp_path / "no checkpoint is read", tmp_path / "bundle", precision=precision, int8_scales=int8_scales)
    assert list(tmp_path.iterdir()) == []
