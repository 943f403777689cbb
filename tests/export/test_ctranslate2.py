"""The reader of CTranslate2's directories: files made here byte by byte, since CTranslate2 itself is not needed to read them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from export.checkpoint import build_model, read_checkpoint
from export.checkpoint.ctranslate2_weights import position_table
from serving.errors import CheckpointError
from serving.manifest import LanguageTokens
from serving.tokenizers import open_tokenizer
from tests.ctranslate2_files import string
from tests.support import tiny_sentencepiece
from tests.vocabularies import marian_vocabulary

D_MODEL, D_FF = 16, 24
TYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")
Variables = dict[str, Any]

TOKENS = ["<unk>", "<blank>", "<s>", "</s>", *(f"t{i}" for i in range(20))]
CONFIG = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "decoder_start_token": "<s>",
    "add_source_bos": False,
    "add_source_eos": True,
    "layer_norm_epsilon": None,
    "multi_query_attention": False,
}


def flag(value: int) -> Any:
    return np.array(value, np.int8)


def variables(source_size: int = len(TOKENS), target_size: int = len(TOKENS)) -> Variables:
    """Of a random pre-norm model of 2 encoder layers and 1 decoder layer, as a converter names them."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    found: Variables = {
        "encoder/embeddings_0/weight": normal(source_size, D_MODEL),
        "decoder/embeddings/weight": normal(target_size, D_MODEL),
        "decoder/projection/weight": normal(target_size, D_MODEL),
        "decoder/projection/bias": normal(target_size),
        "decoder/start_from_zero_embedding": flag(0),
        "decoder/alignment_layer": np.array(-1, np.int16),
        "decoder/alignment_heads": np.array(1, np.int16),
        "encoder/embeddings_merge": flag(0),
        "encoder/multi_query_attention": flag(0),
        "decoder/alibi": flag(0),
        "decoder/alibi_use_positive_positions": flag(0),
        "decoder/scale_alibi": flag(0),
    }

    def linear(name: str, rows: int, columns: int = D_MODEL) -> None:
        found[f"{name}/weight"], found[f"{name}/bias"] = normal(rows, columns), normal(rows)

    def norm(name: str) -> None:
        found[f"{name}/gamma"], found[f"{name}/beta"] = normal(D_MODEL), normal(D_MODEL)

    for side, depth in (("encoder", 2), ("decoder", 1)):
        found[f"{side}/num_heads"] = np.array(2, np.int16)
        found[f"{side}/pre_norm"] = flag(1)
        found[f"{side}/activation"] = flag(0)
        found[f"{side}/scale_embeddings"] = flag(1)
        found[f"{side}/position_encodings/encodings"] = normal(40, D_MODEL)
        norm(f"{side}/layer_norm")
        for i in range(depth):
            layer = f"{side}/layer_{i}"
            linear(f"{layer}/self_attention/linear_0", 3 * D_MODEL)
            linear(f"{layer}/self_attention/linear_1", D_MODEL)
            norm(f"{layer}/self_attention/layer_norm")
            if side == "decoder":
                linear(f"{layer}/attention/linear_0", D_MODEL)
                linear(f"{layer}/attention/linear_1", 2 * D_MODEL)
                linear(f"{layer}/attention/linear_2", D_MODEL)
                norm(f"{layer}/attention/layer_norm")
            linear(f"{layer}/ffn/linear_0", D_FF)
            linear(f"{layer}/ffn/linear_1", D_MODEL, D_FF)
            norm(f"{layer}/ffn/layer_norm")
    return found


def variable(name: str, values: Any, type_name: str | None = None) -> bytes:
    contents: bytes = values.tobytes()
    head = struct.pack("<B", values.ndim) + b"".join(struct.pack("<I", length) for length in values.shape)
    type_number = TYPES.index(type_name or values.dtype.name)
    return string(name) + head + struct.pack("<BI", type_number, len(contents)) + contents


def binary(
    found: Variables,
    aliases: dict[str, str] | None = None,
    *,
    version: int = 6,
    spec: str = "TransformerSpec",
    revision: int = 7,
) -> bytes:
    aliases = aliases or {}
    return b"".join(
        (
            struct.pack("<I", version),
            string(spec),
            struct.pack("<II", revision, len(found)),
            *(variable(name, values) for name, values in found.items()),
            struct.pack("<I", len(aliases)),
            *(string(alias) + string(name) for alias, name in aliases.items()),
        )
    )


