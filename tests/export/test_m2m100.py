from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.checkpoint import build_model, read_checkpoint
from export.checkpoint.m2m100 import M2M100, position_table
from export.model import ModelConfig
from export.pipeline import export_bundle
from serving.manifest import LanguagePair, LanguageTokens, MarianTokenizerSpec
from serving.tokenizers import load_tokenizer
from tests.export.bart_directories import (
    FIELDS,
    MAX_POSITIONS,
    PIECES,
    assert_same_state,
    edit_json,
    edit_tensors,
    fairseq_sentencepiece,
    family_config,
    family_tensors,
    faults_of,
    pieces_of,
    write_weights,
)
from tests.support import SAMPLE_LINES, tiny_sentencepiece

# <s>, <pad>, </s>, <unk> and the pieces after the model's own three first.
TOKENS = PIECES + 1
CODES = ["af", "de", "en"]
VOCAB_SIZE = TOKENS + len(CODES) + 8
LANGUAGES = {code: TOKENS + i for i, code in enumerate(CODES)}
NLLB_CODES = ["ace_Latn", "deu_Latn", "eng_Latn"]
NLLB_LANGUAGES = {code: TOKENS + i for i, code in enumerate(NLLB_CODES)}


def m2m100_config(**overrides: Any) -> ModelConfig:
    return family_config(M2M100, VOCAB_SIZE, **overrides)


def vocabulary() -> dict[str, int]:
    pieces = pieces_of(fairseq_sentencepiece())[3:]
    return {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *pieces])}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """M2M100's."""
    directory = tmp_path / "m2m"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**FIELDS, "model_type": "m2m_100", "vocab_size": VOCAB_SIZE}))
    (directory / "vocab.json").write_text(json.dumps(vocabulary()))
    (directory / "sentencepiece.bpe.model").write_bytes(fairseq_sentencepiece())
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "</s>", "additional_special_tokens": [f"__{code}__" for code in CODES]})
    )
    write_weights(directory, family_tensors(m2m100_config()))
    return directory


