from __future__ import annotations

import argparse
import fractions
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from export.checkpoint import Checkpoint, build_model, read_checkpoint
from export.pipeline import export_bundle
from serving.errors import CheckpointError
from serving.tokenizers import load_tokenizer, open_tokenizer
from tests import origins
from tests.support import SAMPLE_LINES, tiny_sentencepiece
from tests.tool_classes import ToolClasses
from tests.vocabularies import marian_vocabulary

PIECES = [
    *("<unk>", "<blank>", "<s>", "</s>"),
    *(piece for piece in marian_vocabulary(tiny_sentencepiece()) if piece not in ("</s>", "<unk>", "<pad>")),
]
SIZE = len(PIECES)
SETTINGS = {**origins.OPENNMT_SETTINGS, "hidden_size": 16, "heads": 2, "transformer_ff": 24, "dec_layers": 1}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "en-de"
    made.mkdir()
    write(made)
    for name in ("source.spm", "target.spm"):
        (made / name).write_bytes(tiny_sentencepiece())
    return made


def document_of(settings: dict[str, Any]) -> dict[str, Any]:
    state = {name: torch.from_numpy(array) for name, array in origins.opennmt_arrays(settings, (SIZE, SIZE)).items()}
    return {
        "model": {name: tensor for name, tensor in state.items() if not name.startswith("generator.")},
        "generator": {name: state[f"generator.{name}"] for name in ("weight", "bias")},
        "vocab": {"src": PIECES, "tgt": PIECES, "data_task": "seq2seq", "decoder_start_token": "<s>"},
        "opt": argparse.Namespace(**settings),
        "optim": {"training_step": 1000, "optimizer": None},
    }


def write(directory: Path, change: Callable[[dict[str, Any]], object] | None = None, **settings: Any) -> None:
    document = document_of({**SETTINGS, **settings})
    if change is not None:
        change(document)
    torch.save(document, directory / "model.pt")


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> ToolClasses:
    return ToolClasses(monkeypatch)


def faults_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError, match=r"checkpoint .* cannot be used") as caught:
        read_checkpoint(path)
    return caught.value.faults


