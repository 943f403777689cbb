"""Hugging Face's M2M100 directories, which NLLB's are too: one model for many languages.

A directory with ``config.json`` (``"model_type": "m2m_100"``), the weights and the tokenizer: ``sentencepiece.bpe.model`` and, of
M2M100, ``vocab.json``; newer versions of the library give NLLB ``tokenizer.json`` alone. Knows how its positions are computed and
how the two call their languages; the fields and names of tensors are BART's (``bart.py``), without norms of embeddings and a bias
on the logits.

**Languages.** A source starts with its language's token and a target is made to start with its own: ``__de__`` of the language
``de`` in M2M100, ``deu_Latn`` in NLLB. With ``legacy_behaviour`` NLLB's sources end with it instead, after ``</s>``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.checkpoint.bart import Family, check_class
from export.checkpoint.bart_config import BartFields
from export.checkpoint.bart_tokenizers import (
    SENTENCEPIECE_NAME,
    TokenizerParts,
    fairseq_tokenizer,
    language_ids,
    renumbered,
)
from export.checkpoint.hugging_face import (
    CONFIG_NAME,
    TOKENIZER_CONFIG_NAME,
    added_tokens,
    read_json,
    setting_faults,
    special_tokens,
)
from export.model import ModelConfig, Size

VOCABULARY_NAME = "vocab.json"

_M2M100_CODE = re.compile(r"__([a-z_A-Z]+?)__")
_NLLB_CODE = re.compile(r"([a-z]{3}_[A-Z][a-z]{3})")
_NLLB_CLASSES = ("NllbTokenizer", "NllbTokenizerFast")
_M2M100_CLASS = "M2M100Tokenizer"
# In the order of their tokens, for directories that do not list them.
_LANGUAGES = {
    "m2m100": (
        "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr ht hu hy id ig "
        "ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or pa pl ps pt ro ru sd si sk sl "
        "so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
    ),
    "wmt21": "en ha is ja cs ru zh de",
}


class M2M100Fields(BartFields):
    """With the defaults of ``M2M100Config``."""

    vocab_size: Size = 128112
    activation_function: str = "relu"
    scale_embedding: bool = True

    def architecture_faults(self) -> list[str]:
        """See ``BartFields``."""
        faults = super().architecture_faults()
        if self.decoder_start_token_id == self.pad_token_id:
            faults.append(f"decoder_start_token_id: {self.decoder_start_token_id} is padding, which has no position")
        return faults


def position_table(num_positions: int, d_model: int, pad_id: int) -> Tensor:
    """The table of M2M100's positions, as its own module computes it: with numbers of single precision.

    Sines in the first half and cosines in the second, at rates from 1 to 1/10000; the first position's is row ``pad_id + 1``.

    Returns:
        [num_positions, d_model] float32.
    """
    half = d_model // 2
    rate = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    angle = torch.arange(pad_id + 1, pad_id + 1 + num_positions, dtype=torch.float32)[:, None] * rate  # [num_positions, half]
    return torch.cat((angle.sin(), angle.cos()), dim=1)


def _positions(config: ModelConfig, tensors: dict[str, Tensor], file_name: str, faults: list[str]) -> dict[str, Tensor]:
    """Computed tables; those that old exports have are not looked at."""
    for side in ("encoder", "decoder"):
        for kind in ("weight", "weights"):
            tensors.pop(f"model.{side}.embed_positions.{kind}", None)
    if faults:
        return {}
    table = position_table(config.max_positions, config.d_model, config.pad_id)
    return {"encoder": table, "decoder": table}


def _tokenizer(
    directory: Path, document: Mapping[str, Any], settings: Mapping[str, Any], faults: list[str]
) -> TokenizerParts | None:
    stated = check_class(document, settings, (_M2M100_CLASS, *_NLLB_CLASSES), _M2M100_CLASS, faults)
    if stated in _NLLB_CLASSES:
        legacy = settings.get("legacy_behaviour") is True
        return fairseq_tokenizer(directory, settings, _NLLB_CODE, faults, language_is_last=legacy)
    return _m2m100_tokenizer(directory, settings, faults)


def _m2m100_tokenizer(directory: Path, settings: Mapping[str, Any], faults: list[str]) -> TokenizerParts | None:
    added, special = added_tokens(directory, settings, faults), special_tokens(directory, settings, faults)
    vocabulary = read_json(directory / VOCABULARY_NAME, faults)
    if vocabulary is None:
        if not (directory / VOCABULARY_NAME).is_file():
            faults.append(f"{VOCABULARY_NAME}: is missing")
        return None
    if not any(map(_M2M100_CODE.fullmatch, (*added, *special))):
        codes = settings.get("language_codes", "m2m100")
        faults += [
            f"{TOKENIZER_CONFIG_NAME}: {fault}"
            for fault in setting_faults({"language_codes": codes}, {"language_codes": tuple(_LANGUAGES)})
        ]
        special = [f"__{code}__" for code in _LANGUAGES.get(str(codes), "").split()]
    languages = language_ids(_M2M100_CODE, added, special, first_id=len(vocabulary))
    pieces = {piece: i for piece, i in vocabulary.items() if not _M2M100_CODE.fullmatch(piece)}
    return renumbered(directory / SENTENCEPIECE_NAME, pieces, languages)


M2M100 = Family(
    model_type="m2m_100",
    description=f'Hugging Face M2M100 or NLLB ({CONFIG_NAME} with "model_type": "m2m_100", weights, {SENTENCEPIECE_NAME})',
    fields=M2M100Fields,
    # What older versions of BART and mBART read beside the fields above, M2M100 has read in none.
    only={},
    norm="pre",
    embedding_norm=False,
    output_bias=False,
    positions=_positions,
    tokenizer=_tokenizer,
)
