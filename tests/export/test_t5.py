"""T5's directories: what is read of them, what is folded into weights, what becomes of pieces, and every fault at once."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

from export.checkpoint import Checkpoint, build_model, read_checkpoint
from export.checkpoint.t5 import tensor_names
from export.model import ModelConfig
from export.pipeline import export_bundle
from serving.bundle import Bundle
from serving.errors import CheckpointError, ExportError
from serving.tokenizers import ModelTokenizer, open_tokenizer
from tests.export.bart_directories import edit_json
from tests.support import SAMPLE_LINES, T5, TINY_LINES, tiny_config, tiny_model

PIECES = 64
# With sentinels, and some more to a round number.
VOCABULARY = 80
FIELDS: dict[str, Any] = {
    "model_type": "t5",
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    # Of training, and of how to search.
    "dropout_rate": 0.1,
    "num_beams": 4,
}


def theirs(**overrides: Any) -> ModelConfig:
    """The architecture of such a file, before anything is cut."""
    fields = {
        **T5,
        "relative_buckets": 32,
        "relative_distance": 128,
        "d_head": 8,
        "encoder_d_ff": 24,
        "source_vocab_size": VOCABULARY,
        "target_vocab_size": VOCABULARY,
        "layer_norm_eps": 1e-6,
        "max_positions": 512,
        "pad_id": 0,
        "eos_id": 1,
        "decoder_start_id": 0,
    }
    return tiny_config(**{**fields, **overrides})


def tensors_of(config: ModelConfig) -> dict[str, Tensor]:
    """A random model's, as T5's file has them."""
    state = tiny_model(config).state_dict()
    stored = {name: state[ours].clone() for name, ours in tensor_names(config).items()}
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        del stored[name]
    if config.tie_output:
        del stored["lm_head.weight"]
    return stored


def pieces(*, languages: tuple[str, ...] = ()) -> bytes:
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TINY_LINES),
        model_writer=stream,
        vocab_size=PIECES,
        user_defined_symbols=[f"<2{code}>" for code in languages],
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=3,
    )
    return stream.getvalue()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Of T5 1.1's architecture."""
    return write(tmp_path / "t5-tiny", theirs())


def write(directory: Path, config: ModelConfig, *, model: bytes | None = None, **fields: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**FIELDS, **fields}))
    (directory / "spiece.model").write_bytes(model or pieces())
    save_file(tensors_of(config), directory / "model.safetensors")
    return directory


def tokenizer_of(checkpoint: Checkpoint) -> ModelTokenizer:
    return open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)


def faults_of(directory: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(directory)
    return tuple(caught.value.faults)


def test_the_architecture(directory: Path) -> None:
    checkpoint = read_checkpoint(directory)
    assert checkpoint.config == theirs(source_vocab_size=PIECES, target_vocab_size=PIECES)
    assert checkpoint.name == "t5-tiny"
    assert (checkpoint.languages, checkpoint.language_tokens, checkpoint.source_prefix) == ([], None, ())
    assert checkpoint.warnings == ()


@pytest.mark.parametrize(
    ("stated", "activation", "gated"),
    [
        ("relu", "relu", False),
        ("gelu", "gelu", False),
        ("gated-gelu", "gelu_tanh", True),
        ("gated-gelu_new", "gelu_tanh", True),
        ("gated-silu", "silu", True),
    ],
)
def test_feed_forward_networks(tmp_path: Path, stated: str, activation: Any, gated: bool) -> None:
    made = write(tmp_path / "t5", theirs(activation=activation, gated=gated), feed_forward_proj=stated)
    config = read_checkpoint(made).config
    assert (config.activation, config.gated) == (activation, gated)


def test_scales_are_folded_and_the_vocabulary_is_cut(directory: Path) -> None:
    checkpoint, stored = read_checkpoint(directory), load_file(directory / "model.safetensors")
    queries = 0
    for theirs_name, ours in tensor_names(checkpoint.config).items():
        if theirs_name not in stored:
            continue
        expected = stored[theirs_name]
        if ours.endswith("query.weight"):
            queries += 1
            expected = expected * math.sqrt(8)
        elif theirs_name in ("shared.weight", "lm_head.weight"):
            expected = expected[:PIECES]
        assert torch.equal(checkpoint.tensors[ours], expected), theirs_name
    assert queries == 2 + 2
    build_model(checkpoint)


@pytest.mark.parametrize(
    ("fields", "is_scaled"),
    [
        ({"tie_word_embeddings": True}, True),
        # As it is written now of the same models.
        ({"tie_word_embeddings": True, "scale_decoder_outputs": True}, True),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"model_type": "mt5", "tie_word_embeddings": True}, False),
        ({"tie_word_embeddings": False}, False),
    ],
    ids=str,
)
def test_the_last_states_are_scaled_where_t5_does_it(tmp_path: Path, fields: dict[str, Any], is_scaled: bool) -> None:
    directory = write(tmp_path / "t5", theirs(tie_output=True), **fields)
    checkpoint, stored = read_checkpoint(directory), load_file(directory / "model.safetensors")
    assert checkpoint.config.tie_output
    assert "output.weight" not in checkpoint.tensors
    norm = stored["decoder.final_layer_norm.weight"]
    torch.testing.assert_close(checkpoint.tensors["decoder.final_norm.weight"], norm / 4 if is_scaled else norm)