def assert_computes(checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    """The same as OpenNMT-py, as ``tests/origins.py`` has it."""
    arrays = origins.opennmt_arrays(settings, (SIZE, SIZE))
    source, prefix = [5, 9, 12], [7, 4, 20]
    its = origins.opennmt_logits(settings, arrays, source, prefix)
    with torch.no_grad():
        mine = build_model(checkpoint)(torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([[2, *prefix]]))
    assert np.abs(mine[0].numpy() - its).max() < 1e-4


def test_reads_a_whole_model(directory: Path) -> None:
    checkpoint = read_checkpoint(directory)
    assert checkpoint.name == "en-de"
    assert checkpoint.languages == []
    assert checkpoint.weights_sha256 == hashlib.sha256((directory / "model.pt").read_bytes()).hexdigest()
    config = checkpoint.config
    assert (config.pad_id, config.eos_id, config.decoder_start_id) == (1, 3, 2)
    assert config.never_decoded == [1, 2]
    assert not checkpoint.source_ends_with_eos
    assert config.max_positions == 1024
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    assert tokenizer.decode([2, *tokenizer.encode("a man"), 3, 1]) == "a man"
    assert_computes(checkpoint, SETTINGS)


@pytest.mark.slow
def test_exported_and_its_tokenizer_loaded(directory: Path, tmp_path: Path) -> None:
    (directory / "samples.txt").write_text("\n".join(SAMPLE_LINES[:2]))
    bundle = export_bundle(directory, tmp_path / "bundle", show_progress=False)
    assert not bundle.manifest.source_ends_with_eos
    tokenizer = load_tokenizer(bundle)
    ids = tokenizer.encode(SAMPLE_LINES[0])
    assert min(ids) >= 4
    assert tokenizer.decode(ids) == SAMPLE_LINES[0]


def test_the_file_itself(directory: Path) -> None:
    checkpoint = read_checkpoint(directory / "model.pt")
    assert checkpoint.name == "model"
    assert_computes(checkpoint, SETTINGS)


@pytest.mark.parametrize(
    "changed",
    [
        {"pos_ffn_activation_fn": "gelu"},
        {"pos_ffn_activation_fn": "fast_gelu"},
        {"pos_ffn_activation_fn": "silu"},
        {"pos_ffn_activation_fn": "gated-gelu", "add_ffnbias": False},
        {"share_embeddings": True},
        {"share_decoder_embeddings": True},
        {"add_qkvbias": False, "add_ffnbias": False},
        {"norm_eps": 1e-2},
        {"layer_norm": "rms"},
    ],
    ids=lambda changed: ", ".join(changed),
)
def test_architectures(directory: Path, changed: dict[str, Any]) -> None:
    write(directory, **changed)
    assert_computes(read_checkpoint(directory), {**SETTINGS, **changed})


def write_apart(directory: Path, **settings: Any) -> None:
    """As with ``-save_format safetensors``: the weights in a file of their own."""
    document = document_of({**SETTINGS, **settings})
    model, generator = (document.pop(name) for name in ("model", "generator"))
    torch.save(document, directory / "model.pt")
    save_file({**model, **{f"generator.{name}": tensor for name, tensor in generator.items()}}, directory / "model.safetensors")


def test_weights_in_a_file_of_their_own(directory: Path) -> None:
    write_apart(directory)
    for path in (directory, directory / "model.pt"):
        checkpoint = read_checkpoint(path)
        assert checkpoint.weights_sha256 == hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
        assert_computes(checkpoint, SETTINGS)


def test_weights_of_their_own_that_are_missing_or_none(directory: Path) -> None:
    write_apart(directory)
    (directory / "model.safetensors").write_bytes(b"{}")
    (fault,) = faults_of(directory)
    assert fault.startswith("model.safetensors: cannot be read: ")
    (directory / "model.safetensors").write_bytes(save({}))
    assert faults_of(directory) == ("model.safetensors: holds no tensors",)
    (directory / "model.safetensors").unlink()
    assert faults_of(directory) == ("model.safetensors: is missing, and model.pt is without weights",)


@pytest.mark.parametrize("weights", [None, b"{}"], ids=["missing", "broken"])
def test_other_faults_are_told_beside_weights_of_their_own_that_are_none(directory: Path, weights: bytes | None) -> None:
    write_apart(directory, copy_attn=True)
    (directory / "model.safetensors").unlink()
    if weights is not None:
        (directory / "model.safetensors").write_bytes(weights)
    (directory / "samples.txt").write_bytes(b"\xff")
    assert [fault.partition(": ")[0] for fault in faults_of(directory)] == ["model.safetensors", "model.pt", "samples.txt"]


def test_faults_of_tensors_name_the_file_that_they_are_in(directory: Path) -> None:
    write_apart(directory)
    tensors = load_file(directory / "model.safetensors")
    sized = "encoder.transformer.0.feed_forward.w_1.weight"
    save_file({**tensors, "x": torch.zeros(2)}, directory / "model.safetensors")
    assert faults_of(directory) == ("model.safetensors: x: extra [2]",)
    save_file({**tensors, sized: torch.zeros(2)}, directory / "model.safetensors")
    assert faults_of(directory) == (f"model.safetensors: {sized}: is missing, or no matrix",)


def test_weights_in_a_file_with_the_number_of_a_part(directory: Path) -> None:
    """As decoding with OpenNMT-py needs them."""
    write_apart(directory)
    (directory / "model.safetensors").rename(directory / "model.00.safetensors")
    checkpoint = read_checkpoint(directory)
    assert checkpoint.weights_sha256 == hashlib.sha256((directory / "model.00.safetensors").read_bytes()).hexdigest()
    assert_computes(checkpoint, SETTINGS)


def as_before(document: dict[str, Any]) -> None:
    """The generator a sequence, norms with names of their own, masks among the tensors, no positions."""
    document["generator"] = {f"0.{name}": tensor for name, tensor in document["generator"].items()}
    model = document["model"]
    for name in [name for name in model if "layer_norm" in name]:
        model[name.replace(".weight", ".a_2").replace(".bias", ".b_2")] = model.pop(name)
    model["decoder.transformer_layers.0.mask"] = torch.zeros(1, 5, 5, dtype=torch.uint8)
    for side in ("encoder", "decoder"):
        del model[f"{side}.embeddings.make_embedding.pe.pe"]


@pytest.mark.parametrize(
    ("stated", "layer", "heads"),
    [
        ({}, 0, 1),
        ({"lambda_align": 0.0, "alignment_layer": 0, "alignment_heads": 0}, 0, 1),
        ({"lambda_align": 0.05, "alignment_layer": 0, "alignment_heads": 0}, 0, None),
        ({"lambda_align": 0.05, "alignment_layer": -1, "alignment_heads": 2}, 0, 2),
    ],
    ids=str,
)
def test_which_attention_is_the_alignment(directory: Path, stated: dict[str, Any], layer: int, heads: int | None) -> None:
    write(directory, **stated)
    config = read_checkpoint(directory).config
    assert (config.alignment_layer, config.alignment_heads) == (layer, heads)


def test_names_of_older_versions(directory: Path) -> None:
    write(directory, as_before)
    assert_computes(read_checkpoint(directory), SETTINGS)


def test_a_table_of_positions_is_taken_as_it_is(directory: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for side in ("encoder", "decoder"):
            document["model"][f"{side}.embeddings.make_embedding.pe.pe"] = torch.full((70, 1, 16), 2.0)

    write(directory, change)
    checkpoint = read_checkpoint(directory)
    assert torch.equal(checkpoint.tensors["decoder.embedding.position_table"], torch.full((70, 16), 2.0))


def test_a_start_token_of_its_own(directory: Path) -> None:
    write(directory, lambda document: document["vocab"].update(decoder_start_token="</s>"))
    assert read_checkpoint(directory).config.decoder_start_id == 3


def test_models_that_the_settings_name(directory: Path) -> None:
    (directory / "source.spm").rename(directory / "en.model")
    (directory / "target.spm").rename(directory / "de.model")
    write(directory, src_subword_model="/data/en.model", tgt_subword_model="C:\\data\\de.model")
    assert {"en.model", "de.model"} <= read_checkpoint(directory).tokenizer_files.keys()


UNSUPPORTED: dict[str, Any] = {
    "encoder_type": "brnn",
    "decoder_type": "transformer_lm",
    "copy_attn": True,
    "generator_function": "sparsemax",
    "max_relative_positions": 20,
    "model_task": "lm",
    "num_kv": 4,
    "parallel_residual": True,
    "pos_ffn_activation_fn": "tanh",
    "position_encoding": False,
    "self_attn_type": "average",
}


def test_every_unsupported_setting_is_named_at_once(directory: Path) -> None:
    torch.save({**document_of(SETTINGS), "opt": argparse.Namespace(**{**SETTINGS, **UNSUPPORTED})}, directory / "model.pt")
    faults = faults_of(directory)
    assert all(fault.startswith("model.pt: ") for fault in faults)
    assert [name for name in UNSUPPORTED if f"{name}:" not in " ".join(faults)] == []


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"heads": 3}, "heads: an embedding of 16 is no multiple of 2 and of 3"),
        ({"lambda_align": 0.1, "alignment_layer": -3}, "alignment_layer: there is no layer -3 of 1"),
        ({"enc_layers": 0}, "enc_layers: Input should be greater than 0"),
        ({"enc_layers": 10**9}, "enc_layers: Input should be less than"),
        ({"norm_eps": float("nan")}, "norm_eps: Input should be"),
        ({"layer_norm": "batch"}, "layer_norm: Input should be 'standard' or 'rms'"),
        ({"share_embeddings": 1}, "share_embeddings: Input should be a valid boolean"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_or_are_none(directory: Path, settings: dict[str, Any], fault: str) -> None:
    torch.save({**document_of(SETTINGS), "opt": argparse.Namespace(**{**SETTINGS, **settings})}, directory / "model.pt")
    assert any(found.startswith(f"model.pt: {fault}") for found in faults_of(directory))


@pytest.mark.parametrize(
    ("vocab", "fault"),
    [
        ([("src", 1)], "src: has no list of tokens, nor an object of torchtext with one"),
        ([("src", PIECES), 5], "tgt: has no list of tokens"),
        ({"src": PIECES}, "tgt: has no list of tokens"),
        ({"src": PIECES, "tgt": [1, 2]}, "tgt: has no list of tokens"),
        ({"src": PIECES, "tgt": {}}, "tgt: has no list of tokens"),
        ({"src": PIECES, "tgt": PIECES, "src_feats": [["a"]]}, "src_feats: source features are not supported"),
        ({"src": PIECES, "tgt": PIECES, "src_feats": torch.ones(2)}, "src_feats: source features are not supported"),
        ({"src": PIECES, "tgt": PIECES, "data_task": "lm"}, "data_task: is not supported, only 'seq2seq'"),
        ({"src": PIECES[1:], "tgt": PIECES}, "src: has no '<unk>'"),
        ({"src": PIECES, "tgt": ["x", *PIECES[1:3], "y", *PIECES[4:]]}, "tgt: has no '</s>'"),
        ({"src": PIECES, "tgt": PIECES, "decoder_start_token": ["a"]}, "decoder_start_token: is no text"),
        ({"src": PIECES, "tgt": PIECES, "decoder_start_token": "<a>"}, "tgt: has no '<a>'"),
        ({"src": [*PIECES[:-1], "<s>"], "tgt": PIECES}, "src: a token is there twice"),
        ({"src": ["<unk>"], "tgt": PIECES}, "src: 1 tokens are too few beside token 3 of tgt"),
    ],
    ids=ascii,
)
def test_vocabularies_that_are_none(directory: Path, vocab: Any, fault: str) -> None:
    write(directory, lambda document: document.update(vocab=vocab))
    assert any(found.startswith(f"model.pt: vocab: {fault}") for found in faults_of(directory))


def test_shared_embeddings_of_different_vocabularies(directory: Path) -> None:
    write(directory, lambda document: document["vocab"].update(src=[*PIECES[:4], *PIECES[:3:-1]]), share_embeddings=True)
    assert faults_of(directory) == ("model.pt: share_embeddings: the vocabularies of src and tgt differ",)


def change_wrongly(document: dict[str, Any]) -> None:
    model = document["model"]
    model["decoder.transformer_layers.0.feed_forward.w_2.weight"] = torch.zeros(3, 3)
    model["encoder.transformer.0.feed_forward.w_1.bias"][0] = torch.inf
    del model["encoder.transformer.1.layer_norm.bias"]
    model["encoder.transformer.0.feed_forward.w_4.weight"] = torch.zeros(24, 16)


def test_every_tensor_that_is_wrong_is_named_at_once(directory: Path) -> None:
    write(directory, change_wrongly)
    assert set(faults_of(directory)) == {
        "model.pt: decoder.transformer_layers.0.feed_forward.w_2.weight: shape [3, 3], expected [16, 24]",
        "model.pt: encoder.transformer.0.feed_forward.w_1.bias: 1 of 24 values are not finite",
        "model.pt: encoder.transformer.1.layer_norm.bias: missing, expected [16]",
        "model.pt: encoder.transformer.0.feed_forward.w_4.weight: extra [24, 16]",
    }


def test_a_missing_bias_is_a_fault_where_there_should_be_one(directory: Path) -> None:
    name = "encoder.transformer.0.self_attn.linear_keys.bias"
    write(directory, lambda document: document["model"].pop(name))
    assert faults_of(directory) == (f"model.pt: {name}: missing, expected [16]",)


@pytest.mark.parametrize("shape", [(3,), (0, 16), (24, 0)], ids=str)
def test_matrices_that_tell_the_sizes(directory: Path, shape: tuple[int, ...]) -> None:
    name = "encoder.transformer.0.feed_forward.w_1.weight"
    write(directory, lambda document: document["model"].update({name: torch.zeros(shape)}))
    assert faults_of(directory) == (f"model.pt: {name}: is missing, or no matrix",)


@pytest.mark.parametrize("table", [torch.zeros(3), torch.zeros(0, 1, 16), torch.zeros(5000, 2, 16), torch.tensor(1.0)], ids=str)
def test_a_table_of_positions_that_is_none(directory: Path, table: torch.Tensor) -> None:
    name = "encoder.embeddings.make_embedding.pe.pe"
    write(directory, lambda document: document["model"].update({name: table}))
    assert any(found.startswith(f"model.pt: {name}: shape {list(table.shape)[:1]}"[:-1]) for found in faults_of(directory))


class Hostile:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.victim),)