def write(directory: Path, contents: bytes, *, config: dict[str, Any] | None = None, **vocabularies: list[str]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "model.bin").write_bytes(contents)
    (directory / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    for name, tokens in (vocabularies or {"shared": TOKENS}).items():
        (directory / f"{name}_vocabulary.json").write_text(json.dumps(tokens))
    return directory


def faults_of(directory: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError, match=r"checkpoint .* cannot be used") as caught:
        read_checkpoint(directory)
    return caught.value.faults


def test_reads_a_whole_directory(tmp_path: Path) -> None:
    found = variables()
    checkpoint = read_checkpoint(write(tmp_path / "en-de", binary(found)))
    assert checkpoint.name == "en-de"
    assert checkpoint.languages == []
    assert checkpoint.language_tokens is None
    assert checkpoint.source_prefix == checkpoint.target_prefix == ()
    config = checkpoint.config
    assert (config.d_model, config.num_heads, config.num_encoder_layers, config.num_decoder_layers) == (16, 2, 2, 1)
    assert (config.encoder_d_ff, config.norm, config.activation, config.scale_embedding) == (24, "pre", "relu", True)
    assert (config.positions, config.max_positions, config.layer_norm_eps) == ("learned", 40, 1e-5)
    assert (config.pad_id, config.eos_id, config.decoder_start_id) == (1, 3, 2)
    assert not config.share_embeddings
    assert not config.tie_output
    assert config.output_bias
    state = build_model(checkpoint).state_dict()
    fused = found["decoder/layer_0/attention/linear_1/weight"]
    assert torch.equal(state["decoder.layers.0.cross_attention.key.weight"], torch.from_numpy(fused[:D_MODEL]))
    assert torch.equal(state["decoder.layers.0.cross_attention.value.weight"], torch.from_numpy(fused[D_MODEL:]))
    assert checkpoint.tokenizer.kind == "tokens"
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    assert tokenizer.encode("t0 t19 nothing </s>") == [4, 23, 0, 0]
    assert tokenizer.decode([4, 3, 23]) == "t0 t19"


def test_shared_matrices_are_aliases(tmp_path: Path) -> None:
    found = variables()
    aliases = {name: "decoder/embeddings/weight" for name in ("encoder/embeddings_0/weight", "decoder/projection/weight")}
    for name in aliases:
        del found[name]
    checkpoint = read_checkpoint(write(tmp_path / "m", binary(found, aliases)))
    assert checkpoint.config.share_embeddings
    assert checkpoint.config.tie_output
    assert "output.weight" not in checkpoint.tensors
    build_model(checkpoint)


def test_stored_types(tmp_path: Path) -> None:
    found = variables()
    name = "encoder/layer_1/ffn/linear_0/weight"
    ours = "encoder.layers.1.feed_forward.inner.weight"
    exact = found[name]
    scale = (127 / np.abs(exact).max(axis=1)).astype(np.float32)
    stored: dict[str, tuple[Any, Any, Any]] = {
        "float16": (exact.astype(np.float16), None, exact.astype(np.float16).astype(np.float32)),
        "int8": ((q := np.rint(exact * scale[:, None]).astype(np.int8)), scale, q.astype(np.float32) / scale[:, None]),
        "int16": ((w := np.rint(exact * 300).astype(np.int16)), np.float32(300), w.astype(np.float32) / np.float32(300)),
        "int16 of old models": ((v := np.rint(exact * 1000).astype(np.int16)), None, v.astype(np.float32) / np.float32(1000)),
    }
    for number, (values, scales, expected) in enumerate(stored.values()):
        changed = {**found, name: values}
        if scales is not None:
            changed[f"{name}_scale"] = np.asarray(scales)
        read = read_checkpoint(write(tmp_path / str(number), binary(changed)))
        assert torch.equal(read.tensors[ours], torch.from_numpy(expected))


def test_bfloat16(tmp_path: Path) -> None:
    found = variables()
    name = "encoder/layer_norm/gamma"
    values = torch.from_numpy(found[name]).to(torch.bfloat16)
    contents = binary(found)
    as_stored = variable(name, values.view(torch.int16).numpy(), "bfloat16")
    read = read_checkpoint(write(tmp_path / "m", contents.replace(variable(name, found[name]), as_stored)))
    assert torch.equal(read.tensors["encoder.final_norm.weight"], values.to(torch.float32))


def test_biases_that_are_not_there_are_zero(tmp_path: Path) -> None:
    found = variables()
    del found["encoder/layer_0/self_attention/linear_0/bias"]
    checkpoint = read_checkpoint(write(tmp_path / "m", binary(found)))
    for projection in ("query", "key", "value"):
        assert not checkpoint.tensors[f"encoder.layers.0.self_attention.{projection}.bias"].any()


def test_positions_are_computed_where_there_is_no_table(tmp_path: Path) -> None:
    found = variables()
    for side in ("encoder", "decoder"):
        del found[f"{side}/position_encodings/encodings"]
    checkpoint = read_checkpoint(write(tmp_path / "m", binary(found)))
    assert checkpoint.config.max_positions == 1024
    table = checkpoint.tensors["encoder.embedding.position_table"]
    assert torch.equal(table, position_table(1024, D_MODEL))
    # sin and cos of position + 1 times the first rate, which is 1, and the last, which is 1/10000.
    assert table[2, [0, 8]].tolist() == pytest.approx([np.sin(3), np.cos(3)], abs=1e-6)
    assert table[2, [7, 15]].tolist() == pytest.approx([np.sin(3e-4), np.cos(3e-4)], abs=1e-6)


def test_a_start_from_zero_is_a_token_more(tmp_path: Path) -> None:
    found = variables()
    found["decoder/start_from_zero_embedding"] = flag(1)
    checkpoint = read_checkpoint(write(tmp_path / "m", binary(found), config={**CONFIG, "add_source_eos": False}))
    config = checkpoint.config
    assert config.target_vocab_size == config.source_vocab_size == len(TOKENS) + 1
    assert config.pad_id == config.decoder_start_id == len(TOKENS)
    assert config.never_decoded == [len(TOKENS)]
    assert not checkpoint.tensors["decoder.embedding.tokens.weight"][-1].any()


@pytest.mark.parametrize("end", [0, 3, 11, 30], ids=["first", "the same", "later", "beyond the target"])
@pytest.mark.parametrize("zero", [0, 1], ids=["start token", "from zero"])
def test_vocabularies_apart(tmp_path: Path, end: int, zero: int) -> None:
    source = ["<unk>", "<s>", *(f"s{i}" for i in range(30))]
    source.insert(end, "</s>")
    found = variables(len(source))
    found["decoder/start_from_zero_embedding"] = flag(zero)
    checkpoint = read_checkpoint(write(tmp_path / "m", binary(found), source=source, target=TOKENS))
    config = checkpoint.config
    vocabularies = {
        name: json.loads(contents) for name, contents in checkpoint.tokenizer_files.items() if isinstance(contents, bytes)
    }
    embeddings = {"source": "encoder/embeddings_0/weight", "target": "decoder/embeddings/weight"}
    for side, tokens in (("source", source), ("target", TOKENS)):
        ids = vocabularies[f"{side}_vocabulary.json"]
        assert ids["</s>"] == config.eos_id
        ours = checkpoint.tensors[f"{'encoder' if side == 'source' else 'decoder'}.embedding.tokens.weight"]
        for row, token in enumerate(tokens):
            assert torch.equal(ours[ids[token]], torch.from_numpy(found[embeddings[side]][row])), token
    ids = vocabularies["target_vocabulary.json"]
    bias = checkpoint.tensors["output.bias"]
    for row, token in enumerate(TOKENS):
        assert bias[ids[token]] == found["decoder/projection/bias"][row]
    assert config.pad_id < min(config.source_vocab_size, config.target_vocab_size)


def test_an_end_that_no_source_has_room_for(tmp_path: Path) -> None:
    source = ["<unk>", "</s>", "s0"]
    target = [*TOKENS[:3], *TOKENS[4:], "</s>"]
    checkpoint = read_checkpoint(write(tmp_path / "m", binary(variables(3)), source=source, target=target))
    assert checkpoint.config.eos_id == 1


@pytest.mark.parametrize(
    ("stated", "layer", "heads"),
    [
        ({}, 0, 1),
        ({"decoder/alignment_heads": 0}, 0, None),
        ({"decoder/alignment_layer": 0, "decoder/alignment_heads": 2}, 0, 2),
    ],
    ids=str,
)
def test_which_attention_is_the_alignment(tmp_path: Path, stated: dict[str, int], layer: int, heads: int | None) -> None:
    found = variables() | {name: np.array(value, np.int16) for name, value in stated.items()}
    config = read_checkpoint(write(tmp_path / "m", binary(found))).config
    assert (config.alignment_layer, config.alignment_heads) == (layer, heads)


def test_the_alignment_of_files_that_do_not_state_it(tmp_path: Path) -> None:
    found = {name: value for name, value in variables().items() if "alignment" not in name}
    config = read_checkpoint(write(tmp_path / "m", binary(found))).config
    assert (config.alignment_layer, config.alignment_heads) == (0, 1)


def test_languages(tmp_path: Path) -> None:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(f"t{i}" for i in range(18)), "__en__", "__ast__"]
    config = {**CONFIG, "decoder_start_token": "</s>", "add_source_eos": False}
    found = variables()
    found["encoder/embeddings_0/weight"] = found["decoder/embeddings/weight"]
    checkpoint = read_checkpoint(write(tmp_path / "m", binary(found), config=config, shared=tokens))
    assert checkpoint.language_tokens == LanguageTokens(tokens={"en": 22, "ast": 23}, before_source="source", before_target=True)
    assert checkpoint.config.decoder_start_id == checkpoint.config.eos_id == 2
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    assert tokenizer.encode("__en__ t0 </s>") == [3, 4, 3]


