"""The branches for beam widths in a traced decoder: each against the module, against width 1, and on garbage beyond a source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

import export
from export import verify
from export.attention import RAGGED_DOMAIN
from export.beam_widths import expand_cross_attention
from export.calibration import calibrated_graphs
from export.graph_files import TracedGraph
from export.graphs import DecoderStepGraph
from export.model import ModelConfig
from export.onnx_export import MAX_BEAM_SIZE, export_decoder
from export.samples import Sample
from serving.runtime import load_graph
from tests.support import tiny_config, tiny_model
from tests.traces import serialized

WIDTHS = [1, 2, 3, 4, 5, 16]
SOURCE_CAPACITY, TARGET_CAPACITY = 24, 9
SOURCE_LENGTHS = [9, 23, 1]
SAMPLES = [Sample((5, 9, 11, 3)), Sample((20, 21, 22, 23, 24, 3)), Sample((7, 3))]

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Traced:
    """A decoder, and what was traced of it."""

    config: ModelConfig
    module: DecoderStepGraph
    onnx: bytes
    session: ort.InferenceSession
    cache_dtype: type[np.generic]


@pytest.fixture(scope="module", params=["fp32", "int8"])
def both(request: pytest.FixtureRequest) -> tuple[Traced, Traced]:
    """The decoder for every width, and that for rows alone."""
    model = tiny_model(tiny_config(num_decoder_layers=2, d_model=32, num_heads=4))
    if request.param == "fp32":
        module, cache_dtype = DecoderStepGraph(model).eval(), torch.float32
    else:
        (_, module), cache_dtype = calibrated_graphs(model, verify.make_references(model, SAMPLES)), torch.int8
    every_width, by_row = export_decoder(module, model.config, cache_dtype)
    assert by_row is not None

    def loaded(decoder: TracedGraph) -> Traced:
        graph = serialized(decoder)
        return Traced(model.config, module, graph, load_graph(graph), np.float32 if request.param == "fp32" else np.int8)

    return loaded(every_width), loaded(by_row)


@pytest.fixture(scope="module")
def traced(both: tuple[Traced, Traced]) -> Traced:
    return both[0]


@pytest.fixture(scope="module")
def by_row(both: tuple[Traced, Traced]) -> Traced:
    return both[1]


def random_feeds(traced: Traced, width: int) -> Feeds:
    """A step of three sources, of different lengths and at different positions; each hypothesis has a past of its own."""
    rng = np.random.default_rng(width)
    config, sources = traced.config, len(SOURCE_LENGTHS)

    def cache(rows: int, capacity: int) -> NDArray[Any]:
        shape = (rows, config.num_heads, capacity, config.head_dim)
        if traced.cache_dtype is np.int8:
            return rng.integers(-127, 128, shape).astype(np.int8)
        return rng.standard_normal(shape, np.float32)

    positions = np.array([[4], [0], [8]], np.int32).repeat(width, 1)
    tensors = range(2 * config.num_decoder_layers)
    return {
        "target_ids": rng.integers(4, config.target_vocab_size, (sources, width)),
        "positions": positions,
        "longest": np.array(positions.max() + 1, np.int32),
        "source_lengths": np.array(SOURCE_LENGTHS, np.int32),
        "candidate_ranks": np.arange(3),
        "log_probs_wanted": np.array(True),
        "attention_wanted": np.array(True),
        **{f"self_cache.{i}": cache(sources * width, TARGET_CAPACITY) for i in tensors},
        **{f"cross_cache.{i}": cache(sources, SOURCE_CAPACITY) for i in tensors},
    }


def run_in_place(traced: Traced, feeds: Feeds) -> tuple[Feeds, Feeds]:
    """One step as serving runs it, caches bound as inputs and outputs at once.

    Returns:
        Candidates and logits, and the caches afterwards.
    """
    binding = traced.session.io_binding()
    returned = {output.name for output in traced.session.get_outputs()}
    caches = {name: np.ascontiguousarray(array.copy()) for name, array in feeds.items() if "cache" in name}
    for name, array in feeds.items():
        value = ort.OrtValue.ortvalue_from_numpy(caches.get(name, array))
        binding.bind_ortvalue_input(name, value)
        if name in caches:
            kind, _, number = name.partition(".")
            after = {f"{kind}_appended.{number}", f"{kind}_kept.{number}"} & returned
            assert after, f"{name} is not returned"
            for output in after:
                binding.bind_ortvalue_output(output, value)
    names = ("candidate_ids", "candidate_log_probs", "logits", "attention")
    for name in names:
        binding.bind_output(name)
    traced.session.run_with_iobinding(binding)
    return dict(zip(names, (value.numpy() for value in binding.get_outputs()[-len(names) :]), strict=True)), caches


def run_module(traced: Traced, feeds: Feeds) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits and attention."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
    count = range(2 * traced.config.num_decoder_layers)
    with torch.no_grad():
        _, _, logits, weights, _, _ = traced.module(
            *(tensors[name] for name in feeds if "cache" not in name),
            [tensors[f"self_cache.{i}"] for i in count],
            [tensors[f"cross_cache.{i}"] for i in count],
        )
    return logits.numpy(), weights.numpy()


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes of a graph, of its branches too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes(attribute.g)


def nodes_of_branches(branch: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """All nodes of an If's branches."""
    for attribute in branch.attribute:
        yield from nodes(attribute.g)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_equals_the_module(traced: Traced, width: int) -> None:
    feeds = random_feeds(traced, width)
    got, _ = run_in_place(traced, feeds)
    expected, attention = run_module(traced, feeds)
    decodable = [i for i in range(traced.config.target_vocab_size) if i not in traced.config.never_decoded]
    difference = np.abs(got["logits"] - expected)[..., decodable]
    if traced.cache_dtype is np.float32:
        assert difference.max() < 1e-4
        assert np.abs(got["attention"] - attention).max() < 1e-5
    else:
        # A sum that ends at the middle of two bytes may be rounded to either; nearly all rows meet none.
        assert np.median(difference.max(axis=2)) < 1e-4
        assert difference.max() < 0.05 * np.ptp(expected[..., decodable])


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_every_row_of_a_beam_equals_that_row_alone(traced: Traced, width: int) -> None:
    """Hypotheses of one source, each as a source of its own with a copy of the source's cache: the same to the last bit."""
    feeds = random_feeds(traced, width)
    apart = {
        **feeds,
        "target_ids": feeds["target_ids"].reshape(-1, 1),
        "positions": feeds["positions"].reshape(-1, 1),
        "source_lengths": feeds["source_lengths"].repeat(width),
        **{name: array.repeat(width, axis=0) for name, array in feeds.items() if name.startswith("cross_cache")},
    }
    together, own = run_in_place(traced, feeds)
    alone, own_alone = run_in_place(traced, apart)
    for name, array in together.items():
        assert np.array_equal(array.reshape(alone[name].shape), alone[name]), name
    for name in own:
        if name.startswith("self_cache"):
            assert np.array_equal(own[name], own_alone[name]), name