@pytest.fixture
def nllb(directory: Path) -> Path:
    """NLLB's, with the same weights."""
    (directory / "vocab.json").unlink()
    (directory / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": NLLB_CODES}))
    edit_json(directory / "config.json", lambda config: config.update(tokenizer_class="NllbTokenizer"))
    return directory


def test_reads_a_whole_directory(directory: Path) -> None:
    checkpoint = read_checkpoint(directory)
    assert checkpoint.name == "m2m"
    assert checkpoint.languages == []
    assert checkpoint.language_tokens == LanguageTokens(tokens=LANGUAGES, before_source="source", before_target=True)
    assert checkpoint.target_prefix == ()
    assert checkpoint.source_prefix == ()
    assert checkpoint.tokenizer == MarianTokenizerSpec(
        kind="marian",
        source_model="sentencepiece.bpe.model",
        target_model="sentencepiece.bpe.model",
        source_vocabulary="vocabulary.json",
        target_vocabulary="vocabulary.json",
    )
    assert checkpoint.tokenizer_files["sentencepiece.bpe.model"] == directory / "sentencepiece.bpe.model"
    assert json.loads(bytes(checkpoint.tokenizer_files["vocabulary.json"])) == vocabulary()
    assert_same_state(directory, m2m100_config())


def test_positions_are_computed_with_rows_from_after_the_paddings(directory: Path) -> None:
    table = read_checkpoint(directory).tensors["encoder.embedding.position_table"]
    assert torch.equal(table, position_table(MAX_POSITIONS, 16, pad_id=1))
    assert table.shape == (MAX_POSITIONS, 16)
    # The third position, with the slowest and the fastest rate.
    row = 1 + 1 + 2
    assert table[2, 0] == pytest.approx(math.sin(row))
    assert table[2, 7] == pytest.approx(math.sin(row / 10000))
    assert table[2, 8] == pytest.approx(math.cos(row))
    assert table[2, 15] == pytest.approx(math.cos(row / 10000))


def test_tables_of_positions_that_are_stored_are_not_looked_at(directory: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.encoder.embed_positions.weights"] = torch.zeros(3, 3)
        tensors["model.decoder.embed_positions.weight"] = torch.zeros(4)

    edit_tensors(directory, change)
    assert_same_state(directory, m2m100_config())


def test_exported_and_its_tokenizer_loaded(directory: Path, tmp_path: Path) -> None:
    (directory / "samples.txt").write_text("\n".join(SAMPLE_LINES[:2]))
    bundle = export_bundle(directory, tmp_path / "bundle", show_progress=False)
    assert bundle.manifest.language_tokens == LanguageTokens(tokens=LANGUAGES, before_source="source", before_target=True)
    tokenizer = load_tokenizer(bundle)
    assert tokenizer.decode(tokenizer.encode(SAMPLE_LINES[0])) == SAMPLE_LINES[0]


def test_text_never_becomes_a_language_or_a_marker(directory: Path, nllb: Path, tmp_path: Path) -> None:
    bundle = export_bundle(nllb, tmp_path / "bundle", show_progress=False)
    tokenizer = load_tokenizer(bundle)
    for text in ("__de__", "deu_Latn", "</s>", "<pad> a", "<s>"):
        assert not {0, 1, 2, *NLLB_LANGUAGES.values()} & set(tokenizer.encode(text)), text
    assert tokenizer.decode([NLLB_LANGUAGES["deu_Latn"], 2, 0, 1]) == ""


def test_nllb_numbers_pieces_one_higher_and_languages_after_them(nllb: Path) -> None:
    checkpoint = read_checkpoint(nllb)
    assert json.loads(bytes(checkpoint.tokenizer_files["vocabulary.json"])) == vocabulary()
    assert checkpoint.language_tokens == LanguageTokens(tokens=NLLB_LANGUAGES, before_source="source", before_target=True)
    assert_same_state(nllb, m2m100_config())


@pytest.mark.parametrize("place", ["tokenizer_config.json", "added_tokens.json", "tokenizer.json"])
def test_languages_have_the_ids_that_a_file_states(nllb: Path, place: str) -> None:
    stated = {code: i + 2 for code, i in NLLB_LANGUAGES.items()}
    documents: dict[str, Any] = {
        "tokenizer_config.json": {"added_tokens_decoder": {str(i): {"content": code} for code, i in stated.items()}},
        "added_tokens.json": stated,
        "tokenizer.json": {"added_tokens": [{"id": i, "content": code} for code, i in stated.items()]},
    }
    (nllb / place).write_text(json.dumps(documents[place]))
    tokens = read_checkpoint(nllb).language_tokens
    assert tokens is not None
    assert tokens.tokens == stated


def test_files_that_contradict_each_other(nllb: Path) -> None:
    (nllb / "added_tokens.json").write_text('{"deu_Latn": 66}')
    (nllb / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"67": {"content": "deu_Latn"}}}')
    assert faults_of(nllb) == ("tokenizer_config.json: added token 'deu_Latn' has id 67, elsewhere 66",)


def test_added_tokens_of_no_form(nllb: Path) -> None:
    (nllb / "added_tokens.json").write_text('{"a": "b", "c": -1}')
    (nllb / "tokenizer.json").write_text('{"added_tokens": 5}')
    (nllb / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": {"content": "a"}}}')
    (nllb / "special_tokens_map.json").write_text('{"additional_special_tokens": [5]}')
    assert faults_of(nllb) == (
        "tokenizer.json: added token '5' with id None: is no token with its id",
        "added_tokens.json: added token 'a' with id 'b': is no token with its id",
        "added_tokens.json: added token 'c' with id -1: is no token with its id",
        "tokenizer_config.json: added token 'a' with id None: is no token with its id",
        "special_tokens_map.json: additional_special_tokens: is no list of tokens",
        "tokenizer_config.json: no token of a language is listed, nor in any other file",
    )


@pytest.mark.parametrize(("stated", "number", "last"), [(None, 100, "zu"), ("wmt21", 8, "de")])
def test_m2m100s_own_languages_where_no_file_lists_any(directory: Path, stated: str | None, number: int, last: str) -> None:
    (directory / "special_tokens_map.json").unlink()
    if stated:
        (directory / "tokenizer_config.json").write_text(json.dumps({"language_codes": stated}))
    config = m2m100_config(source_vocab_size=TOKENS + 108, target_vocab_size=TOKENS + 108)
    edit_json(directory / "config.json", lambda document: document.update(vocab_size=TOKENS + 108))
    write_weights(directory, family_tensors(config))
    told = read_checkpoint(directory).language_tokens
    assert told is not None
    assert len(told.tokens) == number
    assert told.tokens[last] == TOKENS + number - 1


def test_languages_outside_the_vocabulary(directory: Path) -> None:
    (directory / "special_tokens_map.json").write_text('{"additional_special_tokens": ["__af__"]}')
    (directory / "added_tokens.json").write_text(json.dumps({"__de__": VOCAB_SIZE, "__en__": 2}))
    assert faults_of(directory) == (
        f"language en: its token 2 is outside a vocabulary of {VOCAB_SIZE}, or another's",
        f"language de: its token {VOCAB_SIZE} is outside a vocabulary of {VOCAB_SIZE}, or another's",
    )


def test_a_forced_language_starts_every_target(directory: Path) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"forced_bos_token_id": LANGUAGES["de"], "num_beams": 5}))
    checkpoint = read_checkpoint(directory)
    assert checkpoint.target_prefix == (LANGUAGES["de"],)
    assert checkpoint.language_tokens == LanguageTokens(tokens=LANGUAGES, before_source="source", before_target=False)
    assert checkpoint.languages == [LanguagePair(source="af", target="de"), LanguagePair(source="en", target="de")]


