"""The graphs' modules against the model, and the traced graphs against the modules."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from export import graphs
from export.graphs import Candidates, DecoderStepGraph, EncoderGraph, candidate_block, max_candidates
from export.model import ModelConfig, Transformer, length_mask
from export.onnx_export import example_step, export_decoder, export_encoder
from serving.runtime import load_graph
from tests.support import T5, tiny_config
from tests.traces import serialized

# Neither log-probabilities nor attention.
UNWANTED = (torch.tensor(False), torch.tensor(False))
VARIATIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "pre-norm": {"norm": "pre"},
    "learned positions, gelu": {"positions": "learned", "activation": "gelu"},
    "marian": {"positions": "sinusoidal_concatenated", "activation": "silu", "output_bias": True},
    "gelu by tanh": {"activation": "gelu_tanh"},
    "t5": T5,
    "umt5": {**T5, "relative_per_layer": True},
    "bart": {"embedding_norm": True, "scale_embedding": False, "positions": "learned"},
    "no biases": {"bias": False},
    "nothing shared": {"share_embeddings": False, "tie_output": False},
    "deep and narrow": {"num_encoder_layers": 3, "num_decoder_layers": 1, "num_heads": 1, "d_model": 8},
}


def random_model(**overrides: object) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(tiny_config(**{"num_decoder_layers": 2, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def decode_cached(model: Transformer, source_ids: Tensor, lengths: Tensor, target_ids: Tensor) -> Tensor:
    """Logits [batch, T, vocabulary] by one step after the other, all sources in one lane of width 1."""
    encoder, decoder = EncoderGraph(model).eval(), DecoderStepGraph(model).eval()
    cross = list(encoder(source_ids, lengths.int()))
    batch, steps = target_ids.shape
    *_, cache, _ = example_step(
        model.config, sources=batch, width=1, source_capacity=1, target_capacity=steps + 3, dtype=torch.float32
    )
    logits = []
    for t in range(steps):
        positions = torch.full((batch, 1), t, dtype=torch.int32)
        longest = torch.tensor(t + 1, dtype=torch.int32)
        _, _, step_logits, _, cache, _ = decoder(
            target_ids[:, t : t + 1], positions, longest, lengths.int(), torch.arange(2), *UNWANTED, cache, cross
        )
        logits.append(step_logits[:, 0, : model.config.target_vocab_size])
    return torch.stack(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("overrides", VARIATIONS.values(), ids=VARIATIONS.keys())
def test_cached_decoding_equals_the_full_masked_pass(overrides: dict[str, object]) -> None:
    model = random_model(**overrides)
    source_ids = torch.tensor([[5, 9, 11, 20, 3], [7, 8, 3, 0, 0]])
    lengths = torch.tensor([5, 3])
    target_ids = torch.tensor([[2, 9, 30, 31, 32, 33], [2, 40, 41, 10, 10, 11]])
    full = model(source_ids, lengths, target_ids)
    cached = decode_cached(model, source_ids, lengths, target_ids)
    decodable = [i for i in range(model.config.target_vocab_size) if i not in (0, 2)]
    torch.testing.assert_close(cached[..., decodable], full[..., decodable], atol=1e-5, rtol=1e-5)
    assert (cached[..., [0, 2]] < -1e8).all()


@torch.no_grad()
@pytest.mark.parametrize(
    ("overrides", "layer", "heads"),
    [
        ({}, 2, 1),
        ({"alignment_heads": 3}, 2, 3),
        ({"alignment_heads": None, "alignment_layer": 0}, 0, 4),
        ({"alignment_heads": None, "alignment_layer": 1, "norm": "pre"}, 1, 4),
    ],
    ids=["first head of the last layer", "some heads", "all of the first layer", "all of one between"],
)
def test_attention_is_that_of_the_full_pass(overrides: dict[str, object], layer: int, heads: int) -> None:
    model = random_model(num_decoder_layers=3, num_heads=4, d_model=32, **overrides)
    source_ids, lengths = torch.tensor([[5, 9, 11, 20, 3], [7, 8, 3, 0, 0]]), torch.tensor([5, 3])
    target_ids = torch.tensor([[2, 9, 30, 31], [2, 40, 41, 10]])
    seen: dict[str, Tensor] = {}
    crossing = model.decoder.layers[layer].cross_attention
    for name in ("query", "key"):
        getattr(crossing, name).register_forward_hook(lambda _, __, made, name=name: seen.update({name: made}))
    model(source_ids, lengths, target_ids)
    query, key = (torch.unflatten(seen[name], 2, (4, 8)).transpose(1, 2) for name in ("query", "key"))
    scores = (query @ key.transpose(2, 3) / 8**0.5).masked_fill(~length_mask(lengths, 5), float("-inf"))
    expected = scores.softmax(dim=3)[:, :heads].mean(dim=1)
    encoder, decoder = EncoderGraph(model).eval(), DecoderStepGraph(model).eval()
    cross = list(encoder(source_ids, lengths.int()))
    *_, cache, _ = example_step(model.config, sources=2, width=1, source_capacity=1, target_capacity=4, dtype=torch.float32)
    for t in range(4):
        positions, longest = torch.full((2, 1), t, dtype=torch.int32), torch.tensor(t + 1, dtype=torch.int32)
        wanted = (torch.tensor(False), torch.tensor(True))
        token = target_ids[:, t : t + 1]
        _, _, _, got, cache, _ = decoder(token, positions, longest, lengths.int(), torch.arange(2), *wanted, cache, cross)
        torch.testing.assert_close(got[:, 0], expected[:, t], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_at_different_positions_do_not_see_each_other() -> None:
    model = random_model()
    source_ids, lengths = torch.tensor([[5, 9, 3]]), torch.tensor([3], dtype=torch.int32)
    encoder, decoder = EncoderGraph(model).eval(), DecoderStepGraph(model).eval()
    cross_one = encoder(source_ids, lengths)
    two = cross_one.expand(-1, 2, -1, -1, -1).contiguous()
    *_, cache, _ = example_step(model.config, sources=2, width=1, source_capacity=1, target_capacity=8, dtype=torch.float32)
    # Source 0 is two tokens ahead: it steps alone first, in the same arrays.
    target = [2, 9, 30]
    for t in range(2):
        part = [c[:1] for c in cache]
        decoder(
            torch.tensor([[target[t]]]), torch.tensor([[t]], dtype=torch.int32), torch.tensor(t + 1, dtype=torch.int32),
            lengths, torch.arange(2), *UNWANTED, part, list(cross_one),
        )  # fmt: skip
    _, _, logits, *_ = decoder(
        torch.tensor([[30], [2]]), torch.tensor([[2], [0]], dtype=torch.int32), torch.tensor(3, dtype=torch.int32),
        lengths.expand(2), torch.arange(2), *UNWANTED, cache, list(two),
    )  # fmt: skip
    expected = model(source_ids, lengths, torch.tensor([target]))[0]
    decodable = [i for i in range(64) if i not in (0, 2)]
    torch.testing.assert_close(logits[0, 0, decodable], expected[2, decodable], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1, 0, decodable], expected[0, decodable], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab_size", [4, 64, 130, 1000, 8001, 54_688])
@pytest.mark.parametrize("scores_on_request", [True, False])
def test_candidates_are_the_exact_top_k_of_log_softmax(vocab_size: int, scores_on_request: bool) -> None:
    torch.manual_seed(vocab_size)
    module = Candidates(vocab_size, scores_on_request=scores_on_request)
    padded = torch.full((3, 2, module.block * module.num_blocks), graphs.NEVER)
    padded[..., :vocab_size] = 3 * torch.randn(3, 2, vocab_size)
    for k in (1, 2, min(9, max_candidates(vocab_size))):
        ids, log_probs = module(padded, k, torch.tensor(True))
        best = torch.log_softmax(padded[..., :vocab_size], dim=2).topk(k)
        assert torch.equal(ids, best.indices)
        torch.testing.assert_close(log_probs, best.values)
        unwanted_ids, values = module(padded, k, torch.tensor(False))
        assert torch.equal(unwanted_ids, ids)
        assert torch.equal(values, padded.gather(2, ids) if scores_on_request else log_probs)


def test_candidates_are_exact_when_the_best_share_a_block() -> None:
    module = Candidates(8192, scores_on_request=True)
    logits = torch.randn(1, 1, 8192)
    logits[0, 0, 100:109] = torch.arange(20.0, 29.0)
    ids, _ = module(logits, 9, torch.tensor(False))
    assert ids.flatten().tolist() == list(range(108, 99, -1))


@pytest.mark.parametrize(("vocab_size", "block", "most"), [(4, 1, 4), (256, 2, 128), (8192, 64, 128), (54_688, 64, 855)])
def test_blocks(vocab_size: int, block: int, most: int) -> None:
    assert candidate_block(vocab_size) == block
    assert max_candidates(vocab_size) == most


def feeds_for(config: ModelConfig, *, sources: int, width: int, source: int, target: int, seed: int) -> dict[str, np.ndarray]:
    """Random arguments of a decoder step with rows at different positions."""
    rng = np.random.default_rng(seed)
    positions = rng.integers(0, target, (sources, 1)).repeat(width, 1).astype(np.int32)
    own = (sources * width, config.num_heads, target, config.head_dim)
    cross = (sources, config.num_heads, source, config.head_dim)
    tensors = range(2 * config.num_decoder_layers)
    return {
        "target_ids": rng.integers(4, config.target_vocab_size, (sources, width)),
        "positions": positions,
        "longest": np.array(positions.max() + 1, np.int32),
        "source_lengths": rng.integers(1, source + 1, sources).astype(np.int32),
        "candidate_ranks": np.arange(3),
        "log_probs_wanted": np.array(True),
        "attention_wanted": np.array(True),
        **{f"self_cache.{i}": rng.standard_normal(own, np.float32) for i in tensors},
        **{f"cross_cache.{i}": rng.standard_normal(cross, np.float32) for i in tensors},
    }


# Arguments of a step, in their order, before the caches.
NOT_CACHES = (
    *("target_ids", "positions", "longest", "source_lengths", "candidate_ranks"),
    *("log_probs_wanted", "attention_wanted"),
)


@dataclass(frozen=True, slots=True)
class Traced:
    """A model's modules, and what was traced of them."""

    config: ModelConfig
    encoder: EncoderGraph
    encoder_onnx: bytes
    decoder: DecoderStepGraph
    decoder_onnx: bytes


