"""OpenNMT-py's translation models: one ``.pt`` with tensors, settings and vocabularies, of versions 0 to 3.

The ``.pt``, or a directory with one; where that is without weights, the ``.safetensors`` or ``.00.safetensors`` of the same name.
A SentencePiece model or byte-pair codes, where they lie beside it, cut the text. Knows the files' layout, the settings of
OpenNMT-py's ``transformer`` and the names of its tensors; does not know vocabularies (``opennmt_py_vocabulary.py``) or what a
checkpoint becomes.

**Settings** are the command line's, an ``argparse.Namespace``; those that make the architecture are read with OpenNMT-py's
defaults. What would make one that this project's module has no place for is refused, all at once.

**What OpenNMT-py does its own way** (onmt/encoders, onmt/decoders, onmt/inputters/text_utils.py): norms come before sub-layers
and add 1e-6; a source has no end-of-sentence token; a target starts with ``<s>``; padding is ``<blank>``; positions are a table
in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from export.checkpoint.archives import file_sha256, read_pickle, read_safetensors, settings_of, weights_of
from export.checkpoint.base import Checkpoint, alignment, read_samples
from export.checkpoint.hugging_face import rename, setting_faults
from export.checkpoint.opennmt_py_vocabulary import CLASSES, PADDING_TOKEN, read_vocabularies
from export.checkpoint.vocabulary import END_TOKEN, Vocabularies, choose_tokenizer
from export.model import Activation, Depth, Heads, ModelConfig, sinusoidal_table
from serving.errors import CheckpointError
from serving.manifest import field_faults

_CONVERSION = (
    "where OpenNMT-py is installed, and if you trust the file, write it anew without: "
    'state = torch.load(FILE, weights_only=False); vocab = {side: state["vocab"][side].base_field.vocab.itos for side in '
    '("src", "tgt")}; torch.save({"model": state["model"], "generator": state["generator"], "opt": state["opt"], '
    '"vocab": vocab}, NEW_FILE)'
)
# A file's table has 5000 positions; this is far beyond a sentence.
_MAX_POSITIONS = 1024

_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    # The approximation by tanh, as CTranslate2's converter reads it.
    "fast_gelu": "gelu_tanh",
    "silu": "silu",
    "gated-gelu": "gelu",
    "gated-silu": "silu",
}
# By this matrix a gated feed-forward network is told: what is called ``silu`` was one at first.
_FACTOR = "feed_forward.w_3"
_OFF = (None, False, 0)
# Settings that would make another architecture, and the values with which they do not.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "copy_attn": _OFF,
    "coverage_attn": _OFF,
    "data_task": (None, "seq2seq"),
    "decoder_type": ("transformer",),
    "encoder_type": ("transformer",),
    "generator_function": (None, "softmax"),
    "lora_layers": (None, []),
    "max_relative_positions": _OFF,
    "model_task": (None, "seq2seq"),
    "model_type": (None, "text"),
    "multiquery": _OFF,
    "num_experts": _OFF,
    "num_kv": _OFF,
    "parallel_residual": _OFF,
    "position_encoding": (True,),
    "quant_layers": (None, []),
    "relative_positions_buckets": _OFF,
    "self_attn_type": (None, "scaled-dot", "scaled-dot-flash"),
    "shared_layer_norm": _OFF,
    "sliding_window": _OFF,
    "src_feats_vocab": (None, {}, []),
}
# Parts of a file that are its weights.
_WEIGHTS = ("model", "generator")
_EMBEDDING = "embeddings.make_embedding.emb_luts.0.weight"
_POSITIONS = "embeddings.make_embedding.pe.pe"
_PROJECTIONS = {"linear_query": "query", "linear_keys": "key", "linear_values": "value", "final_linear": "output"}


class _OpenNmtConfig(BaseModel):
    """The settings that make the architecture, with OpenNMT-py's defaults. Sizes are those of the tensors."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    enc_layers: Depth
    dec_layers: Depth
    heads: Heads = 8
    pos_ffn_activation_fn: str = "relu"
    share_embeddings: bool = False
    share_decoder_embeddings: bool = False
    layer_norm: Literal["standard", "rms"] | None = None
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    # The file may lack biases that these leave out.
    add_qkvbias: bool = True
    add_ffnbias: bool = True
    src_subword_model: str | None = None
    tgt_subword_model: str | None = None
    # Of models that were trained with alignments (of some weight); for others CTranslate2 takes the last layer's first head.
    lambda_align: float | None = None
    alignment_layer: int = -3
    alignment_heads: int = 0

    def architecture_faults(self, d_model: int) -> list[str]:
        """Every setting that contradicts another, or that this project's module has no place for."""
        faults = []
        if self.pos_ffn_activation_fn not in _ACTIVATIONS:
            supported = " or ".join(map(repr, _ACTIVATIONS))
            faults.append(f"pos_ffn_activation_fn: {self.pos_ffn_activation_fn!r} is not supported, only {supported}")
        if d_model % self.heads or d_model % 2:
            faults.append(f"heads: an embedding of {d_model} is no multiple of 2 and of {self.heads}")
        self.alignment(faults)
        return faults

    def alignment(self, faults: list[str]) -> tuple[int, int | None]:
        """See ``alignment``."""
        layer, heads = (self.alignment_layer, self.alignment_heads) if self.lambda_align else (-1, 1)
        return alignment(layer, heads, num_layers=self.dec_layers, num_heads=self.heads, faults=faults)