@pytest.mark.parametrize(
    ("forced", "fault"),
    [
        (7, "forced_bos_token_id: 7 is no language's token"),
        (1, "generation_config.json: forced_bos_token_id: 1 cannot start a target"),
        (VOCAB_SIZE, f"generation_config.json: forced_bos_token_id: {VOCAB_SIZE} cannot start a target"),
        ("de", "generation_config.json: forced_bos_token_id: 'de' cannot start a target"),
        (True, "generation_config.json: forced_bos_token_id: True cannot start a target"),
    ],
)
def test_forced_tokens_that_are_no_language(directory: Path, forced: Any, fault: str) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"forced_bos_token_id": forced}))
    assert faults_of(directory) == (fault,)


def test_every_unsupported_setting_is_named_at_once(nllb: Path) -> None:
    edit_json(
        nllb / "config.json",
        lambda config: config.update(
            activation_function="tanh",
            decoder_attention_heads=4,
            decoder_start_token_id=1,
            pruned_heads={"0": [1]},
        ),
    )
    (nllb / "generation_config.json").write_text('{"no_repeat_ngram_size": 3}')
    (nllb / "tokenizer_config.json").write_text('{"eos_token": {"content": "[E]"}, "sp_model_kwargs": {"alpha": 1}}')
    assert faults_of(nllb) == (
        "config.json: pruned_heads: {'0': [1]} is not supported, only None or {}",
        "config.json: activation_function: 'tanh' is not supported, only 'relu' or 'gelu' or 'gelu_new' or 'gelu_fast' or "
        "'gelu_pytorch_tanh' or 'quick_gelu' or 'silu' or 'swish'",
        "config.json: encoder_attention_heads, decoder_attention_heads: 2 and 4; different numbers are not supported",
        "config.json: decoder_start_token_id: 1 is padding, which has no position",
        "tokenizer_config.json: eos_token: '[E]' is not supported, only '</s>'",
        "tokenizer_config.json: sp_model_kwargs: {'alpha': 1} is not supported, only None or {}",
    )


@pytest.mark.parametrize("is_legacy", [True, False, None], ids=str)
def test_nllbs_sources_may_end_with_their_language(nllb: Path, is_legacy: bool | None) -> None:
    edit_json(nllb / "tokenizer_config.json", lambda settings: settings.update(legacy_behaviour=is_legacy))
    told = read_checkpoint(nllb).language_tokens
    assert told is not None
    assert told.before_target
    assert (told.before_source, told.after_source) == ((None, "source") if is_legacy else ("source", None))


