from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.checkpoint import Checkpoint, build_model, read_checkpoint, with_languages, write_native_checkpoint
from export.checkpoint.base import expected_shapes, not_finite, shared_names, tensor_faults
from export.model import ModelConfig, Transformer
from serving.errors import CheckpointError
from serving.manifest import LanguagePair, LanguageTokens, TokenizerSpec
from tests.support import (
    SAMPLE_LINES,
    TINY_VOCAB_SIZE,
    TOKENIZER_NAME,
    tiny_config,
    tiny_model,
    tiny_sentencepiece,
    train_sentencepiece,
    write_tiny_checkpoint,
)

EMBEDDING = "decoder.embedding.tokens.weight"
SPEC = TokenizerSpec(kind="sentencepiece", source_model=TOKENIZER_NAME, target_model=TOKENIZER_NAME)
VARIATIONS = [
    pytest.param(tiny_config(), id="all shared"),
    pytest.param(tiny_config(share_embeddings=False), id="output tied, embeddings apart"),
    pytest.param(tiny_config(tie_output=False, output_bias=True), id="embeddings shared, output apart"),
    pytest.param(tiny_config(share_embeddings=False, tie_output=False), id="nothing shared"),
    pytest.param(tiny_config(positions="learned", max_positions=20), id="learned positions"),
    pytest.param(tiny_config(norm="pre", embedding_norm=True, bias=False), id="pre-norm without biases"),
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "checkpoint")


def faults_of(directory: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError, match=r"checkpoint .* cannot be used") as caught:
        read_checkpoint(directory)
    return caught.value.faults


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def write(directory: Path, **changes: Any) -> None:
    """``write_native_checkpoint`` of the tiny model, with some arguments changed."""
    tokenizer_path = directory.parent / TOKENIZER_NAME
    tokenizer_path.write_bytes(tiny_sentencepiece())
    model = tiny_model()
    arguments: dict[str, Any] = {
        "name": "tiny",
        "config": model.config,
        "state_dict": model.state_dict(),
        "languages": [LanguagePair(source="en", target="de")],
        "tokenizer": SPEC,
        "tokenizer_files": {TOKENIZER_NAME: tokenizer_path},
    }
    write_native_checkpoint(directory, **{**arguments, **changes})


def test_what_is_written_is_read(directory: Path) -> None:
    checkpoint = read_checkpoint(directory)
    assert checkpoint.name == "tiny"
    assert checkpoint.config == tiny_config()
    assert checkpoint.languages == [LanguagePair(source="en", target="de")]
    assert checkpoint.tokenizer == SPEC
    assert checkpoint.tokenizer_files == {TOKENIZER_NAME: directory / TOKENIZER_NAME}
    assert (directory / TOKENIZER_NAME).read_bytes() == tiny_sentencepiece()
    assert checkpoint.sample_lines == list(SAMPLE_LINES)
    assert checkpoint.weights_sha256 == hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("config", VARIATIONS)
def test_the_module_survives_its_checkpoint(tmp_path: Path, config: ModelConfig) -> None:
    written = tiny_model(config, seed=5)
    model = build_model(read_checkpoint(write_tiny_checkpoint(tmp_path / "checkpoint", config, seed=5)))
    assert not model.training
    assert model.config == config
    state = model.state_dict()
    assert state.keys() == written.state_dict().keys()
    for name, tensor in written.state_dict().items():
        assert torch.equal(state[name], tensor), name
    source_ids, target_ids = torch.tensor([[5, 9, 13, 3]]), torch.tensor([[2, 40, 8]])
    lengths = torch.tensor([4])
    assert torch.equal(model(source_ids, lengths, target_ids), written(source_ids, lengths, target_ids))


@pytest.mark.parametrize("config", VARIATIONS)
def test_what_is_shared_is_stored_once_and_shared_again(tmp_path: Path, config: ModelConfig) -> None:
    directory = write_tiny_checkpoint(tmp_path / "checkpoint", config)
    model = build_model(read_checkpoint(directory))
    # The module itself tells what is shared: names with the same memory.
    state = model.state_dict(keep_vars=True)
    own_names = {tensor.data_ptr(): name for name, tensor in state.items() if name not in shared_names(config)}
    assert len(own_names) == len(state) - len(shared_names(config))
    assert {name: own_names[state[name].data_ptr()] for name in shared_names(config)} == shared_names(config)
    assert load_file(directory / "model.safetensors").keys() == set(own_names.values())