class OpenNmtPyReader:
    """Reads this format; see ``CheckpointReader``."""

    description = "OpenNMT-py (a .pt, or a directory with one)"

    def recognizes(self, path: Path) -> bool:
        """Whether it is a ``.pt`` or a directory with one; dictionaries beside it, as fairseq has them, are looked for before."""
        return bool(list(path.glob("*.pt"))) if path.is_dir() else path.suffix == ".pt" and path.is_file()

    def read(self, path: Path) -> Checkpoint:
        """Read and check the whole checkpoint.

        Raises:
            CheckpointError: with every fault. Tensors are looked at only when settings and vocabularies are known.
        """
        faults: list[str] = []
        directory = path if path.is_dir() else path.parent
        models = sorted(path.glob("*.pt")) if path.is_dir() else [path]
        if len(models) != 1:
            names = ", ".join(model.name for model in models)
            raise CheckpointError(
                path, [f"one model is needed, and there are several: {names}; give one of them instead of the directory"]
            )
        model_path = models[0]
        document = read_pickle(model_path, CLASSES, _CONVERSION, faults)
        if not document:
            raise CheckpointError(path, faults)
        is_apart = "opt" in document and not document.keys() & _WEIGHTS
        needed = ("vocab", "opt") if is_apart else (*_WEIGHTS, "vocab", "opt")
        if missing := [name for name in needed if name not in document]:
            raise CheckpointError(path, [f"{model_path.name}: has no {', '.join(missing)}, so it is no model of OpenNMT-py's"])
        weights_path = _weights_beside(model_path) if is_apart else model_path
        weights = _weights_in(weights_path, faults) if is_apart else document
        state = _state(weights, weights_path.name, faults) if weights else {}
        is_sized = _check_sizes(state, weights_path.name, faults)
        settings = _settings(document["opt"], state if is_sized else {}, model_path.name, faults)
        vocabularies, start = read_vocabularies(document["vocab"], model_path.name, faults)
        sample_lines = read_samples(directory, faults)
        if settings is None or vocabularies is None or not is_sized:
            raise CheckpointError(path, faults)
        if settings.share_embeddings and vocabularies.source != vocabularies.target:
            raise CheckpointError(path, [*faults, f"{model_path.name}: share_embeddings: the vocabularies of src and tgt differ"])
        config = _architecture(settings, vocabularies, start, state)
        tensors = _tensors(config, settings, state, weights_path.name, faults)
        choice = choose_tokenizer(directory, vocabularies, faults, sentencepiece=_subword_models(settings))
        if faults or choice is None:
            raise CheckpointError(path, faults)
        return Checkpoint(
            name=directory.resolve().name if path.is_dir() else model_path.stem,
            config=config,
            tensors=tensors,
            languages=[],
            source_ends_with_eos=False,
            tokenizer=choice.spec,
            tokenizer_files=choice.files,
            weights_sha256=file_sha256(weights_path),
            sample_lines=sample_lines,
            warnings=choice.warnings,
        )


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Name in OpenNMT-py -> ours, of every tensor; a shared matrix has several."""
    names = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in _parameter_names(config) for kind in ("weight", "bias")}
    for side in ("decoder", "encoder"):
        names[f"{side}.{_EMBEDDING}"] = f"{side}.embedding.tokens.weight"
        names[f"{side}.{_POSITIONS}"] = f"{side}.embedding.position_table"
    return {**names, "generator.weight": "output.weight", "generator.bias": "output.bias"}


def _parameter_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(OpenNMT-py's name, ours) of every projection and norm, without ``.weight`` and ``.bias``."""
    sides = {
        "encoder": ("transformer", config.num_encoder_layers, {"self_attn": ("layer_norm", "self_attention")}),
        "decoder": (
            "transformer_layers",
            config.num_decoder_layers,
            {"self_attn": ("layer_norm_1", "self_attention"), "context_attn": ("layer_norm_2", "cross_attention")},
        ),
    }
    for side, (layers, depth, attentions) in sides.items():
        for i in range(depth):
            theirs, ours = f"{side}.{layers}.{i}", f"{side}.layers.{i}"
            for attn, (norm, attention) in attentions.items():
                for linear, projection in _PROJECTIONS.items():
                    yield f"{theirs}.{attn}.{linear}", f"{ours}.{attention}.{projection}"
                yield f"{theirs}.{norm}", f"{ours}.{attention}_residual.norm"
            yield f"{theirs}.feed_forward.w_1", f"{ours}.feed_forward.inner"
            if config.gated:
                yield f"{theirs}.{_FACTOR}", f"{ours}.feed_forward.factor"
            yield f"{theirs}.feed_forward.w_2", f"{ours}.feed_forward.outer"
            yield f"{theirs}.feed_forward.layer_norm", f"{ours}.feed_forward_residual.norm"
        yield f"{side}.layer_norm", f"{side}.final_norm"


