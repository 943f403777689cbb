from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.checkpoint import Checkpoint, build_model, read_checkpoint
from export.pipeline import export_bundle
from serving.errors import CheckpointError
from serving.manifest import DefaultOptions, LanguagePair, LanguageTokens
from serving.tokenizers import load_tokenizer, open_tokenizer
from tests import origins
from tests.support import GERMAN_LINES, SAMPLE_LINES, tiny_sentencepiece, train_sentencepiece
from tests.vocabularies import marian_vocabulary

VOCABULARY = marian_vocabulary(tiny_sentencepiece())
VOCAB_SIZE = len(VOCABULARY)
SETTINGS = {
    **origins.MARIAN_SETTINGS,
    "dim-vocabs": [VOCAB_SIZE, VOCAB_SIZE],
    "dim-emb": 16,
    "transformer-heads": 2,
    "transformer-dim-ffn": 24,
    "dec-depth": 1,
}
# Of marian-decoder, where decoder.yml says nothing.
MARIAN_SEARCH: dict[str, Any] = {"shrinking_beam": True, "max_target_ratio": 3.0, "passed_over_id": VOCABULARY["<unk>"]}
DECODER = "relative-paths: true\nmodels:\n  - model.npz\nvocabs:\n  - vocab.yml\n  - vocab.yml\nbeam-size: 6\nnormalize: 1\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "en-de"
    made.mkdir()
    write(made)
    origins.write_marian_vocabulary(made / "vocab.yml", VOCABULARY)
    (made / "decoder.yml").write_text(DECODER)
    for name in ("source.spm", "target.spm"):
        (made / name).write_bytes(tiny_sentencepiece())
    return made


def write(directory: Path, change: Callable[[dict[str, NDArray[Any]]], object] | None = None, **settings: Any) -> None:
    changed = {**SETTINGS, **{name.replace("_", "-"): value for name, value in settings.items()}}
    arrays = origins.marian_arrays(changed)
    if change is not None:
        change(arrays)
    origins.write_marian_npz(directory / "model.npz", changed, arrays)


def faults_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError, match=r"checkpoint .* cannot be used") as caught:
        read_checkpoint(path)
    return caught.value.faults


def assert_computes(checkpoint: Checkpoint, settings: dict[str, Any], arrays: dict[str, NDArray[Any]] | None = None) -> None:
    """The same as Marian, as ``tests/origins.py`` has it."""
    config, arrays = checkpoint.config, arrays or origins.marian_arrays(settings)
    source, prefix = [5, 9, 12, 0], [7, 3, 20]
    its = origins.marian_logits(settings, arrays, source, prefix)
    with torch.no_grad():
        target_ids = torch.tensor([[config.decoder_start_id, *prefix]])
        mine = build_model(checkpoint)(torch.tensor([source]), torch.tensor([len(source)]), target_ids)
    assert np.abs(mine[0, :, : its.shape[1]].numpy() - its).max() < 1e-4


def test_reads_a_whole_directory(directory: Path) -> None:
    checkpoint = read_checkpoint(directory)
    assert checkpoint.name == "en-de"
    assert checkpoint.languages == []
    assert checkpoint.language_tokens is None
    assert checkpoint.tokenizer.kind == "marian"
    assert checkpoint.weights_sha256 == hashlib.sha256((directory / "model.npz").read_bytes()).hexdigest()
    assert checkpoint.warnings == ()
    assert (checkpoint.defaults.length_penalty, checkpoint.num_beams) == (1.0, 6)
    config = checkpoint.config
    assert (config.target_vocab_size, config.decoder_start_id) == (VOCAB_SIZE + 1, VOCAB_SIZE)
    assert config.eos_id == VOCABULARY["</s>"]
    assert config.never_decoded == [VOCAB_SIZE]
    assert torch.equal(checkpoint.tensors["decoder.embedding.tokens.weight"][VOCAB_SIZE], torch.zeros(16))
    assert_computes(checkpoint, SETTINGS)