def test_target_languages_of_marian(tmp_path: Path) -> None:
    tokens = ["</s>", "<unk>", *(f"t{i}" for i in range(20)), ">>deu<<", ">>nld<<"]
    found = variables()
    found["decoder/start_from_zero_embedding"] = flag(1)
    checkpoint = read_checkpoint(write(tmp_path / "m", binary(found), shared=tokens))
    assert checkpoint.language_tokens == LanguageTokens(
        tokens={"deu": 22, "nld": 23}, before_source="target", before_target=False
    )


def test_sources_of_bart_start_with_a_token(tmp_path: Path) -> None:
    found = variables()
    for side in ("encoder", "decoder"):
        found[f"{side}/pre_norm"] = flag(0)
        for name in ("gamma", "beta"):
            found[f"{side}/layernorm_embedding/{name}"] = found.pop(f"{side}/layer_norm/{name}")
    config = {**CONFIG, "decoder_start_token": "</s>", "add_source_eos": False}
    checkpoint = read_checkpoint(write(tmp_path / "m", binary(found), config=config))
    assert checkpoint.config.embedding_norm
    assert checkpoint.source_prefix == (2,)


def test_other_names_of_special_tokens(tmp_path: Path) -> None:
    tokens = ["[UNK]", "<blank>", "<s>", "[END]", "</s>", *TOKENS[5:]]
    config = {**CONFIG, "unk_token": "[UNK]", "eos_token": "[END]"}
    checkpoint = read_checkpoint(write(tmp_path / "m", binary(variables()), config=config, shared=tokens))
    assert checkpoint.config.eos_id == 3
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    assert tokenizer.encode("t1 what") == [5, 0]


