from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from export.checkpoint import build_model, read_checkpoint
from export.pipeline import export_bundle
from serving.config import EngineConfig
from serving.engine import Engine
from serving.errors import CheckpointError
from serving.manifest import LanguagePair
from serving.request import DecodingOptions
from tests.serving.test_engine import translate
from tests.support import BOS_ID, EOS_ID, PAD_ID, SAMPLE_LINES, TINY_VOCAB_SIZE, TOKENIZER_NAME, tiny_sentencepiece

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")

D_MODEL, NUM_HEADS, LONGEST = 16, 2, 96


class Tutorial(nn.Module):
    """A translation model as torch's tutorial builds one around ``nn.Transformer``, with what its users change."""

    def __init__(
        self, *, learned: bool = False, tied: bool = False, shared: bool = False, stacks_end_in_norms: bool = True, **options: Any
    ) -> None:
        super().__init__()
        self.transformer = nn.Transformer(
            d_model=D_MODEL, nhead=NUM_HEADS, num_encoder_layers=2, num_decoder_layers=1, dim_feedforward=32, **options
        )
        if not stacks_end_in_norms:
            self.transformer.encoder.norm = None
            self.transformer.decoder.norm = None
        self.target_tokens = nn.Embedding(TINY_VOCAB_SIZE, D_MODEL)
        self.source_tokens = self.target_tokens if shared else nn.Embedding(TINY_VOCAB_SIZE, D_MODEL)
        self.generator = nn.Linear(D_MODEL, TINY_VOCAB_SIZE, bias=not tied)
        if tied:
            self.generator.weight = self.target_tokens.weight
        if learned:
            self.positions = nn.Parameter(torch.randn(LONGEST, 1, D_MODEL))
        else:
            place = torch.arange(LONGEST)[:, None]
            rate = torch.exp(-torch.arange(0, D_MODEL, 2) * math.log(10000) / D_MODEL)
            table = torch.zeros(LONGEST, D_MODEL)
            table[:, 0::2], table[:, 1::2] = torch.sin(place * rate), torch.cos(place * rate)
            self.register_buffer("positions", table[:, None])

    def embed(self, tokens: nn.Embedding, ids: Tensor) -> Tensor:
        """[length] -> [length, 1, d_model]."""
        embedded: Tensor = tokens(ids)[:, None] * math.sqrt(D_MODEL) + self.positions[: len(ids)]
        return embedded

    def forward(self, source_ids: list[int], target_ids: list[int]) -> Tensor:
        """Logits [target, vocabulary]."""
        source = self.embed(self.source_tokens, torch.tensor(source_ids))
        target = self.embed(self.target_tokens, torch.tensor(target_ids))
        mask = nn.Transformer.generate_square_subsequent_mask(len(target_ids))
        logits: Tensor = self.generator(self.transformer(source, target, tgt_mask=mask))[:, 0]
        return logits


