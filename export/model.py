"""The encoder-decoder Transformer of "Attention Is All You Need" (Vaswani et al., 2017), eager, with its known variations.

Knows: the architecture, its parameters and the full (teacher-forced) pass. Every variation is a field of ``ModelConfig``.
Does not know: caches, ONNX, quantization (``graphs.py``), files (``checkpoint/``), training or search.

Masks are boolean and say what may be attended to: True keeps, False hides. With relative positions a mask of self-attention is
what is added to the scores: the positions' biases, and minus infinity for what is hidden.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from export.norms import RmsNorm
from export.relative_positions import RelativePositions

# "gelu" is x * Phi(x); "gelu_tanh" and "gelu_sigmoid" are the two approximations of its paper (Hendrycks and Gimpel, 2016).
Activation = Literal["relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"]
Positions = Literal["sinusoidal", "sinusoidal_concatenated", "learned", "relative"]
Norm = Literal["layer", "rms"]
NormPlacement = Literal["post", "pre"]

# Numbers that a checkpoint states. Far beyond any model there is; more would only be work or memory for one that cannot be.
Size = Annotated[int, Field(gt=0, le=2**24)]
Length = Annotated[int, Field(gt=0, le=2**16)]
Depth = Annotated[int, Field(gt=0, le=2**10)]
Heads = Annotated[int, Field(gt=0, le=2**10)]

# Of gelu_sigmoid: x * sigmoid(1.702 x).
GELU_SIGMOID_RATE = 1.702


class ModelConfig(BaseModel):
    """Architecture of one model. Defaults are the paper's base model; section numbers refer to the paper."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source_vocab_size: Size
    target_vocab_size: Size
    d_model: Size = 512
    num_heads: Heads = 8
    # Width of one head, where it is not d_model / num_heads.
    d_head: Size | None = None
    num_encoder_layers: Depth = 6
    num_decoder_layers: Depth = 6
    encoder_d_ff: Size = 2048
    decoder_d_ff: Size = 2048
    # Training only; exported graphs have none. On sub-layer outputs and embeddings (5.4); on attention weights; inside the FFN.
    dropout: float = Field(default=0.1, ge=0, lt=1)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    activation_dropout: float = Field(default=0.0, ge=0, lt=1)
    # "post": LayerNorm(x + Sublayer(x)), the paper's (3.1). "pre": x + Sublayer(LayerNorm(x)).
    norm: NormPlacement = "post"
    # A norm after the last layer; None: where norms come first, because a stack of the others ends in one already.
    final_norm: bool | None = None
    # "rms" divides by the root mean square, and has neither mean nor bias.
    norm_kind: Norm = "layer"
    activation: Activation = "relu"
    # act(x W1) is multiplied by x V before W2 (Shazeer, 2020).
    gated: bool = False
    # "sinusoidal" interleaves sine and cosine as in 3.5; "sinusoidal_concatenated" puts all sines first, as Marian does.
    # "relative" adds nothing to embeddings, and a bias to the scores of self-attention, by how far a key is from its query.
    positions: Positions = "sinusoidal"
    # Of relative positions: biases of a head, and the distance from which on all keys have the same.
    relative_buckets: int = Field(default=32, ge=4, le=2**16, multiple_of=4)
    relative_distance: Length = 128
    # Whether each layer has biases of its own (umT5), or a stack's layers share them (T5).
    relative_per_layer: bool = False
    # Longest source or target, in tokens: the table's size for learned positions, the stated limit for the others.
    max_positions: Length = 512
    # Biases of the attention and feed-forward projections and of the norms.
    bias: bool = True
    # A bias on the logits (Marian's final_logits_bias).
    output_bias: bool = False
    # Multiply embeddings by sqrt(d_model) (3.4).
    scale_embedding: bool = True
    # One matrix for source and target embedding; needs one vocabulary (3.4).
    share_embeddings: bool = True
    # The target embedding is the output projection too (3.4).
    tie_output: bool = True
    # A LayerNorm right after embedding plus position (BART).
    embedding_norm: bool = False
    layer_norm_eps: float = Field(default=1e-5, gt=0, lt=1)
    # Which cross-attention tells what source tokens a target token comes from: that of this decoder layer, counted from 0 (None:
    # the last), the mean of so many heads, the first ones (None: of all). As in CTranslate2's models; it changes no translation.
    alignment_layer: int | None = Field(default=None, ge=0)
    alignment_heads: int | None = Field(default=1, gt=0)
    pad_id: int = Field(ge=0)
    eos_id: int = Field(ge=0)
    # The token that starts every target; Marian uses the padding token.
    decoder_start_id: int = Field(ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        faults = []
        if self.d_head is None and self.d_model % self.num_heads:
            faults.append(f"d_model {self.d_model} is not a multiple of num_heads {self.num_heads}")
        if self.positions in ("sinusoidal", "sinusoidal_concatenated") and self.d_model % 2:
            faults.append(f"d_model {self.d_model} is odd: sinusoidal positions need pairs")
        if self.relative_distance <= self.relative_buckets // 2:
            faults.append(
                f"relative_distance {self.relative_distance} is no more than half of relative_buckets {self.relative_buckets}"
            )
        if self.share_embeddings and self.source_vocab_size != self.target_vocab_size:
            faults.append(
                f"share_embeddings needs one vocabulary: {self.source_vocab_size} source, {self.target_vocab_size} target"
            )
        for name, most in (("alignment_layer", self.num_decoder_layers - 1), ("alignment_heads", self.num_heads)):
            value = getattr(self, name)
            if value is not None and value > most:
                faults.append(f"{name} is {value}, at most {most} is possible")
        for name in ("pad_id", "eos_id", "decoder_start_id"):
            if getattr(self, name) >= self.target_vocab_size:
                faults.append(f"{name} {getattr(self, name)} is outside the target vocabulary of {self.target_vocab_size}")
        for name in ("pad_id", "eos_id"):
            if getattr(self, name) >= self.source_vocab_size:
                faults.append(f"{name} {getattr(self, name)} is outside the source vocabulary of {self.source_vocab_size}")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def never_decoded(self) -> list[int]:
        """Tokens that no translation has: padding and start, unless one of them is the end-of-sentence token."""
        return sorted({self.pad_id, self.decoder_start_id} - {self.eos_id})

    @property
    def head_dim(self) -> int:
        """Width of one head: d_k = d_v, which is d_model / h (3.2.2) where nothing else is said."""
        return self.d_model // self.num_heads if self.d_head is None else self.d_head


def sinusoidal_table(num_positions: int, d_model: int, *, concatenated: bool = False) -> Tensor:
    """Sinusoidal position encodings (3.5): PE(p, 2i) = sin(p / 10000^(2i/d)), PE(p, 2i+1) = cos of the same.

    Args:
        num_positions: rows of the table.
        d_model: columns; even.
        concatenated: all sines in the first half and all cosines in the second, instead of interleaved.

    Returns:
        [num_positions, d_model] float32.
    """
    position = torch.arange(num_positions, dtype=torch.float64)[:, None]
    rate = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10000.0) / d_model))
    angle = position * rate  # [num_positions, d_model / 2]
    pair = (angle.sin(), angle.cos())
    table = torch.cat(pair, dim=1) if concatenated else torch.stack(pair, dim=2).flatten(1)
    return table.to(torch.float32)