@pytest.mark.slow
def test_exported_and_its_tokenizer_loaded(directory: Path, tmp_path: Path) -> None:
    (directory / "samples.txt").write_text("\n".join(SAMPLE_LINES[:2]))
    bundle = export_bundle(directory, tmp_path / "bundle", show_progress=False)
    tokenizer = load_tokenizer(bundle)
    ids = tokenizer.encode(SAMPLE_LINES[0])
    assert set(ids) <= set(VOCABULARY.values()) - {0}
    assert tokenizer.decode(ids) == SAMPLE_LINES[0]


def test_the_file_itself_with_its_vocabularies_beside_it(directory: Path) -> None:
    (directory / "decoder.yml").unlink()
    (directory / "model.npz").rename(directory / "best.npz")
    checkpoint = read_checkpoint(directory / "best.npz")
    assert checkpoint.name == "best"
    assert_computes(checkpoint, SETTINGS)


def test_what_lies_beside_a_model_in_training_is_no_model(directory: Path) -> None:
    (directory / "decoder.yml").unlink()
    (directory / "model.npz").rename(directory / "en-de.npz")
    (directory / "en-de.npz.optimizer.npz").write_bytes(b"")
    assert read_checkpoint(directory).config.d_model == 16


def test_paths_of_the_machine_that_trained(directory: Path) -> None:
    (directory / "decoder.yml").write_text("models: [/home/me/model.npz]\nvocabs: ['C:\\data\\vocab.yml', ../vocab.yml]\n")
    assert_computes(read_checkpoint(directory), SETTINGS)


@pytest.mark.parametrize(
    "changed",
    [
        {"transformer-ffn-activation": "gelu"},
        {"transformer-ffn-activation": "gelu", "version": "v1.12.0 f5dc8ab 2023-02-20 11:00:00 +0000"},
        {"transformer-ffn-activation": "gelu", "version": "v1.12.42 b7be0e964 2025-05-24 22:34:42 -0700"},
        {"transformer-ffn-activation": "relu", "transformer-postprocess-emb": "nd"},
        {"output-omit-bias": True},
        {"tied-embeddings-all": False, "tied-embeddings": True},
        {"tied-embeddings-all": False},
        {"tied-embeddings-all": False, "tied-embeddings-src": True, "transformer-train-position-embeddings": True},
    ],
    ids=lambda changed: ", ".join(changed),
)
def test_architectures(directory: Path, changed: dict[str, Any]) -> None:
    write(directory, **changed)
    assert_computes(read_checkpoint(directory), {**SETTINGS, **changed})


@pytest.mark.parametrize(
    ("stated", "layer", "heads"),
    [
        ({}, 0, 1),
        ({"transformer-guided-alignment-layer": "last"}, 0, 1),
        ({"transformer-guided-alignment-layer": 1}, 0, 1),
    ],
    ids=str,
)
def test_which_attention_is_the_alignment(directory: Path, stated: dict[str, Any], layer: int, heads: int | None) -> None:
    write(directory, **stated)
    config = read_checkpoint(directory).config
    assert (config.alignment_layer, config.alignment_heads) == (layer, heads)


def test_pre_norm_is_read_with_a_warning(directory: Path) -> None:
    changed: dict[str, Any] = {"transformer-preprocess": "n", "transformer-postprocess": "da", "transformer-postprocess-top": "n"}
    write(directory, **changed)
    checkpoint = read_checkpoint(directory)
    assert checkpoint.warnings[0].startswith("transformer-preprocess: the norm is applied to all keys and values")
    assert_computes(checkpoint, {**SETTINGS, **changed})


def test_an_output_matrix_of_old_versions(directory: Path) -> None:
    write(
        directory,
        lambda arrays: arrays.update({"decoder_ff_logit_out_W": arrays.pop("decoder_ff_logit_out_Wt").T.copy()}),
        tied_embeddings_all=False,
    )
    assert_computes(read_checkpoint(directory), {**SETTINGS, "tied-embeddings-all": False})


def test_half_precision_becomes_float32(directory: Path) -> None:
    write(directory, lambda arrays: arrays.update({name: array.astype(np.float16) for name, array in arrays.items()}))
    assert {tensor.dtype for tensor in read_checkpoint(directory).tensors.values()} == {torch.float32}


def test_positions_are_as_many_as_were_trained(directory: Path) -> None:
    write(directory, transformer_train_position_embeddings=True)
    assert read_checkpoint(directory).config.max_positions == 60