def test_fields_that_change_nothing_are_ignored(directory: Path) -> None:
    edit_json(
        directory / "config.json",
        lambda config: config.update(dropout=0.5, normalize_before=False, normalize_embedding=True, num_beams=5, max_length=200),
    )
    assert_same_state(directory, m2m100_config())


def test_a_tokenizer_of_another_class(directory: Path) -> None:
    edit_json(directory / "config.json", lambda config: config.update(tokenizer_class="SMALL100Tokenizer"))
    assert faults_of(directory) == (
        "config.json: tokenizer_class: 'SMALL100Tokenizer' is not supported, "
        "only 'M2M100Tokenizer' or 'NllbTokenizer' or 'NllbTokenizerFast'",
    )


def test_an_unknown_list_of_languages(directory: Path) -> None:
    (directory / "special_tokens_map.json").unlink()
    (directory / "tokenizer_config.json").write_text('{"language_codes": "mine"}')
    assert faults_of(directory) == ("tokenizer_config.json: language_codes: 'mine' is not supported, only 'm2m100' or 'wmt21'",)


@pytest.mark.parametrize("name", ["vocab.json", "sentencepiece.bpe.model", "model.safetensors"])
def test_a_missing_file(directory: Path, name: str) -> None:
    (directory / name).unlink()
    (fault,) = faults_of(directory)
    assert fault.startswith(f"{name}: is missing")


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("contents", [b"{", b"[]", b"\xff"], ids=["cut", "list", "bytes"])
def test_json_that_is_broken(directory: Path, name: str, contents: bytes) -> None:
    (directory / name).write_bytes(contents)
    assert faults_of(directory)[0].startswith(f"{name}: is ")


