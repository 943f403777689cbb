"""int8 graphs whose activations have one scale a row, found at run time: nothing is measured beforehand.

Knows ``RowScaledInt8Linear`` and where it goes; the scheme is CTranslate2's. A row's scale follows from that row alone, so that
its result does not depend on its neighbours in any bit. Caches stay in float32: scales of theirs would have to be measured. Does
not know where scales are constants (``calibration.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.calibration import quantize_tables
from export.graphs import DecoderStepGraph, EncoderGraph, lay_out
from export.model import Transformer
from export.quantize import SMALLEST_MAXIMUM, exact_product, integer_product, quantize_columns

# On x86 the products of unsigned by signed bytes are the fast ones.
_ZERO_POINT = 128
_STEPS = 127


class RowScaledInt8Linear(nn.Module):
    """y[r, n] = s[r] * t[n] * sum_k round(x[r, k] / s[r]) * w[n, k] + b[n], with s[r] = max_k |x[r, k]| / 127.

    A maximum is the same in whatever order it is found, as a sum would not be. Where several products have one input, the runtime
    finds that the operators before them are the same, and keeps one of each.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantize ``weight`` [N, K]; ``bias`` [N] stays as it is."""
        super().__init__()
        quantized, weight_scale = quantize_columns(weight)
        self.register_buffer("weight", quantized)  # [K, N]
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_MAXIMUM)  # [..., 1]
        # By a tensor: a number over a tensor is the number times its reciprocal, which is rounded twice.
        steps = x * (torch.tensor(float(_STEPS)) / largest)
        if torch.onnx.is_in_onnx_export():
            one, zero_point = torch.tensor(1.0), torch.tensor(_ZERO_POINT, dtype=torch.uint8)
            product = integer_product(steps, self.weight, one, self.weight_scale, zero_point, None)
        else:
            product = exact_product(steps, self.weight, -_STEPS, _STEPS).float() * self.weight_scale
        product = product * (largest / _STEPS)
        return product if self.bias is None else product + self.bias


def row_scaled_graphs(model: Transformer) -> tuple[EncoderGraph, DecoderStepGraph]:
    """Both graphs with int8 products and tables of tokens, and caches in float32.

    Args:
        model: trained, in float32.
    """
    encoder, decoder = lay_out(model, RowScaledInt8Linear)
    quantize_tables(encoder, decoder)
    return encoder, decoder
