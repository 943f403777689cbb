from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.checkpoint import build_model, read_checkpoint
from export.checkpoint.marian import tensor_names
from export.model import ModelConfig
from export.pipeline import export_bundle
from export.samples import draw_samples
from serving.bundle import read_bundle
from serving.cli import main
from serving.errors import CheckpointError
from serving.inspection import describe
from serving.manifest import DefaultOptions, LanguagePair, LanguageTokens, MarianTokenizerSpec
from serving.tokenizers import load_tokenizer
from tests.support import SAMPLE_LINES, tiny_config, tiny_model, tiny_sentencepiece
from tests.vocabularies import marian_vocabulary

SHARED = Path(__file__).parents[3] / "shared"
VOCABULARY = marian_vocabulary(tiny_sentencepiece())
VOCAB_SIZE = len(VOCABULARY)
PAD_ID = VOCABULARY["<pad>"]
ARCHITECTURE = {
    "source_vocab_size": VOCAB_SIZE,
    "target_vocab_size": VOCAB_SIZE,
    "positions": "sinusoidal_concatenated",
    "output_bias": True,
    "activation": "silu",
    "pad_id": PAD_ID,
    "eos_id": 0,
    "decoder_start_id": PAD_ID,
}
CONFIG = {
    "model_type": "marian",
    "architectures": ["MarianMTModel"],
    "vocab_size": VOCAB_SIZE,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 24,
    "activation_function": "swish",
    "max_position_embeddings": 128,
    "scale_embedding": True,
    "normalize_before": False,
    "normalize_embedding": False,
    "static_position_embeddings": True,
    "add_bias_logits": False,
    "pad_token_id": PAD_ID,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "decoder_start_token_id": PAD_ID,
    "bad_words_ids": [[PAD_ID]],
    "num_beams": 4,
    "max_length": 512,
    "id2label": {"0": "LABEL_0"},
}


def marian_config(**overrides: Any) -> ModelConfig:
    return tiny_config(**{**ARCHITECTURE, **overrides})


def marian_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """The tiny model's tensors by all of Marian's names, shared ones once for each name."""
    state = tiny_model(config, seed=3).state_dict()
    tensors = {theirs: state[ours].clone() for theirs, ours in tensor_names(config).items()}
    tensors["final_logits_bias"] = tensors["final_logits_bias"][None]
    return tensors


def write_marian(directory: Path, config: ModelConfig, tensors: dict[str, Tensor], **fields: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**CONFIG, **fields}))
    (directory / "vocab.json").write_text(json.dumps(VOCABULARY))
    (directory / "tokenizer_config.json").write_text('{"source_lang": "en", "target_lang": "de"}')
    for name in ("source.spm", "target.spm"):
        (directory / name).write_bytes(tiny_sentencepiece())
    save_file(tensors, directory / "model.safetensors")
    return directory


