"""int8 products: weights in bytes with one scale a column, activations in bytes with one scale for all rows.

Knows one layer: ``ObservedLinear`` measures the range of its activations, ``CalibratedInt8Linear`` is made of it. The scale is a
constant, so a row's result does not depend on its neighbours in any bit, where ONNX Runtime's DynamicQuantizeMatMul takes the
scale from the whole batch; and one small operator stands before a product where scales that are found row by row at run time
need eight around it. Does not know graphs or caches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_DOMAIN = "com.microsoft"
# Values of a matrix that are rounded at a time: what that takes beside the matrix does not grow with it.
_VALUES_AT_ONCE = 1 << 24
# A row, or a column, of zeros has no scale; this one keeps it zeros.
SMALLEST_MAXIMUM = 1e-10


def quantize_columns(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [N, K] -> int8 [K, N], symmetric, and the scale [N] of each output column."""
    weight = weight.detach()
    # Multiplied, as CTranslate2 does: of weights stored in half precision many lie in the middle of two bytes, and a division
    # would round some of these to the other one.
    largest = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1)).clamp(min=SMALLEST_MAXIMUM)
    # By a tensor: a number over a tensor is the number times its reciprocal, which is rounded twice.
    steps = torch.tensor(127.0) / largest
    quantized = torch.empty(weight.shape[::-1], dtype=torch.int8)
    rows = max(1, _VALUES_AT_ONCE // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        at = slice(start, start + rows)
        quantized[:, at] = (weight[at] * steps[at, None]).round_().clamp_(-127, 127).t()
    return quantized, 1 / steps


class ObservedLinear(nn.Module):
    """A floating-point product that remembers the range of all it was given and made."""

    # Over everything seen so far.
    input_minimum: Tensor  # scalar
    input_maximum: Tensor  # scalar
    output_magnitude: Tensor  # [N], largest absolute value of each column

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Of ``weight`` [N, K] and ``bias`` [N]."""
        super().__init__()
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.register_buffer("input_minimum", torch.tensor(0.0))
        self.register_buffer("input_maximum", torch.tensor(0.0))
        self.register_buffer("output_magnitude", torch.zeros(weight.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        y = F.linear(x, self.weight, self.bias)
        self.input_minimum = torch.minimum(self.input_minimum, x.min())
        self.input_maximum = torch.maximum(self.input_maximum, x.max())
        self.output_magnitude = torch.maximum(self.output_magnitude, y.abs().flatten(0, -2).amax(dim=0))
        return y

    def columns(self, start: int, stop: int) -> ObservedLinear:
        """The product that makes some of its columns, with what was seen of these."""
        part = ObservedLinear(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])
        part.input_minimum, part.input_maximum = self.input_minimum, self.input_maximum
        part.output_magnitude = self.output_magnitude[start:stop]
        return part


class CalibratedInt8Linear(nn.Module):
    """y[r, n] = s * t[n] * sum_k (q(x[r, k] / s) - z) * w[n, k] + b[n], with s and z for all rows alike.

    What lies outside the range that was observed is taken for its end. Activations are uint8, around 128 or from 0 up: on x86 the
    products of unsigned by signed bytes are the fast ones.
    """

    weight: Tensor
    weight_scale: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None

    def __init__(self, observed: ObservedLinear, *, output_scale: Tensor | None = None) -> None:
        """Quantize what was observed.

        Args:
            observed: a product that has seen real activations.
            output_scale: [N], what each output column is to be divided by; costs nothing at run time.
        """
        super().__init__()
        quantized, weight_scale = quantize_columns(observed.weight)
        bias = observed.bias
        if output_scale is not None:
            weight_scale = weight_scale / output_scale
            bias = None if bias is None else bias / output_scale
        low, high = float(observed.input_minimum), float(observed.input_maximum)
        # After a ReLU nothing is negative, and the whole byte is for what is positive.
        zero_point, limit, steps = (0, high, 255) if low >= 0 else (128, max(-low, high), 127)
        self.register_buffer("weight", quantized)  # [K, N]
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("scale", torch.tensor(max(limit, SMALLEST_MAXIMUM) / steps))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.uint8))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if torch.onnx.is_in_onnx_export():
            return integer_product(x, self.weight, self.scale, self.weight_scale, self.zero_point, self.bias)
        zero = int(self.zero_point)
        product = exact_product(x / self.scale, self.weight, -zero, 255 - zero).float() * (self.scale * self.weight_scale)
        return product if self.bias is None else product + self.bias


class Int8TokenTable(nn.Module):
    """Rows of bytes, each with its scale: a quarter of the memory of a table that is kept beside the output layer's."""

    rows: Tensor
    scales: Tensor

    def __init__(self, rows: Tensor) -> None:
        """Quantize rows [V, d_model]."""
        super().__init__()
        quantized, scales = quantize_columns(rows)
        self.register_buffer("rows", quantized.t().contiguous())  # [V, d_model]
        self.register_buffer("scales", scales[:, None])  # [V, 1]

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] -> [..., d_model] float32."""
        return F.embedding(ids, self.rows).float() * F.embedding(ids, self.scales)


class RoundToInt8(nn.Module):
    """Rounds to bytes, with a scale of one."""

    def forward(self, x: Tensor) -> Tensor:
        """[...] float32 -> [...] int8."""
        if torch.onnx.is_in_onnx_export():
            one, zero = torch.tensor(1.0), torch.tensor(0, dtype=torch.int8)
            return torch.onnx.ops.symbolic("QuantizeLinear", (x, one, zero), dtype=torch.int8, shape=x.shape)
        return x.round().clamp(-128, 127).to(torch.int8)


def integer_product(
    x: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor, zero_point: Tensor, bias: Tensor | None
) -> Tensor:
    """The operators: scale * weight_scale * (q(x / scale) @ weight) + bias, in the graph that is being traced."""
    quantized = torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero_point), dtype=torch.uint8, shape=x.shape)
    inputs = (quantized, weight, scale, weight_scale, zero_point) + (() if bias is None else (None, bias))
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::MatMulIntegerToFloat",
        inputs,
        dtype=torch.float32,
        shape=(*x.shape[:-1], weight.shape[1]),
        version=1,
    )


def exact_product(scaled: Tensor, weight: Tensor, low: int, high: int) -> Tensor:
    """Sums of products of bytes are exact in float64 always; in float32 up to K of 1,032 with zero point 128, of 518 with 0."""
    return scaled.round().clamp(low, high).double() @ weight.double()