@pytest.mark.parametrize("width", WIDTHS)
def test_what_lies_beyond_a_source_is_never_read(traced: Traced, width: int) -> None:
    feeds = random_feeds(traced, width)
    clean, _ = run_in_place(traced, feeds)
    assert np.isfinite(clean["logits"]).all()
    for garbage in (np.nan, np.inf, 1e30) if traced.cache_dtype is np.float32 else (-128, 127):
        littered = {name: array.copy() for name, array in feeds.items()}
        crosses = [name for name in feeds if name.startswith("cross_cache")]
        for name in crosses:
            for source, length in enumerate(SOURCE_LENGTHS):
                littered[name][source, :, length:] = garbage
        got, caches = run_in_place(traced, littered)
        for name, array in clean.items():
            assert np.array_equal(got[name], array), (name, garbage)
        for name in crosses:
            assert caches[name].tobytes() == littered[name].tobytes(), name


@pytest.mark.parametrize("width", WIDTHS)
def test_a_position_within_a_source_is_read(traced: Traced, width: int) -> None:
    """So that the test before this one can fail: the last position of each source matters to all of its rows."""
    feeds = random_feeds(traced, width)
    changed = {name: array.copy() for name, array in feeds.items()}
    for source, length in enumerate(SOURCE_LENGTHS):
        for name in ("cross_cache.1", "cross_cache.3"):
            changed[name][source, :, length - 1] = 100
    before, after = run_in_place(traced, feeds)[0]["logits"], run_in_place(traced, changed)[0]["logits"]
    assert (before != after).any(axis=2).all()


