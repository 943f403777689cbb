from __future__ import annotations

import argparse
import fractions
import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoint import Checkpoint, build_model, read_checkpoint
from export.pipeline import export_bundle
from serving.errors import CheckpointError
from serving.manifest import LanguagePair, MosesSpec, SubwordNmtTokenizerSpec
from serving.tokenizers import load_tokenizer, open_tokenizer
from tests import origins
from tests.support import SAMPLE_LINES, tiny_sentencepiece
from tests.tool_classes import ToolClasses
from tests.vocabularies import marian_vocabulary

PIECES = [piece for piece in marian_vocabulary(tiny_sentencepiece()) if piece not in ("</s>", "<unk>", "<pad>")]
SIZE = len(PIECES) + 4
SETTINGS = {
    **origins.FAIRSEQ_SETTINGS,
    "encoder_embed_dim": 16,
    "decoder_embed_dim": 16,
    "decoder_input_dim": 16,
    "decoder_output_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_layers": 1,
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "iwslt"
    made.mkdir()
    write(made)
    for language in ("en", "de"):
        origins.write_fairseq_dictionary(made / f"dict.{language}.txt", PIECES)
    (made / "sentencepiece.bpe.model").write_bytes(tiny_sentencepiece())
    return made


def state_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in origins.fairseq_arrays(settings, (SIZE, SIZE)).items()}


def write(directory: Path, change: Callable[[dict[str, Any]], object] | None = None, **settings: Any) -> None:
    changed = {**SETTINGS, **settings}
    state = state_of(changed)
    if change is not None:
        change(state)
    document = {"args": argparse.Namespace(**changed), "model": state, "extra_state": {"epoch": 3}, "last_optimizer_state": None}
    torch.save(document, directory / "checkpoint_best.pt")


def faults_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError, match=r"checkpoint .* cannot be used") as caught:
        read_checkpoint(path)
    return caught.value.faults