def _weights_beside(model_path: Path) -> Path:
    """Where ``-save_format safetensors`` puts what a ``.pt`` is without; to decode, its files need a part's number."""
    trained, decoded = (model_path.with_suffix(f"{number}.safetensors") for number in ("", ".00"))
    return decoded if decoded.is_file() and not trained.is_file() else trained


def _weights_in(path: Path, faults: list[str]) -> dict[str, Any]:
    """What a ``.safetensors`` holds, as the two parts of a ``.pt``; nothing after a fault."""
    if not path.is_file():
        faults.append(f"{path.name}: is missing, and {path.stem}.pt is without weights")
        return {}
    stored = read_safetensors(path, faults)
    if not stored:
        return {}
    prefix = "generator."
    generator = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    return {"model": {name: stored[name] for name in stored if not name.startswith(prefix)}, "generator": generator}


def _state(document: Mapping[str, Any], file_name: str, faults: list[str]) -> dict[str, Tensor]:
    """All tensors by the names that they have today; none after a fault."""
    model = weights_of(document, "model", file_name, faults)
    generator = weights_of(document, "generator", file_name, faults)
    if not model or not generator:
        return {}
    # It was a sequence of modules.
    return {**model, **{f"generator.{name.removeprefix('0.')}": tensor for name, tensor in generator.items()}}


def _check_sizes(state: Mapping[str, Tensor], file_name: str, faults: list[str]) -> bool:
    """Whether the matrices that tell the sizes are there; what is wrong with them goes to ``faults``."""
    sizeless = [name for name in _sizing_names() if name not in state or state[name].dim() != 2 or not state[name].numel()]
    faults += [f"{file_name}: {name}: is missing, or no matrix" for name in sizeless if state]
    return not sizeless


def _settings(stored: Any, state: Mapping[str, Tensor], file_name: str, faults: list[str]) -> _OpenNmtConfig | None:
    """The settings; None after a fault."""
    options = settings_of(stored, f"{file_name}: opt", faults)
    if options is None:
        return None
    found = setting_faults({"position_encoding": False, "encoder_type": None, "decoder_type": None, **options}, _ONLY)
    settings = None
    try:
        settings = _OpenNmtConfig.model_validate(options)
    except ValidationError as error:
        found += field_faults(error.errors())
    if settings is not None and state:
        found += settings.architecture_faults(state[f"decoder.{_EMBEDDING}"].shape[1])
    faults += [f"{file_name}: {fault}" for fault in found]
    return None if found else settings


