"""Writes the models that are compared: random weights in the Marian format, and CTranslate2's form of any model.

Needs transformers, torch and ctranslate2, and is therefore run in a process of its own (see ``benchmarks.models``).
"""

from __future__ import annotations

import importlib
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.marian import write_marian
from benchmarks.results import Precision
from export.checkpoint import Checkpoint, read_checkpoint
from serving.manifest import TokenizerSpec
from serving.tokenizers.base import contents_of

# The paper's base size.
_LAYERS, _D_MODEL, _HEADS, _D_FF = 6, 512, 8, 2048
_MAX_POSITIONS = 512
# Padding comes after them, as in every OPUS-MT vocabulary.
_PIECES = 32_000
_EOS_ID, _UNKNOWN_ID = 0, 1
_SEED = 20
# Above the logit of the token before, whose embedding is still in the state: a sentence ends after a few tokens.
_END_LOGIT = 4.5
_STORAGE: dict[Precision, str] = {"fp32": "float32", "int8": "int8", "fp16": "float16"}


def write_random_marian(directory: Path) -> None:
    """Write a base Transformer with seeded random weights, and a tokenizer, as a Marian directory.

    Raises:
        ImportError: transformers or torch is not installed.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(_SEED)
    config = transformers.MarianConfig(
        vocab_size=_PIECES + 1,
        decoder_vocab_size=_PIECES + 1,
        d_model=_D_MODEL,
        encoder_layers=_LAYERS,
        decoder_layers=_LAYERS,
        encoder_attention_heads=_HEADS,
        decoder_attention_heads=_HEADS,
        encoder_ffn_dim=_D_FF,
        decoder_ffn_dim=_D_FF,
        activation_function="relu",
        dropout=0.0,
        scale_embedding=True,
        max_position_embeddings=_MAX_POSITIONS,
        pad_token_id=_PIECES,
        eos_token_id=_EOS_ID,
        bos_token_id=_EOS_ID,
        decoder_start_token_id=_PIECES,
        forced_eos_token_id=None,
    )
    model = transformers.MarianMTModel(config)
    model.generation_config.bad_words_ids = [[_PIECES]]
    with torch.no_grad():
        make_ends_likely(model)
    model.save_pretrained(directory)
    write_tokenizer(directory)


def make_ends_likely(model: Any) -> None:
    """Give a random ``MarianMTModel`` an end-of-sentence token that is likely, as it is in trained ones.

    Lengths are forced where speed is measured; but the export's certificate lets every sentence run to its end, and among 32,000
    tokens of equal chance there would be none before the limit. All last states of the decoder contain the bias of its last
    norm: added to the token's output weights, divided by its squared length, it raises the token's logit by 1.
    """
    bias = model.model.decoder.layers[-1].final_layer_norm.bias
    bias.normal_(std=0.3)
    model.get_input_embeddings().weight[_EOS_ID] += _END_LOGIT * bias / bias.square().sum()


def write_tokenizer(directory: Path) -> None:
    """Write ``vocab.json`` and the SentencePiece models of invented pieces."""
    # Any, because the generated classes have no types.
    sentencepiece_model_pb2: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")

    pieces = list(itertools.islice(_invented_pieces(), _PIECES - 2))
    vocabulary = {piece: i for i, piece in enumerate(("</s>", "<unk>", *pieces, "<pad>"))}
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    model = sentencepiece_model_pb2.ModelProto()
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    model.pieces.add(piece="<unk>", score=0.0, type=kinds.UNKNOWN)
    model.pieces.add(piece="<s>", score=0.0, type=kinds.CONTROL)
    model.pieces.add(piece="</s>", score=0.0, type=kinds.CONTROL)
    for place, piece in enumerate(pieces):
        # Longer pieces win over their letters.
        model.pieces.add(piece=piece, score=-10.0 - place / _PIECES, type=kinds.NORMAL)
    model.trainer_spec.vocab_size = len(model.pieces)
    model.normalizer_spec.name = "identity"
    for side in ("source", "target"):
        (directory / f"{side}.spm").write_bytes(model.SerializeToString())
    languages = {"source_lang": "en", "target_lang": "de"}
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    written = {**languages, **special, "tokenizer_class": "MarianTokenizer", "model_max_length": _MAX_POSITIONS}
    (directory / "tokenizer_config.json").write_text(json.dumps(written))


def _invented_pieces() -> Iterator[str]:
    """Letters, then syllables, alone and at the beginning of a word; each once, without end."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    yield "▁"
    for length in itertools.count(1):
        for combination in itertools.product(letters, repeat=length):
            word = "".join(combination)
            yield f"▁{word}"
            yield word


def write_ctranslate2(marian: Path, directory: Path, precision: Precision) -> None:
    """Convert a Marian directory by CTranslate2's own converter, weights stored in ``precision``.

    Raises:
        ImportError: ctranslate2 or transformers is not installed.
    """
    import ctranslate2
    import transformers

    transformers.utils.logging.disable_progress_bar()
    converter = ctranslate2.converters.TransformersConverter(str(marian))
    converter.convert(str(directory), quantization=_STORAGE[precision])


def write_native_as_marian(checkpoint: Path, directory: Path) -> None:
    """Write a native checkpoint's weights in the Marian format; without a tokenizer, which has another order of ids there."""
    write_marian(read_checkpoint(checkpoint), directory)


def write_native_as_ctranslate2(checkpoint: Path, directory: Path, precision: Precision) -> None:
    """Write a native checkpoint in CTranslate2's format.

    Raises:
        ImportError: ctranslate2 or transformers is not installed.
    """
    source = read_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory() as marian:
        convert_without_padding_rules(write_marian(source, Path(marian)), pieces_of(source), directory, precision)


def pieces_of(checkpoint: Checkpoint) -> list[str]:
    """The vocabulary of a checkpoint with one SentencePiece model, by id."""
    import sentencepiece

    spec = checkpoint.tokenizer
    assert isinstance(spec, TokenizerSpec), "what is compared has SentencePiece models"
    processor = sentencepiece.SentencePieceProcessor(model_proto=contents_of(checkpoint.tokenizer_files, spec.target_model))
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def convert_without_padding_rules(marian: Path, pieces: list[str], directory: Path, precision: Precision) -> Path:
    """What CTranslate2's converter for Marian does, without the two things that are Helsinki's and not the architecture's.

    These are a decoder that starts from a zero embedding, and a padding token that is the last of the vocabulary.

    Args:
        marian: a Marian directory; needs no tokenizer.
        pieces: the vocabulary, by id.
        directory: to be made.
        precision: in which weights are stored.

    Raises:
        ImportError: ctranslate2 or transformers is not installed.
    """
    import ctranslate2
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.MarianMTModel.from_pretrained(marian)
    model.config.normalize_before = False
    model.config.normalize_embedding = False
    loader = ctranslate2.converters.transformers.BartLoader()
    spec = loader.get_model_spec(model)
    loader.set_vocabulary(spec, pieces)
    spec.config.unk_token = "<unk>"
    spec.config.bos_token = "<s>"
    spec.config.eos_token = pieces[model.config.eos_token_id]
    spec.config.decoder_start_token = pieces[model.config.decoder_start_token_id]
    spec.validate()
    spec.optimize(quantization=None if precision == "fp32" else _STORAGE[precision])
    directory.mkdir(parents=True)
    spec.save(str(directory))
    return directory
