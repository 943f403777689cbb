"""The variables of CTranslate2's ``TransformerSpec``: what they say of the architecture, and which tensors of ours they hold.

Knows every variable and setting by name, and what our module has no place for; does not know the file
(``ctranslate2_binary.py``), vocabularies or ``config.json`` (``ctranslate2_tokens.py``).

Queries, keys and values of self-attention are one matrix, ``linear_0``, keys and values of cross-attention another, ``linear_1``;
a bias that is not there is zero. Positions without a table are CTranslate2's own: sines, then cosines, of position + 1 times a
rate that falls from 1 to 1/10000 (``src/layers/common.cc``, 4.8).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from export.checkpoint.base import alignment
from export.checkpoint.ctranslate2_binary import ModelBinary
from export.checkpoint.ctranslate2_legacy import LEGACY_HEADS
from export.model import Activation, NormPlacement

# The longest source that CTranslate2 takes if not told otherwise; a longer table of positions is cut.
MAX_POSITIONS = 1024
SIDES = ("encoder", "decoder")
TARGET_EMBEDDING = "decoder/embeddings/weight"
PROJECTION = "decoder/projection"

_ACTIVATIONS: dict[int, Activation] = {0: "relu", 1: "gelu_tanh", 2: "silu", 3: "gelu", 4: "gelu_sigmoid"}
_ACTIVATION_NAMES = ("ReLU", "GELUTanh", "Swish", "GELU", "GELUSigmoid", "Tanh", "Sigmoid")
# Settings by their last name: those that are read, and those that change nothing of what the module computes (how one would merge
# several embeddings; details of what is off; flags of what its own variables tell).
_READ = frozenset(
    {
        *("activation", "alignment_heads", "alignment_layer", "multiply_by_sqrt_depth", "num_heads", "pre_norm"),
        *("scale_embeddings", "start_from_zero_embedding"),
    }
)
_IGNORED = frozenset({"alibi_use_positive_positions", "embeddings_merge", "layernorm_embedding", "scale_alibi"})
# Of files before config.json, which ``ctranslate2.py`` reads.
_OLD_SETTINGS = frozenset(
    {
        "bos_token",
        "eos_token",
        "unk_token",
        "user_decoder_start_tokens",
        "with_source_bos",
        "with_source_eos",
        "with_target_bos",
    }
)
# Settings by their last name, and the value with which they change nothing.
_NEUTRAL: dict[str, float] = {
    "alibi": 0,
    "layer_norm_use_residual": 0,
    "multi_query_attention": 0,
    "scale_outputs": 1,
    "sliding_window": 0,
    "with_relative_position": 0,
}
_LAYER = re.compile(r"(encoder|decoder)/layer_(\d+)/")
_WEIGHT = re.compile(
    r"encoder/embeddings(_0)?/weight(_scale)?|decoder/embeddings/weight(_scale)?|decoder/projection/(weight(_scale)?|bias)"
    r"|(encoder|decoder)/(position_encodings/encodings|(layernorm_embedding|layer_norm)/(gamma|beta))"
    r"|(encoder|decoder)/layer_\d+/(self_attention|ffn)/(layer_norm/(gamma|beta)|linear_[01]/(weight(_scale)?|bias))"
    r"|decoder/layer_\d+/attention/(layer_norm/(gamma|beta)|linear_[012]/(weight(_scale)?|bias))"
)
_NUMBER = re.compile(r"(?<=/layer_)\d+(?=/)")
# Of a layer's number, in faults.
_SHOWN_DIGITS = 12
# Scores in CTranslate2 are float32: a scale that was computed as one.
_RELATIVE_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the variables say of the architecture."""

    d_model: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    encoder_d_ff: int
    decoder_d_ff: int
    norm: NormPlacement
    activation: Activation
    scale_embedding: bool
    embedding_norm: bool
    output_bias: bool
    # The first vector that the decoder gets is zero, whatever the start token is.
    start_from_zero: bool
    # Whose attention tells what source tokens a target token comes from; see ``ModelConfig``.
    alignment_layer: int
    alignment_heads: int | None
    # Rows of the embeddings.
    source_rows: int
    target_rows: int

    def depth(self, side: str) -> int:
        """Layers of the encoder or the decoder."""
        return self.num_encoder_layers if side == "encoder" else self.num_decoder_layers


@dataclass(frozen=True, slots=True)
class _Part:
    """A variable, and the tensors of ours that it holds, one after the other along its rows."""

    theirs: str
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    # What a model without this variable has.
    absent: float | None = None


def source_embedding(model: ModelBinary) -> str:
    """The name of the source embedding, which may be one of a list."""
    listed = "encoder/embeddings_0/weight"
    return "encoder/embeddings/weight" if model.stored_name(listed) is None else listed


