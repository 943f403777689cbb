"""BART and its descendants as Hugging Face reads them and as we do: the same ids, the same text, the same translations.

Each is made here, with random weights and a tokenizer trained on a few sentences, and written by Hugging Face.
"""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from export.checkpoint import build_model, read_checkpoint
from export.checkpoint.base import Checkpoint
from serving.request import DecodingOptions
from serving.tokenizers import ModelTokenizer, open_tokenizer
from tests.peers.subject import Subject
from tests.support import ENGLISH_LINES, SAMPLE_LINES, TINY_LINES, score_of

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed; make test-peers does it")
tokenizers: Any = pytest.importorskip("tokenizers", reason="tokenizers is not installed; make test-peers does it")

pytestmark = pytest.mark.slow

LOGIT_TOLERANCE = 1e-3
SCORE_TOLERANCE = 1e-3
SOURCES = 200
# Sources that Hugging Face pads and decodes together.
BATCH = 50
MAX_TARGET_TOKENS = 24
# No white space at the end: newer tokenizers make a piece of it, SentencePiece, with which the models were trained, does not.
ODD = ["Ж 漢字 ﬁ ½", "tab\tand  two spaces", "x \U0001f600 y", "ball", "a\u2013b \u201cc\u201d", "   a"]


def train(model_type: str, **options: Any) -> bytes:
    """A SentencePiece model."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TINY_LINES),
        model_writer=stream,
        vocab_size=200,
        model_type=model_type,
        num_threads=1,
        minloglevel=3,
        **options,
    )
    return stream.getvalue()


def fairseq_sentencepiece(directory: Path, model_type: str) -> bytes:
    """``sentencepiece.bpe.model`` in a directory, with special pieces numbered as fairseq's models number them."""
    serialized = train(model_type, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    (directory / "sentencepiece.bpe.model").write_bytes(serialized)
    return serialized


def write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document))


def m2m100(directory: Path) -> int:
    model = sentencepiece.SentencePieceProcessor(model_proto=fairseq_sentencepiece(directory, "bpe"))
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *(model.id_to_piece(i) for i in range(3, model.get_piece_size()))]
    write_json(directory / "vocab.json", {piece: i for i, piece in enumerate(pieces)})
    tokenizer = transformers.M2M100Tokenizer(directory / "vocab.json", directory / "sentencepiece.bpe.model", src_lang="en")
    tokenizer.save_pretrained(directory)
    return len(pieces) + 100 + 8


def nllb(directory: Path) -> int:
    """Its ``tokenizer.json`` alone."""
    fairseq_sentencepiece(directory, "bpe")
    codes = ["ace_Latn", "deu_Latn", "eng_Latn", "fra_Latn"]
    write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "NllbTokenizer", "additional_special_tokens": codes, "src_lang": "eng_Latn"},
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.save_pretrained(directory)
    os.remove(directory / "sentencepiece.bpe.model")
    return len(tokenizer) + 3


def nllb_sentencepiece(directory: Path) -> int:
    """Its SentencePiece model too, as older versions wrote them."""
    size = nllb(directory)
    fairseq_sentencepiece(directory, "bpe")
    return size


def mbart50(directory: Path) -> int:
    """Its ``tokenizer.json`` alone."""
    fairseq_sentencepiece(directory, "unigram")
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "MBart50Tokenizer", "src_lang": "en_XX"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.save_pretrained(directory)
    os.remove(directory / "sentencepiece.bpe.model")
    return len(tokenizer)


def mbart50_sentencepiece(directory: Path) -> int:
    size = mbart50(directory)
    fairseq_sentencepiece(directory, "unigram")
    return size


def bart(directory: Path) -> int:
    """Its ``vocab.json`` and ``merges.txt``."""
    library = tokenizers.ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    library.train_from_iterator(TINY_LINES, vocab_size=400, special_tokens=specials, show_progress=False)
    library.save_model(str(directory))
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "BartTokenizer"})
    size: int = library.get_vocab_size()
    return size


def bart_json(directory: Path) -> int:
    """Its ``tokenizer.json`` alone."""
    size = bart(directory)
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    for name in ("vocab.json", "merges.txt"):
        (directory / name).unlink(missing_ok=True)
    return size


