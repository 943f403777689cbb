"""Marian's settings, as they are stored inside a model: what they say of the architecture, and which make another one.

Knows every setting by name, and Marian's defaults; does not know tensors (``marian_npz.py``) or the files beside a model
(``marian_npz_files.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from export.checkpoint.hugging_face import setting_faults
from export.checkpoint.plain_yaml import read_yaml
from export.model import Activation, Depth, Heads, ModelConfig, NormPlacement, Size
from serving.manifest import field_faults

MODEL_CONFIG_NAME = "special:model.yml"

_LAYER_NORM_EPS = 1e-6
# Settings are a few kilobytes.
_MAX_CONFIG_BYTES = 2**20

_ACTIVATIONS: dict[str, Activation] = {"swish": "silu", "relu": "relu", "gelu": "gelu"}
# Up to this version ``gelu`` was x * sigmoid(1.702 x).
_LAST_APPROXIMATE_GELU = (1, 12, 0)
# Operations before a sub-layer, after it and after the last layer, without dropout.
_NORMS: dict[tuple[str, str, str], NormPlacement] = {("", "an", ""): "post", ("n", "a", "n"): "pre"}
_OFF = ("false", "")
_NONE: tuple[Any, ...] = ("", [])
# Settings that would make another architecture, and the values with which they do not. Text, as the file has it.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "type": ("transformer",),
    "transformer-ffn-depth": ("2",),
    "transformer-decoder-ffn-depth": ("2", "0"),
    "transformer-no-projection": _OFF,
    "transformer-no-bias": _OFF,
    "transformer-no-affine": _OFF,
    "transformer-pool": _OFF,
    "transformer-attention-mask": ("default", ""),
    "transformer-disable-position-embeddings": _OFF,
    "factors-dim-emb": ("0", ""),
    "lemma-dim-emb": ("0", ""),
    "lemma-dependency": _NONE,
    "input-types": (*_NONE, ["sequence", "sequence"]),
    "right-left": _OFF,
    "ulr": _OFF,
}


class MarianConfig(BaseModel):
    """The settings that make the architecture, with Marian's defaults; they come as text."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=lambda name: name.replace("_", "-"))

    dim_emb: Size = 512
    dim_vocabs: Annotated[list[Size], Field(min_length=2, max_length=2)]
    enc_depth: Depth = 1
    dec_depth: Depth = 1
    transformer_decoder_autoreg: str = "self-attention"
    # Of each decoder layer, the one whose tensors it has; none where each has its own.
    transformer_tied_layers: Annotated[list[Depth], BeforeValidator(lambda value: value or [])] = []
    transformer_heads: Heads = 8
    transformer_dim_ffn: Size = 2048
    # 0: as the encoder's.
    transformer_decoder_dim_ffn: Annotated[int, Field(ge=0, le=2**24)] = 0
    transformer_ffn_activation: str = "swish"
    transformer_preprocess: str = ""
    transformer_postprocess_emb: str = "d"
    transformer_postprocess: str = "dan"
    transformer_postprocess_top: str = ""
    tied_embeddings: bool = False
    tied_embeddings_src: bool = False
    tied_embeddings_all: bool = False
    output_omit_bias: bool = False
    # A number from 1 up; that layer's first head is trained with alignments.
    transformer_guided_alignment_layer: Literal["last"] | Depth = "last"
    # Of Marian, for example "v1.12.42 b7be0e964 2025-05-24 22:34:42 -0700"; older models state none.
    version: str = ""

    @property
    def norms(self) -> tuple[str, str, str]:
        """Operations before a sub-layer, after it and after the last layer; dropout does nothing here."""
        stages = (self.transformer_preprocess, self.transformer_postprocess, self.transformer_postprocess_top)
        before, after, top = (operations.replace("d", "") for operations in stages)
        return before, after, top

    @property
    def embedding_operations(self) -> str:
        """Operations after the embedding, without dropout."""
        return self.transformer_postprocess_emb.replace("d", "")

    @property
    def activation(self) -> Activation:
        """Between the products of a feed-forward network, as the version computed it that the model was trained with."""
        found = re.match(r"v?(\d{1,4})\.(\d{1,4})\.(\d{1,4})", self.version)
        version = tuple(map(int, found.groups())) if found else (0, 0, 0)
        is_approximate = self.transformer_ffn_activation == "gelu" and version <= _LAST_APPROXIMATE_GELU
        return "gelu_sigmoid" if is_approximate else _ACTIVATIONS[self.transformer_ffn_activation]

    @property
    def shares_embeddings(self) -> bool:
        """Whether there is one embedding for both sides."""
        return self.tied_embeddings_all or self.tied_embeddings_src

    def architecture_faults(self) -> list[str]:
        """Every setting that contradicts another, or that this project's module has no place for."""
        faults = []
        if (kind := self.transformer_decoder_autoreg) != "self-attention":
            advice = "; students, as Bergamot's and Firefox's, have such decoders: export the teacher" if kind == "rnn" else ""
            faults.append(f"transformer-decoder-autoreg: {kind!r} is not supported, only 'self-attention'{advice}")
        if (tied := self.transformer_tied_layers) and (len(tied) != self.dec_depth or max(tied) > self.dec_depth):
            faults.append(f"transformer-tied-layers: {tied[:8]} do not say of which layer each of dec-depth {self.dec_depth} is")
        if self.transformer_ffn_activation not in _ACTIVATIONS:
            supported = " or ".join(map(repr, _ACTIVATIONS))
            faults.append(f"transformer-ffn-activation: {self.transformer_ffn_activation!r} is not supported, only {supported}")
        if self.norms not in _NORMS:
            found = (self.transformer_preprocess, self.transformer_postprocess, self.transformer_postprocess_top)
            faults.append(
                "transformer-preprocess, transformer-postprocess, transformer-postprocess-top: "
                f"{', '.join(map(repr, found))} are not supported, only '', 'dan', '' or 'n', 'da', 'n'"
            )
        if self.embedding_operations not in ("", "n"):
            faults.append(
                f"transformer-postprocess-emb: {self.transformer_postprocess_emb!r} is not supported, only '', 'd', 'n' or 'nd'"
            )
        if self.dim_emb % self.transformer_heads or self.dim_emb % 2 or self.dim_emb < 4:
            faults.append(f"dim-emb: {self.dim_emb} is no multiple of 2 and of transformer-heads {self.transformer_heads}")
        if self.shares_embeddings and self.dim_vocabs[0] != self.dim_vocabs[1]:
            faults.append(f"dim-vocabs: {self.dim_vocabs} differ, and the embeddings are tied")
        if self.transformer_guided_alignment_layer != "last" and self.transformer_guided_alignment_layer > self.dec_depth:
            there_are = f"there are {self.dec_depth} layers in the decoder"
            faults.append(f"transformer-guided-alignment-layer: {self.transformer_guided_alignment_layer}, {there_are}")
        return faults

    def architecture(self, eos_id: int, num_positions: int, *, trained_positions: bool) -> ModelConfig:
        """The same for ``Transformer``, as Marian has it: without a start token. Only where there are no faults."""
        guided = self.transformer_guided_alignment_layer
        return ModelConfig(
            source_vocab_size=self.dim_vocabs[0],
            target_vocab_size=self.dim_vocabs[1],
            d_model=self.dim_emb,
            num_heads=self.transformer_heads,
            num_encoder_layers=self.enc_depth,
            num_decoder_layers=self.dec_depth,
            encoder_d_ff=self.transformer_dim_ffn,
            decoder_d_ff=self.transformer_decoder_dim_ffn or self.transformer_dim_ffn,
            norm=_NORMS[self.norms],
            activation=self.activation,
            positions="learned",
            max_positions=num_positions,
            output_bias=True,
            scale_embedding=not trained_positions,
            share_embeddings=self.shares_embeddings,
            tie_output=self.tied_embeddings or self.tied_embeddings_all,
            embedding_norm=self.embedding_operations == "n",
            layer_norm_eps=_LAYER_NORM_EPS,
            alignment_layer=(self.dec_depth if guided == "last" else guided) - 1,
            # What Marian pads with; behind a source's end nothing is looked at.
            pad_id=eos_id,
            eos_id=eos_id,
            decoder_start_id=eos_id,
        )


def read_settings(path: Path, arrays: dict[str, NDArray[Any]], faults: list[str]) -> MarianConfig | None:
    """The settings inside the model, which are taken out of ``arrays``; None after a fault."""
    stored = arrays.pop(MODEL_CONFIG_NAME, None)
    if stored is None:
        faults.append(f"{path.name}: has no {MODEL_CONFIG_NAME}, so it is no model of Marian's")
        return None
    if stored.dtype.itemsize != 1 or stored.nbytes > _MAX_CONFIG_BYTES:
        faults.append(f"{path.name}: {MODEL_CONFIG_NAME}: is no text of at most {_MAX_CONFIG_BYTES} bytes")
        return None
    called = f"{path.name}: {MODEL_CONFIG_NAME}"
    try:
        document = read_yaml(stored.tobytes().rstrip(b"\0"))
    except ValueError as error:
        faults.append(f"{called}: {error}")
        return None
    found = setting_faults({"type": None, **document}, _ONLY)
    settings = None
    try:
        settings = MarianConfig.model_validate(document)
        found += settings.architecture_faults()
    except ValidationError as error:
        found += field_faults(error.errors())
    faults += [f"{called}: {fault}" for fault in found]
    return None if found else settings