@pytest.mark.parametrize(("number", "ours"), [(0, "relu"), (1, "gelu_tanh"), (2, "silu"), (3, "gelu"), (4, "gelu_sigmoid")])
def test_activations(tmp_path: Path, number: int, ours: str) -> None:
    found = variables()
    found["encoder/activation"] = found["decoder/activation"] = flag(number)
    assert read_checkpoint(write(tmp_path / "m", binary(found))).config.activation == ours


def test_an_old_file_has_its_settings_itself(tmp_path: Path) -> None:
    found = variables()
    for name in ("num_heads", "pre_norm", "activation"):
        found[name] = found.pop(f"encoder/{name}")
        del found[f"decoder/{name}"]
    for side, embedding in (("encoder", "embeddings_0"), ("decoder", "embeddings")):
        del found[f"{side}/scale_embeddings"]
        found[f"{side}/{embedding}/multiply_by_sqrt_depth"] = flag(0)
    found["unk_token"] = np.frombuffer(b"<blank>", np.int8)
    found["with_source_eos"] = flag(1)
    found["with_target_bos"] = flag(0)
    directory = write(tmp_path / "m", binary(found, version=4, revision=4))
    (directory / "config.json").unlink()
    (directory / "shared_vocabulary.json").unlink()
    (directory / "shared_vocabulary.txt").write_text("".join(f"{token}\n" for token in TOKENS))
    checkpoint = read_checkpoint(directory)
    assert not checkpoint.config.scale_embedding
    assert checkpoint.config.decoder_start_id == checkpoint.config.eos_id == 3
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    assert tokenizer.encode("nothing") == [1]


def test_a_setting_of_both_sides_that_is_no_whole_number_is_told_once(tmp_path: Path) -> None:
    found = variables()
    del found["encoder/num_heads"], found["decoder/num_heads"]
    found["num_heads"] = np.array(1.5, np.float32)
    assert faults_of(write(tmp_path / "m", binary(found))) == ("model.bin: num_heads: 1.5 is no whole number",)