def pegasus(directory: Path) -> int:
    """Its SentencePiece model, and its ``tokenizer.json``, which Hugging Face reads instead."""
    serialized = train("unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (directory / "spiece.model").write_bytes(serialized)
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PegasusTokenizer"})
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    (directory / "spiece.model").write_bytes(serialized)
    return 200 + 103


@dataclass(frozen=True)
class Kind:
    """One kind of directory, and how Hugging Face makes such a model."""

    tokenizer: Callable[[Path], int]
    prefix: str
    # (source, target) languages; None of a model that is told none.
    pairs: tuple[tuple[str, str] | None, ...]
    settings: dict[str, Any]
    # The token that ``generate`` makes every target start with.
    forced: int | None = None


M2M100_SETTINGS = {"activation_function": "relu", "scale_embedding": True, "decoder_start_token_id": 2}
MBART_SETTINGS = {"activation_function": "gelu", "scale_embedding": True, "decoder_start_token_id": 2}
NLLB_PAIRS = (("eng_Latn", "deu_Latn"), ("deu_Latn", "fra_Latn"), ("ace_Latn", "eng_Latn"))
MBART_PAIRS = (("en_XX", "de_DE"), ("fr_XX", "en_XX"))
KINDS = {
    "m2m100": Kind(m2m100, "M2M100", (("en", "de"), ("de", "fr"), ("zu", "af")), M2M100_SETTINGS),
    "nllb": Kind(nllb, "M2M100", NLLB_PAIRS, M2M100_SETTINGS),
    "nllb-sentencepiece": Kind(nllb_sentencepiece, "M2M100", NLLB_PAIRS, {**M2M100_SETTINGS, "activation_function": "gelu_new"}),
    "mbart50": Kind(mbart50, "MBart", MBART_PAIRS, MBART_SETTINGS),
    "mbart50-sentencepiece": Kind(
        mbart50_sentencepiece,
        "MBart",
        MBART_PAIRS,
        {**MBART_SETTINGS, "activation_function": "quick_gelu", "tie_word_embeddings": False},
    ),
    "bart": Kind(bart, "Bart", (None,), {}, forced=0),
    "bart-json": Kind(bart_json, "Bart", (None,), {"scale_embedding": True}),
    "pegasus": Kind(pegasus, "Pegasus", (None,), {"activation_function": "relu"}),
}


@dataclass
class Peers:
    """Our reading of a directory, and Hugging Face's."""

    subject: Subject
    model: Any
    tokenizer: Any
    pairs: tuple[tuple[str, str] | None, ...]

    @property
    def checkpoint(self) -> Checkpoint:
        return self.subject.checkpoint

    @property
    def ours(self) -> ModelTokenizer:
        return open_tokenizer(self.checkpoint.tokenizer, self.checkpoint.tokenizer_files)

    def source(self, text: str, pair: tuple[str, str] | None) -> list[int]:
        """A source as a bundle makes it."""
        told, first = self.checkpoint.language_tokens, list(self.checkpoint.source_prefix)
        if pair is not None:
            assert told is not None
            assert told.before_source == "source"
            first.append(told.tokens[pair[0]])
        return [*first, *self.ours.encode(text), self.checkpoint.config.eos_id]


def write_model(directory: Path, kind: Kind) -> Any:
    """A model of random weights, biases and norms too."""
    size = kind.tokenizer(directory)
    config = getattr(transformers, f"{kind.prefix}Config")(
        vocab_size=size,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=48,
        max_position_embeddings=96,
        **kind.settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = getattr(transformers, f"{kind.prefix}ForConditionalGeneration")(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                elif "embed_positions" not in name:
                    parameter.normal_(std=0.1 if "shared" in name or "embed_tokens" in name or "lm_head" in name else 0.5)
            # Clear decisions of small embeddings: large ones would make a target say its last token for ever.
            norm = "layers.0.final_layer_norm" if kind.prefix == "Bart" else "layer_norm"
            model.get_parameter(f"model.decoder.{norm}.weight").mul_(4)
            if kind.prefix != "M2M100":
                model.final_logits_bias.normal_()
    model.generation_config.forced_bos_token_id = kind.forced
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module", params=KINDS)
def peers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Peers:
    kind, work = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    directory = work / "checkpoint"
    directory.mkdir()
    write_model(directory, kind)
    # So that the certificate takes no long wanderings of ids that mean nothing.
    (directory / "samples.txt").write_text("\n".join(SAMPLE_LINES[:2]))
    model, info = getattr(transformers, f"{kind.prefix}ForConditionalGeneration").from_pretrained(
        directory, output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.generation_config.forced_bos_token_id == kind.forced
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    subject = Subject(directory, work)
    assert subject.checkpoint.target_prefix == (() if kind.forced is None else (kind.forced,))
    return Peers(subject, model.eval(), tokenizer, kind.pairs)


def test_ids_are_the_same(peers: Peers) -> None:
    for pair in peers.pairs:
        if pair is not None:
            peers.tokenizer.src_lang = pair[0]
        for text in (*TINY_LINES, *ODD):
            assert peers.source(text, pair) == peers.tokenizer(text).input_ids, text


def test_languages_have_the_same_tokens(peers: Peers) -> None:
    told = peers.checkpoint.language_tokens
    if peers.pairs == (None,):
        assert told is None
        return
    assert told is not None
    spelled = "__{}__" if "de" in told.tokens else "{}"
    for code, token_id in told.tokens.items():
        assert peers.tokenizer.convert_tokens_to_ids(spelled.format(code)) == token_id
        assert token_id not in peers.ours.encode(spelled.format(code))
    assert {code for pair in peers.pairs if pair for code in pair} <= told.tokens.keys()


def test_text_is_the_same(peers: Peers) -> None:
    for text in TINY_LINES:
        ids = peers.ours.encode(text)
        assert peers.ours.decode(ids) == peers.tokenizer.decode(ids, skip_special_tokens=True), text


def test_logits_are_the_same(peers: Peers) -> None:
    config = peers.checkpoint.config
    generator = torch.Generator().manual_seed(1)
    # Neither end nor padding in the middle.
    source_ids = torch.randint(4, config.source_vocab_size, (3, 17), generator=generator)
    target_ids = torch.randint(4, config.target_vocab_size, (3, 11), generator=generator)
    target_ids[:, 0] = config.decoder_start_id
    lengths = torch.tensor([17, 4, 9])
    mask = torch.arange(17) < lengths[:, None]
    source_ids = source_ids.masked_fill(~mask, config.pad_id)
    with torch.no_grad():
        mine = build_model(peers.checkpoint)(source_ids, lengths, target_ids)
        its = peers.model(input_ids=source_ids, attention_mask=mask.long(), decoder_input_ids=target_ids).logits
    assert mine.std() > 0.5
    assert (mine - its).abs().max() <= LOGIT_TOLERANCE


def sources() -> list[str]:
    """Sentences and pairs of them, all different."""
    lines = list(dict.fromkeys(TINY_LINES))
    doubles = [f"{one} {other}" for one in ENGLISH_LINES for other in lines]
    return (lines + doubles)[:SOURCES]


@pytest.mark.parametrize("beam_size", [1, 4])
def test_translations_are_the_same(peers: Peers, beam_size: int) -> None:
    checkpoint = peers.checkpoint
    for pair, texts in zip(peers.pairs, (sources()[i :: len(peers.pairs)] for i in range(len(peers.pairs))), strict=True):
        ids = [peers.source(text, pair) for text in texts]
        first = checkpoint.target_prefix
        if pair is not None:
            assert checkpoint.language_tokens is not None
            first = (checkpoint.language_tokens.tokens[pair[1]],)
        options = DecodingOptions(
            beam_size=beam_size,
            max_target_tokens=MAX_TARGET_TOKENS,
            target_prefix=first,
            hidden_prefix_tokens=len(first),
        )
        answers = peers.subject.decode([tuple(source) for source in ids], options)
        for (best,), (theirs, score) in zip(answers, generate(peers, ids, options), strict=True):
            assert list(best.target_ids) == theirs
            if beam_size > 1:
                assert score_of(best) == pytest.approx(score, abs=SCORE_TOLERANCE)
        # Enough different ones to say something.
        assert len({best.target_ids for (best,) in answers}) > len(answers) / 4


def generate(peers: Peers, sources: list[list[int]], options: DecodingOptions) -> list[tuple[list[int], float]]:
    """What Hugging Face makes of each source, without start, prefix and end, and its score, which greedy search has none of."""
    config, prefix = peers.checkpoint.config, options.target_prefix
    answers = []
    for start in range(0, len(sources), BATCH):
        batch = sources[start : start + BATCH]
        lengths = torch.tensor([len(source) for source in batch])
        longest = int(lengths.max())
        generated = peers.model.generate(
            torch.tensor([source + [config.pad_id] * (longest - len(source)) for source in batch]),
            attention_mask=(torch.arange(longest) < lengths[:, None]).long(),
            num_beams=options.beam_size,
            do_sample=False,
            max_new_tokens=options.max_target_tokens,
            early_stopping=False,
            forced_bos_token_id=prefix[0] if prefix else None,
            forced_eos_token_id=None,
            bad_words_ids=[[token_id] for token_id in config.never_decoded],
            renormalize_logits=True,
            return_dict_in_generate=True,
            output_scores=True,
        )
        rows = generated.sequences[:, 1 + len(prefix) :].tolist()
        scores = generated.sequences_scores.tolist() if options.beam_size > 1 else [math.nan] * len(batch)
        answers += [
            (row[: row.index(config.eos_id)] if config.eos_id in row else row, score)
            for row, score in zip(rows, scores, strict=True)
        ]
    return answers


def test_the_directory_is_read_again_from_several_files(tmp_path: Path) -> None:
    model = write_model(tmp_path, KINDS["m2m100"])
    whole = read_checkpoint(tmp_path).tensors
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    again = read_checkpoint(tmp_path).tensors
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
