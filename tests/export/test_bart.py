from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor

from export.checkpoint import Checkpoint, build_model, read_checkpoint
from export.checkpoint.bart import BART, MBART, PEGASUS
from export.model import sinusoidal_table
from export.pipeline import export_bundle
from serving.manifest import HuggingFaceTokenizerSpec, LanguagePair, LanguageTokens
from serving.tokenizers import load_tokenizer, open_tokenizer
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
    stored_tables,
    write_weights,
)
from tests.support import SAMPLE_LINES, TINY_LINES

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
CODES = ["de_DE", "en_XX", "ro_RO"]
TOKENS = PIECES + 1
LANGUAGES = {code: TOKENS + i for i, code in enumerate(CODES)}
MBART_SIZE = TOKENS + len(CODES) + 1
PEGASUS_SIZE = PIECES + 103


def byte_level(directory: Path) -> int:
    """``vocab.json`` and ``merges.txt``; the size of the vocabulary."""
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator(TINY_LINES, vocab_size=300, special_tokens=SPECIALS, show_progress=False)
    library.save_model(str(directory))
    return len(json.loads((directory / "vocab.json").read_text()))


@pytest.fixture
def bart(tmp_path: Path) -> Path:
    directory = tmp_path / "bart"
    directory.mkdir()
    size = byte_level(directory)
    (directory / "config.json").write_text(json.dumps({**FIELDS, "model_type": "bart", "vocab_size": size}))
    write_weights(directory, {**family_tensors(family_config(BART, size, **BART_ARCHITECTURE)), **stored_tables()})
    return directory


@pytest.fixture
def mbart(tmp_path: Path) -> Path:
    directory = tmp_path / "mbart"
    directory.mkdir()
    fields = {"model_type": "mbart", "vocab_size": MBART_SIZE, "decoder_start_token_id": 2, "scale_embedding": True}
    (directory / "config.json").write_text(json.dumps({**FIELDS, **fields}))
    (directory / "sentencepiece.bpe.model").write_bytes(fairseq_sentencepiece())
    settings = {"tokenizer_class": "MBart50Tokenizer", "additional_special_tokens": CODES}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    write_weights(directory, {**family_tensors(family_config(MBART, MBART_SIZE, activation="gelu")), **stored_tables()})
    return directory


@pytest.fixture
def pegasus(tmp_path: Path) -> Path:
    directory = tmp_path / "pegasus"
    directory.mkdir()
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TINY_LINES),
        model_writer=stream,
        vocab_size=PIECES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=3,
    )
    (directory / "spiece.model").write_bytes(stream.getvalue())
    fields = {"model_type": "pegasus", "vocab_size": PEGASUS_SIZE, "activation_function": "relu"}
    (directory / "config.json").write_text(json.dumps({**FIELDS, **fields}))
    write_weights(directory, family_tensors(family_config(PEGASUS, PEGASUS_SIZE, **PEGASUS_ARCHITECTURE)))
    return directory


BART_ARCHITECTURE: dict[str, Any] = {"activation": "gelu", "scale_embedding": False}
PEGASUS_ARCHITECTURE: dict[str, Any] = {"scale_embedding": False, "pad_id": 0, "eos_id": 1, "decoder_start_id": 0}


def vocabulary_of(directory: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((directory / "vocab.json").read_text())
    return found


def ids_of(checkpoint: Checkpoint, text: str) -> list[int]:
    return open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files).encode(text)


def test_reads_a_whole_directory(bart: Path) -> None:
    checkpoint = read_checkpoint(bart)
    assert checkpoint.name == "bart"
    assert checkpoint.languages == []
    assert checkpoint.language_tokens is None
    assert checkpoint.tokenizer == HuggingFaceTokenizerSpec(kind="hugging_face", tokenizer="tokenizer.json")
    # A source starts with <s>, and nothing is forced.
    assert checkpoint.source_prefix == (0,)
    assert checkpoint.target_prefix == ()
    assert_same_state(bart, family_config(BART, checkpoint.config.target_vocab_size, **BART_ARCHITECTURE))


def test_tables_of_positions_lose_two_rows(bart: Path) -> None:
    checkpoint = read_checkpoint(bart)
    stored = stored_tables()
    for side in ("encoder", "decoder"):
        assert torch.equal(
            checkpoint.tensors[f"{side}.embedding.position_table"], stored[f"model.{side}.embed_positions.weight"][2:]
        )
    table = build_model(checkpoint).encoder.embedding.position_table
    assert table is not None
    assert table.shape == (MAX_POSITIONS, 16)