def once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the further names of what is shared."""
    return {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name and name != "lm_head.weight"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    config = marian_config()
    return write_marian(tmp_path / "opus-mt-en-de", config, once(marian_tensors(config)))


def faults_of(directory: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError, match=r"checkpoint .* cannot be used") as caught:
        read_checkpoint(directory)
    return caught.value.faults


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text()) if path.exists() else {}
    change(document)
    path.write_text(json.dumps(document))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def assert_same_state(directory: Path, config: ModelConfig) -> None:
    model = build_model(read_checkpoint(directory))
    assert model.config == config
    state, written = model.state_dict(), tiny_model(config, seed=3).state_dict()
    assert state.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(state[name], tensor), name


def test_reads_a_whole_directory(directory: Path) -> None:
    checkpoint = read_checkpoint(directory)
    assert checkpoint.name == "opus-mt-en-de"
    assert checkpoint.languages == [LanguagePair(source="en", target="de")]
    assert checkpoint.tokenizer == MarianTokenizerSpec(
        kind="marian",
        source_model="source.spm",
        target_model="target.spm",
        source_vocabulary="vocab.json",
        target_vocabulary="vocab.json",
    )
    assert checkpoint.tokenizer_files == {name: directory / name for name in ("source.spm", "target.spm", "vocab.json")}
    assert checkpoint.weights_sha256 == hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert checkpoint.sample_lines == []
    assert_same_state(directory, marian_config())


def test_exported_and_its_tokenizer_loaded(directory: Path, tmp_path: Path) -> None:
    (directory / "samples.txt").write_text("\n".join(SAMPLE_LINES[:2]))
    bundle = export_bundle(directory, tmp_path / "bundle", show_progress=False)
    assert bundle.manifest.certificate.sentences == 2
    tokenizer = load_tokenizer(bundle)
    assert tokenizer.decode(tokenizer.encode(SAMPLE_LINES[0])) == SAMPLE_LINES[0]


def test_samples_are_tokenized_by_its_own_tokenizer(directory: Path) -> None:
    (directory / "samples.txt").write_text("a man")
    (sample,) = draw_samples(read_checkpoint(directory), calibrate=False).certify
    pieces = [piece for piece, i in VOCABULARY.items() for j in sample.source_ids if i == j]
    assert sorted("".join(pieces).replace("</s>", "")) == sorted("▁a▁man")


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("swish", "silu"),
        ("silu", "silu"),
        ("relu", "relu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("quick_gelu", "gelu_sigmoid"),
    ],
)
def test_activations(directory: Path, name: str, ours: str) -> None:
    edit_json(directory / "config.json", lambda config: config.update(activation_function=name))
    assert read_checkpoint(directory).config.activation == ours


def test_a_matrix_may_be_stored_under_all_its_names(tmp_path: Path) -> None:
    config = marian_config()
    tensors = marian_tensors(config)
    for side in ("encoder", "decoder"):
        tensors[f"model.{side}.embed_positions.weight"] = torch.zeros(128, 16)
    assert_same_state(write_marian(tmp_path / "marian", config, tensors), config)


@pytest.mark.parametrize("name", ["model.encoder.embed_tokens.weight", "lm_head.weight"])
def test_a_matrix_may_be_stored_under_any_of_its_names(directory: Path, name: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors.pop("model.shared.weight")}))
    assert_same_state(directory, marian_config())


def test_shared_matrices_of_other_shapes_are_told_by_their_shapes_and_not_compared(directory: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.shared.weight"] = torch.zeros(3, 2)
        tensors["lm_head.weight"] = torch.zeros(3, 2)
        tensors["model.encoder.embed_tokens.weight"] = torch.ones(2, 3)

    edit_tensors(directory, change)
    assert set(faults_of(directory)) == {
        f"model.safetensors: {name}: shape {shape}, expected [{VOCAB_SIZE}, 16]"
        for name, shape in (
            ("model.shared.weight", [3, 2]),
            ("lm_head.weight", [3, 2]),
            ("model.encoder.embed_tokens.weight", [2, 3]),
        )
    }


def test_a_second_name_of_another_shape(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(VOCAB_SIZE, 8)}))
    assert faults_of(directory) == (f"model.safetensors: lm_head.weight: shape [{VOCAB_SIZE}, 8], expected [{VOCAB_SIZE}, 16]",)


@pytest.mark.parametrize("tied", [True, False])
def test_vocabularies_apart(tmp_path: Path, tied: bool) -> None:
    config = marian_config(target_vocab_size=VOCAB_SIZE + 3, share_embeddings=False, tie_output=tied)
    tensors = marian_tensors(config)
    if tied:
        del tensors["lm_head.weight"]
    fields = {
        "decoder_vocab_size": VOCAB_SIZE + 3,
        "share_encoder_decoder_embeddings": False,
        "tie_word_embeddings": tied,
    }
    directory = write_marian(tmp_path / "marian", config, tensors, **fields)
    edit_json(directory / "tokenizer_config.json", lambda settings: settings.update(separate_vocabs=True))
    (directory / "target_vocab.json").write_text(json.dumps({**VOCABULARY, "▁neu": VOCAB_SIZE + 2}))
    assert_same_state(directory, config)
    tokenizer = read_checkpoint(directory).tokenizer
    assert tokenizer.file_names == ["source.spm", "target.spm", "vocab.json", "target_vocab.json"]


def test_the_decoders_vocabulary_size_is_not_looked_at_where_embeddings_are_shared(directory: Path) -> None:
    edit_json(directory / "config.json", lambda config: config.update(decoder_vocab_size=7))
    assert read_checkpoint(directory).config.target_vocab_size == VOCAB_SIZE


def test_half_precision_becomes_float32(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))
    tensors = read_checkpoint(directory).tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_bias_that_is_not_stored_is_zero(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop("final_logits_bias"))
    assert torch.equal(read_checkpoint(directory).tensors["output.bias"], torch.zeros(VOCAB_SIZE))


def test_pickled_weights(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert_same_state(directory, marian_config())
    digest = hashlib.sha256((directory / "pytorch_model.bin").read_bytes()).hexdigest()
    assert read_checkpoint(directory).weights_sha256 == digest


class Hostile:
    """Makes the directory that it is told when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.victim,)