def test_a_sentencepiece_model_as_vocabulary(directory: Path) -> None:
    (directory / "vocab.spm").write_bytes(tiny_sentencepiece())
    (directory / "decoder.yml").write_text("models: [model.npz]\nvocabs: [vocab.spm, vocab.spm]\n")
    write(directory, dim_vocabs=[64, 64])
    checkpoint = read_checkpoint(directory)
    assert checkpoint.config.eos_id == 3
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    assert tokenizer.decode(tokenizer.encode("a man")) == "a man"
    assert "vocab.spm" in checkpoint.tokenizer_files


def test_tokens_that_yaml_takes_for_something_else(directory: Path) -> None:
    odd = {"yes": 70, "Yes": 71, "1.5": 72, "~": 73, "null": 74, "é: ": 75}
    contents = "".join(f'"{token}": {i}\n' for token, i in {**VOCABULARY, **odd}.items() if token not in "yes")
    (directory / "vocab.yml").write_text(contents + "yes: 70\n? \"a longer key\"\n: 76\n'it''s': 77\n", encoding="utf-8")
    write(directory, dim_vocabs=[78, 78])
    (directory / "source.spm").unlink()
    checkpoint = read_checkpoint(directory)
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    assert checkpoint.tokenizer.kind == "tokens"
    assert tokenizer.encode("yes Yes 1.5 ~ null it's") == [70, 71, 72, 73, 74, 77]


def test_without_a_tokenizer_it_takes_tokens_and_warns(directory: Path) -> None:
    (directory / "source.spm").unlink()
    (warning,) = read_checkpoint(directory).warnings
    assert warning.startswith("there is no SentencePiece model, no tokenizer.json and no byte-pair codes beside the model")


def test_languages_that_a_source_names_by_a_token(directory: Path) -> None:
    languages = {">>deu<<": VOCAB_SIZE, ">>nds<<": VOCAB_SIZE + 1}
    origins.write_marian_vocabulary(directory / "vocab.yml", {**VOCABULARY, **languages})
    write(directory, dim_vocabs=[VOCAB_SIZE + 2, VOCAB_SIZE + 2])
    assert read_checkpoint(directory).language_tokens == LanguageTokens(
        tokens={"deu": VOCAB_SIZE, "nds": VOCAB_SIZE + 1}, before_source="target", before_target=False
    )


UNSUPPORTED = {
    "type": "s2s",
    "transformer-decoder-autoreg": "average-attention",
    "transformer-ffn-activation": "tanh",
    "transformer-ffn-depth": 3,
    "transformer-no-projection": True,
    "transformer-pool": True,
    "transformer-attention-mask": "alibi",
    "transformer-disable-position-embeddings": True,
    "transformer-postprocess": "dhn",
    "transformer-postprocess-emb": "r",
    "lemma-dim-emb": 8,
    "input-types": ["class", "sequence"],
    "right-left": True,
    "ulr": True,
}


def test_every_unsupported_setting_is_named_at_once(directory: Path) -> None:
    origins.write_marian_npz(directory / "model.npz", {**SETTINGS, **UNSUPPORTED}, origins.marian_arrays(SETTINGS))
    faults = faults_of(directory)
    assert all(fault.startswith("model.npz: special:model.yml: ") for fault in faults)
    told = " ".join(faults)
    assert [name for name in UNSUPPORTED if f"{name}:" not in told and f"{name}," not in told] == []
    assert "transformer-decoder-autoreg: 'average-attention' is not supported, only 'self-attention'" in told


def test_the_decoder_of_a_student_is_refused_with_advice(directory: Path) -> None:
    write(directory, transformer_decoder_autoreg="rnn", dec_cell="ssru")
    assert faults_of(directory) == (
        "model.npz: special:model.yml: transformer-decoder-autoreg: 'rnn' is not supported, only 'self-attention'; students, as "
        "Bergamot's and Firefox's, have such decoders: export the teacher",
    )


