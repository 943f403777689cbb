"""What the files of published checkpoints say: facts of their ``config.json``, ``generation_config.json`` and tokenizers.

Sizes are made small by those who build such a model (``tests/peers/test_published_models.py``); the rest is as published. Labels,
dropouts and the like are left out but for one model of each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Written by the versions of 2020 and 2021 whatever the model, and in its fine-tuned children ever since.
_OF_2020: Mapping[str, Any] = {
    "_num_labels": 3,
    "activation_dropout": 0.0,
    "add_bias_logits": False,
    "attention_dropout": 0.0,
    "classif_dropout": 0.0,
    "classifier_dropout": 0.0,
    "decoder_layerdrop": 0.0,
    "dropout": 0.1,
    "encoder_layerdrop": 0.0,
    "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
    "transformers_version": "4.22.0.dev0",
    "use_cache": True,
}
_MARIAN: Mapping[str, Any] = {
    **_OF_2020,
    "model_type": "marian",
    "activation_function": "swish",
    "add_final_layer_norm": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "normalize_before": False,
    "normalize_embedding": False,
    "scale_embedding": True,
    "share_encoder_decoder_embeddings": True,
    "static_position_embeddings": True,
}
_FAIRSEQ_IDS: Mapping[str, Any] = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
_M2M100: Mapping[str, Any] = {
    **_FAIRSEQ_IDS,
    "model_type": "m2m_100",
    "activation_function": "relu",
    "decoder_start_token_id": 2,
    "is_encoder_decoder": True,
    "max_length": 200,
    "scale_embedding": True,
}
_MBART: Mapping[str, Any] = {
    **_OF_2020,
    **_FAIRSEQ_IDS,
    "model_type": "mbart",
    "add_final_layer_norm": True,
    "normalize_before": True,
    "normalize_embedding": True,
    "output_past": True,
    "scale_embedding": True,
    "static_position_embeddings": False,
}
_BART: Mapping[str, Any] = {
    **_OF_2020,
    **_FAIRSEQ_IDS,
    "model_type": "bart",
    "activation_function": "gelu",
    "add_final_layer_norm": False,
    "decoder_start_token_id": 2,
    "normalize_before": False,
    "normalize_embedding": True,
    "scale_embedding": False,
}
_SUMMARIES: Mapping[str, Any] = {
    "early_stopping": True,
    "length_penalty": 2.0,
    "max_length": 142,
    "min_length": 56,
    "no_repeat_ngram_size": 3,
    "num_beams": 4,
}
_PEGASUS: Mapping[str, Any] = {
    **_OF_2020,
    "model_type": "pegasus",
    "activation_function": "relu",
    "add_final_layer_norm": True,
    "bos_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "forced_eos_token_id": 1,
    "normalize_before": True,
    "normalize_embedding": False,
    "pad_token_id": 0,
    "scale_embedding": True,
    "static_position_embeddings": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    """What the files of one say."""

    config: Mapping[str, Any]
    # None: it has no such file.
    generation: Mapping[str, Any] | None = None
    # Of ``tokenizer_config.json``, what is not its special tokens.
    tokenizer: Mapping[str, Any] = field(default_factory=dict)


PUBLISHED: Mapping[str, PublishedModel] = {
    "opus-mt-en-fr": PublishedModel(
        config={
            **_MARIAN,
            "decoder_start_token_id": 59513,
            "decoder_vocab_size": 59514,
            "forced_eos_token_id": 0,
            "max_length": None,
            "num_beams": None,
            "pad_token_id": 59513,
            "torch_dtype": "float32",
            "vocab_size": 59514,
        },
        generation={
            "bad_words_ids": [[59513]],
            "bos_token_id": 0,
            "decoder_start_token_id": 59513,
            "eos_token_id": 0,
            "forced_eos_token_id": 0,
            "max_length": 512,
            "num_beams": 4,
            "pad_token_id": 59513,
            "renormalize_logits": True,
            "transformers_version": "4.46.2",
        },
    ),
    "opus-mt-en-de, 2021": PublishedModel(
        config={
            **_MARIAN,
            "bad_words_ids": [[58100]],
            "decoder_start_token_id": 58100,
            "forced_eos_token_id": 0,
            "max_length": 512,
            "num_beams": 6,
            "pad_token_id": 58100,
            "vocab_size": 58101,
        },
    ),
    "opus-mt-en-ROMANCE, 2020": PublishedModel(
        config={
            **_MARIAN,
            "add_bias_logits": True,
            "decoder_start_token_id": 65000,
            "extra_pos_embeddings": 65001,
            "max_length": 512,
            "num_beams": 6,
            "pad_token_id": 65000,
            "vocab_size": 65001,
        },
        tokenizer={"target_lang": "ROMANCE", "source_lang": "en"},
    ),
    "m2m100_418M": PublishedModel(
        config={**_M2M100, "early_stopping": True, "num_beams": 5, "vocab_size": 128112},
        generation={
            **_FAIRSEQ_IDS,
            "_from_model_config": True,
            "decoder_start_token_id": 2,
            "early_stopping": True,
            "max_length": 200,
            "num_beams": 5,
        },
    ),
    "nllb-200-distilled-600M": PublishedModel(
        config={**_M2M100, "tokenizer_class": "NllbTokenizer", "vocab_size": 256206},
        generation={**_FAIRSEQ_IDS, "_from_model_config": True, "decoder_start_token_id": 2, "max_length": 200},
    ),
    "nllb-200, sources as they were": PublishedModel(
        config={**_M2M100, "tokenizer_class": "NllbTokenizer", "num_beams": 5, "vocab_size": 256206},
        tokenizer={"legacy_behaviour": True},
    ),
    "mbart-large-50-many-to-many-mmt": PublishedModel(
        config={
            **_MBART,
            "activation_function": "relu",
            "decoder_start_token_id": 2,
            "early_stopping": True,
            "forced_eos_token_id": 2,
            "max_length": 200,
            "num_beams": 5,
            "tokenizer_class": "MBart50Tokenizer",
            "vocab_size": 250054,
        },
    ),
    "mbart-large-50-many-to-one-mmt": PublishedModel(
        config={**_MBART, "activation_function": "relu", "tokenizer_class": "MBart50Tokenizer", "decoder_start_token_id": 2},
        generation={
            **_FAIRSEQ_IDS,
            "decoder_start_token_id": 2,
            "early_stopping": True,
            "forced_bos_token_id": 250004,
            "forced_eos_token_id": 2,
            "max_length": 200,
            "num_beams": 5,
        },
    ),
    "mbart-large-en-ro": PublishedModel(
        config={
            **_MBART,
            "activation_function": "gelu",
            "decoder_start_token_id": 250020,
            "max_length": 200,
            "num_beams": 5,
            "prefix": " ",
            "task_specific_params": {"translation_en_to_ro": {"decoder_start_token_id": 250020}},
            "vocab_size": 250027,
        },
    ),
    "mbart-large-cc25": PublishedModel(
        config={**_MBART, "activation_function": "gelu", "forced_eos_token_id": 2, "vocab_size": 250027},
        generation={**_FAIRSEQ_IDS, "forced_eos_token_id": 2, "max_length": 1024, "num_beams": 5},
        tokenizer={"max_len": 1024},
    ),
    "bart-large-cnn": PublishedModel(
        config={**_BART, "force_bos_token_to_be_generated": True, "prefix": " ", "vocab_size": 50264},
        generation={
            **_FAIRSEQ_IDS,
            **_SUMMARIES,
            "decoder_start_token_id": 2,
            "forced_bos_token_id": 0,
            "forced_eos_token_id": 2,
        },
    ),
    "bart-base": PublishedModel(
        config={
            **_BART,
            "early_stopping": True,
            "forced_bos_token_id": 0,
            "forced_eos_token_id": 2,
            "no_repeat_ngram_size": 3,
            "num_beams": 4,
            "task_specific_params": {"summarization_xsum": {"max_length": 62, "min_length": 11, "num_beams": 6}},
            "vocab_size": 50265,
        },
    ),
    "distilbart-cnn-12-6, 2020": PublishedModel(
        config={
            **_BART,
            **_SUMMARIES,
            "extra_pos_embeddings": 2,
            "force_bos_token_to_be_generated": True,
            "task_specific_params": {"summarization": _SUMMARIES},
            "vocab_size": 50264,
        },
    ),
    "pegasus-xsum": PublishedModel(
        config={
            **_PEGASUS,
            "do_blenderbot_90_layernorm": False,
            "extra_pos_embeddings": 0,
            "force_bos_token_to_be_generated": False,
            "length_penalty": 0.6,
            "max_length": 64,
            "num_beams": 8,
            "vocab_size": 96103,
        },
    ),
    "pegasus-cnn_dailymail": PublishedModel(
        config={
            **_PEGASUS,
            "extra_pos_embeddings": 1,
            "length_penalty": None,
            "max_length": None,
            "min_length": None,
            "num_beams": None,
        },
        generation={
            "bos_token_id": 0,
            "decoder_start_token_id": 0,
            "eos_token_id": 1,
            "forced_eos_token_id": 1,
            "length_penalty": 0.8,
            "max_length": 128,
            "min_length": 32,
            "num_beams": 8,
            "pad_token_id": 0,
        },
    ),
}