def test_code_in_a_pickle_is_not_run(directory: Path, tmp_path: Path) -> None:
    write(directory, lambda document: document.update(optim=Hostile(tmp_path / "run")))
    (fault,) = faults_of(directory)
    assert fault.startswith("model.pt: needs posix.mkdir, which is not loaded since a pickle may run any code")
    assert not (tmp_path / "run").exists()


def fields(classes: ToolClasses, side: str, pieces: list[str], **attributes: Any) -> Any:
    marks = {} if side == "src" else {"init_token": "<s>", "eos_token": "</s>"}
    return classes.field(classes.vocab(pieces), **{**marks, **attributes})


def version_2(classes: ToolClasses, source: list[str], target: list[str]) -> Any:
    def unused(data: Any, vocab: Any) -> Any:
        raise AssertionError("nothing of a pickle is called")

    make_src = classes.named("onmt.inputters.inputter.make_src", unused)
    return {
        "src": classes.multi_field("src", fields(classes, "src", source)),
        "tgt": classes.multi_field("tgt", fields(classes, "tgt", target)),
        "indices": classes.make("torchtext.data.field.Field", use_vocab=False, dtype=torch.int64),
        "src_map": classes.make("torchtext.data.field.Field", postprocessing=make_src),
        "src_ex_vocab": classes.make("torchtext.data.field.RawField", preprocessing=None, postprocessing=None, is_target=False),
    }