def assert_computes(checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    """The same as fairseq, as ``tests/origins.py`` has it."""
    arrays = origins.fairseq_arrays(settings, (SIZE, SIZE))
    source, prefix = [5, 9, 12, 2], [7, 4, 20]
    its = origins.fairseq_logits(settings, arrays, source, prefix)
    with torch.no_grad():
        mine = build_model(checkpoint)(torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([[2, *prefix]]))
    assert np.abs(mine[0].numpy() - its).max() < 1e-4


def test_reads_a_whole_directory(directory: Path) -> None:
    checkpoint = read_checkpoint(directory)
    assert checkpoint.name == "iwslt"
    assert checkpoint.languages == [LanguagePair(source="en", target="de")]
    assert checkpoint.tokenizer.kind == "marian"
    assert checkpoint.weights_sha256 == hashlib.sha256((directory / "checkpoint_best.pt").read_bytes()).hexdigest()
    config = checkpoint.config
    assert (config.pad_id, config.eos_id, config.decoder_start_id) == (1, 2, 2)
    assert config.never_decoded == [1]
    assert config.max_positions == 64
    assert_computes(checkpoint, SETTINGS)


@pytest.mark.slow
def test_exported_and_its_tokenizer_loaded(directory: Path, tmp_path: Path) -> None:
    (directory / "samples.txt").write_text("\n".join(SAMPLE_LINES[:2]))
    tokenizer = load_tokenizer(export_bundle(directory, tmp_path / "bundle", show_progress=False))
    ids = tokenizer.encode(SAMPLE_LINES[0])
    assert min(ids) >= 4
    assert tokenizer.decode(ids) == SAMPLE_LINES[0]


def test_the_file_itself_with_its_dictionaries_beside_it(directory: Path) -> None:
    (directory / "checkpoint_best.pt").rename(directory / "averaged.pt")
    checkpoint = read_checkpoint(directory / "averaged.pt")
    assert checkpoint.name == "averaged"
    assert_computes(checkpoint, SETTINGS)


@pytest.mark.parametrize(
    "changed",
    [
        {"share_all_embeddings": True},
        {"activation_fn": "gelu"},
        {"activation_fn": "gelu_accurate"},
        {"activation_fn": "gelu_fast"},
        {"activation_fn": "swish", "layernorm_embedding": True},
        {"encoder_normalize_before": True, "decoder_normalize_before": True},
        {"encoder_learned_pos": True, "no_scale_embedding": True},
        {"share_decoder_input_output_embed": False},
    ],
    ids=lambda changed: ", ".join(changed),
)
def test_architectures(directory: Path, changed: dict[str, Any]) -> None:
    write(directory, **changed)
    assert_computes(read_checkpoint(directory), {**SETTINGS, **changed})


@pytest.mark.parametrize(
    ("stated", "layer", "heads"),
    [
        ({}, 0, None),
        ({"alignment_layer": 0, "alignment_heads": 1}, 0, 1),
        ({"alignment_layer": -1, "alignment_heads": 2}, 0, 2),
        ({"alignment_layer": None, "alignment_heads": None}, 0, None),
    ],
    ids=str,
)
def test_which_attention_is_the_alignment(directory: Path, stated: dict[str, Any], layer: int, heads: int | None) -> None:
    write(directory, **stated)
    config = read_checkpoint(directory).config
    assert (config.alignment_layer, config.alignment_heads) == (layer, heads)


def test_languages_that_are_not_stated_are_told_by_the_dictionaries(directory: Path) -> None:
    """``fairseq-train`` finds them in its data, and version 0.12 does not store what it found."""
    unstated = {name: value for name, value in SETTINGS.items() if name not in ("source_lang", "target_lang")}

    def write_unstated(source_size: int, target_size: int) -> None:
        arrays = origins.fairseq_arrays(SETTINGS, (source_size, target_size))
        state = {name: torch.from_numpy(array) for name, array in arrays.items()}
        torch.save({"args": argparse.Namespace(**unstated), "model": state}, directory / "checkpoint_best.pt")

    write_unstated(SIZE, SIZE)
    checkpoint = read_checkpoint(directory)
    assert checkpoint.languages == []
    assert_computes(checkpoint, SETTINGS)

    # The source's has a token less.
    origins.write_fairseq_dictionary(directory / "dict.en.txt", PIECES[:-1])
    write_unstated(SIZE - 1, SIZE)
    assert read_checkpoint(directory).languages == [LanguagePair(source="en", target="de")]
    write_unstated(SIZE, SIZE - 1)
    assert read_checkpoint(directory).languages == [LanguagePair(source="de", target="en")]

    origins.write_fairseq_dictionary(directory / "dict.en.txt", PIECES[::-1])
    write_unstated(SIZE, SIZE)
    assert faults_of(directory) == ("source_lang, target_lang: are not stated, so that source and target cannot be told apart",)


@pytest.mark.parametrize(
    ("stated", "source", "target"),
    [
        ({"source_lang": "en"}, "en", "de"),
        ({"target_lang": "en"}, "de", "en"),
        # Where both are stated nothing is made up.
        ({"source_lang": "en", "target_lang": "en"}, "en", "en"),
    ],
    ids=str,
)
def test_a_language_that_is_stated_alone_leaves_the_other_dictionary_to_the_other_side(
    directory: Path, stated: dict[str, Any], source: str, target: str
) -> None:
    """Also where the dictionaries are of one size."""
    origins.write_fairseq_dictionary(directory / "dict.en.txt", PIECES[::-1])
    settings: dict[str, Any] = {"source_lang": None, "target_lang": None, **stated}
    write(directory, **settings)
    assert read_checkpoint(directory).languages == [LanguagePair(source=source, target=target)]


def test_a_language_that_is_stated_alone_and_has_no_dictionary(directory: Path) -> None:
    write(directory, source_lang="fr", target_lang=None)
    assert read_checkpoint(directory).languages == []


def test_what_is_not_stated_has_its_default(directory: Path) -> None:
    defaults = {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "max_source_positions": 1024}
    settings = {**SETTINGS, **defaults}
    left_out = {"activation_fn", "max_source_positions", "max_target_positions", "layernorm_embedding", "decoder_input_dim"}
    stated = {name: value for name, value in settings.items() if name not in left_out}
    stated["encoder_attention_heads"] = None
    stated["decoder_attention_heads"] = None
    torch.save({"args": argparse.Namespace(**stated), "model": state_of(SETTINGS)}, directory / "checkpoint_best.pt")
    checkpoint = read_checkpoint(directory)
    assert checkpoint.config.max_positions == 1024
    assert_computes(checkpoint, settings)


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """As a dataclass of settings, whose sides are apart, becomes when it is stored as plain values."""
    found: dict[str, Any] = {"_name": "transformer", "encoder": {}, "decoder": {}}
    for name, value in settings.items():
        side, _, rest = name.partition("_")
        if side in ("encoder", "decoder"):
            found[side][rest] = value
        elif name not in ("arch", "task", "source_lang", "target_lang"):
            found[name] = value
    return found


@pytest.mark.parametrize(
    "model", [argparse.Namespace(**SETTINGS), SETTINGS, nested(SETTINGS)], ids=["namespace", "flat", "nested"]
)
def test_settings_of_newer_versions(directory: Path, model: Any) -> None:
    task = {"_name": "translation", "source_lang": "en", "target_lang": "de"}
    document = {"args": None, "cfg": {"_name": None, "model": model, "task": task}, "model": state_of(SETTINGS)}
    torch.save(document, directory / "checkpoint_best.pt")
    assert_computes(read_checkpoint(directory), SETTINGS)


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_settings_of_omegaconf(directory: Path, monkeypatch: pytest.MonkeyPatch, as_zip: bool) -> None:
    """What names another value included, and settings of the command line within."""
    classes = ToolClasses(monkeypatch)
    for model in (nested(SETTINGS), SETTINGS):
        stated = {**model, "max_source_positions": "${task.max_source_positions}", "quant": {"pq": "???"}}
        task = {
            "_name": "translation",
            "source_lang": "en",
            "target_lang": "${task.other}",
            "other": "de",
            "max_source_positions": 64,
        }
        config = classes.config({"_name": None, "model": stated, "task": task, "optimizer": {"lr": [0.25]}})
        if model is SETTINGS:
            config._content["model"] = argparse.Namespace(**SETTINGS)
        document = {"args": None, "cfg": config, "model": state_of(SETTINGS)}
        torch.save(document, directory / "checkpoint_best.pt", _use_new_zipfile_serialization=as_zip)
        checkpoint = read_checkpoint(directory)
        assert checkpoint.languages == [LanguagePair(source="en", target="de")]
        assert checkpoint.config.max_positions == 64
        assert_computes(checkpoint, SETTINGS)


def test_what_training_leaves_in_a_checkpoint(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters of old and new versions, numbers of NumPy's, dictionaries."""
    classes = ToolClasses(monkeypatch)
    extra = {
        "train_meters": OrderedDict(train_loss=classes.make("fairseq.meters.AverageMeter", val=1.5, avg=2.0, sum=3, count=4)),
        "wall": classes.make("fairseq.logging.meters.StopwatchMeter", round=None, sum=0.5, n=1, start_time=None),
        "val_loss": np.float64(4.5),
        "best": np.arange(3.0),
        "dictionary": classes.make("fairseq.data.dictionary.Dictionary", symbols=["a"], indices={"a": 0}),
    }
    document = {"args": argparse.Namespace(**SETTINGS, seed=np.int64(1)), "model": state_of(SETTINGS), "extra_state": extra}
    torch.save(document, directory / "checkpoint_best.pt")
    assert_computes(read_checkpoint(directory), SETTINGS)


def as_before(state: dict[str, Any]) -> None:
    """Queries, keys and values as one product, norms in a list, the output by another name."""
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", projection)) for projection in ("q_proj", "k_proj", "v_proj")]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    lists = {"encoder": ("self_attn", "final"), "decoder": ("self_attn", "encoder_attn", "final")}
    for side, norms in lists.items():
        for i, norm in enumerate(norms):
            for name in [name for name in state if name.startswith(f"{side}.layers") and f".{norm}_layer_norm." in name]:
                state[name.replace(f"{norm}_layer_norm", f"layer_norms.{i}")] = state.pop(name)
    state["decoder.embed_out"] = state.pop("decoder.output_projection.weight")


def test_names_of_older_versions(directory: Path) -> None:
    write(directory, as_before, share_decoder_input_output_embed=False)
    assert_computes(read_checkpoint(directory), {**SETTINGS, "share_decoder_input_output_embed": False})


def test_one_product_that_is_a_number(directory: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        as_before(state)
        state["encoder.layers.0.self_attn.in_proj_bias"] = torch.tensor(1.0)

    write(directory, change, share_decoder_input_output_embed=False)
    assert "checkpoint_best.pt: encoder.layers.0.self_attn.in_proj_bias: extra []" in faults_of(directory)


def test_copies_of_an_encoder_layers_weights_are_none_of_its_own(directory: Path) -> None:
    """As version 0.12.2 keeps them; zeros until a checkpoint was loaded once."""

    def with_copies(state: dict[str, Any]) -> None:
        for name in [name for name in state if re.fullmatch(r"encoder\.layers\.\d+\.fc1\.weight", name)]:
            layer, (inner, d) = name.removesuffix(".fc1.weight"), state[name].shape
            shapes = {"in_proj": (3 * d, d), "out_proj": (d, d), "fc1": (inner, d), "fc2": (d, inner)}
            for product, shape in shapes.items():
                state |= {f"{layer}.{product}_weight": torch.zeros(shape), f"{layer}.{product}_bias": torch.zeros(shape[0])}

    write(directory, with_copies)
    assert_computes(read_checkpoint(directory), SETTINGS)


def test_half_precision_becomes_float32(directory: Path) -> None:
    write(directory, lambda state: state.update({name: tensor.half() for name, tensor in state.items()}))
    assert {tensor.dtype for tensor in read_checkpoint(directory).tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("extra", "moses"),
    [
        ({}, None),
        (
            {"tokenizer": "moses", "moses_no_escape": True},
            MosesSpec(
                source_language="en", target_language="de", normalize_punctuation=False, aggressive_dash_splits=True, escape=False
            ),
        ),
    ],
    ids=["not stated", "moses"],
)
def test_byte_pair_codes(directory: Path, extra: dict[str, Any], moses: MosesSpec | None) -> None:
    if moses is not None:
        pytest.importorskip("sacremoses", reason="sacremoses is not installed")
    (directory / "sentencepiece.bpe.model").unlink()
    (directory / "bpecodes").write_text("a n 10\nan d</w> 9\n")
    for language in ("en", "de"):
        origins.write_fairseq_dictionary(
            directory / f"dict.{language}.txt", ["and", "a@@", "n", "d", *map(str, range(len(PIECES) - 4))]
        )
    write(directory, **extra)
    checkpoint = read_checkpoint(directory)
    assert isinstance(checkpoint.tokenizer, SubwordNmtTokenizerSpec)
    assert (checkpoint.tokenizer.source_codes, checkpoint.tokenizer.target_codes) == ("bpecodes", "bpecodes")
    assert checkpoint.tokenizer.unknown_id == 3
    assert checkpoint.tokenizer.moses == moses
    assert (checkpoint.warnings == ()) == (moses is not None)
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    assert tokenizer.encode("and") == tokenizer.encode_target("and") == [4]


def test_codes_of_the_source_alone_are_not_the_targets(directory: Path) -> None:
    (directory / "sentencepiece.bpe.model").unlink()
    (directory / "source.bpe").write_text("a n 10\nan d</w> 9\n")
    for language in ("en", "de"):
        pieces = ["and", "an@@", "n", "d", *map(str, range(len(PIECES) - 4))]
        origins.write_fairseq_dictionary(directory / f"dict.{language}.txt", pieces)
    spec = read_checkpoint(directory).tokenizer
    assert isinstance(spec, SubwordNmtTokenizerSpec)
    assert (spec.source_codes, spec.target_codes) == ("source.bpe", None)
    (directory / "target.bpe").write_text("a n 10\n")
    checkpoint = read_checkpoint(directory)
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    assert (tokenizer.encode("and"), tokenizer.encode_target("and")) == ([4], [5, 7])


def test_a_dictionary_may_say_a_token_twice(directory: Path) -> None:
    lines = "".join(f"{piece} 1\n" for piece in PIECES[:-1])
    (directory / "dict.en.txt").write_text(f"{lines}{PIECES[0]} 5 #fairseq:overwrite\n")
    checkpoint = read_checkpoint(directory)
    assert checkpoint.config.source_vocab_size == SIZE
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    ids = {i for line in SAMPLE_LINES for i in tokenizer.encode(line)}
    assert 4 not in ids


UNSUPPORTED: dict[str, Any] = {
    "arch": "fconv_iwslt_de_en",
    "task": "translation_multi_simple_epoch",
    "activation_fn": "tanh",
    "adaptive_softmax_cutoff": "1000,5000",
    "cross_self_attention": True,
    "no_cross_attention": True,
    "no_token_positional_embeddings": True,
    "decoder_attention_heads": 4,
    "decoder_normalize_before": True,
    "decoder_output_dim": 8,
    "encoder_layers_to_keep": "0,1",
    "scale_heads": True,
    "base_layers": 1,
}


def test_every_unsupported_setting_is_named_at_once(directory: Path) -> None:
    document = {"args": argparse.Namespace(**SETTINGS | UNSUPPORTED), "model": state_of(SETTINGS)}
    torch.save(document, directory / "checkpoint_best.pt")
    faults = faults_of(directory)
    assert all(fault.startswith("checkpoint_best.pt: ") for fault in faults)
    told = " ".join(faults)
    assert [name for name in UNSUPPORTED if f"{name}:" not in told] == []
    supported = "'relu' or 'gelu' or 'gelu_accurate' or 'gelu_fast' or 'swish'"
    assert f"activation_fn: 'tanh' is not supported, only {supported}" in told


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"encoder_embed_dim": 15}, "encoder_embed_dim: 15 is no multiple of 2"),
        ({"alignment_layer": 2}, "alignment_layer: there is no layer 2 of 1"),
        ({"alignment_heads": 5}, "alignment_heads: there are 2, not 5"),
        ({"encoder_layers": 0}, "encoder_layers: Input should be greater than 0"),
        ({"encoder_layers": 10**9}, "encoder_layers: Input should be less than"),
        ({"encoder_layers": "6"}, "encoder_layers: Input should be a valid integer"),
        ({"max_source_positions": 10**9}, "max_source_positions: Input should be less than"),
        (
            {"encoder_normalize_before": True, "decoder_normalize_before": True, "no_decoder_final_norm": True},
            "no_decoder_final_norm: True is not supported",
        ),
        ({"source_lang": "../en"}, "dict.../en.txt: is missing"),
        ({"target_lang": "fr"}, "dict.fr.txt: is missing"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_or_are_none(directory: Path, settings: dict[str, Any], fault: str) -> None:
    torch.save(
        {"args": argparse.Namespace(**{**SETTINGS, **settings}), "model": state_of(SETTINGS)}, directory / "checkpoint_best.pt"
    )
    assert any(fault in found for found in faults_of(directory))


def test_shared_embeddings_of_different_dictionaries(directory: Path) -> None:
    origins.write_fairseq_dictionary(directory / "dict.de.txt", PIECES[::-1])
    write(directory, share_all_embeddings=True)
    assert faults_of(directory) == ("checkpoint_best.pt: share_all_embeddings: the dictionaries of source and target differ",)


@pytest.mark.parametrize(
    ("contents", "fault"),
    [
        (b"a\n", "dict.en.txt: line 1 is no token with its count"),
        (b"a 1\nb many\n", "dict.en.txt: line 2 is no token with its count"),
        (b"a 1\na 2\n", "dict.en.txt: 'a' is there twice"),
        (b"</s> 1\n", "dict.en.txt: '</s>' is there twice"),
        (b"\xff 1\n", "dict.en.txt: 'utf-8' codec"),
    ],
    ids=["no count", "no number", "twice", "special", "no text"],
)
def test_dictionaries_that_are_none(directory: Path, contents: bytes, fault: str) -> None:
    (directory / "dict.en.txt").write_bytes(contents)
    assert any(found.startswith(fault) for found in faults_of(directory))


def test_a_dictionary_of_another_model(directory: Path) -> None:
    origins.write_fairseq_dictionary(directory / "dict.en.txt", PIECES[:-1])
    assert faults_of(directory) == (
        f"checkpoint_best.pt: encoder.embed_tokens.weight: shape [{SIZE}, 16], expected [{SIZE - 1}, 16]",
    )


def change_wrongly(state: dict[str, Any]) -> None:
    state["decoder.layers.0.fc1.weight"] = torch.zeros(3, 3)
    state["encoder.layers.0.fc1.bias"][0] = torch.nan
    del state["encoder.layers.1.fc2.bias"]
    state["encoder.quant_noise.weight"] = torch.zeros(16, 16)
    state["decoder.output_projection.weight"] = torch.zeros(SIZE, 16)


def test_every_tensor_that_is_wrong_is_named_at_once(directory: Path) -> None:
    write(directory, change_wrongly)
    assert set(faults_of(directory)) == {
        "checkpoint_best.pt: decoder.layers.0.fc1.weight: shape [3, 3], expected [40, 16]",
        "checkpoint_best.pt: encoder.layers.0.fc1.bias: 1 of 48 values are not finite",
        "checkpoint_best.pt: encoder.layers.1.fc2.bias: missing, expected [16]",
        "checkpoint_best.pt: encoder.quant_noise.weight: extra [16, 16]",
        "checkpoint_best.pt: decoder.output_projection.weight: is shared with decoder.embed_tokens.weight, and differs from it",
    }


class Hostile:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_pickle_is_not_run(directory: Path, tmp_path: Path, as_zip: bool) -> None:
    document = {"args": argparse.Namespace(x=Hostile(tmp_path / "run")), "model": {}}
    torch.save(document, directory / "checkpoint_best.pt", _use_new_zipfile_serialization=as_zip)
    (fault,) = faults_of(directory)
    assert fault.startswith("checkpoint_best.pt: needs posix.mkdir, which is not loaded since a pickle may run any code")
    assert not (tmp_path / "run").exists()


def test_other_classes_are_refused_and_told_how_to_be_left_out(directory: Path) -> None:
    torch.save({"args": None, "cfg": fractions.Fraction(1, 2), "model": {}}, directory / "checkpoint_best.pt")
    (fault,) = faults_of(directory)
    assert fault.startswith("checkpoint_best.pt: needs fractions.Fraction, which is not loaded")
    assert "omegaconf.OmegaConf.to_container" in fault


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("document", "faults"),
    [
        ([1], ("checkpoint_best.pt: holds no dict",)),
        ({}, ("checkpoint_best.pt: holds nothing",)),
        (
            {"x": 1},
            (
                "checkpoint_best.pt: has no settings under args, nor under cfg: model",
                "checkpoint_best.pt: model: is no state dict",
            ),
        ),
        (
            {"args": None, "cfg": argparse.Namespace(model=5), "model": {"a": torch.zeros(1)}},
            ("checkpoint_best.pt: has no settings under args, nor under cfg: model",),
        ),
        ({"args": 5, "model": {"a": torch.zeros(1)}}, ("checkpoint_best.pt: args: holds no settings",)),
        (
            {"args": argparse.Namespace(a=ENDLESS), "model": {"a": torch.zeros(1)}},
            ("checkpoint_best.pt: args: holds settings of more than 100000 values, or nested in each other",),
        ),
        ({"args": SETTINGS, "model": {"a": 1}}, ("checkpoint_best.pt: model: a: is no dense tensor",)),
        ({"args": SETTINGS, "model": {1: torch.zeros(1)}}, ("checkpoint_best.pt: model: is no state dict",)),
        (
            {"args": SETTINGS, "model": {"a": torch.zeros(1).expand(2**20, 2**20)}},
            ("checkpoint_best.pt: model: a: has shape [1048576, 1048576], and fewer values than that are stored",),
        ),
    ],
    ids=["list", "empty", "something else", "no model", "no settings", "endless", "numbers", "names", "absurd"],
)
def test_a_pickle_of_something_else(directory: Path, document: Any, faults: tuple[str, ...]) -> None:
    torch.save(document, directory / "checkpoint_best.pt")
    assert faults_of(directory) == faults


@pytest.mark.parametrize("contents", [b"", b"{}", b"PK\3\4cut", b"\x80\x04cut"], ids=["empty", "json", "zip", "pickle"])
def test_a_file_that_cannot_be_read(directory: Path, contents: bytes) -> None:
    (directory / "checkpoint_best.pt").write_bytes(contents)
    (fault,) = faults_of(directory)
    assert fault.startswith("checkpoint_best.pt: cannot be read: ")


def test_several_checkpoints(directory: Path) -> None:
    (directory / "checkpoint_best.pt").rename(directory / "model1.pt")
    (directory / "model2.pt").write_bytes(b"")
    assert faults_of(directory) == (
        "one checkpoint is needed, and there are several: model1.pt, model2.pt; give one of them instead of the directory",
    )