def test_decoder_layers_that_share_their_tensors(directory: Path) -> None:
    """Marian stores those of the first of them."""
    tied = {"dec-depth": 4, "transformer-tied-layers": [1, 1, 3, 1]}
    arrays = origins.marian_arrays({**SETTINGS, "dec-depth": 4})
    of_layer = {i: {name: array for name, array in arrays.items() if name.startswith(f"decoder_l{i}_")} for i in (1, 2, 3, 4)}
    for i in (2, 4):
        for name in of_layer[i]:
            del arrays[name]
    origins.write_marian_npz(directory / "model.npz", {**SETTINGS, **tied}, arrays)
    checkpoint = read_checkpoint(directory)
    for i, own in enumerate([1, 1, 3, 1], start=1):
        for name, array in of_layer[own].items():
            arrays[name.replace(f"decoder_l{own}_", f"decoder_l{i}_")] = array
    assert_computes(checkpoint, {**SETTINGS, "dec-depth": 4}, arrays)


OPUS = "opus.spm32k-spm32k"
OPUS_MODEL = f"{OPUS}.transformer-align.model1.npz.best-perplexity.npz"
RELEASE = """release: en-de/opus-2020-02-26.zip
modeltype: transformer-align
vocabulary:
   source: opus.spm32k-spm32k.vocab.yml
source-languages:
   - en
target-languages:
   - de
BLEU-scores:
   newstest2014-deen.en-de: 27.0
"""


@pytest.fixture
def opus(directory: Path) -> Path:
    """As OPUS-MT packs its models."""
    write(directory, guided_alignment="data/train.alg.gz", transformer_guided_alignment_layer="last")
    (directory / "model.npz").rename(directory / OPUS_MODEL)
    (directory / "vocab.yml").rename(directory / f"{OPUS}.vocab.yml")
    decoder = DECODER.replace("model.npz", OPUS_MODEL).replace("vocab.yml", f"{OPUS}.vocab.yml")
    (directory / "decoder.yml").write_text(f"{decoder}word-penalty: 0\nmini-batch: 1\nmaxi-batch: 1\nmaxi-batch-sort: src\n")
    (directory / OPUS_MODEL).with_suffix(".yml").write_text(RELEASE)
    for name in ("README.md", "LICENSE", "preprocess.sh", "postprocess.sh", f"{OPUS}.transformer-align.train1.log"):
        (directory / name).write_text("not looked at\n")
    (directory / "source.tcmodel").write_bytes(b"")
    return directory


def packed(directory: Path, root: str = "") -> Path:
    path = directory.with_name("opus-2020-02-26.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(directory.iterdir()):
            archive.write(file, f"{root}{file.name}")
    return path


def test_a_directory_of_opus_mt(opus: Path) -> None:
    checkpoint = read_checkpoint(opus)
    assert checkpoint.languages == [LanguagePair(source="en", target="de")]
    assert checkpoint.warnings == ()
    assert_computes(checkpoint, SETTINGS)


@pytest.mark.parametrize("root", ["", "opus-2020-02-26/"], ids=["no directory", "a directory"])
def test_a_package_of_opus_mt(opus: Path, root: str) -> None:
    path = packed(opus, root)
    (path.parent / "samples.txt").write_text("a man runs\n")
    checkpoint = read_checkpoint(path)
    assert checkpoint.name == "opus-2020-02-26"
    assert checkpoint.languages == [LanguagePair(source="en", target="de")]
    assert checkpoint.sample_lines == ["a man runs"]
    assert all(isinstance(contents, bytes) for contents in checkpoint.tokenizer_files.values())
    assert_computes(checkpoint, SETTINGS)


@pytest.mark.slow
def test_a_package_of_several_languages_exported(opus: Path, tmp_path: Path) -> None:
    languages = {">>deu<<": VOCAB_SIZE, ">>nds<<": VOCAB_SIZE + 1}
    origins.write_marian_vocabulary(opus / f"{OPUS}.vocab.yml", {**VOCABULARY, **languages})
    write(opus, dim_vocabs=[VOCAB_SIZE + 2, VOCAB_SIZE + 2])
    (opus / "model.npz").replace(opus / OPUS_MODEL)
    path = packed(opus)
    bundle = export_bundle(path, tmp_path / "bundle", show_progress=False)
    assert bundle.manifest.name == "opus-2020-02-26"
    assert bundle.manifest.languages == []
    assert bundle.manifest.language_tokens is not None
    assert bundle.manifest.language_tokens.tokens == {"deu": VOCAB_SIZE, "nds": VOCAB_SIZE + 1}
    assert {entry.name for entry in tmp_path.iterdir()} == {"bundle", opus.name, path.name}


@pytest.mark.parametrize("release", [b"", b"- en", b"\xff", RELEASE.replace("   - de", "   - de\n   - nl").encode()])
def test_a_description_that_does_not_tell_the_languages(opus: Path, release: bytes) -> None:
    (opus / OPUS_MODEL).with_suffix(".yml").write_bytes(release)
    assert read_checkpoint(opus).languages == []


def write_lines(path: Path, vocabulary: dict[str, int]) -> None:
    path.write_text("".join(f"{token}\n" for token in sorted(vocabulary, key=lambda token: vocabulary[token])))


@pytest.mark.parametrize(
    ("names", "write_vocabulary"),
    [
        ([f"{OPUS}.vocab.yml"], origins.write_marian_vocabulary),
        ([f"{OPUS}.src.vocab.yml", f"{OPUS}.trg.vocab.yml"], origins.write_marian_vocabulary),
        (
            [f"{OPUS}.src.vocab", f"{OPUS}.trg.vocab"],
            lambda path, ids: path.write_text("\n".join(sorted(ids, key=ids.get)) + "\n"),
        ),
        (["vocab.json"], lambda path, ids: path.write_text(json.dumps(ids))),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, list) else "",
)
def test_vocabularies_that_are_named_nowhere(opus: Path, names: list[str], write_vocabulary: Callable[..., object]) -> None:
    (opus / "decoder.yml").unlink()
    (opus / f"{OPUS}.vocab.yml").unlink()
    for name in names:
        write_vocabulary(opus / name, VOCABULARY)
    checkpoint = read_checkpoint(opus)
    assert_computes(checkpoint, SETTINGS)
    assert open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files).encode("a man") == [
        VOCABULARY[piece] for piece in ("\u2581a", "\u2581man") if piece in VOCABULARY
    ]


