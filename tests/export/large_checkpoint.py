"""A checkpoint of the size of published models, with random weights, written tensor by tensor: making one takes little memory.

It is a Hugging Face directory of NLLB's kind, its weights in several files with an index. By hand as well:
``python -m tests.export.large_checkpoint DIRECTORY`` makes one of 1.37 billion parameters (5.5 GB).
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.checkpoint.bart import tensor_names
from export.checkpoint.base import expected_shapes, shared_names
from export.checkpoint.m2m100 import M2M100
from export.model import ModelConfig
from tests.export.bart_directories import fairseq_sentencepiece, family_config
from tests.support import SAMPLE_LINES

LANGUAGES = ("deu_Latn", "eng_Latn")
_SHARED = "model.shared.weight"
_EOS_ID = 2
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a model; the defaults are those of NLLB with 1.3 billion parameters."""

    vocab_size: int = 256_206
    d_model: int = 1024
    num_heads: int = 16
    # Of encoder and decoder each.
    num_layers: int = 24
    d_ff: int = 8192
    # Files that the weights are shared out to.
    num_files: int = 3
    # Lines of samples.txt.
    num_samples: int = 4


def write_large_checkpoint(directory: Path, size: Size) -> int:
    """Write the directory, which is made.

    Returns:
        The bytes of all parameters in float32.
    """
    directory.mkdir(parents=True)
    fields = {
        "model_type": "m2m_100",
        "tokenizer_class": "NllbTokenizer",
        "vocab_size": size.vocab_size,
        "d_model": size.d_model,
        "encoder_layers": size.num_layers,
        "decoder_layers": size.num_layers,
        "encoder_attention_heads": size.num_heads,
        "decoder_attention_heads": size.num_heads,
        "encoder_ffn_dim": size.d_ff,
        "decoder_ffn_dim": size.d_ff,
        "max_position_embeddings": 1024,
    }
    (directory / "config.json").write_text(json.dumps(fields))
    (directory / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": LANGUAGES}))
    (directory / "sentencepiece.bpe.model").write_bytes(fairseq_sentencepiece())
    (directory / "samples.txt").write_text("\n".join(SAMPLE_LINES[: size.num_samples]))
    config = family_config(
        M2M100,
        size.vocab_size,
        d_model=size.d_model,
        num_heads=size.num_heads,
        num_encoder_layers=size.num_layers,
        num_decoder_layers=size.num_layers,
        encoder_d_ff=size.d_ff,
        decoder_d_ff=size.d_ff,
    )
    shapes = _shapes(config)
    names = list(shapes)
    places = {name: f"model-{i * size.num_files // len(names) + 1:05}.safetensors" for i, name in enumerate(names)}
    rng = np.random.default_rng(0)
    for place in dict.fromkeys(places.values()):
        _write_safetensors(directory / place, {name: shapes[name] for name in names if places[name] == place}, rng)
    total_bytes = 4 * sum(map(math.prod, shapes.values()))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total_bytes


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every tensor by its name in the file, shared ones once."""
    ours, shared = expected_shapes(config), shared_names(config)
    # The first of a shared matrix's names.
    names = {shared.get(name, name): theirs for theirs, name in reversed(tensor_names(config).items())}
    return {theirs: ours[name] for name, theirs in reversed(names.items())}


def _write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    """The format: length of the header, the header as JSON, then the tensors one after another."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("xb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shapes.items():
            # Norms around one, matrices so that activations keep their size.
            mean, deviation = (1.0, 0.05) if "norm.weight" in name else (0.0, shape[-1] ** -0.5)
            for start in range(0, math.prod(shape), _CHUNK_VALUES):
                values = rng.standard_normal(min(_CHUNK_VALUES, math.prod(shape) - start), np.float32)
                values = values * np.float32(deviation) + np.float32(mean)
                if name == _SHARED and start == 0:
                    # Or else the start token, which is the end's too, would be its own likeliest next.
                    values[_EOS_ID * shape[1] : (_EOS_ID + 1) * shape[1]] = 0
                stream.write(values.tobytes())


if __name__ == "__main__":
    print(write_large_checkpoint(Path(sys.argv[1]), Size()))