def test_tables_of_positions_that_are_wrong(bart: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.encoder.embed_positions.weight"] = torch.zeros(MAX_POSITIONS, 16)
        tensors["model.decoder.embed_positions.weight"][3, 4] = float("inf")

    edit_tensors(bart, change)
    assert faults_of(bart) == (
        "model.safetensors: model.encoder.embed_positions.weight: "
        f"shape [{MAX_POSITIONS}, 16], expected [{MAX_POSITIONS + 2}, 16]",
        f"model.safetensors: model.decoder.embed_positions.weight: 1 of {(MAX_POSITIONS + 2) * 16} values are not finite",
    )
    edit_tensors(bart, lambda tensors: tensors.pop("model.encoder.embed_positions.weight"))
    edit_tensors(
        bart,
        lambda tensors: tensors.update(
            {"model.decoder.embed_positions.weight": torch.zeros(MAX_POSITIONS + 2, 16, dtype=torch.int32)}
        ),
    )
    assert faults_of(bart) == (
        f"model.safetensors: model.encoder.embed_positions.weight: missing, expected [{MAX_POSITIONS + 2}, 16]",
        "model.safetensors: model.decoder.embed_positions.weight: of type torch.int32, expected floating point",
    )


def test_a_tokenizer_is_made_of_its_vocabulary_and_merges(bart: Path) -> None:
    checkpoint = read_checkpoint(bart)
    library = tokenizers.ByteLevelBPETokenizer(str(bart / "vocab.json"), str(bart / "merges.txt"))
    for text in (*TINY_LINES, "Ж 漢 \U0001f600", "  a  b", "a <mask> </s> b"):
        assert ids_of(checkpoint, text) == library.encode(text).ids, text
    assert not set(ids_of(checkpoint, "<s></s><pad><unk><mask>")) & set(range(len(SPECIALS)))


def test_words_may_start_with_a_space_at_the_beginning_too(bart: Path) -> None:
    plain = ids_of(read_checkpoint(bart), "man")
    (bart / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    assert ids_of(read_checkpoint(bart), "man") == ids_of(read_checkpoint(bart), " man") != plain


def test_a_whole_tokenizer_is_taken_as_it_is(bart: Path) -> None:
    contents = read_checkpoint(bart).tokenizer_files["tokenizer.json"]
    assert isinstance(contents, bytes)
    (bart / "tokenizer.json").write_bytes(contents)
    for name in ("vocab.json", "merges.txt"):
        (bart / name).unlink()
    checkpoint = read_checkpoint(bart)
    assert checkpoint.tokenizer_files == {"tokenizer.json": bart / "tokenizer.json"}
    assert checkpoint.source_prefix == (0,)


def test_exported_and_its_tokenizer_loaded(bart: Path, tmp_path: Path) -> None:
    (bart / "samples.txt").write_text("\n".join(SAMPLE_LINES[:2]))
    (bart / "generation_config.json").write_text('{"forced_bos_token_id": 0}')
    bundle = export_bundle(bart, tmp_path / "bundle", show_progress=False)
    assert bundle.manifest.target_prefix == [0]
    tokenizer = load_tokenizer(bundle)
    assert tokenizer.decode(tokenizer.encode(SAMPLE_LINES[0])) == SAMPLE_LINES[0]


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({"forced_bos_token_id": 0}, (0,)),
        ({"forced_bos_token_id": [5]}, (5,)),
        ({"force_bos_token_to_be_generated": True}, (0,)),
        ({"force_bos_token_to_be_generated": True, "forced_bos_token_id": 7}, (7,)),
        ({"force_bos_token_to_be_generated": False}, ()),
        ({"forced_bos_token_id": None, "forced_eos_token_id": 2, "num_beams": 4, "length_penalty": 2.0}, ()),
    ],
    ids=str,
)
def test_forced_tokens(bart: Path, fields: dict[str, Any], prefix: tuple[int, ...]) -> None:
    edit_json(bart / "config.json", lambda config: config.update(fields))
    assert read_checkpoint(bart).target_prefix == prefix