def _sizing_names() -> tuple[str, str, str]:
    """Matrices that tell the sizes: the settings have several names for them, and values that stand for others."""
    return (
        f"decoder.{_EMBEDDING}",
        "encoder.transformer.0.feed_forward.w_1.weight",
        "decoder.transformer_layers.0.feed_forward.w_1.weight",
    )


def _architecture(settings: _OpenNmtConfig, vocabularies: Vocabularies, start: str, state: Mapping[str, Tensor]) -> ModelConfig:
    embedding, encoder_inner, decoder_inner = (state[name] for name in _sizing_names())
    target = vocabularies.target
    tables = [state[name] for side in ("encoder", "decoder") if (name := f"{side}.{_POSITIONS}") in state]
    rows = min((table.shape[0] for table in tables if table.dim()), default=_MAX_POSITIONS)
    alignment_layer, alignment_heads = settings.alignment([])
    return ModelConfig(
        source_vocab_size=len(vocabularies.source),
        target_vocab_size=len(target),
        d_model=embedding.shape[1],
        num_heads=settings.heads,
        num_encoder_layers=settings.enc_layers,
        num_decoder_layers=settings.dec_layers,
        encoder_d_ff=encoder_inner.shape[0],
        decoder_d_ff=decoder_inner.shape[0],
        norm="pre",
        norm_kind="rms" if settings.layer_norm == "rms" else "layer",
        activation=_ACTIVATIONS[settings.pos_ffn_activation_fn],
        gated=f"encoder.transformer.0.{_FACTOR}.weight" in state,
        positions="learned",
        max_positions=max(1, min(rows, _MAX_POSITIONS)),
        output_bias=True,
        share_embeddings=settings.share_embeddings,
        tie_output=settings.share_decoder_embeddings,
        layer_norm_eps=settings.norm_eps,
        alignment_layer=alignment_layer,
        alignment_heads=alignment_heads,
        pad_id=target.get(PADDING_TOKEN, target[END_TOKEN]),
        eos_id=target[END_TOKEN],
        decoder_start_id=target[start],
    )


def _tensors(
    config: ModelConfig, settings: _OpenNmtConfig, state: Mapping[str, Tensor], file_name: str, faults: list[str]
) -> dict[str, Tensor]:
    """Tensors by our names; what is wrong with them goes to ``faults``."""
    stored = {_renewed(name): tensor for name, tensor in state.items() if not name.endswith(".mask")}
    names = tensor_names(config)
    for side in ("encoder", "decoder"):
        table = stored.get(f"{side}.{_POSITIONS}")
        if table is None:
            stored[f"{side}.{_POSITIONS}"] = sinusoidal_table(config.max_positions, config.d_model)
        elif table.dim() == 3 and table.shape[1] == 1:
            stored[f"{side}.{_POSITIONS}"] = table[: config.max_positions, 0]
    for left_out, part in ((not settings.add_qkvbias, "_attn."), (not settings.add_ffnbias, ".feed_forward.w_")):
        for name in [name for name in names if left_out and part in name and name.endswith(".bias")]:
            weight = stored.get(f"{name.removesuffix('bias')}weight")
            if weight is not None and weight.dim() == 2:
                stored.setdefault(name, torch.zeros(weight.shape[0]))
    return rename(config, stored, names, file_name, faults)


def _renewed(name: str) -> str:
    """Norms had names of their own."""
    return name.replace(".a_2", ".weight").replace(".b_2", ".bias") if name.endswith((".a_2", ".b_2")) else name


def _subword_models(settings: _OpenNmtConfig) -> list[tuple[str, str]]:
    """SentencePiece models that the settings name, by the last part: paths are those of the machine that trained."""
    if not settings.src_subword_model or not settings.tgt_subword_model:
        return []
    source, target = (PureWindowsPath(name).name for name in (settings.src_subword_model, settings.tgt_subword_model))
    return [(source, target)] if source.endswith((".model", ".spm")) and target.endswith((".model", ".spm")) else []