def test_a_broken_configuration_is_still_of_this_format(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "m2m_100"')
    (fault,) = faults_of(directory)
    assert fault.startswith("config.json: is not JSON")


def test_sentencepiece_models_of_another_order(nllb: Path) -> None:
    (nllb / "sentencepiece.bpe.model").write_bytes(tiny_sentencepiece())
    (fault,) = faults_of(nllb)
    assert fault.startswith("sentencepiece.bpe.model: starts with ['<pad>', '<unk>', '<s>']; only <unk>, <s>, </s>")


def test_a_broken_sentencepiece_model(directory: Path) -> None:
    (directory / "sentencepiece.bpe.model").write_bytes(b"none")
    (fault,) = faults_of(directory)
    assert fault.startswith("sentencepiece.bpe.model: is no SentencePiece model")


def test_the_end_has_to_be_the_models(directory: Path) -> None:
    edit_json(directory / "vocab.json", lambda document: document.update({"</s>": 3, "<unk>": 2}))
    assert faults_of(directory) == ("tokenizer: </s> has id 3, the model's end-of-sentence token is 2",)


def test_sizes_that_are_absurd_take_no_memory(directory: Path) -> None:
    """Tables of positions are made when all else is right, and of that size."""
    edit_json(directory / "config.json", lambda config: config.update(d_model=2**24, max_position_embeddings=2**16))
    assert f"model.safetensors: model.shared.weight: shape [{VOCAB_SIZE}, 16], expected [{VOCAB_SIZE}, {2**24}]" in faults_of(
        directory
    )


def test_tensors_are_named_as_in_their_file(directory: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.encoder.layer_norm.bias"]
        tensors["model.shared.weight"][5, 3] = float("nan")
        tensors["final_logits_bias"] = torch.zeros(1, VOCAB_SIZE)
        tensors["model.other.embed_positions.weight"] = torch.zeros(2)

    edit_tensors(directory, change)
    assert set(faults_of(directory)) == {
        "model.safetensors: model.encoder.layer_norm.bias: missing, expected [16]",
        f"model.safetensors: model.shared.weight: 1 of {16 * VOCAB_SIZE} values are not finite",
        f"model.safetensors: final_logits_bias: extra [1, {VOCAB_SIZE}]",
        "model.safetensors: model.other.embed_positions.weight: extra [2]",
    }


@pytest.mark.parametrize("is_stored_once", [True, False])
def test_matrices_that_are_not_shared(directory: Path, is_stored_once: bool) -> None:
    config = m2m100_config(share_embeddings=False, tie_output=False)
    tensors = family_tensors(config)
    if is_stored_once:
        # Older versions share between the sides all the same.
        tensors["model.shared.weight"] = tensors.pop("model.encoder.embed_tokens.weight")
        del tensors["model.decoder.embed_tokens.weight"]
    else:
        tensors["model.shared.weight"] = torch.zeros(VOCAB_SIZE, 16)
    edit_json(directory / "config.json", lambda document: document.update(tie_word_embeddings=False))
    write_weights(directory, tensors)
    if not is_stored_once:
        assert_same_state(directory, config)
        return
    found = read_checkpoint(directory).tensors
    assert torch.equal(found["encoder.embedding.tokens.weight"], found["decoder.embedding.tokens.weight"])
    assert not torch.equal(found["output.weight"], found["decoder.embedding.tokens.weight"])


class Hostile:
    """Makes the directory that it is told when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.victim,)


def in_several_files(directory: Path, save: Callable[[dict[str, Tensor], Path], object], name: str, suffix: str) -> list[str]:
    """The weights in two files and their index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {f"{name}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file_name, part in halves.items():
        save({key: tensors[key] for key in part}, directory / file_name)
    places = {key: file_name for file_name, part in halves.items() for key in part}
    (directory / f"{name}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return list(halves)


def save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("save", "name", "suffix"),
    [(save_safetensors, "model", "safetensors"), (torch.save, "pytorch_model", "bin")],
    ids=["safetensors", "pickle"],
)
def test_weights_in_several_files(directory: Path, save: Callable[..., object], name: str, suffix: str) -> None:
    in_several_files(directory, save, name, suffix)
    assert_same_state(directory, m2m100_config())
    first = read_checkpoint(directory).weights_sha256
    assert len(first) == 64
    build_model(read_checkpoint(directory))


def test_an_index_that_is_not_true(directory: Path) -> None:
    one, other = in_several_files(directory, save_safetensors, "model", "safetensors")
    index = directory / "model.safetensors.index.json"
    edit_json(index, lambda document: document["weight_map"].update({"model.shared.weight": one, "more": other}))
    shared_is_in = one if "model.shared.weight" in load_file(directory / one) else other
    faults = faults_of(directory)
    assert f"{other}: more: is not there, and the index says so" in faults
    if shared_is_in == other:
        assert f"{other}: model.shared.weight: the index does not say so" in faults
    (directory / one).unlink()
    assert faults_of(directory) == (f"{one}: is missing, and model.safetensors.index.json lists it",)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", ""])
def test_an_index_that_leads_out_of_the_directory(directory: Path, place: str) -> None:
    in_several_files(directory, save_safetensors, "model", "safetensors")
    edit_json(directory / "model.safetensors.index.json", lambda document: document["weight_map"].update(a=place))
    (fault,) = faults_of(directory)
    assert fault.startswith(f"model.safetensors.index.json: {place!r}: is not a plain file name")


@pytest.mark.parametrize("places", [None, [], {"a": 5}])
def test_an_index_of_no_form(directory: Path, places: Any) -> None:
    in_several_files(directory, save_safetensors, "model", "safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert faults_of(directory) == ("model.safetensors.index.json: weight_map: is no object of tensors and their files",)


def test_code_in_one_of_several_pickles_is_not_run(directory: Path, tmp_path: Path) -> None:
    one, _ = in_several_files(directory, torch.save, "pytorch_model", "bin")
    (directory / one).write_bytes(pickle.dumps({"model.shared.weight": Hostile(tmp_path / "run")}))
    (fault,) = faults_of(directory)
    assert fault.startswith(f"{one}: cannot be read: ")
    assert not (tmp_path / "run").exists()