def version_0_7(classes: ToolClasses, source: list[str], target: list[str]) -> Any:
    return {"src": [("src", fields(classes, "src", source))], "tgt": [("tgt", fields(classes, "tgt", target))]}


def version_0_6(classes: ToolClasses, source: list[str], target: list[str]) -> Any:
    """torchtext before 0.4 kept the function of a dict with a default, which it made of ``stoi`` again."""
    stoi = defaultdict(classes.named("torchtext.vocab._default_unk_index", lambda: 0), {"a": 1})
    return [("src", classes.vocab(source, stoi=stoi)), ("tgt", classes.vocab(target)), ("indices", classes.vocab(["0"]))]


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("vocab_of", [version_2, version_0_7, version_0_6])
def test_vocabularies_of_older_versions(directory: Path, classes: ToolClasses, vocab_of: Any, as_zip: bool) -> None:
    now = read_checkpoint(directory)
    document = {**document_of(SETTINGS), "vocab": vocab_of(classes, PIECES, PIECES), "optim": None}
    torch.save(document, directory / "model.pt", _use_new_zipfile_serialization=as_zip)
    before = read_checkpoint(directory)
    assert (before.config, before.tokenizer, before.tokenizer_files) == (now.config, now.tokenizer, now.tokenizer_files)
    assert_computes(before, SETTINGS)