def test_a_capacity_beyond_the_longest_source_changes_nothing(traced: Traced) -> None:
    feeds = random_feeds(traced, 3)
    grown = {
        name: np.pad(array, ((0, 0), (0, 0), (0, 40), (0, 0))) if name.startswith("cross_cache") else array
        for name, array in feeds.items()
    }
    got, expected = run_in_place(traced, grown)[0], run_in_place(traced, feeds)[0]
    assert not got["attention"][..., SOURCE_CAPACITY:].any()
    for name, array in expected.items():
        assert np.array_equal(got[name][..., : array.shape[-1]], array), name


@pytest.mark.parametrize("width", [MAX_BEAM_SIZE + 1, 2 * MAX_BEAM_SIZE])
def test_a_wider_beam_fails_instead_of_answering(traced: Traced, width: int) -> None:
    feeds = random_feeds(traced, width)
    shapes = re.escape(f"Input shape:{{3,{width},32}}, requested shape:{{3,16,4,8}}")
    with pytest.raises(RuntimeError, match=f"ragged.* cannot be reshaped .* {shapes}"):
        run_in_place(traced, feeds)


def test_each_layer_has_a_branch_for_each_width_and_no_stand_in_is_left(traced: Traced) -> None:
    model = onnx.load_from_string(traced.onnx)
    assert RAGGED_DOMAIN not in {opset.domain for opset in model.opset_import}
    all_nodes = list(nodes(model.graph))
    assert RAGGED_DOMAIN not in {node.domain for node in all_nodes}
    branched = [node for node in all_nodes if node.op_type == "GroupQueryAttention" and ".w" in node.name]
    heads = sorted(next(a.i for a in node.attribute if a.name == "num_heads") for node in branched)
    layers = traced.config.num_decoder_layers
    assert heads == sorted(layers * [width * traced.config.num_heads for width in range(1, MAX_BEAM_SIZE + 1)])


def test_a_branch_has_its_constants_to_itself(traced: Traced) -> None:
    """What it reads from outside is handed to it in every step."""
    model = onnx.load_from_string(traced.onnx)
    outside = {tensor.name for tensor in model.graph.initializer}
    branches = [node for node in model.graph.node if node.op_type == "If" and node.input[0].startswith("ragged.")]
    assert len(branches) == traced.config.num_decoder_layers
    for branch in branches:
        read = {name for node in nodes_of_branches(branch) for name in node.input if name in outside}
        assert all(re.fullmatch(r"layers\.\d+\.cross_attention\.scales\.(key|value)", name) for name in read), read


def test_a_graph_does_not_tell_where_it_was_traced(traced: Traced) -> None:
    assert not any(node.metadata_props or node.doc_string for node in nodes(onnx.load_from_string(traced.onnx).graph))
    assert str(Path(export.__file__).parent).encode() not in traced.onnx


def test_the_decoder_by_row_has_no_branch_for_a_width(by_row: Traced) -> None:
    model = onnx.load_from_string(by_row.onnx)
    assert {node.input[0] for node in nodes(model.graph) if node.op_type == "If"} == {"attention_wanted", "log_probs_wanted"}
    assert not any("ragged.width" in name for node in nodes(model.graph) for name in (*node.input, *node.output))
    attending = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attending) == 2 * by_row.config.num_decoder_layers


def test_the_decoder_by_row_gives_the_same_bits(traced: Traced, by_row: Traced) -> None:
    feeds = random_feeds(traced, 1)
    (got, own), (expected, expected_own) = (run_in_place(one, feeds) for one in (by_row, traced))
    for name, array in (expected | expected_own).items():
        assert np.array_equal((got | own)[name], array), name


def test_branches_for_one_width_are_no_branches() -> None:
    stand_in = onnx.helper.make_node("RaggedCrossAttention", ["q"], ["y"], domain=RAGGED_DOMAIN, num_heads=2)
    model = onnx.helper.make_model(onnx.helper.make_graph([stand_in], "g", [], []))
    with pytest.raises(ValueError, match="max_width must be at least 2"):
        expand_cross_attention(model, target_ids="ids", head_dim=8, max_width=1)