def test_a_vocabulary_of_lines(opus: Path) -> None:
    """A token that is there twice takes one number, as in Marian."""
    tokens = sorted(VOCABULARY, key=lambda token: VOCABULARY[token])
    path = opus / f"{OPUS}.vocab"
    (opus / "decoder.yml").write_text(f"models: [{OPUS_MODEL}]\nvocabs: [{path.name}, {path.name}]\n")
    path.write_text("\n".join([*tokens[:9], tokens[3], *tokens[9:]]))
    assert_computes(read_checkpoint(opus), SETTINGS)
    path.write_text("\n".join([*tokens[:9], "", *tokens[9:]]))
    assert faults_of(opus) == (f"{path.name}: has an empty line",)


def test_settings_that_training_writes_beside_a_model(opus: Path) -> None:
    (opus / "decoder.yml").rename(opus / f"{OPUS_MODEL}.decoder.yml")
    (opus / f"{OPUS}.vocab.yml").rename(opus / "corpus.yml")
    text = (opus / f"{OPUS_MODEL}.decoder.yml").read_text()
    (opus / f"{OPUS_MODEL}.decoder.yml").write_text(text.replace(f"{OPUS}.vocab.yml", "corpus.yml"))
    for path in (opus, opus / OPUS_MODEL):
        assert_computes(read_checkpoint(path), SETTINGS)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"dim-emb": 15}, "dim-emb: 15 is no multiple of 2 and of transformer-heads 2"),
        ({"dim-emb": 2}, "dim-emb: 2 is no multiple"),
        ({"dim-emb": 2**30}, "dim-emb: Input should be less than"),
        ({"dim-vocabs": [66, 67]}, "dim-vocabs: [66, 67] differ, and the embeddings are tied"),
        ({"dim-vocabs": [66, 66, 66]}, "dim-vocabs: List should have at most 2 items"),
        ({"transformer-tied-layers": [1, 1]}, "transformer-tied-layers: [1, 1] do not say of which layer each of dec-depth 1 is"),
        ({"transformer-tied-layers": [2]}, "transformer-tied-layers: [2] do not say"),
        ({"transformer-tied-layers": ["a"]}, "transformer-tied-layers.0: Input should be a valid integer"),
        ({"transformer-tied-layers": "1"}, "transformer-tied-layers: Input should be a valid list"),
        ({"transformer-guided-alignment-layer": 3}, "transformer-guided-alignment-layer: 3, there are 1 layers in the decoder"),
        ({"enc-depth": "many"}, "enc-depth: Input should be a valid integer"),
        ({"enc-depth": [[[6]]]}, "enc-depth: Input should be a valid integer"),
        ({"tied-embeddings": "perhaps"}, "tied-embeddings: Input should be a valid boolean"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_or_are_none(directory: Path, settings: dict[str, Any], fault: str) -> None:
    origins.write_marian_npz(directory / "model.npz", {**SETTINGS, **settings}, {"Wemb": np.zeros((2, 2), np.float32)})
    assert any(fault in found for found in faults_of(directory))


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"- a\n- b\n", "is no YAML mapping"),
        (b"a", "is no YAML mapping"),
        (b"a: &x 1\nb: *x\n", "has aliases"),
        (b"a: 1\na: 2\n", "has 'a' twice"),
        (b"[a]: 1\n", "has a key that is no text"),
        (b"a: [", "is not YAML"),
        (b"a: " + b"[" * 100_000, "is nested too deeply"),
        (b"\xff\xfe\xff", "is not YAML"),
    ],
    ids=["list", "word", "alias", "twice", "key", "cut", "deep", "bytes"],
)
def test_yaml_that_is_none(directory: Path, contents: bytes, reason: str) -> None:
    (directory / "vocab.yml").write_bytes(contents)
    assert any(fault.startswith("vocab.yml: ") and reason in fault for fault in faults_of(directory))


