"""Settings of ``generate`` as published checkpoints have them, and what a bundle's defaults are then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from export.checkpoint.generation import GenerationSettings, read_generation
from export.model import ModelConfig
from serving.manifest import DefaultOptions
from tests.published_models import PUBLISHED
from tests.support import tiny_config

# How many tokens of a target are not its text; what is chosen beside the rules of ``generate``; beams; the start token.
HUGGING_FACE = {"rules_of_generate": True}
SUMMARIES = {
    "early_stopping": True,
    "ends_when_cut": True,
    "length_penalty": 2.0,
    "max_target_tokens": 140,
    "min_target_tokens": 54,
    "no_repeat_ngram_size": 3,
}
EXPECTED: dict[str, tuple[int, dict[str, Any], int | None, int]] = {
    "opus-mt-en-fr": (0, {"ends_when_cut": True, "max_target_tokens": 511}, 4, 59513),
    "opus-mt-en-de, 2021": (0, {"ends_when_cut": True, "max_target_tokens": 511, **HUGGING_FACE}, 6, 58100),
    "opus-mt-en-ROMANCE, 2020": (0, {"max_target_tokens": 511, **HUGGING_FACE}, 6, 65000),
    "m2m100_418M": (1, {"early_stopping": True, "max_target_tokens": 198, **HUGGING_FACE}, 5, 2),
    "nllb-200-distilled-600M": (1, {"max_target_tokens": 198, **HUGGING_FACE}, None, 2),
    "nllb-200, sources as they were": (1, {"max_target_tokens": 198, **HUGGING_FACE}, 5, 2),
    "mbart-large-50-many-to-many-mmt": (
        1,
        {"early_stopping": True, "ends_when_cut": True, "max_target_tokens": 198, **HUGGING_FACE},
        5,
        2,
    ),
    "mbart-large-50-many-to-one-mmt": (
        1,
        {"early_stopping": True, "ends_when_cut": True, "max_target_tokens": 198, **HUGGING_FACE},
        5,
        2,
    ),
    "mbart-large-en-ro": (0, {"max_target_tokens": 199, **HUGGING_FACE}, 5, 250020),
    "mbart-large-cc25": (1, {"ends_when_cut": True, "max_target_tokens": 1022, **HUGGING_FACE}, 5, 0),
    "bart-large-cnn": (1, {**SUMMARIES, **HUGGING_FACE}, 4, 2),
    "bart-base": (1, {"early_stopping": True, "ends_when_cut": True, "no_repeat_ngram_size": 3, **HUGGING_FACE}, 4, 2),
    "distilbart-cnn-12-6, 2020": (1, {**SUMMARIES, "ends_when_cut": False, **HUGGING_FACE}, 4, 2),
    "pegasus-xsum": (0, {"ends_when_cut": True, "length_penalty": 0.6, "max_target_tokens": 63, **HUGGING_FACE}, 8, 0),
    "pegasus-cnn_dailymail": (
        0,
        {"ends_when_cut": True, "length_penalty": 0.8, "max_target_tokens": 127, "min_target_tokens": 31, **HUGGING_FACE},
        8,
        0,
    ),
}


def settings_of(name: str) -> GenerationSettings:
    published = PUBLISHED[name]
    if published.generation is None:
        return GenerationSettings("config.json", published.config, published.config)
    return GenerationSettings("generation_config.json", published.generation, published.config)


def config_of(settings: GenerationSettings) -> ModelConfig:
    ids = {f"{name}_id": settings.document[f"{name}_token_id"] for name in ("pad", "eos")}
    start = settings.start(has_default=False)["decoder_start_token_id"]
    return tiny_config(source_vocab_size=2**18, target_vocab_size=2**18, decoder_start_id=start, **ids)


def test_the_table_is_of_these() -> None:
    assert PUBLISHED.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_read_without_a_fault(name: str) -> None:
    hidden, chosen, num_beams, start = EXPECTED[name]
    settings, faults = settings_of(name), list[str]()
    config = config_of(settings)
    assert config.decoder_start_id == start
    assert settings.defaults(config, hidden_tokens=hidden, faults=faults) == DefaultOptions(**chosen)
    assert faults == []
    assert settings.num_beams == num_beams
    assert settings.warnings == ()


def read(values: dict[str, Any], *, hidden_tokens: int = 0) -> tuple[DefaultOptions, list[str]]:
    faults: list[str] = []
    return GenerationSettings("g", values, {}).defaults(tiny_config(), hidden_tokens=hidden_tokens, faults=faults), faults


@pytest.mark.parametrize(
    ("values", "hidden_tokens", "shortest", "longest"),
    [
        ({}, 0, 0, None),
        ({"max_length": 20, "min_length": 0}, 0, 0, 19),
        ({"max_length": 20, "min_length": 5}, 0, 4, 19),
        ({"max_length": 20, "min_length": 5}, 1, 3, 18),
        ({"max_length": 20, "min_length": 2}, 1, 0, 18),
        # Those of new tokens go before.
        ({"max_length": 20, "max_new_tokens": 9}, 1, 0, 8),
        ({"max_length": 5, "max_new_tokens": 30, "min_length": 20}, 0, 19, 30),
        ({"min_length": 5, "min_new_tokens": 7}, 1, 6, None),
        ({"min_length": 9, "min_new_tokens": 7}, 0, 8, None),
        ({"max_length": 2}, 0, 0, 1),
    ],
    ids=str,
)
def test_lengths_count_what_is_the_translations_own(
    values: dict[str, Any], hidden_tokens: int, shortest: int, longest: int | None
) -> None:
    options, faults = read(values, hidden_tokens=hidden_tokens)
    assert faults == []
    assert (options.min_target_tokens, options.max_target_tokens) == (shortest, longest)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"max_length": 1}, "max_length, max_new_tokens: leave no room for a target, or for the shortest one"),
        ({"max_length": 9, "min_length": 10}, "max_length, max_new_tokens: leave no room for a target, or for the shortest one"),
        ({"max_length": "20"}, "max_length: '20': is no number of tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens: -1: is no number of tokens"),
        ({"min_length": True}, "min_length: True: is no number of tokens"),
        ({"length_penalty": 11}, "length_penalty: Input should be less than or equal to 10"),
        ({"length_penalty": -11}, "length_penalty: Input should be greater than or equal to -10"),
        ({"repetition_penalty": 0}, "repetition_penalty: Input should be greater than or equal to 0.01"),
        ({"early_stopping": "soon"}, "early_stopping: Input should be a valid boolean"),
        ({"bad_words_ids": [[]]}, "bad_words_ids: [[]]: is no list of tokens of the vocabulary"),
        ({"bad_words_ids": [[-1]]}, "bad_words_ids: [[-1]]: is no list of tokens of the vocabulary"),
        ({"suppress_tokens": [[5]]}, "suppress_tokens: [[5]]: is no list of tokens of the vocabulary"),
        ({"suppress_tokens": [3]}, "suppress_tokens: has [3], all the tokens that end a target"),
        (
            {"suppress_tokens": [9, 3, 11], "eos_token_id": [3, 9]},
            "suppress_tokens: has [3, 9], all the tokens that end a target",
        ),
        (
            {"suppress_tokens": [9], "eos_token_id": [3, 9], "forced_eos_token_id": 9},
            "forced_eos_token_id: [9] is not supported, only tokens that end a target, [3]",
        ),
        ({"suppress_tokens": 5}, "suppress_tokens: 5: is no list of tokens of the vocabulary"),
        ({"begin_suppress_tokens": [64]}, "begin_suppress_tokens: [64]: is no token of the vocabulary, nor a list of such"),
        ({"eos_token_id": [3, "4"]}, "eos_token_id: [3, '4']: is no token of the vocabulary, nor a list of such"),
        ({"eos_token_id": 64}, "eos_token_id: 64: is no token of the vocabulary, nor a list of such"),
        ({"forced_eos_token_id": 9}, "forced_eos_token_id: [9] is not supported, only tokens that end a target, [3]"),
        ({"stop_strings": ["."]}, "stop_strings: ['.'] is not supported, only None or [] or ''"),
        ({"encoder_no_repeat_ngram_size": 3}, "encoder_no_repeat_ngram_size: 3 is not supported, only None or 0"),
    ],
    ids=str,
)
def test_settings_that_a_bundle_has_no_place_for(values: dict[str, Any], fault: str) -> None:
    options, faults = read(values)
    assert faults == [f"g: {fault}"]
    assert options.length_penalty == 1.0


def test_every_fault_is_told_at_once() -> None:
    _, faults = read({"penalty_alpha": 0.6, "eos_token_id": -9, "bad_words_ids": 5, "max_length": -1, "no_repeat_ngram_size": -1})
    assert [fault.split(":")[1].strip() for fault in faults] == [
        "penalty_alpha",
        "eos_token_id",
        "bad_words_ids",
        "max_length",
        "no_repeat_ngram_size",
    ]


def test_tokens_that_are_never_decoded_need_not_be_forbidden() -> None:
    config = tiny_config()
    never = [[config.pad_id], [config.decoder_start_id], [config.eos_id]]
    options, faults = read({"bad_words_ids": [*never, [9, 10], [11]], "suppress_tokens": [12, config.pad_id]})
    assert faults == []
    assert options.suppressed == [[9, 10], [11], [12]]


@pytest.mark.parametrize(
    ("stated", "end_ids"),
    [
        (None, []),
        (3, []),
        ([3], []),
        ([3, 9], [3, 9]),
        ([9, 3, 9], [9, 3]),
        # Targets end there alone, sources in the architecture's.
        (9, [9]),
        # Padding is never decoded, and ends no target.
        ([3, 0], []),
        ([0, 9], [9]),
        ([], []),
    ],
    ids=str,
)
def test_tokens_that_end_targets(stated: Any, end_ids: list[int]) -> None:
    options, faults = read({"eos_token_id": stated})
    assert faults == []
    assert options.end_ids == end_ids


@pytest.mark.parametrize(
    ("values", "end_ids", "suppressed"),
    [
        ({"suppress_tokens": [9, 12]}, [], [[9], [12]]),
        ({"suppress_tokens": [3]}, [9], [[3]]),
        ({"bad_words_ids": [[3], [9]]}, [3, 9], []),
        ({"bad_words_ids": [[3], [9]], "suppress_tokens": [9]}, [], [[9]]),
    ],
    ids=str,
)
def test_an_end_that_is_suppressed_ends_no_target(
    values: dict[str, Any], end_ids: list[int], suppressed: list[list[int]]
) -> None:
    """As ``generate`` does by ``suppress_tokens``, and not by ``bad_words_ids``."""
    options, faults = read({"eos_token_id": [3, 9], **values})
    assert faults == []
    assert (options.end_ids, options.suppressed) == (end_ids, suppressed)


def test_what_is_forced_at_the_end_may_be_any_that_ends_targets() -> None:
    for forced in (9, [9], [3, 9]):
        options, faults = read({"eos_token_id": [3, 9], "forced_eos_token_id": forced, "bad_words_ids": [[9], [11]]})
        assert faults == []
        assert (options.ends_when_cut, options.end_ids, options.suppressed) == (True, [3, 9], [[11]])


def test_tokens_that_no_target_starts_with() -> None:
    options, faults = read({"begin_suppress_tokens": [3, 9]})
    assert faults == []
    assert (options.suppressed_first, options.suppressed) == ([3, 9], [])


def test_how_to_search_is_the_requests_choice() -> None:
    values = {"do_sample": True, "top_p": 0.9, "num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 0.0}
    assert read(values) == (DefaultOptions(rules_of_generate=True), [])
    assert GenerationSettings("g", values, {}).warnings == (
        "g: do_sample True, num_beam_groups 2: decoding is greedy unless a request asks for beams or sampling",
    )
    assert GenerationSettings("g", {"do_sample": False, "num_beam_groups": None, "diversity_penalty": 0}, {}).warnings == ()


def test_settings_that_change_no_target_are_no_fault() -> None:
    """As configurations of older versions spell out, and what another padding token or a pipeline would have."""
    values = {
        "pad_token_id": 9,
        "temperature": 1.0,
        "top_k": 50,
        "typical_p": 1.0,
        "num_return_sequences": 1,
        "output_scores": False,
        "return_dict_in_generate": False,
        "remove_invalid_values": False,
        "prefix": "translate: ",
        "task_specific_params": {"summarization": {"diversity_penalty": 1.0}},
        "encoder_no_repeat_ngram_size": 0,
        "exponential_decay_length_penalty": None,
        "sequence_bias": None,
        "forced_decoder_ids": None,
        "penalty_alpha": 0.0,
        "max_time": None,
        "watermarking_config": None,
    }
    assert read(values) == (DefaultOptions(rules_of_generate=True), [])
    assert GenerationSettings("g", values, {}).warnings == ()


def test_a_search_that_is_not_ours_is_told() -> None:
    settings = GenerationSettings("g", {"early_stopping": "never"}, {})
    assert settings.warnings == ("g: early_stopping: 'never' is not supported; a beam search may end earlier, as with False",)
    assert read({"early_stopping": "never"}) == (DefaultOptions(rules_of_generate=True), [])


@pytest.mark.parametrize("number", [0, -1, None, "4", True])
def test_beams_that_are_no_number_are_not_stated(number: object) -> None:
    assert GenerationSettings("g", {"num_beams": number}, {}).num_beams is None


def test_a_file_of_its_own_has_all_settings(tmp_path: Path) -> None:
    document = {"num_beams": 4}
    faults: list[str] = []
    assert read_generation(tmp_path, document, faults).num_beams == 4
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_generation(tmp_path, document, faults).num_beams is None
    assert faults == []
    (tmp_path / "generation_config.json").write_text("[]")
    read_generation(tmp_path, document, faults)
    assert faults == ["generation_config.json: is no JSON object"]
