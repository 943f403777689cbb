"""A tiny random model for tests: a SentencePiece tokenizer of 64 pieces and a native checkpoint, the same for the same seed."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from export.checkpoint import write_native_checkpoint
from export.model import ModelConfig, Transformer
from serving.manifest import LanguagePair, TokenizerSpec
from serving.request import Hypothesis

PAD_ID, UNKNOWN_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
TINY_VOCAB_SIZE = 64
TOKENIZER_NAME = "sentencepiece.model"

# What T5 1.1 changes of the paper's architecture, with a few near distances.
T5: dict[str, Any] = {
    "norm": "pre",
    "norm_kind": "rms",
    "bias": False,
    "positions": "relative",
    "relative_buckets": 8,
    "relative_distance": 5,
    "d_head": 16,
    "gated": True,
    "activation": "gelu_tanh",
    "scale_embedding": False,
    "tie_output": False,
}
# Sentences to train the tokenizer on, and to translate.
ENGLISH_LINES = (
    "a man runs in the park",
    "a woman sits on a bench",
    "two dogs play with a ball",
    "the girl walks along the road",
    "a child is eating an ice cream",
    "people are waiting for the bus",
    "an old man reads a newspaper",
    "a boy jumps into the water",
    "three women dance on the stage",
    "the dog catches a yellow frisbee",
    "a man in a blue shirt is cooking",
    "children play in the snow",
    "a couple walks on the beach",
    "someone is climbing a rock",
    "a woman with a red hat smiles",
    "the boy rides his bicycle home",
    "two men are fixing a roof",
    "a little girl holds a flower",
    "a band plays music at night",
    "the player kicks the ball",
    "a cat sleeps under the table",
    "a group of friends eats lunch",
    "a brown horse jumps over a fence",
    "workers build a new house",
    "a woman takes a picture",
    "the man is playing the guitar",
    "kids swim in the lake",
    "a white bird flies over the sea",
    "a young man is drinking coffee",
    "the train stops at the station",
)
GERMAN_LINES = (
    "ein mann läuft im park",
    "eine frau sitzt auf einer bank",
    "zwei hunde spielen mit einem ball",
    "das mädchen geht die straße entlang",
    "ein kind isst ein eis",
    "leute warten auf den bus",
    "ein alter mann liest eine zeitung",
    "ein junge springt ins wasser",
    "drei frauen tanzen auf der bühne",
    "der hund fängt eine gelbe scheibe",
    "ein mann in einem blauen hemd kocht",
    "kinder spielen im schnee",
    "ein paar geht am strand spazieren",
    "jemand klettert an einem felsen",
    "eine frau mit rotem hut lächelt",
    "der junge fährt mit dem rad nach hause",
    "zwei männer reparieren ein dach",
    "ein kleines mädchen hält eine blume",
    "eine band macht nachts musik",
    "der spieler tritt den ball",
    "eine katze schläft unter dem tisch",
    "eine gruppe von freunden isst zu mittag",
    "ein braunes pferd springt über einen zaun",
    "arbeiter bauen ein neues haus",
    "eine frau macht ein foto",
    "der mann spielt gitarre",
    "kinder schwimmen im see",
    "ein weißer vogel fliegt über das meer",
    "ein junger mann trinkt kaffee",
    "der zug hält am bahnhof",
)
TINY_LINES = ENGLISH_LINES + GERMAN_LINES
SAMPLE_LINES = ENGLISH_LINES[:8]


def train_sentencepiece(lines: tuple[str, ...] = TINY_LINES, *, vocab_size: int = TINY_VOCAB_SIZE, **options: Any) -> bytes:
    """A serialized SentencePiece model with the project's special ids; ``options`` are the trainer's own."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=stream,
        vocab_size=vocab_size,
        pad_id=PAD_ID,
        unk_id=UNKNOWN_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        num_threads=1,
        minloglevel=3,
        **options,
    )
    return stream.getvalue()


@functools.cache
def tiny_sentencepiece() -> bytes:
    """The tiny tokenizer's model, trained once."""
    return train_sentencepiece()


def tiny_config(**overrides: Any) -> ModelConfig:
    """A model of 2 encoder layers, 1 decoder layer, 2 heads of 8; ``overrides`` are fields of ``ModelConfig``."""
    fields: dict[str, Any] = {
        "source_vocab_size": TINY_VOCAB_SIZE,
        "target_vocab_size": TINY_VOCAB_SIZE,
        "d_model": 16,
        "num_heads": 2,
        "num_encoder_layers": 2,
        "num_decoder_layers": 1,
        "encoder_d_ff": 32,
        "decoder_d_ff": 24,
        "max_positions": 128,
        "pad_id": PAD_ID,
        "eos_id": EOS_ID,
        "decoder_start_id": BOS_ID,
    }
    return ModelConfig(**{**fields, **overrides})


def tiny_model(config: ModelConfig | None = None, *, seed: int = 0) -> Transformer:
    """A random module in evaluation mode; biases and norms are random too, so that a forgotten one shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config or tiny_config())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def write_tiny_checkpoint(
    directory: Path, config: ModelConfig | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a native checkpoint of ``tiny_model`` and return its directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    model = tiny_model(config, seed=seed)
    tokenizer_path = directory / TOKENIZER_NAME
    tokenizer_path.write_bytes(tiny_sentencepiece())
    write_native_checkpoint(
        directory,
        name="tiny",
        config=model.config,
        state_dict=model.state_dict(),
        languages=[LanguagePair(source="en", target="de")],
        tokenizer=TokenizerSpec(kind="sentencepiece", source_model=TOKENIZER_NAME, target_model=TOKENIZER_NAME),
        tokenizer_files={TOKENIZER_NAME: tokenizer_path},
        samples=SAMPLE_LINES,
        dtype=dtype,
    )
    return directory


def score_of(hypothesis: Hypothesis) -> float:
    """The score of a hypothesis whose sequence asked for one."""
    assert hypothesis.score is not None
    return hypothesis.score