def computed_positions(config: ModelConfig) -> Tensor:
    """The table of a model that learns none: [max_positions, d_model]."""
    concatenated = config.positions == "sinusoidal_concatenated"
    return sinusoidal_table(config.max_positions, config.d_model, concatenated=concatenated)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The feed-forward non-linearity, by name."""
    match activation:
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "gelu_sigmoid":
            return x * torch.sigmoid(GELU_SIGMOID_RATE * x)
        case "silu":
            return F.silu(x)


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention in h heads (3.2): softmax(Q K^T / sqrt(d_k)) V per head, concatenated and projected."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, heads = config.d_model, config.num_heads * config.head_dim
        self.num_heads = config.num_heads
        self.query = nn.Linear(d, heads, bias=config.bias)
        self.key = nn.Linear(d, heads, bias=config.bias)
        self.value = nn.Linear(d, heads, bias=config.bias)
        self.output = nn.Linear(heads, d, bias=config.bias)
        self.dropout = config.attention_dropout

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Attend from queries to memory.

        Args:
            queries: [batch, Q, d_model].
            memory: [batch, K, d_model]; keys and values are both made from it.
            mask: bool, broadcastable to [batch, 1, Q, K], or what is added to the scores, broadcastable to [batch, heads, Q, K].

        Returns:
            [batch, Q, d_model].
        """
        q, k, v = self._split(self.query(queries)), self._split(self.key(memory)), self._split(self.value(memory))
        dropout_p = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
        projected: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return projected

    def _split(self, x: Tensor) -> Tensor:
        """[batch, length, d_model] -> [batch, heads, length, head_dim]."""
        return torch.unflatten(x, 2, (self.num_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Position-wise feed-forward network (3.3): act(x W1 + b1) W2 + b2, gated or not."""

    def __init__(self, config: ModelConfig, d_ff: int) -> None:
        super().__init__()
        self.inner = nn.Linear(config.d_model, d_ff, bias=config.bias)
        self.factor = nn.Linear(config.d_model, d_ff, bias=config.bias) if config.gated else None
        self.outer = nn.Linear(d_ff, config.d_model, bias=config.bias)
        self.activation: Activation = config.activation
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_model]."""
        inner = activate(self.inner(x), self.activation)
        if self.factor is not None:
            inner = inner * self.factor(x)
        x = self.outer(self.dropout(inner))
        return x


class Residual(nn.Module):
    """The norm and residual connection around one sub-layer (3.1), in either placement."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.placement: NormPlacement = config.norm
        self.dropout = nn.Dropout(config.dropout)

    def enter(self, x: Tensor) -> Tensor:
        """What the sub-layer reads: x, normalized first when pre-norm."""
        return self.norm(x) if self.placement == "pre" else x

    def leave(self, x: Tensor, sublayer: Tensor) -> Tensor:
        """What the next sub-layer gets: x plus the sub-layer's output, normalized after when post-norm."""
        x = x + self.dropout(sublayer)
        return self.norm(x) if self.placement == "post" else x


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(config)
        self.self_attention_residual = Residual(config)
        self.feed_forward = FeedForward(config, config.encoder_d_ff)
        self.feed_forward_residual = Residual(config)
        self.relative_positions = layer_positions(config, bidirectional=True)

    def forward(self, x: Tensor, source_mask: Tensor) -> Tensor:
        """[batch, S, d_model], mask [batch, 1, 1, S] or [batch, heads, S, S] -> [batch, S, d_model]."""
        source_mask = biased(source_mask, self.relative_positions)
        entered = self.self_attention_residual.enter(x)
        x = self.self_attention_residual.leave(x, self.self_attention(entered, entered, source_mask))
        return self.feed_forward_residual.leave(x, self.feed_forward(self.feed_forward_residual.enter(x)))


class DecoderLayer(nn.Module):
    """Masked self-attention, attention over the encoder memory, then feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(config)
        self.self_attention_residual = Residual(config)
        self.cross_attention = MultiHeadAttention(config)
        self.cross_attention_residual = Residual(config)
        self.feed_forward = FeedForward(config, config.decoder_d_ff)
        self.feed_forward_residual = Residual(config)
        self.relative_positions = layer_positions(config, bidirectional=False)

    def forward(self, x: Tensor, target_mask: Tensor, memory: Tensor, source_mask: Tensor) -> Tensor:
        """[batch, T, d_model], mask [1 or batch, 1 or heads, T, T], memory [batch, S, d_model], mask [batch, 1, 1, S]."""
        target_mask = biased(target_mask, self.relative_positions)
        entered = self.self_attention_residual.enter(x)
        x = self.self_attention_residual.leave(x, self.self_attention(entered, entered, target_mask))
        entered = self.cross_attention_residual.enter(x)
        x = self.cross_attention_residual.leave(x, self.cross_attention(entered, memory, source_mask))
        return self.feed_forward_residual.leave(x, self.feed_forward(self.feed_forward_residual.enter(x)))


class Embedding(nn.Module):
    """Token embedding, scaled, plus position (3.4, 3.5), unless positions are relative."""

    position_table: Tensor | None

    def __init__(self, config: ModelConfig, tokens: nn.Embedding) -> None:
        super().__init__()
        self.tokens = tokens
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        if config.positions == "relative":
            self.position_table = None
        elif config.positions == "learned":
            self.position_table = nn.Parameter(torch.zeros(config.max_positions, config.d_model))
        else:
            self.register_buffer("position_table", computed_positions(config), persistent=False)
        self.norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Ids [...] and positions, broadcastable to them -> [..., d_model]."""
        embedded = self.tokens(ids) * self.scale
        if self.position_table is not None:
            embedded = embedded + self.position_table[positions]
        dropped: Tensor = self.dropout(self.norm(embedded))
        return dropped


class Encoder(nn.Module):
    """Source ids to encoder memory."""

    def __init__(self, config: ModelConfig, tokens: nn.Embedding) -> None:
        super().__init__()
        self.embedding = Embedding(config, tokens)
        self.relative_positions = stack_positions(config, bidirectional=True)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))
        self.final_norm = final_norm(config)

    def forward(self, source_ids: Tensor, source_mask: Tensor) -> Tensor:
        """[batch, S] ids, mask [batch, 1, 1, S] -> memory [batch, S, d_model]."""
        x = self.embedding(source_ids, torch.arange(source_ids.shape[1], device=source_ids.device))
        source_mask = biased(source_mask, self.relative_positions)
        for layer in self.layers:
            x = layer(x, source_mask)
        states: Tensor = self.final_norm(x)
        return states