def read_settings(model: ModelBinary, faults: list[str]) -> Settings | None:
    """The architecture; None when it cannot be known. All that is unsupported goes to ``faults``, by name."""
    found: list[str] = []
    shapes = {
        "source": _shape(model, source_embedding(model), found),
        "target": _shape(model, TARGET_EMBEDDING, found),
        **{side: _shape(model, f"{side}/layer_0/ffn/linear_0/weight", found) for side in SIDES},
    }
    if found:
        faults += found
        return None
    d_model = shapes["target"][1]
    depths = {side: _depth(model, side, found) for side in SIDES}
    num_heads = _agreed(model, "num_heads", found, default=LEGACY_HEADS.get(model.spec))
    pre_norm = _agreed(model, "pre_norm", found, default=1)
    activation = _agreed(model, "activation", found, default=0)
    if activation is not None and activation not in _ACTIVATIONS:
        known = int(activation) if 0 <= activation < len(_ACTIVATION_NAMES) else None
        called = f" ({_ACTIVATION_NAMES[known]})" if known is not None else ""
        supported = ", ".join(_ACTIVATION_NAMES[i] for i in _ACTIVATIONS)
        found.append(f"encoder/activation: {activation}{called} is not supported, only {supported}")
    if num_heads is not None and (num_heads < 1 or d_model % num_heads):
        found.append(f"encoder/num_heads: {num_heads} is no divisor of the embedding's width {d_model}")
        num_heads = None
    scales = {_scaled(model, side, d_model, found) for side in SIDES}
    if len(scales) > 1:
        found.append("encoder/scale_embeddings, decoder/scale_embeddings: scaling one embedding alone is not supported")
    embedding_norms = {side: f"{side}/layernorm_embedding/gamma" in model for side in SIDES}
    if len(set(embedding_norms.values())) > 1:
        found.append("encoder/layernorm_embedding, decoder/layernorm_embedding: one alone is not supported")
    for side in SIDES:
        if pre_norm is not None and (f"{side}/layer_norm/gamma" in model) != bool(pre_norm):
            with_or_without = "without" if pre_norm else "with"
            found.append(
                f"{side}/layer_norm: pre_norm is {pre_norm}; a stack {with_or_without} a last norm is not supported then"
            )
    found += _setting_faults(model, d_model, num_heads)
    alignment_layer, alignment_heads = alignment(
        _decoder_setting(model, "alignment_layer", found, default=-1),
        _decoder_setting(model, "alignment_heads", found, default=1),
        num_layers=depths["decoder"] or 1,
        num_heads=num_heads or 1,
        faults=found,
        prefix="decoder/",
    )
    # The same of many layers is told once.
    unknown = dict.fromkeys(_NUMBER.sub("*", name) for name in model.names if not _is_known(name))
    faults += [*found, *(f"{name}: is not supported" for name in unknown)]
    if num_heads is None or pre_norm is None or activation not in _ACTIVATIONS or not all(depths.values()):
        return None
    return Settings(
        d_model=d_model,
        num_heads=int(num_heads),
        num_encoder_layers=depths["encoder"],
        num_decoder_layers=depths["decoder"],
        encoder_d_ff=shapes["encoder"][0],
        decoder_d_ff=shapes["decoder"][0],
        norm="pre" if pre_norm else "post",
        activation=_ACTIVATIONS[int(activation)],
        scale_embedding=True in scales,
        embedding_norm=embedding_norms["encoder"],
        output_bias=f"{PROJECTION}/bias" in model,
        start_from_zero=bool(model.scalar("decoder/start_from_zero_embedding")),
        alignment_layer=alignment_layer,
        alignment_heads=alignment_heads,
        source_rows=shapes["source"][0],
        target_rows=shapes["target"][0],
    )