def test_a_file_of_its_own_has_all_settings_of_generate(bart: Path) -> None:
    edit_json(bart / "config.json", lambda config: config.update(forced_bos_token_id=0, no_repeat_ngram_size=3))
    (bart / "generation_config.json").write_text("{}")
    assert read_checkpoint(bart).target_prefix == ()
    assert read_checkpoint(bart).defaults.no_repeat_ngram_size == 0
    (bart / "generation_config.json").write_text('{"no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 3}')
    assert faults_of(bart) == ("generation_config.json: encoder_no_repeat_ngram_size: 3 is not supported, only None or 0",)


def test_every_unsupported_setting_is_named_at_once(bart: Path) -> None:
    edit_json(
        bart / "config.json",
        lambda config: config.update(
            normalize_before=True,
            normalize_embedding=False,
            add_final_layer_norm=True,
            static_position_embeddings=True,
            is_decoder=True,
            activation_function="tanh",
            tokenizer_class="BertTokenizer",
            pad_token_id=10**6,
        ),
    )
    size = read_size(bart)
    assert faults_of(bart) == (
        "config.json: is_decoder: True is not supported, only False or None",
        "config.json: add_final_layer_norm: True is not supported, only False or None",
        "config.json: normalize_before: True is not supported, only False or None",
        "config.json: normalize_embedding: False is not supported, only True or None",
        "config.json: static_position_embeddings: True is not supported, only False or None",
        "config.json: activation_function: 'tanh' is not supported, only 'relu' or 'gelu' or 'gelu_new' or 'gelu_fast' or "
        "'gelu_pytorch_tanh' or 'quick_gelu' or 'silu' or 'swish'",
        f"config.json: pad_token_id: 1000000 is outside a vocabulary of {size}",
        "config.json: tokenizer_class: 'BertTokenizer' is not supported, "
        "only 'BartTokenizer' or 'BartTokenizerFast' or 'RobertaTokenizer' or 'RobertaTokenizerFast'",
    )


def read_size(directory: Path) -> int:
    size: int = json.loads((directory / "config.json").read_text())["vocab_size"]
    return size


def test_missing_files_of_the_tokenizer(bart: Path) -> None:
    (bart / "vocab.json").unlink()
    (bart / "merges.txt").unlink()
    assert faults_of(bart) == (
        "merges.txt: is missing, and so is tokenizer.json",
        "vocab.json: is missing, and so is tokenizer.json",
    )