def test_an_output_of_its_own_is_told_by_the_weights(directory: Path) -> None:
    """Newer versions of the library write of every model that its embeddings are tied."""
    edit_json(directory / "config.json", lambda config: config.update(tie_word_embeddings=True, scale_decoder_outputs=False))
    assert not read_checkpoint(directory).config.tie_output
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["shared.weight"].clone()}, directory / "model.safetensors")
    assert read_checkpoint(directory).config.tie_output


@pytest.mark.parametrize("side", ["decoder", "encoder"])
def test_the_embedding_may_have_the_name_of_one_side_alone(directory: Path, side: str) -> None:
    """The decoder's, in MADLAD-400 as it is published, whose output is its own."""
    before, tensors = read_checkpoint(directory), load_file(directory / "model.safetensors")
    tensors[f"{side}.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, directory / "model.safetensors")
    after = read_checkpoint(directory)
    assert after.config == before.config
    assert not after.config.tie_output
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors")
    assert read_checkpoint(directory).config.tie_output


def test_tensors_that_older_versions_wrote_are_no_fault(directory: Path) -> None:
    before, tensors = read_checkpoint(directory).tensors, load_file(directory / "model.safetensors")
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 2)
    for side in ("encoder", "decoder"):
        tensors[f"{side}.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, directory / "model.safetensors")
    after = read_checkpoint(directory).tensors
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_is_not_stated_has_its_default(directory: Path) -> None:
    edit_json(directory / "config.json", lambda config: [config.pop(name) for name in ("decoder_start_token_id", "num_beams")])
    edit_json(directory / "config.json", lambda config: config.update(num_decoder_layers=None, num_layers=1))
    (directory / "generation_config.json").write_text('{"decoder_start_token_id": 0, "eos_token_id": 1}')
    # The second layer is more than there should be; all else is known.
    assert all("encoder.block.1." in fault for fault in faults_of(directory))
    edit_json(directory / "config.json", lambda config: config.update(num_layers=2, num_decoder_layers=1, n_positions=100))
    assert read_checkpoint(directory).config.max_positions == 100


def test_settings_of_generate(directory: Path) -> None:
    settings = {"max_length": 30, "num_beams": 4, "bad_words_ids": [[70], [5, 70], [5, 6]], "forced_bos_token_id": 7}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    checkpoint = read_checkpoint(directory)
    assert (checkpoint.num_beams, checkpoint.target_prefix, checkpoint.defaults.max_target_tokens) == (4, (7,), 28)
    # Tokens that are left out need not be forbidden.
    assert checkpoint.defaults.suppressed == [[5, 6]]


def test_languages_are_tokens_that_no_text_makes(tmp_path: Path) -> None:
    codes = ("de", "zh_Hant", "pt")
    directory = write(tmp_path / "madlad", theirs(), model=pieces(languages=codes))
    checkpoint, whole = read_checkpoint(directory), sentencepiece.SentencePieceProcessor(model_proto=pieces(languages=codes))
    told, tokenizer = checkpoint.language_tokens, tokenizer_of(checkpoint)
    assert told is not None
    assert (told.before_source, told.before_target) == ("target", False)
    assert told.tokens == {code: whole.piece_to_id(f"<2{code}>") for code in codes}
    for text in SAMPLE_LINES:
        for code in codes:
            source = [*checkpoint.source_prefix, told.tokens[code], *tokenizer.encode(text)]
            assert source == whole.encode(f"<2{code}> {text}")
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert set(told.tokens.values()).isdisjoint(tokenizer.encode("<2de> a <2pt>"))
    assert tokenizer.decode([*told.tokens.values()]) == ""


def test_sentinels_among_the_pieces_are_left_out(tmp_path: Path) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString(pieces())  # type: ignore[attr-defined]  # made at import
    for i in (1, 0):
        model.pieces.add(piece=f"\u2581<extra_id_{i}>", score=0, type=4)
    checkpoint = read_checkpoint(write(tmp_path / "mt5", theirs(), model=model.SerializeToString()))
    assert checkpoint.config.target_vocab_size == PIECES
    assert max(tokenizer_of(checkpoint).encode("a <extra_id_0> b")) < PIECES


def test_sentinels_of_the_tokenizer_are_no_fault_and_other_added_tokens_are(directory: Path) -> None:
    (directory / "added_tokens.json").write_text('{"<extra_id_0>": 64, "</s>": 1, "<formal>": 70}')
    assert faults_of(directory) == ("added token '<formal>' with id 70: is not supported; spiece.model has no such piece",)


def test_every_unsupported_setting_is_named_at_once(directory: Path) -> None:
    edit_json(
        directory / "config.json",
        lambda config: config.update(
            feed_forward_proj="gated-tanh",
            is_decoder=True,
            quantization_config={"bits": 8},
            relative_attention_max_distance=16,
            pad_token_id=500,
        ),
    )
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    (directory / "spiece.model").unlink()
    (directory / "model.safetensors").unlink()
    assert faults_of(directory) == (
        "config.json: is_decoder: True is not supported, only False or None",
        "config.json: quantization_config: {'bits': 8} is not supported, only None or {}",
        "config.json: feed_forward_proj: 'gated-tanh' is not supported, only 'relu' or 'gelu' or 'gelu_new' or 'gelu_fast' or "
        "'gelu_pytorch_tanh' or 'quick_gelu' or 'silu' or 'swish', and these after 'gated-'",
        "config.json: relative_attention_max_distance: 16 is no more than half of relative_attention_num_buckets 32",
        "config.json: pad_token_id: 500 is outside a vocabulary of 80",
        "tokenizer_config.json: tokenizer_class: 'ByT5Tokenizer' is not supported, only 'T5Tokenizer' or 'T5TokenizerFast' or "
        "'MT5Tokenizer' or 'MT5TokenizerFast' or None",
        "spiece.model: is missing, and so is tokenizer.json",
        "model.safetensors: is missing, and so is pytorch_model.bin",
    )


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"num_layers": 0}, "config.json: num_layers: Input should be greater than 0"),
        ({"d_kv": "64"}, "config.json: d_kv: Input should be a valid integer"),
        ({"relative_attention_num_buckets": 30}, "config.json: relative_attention_num_buckets: Input should be a multiple of 4"),
        ({"layer_norm_epsilon": 0.0}, "config.json: layer_norm_epsilon: Input should be greater than 0"),
        ({"eos_token_id": 3}, "spiece.model: </s> has id 1, the model's end-of-sentence token is 3"),
        ({"decoder_start_token_id": 79}, "decoder_start_token_id: 79 is none of 64 pieces"),
        ({"guidance_scale": 1.2}, "config.json: guidance_scale: 1.2 is not supported"),
        ({"forced_bos_token_id": 1}, "config.json: forced_bos_token_id: 1 cannot start a target"),
        ({"forced_bos_token_id": PIECES}, f"forced_bos_token_id: {PIECES} is none of {PIECES} pieces"),
        ({"forced_bos_token_id": VOCABULARY}, f"config.json: forced_bos_token_id: {VOCABULARY} cannot start a target"),
    ],
    ids=str,
)
def test_fields_that_are_wrong(directory: Path, fields: dict[str, Any], fault: str) -> None:
    edit_json(directory / "config.json", lambda config: config.update(fields))
    assert any(found.startswith(fault) for found in faults_of(directory))