class Decoder(nn.Module):
    """Target ids and encoder memory to the decoder's last states."""

    def __init__(self, config: ModelConfig, tokens: nn.Embedding) -> None:
        super().__init__()
        self.embedding = Embedding(config, tokens)
        self.relative_positions = stack_positions(config, bidirectional=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.final_norm = final_norm(config)

    def forward(self, target_ids: Tensor, memory: Tensor, source_mask: Tensor) -> Tensor:
        """[batch, T] ids, memory [batch, S, d_model], mask [batch, 1, 1, S] -> states [batch, T, d_model]."""
        x = self.embedding(target_ids, torch.arange(target_ids.shape[1], device=target_ids.device))
        target_mask = biased(causal_mask(target_ids.shape[1], target_ids.device), self.relative_positions)
        for layer in self.layers:
            x = layer(x, target_mask, memory, source_mask)
        states: Tensor = self.final_norm(x)
        return states


class Transformer(nn.Module):
    """The whole model. Matrices that are shared have several names here; ``export/checkpoint/base.py`` says which one counts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        target_tokens = nn.Embedding(config.target_vocab_size, config.d_model)
        source_tokens = target_tokens if config.share_embeddings else nn.Embedding(config.source_vocab_size, config.d_model)
        self.encoder = Encoder(config, source_tokens)
        self.decoder = Decoder(config, target_tokens)
        self.output = nn.Linear(config.d_model, config.target_vocab_size, bias=config.output_bias)
        if config.tie_output:
            self.output.weight = target_tokens.weight
        self._initialize()

    def forward(self, source_ids: Tensor, source_lengths: Tensor, target_ids: Tensor) -> Tensor:
        """Teacher-forced pass.

        Args:
            source_ids: [batch, S] int64, padded to the right.
            source_lengths: [batch], tokens of each source.
            target_ids: [batch, T] int64, starting with ``decoder_start_id``.

        Returns:
            Logits [batch, T, target_vocab_size]; those at t predict the token after ``target_ids[:, : t + 1]``.
        """
        source_mask = length_mask(source_lengths, source_ids.shape[1])
        memory = self.encoder(source_ids, source_mask)
        logits: Tensor = self.output(self.decoder(target_ids, memory, source_mask))
        return logits

    def _initialize(self) -> None:
        """Xavier-uniform projections; embeddings of deviation 1/sqrt(d_model), so that scaled ones have deviation 1."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():  # after the linears: a tied output projection is an embedding first
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.d_model**-0.5)
            elif isinstance(module, Embedding) and isinstance(module.position_table, nn.Parameter):
                nn.init.normal_(module.position_table, std=self.config.d_model**-0.5)