@pytest.mark.parametrize(
    ("name", "contents", "fault"),
    [
        ("merges.txt", b"a b\nabc\n", "merges.txt: has lines that are no two pieces"),
        ("merges.txt", b"\xff", "merges.txt: cannot be read: "),
        ("vocab.json", b'{"a": "b"}', "vocab.json: 'a': has no id"),
        ("vocab.json", b"[]", "vocab.json: is no JSON object"),
        ("vocab.json", b'{"a": 5}', "vocab.json: has no <s>"),
        ("tokenizer.json", b"{}", "tokenizer.json: has no <s>"),
        ("tokenizer.json", b"[]", "tokenizer.json: is no JSON object"),
        ("tokenizer.json", b'{"added_tokens": [{"id": 0, "content": "<s>"}], "model": {}}', "tokenizer.json: is no tokenizer: "),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else value,
)
def test_files_of_the_tokenizer_that_are_broken(bart: Path, name: str, contents: bytes, fault: str) -> None:
    (bart / name).write_bytes(contents)
    assert any(found.startswith(fault) for found in faults_of(bart))


def test_a_merge_of_pieces_that_are_not_in_the_vocabulary(bart: Path) -> None:
    (bart / "merges.txt").write_text("#version: 0.2\nq! z!\n")
    (fault,) = faults_of(bart)
    assert fault.startswith("tokenizer.json: is no tokenizer")


def test_a_vocabulary_that_is_not_the_models(bart: Path) -> None:
    size = read_size(bart)
    edit_json(bart / "vocab.json", lambda vocabulary: vocabulary.update(more=size))
    assert faults_of(bart) == tuple(
        f"tokenizer: its {side} vocabulary has ids up to {size}, the model's vocabulary is of {size}"
        for side in ("source", "target")
    )


def test_a_bias_that_is_not_stored_is_zero(bart: Path) -> None:
    edit_tensors(bart, lambda tensors: tensors.pop("final_logits_bias"))
    assert not read_checkpoint(bart).tensors["output.bias"].any()


def test_mbart_50(mbart: Path) -> None:
    checkpoint = read_checkpoint(mbart)
    assert checkpoint.language_tokens == LanguageTokens(tokens=LANGUAGES, before_source="source", before_target=True)
    assert checkpoint.source_prefix == ()
    assert_same_state(mbart, family_config(MBART, MBART_SIZE, activation="gelu"))


def test_mbart_50_of_many_languages_into_one(mbart: Path) -> None:
    (mbart / "generation_config.json").write_text(json.dumps({"forced_bos_token_id": LANGUAGES["en_XX"]}))
    checkpoint = read_checkpoint(mbart)
    assert checkpoint.target_prefix == (LANGUAGES["en_XX"],)
    assert checkpoint.languages == [LanguagePair(source="de_DE", target="en_XX"), LanguagePair(source="ro_RO", target="en_XX")]


def test_the_start_may_be_stated_for_generate_only(mbart: Path) -> None:
    edit_json(mbart / "config.json", lambda config: config.update(decoder_start_token_id=None))
    (mbart / "generation_config.json").write_text('{"decoder_start_token_id": 2}')
    assert read_checkpoint(mbart).config.decoder_start_id == 2


@pytest.mark.parametrize("fields", [{}, {"decoder_start_token_id": None}], ids=str)
def test_targets_start_with_the_beginning_of_a_sentence_where_nothing_else_is_stated(mbart: Path, fields: dict[str, Any]) -> None:
    edit_json(mbart / "config.json", lambda config: config.pop("decoder_start_token_id"))
    edit_json(mbart / "config.json", lambda config: config.update(fields, bos_token_id=0))
    assert read_checkpoint(mbart).config.decoder_start_id == 0
    # That of ``generate`` counts, which has one of its own.
    (mbart / "generation_config.json").write_text('{"bos_token_id": 4}')
    assert read_checkpoint(mbart).config.decoder_start_id == 4
    for name in ("config.json", "generation_config.json"):
        edit_json(mbart / name, lambda document: document.pop("bos_token_id"))
    (fault,) = faults_of(mbart)
    assert fault.startswith("config.json: decoder_start_token_id: ")


def test_a_bart_starts_as_its_family_does_where_nothing_is_stated(bart: Path) -> None:
    assert read_checkpoint(bart).config.decoder_start_id == 2
    edit_json(bart / "config.json", lambda config: config.update(decoder_start_token_id=None, bos_token_id=0))
    assert read_checkpoint(bart).config.decoder_start_id == 0


@pytest.mark.parametrize("name", ["MBartTokenizer", "MBartTokenizerFast", None])
def test_the_older_mbart_has_a_sources_language_behind_its_end(mbart: Path, name: str | None) -> None:
    edit_json(mbart / "tokenizer_config.json", lambda settings: settings.update(tokenizer_class=name))
    checkpoint = read_checkpoint(mbart)
    assert checkpoint.language_tokens == LanguageTokens(
        tokens=LANGUAGES, before_source=None, after_source="source", before_target=True
    )
    assert checkpoint.languages == []


def test_a_language_in_the_place_of_the_start_is_the_only_target(mbart: Path) -> None:
    edit_json(mbart / "tokenizer_config.json", lambda settings: settings.update(tokenizer_class="MBartTokenizer"))
    edit_json(mbart / "config.json", lambda config: config.update(decoder_start_token_id=LANGUAGES["ro_RO"]))
    checkpoint = read_checkpoint(mbart)
    assert checkpoint.language_tokens is not None
    assert not checkpoint.language_tokens.before_target
    assert checkpoint.target_prefix == ()
    assert checkpoint.config.decoder_start_id == LANGUAGES["ro_RO"]
    assert [(pair.source, pair.target) for pair in checkpoint.languages] == [("de_DE", "ro_RO"), ("en_XX", "ro_RO")]


@pytest.mark.parametrize(
    ("name", "number", "first", "last"),
    [("MBartTokenizer", 25, "ar_AR", "zh_CN"), ("MBart50Tokenizer", 52, "ar_AR", "sl_SI")],
)
def test_mbarts_own_languages_where_no_file_lists_any(mbart: Path, name: str, number: int, first: str, last: str) -> None:
    (mbart / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    size = TOKENS + number + 1
    edit_json(mbart / "config.json", lambda config: config.update(vocab_size=size))
    write_weights(mbart, {**family_tensors(family_config(MBART, size, activation="gelu")), **stored_tables()})
    told = read_checkpoint(mbart).language_tokens
    assert told is not None
    assert len(told.tokens) == number
    assert told.tokens[first] == TOKENS
    assert told.tokens[last] == TOKENS + number - 1


def test_weights_may_be_stored_without_the_head(bart: Path) -> None:
    whole = read_checkpoint(bart).tensors
    tensors = load_file(bart / "model.safetensors")
    write_weights(bart, {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")})
    headless = read_checkpoint(bart).tensors
    assert headless.keys() == whole.keys()
    assert all(torch.equal(headless[name], whole[name]) for name in whole.keys() - {"output.bias"})
    assert not headless["output.bias"].any()


def test_a_model_may_lack_a_special_token_of_its_tokenizer(bart: Path) -> None:
    size = read_size(bart)
    edit_json(bart / "vocab.json", lambda vocabulary: vocabulary.pop("<mask>"))
    edit_json(bart / "vocab.json", lambda vocabulary: vocabulary.update({"<mask>": size}))
    checkpoint = read_checkpoint(bart)
    assert size not in ids_of(checkpoint, "a <mask> b")


def test_mbart_50_without_its_sentencepiece_model(mbart: Path) -> None:
    (mbart / "sentencepiece.bpe.model").unlink()
    assert faults_of(mbart) == ("sentencepiece.bpe.model: is missing",)


def test_pegasus(pegasus: Path) -> None:
    checkpoint = read_checkpoint(pegasus)
    assert checkpoint.language_tokens is None
    assert checkpoint.source_prefix == ()
    table = sinusoidal_table(MAX_POSITIONS, 16, concatenated=True)
    assert torch.equal(checkpoint.tensors["decoder.embedding.position_table"], table)
    assert_same_state(pegasus, family_config(PEGASUS, PEGASUS_SIZE, **PEGASUS_ARCHITECTURE))
    model = sentencepiece.SentencePieceProcessor(model_file=str(pegasus / "spiece.model"))
    assert ids_of(checkpoint, TINY_LINES[0]) == [i + 103 for i in model.encode(TINY_LINES[0])]


def test_pegasus_may_store_its_positions(pegasus: Path) -> None:
    stored = torch.randn(MAX_POSITIONS, 16, generator=torch.Generator().manual_seed(1))
    edit_tensors(pegasus, lambda tensors: tensors.update({"model.encoder.embed_positions.weight": stored}))
    tensors = read_checkpoint(pegasus).tensors
    assert torch.equal(tensors["encoder.embedding.position_table"], stored)
    edit_tensors(pegasus, lambda tensors: tensors.update({"model.encoder.embed_positions.weight": stored[2:]}))
    assert faults_of(pegasus) == (
        "model.safetensors: model.encoder.embed_positions.weight: "
        f"shape [{MAX_POSITIONS - 2}, 16], expected [{MAX_POSITIONS}, 16]",
    )


def test_pegasus_with_other_numbers_of_its_pieces(pegasus: Path) -> None:
    (pegasus / "tokenizer_config.json").write_text('{"offset": 3}')
    model = sentencepiece.SentencePieceProcessor(model_file=str(pegasus / "spiece.model"))
    assert ids_of(read_checkpoint(pegasus), TINY_LINES[0]) == [i + 3 for i in model.encode(TINY_LINES[0])]
    (pegasus / "tokenizer_config.json").write_text('{"offset": -1}')
    assert faults_of(pegasus) == ("tokenizer_config.json: offset: -1 is not supported, only 0 to 65536",)
    (pegasus / "tokenizer_config.json").unlink()
    (pegasus / "spiece.model").write_bytes(fairseq_sentencepiece())
    assert faults_of(pegasus) == ("spiece.model: starts with ['<unk>', '<s>', '</s>']; only <pad>, </s>, <unk> is supported",)


@pytest.mark.parametrize("fields", [{"max_position_embeddings": 2**16, "d_model": 2**24}, {"vocab_size": 2**24}])
def test_sizes_that_are_absurd_take_no_memory(pegasus: Path, fields: dict[str, int]) -> None:
    edit_json(pegasus / "config.json", lambda config: config.update(fields))
    assert any(fault.startswith("model.safetensors: model.shared.weight: shape ") for fault in faults_of(pegasus))
