"""Random models in the formats of other projects, written as these write them, and what they compute, written a second time.

The forward passes follow the projects' own sources (marian-dev: src/models/transformer.h; fairseq: fairseq/models/transformer;
OpenNMT-py: onmt/encoders/transformer.py, onmt/decoders/transformer.py) on the tensors as they are stored, one sentence at a
time, and share nothing with this project's module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

Array = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]


def layer_norm(x: Array, scale: NDArray[Any], bias: NDArray[Any], eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    normed: Array = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * scale + bias
    return normed


def attend(queries: Array, keys: Array, values: Array, num_heads: int, *, causal: bool) -> Array:
    """[Q, d], [K, d], [K, d] -> [Q, d]."""
    width = queries.shape[1] // num_heads
    heads = []
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = queries[:, part] @ keys[:, part].T / math.sqrt(width)
        if causal:
            scores = np.where(np.tri(*scores.shape) > 0, scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        heads.append(shares / shares.sum(axis=-1, keepdims=True) @ values[:, part])
    return np.concatenate(heads, axis=1)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


# Marian.

MARIAN_SETTINGS: dict[str, Any] = {
    "dec-depth": 2,
    "dim-emb": 32,
    "dim-vocabs": [0, 0],
    "enc-depth": 2,
    "factors-combine": "sum",
    "guided-alignment": "none",
    "input-types": [],
    "lemma-dim-emb": 0,
    "output-omit-bias": False,
    "right-left": False,
    "tied-embeddings": False,
    "tied-embeddings-all": True,
    "tied-embeddings-src": False,
    "transformer-decoder-autoreg": "self-attention",
    "transformer-dim-aan": 2048,
    "transformer-dim-ffn": 48,
    "transformer-ffn-activation": "swish",
    "transformer-ffn-depth": 2,
    "transformer-guided-alignment-layer": "last",
    "transformer-heads": 4,
    "transformer-no-projection": False,
    "transformer-pool": False,
    "transformer-postprocess": "dan",
    "transformer-postprocess-emb": "d",
    "transformer-postprocess-top": "",
    "transformer-preprocess": "",
    "transformer-tied-layers": [],
    "transformer-train-position-embeddings": False,
    "type": "transformer",
    "ulr": False,
    "version": "v1.10.0 6f6d4846 2021-02-06 15:35:16 -0800",
}


def marian_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    d, inner = settings["dim-emb"], settings["transformer-dim-ffn"]
    source_size, target_size = settings["dim-vocabs"]
    shapes: dict[str, tuple[int, int]] = {}
    pre = "_pre" if "n" in settings["transformer-preprocess"] else ""

    def norm(name: str, suffix: str) -> None:
        shapes[f"{name}_ln_scale{suffix}"] = shapes[f"{name}_ln_bias{suffix}"] = (1, d)

    for side, depth, kinds in (
        ("encoder", settings["enc-depth"], ("self",)),
        ("decoder", settings["dec-depth"], ("self", "context")),
    ):
        for i in range(1, depth + 1):
            for kind in kinds:
                for letter in "qkvo":
                    shapes[f"{side}_l{i}_{kind}_W{letter}"] = (d, d)
                    shapes[f"{side}_l{i}_{kind}_b{letter}"] = (1, d)
                norm(f"{side}_l{i}_{kind}_Wo", pre)
            shapes[f"{side}_l{i}_ffn_W1"], shapes[f"{side}_l{i}_ffn_b1"] = (d, inner), (1, inner)
            shapes[f"{side}_l{i}_ffn_W2"], shapes[f"{side}_l{i}_ffn_b2"] = (inner, d), (1, d)
            norm(f"{side}_l{i}_ffn_ffn", pre)
        if "n" in settings["transformer-postprocess-top"]:
            norm(f"{side}_top", "")
        if "n" in settings["transformer-postprocess-emb"]:
            norm(f"{side}_emb", "_pre")
    if settings["tied-embeddings-all"] or settings["tied-embeddings-src"]:
        shapes["Wemb"] = (source_size, d)
    else:
        shapes["encoder_Wemb"], shapes["decoder_Wemb"] = (source_size, d), (target_size, d)
    if not (settings["tied-embeddings"] or settings["tied-embeddings-all"]):
        shapes["decoder_ff_logit_out_Wt"] = (target_size, d)
    if not settings["output-omit-bias"]:
        shapes["decoder_ff_logit_out_b"] = (1, target_size)
    if settings["transformer-train-position-embeddings"]:
        shapes["Wpos"] = (60, d)
    return shapes


def marian_arrays(settings: Mapping[str, Any], *, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Random tensors, drawn so that decisions are clear and every one of them shows."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, NDArray[Any]] = {}
    for name, shape in marian_shapes(settings).items():
        values = rng.standard_normal(shape)
        if "_ln_scale" in name:
            values = 1 + 0.2 * values
        elif "_ln_bias" in name or "_b" in name:
            values *= 0.2
        elif name.endswith("emb"):
            values *= 0.4
        elif name == "decoder_ff_logit_out_Wt":
            values *= 0.5
        elif name != "Wpos":
            values *= math.sqrt(1.5 / shape[0])
        arrays[name] = values.astype(np.float32)
    if "decoder_ff_logit_out_b" in arrays:
        # Hypotheses end now and then.
        arrays["decoder_ff_logit_out_b"][0, 0] += 5
    return arrays


def write_marian_npz(path: Path, settings: Mapping[str, Any], arrays: Arrays) -> Path:
    text = yaml.safe_dump(dict(settings), default_flow_style=None).encode()
    stored: dict[str, Any] = {**arrays, "special:model.yml": np.frombuffer(text + b"\0", np.int8)}
    np.savez(path, **stored)
    return path


def write_marian_vocabulary(path: Path, ids: Mapping[str, int]) -> Path:
    path.write_text(yaml.safe_dump(dict(ids), allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


def marian_positions(length: int, d: int) -> Array:
    rates = 10000.0 ** (-np.arange(d // 2) / (d // 2 - 1))
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def marian_logits(settings: Mapping[str, Any], arrays: Arrays, source: Sequence[int], prefix: Sequence[int]) -> Array:
    """Logits of the token after the first 0, 1, ... tokens of the prefix: [len(prefix) + 1, V]."""
    d, num_heads = settings["dim-emb"], settings["transformer-heads"]
    before, after = settings["transformer-preprocess"], settings["transformer-postprocess"]

    def norm(x: Array, name: str, suffix: str = "") -> Array:
        return layer_norm(x, arrays[f"{name}_ln_scale{suffix}"], arrays[f"{name}_ln_bias{suffix}"], 1e-6)

    def process(x: Array, operations: str, name: str, skipped: Array, suffix: str = "") -> Array:
        for operation in operations:
            if operation == "a":
                x = x + skipped
            elif operation == "n":
                x = norm(x, name, suffix)
        return x

    def affine(x: Array, prefix: str, letter: str) -> Array:
        return x @ arrays[f"{prefix}_W{letter}"] + arrays[f"{prefix}_b{letter}"]

    def attention(x: Array, memory: Array | None, name: str, *, causal: bool) -> Array:
        entered = process(x, before, f"{name}_Wo", x, "_pre")
        attended = entered if memory is None else memory
        mixed = attend(
            affine(entered, name, "q"), affine(attended, name, "k"), affine(attended, name, "v"), num_heads, causal=causal
        )
        return process(affine(mixed, name, "o"), after, f"{name}_Wo", x)

    def feed_forward(x: Array, name: str) -> Array:
        inner = affine(process(x, before, f"{name}_ffn", x, "_pre"), name, "1")
        match settings["transformer-ffn-activation"]:
            case "relu":
                inner = np.maximum(inner, 0)
            case "swish":
                inner = inner * sigmoid(inner)
            case "gelu":
                is_exact = settings.get("version", "").startswith("v1.12.42")
                normal = (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
                inner = inner * (normal if is_exact else sigmoid(1.702 * inner))
        return process(affine(inner, name, "2"), after, f"{name}_ffn", x)

    def embedded(vectors: Array, side: str) -> Array:
        if "Wpos" in arrays:
            x = vectors + arrays["Wpos"][: len(vectors)]
        else:
            x = vectors * math.sqrt(d) + marian_positions(len(vectors), d)
        return process(x, settings["transformer-postprocess-emb"], f"{side}_emb", x, "_pre")

    def table(side: str) -> NDArray[Any]:
        return arrays["Wemb"] if "Wemb" in arrays else arrays[f"{side}_Wemb"]

    memory = embedded(table("encoder")[list(source)].astype(np.float64), "encoder")
    for i in range(1, settings["enc-depth"] + 1):
        memory = attention(memory, None, f"encoder_l{i}_self", causal=False)
        memory = feed_forward(memory, f"encoder_l{i}_ffn")
    memory = process(memory, settings["transformer-postprocess-top"], "encoder_top", memory)
    x = embedded(np.concatenate([np.zeros((1, d)), table("decoder")[list(prefix)]]), "decoder")
    for i in range(1, settings["dec-depth"] + 1):
        x = attention(x, None, f"decoder_l{i}_self", causal=True)
        x = attention(x, memory, f"decoder_l{i}_context", causal=False)
        x = feed_forward(x, f"decoder_l{i}_ffn")
    x = process(x, settings["transformer-postprocess-top"], "decoder_top", x)
    weight = arrays.get("decoder_ff_logit_out_Wt", table("decoder"))
    return x @ weight.T.astype(np.float64) + arrays.get("decoder_ff_logit_out_b", np.zeros((1, 1)))


# fairseq.

FAIRSEQ_SETTINGS: dict[str, Any] = {
    "arch": "transformer_iwslt_de_en",
    "task": "translation",
    "source_lang": "en",
    "target_lang": "de",
    "activation_fn": "relu",
    "adaptive_input": False,
    "adaptive_softmax_cutoff": None,
    "cross_self_attention": False,
    "decoder_attention_heads": 4,
    "decoder_embed_dim": 32,
    "decoder_ffn_embed_dim": 40,
    "decoder_input_dim": 32,
    "decoder_layerdrop": 0,
    "decoder_layers": 2,
    "decoder_layers_to_keep": None,
    "decoder_learned_pos": False,
    "decoder_normalize_before": False,
    "decoder_output_dim": 32,
    "encoder_attention_heads": 4,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_layerdrop": 0,
    "encoder_layers": 2,
    "encoder_layers_to_keep": None,
    "encoder_learned_pos": False,
    "encoder_normalize_before": False,
    "layernorm_embedding": False,
    "max_source_positions": 64,
    "max_target_positions": 64,
    "no_cross_attention": False,
    "no_scale_embedding": False,
    "no_token_positional_embeddings": False,
    "quant_noise_pq": 0,
    "share_all_embeddings": False,
    "share_decoder_input_output_embed": True,
}


def fairseq_arrays(settings: Mapping[str, Any], sizes: tuple[int, int], *, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Random tensors of a state dict, drawn so that decisions are clear and every one of them shows."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, NDArray[Any]] = {}

    def draw(name: str, *shape: int, deviation: float, mean: float = 0.0) -> None:
        arrays[name] = (mean + deviation * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, inputs: int, outputs: int) -> None:
        draw(f"{name}.weight", outputs, inputs, deviation=math.sqrt(1.5 / inputs))
        draw(f"{name}.bias", outputs, deviation=0.2)

    def norm(name: str) -> None:
        draw(f"{name}.weight", d, deviation=0.2, mean=1)
        draw(f"{name}.bias", d, deviation=0.2)

    d = settings["encoder_embed_dim"]
    for side, size, attentions in (("encoder", sizes[0], ("self_attn",)), ("decoder", sizes[1], ("self_attn", "encoder_attn"))):
        arrays[f"{side}.version"] = np.array([3], np.float32)
        draw(f"{side}.embed_tokens.weight", size, d, deviation=0.4 / (1 if settings["no_scale_embedding"] else 2))
        arrays[f"{side}.embed_tokens.weight"][1] = 0
        if settings[f"{side}_learned_pos"]:
            draw(f"{side}.embed_positions.weight", settings["max_source_positions"] + 2, d, deviation=1)
        else:
            arrays[f"{side}.embed_positions._float_tensor"] = np.zeros(1, np.float32)
        for i in range(settings[f"{side}_layers"]):
            layer = f"{side}.layers.{i}"
            for attention in attentions:
                for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    linear(f"{layer}.{attention}.{projection}", d, d)
                norm(f"{layer}.{attention}_layer_norm")
            linear(f"{layer}.fc1", d, settings[f"{side}_ffn_embed_dim"])
            linear(f"{layer}.fc2", settings[f"{side}_ffn_embed_dim"], d)
            norm(f"{layer}.final_layer_norm")
        if settings[f"{side}_normalize_before"]:
            norm(f"{side}.layer_norm")
        if settings["layernorm_embedding"]:
            norm(f"{side}.layernorm_embedding")
    if settings["share_all_embeddings"]:
        arrays["decoder.embed_tokens.weight"] = arrays["encoder.embed_tokens.weight"]
    if settings["share_all_embeddings"] or settings["share_decoder_input_output_embed"]:
        arrays["decoder.output_projection.weight"] = arrays["decoder.embed_tokens.weight"]
    else:
        draw("decoder.output_projection.weight", sizes[1], d, deviation=0.5)
    return arrays


def write_fairseq_dictionary(path: Path, tokens: Sequence[str]) -> Path:
    """Tokens from 4 on."""
    path.write_text("".join(f"{token} {1000 - i}\n" for i, token in enumerate(tokens)), encoding="utf-8")
    return path


def fairseq_positions(length: int, d: int) -> Array:
    return marian_positions(length + 2, d)[2:]


def fairseq_logits(settings: Mapping[str, Any], arrays: Arrays, source: Sequence[int], prefix: Sequence[int]) -> Array:
    """Logits of the token after ``</s>`` and the first 0, 1, ... tokens of the prefix: [len(prefix) + 1, V]."""
    d, num_heads = settings["encoder_embed_dim"], settings["encoder_attention_heads"]
    pre = settings["encoder_normalize_before"]

    def norm(x: Array, name: str) -> Array:
        return layer_norm(x, arrays[f"{name}.weight"], arrays[f"{name}.bias"], 1e-5)

    def linear(x: Array, name: str) -> Array:
        return x @ arrays[f"{name}.weight"].T.astype(np.float64) + arrays[f"{name}.bias"]

    def attention(x: Array, memory: Array | None, name: str, *, causal: bool) -> Array:
        entered = norm(x, f"{name}_layer_norm") if pre else x
        attended = entered if memory is None else memory
        q, k, v = (linear(y, f"{name}.{p}_proj") for y, p in ((entered, "q"), (attended, "k"), (attended, "v")))
        x = x + linear(attend(q, k, v, num_heads, causal=causal), f"{name}.out_proj")
        return x if pre else norm(x, f"{name}_layer_norm")

    def feed_forward(x: Array, name: str) -> Array:
        inner = linear(norm(x, f"{name}.final_layer_norm") if pre else x, f"{name}.fc1")
        match settings["activation_fn"]:
            case "relu":
                inner = np.maximum(inner, 0)
            case "swish":
                inner = inner * sigmoid(inner)
            case "gelu":
                inner = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
            case "gelu_accurate" | "gelu_fast":
                inner = inner * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3))) / 2
        x = x + linear(inner, f"{name}.fc2")
        return x if pre else norm(x, f"{name}.final_layer_norm")

    def embedded(ids: Sequence[int], side: str) -> Array:
        scale = 1.0 if settings["no_scale_embedding"] else math.sqrt(d)
        learned = arrays.get(f"{side}.embed_positions.weight")
        positions = fairseq_positions(len(ids), d) if learned is None else learned[2 : 2 + len(ids)]
        x = arrays[f"{side}.embed_tokens.weight"][list(ids)].astype(np.float64) * scale + positions
        return norm(x, f"{side}.layernorm_embedding") if settings["layernorm_embedding"] else x

    memory = embedded(source, "encoder")
    for i in range(settings["encoder_layers"]):
        memory = attention(memory, None, f"encoder.layers.{i}.self_attn", causal=False)
        memory = feed_forward(memory, f"encoder.layers.{i}")
    memory = norm(memory, "encoder.layer_norm") if pre else memory
    x = embedded([2, *prefix], "decoder")
    for i in range(settings["decoder_layers"]):
        x = attention(x, None, f"decoder.layers.{i}.self_attn", causal=True)
        x = attention(x, memory, f"decoder.layers.{i}.encoder_attn", causal=False)
        x = feed_forward(x, f"decoder.layers.{i}")
    x = norm(x, "decoder.layer_norm") if pre else x
    return x @ arrays["decoder.output_projection.weight"].T.astype(np.float64)


# OpenNMT-py.

OPENNMT_SETTINGS: dict[str, Any] = {
    "encoder_type": "transformer",
    "decoder_type": "transformer",
    "enc_layers": 2,
    "dec_layers": 2,
    "hidden_size": 32,
    "heads": 4,
    "transformer_ff": 48,
    "position_encoding": True,
    "max_relative_positions": 0,
    "pos_ffn_activation_fn": "relu",
    "self_attn_type": "scaled-dot",
    "copy_attn": False,
    "coverage_attn": False,
    "share_embeddings": False,
    "share_decoder_embeddings": False,
    "feat_merge": "concat",
    "generator_function": "softmax",
    "layer_norm": "standard",
    "norm_eps": 1e-6,
    "add_qkvbias": True,
    "add_ffnbias": True,
    "model_type": "text",
    "data_task": "seq2seq",
    "lambda_align": 0.0,
    "dropout": [0.1],
    "src_vocab": "data/vocab.src",
}


# As version 3.0 has them.
OPENNMT_GATED = ("silu", "gated-gelu")


def opennmt_positions(length: int, d: int) -> Array:
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
    return np.stack([np.sin(angles), np.cos(angles)], axis=2).reshape(length, d)


def opennmt_arrays(settings: Mapping[str, Any], sizes: tuple[int, int], *, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Random tensors of ``model`` and, as ``generator.``, of the generator; decisions are clear and every one of them shows."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, NDArray[Any]] = {}
    d, inner = settings["hidden_size"], settings["transformer_ff"]

    def draw(name: str, *shape: int, deviation: float, mean: float = 0.0) -> None:
        arrays[name] = (mean + deviation * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> None:
        draw(f"{name}.weight", outputs, inputs, deviation=math.sqrt(1.5 / inputs))
        if bias:
            draw(f"{name}.bias", outputs, deviation=0.2)

    def norm(name: str) -> None:
        draw(f"{name}.weight", d, deviation=0.2, mean=1)
        if settings["layer_norm"] != "rms":
            draw(f"{name}.bias", d, deviation=0.2)

    norms = {"self_attn": "layer_norm_1", "context_attn": "layer_norm_2"}
    sides = (
        ("encoder.transformer", settings["enc_layers"], {"self_attn": "layer_norm"}, sizes[0]),
        ("decoder.transformer_layers", settings["dec_layers"], norms, sizes[1]),
    )
    for layers, depth, attentions, size in sides:
        side = layers.partition(".")[0]
        draw(f"{side}.embeddings.make_embedding.emb_luts.0.weight", size, d, deviation=0.3)
        arrays[f"{side}.embeddings.make_embedding.pe.pe"] = opennmt_positions(5000, d).astype(np.float32)[:, None]
        for i in range(depth):
            for attention, its_norm in attentions.items():
                for projection in ("linear_keys", "linear_values", "linear_query", "final_linear"):
                    linear(f"{layers}.{i}.{attention}.{projection}", d, d, bias=settings["add_qkvbias"])
                norm(f"{layers}.{i}.{its_norm}")
            linear(f"{layers}.{i}.feed_forward.w_1", d, inner, bias=settings["add_ffnbias"])
            linear(f"{layers}.{i}.feed_forward.w_2", inner, d, bias=settings["add_ffnbias"])
            if settings["pos_ffn_activation_fn"] in OPENNMT_GATED:
                linear(f"{layers}.{i}.feed_forward.w_3", d, inner, bias=settings["add_ffnbias"])
            norm(f"{layers}.{i}.feed_forward.layer_norm")
        norm(f"{side}.layer_norm")
    source, target = (f"{side}.embeddings.make_embedding.emb_luts.0.weight" for side in ("encoder", "decoder"))
    if settings["share_embeddings"]:
        arrays[target] = arrays[source]
    draw("generator.weight", sizes[1], d, deviation=0.5)
    if settings["share_decoder_embeddings"]:
        arrays["generator.weight"] = arrays[target]
    draw("generator.bias", sizes[1], deviation=0.2)
    # Hypotheses end now and then.
    arrays["generator.bias"][3] += 4
    return arrays


def opennmt_logits(settings: Mapping[str, Any], arrays: Arrays, source: Sequence[int], prefix: Sequence[int]) -> Array:
    """Logits of the token after ``<s>``, which has id 2, and the first 0, 1, ... tokens of the prefix: [len(prefix) + 1, V]."""
    d, num_heads = settings["hidden_size"], settings["heads"]

    def norm(x: Array, name: str) -> Array:
        if settings["layer_norm"] == "rms":
            normed: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + settings["norm_eps"]) * arrays[f"{name}.weight"]
            return normed
        return layer_norm(x, arrays[f"{name}.weight"], arrays[f"{name}.bias"], settings["norm_eps"])

    def linear(x: Array, name: str) -> Array:
        return x @ arrays[f"{name}.weight"].T.astype(np.float64) + arrays.get(f"{name}.bias", np.zeros(1))

    def attention(x: Array, memory: Array | None, name: str, its_norm: str, *, causal: bool) -> Array:
        entered = norm(x, its_norm)
        attended = entered if memory is None else memory
        q, k, v = (
            linear(entered, f"{name}.linear_query"),
            linear(attended, f"{name}.linear_keys"),
            linear(attended, f"{name}.linear_values"),
        )
        return x + linear(attend(q, k, v, num_heads, causal=causal), f"{name}.final_linear")

    def feed_forward(x: Array, name: str) -> Array:
        entered = norm(x, f"{name}.layer_norm")
        inner = linear(entered, f"{name}.w_1")
        match settings["pos_ffn_activation_fn"]:
            case "relu":
                inner = np.maximum(inner, 0)
            case "gelu" | "gated-gelu":
                inner = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
            case "fast_gelu":
                inner = inner * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3))) / 2
            case "silu":
                inner = inner * sigmoid(inner)
        if settings["pos_ffn_activation_fn"] in OPENNMT_GATED:
            inner = inner * linear(entered, f"{name}.w_3")
        return x + linear(inner, f"{name}.w_2")

    def embedded(ids: Sequence[int], side: str) -> Array:
        vectors = arrays[f"{side}.embeddings.make_embedding.emb_luts.0.weight"][list(ids)].astype(np.float64)
        return vectors * math.sqrt(d) + opennmt_positions(len(ids), d)

    memory = embedded(source, "encoder")
    for i in range(settings["enc_layers"]):
        layer = f"encoder.transformer.{i}"
        memory = attention(memory, None, f"{layer}.self_attn", f"{layer}.layer_norm", causal=False)
        memory = feed_forward(memory, f"{layer}.feed_forward")
    memory = norm(memory, "encoder.layer_norm")
    x = embedded([2, *prefix], "decoder")
    for i in range(settings["dec_layers"]):
        layer = f"decoder.transformer_layers.{i}"
        x = attention(x, None, f"{layer}.self_attn", f"{layer}.layer_norm_1", causal=True)
        x = attention(x, memory, f"{layer}.context_attn", f"{layer}.layer_norm_2", causal=False)
        x = feed_forward(x, f"{layer}.feed_forward")
    return linear(norm(x, "decoder.layer_norm"), "generator")