def test_a_sentencepiece_model_beside_it(tmp_path: Path) -> None:
    tokens = [*marian_vocabulary(tiny_sentencepiece())][:-1]
    found = variables(len(tokens), len(tokens))
    found["decoder/start_from_zero_embedding"] = flag(1)
    directory = write(tmp_path / "m", binary(found), shared=tokens)
    (directory / "sentencepiece.model").write_bytes(tiny_sentencepiece())
    checkpoint = read_checkpoint(directory)
    assert checkpoint.tokenizer.kind == "marian"
    assert checkpoint.warnings == ()
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    ids = tokenizer.encode("a man runs in the park")
    assert tokenizer.decode(ids) == "a man runs in the park"


PIECES = [piece for piece in marian_vocabulary(tiny_sentencepiece()) if not piece.startswith("<")]
NLLB_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", *PIECES, "eng_Latn", "deu_Latn", "zho_Hans", "<mask>"]
NLLB_CONFIG = {**CONFIG, "decoder_start_token": "</s>", "add_source_eos": False}


def tokenizer_json(tokens: list[str]) -> str:
    """As the library writes one of SentencePiece pieces, whose last tokens are added."""
    library = tokenizers.Tokenizer(
        tokenizers.models.Unigram([(token, -float(i)) for i, token in enumerate(tokens[:-4])], unk_id=3)
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.decoder = tokenizers.decoders.Metaspace()
    library.add_special_tokens([*tokens[:4], *tokens[-4:]])
    text: str = library.to_str()
    return text


def nllb(directory: Path) -> Path:
    """As NLLB is published in this form: the tokenizer's files lie beside the model."""
    found = variables(len(NLLB_TOKENS), len(NLLB_TOKENS))
    found["encoder/embeddings_0/weight"] = found["decoder/embeddings/weight"]
    write(directory, binary(found), config=NLLB_CONFIG, shared=NLLB_TOKENS)
    (directory / "tokenizer.json").write_text(tokenizer_json(NLLB_TOKENS))
    (directory / "sentencepiece.bpe.model").write_bytes(tiny_sentencepiece())
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (directory / name).write_text("{}")
    (directory / "README.md").write_text("not looked at")
    return directory


@pytest.mark.parametrize("left_out", ["tokenizer.json", "sentencepiece.bpe.model"])
def test_nllb_with_either_of_its_tokenizers(tmp_path: Path, left_out: str) -> None:
    directory = nllb(tmp_path / "nllb")
    (directory / left_out).unlink()
    checkpoint = read_checkpoint(directory)
    assert checkpoint.warnings == ()
    assert checkpoint.tokenizer.kind == ("marian" if left_out == "tokenizer.json" else "hugging_face")
    ids = {token: i for i, token in enumerate(NLLB_TOKENS)}
    assert checkpoint.language_tokens == LanguageTokens(
        tokens={code: ids[code] for code in ("eng_Latn", "deu_Latn", "zho_Hans")}, before_source="source", before_target=True
    )
    assert checkpoint.source_ends_with_eos
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    line = "a man runs in the park"
    assert tokenizer.decode([ids["eng_Latn"], *tokenizer.encode(line), 2]) == line
    assert ids["deu_Latn"] not in tokenizer.encode("deu_Latn")


def test_a_tokenizer_that_numbers_tokens_otherwise_is_not_taken(tmp_path: Path) -> None:
    directory = nllb(tmp_path / "nllb")
    (directory / "sentencepiece.bpe.model").unlink()
    swapped = [*NLLB_TOKENS[:4], NLLB_TOKENS[5], NLLB_TOKENS[4], *NLLB_TOKENS[6:]]
    (directory / "tokenizer.json").write_text(tokenizer_json(swapped))
    checkpoint = read_checkpoint(directory)
    assert checkpoint.tokenizer.kind == "tokens"
    missing, other = checkpoint.warnings
    assert missing.startswith("there is no SentencePiece model, no tokenizer.json and no byte-pair codes")
    assert other == f"tokenizer.json is not taken: its {NLLB_TOKENS[5]!r} has id 4, and another in the model"


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    directory = nllb(tmp_path / "nllb")
    (directory / "sentencepiece.bpe.model").unlink()
    (directory / "tokenizer.json").write_text("{")
    (fault,) = faults_of(directory)
    assert fault.startswith("tokenizer.json: is not JSON")


def test_weights_of_awq_are_refused_with_advice(tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_type": 1, "quantization_bits": 4, "quantization_group_size": 128}
    assert faults_of(write(tmp_path / "m", binary(variables()), config=config)) == (
        "config.json: quantization_type: 1, weights of 4 bits (AWQ), is not supported; convert the model as it was before with "
        "--quantization int8 or float16",
    )


def everything_unsupported(found: Variables) -> None:
    found["encoder/activation"] = found["decoder/activation"] = flag(5)
    found["decoder/num_heads"] = np.array(4, np.int16)
    found["decoder/alibi"] = flag(1)
    found["decoder/scale_embeddings"] = np.array(3.0, np.float32)
    found["decoder/final_logit_softcapping"] = np.array(30.0, np.float32)
    del found["decoder/layer_norm/gamma"]


def test_all_that_is_unsupported_is_named_at_once(tmp_path: Path) -> None:
    found = variables()
    everything_unsupported(found)
    config = {**CONFIG, "decoder_start_token": 3, "quantization_type": 1}
    directory = write(tmp_path / "m", binary(found), config=config)
    (directory / "shared_vocabulary.json").write_text("{}")
    assert faults_of(directory) == (
        "config.json: quantization_type: 1, weights of 4 bits (AWQ), is not supported; convert the model as it was before with "
        "--quantization int8 or float16",
        "config.json: decoder_start_token: Input should be a valid string",
        "model.bin: encoder/num_heads, decoder/num_heads: 2 and 4; different values are not supported",
        "model.bin: encoder/activation: 5 (Tanh) is not supported, only ReLU, GELUTanh, Swish, GELU, GELUSigmoid",
        "model.bin: decoder/scale_embeddings: 3 is not supported, only 1 or the square root of the embedding's width 16",
        "model.bin: decoder/layer_norm: pre_norm is 1; a stack without a last norm is not supported then",
        "model.bin: decoder/alibi: 1 is not supported, only 0",
        "model.bin: decoder/final_logit_softcapping: is not supported",
        "shared_vocabulary.json: is no list of tokens",
    )


def relative(found: Variables) -> None:
    for side, depth in (("encoder", 2), ("decoder", 1)):
        for i in range(depth):
            for kind in ("keys", "values"):
                found[f"{side}/layer_{i}/self_attention/relative_position_{kind}"] = np.zeros((5, 8), np.float32)


def gated(found: Variables) -> None:
    for i in range(2):
        found[f"encoder/layer_{i}/ffn/linear_0_noact/weight"] = np.zeros((D_FF, D_MODEL), np.float32)


def root_mean_square(found: Variables) -> None:
    del found["encoder/layer_norm/beta"]


def factors(found: Variables) -> None:
    found["encoder/embeddings_1/weight"] = np.zeros((5, 4), np.float32)


def setting(name: str, value: Any) -> Callable[[Variables], None]:
    return lambda found: found.update({name: value})


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        pytest.param(
            relative,
            [
                "encoder/layer_*/self_attention/relative_position_keys: is not supported",
                "encoder/layer_*/self_attention/relative_position_values: is not supported",
                "decoder/layer_*/self_attention/relative_position_keys: is not supported",
                "decoder/layer_*/self_attention/relative_position_values: is not supported",
            ],
            id="relative positions",
        ),
        pytest.param(gated, ["encoder/layer_*/ffn/linear_0_noact/weight: is not supported"], id="gated feed-forward"),
        pytest.param(root_mean_square, ["encoder/layer_norm/beta: missing, expected [16]"], id="root mean square"),
        pytest.param(factors, ["encoder/embeddings_1/weight: is not supported"], id="source features"),
        pytest.param(
            setting("decoder/layer_0/self_attention/rotary_dim", np.array(0, np.int32)),
            ["decoder/layer_*/self_attention/rotary_dim: is not supported"],
            id="rotary",
        ),
        pytest.param(
            setting("decoder/sliding_window", np.array(64, np.int32)),
            ["decoder/sliding_window: 64 is not supported, only 0"],
            id="sliding window",
        ),
        pytest.param(setting("decoder/alibi", flag(1)), ["decoder/alibi: 1 is not supported, only 0"], id="alibi"),
        pytest.param(
            setting("encoder/layer_1/self_attention/num_heads_kv", np.array(1, np.int32)),
            ["encoder/layer_*/self_attention/num_heads_kv: 1 is not supported, only 2"],
            id="fewer heads of keys",
        ),
        pytest.param(
            setting("decoder/layer_0/attention/queries_scale", np.array(1.0, np.float32)),
            ["decoder/layer_*/attention/queries_scale: 1 is not supported, only 0.353553"],
            id="scale of queries",
        ),
        pytest.param(
            setting("decoder/layer_0/ffn/linear_1/weight", np.zeros((D_FF, D_MODEL), np.float32)),
            ["decoder/layer_0/ffn/linear_1/weight: shape [24, 16], expected [16, 24]"],
            id="misshapen",
        ),
        pytest.param(
            setting("decoder/layer_0/ffn/linear_1/weight", np.full((D_MODEL, D_FF), np.nan, np.float32)),
            ["decoder/layer_0/ffn/linear_1/weight: 384 of 384 values are not finite"],
            id="not finite",
        ),
        pytest.param(
            setting("decoder/layer_0/ffn/linear_1/weight", np.zeros((D_MODEL, D_FF), np.int8)),
            [
                "decoder/layer_0/ffn/linear_1/weight_scale: is missing, and decoder/layer_0/ffn/linear_1/weight is quantized",
            ],
            id="no scale",
        ),
        pytest.param(
            setting("decoder/layer_0/ffn/linear_1/weight", np.zeros((D_MODEL, D_FF), np.int32)),
            ["decoder/layer_0/ffn/linear_1/weight: a weight of type int32 is not supported"],
            id="packed weights",
        ),
        pytest.param(
            setting("decoder/position_encodings/encodings", np.zeros((40, 8), np.float32)),
            ["decoder/position_encodings/encodings: shape [40, 8], expected [positions, 16]"],
            id="positions",
        ),
        pytest.param(
            setting("decoder/alignment_layer", np.array(1, np.int16)),
            ["decoder/alignment_layer: there is no layer 1 of 1"],
            id="alignment of no layer",
        ),
        pytest.param(
            setting("decoder/alignment_heads", np.array(3, np.int16)),
            ["decoder/alignment_heads: there are 2, not 3"],
            id="alignment of more heads than there are",
        ),
        pytest.param(
            setting("encoder/layer_4294967295/ffn/linear_0/bias", np.zeros(4, np.float32)),
            ["encoder/layer_*: layers [0, 1, 4294967295] are not numbered one after the other"],
            id="absurd layers",
        ),
        pytest.param(
            setting(f"encoder/layer_{'9' * 5000}/ffn/linear_0/bias", np.zeros(4, np.float32)),
            ["encoder/layer_*: layers [0, 1, 999999999999] are not numbered one after the other"],
            id="a number of 5000 digits",
        ),
        pytest.param(
            setting("encoder/num_heads", np.array(np.nan, np.float32)),
            ["encoder/num_heads: nan is no whole number"],
            id="heads that are no number",
        ),
        pytest.param(
            setting("decoder/pre_norm", np.array(np.inf, np.float32)),
            ["decoder/pre_norm: inf is no whole number"],
            id="infinitely many norms",
        ),
        pytest.param(
            setting("encoder/activation", np.array(0.5, np.float16)),
            ["encoder/activation: 0.5 is no whole number"],
            id="half an activation",
        ),
        pytest.param(
            setting("decoder/alignment_layer", np.array(-np.inf, np.float32)),
            ["decoder/alignment_layer: -inf is no whole number"],
            id="alignment of an infinite layer",
        ),
    ],
)
def test_what_the_module_cannot_express(tmp_path: Path, change: Callable[[Variables], None], faults: list[str]) -> None:
    found = variables()
    change(found)
    assert faults_of(write(tmp_path / "m", binary(found))) == tuple(f"model.bin: {fault}" for fault in faults)