@pytest.mark.parametrize(
    ("contents", "fault"),
    [
        ("</s>: 0\n<unk>: 1\na: b\n", "vocab.yml: 'a' has no id, but 'b'"),
        ("</s>: 0\n<unk>: 1\na: [1]\n", "vocab.yml: 'a' has no id, but ['1']"),
        ("</s>: 0\n<unk>: 0\n", "vocab.yml: two tokens have one id"),
        ("</s>: 0\n", "the source vocabulary has no <unk>"),
        ("<unk>: 0\n", "the source vocabulary has no </s>"),
        ("</s>: 0\n<unk>: 5000\n", "the source vocabulary has no <unk>"),
    ],
    ids=["text", "list", "twice", "no unknown", "no end", "large"],
)
def test_a_vocabulary_that_is_none_or_another_models(directory: Path, contents: str, fault: str) -> None:
    (directory / "vocab.yml").write_text(contents)
    assert fault in faults_of(directory)


def test_a_vocabulary_is_cut_to_the_models_size(directory: Path) -> None:
    """As Marian reads one that was made for larger models; what is cut is unknown."""
    more = {**VOCABULARY, "much": VOCAB_SIZE, "more": VOCAB_SIZE + 1}
    origins.write_marian_vocabulary(directory / "vocab.yml", more)
    checkpoint = read_checkpoint(directory)
    (warning,) = checkpoint.warnings
    assert warning.startswith(f"vocab.yml: 2 of its {VOCAB_SIZE + 2} tokens are left out: the model's are {VOCAB_SIZE}")
    contents = checkpoint.tokenizer_files["vocabulary.json"]
    assert isinstance(contents, bytes)
    assert json.loads(contents) == VOCABULARY
    assert_computes(checkpoint, SETTINGS)


def test_a_sentencepiece_model_is_not_cut(directory: Path) -> None:
    (directory / "vocab.spm").write_bytes(train_sentencepiece(GERMAN_LINES, vocab_size=90))
    (directory / "decoder.yml").write_text("models: [model.npz]\nvocabs: [vocab.spm, vocab.spm]\n")
    assert f"the source vocabulary has ids up to 89, the model's is of {VOCAB_SIZE} tokens" in faults_of(directory)


def test_an_end_that_is_another_on_the_other_side(directory: Path) -> None:
    origins.write_marian_vocabulary(directory / "other.yml", {**VOCABULARY, "</s>": VOCABULARY["<pad>"], "<pad>": 0})
    (directory / "decoder.yml").write_text("models: [model.npz]\nvocabs: [vocab.yml, other.yml]\n")
    assert faults_of(directory) == ("</s> has another id in the source vocabulary than in the target vocabulary",)