def test_a_shared_matrix_goes_by_the_target_embeddings_name() -> None:
    assert shared_names(tiny_config()) == {"encoder.embedding.tokens.weight": EMBEDDING, "output.weight": EMBEDDING}
    assert shared_names(tiny_config(share_embeddings=False)) == {"output.weight": EMBEDDING}
    assert shared_names(tiny_config(tie_output=False)) == {"encoder.embedding.tokens.weight": EMBEDDING}
    assert shared_names(tiny_config(share_embeddings=False, tie_output=False)) == {}


def test_only_learned_positions_are_stored() -> None:
    assert "encoder.embedding.position_table" not in expected_shapes(tiny_config())
    learned = expected_shapes(tiny_config(positions="learned", max_positions=20))
    assert learned["encoder.embedding.position_table"] == learned["decoder.embedding.position_table"] == (20, 16)


def test_half_precision_is_stored_and_read_as_float32(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "checkpoint", dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(directory / "model.safetensors").values()} == {torch.float16}
    checkpoint = read_checkpoint(directory)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float32}
    exact = tiny_model().state_dict()
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(tensor, exact[name].half().float()), name


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_tiny_checkpoint(tmp_path / name) for name in ("first", "second"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_each_side_may_have_its_own_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(train_sentencepiece(vocab_size=60))
    config = tiny_config(share_embeddings=False, target_vocab_size=60)
    tokenizer = TokenizerSpec(kind="sentencepiece", source_model=TOKENIZER_NAME, target_model="target.model")
    files = {TOKENIZER_NAME: tmp_path / TOKENIZER_NAME, "target.model": tmp_path / "target"}
    directory = tmp_path / "checkpoint"
    state = tiny_model(config).state_dict()
    write(directory, config=config, state_dict=state, tokenizer=tokenizer, tokenizer_files=files)
    checkpoint = read_checkpoint(directory)
    assert list(checkpoint.tokenizer_files) == [TOKENIZER_NAME, "target.model"]
    assert build_model(checkpoint).output.weight.shape == (60, 16)


def test_samples_are_optional_and_blank_lines_are_none(directory: Path) -> None:
    (directory / "samples.txt").write_text("a man\u2028runs\n\n  \ntwo dogs", encoding="utf-8")
    assert read_checkpoint(directory).sample_lines == ["a man\u2028runs", "two dogs"]
    (directory / "samples.txt").unlink()
    assert read_checkpoint(directory).sample_lines == []


def test_other_files_are_ignored_and_links_followed(directory: Path, tmp_path: Path) -> None:
    (directory / "README.md").write_text("a model card")
    (tmp_path / "weights").write_bytes((directory / "model.safetensors").read_bytes())
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to(tmp_path / "weights")
    assert read_checkpoint(directory).name == "tiny"


def test_a_directory_that_is_missing(tmp_path: Path) -> None:
    assert faults_of(tmp_path / "none") == ("there is no such file or directory",)


@pytest.mark.parametrize("config", [None, "{}", '{"architectures": ["MarianMTModel"]}'], ids=["empty", "other", "no type"])
def test_an_unknown_format_is_told_the_known_ones(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    faults = faults_of(tmp_path)
    told = "\n".join(faults[faults.index("it is of no known format, which are:") :])
    for known in ('native (config.json with "format": "onnxlate-checkpoint"', '"model_type": "marian"', "CTranslate2 (model.bin"):
        assert known in told


def test_a_config_that_is_cut(directory: Path) -> None:
    path = directory / "config.json"
    path.write_bytes(path.read_bytes()[:-10])
    (fault,) = faults_of(directory)
    assert fault.startswith("config.json: is not JSON: ")


def test_another_revision(directory: Path) -> None:
    edit_config(directory, lambda document: document.update(format_revision=2, novelty=True))
    assert faults_of(directory) == (
        "config.json: format_revision: 2 is not supported (supported: 1); read it with a version of onnxlate that knows it",
    )


def test_every_wrong_field_of_the_config_is_named(directory: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        del document["name"]
        document["novelty"] = 1
        document["languages"][0]["source"] = ""
        document["tokenizer"]["kind"] = "words"
        document["model"]["depth"] = 6
        document["model"]["norm"] = "middle"

    edit_config(directory, change)
    assert sorted(fault.removeprefix("config.json: ").partition(": ")[0] for fault in faults_of(directory)) == [
        "languages.0.source",
        "model.depth",
        "model.norm",
        "name",
        "novelty",
        "tokenizer.kind",
    ]


def test_a_model_that_contradicts_itself(directory: Path) -> None:
    edit_config(directory, lambda document: document["model"].update(num_heads=3))
    (fault,) = faults_of(directory)
    assert fault == "config.json: model: Value error, d_model 16 is not a multiple of num_heads 3"


def test_a_tokenizer_outside_the_directory(directory: Path) -> None:
    edit_config(directory, lambda document: document["tokenizer"].update(target_model="../other.model"))
    assert faults_of(directory) == ("'../other.model': is not a plain file name; nothing outside the directory is read",)


def test_a_tokenizer_that_is_none(directory: Path) -> None:
    (directory / TOKENIZER_NAME).write_bytes(b"no model")
    (fault,) = faults_of(directory)
    assert fault.startswith("sentencepiece.model: is no SentencePiece model")


def test_a_tokenizer_that_does_not_fit(directory: Path) -> None:
    (directory / TOKENIZER_NAME).write_bytes(train_sentencepiece(vocab_size=60))
    assert faults_of(directory) == (
        "tokenizer: its source model has 60 pieces, the source vocabulary 64",
        "tokenizer: its target model has 60 pieces, the target vocabulary 64",
    )


@pytest.mark.parametrize("contents", [b"", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{}      "[:-2]], ids=["empty", "noise", "cut"])
def test_weights_that_cannot_be_read(directory: Path, contents: bytes) -> None:
    (directory / "model.safetensors").write_bytes(contents)
    (fault,) = faults_of(directory)
    assert fault.startswith("model.safetensors: cannot be read: ")


def test_samples_that_are_no_text(directory: Path) -> None:
    (directory / "samples.txt").write_bytes(b"a man\xff")
    (fault,) = faults_of(directory)
    assert fault.startswith("samples.txt: cannot be read: 'utf-8' codec")


def test_every_missing_file_is_named_at_once(directory: Path) -> None:
    (directory / TOKENIZER_NAME).unlink()
    (directory / "model.safetensors").unlink()
    assert faults_of(directory) == ("sentencepiece.model: is missing", "model.safetensors: is missing")


def spoil(tensors: dict[str, Tensor]) -> None:
    """One tensor of each fault."""
    del tensors["encoder.layers.1.feed_forward.inner.bias"]
    tensors["decoder.layers.9.feed_forward.inner.bias"] = torch.zeros(24)
    tensors["output.weight"] = torch.zeros(64, 16)
    tensors["decoder.layers.0.feed_forward.outer.weight"] = torch.zeros(24, 16)
    tensors["encoder.layers.0.feed_forward.outer.bias"][[2, 5]] = torch.tensor([torch.nan, torch.inf])
    tensors["encoder.layers.0.feed_forward.inner.bias"] = torch.zeros(32, dtype=torch.int64)


SPOILT = {
    "encoder.layers.1.feed_forward.inner.bias: missing, expected [32]",
    "decoder.layers.9.feed_forward.inner.bias: extra [24]",
    "output.weight: extra [64, 16]; it is shared, and stored as decoder.embedding.tokens.weight only",
    "decoder.layers.0.feed_forward.outer.weight: shape [24, 16], expected [16, 24]",
    "encoder.layers.0.feed_forward.outer.bias: 2 of 16 values are not finite",
    "encoder.layers.0.feed_forward.inner.bias: of type torch.int64, "
    "expected one of torch.float16, torch.bfloat16, torch.float32, torch.float64",
}


def test_every_wrong_tensor_is_named_beside_the_other_faults(directory: Path) -> None:
    edit_tensors(directory, spoil)
    (directory / TOKENIZER_NAME).unlink()
    (directory / "samples.txt").write_bytes(b"\xff")
    faults = faults_of(directory)
    assert len(faults) == len(SPOILT) + 2
    assert faults[0] == "sentencepiece.model: is missing"
    assert set(faults[1:-1]) == {f"model.safetensors: {fault}" for fault in SPOILT}
    assert faults[-1].startswith("samples.txt: ")


def test_a_model_has_the_tensors_themselves_and_shares_what_is_shared(directory: Path) -> None:
    checkpoint = read_checkpoint(directory)
    model = build_model(checkpoint)
    for name, tensor in model.state_dict().items():
        own = shared_names(checkpoint.config).get(name, name)
        assert tensor.data_ptr() == checkpoint.tensors[own].data_ptr(), name
    assert model.output.weight is model.decoder.embedding.tokens.weight is model.encoder.embedding.tokens.weight
    assert not [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]


def test_values_that_are_not_finite_are_counted_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(7, 5)
    tensor[0, 0], tensor[3, 1], tensor[6, 4] = torch.inf, -torch.inf, torch.nan
    for values_at_once in (1, 5, 10, 12, 100):
        monkeypatch.setattr("export.checkpoint.base._VALUES_AT_ONCE", values_at_once)
        assert not_finite(tensor) == not_finite(tensor.t()) == 3
        assert not_finite(tensor.flatten()) == 3
    assert not_finite(torch.zeros(0, 5)) == not_finite(torch.tensor(1.0)) == 0
    assert not_finite(torch.tensor(torch.nan)) == 1


def test_build_model_names_every_wrong_tensor(directory: Path) -> None:
    checkpoint = read_checkpoint(directory)
    spoil(checkpoint.tensors)
    with pytest.raises(CheckpointError, match="checkpoint tiny cannot be used") as caught:
        build_model(checkpoint)
    assert set(caught.value.faults) == SPOILT


def test_no_tensor_at_all_names_them_all() -> None:
    config = tiny_config()
    assert len(tensor_faults(config, {})) == len(expected_shapes(config)) == len(Transformer(config).state_dict()) - 2


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        pytest.param(
            {"dtype": torch.bfloat16},
            "model.safetensors: weights are stored as float16 or float32, not as torch.bfloat16",
            id="type",
        ),
        pytest.param({"tokenizer_files": {}}, "sentencepiece.model: not among tokenizer_files", id="tokenizer"),
        pytest.param({"samples": ["one\ntwo"]}, r"samples.txt: a sample has more than one line: 'one\ntwo'", id="two lines"),
        pytest.param(
            {"state_dict": {**tiny_model().state_dict(), "output.weight": torch.zeros(TINY_VOCAB_SIZE, 16)}},
            "output.weight: is shared with decoder.embedding.tokens.weight, and differs from it",
            id="shared, and different",
        ),
        pytest.param(
            {"state_dict": {**tiny_model().state_dict(), "decoder.layers.0.feed_forward.inner.bias": torch.full((24,), 1e6)}},
            "decoder.layers.0.feed_forward.inner.bias: 24 of 24 values are not finite",
            id="too large for float16",
        ),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be used") as caught:
        write(tmp_path / "checkpoint", **changes)
    assert caught.value.faults == (fault,)
    assert not (tmp_path / "checkpoint").exists()


def test_all_that_could_not_be_read_again_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be used") as caught:
        write(tmp_path / "checkpoint", state_dict={}, tokenizer_files={}, samples=["one\ntwo"])
    assert len(caught.value.faults) == len(expected_shapes(tiny_config())) + 2


def test_a_tokenizer_file_may_be_in_its_place_already(directory: Path) -> None:
    write(directory, tokenizer_files={TOKENIZER_NAME: directory / TOKENIZER_NAME}, name="again")
    checkpoint: Checkpoint = read_checkpoint(directory)
    assert checkpoint.name == "again"
    assert (directory / TOKENIZER_NAME).read_bytes() == tiny_sentencepiece()


PAIRS = [LanguagePair(source="en", target="de"), LanguagePair(source="de", target="fr")]


def test_languages_that_the_user_states(directory: Path) -> None:
    assert with_languages(read_checkpoint(directory), PAIRS).languages == PAIRS


@pytest.mark.parametrize(
    ("places", "codes", "unknown"),
    [
        ({"before_source": "source", "before_target": True}, ("de", "en", "fr"), None),
        ({"before_source": "source", "before_target": True}, ("de", "fr"), "'en'"),
        ({"before_source": "target", "before_target": False}, ("de", "fr"), None),
        ({"before_source": "target", "before_target": False}, (), "'de', 'fr'"),
        ({"before_source": None, "after_source": "source", "before_target": True}, ("de", "fr"), "'en'"),
        ({"before_source": "source", "before_target": False}, ("de", "en"), None),
    ],
)
def test_languages_of_a_model_that_is_told_them_by_tokens(
    directory: Path, places: dict[str, Any], codes: tuple[str, ...], unknown: str | None
) -> None:
    tokens = LanguageTokens(tokens={code: i for i, code in enumerate(codes)}, **places)
    checkpoint = replace(read_checkpoint(directory), language_tokens=tokens, languages=[])
    if unknown is None:
        assert with_languages(checkpoint, PAIRS).languages == PAIRS
        return
    with pytest.raises(CheckpointError, match=f"languages: the model has no token for {unknown}$"):
        with_languages(checkpoint, PAIRS)