CUT = binary(variables())


@pytest.mark.parametrize(
    ("contents", "fault"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"\x06", "ends within a number, at byte 1", id="cut at once"),
        pytest.param(CUT[:1000], "ends within the values of encoder/embeddings_0/weight, at byte 1000", id="cut"),
        pytest.param(CUT + b"more", "ends with 4 bytes that belong to nothing", id="too long"),
        pytest.param(
            b"PK\x03\x04" + bytes(100),
            "binary version 67324752 is not supported, only 1 to 6; or it is no model of CTranslate2",
            id="another file",
        ),
        pytest.param(
            binary(variables(), version=7),
            "binary version 7 is not supported, only 1 to 6; or it is no model of CTranslate2",
            id="too new",
        ),
        pytest.param(
            binary({}, spec="WhisperSpec", revision=3),
            "is of the kind 'WhisperSpec'; only TransformerSpec, an encoder and a decoder, is supported",
            id="another model",
        ),
        pytest.param(binary({}, revision=8), "revision 8 of TransformerSpec is not supported, only 3 to 7", id="revision"),
        pytest.param(binary({}, {"a": "b"}), "a: stands for a variable that is not there", id="alias of nothing"),
        pytest.param(
            struct.pack("<I", 6) + string("TransformerSpec") + struct.pack("<II", 7, 1) + struct.pack("<H", 3) + b"abc",
            "a string at byte 32 does not end in zero",
            id="string without an end",
        ),
        pytest.param(
            struct.pack("<I", 6)
            + string("TransformerSpec")
            + struct.pack("<II", 7, 1)
            + string("x")
            + struct.pack("<BIIBI", 2, 2**31, 2**31, 0, 8)
            + bytes(8),
            "x: of 8 bytes, but float32 of shape [2147483648, 2147483648] takes 18446744073709551616",
            id="absurd size",
        ),
        pytest.param(
            struct.pack("<I", 6)
            + string("TransformerSpec")
            + struct.pack("<II", 7, 1)
            + string("x")
            + struct.pack("<BBI", 0, 9, 0),
            "x: of a type with the number 9, which is not known",
            id="unknown type",
        ),
        pytest.param(
            struct.pack("<I", 6) + string("TransformerSpec") + struct.pack("<II", 7, 1) + string("x") + b"\xff" * 4,
            "x: has 255 dimensions",
            id="absurd rank",
        ),
        pytest.param(
            struct.pack("<I", 6) + string("TransformerSpec") + struct.pack("<II", 7, 2) + 2 * variable("x", flag(1)),
            "x: is there twice",
            id="twice",
        ),
    ],
)
def test_files_that_are_broken(tmp_path: Path, contents: bytes, fault: str) -> None:
    assert faults_of(write(tmp_path / "m", contents)) == (f"model.bin: {fault}",)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        pytest.param(
            {"decoder_start_token": None},
            "config.json: decoder_start_token: null is not supported; what targets start with would come with each request",
            id="start by request",
        ),
        pytest.param(
            {"decoder_start_token": "<go>"},
            "config.json: decoder_start_token: '<go>' is not in the target vocabulary",
            id="start",
        ),
        pytest.param({"eos_token": "<eos>"}, "config.json: eos_token: '<eos>' is not in the target vocabulary", id="end"),
        pytest.param({"unk_token": "<nk>"}, "config.json: unk_token: '<nk>' is not in the source vocabulary", id="unknown"),
        pytest.param(
            {"unk_token": "</s>"},
            "config.json: eos_token, unk_token: both are '</s>'; one token for both is not supported",
            id="one for both",
        ),
        pytest.param(
            {"add_source_bos": True, "bos_token": "<b>"},
            "config.json: bos_token: '<b>' is not in the source vocabulary",
            id="bos",
        ),
    ],
)
def test_tokens_that_are_not_there(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    faults = faults_of(write(tmp_path / "m", binary(variables()), config={**CONFIG, **changes}))
    assert faults[0] == fault


def test_vocabularies_that_do_not_fit(tmp_path: Path) -> None:
    assert faults_of(write(tmp_path / "m", binary(variables()), source=TOKENS[:-3], target=TOKENS)) == (
        "the source vocabulary has 21 tokens, the source embedding 24 rows",
    )


def test_a_token_that_is_twice_in_a_vocabulary(tmp_path: Path) -> None:
    tokens = [*TOKENS[:-1], "t0"]
    assert faults_of(write(tmp_path / "m", binary(variables()), shared=tokens)) == (
        "shared_vocabulary.json: 't0': more than one id for a token is not supported",
    )


def test_vocabularies_in_text(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", binary(variables()))
    (directory / "shared_vocabulary.json").unlink()
    assert "neither shared_vocabulary nor source_vocabulary" in faults_of(directory)[0]
    # The unknown token is the last where the file does not have it; line ends may be of two characters.
    (directory / "shared_vocabulary.txt").write_bytes("".join(f"{token}\r\n" for token in TOKENS[1:]).encode())
    checkpoint = read_checkpoint(directory)
    assert checkpoint.config.eos_id == 2
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    assert tokenizer.encode("t0 what") == [3, 23]
    (directory / "shared_vocabulary.txt").write_bytes(b"\xff\n")
    assert faults_of(directory)[0].startswith("shared_vocabulary.txt: is no text")


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no model")
    first, second, *formats = faults_of(path)
    assert first.startswith("it is a file: give the directory that notes.txt lies in")
    assert second == "it is of no known format, which are:"
    assert any(line.startswith("- CTranslate2 (model.bin") for line in formats)