@pytest.mark.parametrize(
    ("decoder", "fault"),
    [
        ("models: [a.npz, b.npz]\nvocabs: [vocab.yml, vocab.yml]", "decoder.yml: models: an ensemble of 2 is not supported"),
        ("models: [a.npz]\nvocabs: [vocab.yml, vocab.yml]", "decoder.yml: models: 'a.npz' is missing"),
        ("models: ['..']\nvocabs: [vocab.yml, vocab.yml]", "decoder.yml: models: '..' is missing"),
        ("vocabs: [vocab.yml, no.yml]", "decoder.yml: vocabs: 'no.yml' is missing"),
        ("vocabs: [vocab.yml, vocab.yml, vocab.yml]", "decoder.yml: vocabs: 3 vocabularies are not supported"),
        ("vocabs: [vocab.fsv, vocab.fsv]", "vocab.fsv: is of no kind that is supported"),
        ("vocabs: [broken.spm, broken.spm]", "broken.spm: is no SentencePiece model"),
        ("models: [", "decoder.yml: cannot be read: is not YAML"),
    ],
    ids=str,
)
def test_what_decoder_yml_names(directory: Path, decoder: str, fault: str) -> None:
    (directory / "vocab.fsv").write_text("a : _lemma\n")
    (directory / "broken.spm").write_bytes(b"no model")
    (directory / "decoder.yml").write_text(decoder)
    assert any(found.startswith(fault) for found in faults_of(directory))


def test_no_vocabulary_and_several_models(directory: Path) -> None:
    for name in ("decoder.yml", "vocab.yml", "model.npz"):
        (directory / name).unlink()
    for name in ("a.npz", "b.npz"):
        (directory / name).write_bytes(b"")
    first, second = faults_of(directory)
    assert first == "one model is needed, and there are several: a.npz, b.npz; give one of them instead of the directory"
    assert second.startswith("vocabularies: none is named in decoder.yml, and none is called vocab.yml")


def test_a_directory_without_a_model(directory: Path) -> None:
    (directory / "model.npz").unlink()
    (directory / "decoder.yml").write_text("vocabs: [vocab.yml, vocab.yml]\n")
    assert faults_of(directory) == ("a model is needed: none, model.npz is missing",)


@pytest.mark.parametrize(
    ("settings", "length_penalty", "num_beams"),
    [
        ("", 0.0, None),
        ("normalize: 0.6\nbeam-size: 12\n", 0.6, 12),
        ("normalize: 0\n", 0.0, None),
        ("normalize: true\n", 1.0, None),
        ("normalize: false\n", 0.0, None),
    ],
    ids=ascii,
)
def test_how_its_makers_search(directory: Path, settings: str, length_penalty: float, num_beams: int | None) -> None:
    (directory / "decoder.yml").write_text(f"models: [model.npz]\nvocabs: [vocab.yml, vocab.yml]\n{settings}")
    checkpoint = read_checkpoint(directory)
    assert checkpoint.defaults == DefaultOptions(length_penalty=length_penalty, **MARIAN_SEARCH)
    assert checkpoint.num_beams == num_beams
    assert checkpoint.warnings == ()


def test_more_of_how_its_makers_search(directory: Path) -> None:
    (directory / "decoder.yml").write_text(
        f"{DECODER}word-penalty: 0.2\nmax-length-factor: 2.5\nallow-unk: true\nshortlist: []\n"
    )
    checkpoint = read_checkpoint(directory)
    assert checkpoint.defaults == DefaultOptions(shrinking_beam=True, word_penalty=0.2, max_target_ratio=2.5)
    assert checkpoint.warnings == ()


def test_what_a_bundle_does_not_do_is_told(directory: Path) -> None:
    (directory / "decoder.yml").write_text(f"{DECODER}shortlist: [lex.bin, 50, 50]\n")
    (warning,) = read_checkpoint(directory).warnings
    assert warning.startswith("decoder.yml: shortlist: ['lex.bin', '50', '50'] is left out")