def final_norm(config: ModelConfig) -> nn.Module:
    """What comes after the last layer."""
    has_norm = config.norm == "pre" if config.final_norm is None else config.final_norm
    return make_norm(config) if has_norm else nn.Identity()


def make_norm(config: ModelConfig) -> nn.Module:
    """A norm of the model's kind, over d_model."""
    if config.norm_kind == "rms":
        return RmsNorm(config.d_model, eps=config.layer_norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.layer_norm_eps, bias=config.bias)


def stack_positions(config: ModelConfig, *, bidirectional: bool) -> RelativePositions | None:
    """The biases that all layers of a stack share; None where there are none such."""
    return None if config.relative_per_layer else _relative_positions(config, bidirectional=bidirectional)


def layer_positions(config: ModelConfig, *, bidirectional: bool) -> RelativePositions | None:
    """The biases of one layer; None where there are none such."""
    return _relative_positions(config, bidirectional=bidirectional) if config.relative_per_layer else None


def _relative_positions(config: ModelConfig, *, bidirectional: bool) -> RelativePositions | None:
    if config.positions != "relative":
        return None
    return RelativePositions(
        num_heads=config.num_heads,
        num_buckets=config.relative_buckets,
        furthest=config.relative_distance,
        bidirectional=bidirectional,
    )


def length_mask(lengths: Tensor, max_length: int) -> Tensor:
    """Padding mask: [batch] lengths -> bool [batch, 1, 1, max_length], True at real tokens."""
    return (torch.arange(max_length, device=lengths.device) < lengths[:, None])[:, None, None, :]


def biased(mask: Tensor, positions: RelativePositions | None) -> Tensor:
    """A boolean mask [..., K] as what is added to the scores: the positions' biases, and minus infinity where it hides.

    Without positions it stays as it is.
    """
    return mask if positions is None else positions(mask.shape[-1]).masked_fill(~mask, float("-inf"))


def causal_mask(length: int, device: torch.device) -> Tensor:
    """Bool [1, 1, length, length], True where a query may see a key: at its own place and before."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
