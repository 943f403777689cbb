"""int8 graphs of a tiny model: the scales against what a model in float32 makes, the logits, and what is traced."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn

from export import verify
from export.attention import CacheScales, Int8SelfAttention, RaggedCrossAttention, cache_places
from export.calibration import calibrated_graphs
from export.graphs import DecoderStepGraph, EncoderGraph, GraphDecoderLayer
from export.model import Transformer
from export.onnx_export import example_step, export_decoder, export_encoder
from export.quantize import CalibratedInt8Linear, Int8TokenTable, ObservedLinear
from serving.runtime import load_graph
from tests.export.int8_graphs import SAMPLES, Int8Graphs, assert_near_float32, small_model
from tests.support import T5
from tests.traces import serialized


@pytest.fixture(scope="module", params=[{}, {**T5, "gated": False, "activation": "relu"}], ids=["paper", "t5"])
def calibrated(request: pytest.FixtureRequest) -> Int8Graphs:
    model = small_model(**request.param)
    references = verify.make_references(model, SAMPLES)
    encoder, decoder = calibrated_graphs(model, references)
    return Int8Graphs(
        model,
        references,
        encoder,
        decoder,
        serialized(export_encoder(encoder)),
        serialized(export_decoder(decoder, model.config, torch.int8).every_width),
    )


@torch.no_grad()
def caches_after(model: Transformer, reference: verify.Reference) -> tuple[Tensor, Tensor]:
    """Cross and own caches of a model in float32 after all of a translation: [tensors, heads, positions, head_dim] each."""
    encoder, decoder = EncoderGraph(model).eval(), DecoderStepGraph(model).eval()
    lengths = torch.tensor([len(reference.source_ids)], dtype=torch.int32)
    cross = encoder(torch.tensor([reference.source_ids]), lengths)
    steps = len(reference.target_ids)
    *_, own, _ = example_step(model.config, sources=1, width=1, source_capacity=1, target_capacity=steps, dtype=torch.float32)
    for position, token in enumerate(reference.target_ids):
        decoder(
            torch.tensor([[token]]), torch.tensor([[position]], dtype=torch.int32), torch.tensor(position + 1, dtype=torch.int32),
            lengths, torch.arange(1), torch.tensor(False), torch.tensor(False), own, list(cross),
        )  # fmt: skip
    return cross[:, 0], torch.stack(own)[:, 0]


def scales_of(buffers: CacheScales | None) -> list[Tensor]:
    assert buffers is not None
    return [buffers.key, buffers.value]


def cache_scales(decoder: DecoderStepGraph, kind: str) -> Tensor:
    """[tensors, heads, head_dim]"""
    scales: list[Tensor] = []
    for layer in decoder.layers:
        assert isinstance(layer, GraphDecoderLayer)
        assert isinstance(layer.self_attention, Int8SelfAttention)
        assert isinstance(layer.cross_attention, RaggedCrossAttention)
        scales += scales_of(layer.self_attention.scales if kind == "self" else layer.cross_attention.scales)
    return torch.stack(scales)[:, 0, :, 0]


@pytest.mark.parametrize("kind", ["cross", "self"])
def test_a_caches_scales_are_the_largest_of_each_channel_over_127(calibrated: Int8Graphs, kind: str) -> None:
    largest = torch.zeros(())
    for reference in calibrated.references:
        cross, own = caches_after(calibrated.model, reference)
        largest = torch.maximum(largest, (cross if kind == "cross" else own).abs().amax(dim=2))
    scales = cache_scales(calibrated.decoder, kind)
    assert scales.shape == (4, 2, 16)
    torch.testing.assert_close(scales, largest / 127, rtol=1e-5, atol=1e-9)
    assert len(set(scales.flatten().tolist())) == scales.numel(), "a channel has another's scale"


def test_scales_follow_from_what_was_observed(calibrated: Int8Graphs) -> None:
    """A translation more can only widen a range, and one less can only narrow it."""
    _, fewer = calibrated_graphs(calibrated.model, calibrated.references[:1])
    for kind in ("self", "cross"):
        few, all_ = cache_scales(fewer, kind), cache_scales(calibrated.decoder, kind)
        assert (few <= all_).all()
        assert (few < all_).any()


def test_every_product_and_table_is_in_bytes(calibrated: Int8Graphs) -> None:
    for graph in (calibrated.encoder, calibrated.decoder):
        modules = list(graph.modules())
        assert not [module for module in modules if isinstance(module, ObservedLinear | nn.Linear)]
        assert isinstance(graph.embedding.tokens, Int8TokenTable)
    # Query, key, value, output and two of the feed-forward network in 2 layers, and all cross-attention keys and values.
    assert len([m for m in calibrated.encoder.modules() if isinstance(m, CalibratedInt8Linear)]) == 2 * 6 + 1
    # Three products of self-attention, where keys and values are one, two of the other, two of feeding forward, and the output.
    assert len([m for m in calibrated.decoder.modules() if isinstance(m, CalibratedInt8Linear)]) == 2 * 7 + 1


def test_after_the_relu_the_whole_byte_is_used(calibrated: Int8Graphs) -> None:
    for graph in (calibrated.encoder, calibrated.decoder):
        zero_points = {
            name.rpartition(".")[2]: int(module.zero_point)
            for name, module in graph.named_modules()
            if isinstance(module, CalibratedInt8Linear)
        }
        assert zero_points.pop("outer") == 0
        assert set(zero_points.values()) == {128}


def test_logits_are_near_those_of_float32(calibrated: Int8Graphs) -> None:
    assert_near_float32(calibrated, token_agreement=0.9)


def test_the_traced_encoder_ends_in_the_same_bytes(calibrated: Int8Graphs) -> None:
    rng = np.random.default_rng(0)
    ids, lengths = rng.integers(4, 64, (6, 13)), np.array([13, 1, 7, 9, 2, 12], np.int32)
    (got,) = load_graph(calibrated.encoder_onnx).run(["cross_cache"], {"source_ids": ids, "source_lengths": lengths})
    with torch.no_grad():
        expected = calibrated.encoder(torch.from_numpy(ids), torch.from_numpy(lengths)).numpy()
    assert got.dtype == expected.dtype == np.int8
    assert got.shape == (4, 6, 2, 13, 16)
    valid = np.arange(13) < lengths[:, None]
    got, expected = (x.transpose(1, 3, 0, 2, 4)[valid].astype(int) for x in (got, expected))
    # What lies in the middle of two bytes may be rounded to either, in an activation and so in what follows from it.
    assert np.abs(got - expected).max() <= 3
    assert (got == expected).mean() > 0.99
    assert np.abs(expected).max() >= 127, "the range is not used"


def random_step(calibrated: Int8Graphs, *, sources: int, width: int, seed: int) -> dict[str, NDArray[np.generic]]:
    rng = np.random.default_rng(seed)
    positions = rng.integers(0, 9, (sources, 1)).repeat(width, 1).astype(np.int32)
    return {
        "target_ids": rng.integers(4, 64, (sources, width)),
        "positions": positions,
        "longest": np.array(positions.max() + 1, np.int32),
        "source_lengths": rng.integers(1, 12, sources).astype(np.int32),
        "candidate_ranks": np.arange(3),
        "log_probs_wanted": np.array(True),
        "attention_wanted": np.array(True),
        **{f"self_cache.{i}": rng.integers(-127, 128, (sources * width, 2, 9, 16)).astype(np.int8) for i in range(4)},
        **{f"cross_cache.{i}": rng.integers(-127, 128, (sources, 2, 12, 16)).astype(np.int8) for i in range(4)},
    }


@pytest.mark.parametrize(("sources", "width"), [(1, 1), (32, 1), (8, 4)])
def test_the_traced_step_equals_its_module(calibrated: Int8Graphs, sources: int, width: int) -> None:
    feeds = random_step(calibrated, sources=sources, width=width, seed=width)
    names = ["logits", "attention", *(f"self_cache_{after}.{i}" for after in ("appended", "kept") for i in range(4))]
    got, attention, *caches = load_graph(calibrated.decoder_onnx).run(names, feeds)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
    with torch.no_grad():
        _, _, logits, weights, own, _ = calibrated.decoder(
            *(tensors[name] for name in feeds if "cache" not in name),
            [tensors[f"self_cache.{i}"] for i in range(4)],
            [tensors[f"cross_cache.{i}"] for i in range(4)],
        )
    decodable = [i for i in range(64) if i not in calibrated.model.config.never_decoded]
    difference = np.abs(got - logits.numpy())[..., decodable].max(axis=2)
    # A row in which nothing lies between two bytes is the same but for rounding in float32; such are nearly all.
    assert np.median(difference) < 1e-4
    assert np.median(np.abs(attention - weights.numpy()).max(axis=2)) < 1e-5
    assert difference.max() < 0.05 * np.ptp(logits.numpy()[..., decodable])
    rows, at = np.arange(sources * width), np.array(feeds["positions"], np.int32).reshape(-1)
    is_valid = np.arange(9) <= at[:, None]  # [rows, capacity]
    for i, (appended, kept, expected) in enumerate(zip(caches[:4], caches[4:], own, strict=True)):
        off = np.abs(appended[rows, :, at].astype(int) - expected.numpy()[rows, :, at].astype(int))
        assert off.max() <= 3
        assert (off == 0).mean() > 0.97
        # Nothing else is written, and what attends passes all of it on.
        untouched = np.array(feeds[f"self_cache.{i}"])
        untouched[rows, :, at] = appended[rows, :, at]
        assert np.array_equal(appended, untouched)
        assert np.array_equal(kept.swapaxes(1, 2)[is_valid], appended.swapaxes(1, 2)[is_valid])


def test_new_keys_go_to_each_rows_own_position_in_every_head() -> None:
    places = cache_places(torch.tensor([5, 0, 7], dtype=torch.int32), 2)
    assert places.tolist() == [[[0, 0, 5], [0, 1, 5]], [[1, 0, 0], [1, 1, 0]], [[2, 0, 7], [2, 1, 7]]]


def test_a_row_is_the_same_among_any_neighbours(calibrated: Int8Graphs) -> None:
    feeds = random_step(calibrated, sources=32, width=1, seed=3)
    session = load_graph(calibrated.decoder_onnx)
    (together,) = session.run(["logits"], feeds)
    for i in (0, 13, 31):
        alone = {name: array[i : i + 1] if array.ndim > 1 or name == "source_lengths" else array for name, array in feeds.items()}
        alone["longest"] = np.array(feeds["positions"][i, 0] + 1, np.int32)
        assert np.array_equal(session.run(["logits"], alone)[0][0], together[i])


def test_caches_come_and_go_in_bytes(calibrated: Int8Graphs) -> None:
    encoder, decoder = (onnx.load_from_string(m).graph for m in (calibrated.encoder_onnx, calibrated.decoder_onnx))
    assert [value.type.tensor_type.elem_type for value in encoder.output] == [TensorProto.INT8]
    types = {v.name: v.type.tensor_type.elem_type for v in (*decoder.input, *decoder.output)}
    caches = {kind for name, kind in types.items() if "cache" in name}
    assert caches == {TensorProto.INT8}
    assert types["logits"] == types["candidate_log_probs"] == TensorProto.FLOAT