@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))], ids=["zip", "plain"])
def test_code_in_a_pickle_is_not_run(directory: Path, tmp_path: Path, write: Callable[[Any, Path], object]) -> None:
    (directory / "model.safetensors").unlink()
    write({"model.shared.weight": Hostile(tmp_path / "run")}, directory / "pytorch_model.bin")
    (fault,) = faults_of(directory)
    assert fault.startswith("pytorch_model.bin: cannot be read: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stored", "fault"),
    [
        ([torch.zeros(1)], "pytorch_model.bin: is no state dict"),
        ({1: torch.zeros(1)}, "pytorch_model.bin: is no state dict"),
        ({}, "pytorch_model.bin: holds no tensors"),
        ({"a": 1}, "pytorch_model.bin: a: is no dense tensor"),
        ({"a": torch.eye(2).to_sparse()}, "pytorch_model.bin: a: is no dense tensor"),
    ],
    ids=["list", "numbers", "nothing", "no tensor", "sparse"],
)
def test_a_pickle_of_something_else(directory: Path, stored: Any, fault: str) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(stored, directory / "pytorch_model.bin")
    assert faults_of(directory) == (fault,)


def test_tensors_of_absurd_size_are_neither_copied_nor_compared(directory: Path) -> None:
    """Also where the configuration asks for that size."""
    edit_json(directory / "config.json", lambda config: config.update(vocab_size=2**24, d_model=2**20))
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = ("model.shared.weight", "lm_head.weight")
    tensors |= {name: torch.zeros(1).expand(2**24, 2**20) for name in names}
    torch.save(tensors, directory / "pytorch_model.bin")
    assert faults_of(directory) == tuple(
        f"pytorch_model.bin: {name}: has shape [16777216, 1048576], and fewer values than that are stored" for name in names
    )