def test_a_source_vocabulary_without_start_and_end(directory: Path, classes: ToolClasses) -> None:
    """As those of versions 1 and 2 are where the sides do not share one."""
    source = ["<unk>", "<blank>", *PIECES[4:], "a-word", "another-word"]
    write(directory, lambda document: document.update(vocab=version_2(classes, source, PIECES)))
    checkpoint = read_checkpoint(directory)
    assert_computes(checkpoint, SETTINGS)
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    assert tokenizer.encode("a man") == [i - 2 for i in open_tokenizer_of_both(directory).encode("a man")]
    assert tokenizer.decode([*[PIECES.index(source[i]) for i in tokenizer.encode("a man")], 3]) == "a man"


def open_tokenizer_of_both(directory: Path) -> Any:
    write(directory)
    checkpoint = read_checkpoint(directory)
    return open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)


@pytest.mark.parametrize(
    ("side", "stored", "fault"),
    [
        ("src", lambda classes: classes.multi_field("src", *[classes.field(classes.vocab(PIECES))] * 2), "src: holds 2 fields"),
        ("src", lambda classes: fields(classes, "src", PIECES, eos_token="</s>"), "src: sequences with '</s>' around them"),
        ("tgt", lambda classes: fields(classes, "tgt", PIECES, eos_token="<end>"), "tgt: ends in '<end>'; only '</s>'"),
        ("tgt", lambda classes: fields(classes, "tgt", PIECES, init_token="<go>"), "tgt: has no '<go>'"),
        ("tgt", lambda classes: classes.make("torchtext.data.field.Field"), "tgt: has no list of tokens"),
        ("tgt", lambda classes: classes.make("torchtext.vocab.Vocab", itos={"a": 1}), "tgt: has no list of tokens"),
        ("tgt", lambda classes: classes.make("torchtext.vocab.Vocab", itos=[["a"]]), "tgt: has no list of tokens"),
        ("tgt", lambda classes: classes.make("onmt.inputters.text_dataset.TextMultiField", fields=5), "tgt: has no list"),
    ],
    ids=["features", "source ends", "target ends", "start", "no vocabulary", "no list", "no text", "no fields"],
)
def test_objects_that_hold_something_else(directory: Path, classes: ToolClasses, side: str, stored: Any, fault: str) -> None:
    write(directory, lambda document: document.update(vocab={"src": PIECES, "tgt": PIECES, side: stored(classes)}))
    (found,) = faults_of(directory)
    assert found.startswith(f"model.pt: vocab: {fault}")


