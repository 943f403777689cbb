"""The Transformer against the paper, written out plainly."""

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from export.model import EncoderLayer, ModelConfig, MultiHeadAttention, Transformer, causal_mask, length_mask, sinusoidal_table
from tests.support import tiny_config


def random_model(**overrides: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(tiny_config(**overrides)).eval()


@torch.no_grad()
def test_multi_head_attention_equals_independent_single_heads() -> None:
    torch.manual_seed(1)
    config = tiny_config(d_model=24, num_heads=3)
    attention = MultiHeadAttention(config).eval()
    queries, memory = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    mask = length_mask(torch.tensor([7, 4]), 7)
    heads = []
    for h in range(3):
        at = slice(8 * h, 8 * (h + 1))
        q = queries @ attention.query.weight[at].T + attention.query.bias[at]
        k = memory @ attention.key.weight[at].T + attention.key.bias[at]
        v = memory @ attention.value.weight[at].T + attention.value.bias[at]
        scores = q @ k.transpose(1, 2) / math.sqrt(8)
        scores[1, :, 4:] = -torch.inf
        heads.append(torch.softmax(scores, dim=2) @ v)
    expected = torch.cat(heads, dim=2) @ attention.output.weight.T + attention.output.bias
    torch.testing.assert_close(attention(queries, memory, mask), expected)


def test_sinusoids_are_the_papers() -> None:
    table = sinusoidal_table(50, 6)
    for position in (0, 1, 17, 49):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_concatenated_sinusoids_are_the_same_columns_in_another_order() -> None:
    interleaved, concatenated = sinusoidal_table(9, 8), sinusoidal_table(9, 8, concatenated=True)
    assert torch.equal(concatenated, torch.cat([interleaved[:, 0::2], interleaved[:, 1::2]], dim=1))


@torch.no_grad()
def test_post_norm_layer_is_norm_of_x_plus_sublayer() -> None:
    layer = first_encoder_layer(random_model())
    x, mask = torch.randn(2, 4, 16), length_mask(torch.tensor([4, 2]), 4)
    middle = layer.self_attention_residual.norm(x + layer.self_attention(x, x, mask))
    ffn = torch.relu(middle @ layer.feed_forward.inner.weight.T + layer.feed_forward.inner.bias)
    ffn = ffn @ layer.feed_forward.outer.weight.T + layer.feed_forward.outer.bias
    torch.testing.assert_close(layer(x, mask), layer.feed_forward_residual.norm(middle + ffn))


@torch.no_grad()
def test_pre_norm_layer_is_x_plus_sublayer_of_norm() -> None:
    model = random_model(norm="pre")
    layer = first_encoder_layer(model)
    x, mask = torch.randn(2, 4, 16), length_mask(torch.tensor([4, 2]), 4)
    normed = layer.self_attention_residual.norm(x)
    middle = x + layer.self_attention(normed, normed, mask)
    expected = middle + layer.feed_forward(layer.feed_forward_residual.norm(middle))
    torch.testing.assert_close(layer(x, mask), expected)
    assert isinstance(model.encoder.final_norm, torch.nn.LayerNorm)
    assert isinstance(random_model().encoder.final_norm, torch.nn.Identity)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"])
def test_activations_differ_only_where_they_should(activation: str) -> None:
    def gelu_tanh(x: Tensor) -> Tensor:
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": gelu_tanh,
        "gelu_sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
        "silu": torch.nn.functional.silu,
    }
    ffn = first_encoder_layer(random_model(activation=activation)).feed_forward
    x = torch.randn(3, 16)
    torch.testing.assert_close(ffn(x), ffn.outer(plain[activation](ffn.inner(x))))


@torch.no_grad()
def test_the_causal_mask_hides_the_future() -> None:
    model = random_model()
    source, lengths = torch.tensor([[5, 6, 7]]), torch.tensor([3])
    short = model(source, lengths, torch.tensor([[2, 9, 10]]))
    other_future = model(source, lengths, torch.tensor([[2, 9, 10, 11, 12]]))
    torch.testing.assert_close(other_future[:, :3], short)
    changed_past = model(source, lengths, torch.tensor([[2, 8, 10]]))
    assert not torch.allclose(changed_past[:, 2], short[:, 2])
    assert torch.equal(
        causal_mask(3, torch.device("cpu"))[0, 0], torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    )


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    model = random_model()
    target = torch.tensor([[2, 9]])
    alone = model(torch.tensor([[5, 6, 3]]), torch.tensor([3]), target)
    padded = model(torch.tensor([[5, 6, 3, 0, 0], [7, 8, 9, 10, 3]]), torch.tensor([3, 5]), target.expand(2, 2))
    torch.testing.assert_close(padded[:1], alone)


