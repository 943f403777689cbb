"""int8 products whose rows stay on their own.

Knows one layer: a product with int8 weights (one scale a column) and uint8 activations (one scale a row, found at run time).
ONNX Runtime's DynamicQuantizeMatMul takes one scale for the whole batch, so that a row's result depends on its neighbours;
here a row is quantized by its own maximum, and is bit-identical alone and in any batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_DOMAIN = "com.microsoft"
# A row of zeros has no scale; this one keeps it zeros.
_SMALLEST_MAXIMUM = 1e-10


class PerRowInt8Linear(nn.Module):
    """y[r, n] = s[r] * t[n] * sum_k q(x[r, k] / s[r]) * w[n, k] + b[n], with s[r] = max_k |x[r, k]| / 127.

    Activations are uint8 around 128: on x86 the products of unsigned by signed bytes are the fast ones.
    """

    weight: Tensor
    weight_scale: Tensor
    zero_point: Tensor
    one: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantize ``weight`` [N, K] symmetrically, one scale for each of its N outputs; ``bias`` [N] stays as it is."""
        super().__init__()
        scale = weight.detach().abs().amax(dim=1).clamp(min=_SMALLEST_MAXIMUM) / 127
        quantized = (weight.detach() / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("weight", quantized.t().contiguous())  # [K, N]
        self.register_buffer("weight_scale", scale)
        self.register_buffer("zero_point", torch.tensor(128, dtype=torch.uint8))
        self.register_buffer("one", torch.tensor(1.0))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        maximum = x.abs().amax(dim=-1, keepdim=True).clamp(min=_SMALLEST_MAXIMUM)
        scaled = x * (127 / maximum)
        shape = (*x.shape[:-1], self.weight.shape[1])
        if torch.onnx.is_in_onnx_export():
            quantized = torch.onnx.ops.symbolic(
                "QuantizeLinear", (scaled, self.one, self.zero_point), dtype=torch.uint8, shape=x.shape
            )
            product = torch.onnx.ops.symbolic(
                f"{_DOMAIN}::MatMulIntegerToFloat",
                (quantized, self.weight, self.one, self.weight_scale, self.zero_point),
                dtype=torch.float32,
                shape=shape,
                version=1,
            )
        else:
            # Sums of products of bytes are exact in float32 up to K of about 1,000, and in float64 always.
            product = (scaled.round().clamp(-128, 127).double() @ self.weight.double()).float() * self.weight_scale
        product = product * (maximum / 127)
        return product if self.bias is None else product + self.bias
