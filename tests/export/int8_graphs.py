"""int8 graphs of a tiny model, and how near they have to be to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from export import verify
from export.graphs import DecoderStepGraph, EncoderGraph
from export.model import Transformer
from export.samples import Sample
from tests.support import tiny_config, tiny_model

SAMPLES = [Sample((5, 9, 11, 3)), Sample((20, 21, 22, 23, 24, 3)), Sample((7, 3)), Sample((40, 41, 5, 6, 7, 8, 9, 10, 3))]


@dataclass(frozen=True, slots=True)
class Int8Graphs:
    """A model, its translations of some sentences, and the graphs that were made of it."""

    model: Transformer
    references: list[verify.Reference]
    encoder: EncoderGraph
    decoder: DecoderStepGraph
    encoder_onnx: bytes
    decoder_onnx: bytes


def small_model(**changes: Any) -> Transformer:
    """Two layers of two heads each."""
    sizes = {"num_decoder_layers": 2, "d_model": 32, "num_heads": 2, "encoder_d_ff": 64, "decoder_d_ff": 48}
    return tiny_model(tiny_config(**sizes, **changes))


def assert_near_float32(graphs: Int8Graphs, *, token_agreement: float) -> None:
    """Eager and traced: logits off, but not far, and at least so many of the model's own best tokens."""
    config = graphs.model.config
    steppers = {
        "eager": verify.module_stepper(config, graphs.encoder, graphs.decoder),
        "onnx": verify.onnx_stepper(config, graphs.encoder_onnx, graphs.decoder_onnx, name="onnx"),
    }
    spread = float(np.std(np.concatenate([reference.logits for reference in graphs.references])))
    for name, stepper in steppers.items():
        measured = verify.compare(graphs.references, stepper, config, name=name, tolerance=None)
        assert 0 < measured.max_abs_logit_difference < 0.25 * spread, name
        assert measured.token_agreement > token_agreement, name