@pytest.mark.parametrize(
    "setting",
    [
        "normalize: much",
        "normalize: nan",
        "normalize: 11",
        "normalize: [1]",
        "word-penalty: much",
        "word-penalty: [1]",
        "max-length-factor: 0",
        "max-length-factor: inf",
        "beam-size: 0",
        "beam-size: 1.5",
        "beam-size: [2]",
    ],
)
def test_a_search_that_is_none(directory: Path, setting: str) -> None:
    (directory / "decoder.yml").write_text(f"models: [model.npz]\nvocabs: [vocab.yml, vocab.yml]\n{setting}\n")
    (fault,) = faults_of(directory)
    assert fault.startswith(f"decoder.yml: {setting.partition(':')[0]}: ")


def change_wrongly(arrays: dict[str, NDArray[Any]]) -> None:
    arrays["decoder_l1_self_Wq"] = np.zeros((16, 8), np.float32)
    arrays["encoder_l1_ffn_W1"][0, 0] = np.nan
    arrays["encoder_l2_ffn_b2"] = np.zeros((1, 16), np.int8)
    del arrays["Wemb"]
    arrays["decoder_l1_rnn_W"] = np.zeros((16, 16), np.float32)


def test_every_tensor_that_is_wrong_is_named_at_once(directory: Path) -> None:
    write(directory, change_wrongly)
    assert set(faults_of(directory)) == {
        f"model.npz: Wemb: missing, expected [{VOCAB_SIZE}, 16]",
        "model.npz: decoder_l1_self_Wq: shape [8, 16], expected [16, 16]",
        "model.npz: encoder_l1_ffn_W1: 1 of 384 values are not finite",
        "model.npz: encoder_l2_ffn_b2: of type torch.int8, expected one of "
        "torch.float16, torch.bfloat16, torch.float32, torch.float64",
        "model.npz: decoder_l1_rnn_W: extra [16, 16]",
    }


def test_python_objects_are_not_read(directory: Path) -> None:
    write(directory, lambda arrays: arrays.update(Wemb=np.array([{}], object)))
    assert faults_of(directory) == ("model.npz: Wemb.npy: holds Python objects, which are not read",)


def without_settings(path: Path) -> None:
    np.savez(path, Wemb=np.zeros((2, 2)))


def with_a_claim(path: Path) -> None:
    """A header for far more values than follow."""
    np.savez(path, Wemb=np.zeros((2, 2), np.float32))
    contents = path.read_bytes().replace(b"(2, 2), }             ", b"(2000000, 2000000), } ")
    with zipfile.ZipFile(path) as archive:
        member = archive.read("Wemb.npy").replace(b"(2, 2), }             ", b"(2000000, 2000000), } ")
    assert len(contents) > len(member)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("Wemb.npy", member)


def with_a_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("Wemb.npy", bytes(2**25))


def with_a_name_twice(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", b"")


def with_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../evil.npy", b"no array")


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (without_settings, "model.npz: has no special:model.yml, so it is no model of Marian's"),
        (with_a_claim, "model.npz: Wemb.npy: has shape [2000000, 2000000], and other than so many values are stored"),
        (with_a_bomb, "model.npz: unpacks to 33554432 bytes"),
        (with_a_name_twice, "model.npz: a.npy: is there 2 times"),
        (with_text, "model.npz: ../../evil.npy: is no array: "),
        (lambda path: path.write_bytes(b""), "model.npz: cannot be read: "),
        (lambda path: path.write_bytes(b"PK\3\4cut"), "model.npz: cannot be read: "),
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "model.npz: cannot be read: "),
    ],
    ids=["no settings", "claim", "bomb", "twice", "no array", "empty", "no zip", "cut"],
)
def test_archives_that_are_broken_or_hostile(directory: Path, spoil: Callable[[Path], object], fault: str) -> None:
    spoil(directory / "model.npz")
    (found,) = faults_of(directory)
    assert found.startswith(fault)


def test_settings_that_are_no_text(directory: Path) -> None:
    np.savez(directory / "model.npz", **{"special:model.yml": np.zeros(3)})  # type: ignore[arg-type]  # NumPy's stub is of allow_pickle
    assert faults_of(directory) == ("model.npz: special:model.yml: is no text of at most 1048576 bytes",)


def test_a_tokenizer_that_is_none(directory: Path) -> None:
    (directory / "source.spm").write_bytes(b"no model")
    (fault,) = faults_of(directory)
    assert fault.startswith("source.spm: is no SentencePiece model")