def test_objects_of_other_classes_are_refused_and_told_how_to_be_left_out(directory: Path) -> None:
    write(directory, lambda document: document.update(vocab={"src": fractions.Fraction(1, 2)}))
    (fault,) = faults_of(directory)
    assert fault.startswith("model.pt: needs fractions.Fraction, which is not loaded")
    assert 'state["vocab"][side].base_field.vocab.itos' in fault


@pytest.mark.parametrize(
    ("document", "faults"),
    [
        ([1], ("model.pt: holds no dict",)),
        ({}, ("model.pt: holds nothing",)),
        ({"model": {}}, ("model.pt: has no generator, vocab, opt, so it is no model of OpenNMT-py's",)),
        (
            {"model": {}, "generator": {}, "vocab": 1, "opt": 1},
            (
                "model.pt: model: is no state dict",
                "model.pt: generator: is no state dict",
                "model.pt: opt: holds no settings",
                "model.pt: vocab: src: has no list of tokens, nor an object of torchtext with one",
                "model.pt: vocab: tgt: has no list of tokens, nor an object of torchtext with one",
            ),
        ),
    ],
    ids=["list", "empty", "part", "nothing"],
)
def test_a_pickle_of_something_else(directory: Path, document: Any, faults: tuple[str, ...]) -> None:
    torch.save(document, directory / "model.pt")
    assert faults_of(directory) == faults


@pytest.mark.parametrize("contents", [b"", b"{}", b"PK\3\4cut"], ids=["empty", "json", "zip"])
def test_a_file_that_cannot_be_read(directory: Path, contents: bytes) -> None:
    (directory / "model.pt").write_bytes(contents)
    (fault,) = faults_of(directory)
    assert fault.startswith("model.pt: cannot be read: ")


def test_several_models(directory: Path) -> None:
    (directory / "other.pt").write_bytes(b"")
    assert faults_of(directory) == (
        "one model is needed, and there are several: model.pt, other.pt; give one of them instead of the directory",
    )