def test_a_vocabulary_that_is_too_small(tmp_path: Path) -> None:
    directory = write(tmp_path / "t5", theirs(source_vocab_size=60, target_vocab_size=60), vocab_size=60)
    assert faults_of(directory) == ("spiece.model: has 64 pieces, the vocabulary is of 60",)


def test_tensors_that_are_wrong_are_told_by_their_names(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["encoder.block.1.layer.1.DenseReluDense.wi_1.weight"]
    tensors["decoder.block.0.layer.1.EncDecAttention.q.weight"] = torch.zeros(16, 8)
    tensors["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"] = torch.zeros(32, 2)
    save_file(tensors, directory / "model.safetensors")
    assert sorted(faults_of(directory)) == [
        "model.safetensors: decoder.block.0.layer.1.EncDecAttention.q.weight: shape [16, 8], expected [16, 16]",
        "model.safetensors: encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight: extra [32, 2]",
        "model.safetensors: encoder.block.1.layer.1.DenseReluDense.wi_1.weight: missing, expected [24, 16]",
    ]


def test_a_broken_sentencepiece_model(directory: Path) -> None:
    (directory / "spiece.model").write_bytes(b"no model")
    (fault,) = faults_of(directory)
    assert fault.startswith("spiece.model: is no SentencePiece model")


# A tokenizer.json alone.


def whole_tokenizer(model: bytes, *, num_sentinels: int = 10, adds_languages: bool = False, **changes: Any) -> dict[str, Any]:
    """The same pieces as the library writes them, with sentinels after them."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]  # made at import
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(num_sentinels))]
    vocabulary = [[piece.piece, piece.score] for piece in proto.pieces] + [[sentinel, 0.0] for sentinel in sentinels]
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    added = ["<pad>", "</s>", "<unk>", *sentinels]
    added += [token for token, _ in vocabulary if adds_languages and token.startswith("<2")]
    ids = {token: i for i, (token, _) in enumerate(vocabulary)}
    how = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": ids[token], "content": token, "special": not token.startswith("<2"), **how} for token in added],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
        "post_processor": template(after=[1]),
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocabulary, "byte_fallback": False},
        **changes,
    }


def template(*, before: Sequence[int] = (), after: Sequence[int] = ()) -> dict[str, Any]:
    def parts(ids: Sequence[int]) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": f"<{i}>", "type_id": 0}} for i in ids]

    single = [*parts(before), {"Sequence": {"id": "A", "type_id": 0}}, *parts(after)]
    tokens = {f"<{i}>": {"id": f"<{i}>", "ids": [i], "tokens": [f"<{i}>"]} for i in (*before, *after)}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}


def write_whole(directory: Path, document: Any) -> Path:
    """In the place of the SentencePiece model."""
    write(directory, theirs())
    (directory / "spiece.model").unlink()
    (directory / "tokenizer.json").write_text(json.dumps(document))
    return directory


@pytest.mark.parametrize("stated", [None, "T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"])
def test_a_tokenizer_json_alone(tmp_path: Path, stated: str | None) -> None:
    directory = write_whole(tmp_path / "t5", whole_tokenizer(pieces()))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": stated}))
    checkpoint, whole = read_checkpoint(directory), sentencepiece.SentencePieceProcessor(model_proto=pieces())
    assert checkpoint.tokenizer.kind == "hugging_face"
    assert (checkpoint.config.target_vocab_size, checkpoint.source_ends_with_eos) == (PIECES, True)
    assert (checkpoint.source_prefix, checkpoint.language_tokens) == ((), None)
    tokenizer = tokenizer_of(checkpoint)
    for text in SAMPLE_LINES:
        assert tokenizer.encode(text) == whole.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode("a <extra_id_0> b")) < PIECES
    assert tokenizer.decode([PIECES + 3]) == ""


@pytest.mark.parametrize("adds_languages", [False, True])
def test_languages_of_a_tokenizer_json(tmp_path: Path, adds_languages: bool) -> None:
    document = whole_tokenizer(pieces(languages=("de", "fr")), adds_languages=adds_languages)
    checkpoint = read_checkpoint(write_whole(tmp_path / "madlad", document))
    told, tokenizer = checkpoint.language_tokens, tokenizer_of(checkpoint)
    assert told is not None
    assert told.tokens == {"de": 3, "fr": 4}
    # What the library makes of a source that spells its language.
    library = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(document))
    for text in SAMPLE_LINES[:4]:
        source = [*checkpoint.source_prefix, told.tokens["fr"], *tokenizer.encode(text), 1]
        assert source == library.encode(f"<2fr> {text}").ids
    assert bool(checkpoint.source_prefix) != adds_languages
    assert {3, 4}.isdisjoint(tokenizer.encode("<2de> a <2fr>"))
    assert tokenizer.decode([3, 4]) == ""


@pytest.mark.parametrize(
    ("processor", "source_prefix", "ends_with_eos"),
    [(None, (), False), (template(), (), False), (template(before=[5], after=[1]), (5,), True)],
    ids=["none", "nothing", "both sides"],
)
def test_what_a_tokenizer_json_puts_around_a_source(
    tmp_path: Path, processor: Any, source_prefix: tuple[int, ...], ends_with_eos: bool
) -> None:
    checkpoint = read_checkpoint(write_whole(tmp_path / "t5", whole_tokenizer(pieces(), post_processor=processor)))
    assert (checkpoint.source_prefix, checkpoint.source_ends_with_eos) == (source_prefix, ends_with_eos)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"post_processor": {"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}},
            "tokenizer.json: post_processor: is not supported, only a template of one text",
        ),
        (
            {"post_processor": {**template(after=[1]), "special_tokens": {}}},
            "tokenizer.json: post_processor: is not supported, only a template of one text",
        ),
        (
            {"post_processor": {**template(after=[1]), "single": []}},
            "tokenizer.json: post_processor: is not supported, only a template of one text",
        ),
        (
            {"post_processor": {**template(), "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2}},
            "tokenizer.json: post_processor: is not supported, only a template of one text",
        ),
        (
            {"post_processor": {**template(), "single": [{"Sequence": {"id": "B", "type_id": 0}}]}},
            "tokenizer.json: post_processor: is not supported, only a template of one text",
        ),
        ({"post_processor": template(before=[PIECES, 5])}, f"tokenizer.json: before a text: {PIECES} is none of {PIECES} pieces"),
        ({"post_processor": template(after=[1, 1])}, "tokenizer.json: post_processor: puts [1, 1] after a text; only </s> is"),
        ({"decoder": {"type": "Nonsense"}}, "tokenizer.json: is no tokenizer"),
    ],
    ids=str,
)
def test_a_tokenizer_json_that_is_wrong(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    (found,) = faults_of(write_whole(tmp_path / "t5", whole_tokenizer(pieces(), **changes)))
    assert found.startswith(fault)


def test_a_tokenizer_json_whose_unknown_text_ends_a_source(tmp_path: Path) -> None:
    document = whole_tokenizer(pieces())
    document["model"]["unk_id"] = 1
    assert faults_of(write_whole(tmp_path / "t5", document)) == (
        "tokenizer.json: unknown text becomes </s>; put the model's spiece.model there",
    )


def test_a_tokenizer_json_that_is_not_json(tmp_path: Path) -> None:
    directory = write_whole(tmp_path / "t5", {})
    (directory / "tokenizer.json").write_text("{")
    (fault,) = faults_of(directory)
    assert fault.startswith("tokenizer.json: is not JSON")


def test_sentencepieces_model_goes_before_a_tokenizer_json(directory: Path) -> None:
    (directory / "tokenizer.json").write_text(json.dumps(whole_tokenizer(pieces())))
    assert read_checkpoint(directory).tokenizer.kind == "sentencepiece"
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (fault,) = faults_of(directory)
    assert fault.startswith("tokenizer_config.json: tokenizer_class: 'PreTrainedTokenizerFast' is not supported")


# umT5.


def test_umt5_has_positions_of_each_layer(tmp_path: Path) -> None:
    directory = write(tmp_path / "umt5", theirs(relative_per_layer=True), model_type="umt5")
    checkpoint, stored = read_checkpoint(directory), load_file(directory / "model.safetensors")
    assert checkpoint.config.relative_per_layer
    names = {name: name for name in checkpoint.tensors if "relative_positions" in name}
    assert sorted(names) == [
        "decoder.layers.0.relative_positions.buckets.weight",
        "encoder.layers.0.relative_positions.buckets.weight",
        "encoder.layers.1.relative_positions.buckets.weight",
    ]
    for name in names:
        side, _, i, _ = name.split(".", 3)
        theirs_name = f"{side}.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight"
        assert torch.equal(checkpoint.tensors[name], stored[theirs_name])
    build_model(checkpoint)


def test_umt5_without_positions_of_a_layer(tmp_path: Path) -> None:
    directory = write(tmp_path / "umt5", theirs(), model_type="umt5")
    assert faults_of(directory) == (
        "model.safetensors: encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight: missing, expected [32, 2]",
    )


@pytest.mark.parametrize("is_tied", [True, False])
def test_umt5_scales_the_last_states_where_it_states_that_its_embeddings_are_tied(tmp_path: Path, is_tied: bool) -> None:
    made = theirs(relative_per_layer=True, tie_output=is_tied)
    directory = write(tmp_path / "umt5", made, model_type="umt5", tie_word_embeddings=is_tied)
    norm = load_file(directory / "model.safetensors")["decoder.final_layer_norm.weight"]
    torch.testing.assert_close(read_checkpoint(directory).tensors["decoder.final_norm.weight"], norm / 4 if is_tied else norm)


# Several ends.


def test_targets_may_end_at_several_tokens(directory: Path) -> None:
    edit_json(directory / "config.json", lambda config: config.update(eos_token_id=[1, 9, 70]))
    checkpoint = read_checkpoint(directory)
    # Sources end at the first; one that is left out ends nothing.
    assert (checkpoint.config.eos_id, checkpoint.defaults.end_ids) == (1, [1, 9])
    (directory / "generation_config.json").write_text('{"eos_token_id": [9], "begin_suppress_tokens": [1, 70]}')
    defaults = read_checkpoint(directory).defaults
    assert (defaults.end_ids, defaults.suppressed_first) == ([9], [1])


# Words before every source.


def export(directory: Path, **options: Any) -> Bundle:
    (directory / "samples.txt").write_text("\n".join(SAMPLE_LINES[:2]))
    return export_bundle(directory, directory.parent / "bundle", show_progress=False, **options)


def test_a_task_is_told_by_a_prefix(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = {"summarization": {"prefix": "summarize: "}, "translation_en_to_de": {"prefix": "translate English to German: "}}
    edit_json(directory / "config.json", lambda config: config.update(task_specific_params=params))
    tokenizer = tokenizer_of(read_checkpoint(directory))
    manifest = export(directory, source_prefix="a man: ").manifest
    assert manifest.source_prefix == tokenizer.encode("a man:")
    told = "the model was told its task by words before a source, 'translate English to German: ' for one"
    assert told in capsys.readouterr().err


def test_no_words_come_before_a_languages_token(tmp_path: Path) -> None:
    directory = write(tmp_path / "madlad", theirs(), model=pieces(languages=("de", "fr")))
    with pytest.raises(ExportError, match=r"^source_prefix: sources of this model start with a language's token"):
        export(directory, source_prefix="a man: ")


@pytest.mark.parametrize("prefix", [" ", "\u2581"], ids=["blank", "a space"])
def test_a_prefix_of_no_tokens_is_refused(directory: Path, prefix: str) -> None:
    with pytest.raises(ExportError, match=r"source_prefix: .* has no tokens of its own"):
        export(directory, source_prefix=prefix)