def read_tensors(model: ModelBinary, settings: Settings, faults: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by our names, as float32, shared ones once for each name, and which variable each is from.

    Variables that are missing or misshapen go to ``faults``, and then nothing is read.
    """
    parts = [*_parts(model, settings)]
    found: list[str] = []
    for part in parts:
        own = model.stored_name(part.theirs)
        if own is None and part.absent is None:
            found.append(f"{part.theirs}: missing, expected {list(part.shape)}")
        elif own is not None and model.variables[own].shape != part.shape:
            found.append(f"{part.theirs}: shape {list(model.variables[own].shape)}, expected {list(part.shape)}")
    if found:
        faults += found
        return {}, {}
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    # By the variable's own name: what is shared is read once, and is one tensor here too.
    read: dict[str, Tensor] = {}
    for part in parts:
        own = model.stored_name(part.theirs)
        try:
            if own is None:
                values = torch.full(part.shape, part.absent or 0.0)
            elif own not in read:
                values = read[own] = model.weight(part.theirs)
            else:
                values = read[own]
        except ValueError as error:
            found.append(str(error))
            continue
        for ours, tensor in zip(part.ours, values.chunk(len(part.ours)), strict=True):
            tensors[ours], names[ours] = tensor, part.theirs
    faults += found
    return tensors, names


def read_positions(model: ModelBinary, settings: Settings, faults: list[str]) -> dict[str, Tensor]:
    """Both tables of positions by our names, [positions, d_model], of one length; faults go to ``faults``."""
    tables: dict[str, Tensor] = {}
    for side in SIDES:
        name = f"{side}/position_encodings/encodings"
        own = model.stored_name(name)
        if own is None:
            tables[side] = position_table(MAX_POSITIONS, settings.d_model)
            continue
        shape = model.variables[own].shape
        if len(shape) != 2 or shape[0] < 1 or shape[1] != settings.d_model:
            faults.append(f"{name}: shape {list(shape)}, expected [positions, {settings.d_model}]")
            continue
        try:
            tables[side] = model.weight(name)
        except ValueError as error:
            faults.append(str(error))
    longest = min((MAX_POSITIONS, *(len(table) for table in tables.values())))
    return {f"{side}.embedding.position_table": table[:longest].clone() for side, table in tables.items()}


def position_table(num_positions: int, d_model: int) -> Tensor:
    """The table of a model that has none in its file: [num_positions, d_model] float32."""
    half = d_model // 2
    rate = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10000.0) / max(half - 1, 1)))
    angle = torch.arange(1, num_positions + 1, dtype=torch.float64)[:, None] * rate  # [num_positions, d_model / 2]
    return torch.cat((angle.sin(), angle.cos()), dim=1).to(torch.float32)


def _parts(model: ModelBinary, settings: Settings) -> Iterator[_Part]:
    d_model = settings.d_model
    yield _Part(source_embedding(model), (settings.source_rows, d_model), ("encoder.embedding.tokens.weight",))
    yield _Part(TARGET_EMBEDDING, (settings.target_rows, d_model), ("decoder.embedding.tokens.weight",))
    yield _Part(f"{PROJECTION}/weight", (settings.target_rows, d_model), ("output.weight",))
    if settings.output_bias:
        yield _Part(f"{PROJECTION}/bias", (settings.target_rows,), ("output.bias",))
    for side, d_ff in zip(SIDES, (settings.encoder_d_ff, settings.decoder_d_ff), strict=True):
        if settings.embedding_norm:
            yield from _norm(f"{side}/layernorm_embedding", f"{side}.embedding.norm", d_model)
        if settings.norm == "pre":
            yield from _norm(f"{side}/layer_norm", f"{side}.final_norm", d_model)
        for i in range(settings.depth(side)):
            theirs, ours = f"{side}/layer_{i}", f"{side}.layers.{i}"
            attention = f"{ours}.self_attention"
            own_inputs = (f"{attention}.query", f"{attention}.key", f"{attention}.value")
            yield from _linear(f"{theirs}/self_attention/linear_0", d_model, d_model, own_inputs)
            yield from _linear(f"{theirs}/self_attention/linear_1", d_model, d_model, (f"{attention}.output",))
            yield from _norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attention_residual.norm", d_model)
            if side == "decoder":
                attention = f"{ours}.cross_attention"
                yield from _linear(f"{theirs}/attention/linear_0", d_model, d_model, (f"{attention}.query",))
                yield from _linear(f"{theirs}/attention/linear_1", d_model, d_model, (f"{attention}.key", f"{attention}.value"))
                yield from _linear(f"{theirs}/attention/linear_2", d_model, d_model, (f"{attention}.output",))
                yield from _norm(f"{theirs}/attention/layer_norm", f"{ours}.cross_attention_residual.norm", d_model)
            yield from _linear(f"{theirs}/ffn/linear_0", d_ff, d_model, (f"{ours}.feed_forward.inner",))
            yield from _linear(f"{theirs}/ffn/linear_1", d_model, d_ff, (f"{ours}.feed_forward.outer",))
            yield from _norm(f"{theirs}/ffn/layer_norm", f"{ours}.feed_forward_residual.norm", d_model)


def _linear(theirs: str, rows: int, columns: int, ours: tuple[str, ...]) -> Iterator[_Part]:
    """A product of ``rows`` outputs for each of ``ours``, and its bias."""
    yield _Part(f"{theirs}/weight", (len(ours) * rows, columns), tuple(f"{name}.weight" for name in ours))
    yield _Part(f"{theirs}/bias", (len(ours) * rows,), tuple(f"{name}.bias" for name in ours), absent=0.0)


def _norm(theirs: str, ours: str, d_model: int) -> Iterator[_Part]:
    yield _Part(f"{theirs}/gamma", (d_model,), (f"{ours}.weight",))
    # A norm without one is by the root mean square, which the module has not.
    yield _Part(f"{theirs}/beta", (d_model,), (f"{ours}.bias",))


def _shape(model: ModelBinary, name: str, found: list[str]) -> tuple[int, int]:
    """Of a matrix; a fault, and zeros, when there is none."""
    own = model.stored_name(name)
    shape = () if own is None else model.variables[own].shape
    if len(shape) == 2 and min(shape) > 0:
        return shape[0], shape[1]
    found.append(f"{name}: {'missing' if own is None else f'shape {list(shape)}'}, expected a matrix")
    return 0, 0


def _depth(model: ModelBinary, side: str, found: list[str]) -> int:
    """Layers of a side, which are numbered from zero; a fault, and zero, when they are not."""
    # As text: a number in a name may be of any length.
    layers = {match[2] for name in model.names if (match := _LAYER.match(name)) and match[1] == side}
    if layers != {*map(str, range(len(layers)))}:
        first = [number[:_SHOWN_DIGITS] for number in sorted(layers, key=lambda number: (len(number), number))[:8]]
        found.append(f"{side}/layer_*: layers [{', '.join(first)}] are not numbered one after the other")
        return 0
    return len(layers)


def _setting(model: ModelBinary, side: str, name: str, found: list[str]) -> int | None:
    """A whole number of one side, which old files have once for both; None where none says it, or after a fault."""
    for stated in (f"{side}/{name}", name):
        value = model.scalar(stated)
        if value is not None and not float(value).is_integer():
            found.append(f"{stated}: {value:.6g} is no whole number")
            return None
        if value is not None:
            return int(value)
    return None


def _decoder_setting(model: ModelBinary, name: str, found: list[str], *, default: int) -> int:
    value = _setting(model, "decoder", name, found)
    return default if value is None else value


def _agreed(model: ModelBinary, name: str, found: list[str], *, default: int | None = None) -> int | None:
    """A setting that both sides have to have in common; a fault, and None, when they do not."""
    faults: list[str] = []
    values = [default if (value := _setting(model, side, name, faults)) is None else value for side in SIDES]
    if not faults and values[0] != values[1]:
        faults.append(f"encoder/{name}, decoder/{name}: {values[0]} and {values[1]}; different values are not supported")
    if not faults and values[0] is None:
        faults.append(f"encoder/{name}: missing")
    # What old files have once for both sides is told once.
    found += dict.fromkeys(faults)
    return None if faults else values[0]


def _scaled(model: ModelBinary, side: str, d_model: int, found: list[str]) -> bool:
    """Whether embeddings are multiplied by sqrt(d_model): a flag, or the factor itself, and true where nothing is said."""
    name = f"{side}/scale_embeddings"
    if name not in model:
        name = f"{source_embedding(model) if side == 'encoder' else TARGET_EMBEDDING}".removesuffix("weight")
        name += "multiply_by_sqrt_depth"
    value = model.scalar(name)
    own = model.stored_name(name)
    if value is None or own is None:
        return True
    if model.variables[own].dtype == "int8":
        return bool(value)
    if math.isclose(value, 1.0, rel_tol=_RELATIVE_TOLERANCE):
        return False
    if not math.isclose(value, math.sqrt(d_model), rel_tol=_RELATIVE_TOLERANCE):
        found.append(f"{name}: {value:.6g} is not supported, only 1 or the square root of the embedding's width {d_model}")
    return True


def _setting_faults(model: ModelBinary, d_model: int, num_heads: int | None) -> list[str]:
    """Every setting with a value that the module has no place for; those of heads where their number is known."""
    neutral = dict(_NEUTRAL)
    if num_heads is not None:
        head_dim = d_model // num_heads
        neutral |= {"queries_scale": head_dim**-0.5, "num_heads_kv": num_heads, "head_dim": head_dim}
    values: dict[str, float | int] = {}
    for name in model.names:
        own = name.rsplit("/", 1)[-1]
        value = model.scalar(name)
        if own in neutral and value is not None and not math.isclose(value, neutral[own], rel_tol=_RELATIVE_TOLERANCE):
            # The same of many layers is told once.
            values.setdefault(_NUMBER.sub("*", name), value)
    return [
        f"{name}: {value:.6g} is not supported, only {neutral[name.rsplit('/', 1)[-1]]:.6g}" for name, value in values.items()
    ]


def _is_known(name: str) -> bool:
    """Whether a variable is a weight that the module has, or a setting that is read, or checked, or of no consequence."""
    own = name.rsplit("/", 1)[-1]
    settings = (*_READ, *_IGNORED, *_NEUTRAL, "queries_scale", "num_heads_kv", "head_dim")
    return own in settings or name in _OLD_SETTINGS or _WEIGHT.fullmatch(name) is not None