# As many variations at once as there are, and a vocabulary that is looked through in blocks.
TRACED = {
    "norm": "pre",
    "embedding_norm": True,
    "bias": False,
    "output_bias": True,
    "activation": "silu",
    "positions": "learned",
    "share_embeddings": False,
    "target_vocab_size": 401,
}


@pytest.fixture(
    scope="module", params=[("cpu", TRACED), ("cuda", TRACED), ("cpu", {**T5, "relative_per_layer": True})], ids="{0[0]}".format
)
def traced(request: pytest.FixtureRequest) -> Traced:
    device, overrides = request.param
    model = random_model(**overrides)
    encoder, decoder = EncoderGraph(model).eval(), DecoderStepGraph(model, device=device).eval()
    return Traced(
        model.config,
        encoder,
        serialized(export_encoder(encoder)),
        decoder,
        serialized(export_decoder(decoder, model.config).every_width),
    )


@torch.no_grad()
@pytest.mark.parametrize(("sources", "length"), [(1, 1), (1, 30), (5, 13)])
def test_the_traced_encoder_equals_its_module(traced: Traced, sources: int, length: int) -> None:
    rng = np.random.default_rng(length)
    ids, lengths = rng.integers(4, 64, (sources, length)), rng.integers(1, length + 1, sources).astype(np.int32)
    (got,) = load_graph(traced.encoder_onnx).run(["cross_cache"], {"source_ids": ids, "source_lengths": lengths})
    expected = traced.encoder(torch.from_numpy(ids), torch.from_numpy(lengths)).numpy()
    assert got.shape == expected.shape == (4, sources, 2, length, traced.config.head_dim)
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(got[:, i, :, :n], expected[:, i, :, :n], atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(("sources", "width", "source", "target"), [(1, 1, 1, 1), (4, 1, 9, 6), (1, 5, 3, 40), (3, 4, 20, 7)])
def test_the_traced_step_equals_its_module(traced: Traced, sources: int, width: int, source: int, target: int) -> None:
    feeds = feeds_for(traced.config, sources=sources, width=width, source=source, target=target, seed=width)
    names = ["candidate_ids", "candidate_log_probs", "logits", "attention", *(f"self_cache_appended.{i}" for i in range(4))]
    if traced.decoder.keeps_cross_cache:
        names += [f"cross_cache_kept.{i}" for i in range(4)]
    got = load_graph(traced.decoder_onnx).run(names, feeds)
    as_tensors = {name: torch.from_numpy(array.copy()) for name, array in feeds.items()}
    ids, log_probs, logits, weights, cache, kept = traced.decoder(
        *(as_tensors[name] for name in NOT_CACHES),
        [as_tensors[f"self_cache.{i}"] for i in range(4)],
        [as_tensors[f"cross_cache.{i}"] for i in range(4)],
    )
    np.testing.assert_allclose(got[2], logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(got[1], log_probs.numpy(), atol=1e-4)
    np.testing.assert_allclose(got[3], weights.numpy(), atol=1e-5)
    assert np.array_equal(got[0], ids.numpy())
    # Cross-attention caches come back as they were.
    for i, (tensor, after) in enumerate(zip(got[8:], kept, strict=True)):
        for row, length in enumerate(feeds["source_lengths"]):
            assert np.array_equal(tensor[row, :, :length], feeds[f"cross_cache.{i}"][row, :, :length])
        assert torch.equal(after, as_tensors[f"cross_cache.{i}"])
    for appended, expected in zip(got[4:8], cache, strict=True):
        # Out of place, the operator copies what a row has so far and leaves the rest; in place, the rest stays what it was.
        for row, position in enumerate(feeds["positions"].reshape(-1)):
            np.testing.assert_allclose(appended[row, :, : position + 1], expected.numpy()[row, :, : position + 1], atol=1e-4)


@torch.no_grad()
def test_traced_candidates_are_the_same_whether_scores_are_wanted_or_not(traced: Traced) -> None:
    feeds = feeds_for(traced.config, sources=3, width=2, source=9, target=6, seed=3)
    session, names = load_graph(traced.decoder_onnx), ["candidate_ids", "candidate_log_probs", "logits"]
    ids, log_probs, logits = session.run(names, feeds)
    without = session.run(names, feeds | {"log_probs_wanted": np.array(False)})
    assert np.array_equal(without[0], ids)
    on_request = traced.decoder.candidates.scores_on_request
    assert np.array_equal(without[1], np.take_along_axis(logits, ids, 2) if on_request else log_probs)


def test_attention_that_is_wanted_changes_nothing_else(traced: Traced) -> None:
    feeds = feeds_for(traced.config, sources=3, width=2, source=12, target=6, seed=3)
    session = load_graph(traced.decoder_onnx)
    names = [output.name for output in session.get_outputs()]
    wanted, unwanted = (
        dict(zip(names, session.run(names, feeds | {"attention_wanted": np.array(flag)}), strict=True)) for flag in (True, False)
    )
    attention, nothing = wanted.pop("attention"), unwanted.pop("attention")
    assert attention.shape == nothing.shape == (3, 2, 12)
    np.testing.assert_allclose(attention.sum(axis=2), 1, atol=1e-6)
    beyond = np.arange(12) >= feeds["source_lengths"][:, None]
    assert not attention[np.broadcast_to(beyond[:, None], attention.shape)].any()
    assert not nothing.any()
    for name, array in wanted.items():
        assert np.array_equal(array, unwanted[name], equal_nan=True), name


def operators(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of all operators of a graph, of its branches too."""
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from operators(attribute.g)


def test_no_slow_or_neighbour_dependent_operator_is_in_the_graphs(traced: Traced) -> None:
    encoder, decoder = (set(operators(onnx.load_from_string(m).graph)) for m in (traced.encoder_onnx, traced.decoder_onnx))
    for found in (encoder, decoder):
        assert not found & {"DynamicQuantizeMatMul", "DynamicQuantizeLinear", "ReduceLogSumExp", "SkipLayerNormalization"}
        assert found & {"LayerNormalization", "SimplifiedLayerNormalization"}
    assert "MultiHeadAttention" in encoder
    assert "GroupQueryAttention" in decoder
    assert ("MultiHeadAttention" in decoder) != traced.decoder.keeps_cross_cache
