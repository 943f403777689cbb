"""The fields of BART's ``config.json`` and of its descendants', with each family's defaults.

Knows which values contradict each other or have no place in this project's module; does not know files, tensors or tokenizers.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from export.checkpoint.hugging_face import ACTIVATIONS, first_of
from export.model import Depth, Heads, Length, ModelConfig, NormPlacement, Size

TokenId = Annotated[int, Field(ge=0)]


class BartFields(BaseModel):
    """The fields of ``config.json`` that make the architecture, with the defaults of ``BartConfig``."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    vocab_size: Size = 50265
    max_position_embeddings: Length = 1024
    encoder_layers: Depth = 12
    encoder_ffn_dim: Size = 4096
    encoder_attention_heads: Heads = 16
    decoder_layers: Depth = 12
    decoder_ffn_dim: Size = 4096
    decoder_attention_heads: Heads = 16
    activation_function: str = "gelu"
    d_model: Annotated[int, Field(ge=4, le=2**24)] = 1024
    scale_embedding: bool = False
    pad_token_id: TokenId = 1
    bos_token_id: TokenId | None = 0
    eos_token_id: Annotated[TokenId, BeforeValidator(first_of)] = 2
    decoder_start_token_id: TokenId = 2
    tie_word_embeddings: bool = True

    def architecture_faults(self) -> list[str]:
        """Every field whose value contradicts another, or is one that this project's module has no place for."""
        faults = []
        if self.activation_function not in ACTIVATIONS:
            faults.append(
                f"activation_function: {self.activation_function!r} is not supported, only {' or '.join(map(repr, ACTIVATIONS))}"
            )
        if self.encoder_attention_heads != self.decoder_attention_heads:
            faults.append(
                f"encoder_attention_heads, decoder_attention_heads: {self.encoder_attention_heads} and "
                f"{self.decoder_attention_heads}; different numbers are not supported"
            )
        if self.d_model % self.encoder_attention_heads or self.d_model % 2:
            faults.append(
                f"d_model: {self.d_model} is no multiple of 2 and of encoder_attention_heads {self.encoder_attention_heads}"
            )
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            token_id = getattr(self, name)
            if token_id >= self.vocab_size:
                faults.append(f"{name}: {token_id} is outside a vocabulary of {self.vocab_size}")
        return faults

    def architecture(self, norm: NormPlacement, *, embedding_norm: bool, output_bias: bool) -> ModelConfig:
        """The same for ``Transformer``, without tables of positions; only where there are no faults.

        Args:
            norm: where the family normalizes.
            embedding_norm: whether it does so after the embedding too.
            output_bias: whether its logits have a bias.
        """
        return ModelConfig(
            source_vocab_size=self.vocab_size,
            target_vocab_size=self.vocab_size,
            d_model=self.d_model,
            num_heads=self.encoder_attention_heads,
            num_encoder_layers=self.encoder_layers,
            num_decoder_layers=self.decoder_layers,
            encoder_d_ff=self.encoder_ffn_dim,
            decoder_d_ff=self.decoder_ffn_dim,
            norm=norm,
            activation=ACTIVATIONS[self.activation_function],
            # Such a module has no parameters for positions: the rest is checked before tables are made, of whatever size.
            positions="sinusoidal_concatenated",
            max_positions=self.max_position_embeddings,
            output_bias=output_bias,
            scale_embedding=self.scale_embedding,
            share_embeddings=self.tie_word_embeddings,
            tie_output=self.tie_word_embeddings,
            embedding_norm=embedding_norm,
            layer_norm_eps=1e-5,
            pad_id=self.pad_token_id,
            eos_id=self.eos_token_id,
            decoder_start_id=self.decoder_start_token_id,
        )


class MBartFields(BartFields):
    """With the defaults of ``MBartConfig``."""

    # Not of every kind the same: where none is stated, targets start with ``<s>``.
    decoder_start_token_id: TokenId


class PegasusFields(BartFields):
    """With the defaults of ``PegasusConfig``."""

    pad_token_id: TokenId = 0
    bos_token_id: TokenId | None = None
    eos_token_id: Annotated[TokenId, BeforeValidator(first_of)] = 1
    decoder_start_token_id: TokenId = 0
