from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers

from serving.bundle import Bundle
from serving.errors import BundleError
from serving.inspection import describe
from serving.manifest import AnyTokenizerSpec, Manifest
from serving.tokenizers import load_tokenizer, open_tokenizer
from tests.serving.test_bundle import manifest_fields
from tests.support import tiny_sentencepiece
from tests.vocabularies import marian_vocabulary

MOSES = {
    "source_language": "en",
    "target_language": "en",
    "normalize_punctuation": False,
    "aggressive_dash_splits": True,
    "escape": True,
}
SPECS: dict[str, dict[str, Any]] = {
    "sentencepiece": {"source_model": "one.model", "target_model": "one.model"},
    "marian": {
        "source_model": "one.model",
        "target_model": "one.model",
        "source_vocabulary": "pieces.json",
        "target_vocabulary": "pieces.json",
    },
    "tokens": {
        "source_vocabulary": "words.json",
        "target_vocabulary": "words.json",
        "unknown_id": 1,
        "special_tokens": ["</s>"],
    },
    "hugging_face": {"tokenizer": "tokenizer.json"},
    "subword_nmt": {
        "source_codes": "codes",
        "source_vocabulary": "words.json",
        "target_vocabulary": "words.json",
        "unknown_id": 1,
        "special_tokens": ["</s>"],
        "moses": MOSES,
    },
}
FILE_NAMES = {
    "sentencepiece": ["one.model"],
    "marian": ["one.model", "pieces.json"],
    "tokens": ["words.json"],
    "hugging_face": ["tokenizer.json"],
    "subword_nmt": ["codes", "words.json"],
}
WORDS = {"</s>": 0, "<unk>": 1, "two": 2, "dogs": 3, "play": 4, "t@@": 5, "w@@": 6, "o": 7}
KINDS = TypeAdapter[Any](AnyTokenizerSpec)


def contents() -> dict[str, bytes]:
    library = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["</s>"])
    return {
        "one.model": tiny_sentencepiece(),
        "pieces.json": json.dumps(marian_vocabulary(tiny_sentencepiece())).encode(),
        "words.json": json.dumps(WORDS).encode(),
        "tokenizer.json": library.to_str().encode(),
        "codes": b"#version: 0.2\nt w\ntw o</w>\nd o\ndo g\ndog s</w>\np l\npl a\npla y</w>\n",
    }


def bundle_of(directory: Path, kind: str, **changes: Any) -> Bundle:
    for name in FILE_NAMES[kind]:
        (directory / name).write_bytes(contents()[name])
    fields = manifest_fields()
    fields["tokenizer"] = {"kind": kind, **SPECS[kind], **changes}
    return Bundle(directory, Manifest.model_validate_json(json.dumps(fields)))


@pytest.mark.parametrize("kind", SPECS)
def test_a_bundles_tokenizer_is_of_the_kind_that_its_manifest_states(kind: str, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, kind)
    assert bundle.manifest.tokenizer.file_names == FILE_NAMES[kind]
    assert f"{kind} ({', '.join(FILE_NAMES[kind])})" in describe(bundle.manifest)
    tokenizer = load_tokenizer(bundle)
    ids = tokenizer.encode("two dogs play")
    assert ids != []
    assert tokenizer.decode([*ids, bundle.manifest.ids.eos] if kind == "sentencepiece" else [*ids, 0]) == "two dogs play"
    assert "two dogs play".startswith(tokenizer.certain_text(ids))


@pytest.mark.parametrize("kind", SPECS)
def test_files_and_their_contents_make_the_same_tokenizer(kind: str, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, kind)
    of_contents = open_tokenizer(bundle.manifest.tokenizer, contents())
    for text in ("two dogs play", "two cats", ""):
        assert of_contents.encode(text) == load_tokenizer(bundle).encode(text)


@pytest.mark.parametrize("kind", SPECS)
def test_a_missing_file_is_named(kind: str, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, kind)
    (tmp_path / FILE_NAMES[kind][-1]).unlink()
    with pytest.raises(BundleError, match=FILE_NAMES[kind][-1]):
        load_tokenizer(bundle)


@pytest.mark.parametrize("kind", ["tokens", "hugging_face", "subword_nmt"])
def test_load_tokenizer_refuses_another_models_tokenizer(kind: str, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, kind)
    fields = bundle.manifest.model_dump()
    fields["architecture"] |= {"source_vocab_size": 4}
    with pytest.raises(BundleError, match="its source vocabulary has ids up to 7, the model's vocabulary is of 4"):
        load_tokenizer(Bundle(tmp_path, Manifest.model_validate(fields)))


@pytest.mark.parametrize(("kind", "package"), [("hugging_face", "tokenizers"), ("subword_nmt", "sacremoses")])
def test_a_bundle_whose_library_is_not_installed(
    kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BundleError, match=r"pip install 'onnxlate\[tokenizers\]'"):
        load_tokenizer(bundle_of(tmp_path, kind))


@pytest.mark.parametrize(
    ("kind", "changes", "field"),
    [
        ("tokens", {"unknown_id": -1}, "unknown_id"),
        ("tokens", {"unknown_id": "1"}, "unknown_id"),
        ("tokens", {"special_tokens": [""]}, "special_tokens"),
        ("tokens", {"moses": None}, "moses"),
        ("marian", {"special_tokens": "<mask>"}, "special_tokens"),
        ("hugging_face", {"tokenizer": ""}, "tokenizer"),
        ("subword_nmt", {"moses": {**MOSES, "truecase": True}}, "truecase"),
        ("subword_nmt", {"moses": {**MOSES, "escape": "yes"}}, "escape"),
        ("subword_nmt", {"moses": {**MOSES, "source_language": ""}}, "source_language"),
    ],
)
def test_a_spec_with_a_faulty_field_is_refused(kind: str, changes: dict[str, Any], field: str) -> None:
    KINDS.validate_python({"kind": kind, **SPECS[kind]})
    with pytest.raises(ValidationError, match=field):
        KINDS.validate_python({"kind": kind, **SPECS[kind], **changes})


@pytest.mark.parametrize(
    ("kind", "field"), [("tokens", "special_tokens"), ("subword_nmt", "special_tokens"), ("subword_nmt", "moses")]
)
def test_what_is_easily_forgotten_has_to_be_stated(kind: str, field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        KINDS.validate_python({"kind": kind} | {name: value for name, value in SPECS[kind].items() if name != field})


def test_optional_libraries_are_imported_for_the_kinds_that_need_them_alone() -> None:
    code = "import sys, serving.server, serving.tokenizers; print({'tokenizers', 'sacremoses'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
