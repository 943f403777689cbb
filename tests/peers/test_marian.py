"""Marian directories as Hugging Face reads them and as we do: the same ids, the same text, the same translations.

The models are those that lie beside the repository: a trained one in the OPUS-MT format, and the configuration and tokenizer of a
real OPUS-MT model, with random weights. One is made here, with vocabularies and embeddings apart.
"""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from export.checkpoint import build_model, read_checkpoint
from serving.request import DecodingOptions
from serving.tokenizers import open_tokenizer
from tests.peers.subject import Subject
from tests.support import ENGLISH_LINES, GERMAN_LINES, tiny_sentencepiece, train_sentencepiece
from tests.vocabularies import marian_vocabulary

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed; make test-peers does it")

pytestmark = pytest.mark.slow

SHARED = Path(__file__).parents[3] / "shared"
CAPTIONS = SHARED / "data" / "multi30k" / "test_2016_flickr.en.gz"
REAL = {"trained": SHARED / "models" / "multi30k-base-en-de", "en-mg": SHARED / "data" / "opus-mt-en-mg"}
LOGIT_TOLERANCE = 1e-3
SENTENCES = 50


def there(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"not there: {path.relative_to(SHARED.parent)} beside the repository")
    return path


def captions() -> list[str]:
    return gzip.decompress(there(CAPTIONS).read_bytes()).decode().splitlines()


def tokenizer_of(directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
        return transformers.MarianTokenizer.from_pretrained(directory)


def random_marian(directory: Path, config: Any) -> Path:
    """A model of random weights, bias included, beside its tokenizer, as Hugging Face writes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.MarianMTModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
            model.final_logits_bias.normal_()
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def en_mg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("opus-mt-en-mg")
    for path in there(REAL["en-mg"]).iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return random_marian(directory, transformers.MarianConfig.from_pretrained(directory))


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two vocabularies, two embeddings, another activation; the output tied."""
    directory = tmp_path_factory.mktemp("apart")
    models = {"source": tiny_sentencepiece(), "target": train_sentencepiece(GERMAN_LINES, vocab_size=50)}
    vocabularies = {side: marian_vocabulary(model) for side, model in models.items()}
    pad_id = len(vocabularies["target"]) - 1
    # Padding has one id on both sides.
    vocabularies["source"] = {piece: i + (i >= pad_id) for piece, i in vocabularies["source"].items() if piece != "<pad>"}
    vocabularies["source"]["<pad>"] = pad_id
    for side, model in models.items():
        (directory / f"{side}.spm").write_bytes(model)
    (directory / "vocab.json").write_text(json.dumps(vocabularies["source"]))
    (directory / "target_vocab.json").write_text(json.dumps(vocabularies["target"]))
    (directory / "tokenizer_config.json").write_text(json.dumps({"separate_vocabs": True, "tokenizer_class": "MarianTokenizer"}))
    config = transformers.MarianConfig(
        vocab_size=len(vocabularies["source"]),
        decoder_vocab_size=len(vocabularies["target"]),
        share_encoder_decoder_embeddings=False,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=48,
        activation_function="gelu",
        max_position_embeddings=64,
        pad_token_id=pad_id,
        decoder_start_token_id=pad_id,
        eos_token_id=0,
        forced_eos_token_id=None,
        init_std=0.5,
        bad_words_ids=[[pad_id]],
    )
    return random_marian(directory, config)


def directory_of(name: str, request: pytest.FixtureRequest) -> Path:
    return there(REAL["trained"]) if name == "trained" else request.getfixturevalue(name)


@pytest.mark.parametrize("name", ["trained", "en_mg"])
def test_ids_and_text_are_the_same(name: str, request: pytest.FixtureRequest) -> None:
    directory = directory_of(name, request)
    theirs, checkpoint = tokenizer_of(directory), read_checkpoint(directory)
    ours = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    lines = captions()
    assert len(lines) == 1000
    odd = [
        "Ж 漢字 \U0001f600 ﬁ ½",
        "tab\tand  two spaces ",
        "a\u200bb",
        "ДЖ☃☃☃ x",
        "a\0b\x07",
        "",
        "   ",
        "(\"'«»\u2019",
        "\u05d0\u05d1 \u0627",
    ]
    for line in [*lines, *odd]:
        ids = [*ours.encode(line), checkpoint.config.eos_id]
        assert ids == theirs(line)["input_ids"], line
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), line


@pytest.mark.parametrize("name", ["trained", "en_mg"])
def test_text_of_any_ids_is_the_same(name: str, request: pytest.FixtureRequest) -> None:
    directory = directory_of(name, request)
    theirs, checkpoint = tokenizer_of(directory), read_checkpoint(directory)
    ours = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    for ids in torch.randint(checkpoint.config.target_vocab_size, (500, 12), generator=torch.Generator().manual_seed(0)).tolist():
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids


@pytest.mark.parametrize("name", ["trained", "en_mg", "apart"])
def test_logits_are_the_same(name: str, request: pytest.FixtureRequest) -> None:
    directory = directory_of(name, request)
    checkpoint = read_checkpoint(directory)
    config = checkpoint.config
    theirs = transformers.MarianMTModel.from_pretrained(directory, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    source_ids = torch.randint(config.source_vocab_size, (3, 17), generator=generator)
    target_ids = torch.randint(config.target_vocab_size, (3, 11), generator=generator)
    lengths = torch.tensor([17, 4, 9])
    mask = (torch.arange(17) < lengths[:, None]).long()
    with torch.no_grad():
        mine = build_model(checkpoint)(source_ids, lengths, target_ids)
        its = theirs(input_ids=source_ids, attention_mask=mask, decoder_input_ids=target_ids).logits
    assert mine.std() > 0.1
    assert (mine - its).abs().max() <= LOGIT_TOLERANCE


@pytest.fixture(scope="module", params=["trained", "apart"])
def translated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Any, list[list[int]]]:
    """Our engine, Hugging Face's model, and sources with the end-of-sentence token, all of one directory."""
    directory, work = directory_of(request.param, request), tmp_path_factory.mktemp(f"marian-{request.param}")
    # With samples, so that the certificate takes no long wanderings of ids that mean nothing.
    lines = captions()[:SENTENCES] if request.param == "trained" else [*ENGLISH_LINES]
    copy = work / "checkpoint"
    copy.mkdir()
    for path in directory.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "samples.txt").write_text("\n".join(lines[:4]))
    subject = Subject(copy, work)
    checkpoint = subject.checkpoint
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    sources = [[*tokenizer.encode(line), checkpoint.config.eos_id] for line in lines]
    return subject, transformers.MarianMTModel.from_pretrained(directory, dtype=torch.float32).eval(), sources


@pytest.mark.parametrize("beam_size", [1, 4])
def test_translations_are_the_same(translated: tuple[Subject, Any, list[list[int]]], beam_size: int) -> None:
    subject, marian, sources = translated
    config = subject.checkpoint.config
    options = DecodingOptions(beam_size=beam_size, max_target_tokens=60)
    answers = subject.decode([tuple(source) for source in sources], options)
    for source, (best,) in zip(sources, answers, strict=True):
        generated = marian.generate(
            torch.tensor([source]),
            num_beams=beam_size,
            do_sample=False,
            max_new_tokens=60,
            forced_eos_token_id=None,
            bad_words_ids=[[config.pad_id]],
            renormalize_logits=True,
        )
        theirs = [token_id for token_id in generated[0, 1:].tolist() if token_id != config.eos_id]
        assert list(best.target_ids) == theirs
