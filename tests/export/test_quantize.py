"""int8 layers against arithmetic written out in whole numbers, and what is traced of them against the layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.onnx_export import OPSET, _quiet
from export.quantize import CalibratedInt8Linear, Int8TokenTable, ObservedLinear, RoundToInt8, quantize_columns
from serving.runtime import load_graph


def observed(weight: Tensor, bias: Tensor | None, *seen: Tensor) -> ObservedLinear:
    """A product that has seen activations."""
    layer = ObservedLinear(weight, bias)
    for x in seen:
        layer(x)
    return layer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_whole_numbers(x: Tensor, weight: Tensor, bias: Tensor | None, *, scale: float, zero_point: int) -> NDArray[np.float64]:
    """What the layer has to compute, from the formula in its docstring: sums of whole numbers, then one scale a column."""
    quantized = np.clip(np.rint(x.double().numpy() / scale) + zero_point, 0, 255).astype(np.int64)
    weight_scale = np.abs(weight.double().numpy()).max(axis=1) / 127
    columns = np.rint(weight.double().numpy() / weight_scale[:, None]).astype(np.int64)
    y: NDArray[np.float64] = ((quantized - zero_point) @ columns.T) * (scale * weight_scale)
    return y if bias is None else y + bias.double().numpy()


def traced(module: nn.Module, x: Tensor) -> bytes:
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            (x,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            opset_version=OPSET,
            input_names=["x"],
            output_names=["y"],
            verbose=False,
        )
    assert program is not None
    graph: bytes = program.model_proto.SerializeToString()
    return graph


# Observed products.


def test_an_observed_product_is_the_product() -> None:
    weight, bias, x = normal(6, 16), normal(6, seed=1), normal(2, 5, 16, seed=2)
    torch.testing.assert_close(ObservedLinear(weight, bias)(x), x @ weight.T + bias)
    torch.testing.assert_close(ObservedLinear(weight, None)(x), x @ weight.T)


def test_ranges_are_over_everything_seen() -> None:
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, -2.0], [1.0, 1.0]]), torch.tensor([0.5, 0.0, 0.0])
    layer = observed(weight, bias, torch.tensor([[[3.0, -1.0], [0.0, 2.0]]]), torch.tensor([[-4.0, 1.0]]))
    assert (layer.input_minimum.item(), layer.input_maximum.item()) == (-4.0, 3.0)
    # |1 * 3 + 0.5| and |-4 + 0.5|; |-2 * 2|; |3 - 1|, |0 + 2| and |-4 + 1|.
    assert layer.output_magnitude.tolist() == [3.5, 4.0, 3.0]


@pytest.mark.parametrize("value", [2.0, -2.0])
def test_a_range_holds_zero_whatever_was_seen(value: float) -> None:
    layer = observed(torch.ones(1, 2), None, torch.full((1, 2), value))
    assert (layer.input_minimum.item(), layer.input_maximum.item()) == (min(value, 0.0), max(value, 0.0))


# Weights.


def test_each_column_has_its_own_scale() -> None:
    quantized, scale = quantize_columns(torch.tensor([[1.0, -127.0, 63.5], [0.005, 0.0, 0.02], [0.0, 0.0, 0.0]]))
    assert quantized.dtype == torch.int8
    assert quantized.T.tolist() == [[1, -127, 64], [32, 0, 127], [0, 0, 0]]
    torch.testing.assert_close(scale[:2], torch.tensor([1.0, 0.02 / 127]))
    assert scale[2] > 0


# Calibrated products.


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_calibrated_product_is_exact_in_whole_numbers(with_bias: bool) -> None:
    weight, x = normal(32, 600), normal(7, 600, seed=2)
    bias = normal(32, seed=1) if with_bias else None
    layer = CalibratedInt8Linear(observed(weight, bias, x))
    scale = x.abs().max().item() / 127
    assert layer.zero_point.item() == 128
    assert layer.scale.item() == pytest.approx(scale)
    expected = in_whole_numbers(x, weight, bias, scale=layer.scale.item(), zero_point=128)
    np.testing.assert_allclose(layer(x).numpy(), expected, rtol=1e-5, atol=1e-5)
    # And it is a rounding of the product: off, but not far.
    exact = x @ weight.T if bias is None else x @ weight.T + bias
    assert 0 < (layer(x) - exact).abs().max() < 0.03 * exact.abs().max()


def test_a_range_that_leans_to_one_side_is_symmetric() -> None:
    layer = CalibratedInt8Linear(observed(torch.ones(1, 2), None, torch.tensor([[-6.35, 1.0]])))
    assert layer.zero_point.item() == 128
    assert layer.scale.item() == pytest.approx(0.05)


def test_what_is_never_negative_has_the_whole_byte() -> None:
    weight, x = normal(8, 64), normal(5, 64, seed=2).relu()
    layer = CalibratedInt8Linear(observed(weight, None, x))
    assert layer.zero_point.item() == 0
    assert layer.scale.item() == pytest.approx(x.max().item() / 255)
    expected = in_whole_numbers(x, weight, None, scale=layer.scale.item(), zero_point=0)
    np.testing.assert_allclose(layer(x).numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(-x), torch.zeros(5, 8))


def test_one_negative_activation_is_enough_for_a_zero_point_in_the_middle() -> None:
    seen = torch.tensor([[5.0, 1.0], [2.0, -1e-3]])
    assert CalibratedInt8Linear(observed(torch.ones(1, 2), None, seen)).zero_point.item() == 128


def test_beyond_its_range_an_activation_is_the_end_of_the_range() -> None:
    layer = CalibratedInt8Linear(observed(torch.tensor([[1.0]]), None, torch.tensor([[-1.27], [1.0]])))
    y = layer(torch.tensor([[1.27], [1.28], [5000.0], [-1.28], [-1.29], [-5000.0]])).flatten()
    # A byte around 128 has one step more below than above.
    torch.testing.assert_close(y, torch.tensor([1.27, 1.27, 1.27, -1.28, -1.28, -1.28]))


def test_zeros_make_the_bias_and_nothing_else() -> None:
    weight, bias = normal(6, 16), normal(6, seed=1)
    for seen in (normal(3, 16, seed=2), normal(3, 16, seed=2).relu(), torch.zeros(1, 16)):
        assert torch.equal(CalibratedInt8Linear(observed(weight, bias, seen))(torch.zeros(2, 16)), bias.expand(2, -1))
        assert torch.equal(CalibratedInt8Linear(observed(weight, None, seen))(torch.zeros(2, 16)), torch.zeros(2, 6))


def test_a_product_that_saw_only_zeros_makes_no_infinities() -> None:
    layer = CalibratedInt8Linear(observed(normal(6, 16), None, torch.zeros(1, 16)))
    assert layer(normal(3, 16)).isfinite().all()


def test_an_output_scale_divides_what_comes_out() -> None:
    weight, bias, x = normal(6, 16), normal(6, seed=1), normal(3, 16, seed=2)
    product = observed(weight, bias, x)
    output_scale = torch.tensor([0.01, 0.5, 1.0, 2.0, 3.0, 100.0])
    scaled = CalibratedInt8Linear(product, output_scale=output_scale)(x)
    torch.testing.assert_close(scaled, CalibratedInt8Linear(product)(x) / output_scale)
    unbiased = observed(weight, None, x)
    torch.testing.assert_close(
        CalibratedInt8Linear(unbiased, output_scale=output_scale)(x), CalibratedInt8Linear(unbiased)(x) / output_scale
    )


def test_a_row_does_not_depend_on_loud_neighbours() -> None:
    layer = CalibratedInt8Linear(observed(normal(6, 16), normal(6, seed=1), normal(3, 16, seed=2)))
    quiet, loud = normal(1, 16, seed=3), 1000 * normal(3, 16, seed=4)
    assert torch.equal(layer(torch.cat([loud, quiet]))[3:], layer(quiet))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("non_negative", [True, False], ids=["after a relu", "signed"])
@pytest.mark.parametrize("with_output_scale", [True, False], ids=["scaled", "plain"])
def test_a_traced_product_equals_its_layer(with_bias: bool, non_negative: bool, with_output_scale: bool) -> None:
    weight, bias = normal(24, 40), normal(24, seed=1) if with_bias else None
    seen = normal(2, 9, 40, seed=2).relu() if non_negative else normal(2, 9, 40, seed=2)
    output_scale = normal(24, seed=3).abs() + 0.1 if with_output_scale else None
    layer = CalibratedInt8Linear(observed(weight, bias, seen), output_scale=output_scale)
    session = load_graph(traced(layer, seen))
    # Within the range, beyond it, and zeros.
    for x in (seen, 3 * seen, torch.zeros(3, 9, 40)):
        (got,) = session.run(["y"], {"x": x.numpy()})
        np.testing.assert_allclose(got, layer(x).numpy(), rtol=1e-5, atol=1e-5)


def test_columns_are_quantized_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(11, 16)
    weight[4] = 0.0
    whole, scale = quantize_columns(weight)
    assert whole.is_contiguous()
    for values_at_once in (1, 16, 40, 1000):
        monkeypatch.setattr("export.quantize._VALUES_AT_ONCE", values_at_once)
        parts, same_scale = quantize_columns(weight)
        assert torch.equal(parts, whole)
        assert torch.equal(same_scale, scale)


# Tables and rounding.


def test_a_token_table_keeps_each_row_in_its_own_scale() -> None:
    rows = normal(10, 16) * torch.logspace(-4, 4, 10)[:, None]
    rows[7] = 0.0
    table = Int8TokenTable(rows)
    ids = torch.tensor([[3, 9, 7], [0, 0, 4]])
    got = table(ids)
    assert table.rows.dtype == torch.int8
    assert got.dtype == torch.float32
    assert ((got - rows[ids]).abs() <= rows[ids].abs().amax(dim=2, keepdim=True) / 254 * 1.001).all()
    assert torch.equal(got[0, 2], torch.zeros(16))
    (from_graph,) = load_graph(traced(table, ids)).run(["y"], {"x": ids.numpy()})
    assert np.array_equal(from_graph, got.numpy())


def test_rounding_to_bytes_is_to_even_and_ends_at_the_ends() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 0.49, 127.4, 127.5, 1e9, -127.6, -128.5, -129.0, -1e9]])
    expected = [[0, 2, 2, 0, -2, 0, 127, 127, 127, -128, -128, -128, -128]]
    assert RoundToInt8()(x).tolist() == expected
    (got,) = load_graph(traced(RoundToInt8(), x)).run(["y"], {"x": x.numpy()})
    assert got.dtype == np.int8
    assert got.tolist() == expected