def test_a_tensor_that_is_part_of_a_larger_one_is_read(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    for name, tensor in tensors.items():
        tensors[name] = torch.stack((tensor, tensor + 1))[0]
    matrix = tensors["model.shared.weight"]
    tensors["model.shared.weight"] = matrix.t().contiguous().t()
    torch.save(tensors, directory / "pytorch_model.bin")
    assert_same_state(directory, marian_config())


def test_pickled_weights_that_unpack_to_more_than_any_model(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with zipfile.ZipFile(directory / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**25))
    (fault,) = faults_of(directory)
    assert fault.startswith("pytorch_model.bin: cannot be read: unpacks to 33554432 bytes")


@pytest.mark.parametrize("contents", [b"", b"{}", b"\x80\x04cut"], ids=["empty", "json", "cut"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_cannot_be_read(directory: Path, name: str, contents: bytes) -> None:
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(contents)
    (fault,) = faults_of(directory)
    assert fault.startswith(f"{name}: cannot be read: ")


def test_every_unsupported_setting_is_named_at_once(directory: Path) -> None:
    edit_json(
        directory / "config.json",
        lambda config: config.update(
            normalize_before=True,
            normalize_embedding=True,
            static_position_embeddings=False,
            activation_function="tanh",
            decoder_attention_heads=4,
            quantization_config={"bits": 8},
            repetition_penalty=1.2,
        ),
    )
    (directory / "generation_config.json").write_text('{"num_beams": 6}')
    assert faults_of(directory) == (
        "config.json: normalize_before: True is not supported, only False or None",
        "config.json: normalize_embedding: True is not supported, only False or None",
        "config.json: quantization_config: {'bits': 8} is not supported, only None or {}",
        "config.json: static_position_embeddings: False is not supported, only True or None",
        "config.json: activation_function: 'tanh' is not supported, only 'relu' or 'gelu' or 'gelu_new' or 'gelu_fast' or "
        "'gelu_pytorch_tanh' or 'quick_gelu' or 'silu' or 'swish'",
        "config.json: encoder_attention_heads, decoder_attention_heads: 2 and 4; different numbers are not supported",
    )


def test_settings_of_generate_that_a_bundle_has_no_place_for(directory: Path) -> None:
    settings = {
        "bad_words_ids": [[PAD_ID], [5, 10**6]],
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 8,
        "no_repeat_ngram_size": -3,
        "eos_token_id": [0, 5],
        "encoder_no_repeat_ngram_size": 3,
    }
    (directory / "generation_config.json").write_text(json.dumps(settings))
    assert faults_of(directory) == (
        "generation_config.json: forced_bos_token_id: 0 cannot start a target",
        "generation_config.json: encoder_no_repeat_ngram_size: 3 is not supported, only None or 0",
        f"generation_config.json: bad_words_ids: [[{PAD_ID}], [5, 1000000]]: is no list of tokens of the vocabulary",
        "generation_config.json: forced_eos_token_id: [8] is not supported, only tokens that end a target, [0, 5]",
        "generation_config.json: no_repeat_ngram_size: Input should be greater than or equal to 0",
    )


def test_settings_of_generate_are_the_bundles_defaults(directory: Path, tmp_path: Path) -> None:
    settings = {
        "bad_words_ids": [[PAD_ID], [5, 6]],
        "forced_bos_token_id": 7,
        "forced_eos_token_id": 0,
        "max_length": 18,
        "no_repeat_ngram_size": 3,
        "num_beams": 6,
        "renormalize_logits": True,
    }
    (directory / "generation_config.json").write_text(json.dumps(settings))
    (directory / "samples.txt").write_text("\n".join(SAMPLE_LINES[:2]))
    manifest = export_bundle(directory, tmp_path / "bundle", show_progress=False).manifest
    assert manifest.defaults == DefaultOptions(
        max_target_tokens=16, no_repeat_ngram_size=3, suppressed=[[5, 6]], ends_when_cut=True
    )
    assert manifest.target_prefix == [7]
    assert manifest.provenance.num_beams == 6
    assert "made for 6 beams" in describe(manifest)
    assert "no_repeat_ngram_size 3" in describe(manifest)


def test_settings_of_generate_are_in_the_configuration_where_they_have_no_file(directory: Path) -> None:
    edit_json(directory / "config.json", lambda config: config.update(bad_words_ids=5))
    (fault,) = faults_of(directory)
    assert fault == "config.json: bad_words_ids: 5: is no list of tokens of the vocabulary"


def test_fields_that_change_nothing_are_ignored(directory: Path) -> None:
    edit_json(
        directory / "config.json",
        lambda config: config.update(
            dropout=0.5, use_cache=False, gradient_checkpointing=True, torch_dtype="float16", anything=[1]
        ),
    )
    assert_same_state(directory, marian_config())


def test_a_configuration_of_an_old_version(directory: Path) -> None:
    """As of opus-mt-en-vi, whose padding is 53684 and whose ``extra_pos_embeddings`` are 53685."""
    fields = {
        "_name_or_path": "Helsinki-NLP/opus-mt-en-vi",
        "add_final_layer_norm": False,
        "classif_dropout": 0.0,
        "extra_pos_embeddings": PAD_ID + 1,
        "force_bos_token_to_be_generated": False,
        "forced_eos_token_id": 0,
        "num_hidden_layers": 2,
        "transformers_version": "4.22.0.dev0",
    }
    edit_json(directory / "config.json", lambda config: config.update(fields))
    assert_same_state(directory, marian_config())


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"vocab_size": "66"}, "config.json: vocab_size: Input should be a valid integer"),
        ({"encoder_layers": 0}, "config.json: encoder_layers: Input should be greater than 0"),
        ({"encoder_layers": 10**9}, "config.json: encoder_layers: Input should be less than or equal to 1024"),
        ({"pad_token_id": None}, "config.json: pad_token_id: Input should be a valid integer"),
        ({"d_model": 15}, "config.json: d_model: 15 is no multiple of 2 and of encoder_attention_heads 2"),
        ({"pad_token_id": 99}, f"config.json: pad_token_id: 99 is outside a vocabulary of {VOCAB_SIZE}"),
        ({"decoder_start_token_id": 99}, f"config.json: decoder_start_token_id: 99 is outside a vocabulary of {VOCAB_SIZE}"),
        ({"eos_token_id": 2}, "tokenizer: </s> has id 0 in the source vocabulary, the model's end-of-sentence token is 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_fields_that_cannot_be(directory: Path, fields: dict[str, Any], fault: str) -> None:
    edit_json(directory / "config.json", lambda config: config.update(fields))
    assert fault in faults_of(directory)


def test_faults_of_all_files_are_told_at_once(directory: Path) -> None:
    edit_json(directory / "config.json", lambda config: config.update(normalize_before=True))
    (directory / "generation_config.json").write_text("{")
    (directory / "tokenizer_config.json").write_text("[]")
    (directory / "source.spm").write_bytes(b"none")
    (directory / "vocab.json").write_text("[]")
    (directory / "samples.txt").write_bytes(b"\xff")
    edit_tensors(directory, lambda tensors: tensors["model.shared.weight"].fill_(float("nan")))
    faults = faults_of(directory)
    starts = (
        "generation_config.json: is not JSON",
        "config.json: normalize_before: True",
        "tokenizer_config.json: is no JSON object",
        "source.spm: is no SentencePiece model",
        "model.safetensors: model.shared.weight: ",
        "samples.txt: cannot be read",
    )
    assert len(faults) == len(starts)
    assert all(fault.startswith(start) for fault, start in zip(faults, starts, strict=True)), faults
    assert "; vocab.json: is no vocabulary" in faults[3]


def test_tensors_are_named_as_in_their_file(directory: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.shared.weight"]
        del tensors["model.encoder.layers.1.fc1.bias"]
        tensors["model.decoder.layers.0.encoder_attn.k_proj.weight"] = torch.zeros(2, 3)
        tensors["model.decoder.layers.7.fc1.bias"] = torch.zeros(4)
        tensors["final_logits_bias"] = torch.zeros(1, 5)
        tensors["model.encoder.embed_positions.weight"] = torch.zeros(6, 16)
        tensors["model.encoder.layers.0.fc2.bias"][3] = float("inf")
        tensors["model.encoder.layers.0.fc1.bias"] = torch.zeros(32, dtype=torch.int64)

    edit_tensors(directory, change)
    assert set(faults_of(directory)) == {
        f"model.safetensors: model.shared.weight: missing, expected [{VOCAB_SIZE}, 16]",
        "model.safetensors: model.encoder.layers.1.fc1.bias: missing, expected [32]",
        "model.safetensors: model.decoder.layers.0.encoder_attn.k_proj.weight: shape [2, 3], expected [16, 16]",
        "model.safetensors: model.decoder.layers.7.fc1.bias: extra [4]",
        f"model.safetensors: final_logits_bias: shape [5], expected [{VOCAB_SIZE}]",
        "model.safetensors: model.encoder.embed_positions.weight: shape [6, 16], expected [128, 16]",
        "model.safetensors: model.encoder.layers.0.fc2.bias: 1 of 16 values are not finite",
        "model.safetensors: model.encoder.layers.0.fc1.bias: of type torch.int64, expected one of "
        "torch.float16, torch.bfloat16, torch.float32, torch.float64",
    }


def test_a_shared_matrix_that_differs(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({"lm_head.weight": tensors["model.shared.weight"] + 1}))
    assert faults_of(directory) == ("model.safetensors: lm_head.weight: is shared with model.shared.weight, and differs from it",)


@pytest.mark.parametrize("name", ["source.spm", "target.spm", "vocab.json"])
def test_a_missing_file(directory: Path, name: str) -> None:
    (directory / name).unlink()
    assert faults_of(directory) == (f"{name}: is missing",)


def test_missing_weights_and_vocabulary(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    edit_json(directory / "tokenizer_config.json", lambda settings: settings.update(separate_vocabs=True))
    assert faults_of(directory) == (
        "target_vocab.json: is missing",
        "model.safetensors: is missing, and so is pytorch_model.bin",
    )


def test_a_broken_configuration_is_still_of_this_format(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "marian", ')
    (fault,) = faults_of(directory)
    assert fault.startswith("config.json: is not JSON")


@pytest.mark.parametrize("contents", ['{"model_type": "bert"}', '{"a": "marian"}', "{", "[]"])
def test_another_model_is_not_of_this_format(directory: Path, contents: str) -> None:
    (directory / "config.json").write_text(contents)
    assert "it is of no known format, which are:" in faults_of(directory)


def test_a_vocabulary_that_is_not_the_models(directory: Path) -> None:
    edit_json(directory / "vocab.json", lambda vocabulary: vocabulary.update(more=VOCAB_SIZE))
    assert faults_of(directory) == tuple(
        f"tokenizer: its {side} vocabulary has ids up to {VOCAB_SIZE}, the model's vocabulary is of {VOCAB_SIZE}"
        for side in ("source", "target")
    )


def test_tokens_of_other_names_are_not_supported(directory: Path) -> None:
    settings = {"eos_token": {"content": "</s>"}, "unk_token": "[UNK]", "sp_model_kwargs": {"enable_sampling": True}}
    edit_json(directory / "tokenizer_config.json", lambda document: document.update(settings))
    assert faults_of(directory) == (
        "tokenizer_config.json: unk_token: '[UNK]' is not supported, only '<unk>'",
        "tokenizer_config.json: sp_model_kwargs: {'enable_sampling': True} is not supported, only None or {}",
    )


def with_languages(directory: Path, tokens: list[str]) -> Path:
    """The last pieces of the vocabulary become tokens of languages."""
    vocabulary = dict(VOCABULARY)
    for token, piece in zip(tokens, list(VOCABULARY)[-2::-1], strict=False):
        vocabulary[token] = vocabulary.pop(piece)
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    return directory


def test_a_model_of_several_target_languages_is_told_one_by_its_token(directory: Path) -> None:
    checkpoint = read_checkpoint(with_languages(directory, [">>vie<<", ">>vie_Hani<<"]))
    vocabulary = json.loads((directory / "vocab.json").read_text())
    codes = {"vie": vocabulary[">>vie<<"], "vie_Hani": vocabulary[">>vie_Hani<<"]}
    assert checkpoint.language_tokens == LanguageTokens(tokens=codes, before_source="target", before_target=False)
    assert checkpoint.languages == []


@pytest.mark.parametrize("tokens", [[], [">>deu<<"]], ids=["none", "one"])
def test_a_model_of_one_target_language_is_told_nothing(directory: Path, tokens: list[str]) -> None:
    checkpoint = read_checkpoint(with_languages(directory, tokens))
    assert checkpoint.language_tokens is None
    assert checkpoint.languages == [LanguagePair(source="en", target="de")]


def test_a_bundle_knows_the_tokens_of_its_languages(directory: Path, tmp_path: Path) -> None:
    with_languages(directory, [">>deu<<", ">>fra<<"])
    (directory / "samples.txt").write_text("\n".join(SAMPLE_LINES[:2]))
    bundle = export_bundle(directory, tmp_path / "bundle", show_progress=False)
    assert bundle.manifest.language_tokens == read_checkpoint(directory).language_tokens


def test_languages_are_stated_of_a_model_that_is_told_its_target_alone(directory: Path, tmp_path: Path) -> None:
    with_languages(directory, [">>deu<<", ">>fra<<"])
    (directory / "samples.txt").write_text("\n".join(SAMPLE_LINES[:2]))
    runner, bundle = CliRunner(), str(tmp_path / "bundle")
    exported = runner.invoke(main, ["export", str(directory), bundle, "--languages", "en:deu"])
    assert (exported.exit_code, exported.exception) == (0, None)
    assert read_bundle(tmp_path / "bundle").manifest.languages == [LanguagePair(source="en", target="deu")]
    options = ["--source-language", "en", "--target-language", "deu", "--max-target-tokens", "4", "--threads", "1"]
    translated = runner.invoke(main, ["translate", "--bundle", bundle, *options], input="\n".join(SAMPLE_LINES[:2]))
    assert (translated.exit_code, translated.exception) == (0, None)
    assert len(translated.stdout.splitlines()) == 2


@pytest.mark.parametrize("settings", [None, "{}", '{"source_lang": "en"}', '{"source_lang": "en", "target_lang": ""}'])
def test_languages_that_are_not_stated(directory: Path, settings: str | None) -> None:
    path = directory / "tokenizer_config.json"
    path.unlink()
    if settings is not None:
        path.write_text(settings)
    assert read_checkpoint(directory).languages == []


def test_a_real_configuration_with_random_weights(tmp_path: Path) -> None:
    origin = SHARED / "data" / "opus-mt-en-mg"
    if not origin.is_dir():
        pytest.skip("the real configuration is not there: ../shared/data/opus-mt-en-mg")
    directory = tmp_path / "opus-mt-en-mg"
    directory.mkdir()
    for path in origin.iterdir():
        (directory / path.name).symlink_to(path)
    faults = faults_of(directory)
    assert faults == ("model.safetensors: is missing, and so is pytorch_model.bin",)