def first_encoder_layer(model: Transformer) -> EncoderLayer:
    layer = model.encoder.layers[0]
    assert isinstance(layer, EncoderLayer)
    return layer


def parameters(model: Transformer) -> dict[int, Tensor]:
    return {id(p): p for p in model.parameters()}


@pytest.mark.parametrize(
    ("share", "tie", "matrices"),
    [(True, True, 1), (False, True, 2), (True, False, 2), (False, False, 3)],
    ids=["all shared", "source apart", "output apart", "all apart"],
)
def test_vocabulary_matrices_are_shared_as_configured(share: bool, tie: bool, matrices: int) -> None:
    model = random_model(share_embeddings=share, tie_output=tie)
    vocab = model.config.target_vocab_size
    assert sum(p.shape == (vocab, 16) for p in parameters(model).values()) == matrices


def test_embeddings_are_scaled_by_the_root_of_d_model() -> None:
    model = random_model()
    embedding = model.encoder.embedding
    with torch.no_grad():
        got = embedding(torch.tensor([5]), torch.tensor([3]))
        assert embedding.position_table is not None
        torch.testing.assert_close(got, embedding.tokens.weight[5:6] * 4.0 + embedding.position_table[3:4])
        unscaled = random_model(scale_embedding=False).encoder.embedding
        assert unscaled.position_table is not None
        torch.testing.assert_close(
            unscaled(torch.tensor([5]), torch.tensor([3])), unscaled.tokens.weight[5:6] + unscaled.position_table[3:4]
        )


def test_learned_positions_are_parameters_and_sinusoids_are_not() -> None:
    assert "encoder.embedding.position_table" in random_model(positions="learned").state_dict()
    assert "encoder.embedding.position_table" not in random_model().state_dict()


def test_without_biases_there_are_none() -> None:
    assert not [name for name, _ in random_model(bias=False).named_parameters() if name.endswith("bias")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"d_model": 17}, "not a multiple of num_heads"),
        ({"d_model": 7, "num_heads": 1}, "is odd"),
        ({"source_vocab_size": 9}, "needs one vocabulary"),
        ({"eos_id": 64}, "eos_id 64 is outside the target vocabulary"),
        ({"dropout": 1.0}, "dropout"),
        ({"heads": 4}, "Extra inputs are not permitted"),
        ({"layer_norm_eps": math.inf}, "layer_norm_eps"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(overrides: dict[str, object], message: str) -> None:
    values = tiny_config().model_dump() | overrides
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(values)


def test_all_faults_of_a_configuration_are_told_at_once() -> None:
    values = tiny_config().model_dump() | {"d_model": 17, "pad_id": 99, "eos_id": 98}
    with pytest.raises(ValidationError, match=r"d_model 17.*pad_id 99.*eos_id 98"):
        ModelConfig.model_validate(values)


@pytest.mark.parametrize(
    ("name", "value", "most"),
    [
        ("source_vocab_size", 2**62, 2**24),
        ("target_vocab_size", 2**62, 2**24),
        ("d_model", 10**30, 2**24),
        ("d_head", 10**30, 2**24),
        ("num_heads", 2**20, 2**10),
        ("num_encoder_layers", 10**9, 2**10),
        ("num_decoder_layers", 10**9, 2**10),
        ("encoder_d_ff", 2**62, 2**24),
        ("decoder_d_ff", 2**62, 2**24),
        ("max_positions", 10**12, 2**16),
        ("relative_buckets", 2**40, 2**16),
        ("relative_distance", 10**30, 2**16),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_made_of_them(name: str, value: int, most: int) -> None:
    with pytest.raises(ValidationError, match=rf"{name}\n  Input should be less than or equal to {most} "):
        ModelConfig.model_validate(tiny_config().model_dump() | {name: value})