def random_tutorial(**options: Any) -> Tutorial:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = Tutorial(**options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


CONFIG: dict[str, Any] = {
    "format": "torch.nn.Transformer",
    "format_revision": 1,
    "name": "tutorial",
    "languages": [{"source": "en", "target": "de"}],
    "tokenizer": {"kind": "sentencepiece", "source_model": TOKENIZER_NAME, "target_model": TOKENIZER_NAME},
    "model": {
        "source_vocab_size": TINY_VOCAB_SIZE,
        "target_vocab_size": TINY_VOCAB_SIZE,
        "d_model": D_MODEL,
        "num_heads": NUM_HEADS,
        "num_encoder_layers": 2,
        "num_decoder_layers": 1,
        "encoder_d_ff": 32,
        "decoder_d_ff": 32,
        "max_positions": LONGEST,
        "output_bias": True,
        "share_embeddings": False,
        "tie_output": False,
        "pad_id": PAD_ID,
        "eos_id": EOS_ID,
        "decoder_start_id": BOS_ID,
    },
    "names": {
        "source_embedding": "source_tokens",
        "target_embedding": "target_tokens",
        "output": "generator",
        "ignored": ["positions"],
    },
    "source_prefix": [BOS_ID],
}
LEARNED = {"source_positions": "positions", "target_positions": "positions", "ignored": []}


def described(model: dict[str, Any] | None = None, names: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    config["model"] |= model or {}
    config["names"] |= names or {}
    return config | fields


def write(directory: Path, model: nn.Module, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    torch.save(model.state_dict(), directory / "model.pt")
    (directory / "config.json").write_text(json.dumps(config))
    (directory / TOKENIZER_NAME).write_bytes(tiny_sentencepiece())
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint", random_tutorial(), CONFIG)


def faults_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError, match=r"checkpoint .* cannot be used") as caught:
        read_checkpoint(path)
    return caught.value.faults


@pytest.mark.parametrize(
    ("options", "model", "names"),
    [
        pytest.param({}, {}, {}, id="as in the tutorial"),
        pytest.param({"norm_first": True}, {"norm": "pre"}, {}, id="norms first"),
        pytest.param({"stacks_end_in_norms": False}, {}, {}, id="norms of the layers alone"),
        pytest.param({"norm_first": True, "stacks_end_in_norms": False}, {"norm": "pre"}, {}, id="norms first alone"),
        pytest.param({"activation": "gelu"}, {"activation": "gelu"}, {}, id="gelu"),
        pytest.param({"bias": False}, {"bias": False}, {}, id="no biases"),
        pytest.param({"layer_norm_eps": 1e-2}, {"layer_norm_eps": 1e-2}, {}, id="another eps"),
        pytest.param({"learned": True}, {"positions": "learned"}, LEARNED, id="learned positions"),
        pytest.param({}, {"positions": "learned"}, LEARNED, id="a kept table"),
        pytest.param({"learned": True}, {"positions": "learned", "max_positions": 40}, LEARNED, id="part of a table"),
        pytest.param({"tied": True}, {"tie_output": True, "output_bias": False}, {}, id="tied output"),
        pytest.param(
            {"shared": True, "tied": True},
            {"share_embeddings": True, "tie_output": True, "output_bias": False},
            {"source_embedding": None, "output": None, "ignored": ["positions", "source_tokens.weight", "generator.weight"]},
            id="one matrix under one name",
        ),
    ],
)
def test_computes_what_the_model_does(
    tmp_path: Path, options: dict[str, Any], model: dict[str, Any], names: dict[str, Any]
) -> None:
    theirs = random_tutorial(**options)
    ours = build_model(read_checkpoint(write(tmp_path / "checkpoint", theirs, described(model, names))))
    source_ids, target_ids = [BOS_ID, 9, 20, 31, EOS_ID], [BOS_ID, 7, 40, 22]
    with torch.no_grad():
        expected = theirs(source_ids, target_ids)
        logits = ours(torch.tensor([source_ids]), torch.tensor([len(source_ids)]), torch.tensor([target_ids]))[0]
    assert (logits - expected).abs().max() < 1e-5


def test_what_the_config_says_is_passed_on(directory: Path) -> None:
    (directory / "samples.txt").write_text("a man runs\n\n")
    checkpoint = read_checkpoint(directory)
    assert (checkpoint.name, checkpoint.languages) == ("tutorial", [LanguagePair(source="en", target="de")])
    assert (checkpoint.source_prefix, checkpoint.source_ends_with_eos) == ((BOS_ID,), True)
    assert checkpoint.config.final_norm is True
    assert checkpoint.sample_lines == ["a man runs"]


@pytest.mark.slow
def test_exported_it_translates_as_the_model_does(directory: Path, tmp_path: Path) -> None:
    (directory / "samples.txt").write_text("\n".join(SAMPLE_LINES[:2]))
    bundle = export_bundle(directory, tmp_path / "bundle", precision="fp32", show_progress=False)
    model = random_tutorial()
    sources = [[BOS_ID, 5, 17, EOS_ID], [BOS_ID, *range(8, 30), EOS_ID]]
    expected = []
    for source in sources:
        target = [BOS_ID]
        with torch.no_grad():
            while len(target) <= 20 and target[-1] != EOS_ID:
                logits = model(source, target)[-1]
                logits[[PAD_ID, BOS_ID]] = -math.inf
                target.append(int(logits.argmax()))
        expected.append(tuple(i for i in target[1:] if i != EOS_ID))
    engine = Engine(bundle, EngineConfig(threads=1))
    engine.start()
    try:
        outcomes = translate(engine, [(tuple(source), DecodingOptions(max_target_tokens=20)) for source in sources])
    finally:
        engine.close()
    assert [outcome.hypotheses[0].target_ids for outcome in outcomes] == expected


@pytest.mark.parametrize(
    ("stored", "config"),
    [
        pytest.param(lambda model, path: save_file(model.state_dict(), path), {"weights": "model.safetensors"}, id="safetensors"),
        pytest.param(
            lambda model, path: torch.save({"epoch": 3, "model_state_dict": model.state_dict()}, path),
            {"weights": "last.ckpt", "state_dict": "model_state_dict"},
            id="of a training run",
        ),
    ],
)
def test_other_files(directory: Path, stored: Callable[[nn.Module, Path], None], config: dict[str, Any]) -> None:
    usual = read_checkpoint(directory).tensors
    stored(random_tutorial(), directory / config["weights"])
    (directory / "model.pt").unlink()
    (directory / "config.json").write_text(json.dumps(described(**config)))
    tensors = read_checkpoint(directory).tensors
    assert tensors.keys() == usual.keys()
    assert all(torch.equal(tensors[name], usual[name]) for name in usual)


@pytest.mark.parametrize("shape", [(LONGEST, D_MODEL), (1, LONGEST, D_MODEL), (1, LONGEST, 1, D_MODEL)], ids=str)
def test_tables_of_positions_with_dimensions_of_one(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model = random_tutorial(learned=True)
    expected = model.positions.detach()[:, 0]
    model.positions = nn.Parameter(model.positions.detach().reshape(shape))
    tensors = read_checkpoint(write(tmp_path / "c", model, described({"positions": "learned"}, LEARNED))).tensors
    assert torch.equal(tensors["encoder.embedding.position_table"], expected)
    assert torch.equal(tensors["decoder.embedding.position_table"], expected)


def test_two_tables_in_one_are_none(tmp_path: Path) -> None:
    model = random_tutorial(learned=True)
    model.positions = nn.Parameter(torch.zeros(2, LONGEST, D_MODEL))
    assert faults_of(write(tmp_path / "c", model, described({"positions": "learned"}, LEARNED))) == (
        f"model.pt: positions (of the encoder): shape [2, {LONGEST}, 16], expected [{LONGEST}, 16]",
        f"model.pt: positions (of the decoder): shape [2, {LONGEST}, 16], expected [{LONGEST}, 16]",
    )


@pytest.mark.parametrize(
    ("has_norms", "stated", "there_is"),
    [(True, False, "is false, and there is"), (False, True, "is true, and there is no")],
    ids=["there", "not there"],
)
def test_a_stated_norm_that_the_tensors_contradict(tmp_path: Path, has_norms: bool, stated: bool, there_is: str) -> None:
    model = random_tutorial(stacks_end_in_norms=has_norms)
    assert faults_of(write(tmp_path / "c", model, described({"final_norm": stated}))) == (
        f"config.json: model.final_norm: {there_is} transformer.encoder.norm.weight in model.pt",
    )
    (tmp_path / "c" / "config.json").write_text(json.dumps(described({"final_norm": has_norms})))
    assert read_checkpoint(tmp_path / "c").config.final_norm is has_norms


@pytest.mark.parametrize(
    "change",
    [torch.zeros_like, lambda table: table * 0.9, lambda table: table.roll(-1, 0)],
    ids=["zeros", "scaled", "from another position on"],
)
def test_an_ignored_table_of_other_positions_than_the_computed_ones(tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
    model = random_tutorial()
    model.positions.copy_(change(model.positions))
    (fault,) = faults_of(write(tmp_path / "c", model, described({"max_positions": LONGEST - 1})))
    assert fault == (
        "config.json: names.ignored: positions looks like a table of positions and is not the computed one: "
        "name it as source_positions and target_positions"
    )


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        # As many rows as tokens; fewer rows than positions; of another width; of no one table; whole numbers.
        ((TINY_VOCAB_SIZE, D_MODEL), torch.float32),
        ((LONGEST // 4, D_MODEL), torch.float32),
        ((LONGEST, D_MODEL // 2), torch.float32),
        ((2, LONGEST, D_MODEL), torch.float32),
        ((LONGEST,), torch.int64),
        ((), torch.float32),
    ],
    ids=str,
)
def test_ignored_tensors_that_are_no_tables_of_positions(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = random_tutorial()
    model.register_buffer("other", torch.ones(shape, dtype=dtype))
    config = described({"max_positions": LONGEST // 2}, {"ignored": ["positions", "other", "not there"]})
    assert read_checkpoint(write(tmp_path / "c", model, config)).config.max_positions == LONGEST // 2


def test_an_ignored_table_as_it_was_computed_or_stored_in_half_precision(tmp_path: Path) -> None:
    model = random_tutorial().half()
    assert read_checkpoint(write(tmp_path / "c", model, CONFIG)).config.positions == "sinusoidal"


def test_stacks_of_other_names(tmp_path: Path) -> None:
    model = random_tutorial()
    apart = nn.ModuleDict({"enc": model.transformer.encoder, "dec": model.transformer.decoder})
    apart.update({name: getattr(model, name) for name in ("source_tokens", "target_tokens", "generator")})
    config = described(names={"encoder": "enc", "decoder": "dec", "ignored": []})
    tensors = read_checkpoint(write(tmp_path / "apart", apart, config)).tensors
    usual = read_checkpoint(write(tmp_path / "usual", model, CONFIG)).tensors
    assert all(torch.equal(tensors[name], usual[name]) for name in usual)


def test_settings_that_contradict_each_other_are_told_at_once(directory: Path) -> None:
    config = described(
        {"positions": "relative", "gated": True, "embedding_norm": True, "norm_kind": "rms"},
        {"output": None, "source_embedding": None, "source_positions": "positions", "target_embedding_norm": "norm"},
        weights="../model.safetensors",
        state_dict="model",
        source_prefix=[64],
    )
    (directory / "config.json").write_text(json.dumps(config))
    assert faults_of(directory) == (
        "config.json: weights: '../model.safetensors': is not a plain file name; nothing outside the directory is read",
        "config.json: state_dict: a .safetensors holds tensors alone",
        "config.json: names.output: is needed where model.tie_output is false",
        "config.json: names.source_embedding: is needed where model.share_embeddings is false",
        'config.json: names.source_positions: goes with "positions": "learned" of the model, and only with it',
        'config.json: names.source_embedding_norm: goes with "embedding_norm": true of the model, and only with it',
        "config.json: source_prefix: [64] is outside the source vocabulary of 64",
        "config.json: model.positions: torch's attention has no relative ones",
        "config.json: model.norm_kind: 'rms' is not what torch's layers have, only 'layer'",
        "config.json: model.gated: torch's layers are not",
    )


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (b"{", "config.json: is not JSON"),
        (b'{"format": "torch.nn.Transformer", "format_revision": 2}', "config.json: format_revision: 2 is not supported"),
        (json.dumps(described(names={"decoder_start": 1})).encode(), "config.json: names.decoder_start: Extra inputs"),
        (json.dumps(described(source_prefix=[-1])).encode(), "config.json: source_prefix.0: Input should be"),
        (json.dumps(described({"d_model": 10**30})).encode(), "config.json: model.d_model: Input should be less than"),
    ],
)
def test_a_config_that_is_none(directory: Path, config: bytes, fault: str) -> None:
    (directory / "config.json").write_bytes(config + b' "torch.nn.Transformer"' * (config == b"{"))
    assert faults_of(directory)[0].startswith(fault)


def change_wrongly(state: dict[str, Any]) -> None:
    del state["transformer.encoder.layers.1.self_attn.in_proj_weight"]
    state["transformer.encoder.layers.0.self_attn.in_proj_bias"] = torch.zeros(3)
    state["transformer.decoder.layers.0.multihead_attn.in_proj_bias"] = torch.tensor(1.0)
    state["transformer.decoder.layers.0.linear1.weight"][3, 5] = math.nan
    state["classifier.weight"] = torch.zeros(2)


def test_every_tensor_that_is_wrong_is_named_at_once(directory: Path) -> None:
    state = random_tutorial().state_dict()
    change_wrongly(state)
    torch.save(state, directory / "model.pt")
    first, second = "transformer.encoder.layers.0.self_attn", "transformer.encoder.layers.1.self_attn"
    cross = "transformer.decoder.layers.0.multihead_attn"
    parts = ("query", "key", "value")
    assert set(faults_of(directory)) == {
        *(f"model.pt: {second}.{part} of in_proj.weight: missing, expected [16, 16]" for part in parts),
        *(f"model.pt: {first}.{part} of in_proj.bias: shape [1], expected [16]" for part in parts),
        *(f"model.pt: {cross}.{part} of in_proj.bias: missing, expected [16]" for part in parts),
        f"model.pt: {cross}.in_proj_bias: extra []",
        "model.pt: transformer.decoder.layers.0.linear1.weight: 1 of 512 values are not finite",
        "model.pt: classifier.weight: extra [2]",
    }


@pytest.mark.parametrize(
    ("document", "fields", "fault"),
    [
        pytest.param(None, {}, "model.pt: is missing", id="missing"),
        pytest.param(b"\x80\x02garbage", {}, "model.pt: cannot be read", id="garbage"),
        pytest.param([1], {}, "model.pt: holds no dict", id="a list"),
        pytest.param({}, {}, "model.pt: holds nothing", id="an empty dict"),
        pytest.param({"model": {}}, {"state_dict": "model"}, "model.pt: model: is no state dict", id="none in a field"),
        pytest.param(save({}), {"weights": "model.safetensors"}, "model.safetensors: holds no tensors", id="no tensors"),
        pytest.param({"epoch": 3}, {}, "model.pt: epoch: is no dense tensor", id="numbers"),
        pytest.param({"epoch": 3}, {"state_dict": "model"}, "model.pt: model: is no state dict", id="no such field"),
        pytest.param(b"{}", {"weights": "model.safetensors"}, "model.safetensors: cannot be read", id="no safetensors"),
    ],
)
def test_weights_that_are_none(directory: Path, document: Any, fields: dict[str, Any], fault: str) -> None:
    path = directory / fields.get("weights", "model.pt")
    (directory / "model.pt").unlink()
    if isinstance(document, bytes):
        path.write_bytes(document)
    elif document is not None:
        torch.save(document, path)
    (directory / "config.json").write_text(json.dumps(described(**fields)))
    assert any(found.startswith(fault) for found in faults_of(directory))


def test_a_missing_tokenizer_is_told_beside_other_faults(directory: Path) -> None:
    (directory / TOKENIZER_NAME).unlink()
    (directory / "model.pt").unlink()
    assert faults_of(directory) == (f"{TOKENIZER_NAME}: is missing", "model.pt: is missing")


def test_the_config_of_the_example_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "examples" / "torch_transformer" / "README.md").read_text()
    (tmp_path / "config.json").write_text(page.partition("```json\n")[2].partition("```")[0])
    assert faults_of(tmp_path) == ("de.json: is missing", "en.json: is missing", "model.pt: is missing")
