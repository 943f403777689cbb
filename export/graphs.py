"""The two graphs that serving runs, as torch modules: ``EncoderGraph`` and ``DecoderStepGraph``.

Knows: how a trained ``Transformer`` is laid out for incremental decoding. The encoder ends in the cross-attention keys and
values of every decoder layer; one decoder step reads them, appends to the self-attention cache in place and ends in each
row's best candidates. While being traced the attention is ONNX Runtime's operators (``attention.py``); eagerly the same
modules are the PyTorch reference of cached decoding.
Does not know: files, tokenizers, tolerances, how products are quantized (``quantize.py`` hands in the linear layers), or how
scales are found (``calibration.py``).

Shapes: a lane has B sources with W hypotheses each; R = B * W rows. S: source capacity, C: target capacity, h: heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export import attention
from export.model import (
    DecoderLayer,
    Embedding,
    EncoderLayer,
    FeedForward,
    ModelConfig,
    MultiHeadAttention,
    Transformer,
)
from export.operators import activation
from export.relative_positions import RelativePositions, TabulatedPositions

# (weight [N, K], bias [N] or None) -> a module from [..., K] to [..., N].
LinearFactory = Callable[[Tensor, Tensor | None], nn.Module]

# What a graph is laid out for.
Device = Literal["cpu", "cuda"]
SelfAttention = attention.CachedSelfAttention | attention.Int8SelfAttention
CrossAttention = attention.RaggedCrossAttention | attention.PaddedCrossAttention

_CROSS_ATTENTION: dict[Device, type[attention.RaggedCrossAttention] | type[attention.PaddedCrossAttention]] = {
    "cpu": attention.RaggedCrossAttention,
    "cuda": attention.PaddedCrossAttention,
}
# Added to the logits of tokens that must never be decoded.
NEVER = -1e9
# A row's candidates are looked for in blocks of at most so many tokens, if there are enough blocks.
_LARGEST_BLOCK = 64
_FEWEST_BLOCKS = 128


class PlainLinear(nn.Module):
    """A floating-point product. Its weight is turned as the graph's operator takes it, so that no tool turns a copy of it."""

    weight: Tensor  # [K, N], a view
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Of ``weight`` [N, K] and ``bias`` [N]."""
        super().__init__()
        self.register_buffer("weight", weight.detach().t())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


def candidate_block(vocab_size: int) -> int:
    """Tokens in a block of the two-stage top-k: a power of two, small enough that there are many blocks."""
    block = _LARGEST_BLOCK
    while block > 1 and vocab_size < block * _FEWEST_BLOCKS:
        block //= 2
    return block


def max_candidates(vocab_size: int) -> int:
    """Most candidates of a row that the decoder graph can be asked for: the number of blocks."""
    return -(-vocab_size // candidate_block(vocab_size))


class TokenTable(nn.Module):
    """A row of floating-point numbers for each token."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        """Of rows [V, d_model]."""
        super().__init__()
        self.register_buffer("rows", rows)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] -> [..., d_model]."""
        return F.embedding(ids, self.rows)


class GraphEmbedding(nn.Module):
    """Token embedding with its scale folded in, plus position, unless positions are relative."""

    positions: Tensor | None

    def __init__(self, embedding: Embedding, tokens: nn.Module | None = None) -> None:
        """Lay out an embedding; ``tokens`` is its scaled table, where another has it already."""
        super().__init__()
        self.tokens: nn.Module = tokens or TokenTable(embedding.tokens.weight.detach() * embedding.scale)
        table = embedding.position_table
        self.register_buffer("positions", None if table is None else table.detach().clone())
        self.norm = embedding.norm

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Ids [...] and positions, broadcastable to them -> [..., d_model]."""
        embedded = self.tokens(ids)
        if self.positions is not None:
            embedded = embedded + F.embedding(positions, self.positions)
        normalized: Tensor = self.norm(embedded)
        return normalized


class GraphFeedForward(nn.Module):
    """The feed-forward network over the chosen linear layers."""

    def __init__(self, feed_forward: FeedForward, linear: LinearFactory) -> None:
        super().__init__()
        self.inner = _linear(linear, feed_forward.inner)
        self.factor = None if feed_forward.factor is None else _linear(linear, feed_forward.factor)
        self.outer = _linear(linear, feed_forward.outer)
        self.activation = feed_forward.activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_model]."""
        inner = activation(self.inner(x), self.activation)
        if self.factor is not None:
            inner = inner * self.factor(x)
        x = self.outer(inner)
        return x


def _fused(linear: LinearFactory, *parts: nn.Linear) -> nn.Module:
    """Products of one input as one product: their outputs side by side."""
    bias = torch.cat([part.bias for part in parts]) if parts[0].bias is not None else None
    return linear(torch.cat([part.weight for part in parts]), bias)


def _linear(linear: LinearFactory, part: nn.Linear) -> nn.Module:
    return linear(part.weight, part.bias)


class GraphEncoderLayer(nn.Module):
    """Encoder layer. Its attention takes query, key and value apart, so one product for them would only have to be cut up."""

    def __init__(self, layer: EncoderLayer, config: ModelConfig, linear: LinearFactory) -> None:
        super().__init__()
        source = layer.self_attention
        self.num_heads = config.num_heads
        self.query = _linear(linear, source.query)
        self.key = _linear(linear, source.key)
        self.value = _linear(linear, source.value)
        self.output = _linear(linear, source.output)
        self.attention_residual = layer.self_attention_residual
        self.feed_forward = GraphFeedForward(layer.feed_forward, linear)
        self.feed_forward_residual = layer.feed_forward_residual
        self.relative_positions = _tabulated(layer.relative_positions)

    def forward(self, x: Tensor, lengths: Tensor, bias: Tensor | None) -> Tensor:
        """[B, S, d_model], lengths [B], what the stack adds to the scores [1, h, S, S] -> [B, S, d_model]."""
        if self.relative_positions is not None:
            bias = self.relative_positions(x.shape[1])
        entered = self.attention_residual.enter(x)
        query, key, value = self.query(entered), self.key(entered), self.value(entered)
        attended = attention.self_attention(query, key, value, lengths, self.num_heads, bias)
        x = self.attention_residual.leave(x, self.output(attended))
        return self.feed_forward_residual.leave(x, self.feed_forward(self.feed_forward_residual.enter(x)))


class EncoderGraph(nn.Module):
    """Source ids to every decoder layer's cross-attention keys and values."""

    def __init__(self, model: Transformer, linear: LinearFactory = PlainLinear) -> None:
        super().__init__()
        config = model.config
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.embedding = GraphEmbedding(model.encoder.embedding)
        self.relative_positions = _tabulated(model.encoder.relative_positions)
        self.layers = nn.ModuleList(GraphEncoderLayer(_encoder_layer(x), config, linear) for x in model.encoder.layers)
        self.final_norm = model.encoder.final_norm
        crosses = [_decoder_layer(layer).cross_attention for layer in model.decoder.layers]
        # One product makes the keys and values of all layers: the memory is read, and quantized, once.
        self.cross = _fused(linear, *(part for cross in crosses for part in (cross.key, cross.value)))
        self.num_tensors = 2 * len(crosses)

    def forward(self, source_ids: Tensor, source_lengths: Tensor) -> Tensor:
        """Encode a batch.

        Args:
            source_ids: [B, S] int64, padded to the right.
            source_lengths: [B] int32.

        Returns:
            [2 * decoder layers, B, h, S, head_dim]: key and value of layer 0, of layer 1, and so on, in whatever ``cross`` makes
            of them. What stands at padded positions is finite and meaningless.
        """
        x = self.embedding(source_ids, torch.arange(source_ids.shape[1], device=source_ids.device))
        bias = None if self.relative_positions is None else self.relative_positions(source_ids.shape[1])
        for layer in self.layers:
            x = layer(x, source_lengths, bias)
        cross = self.cross(self.final_norm(x))  # [B, S, tensors * h * head_dim]
        split = torch.unflatten(cross, 2, (self.num_tensors, self.num_heads, self.head_dim))
        return split.permute(2, 0, 3, 1, 4).contiguous()


class GraphDecoderLayer(nn.Module):
    """Decoder layer for one step of every row."""

    def __init__(self, layer: DecoderLayer, config: ModelConfig, linear: LinearFactory, cross_attention: CrossAttention) -> None:
        super().__init__()
        own: MultiHeadAttention = layer.self_attention
        self.qkv = _fused(linear, own.query, own.key, own.value)
        self.self_output = _linear(linear, own.output)
        self.self_residual = layer.self_attention_residual
        self.cross_query = _linear(linear, layer.cross_attention.query)
        self.cross_output = _linear(linear, layer.cross_attention.output)
        self.cross_residual = layer.cross_attention_residual
        self.feed_forward = GraphFeedForward(layer.feed_forward, linear)
        self.feed_forward_residual = layer.feed_forward_residual
        self.self_attention: SelfAttention = attention.CachedSelfAttention(config.num_heads)
        self.cross_attention = cross_attention
        self.relative_positions = _tabulated(layer.relative_positions)

    def forward(
        self, x: Tensor, step: attention.StepLengths, own: tuple[Tensor, Tensor], cross: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One step: x [B, W, d_model], own cache [R, h, C, head_dim], cross cache [B, h, S, head_dim].

        Returns:
            X and the query of cross-attention, both of the same shape; the own cache with this step's keys and values, once more
            if its attention ``keeps_caches``; and the cross cache as it was.
        """
        if self.relative_positions is not None:
            step = replace(step, bias=self.relative_positions.of_rows(step.positions, step.longest))
        projected = self.qkv(self.self_residual.enter(x))
        attended, *own_after = self.self_attention(projected, step, *own)
        x = self.self_residual.leave(x, self.self_output(attended))
        # A source's keys and values are read once for all of its hypotheses.
        query = self.cross_query(self.cross_residual.enter(x))
        attended, *cross_after = self.cross_attention(query, *cross, step)
        x = self.cross_residual.leave(x, self.cross_output(attended))
        x = self.feed_forward_residual.leave(x, self.feed_forward(self.feed_forward_residual.enter(x)))
        return x, query, tuple(own_after), tuple(cross_after)


class Candidates(nn.Module):
    """Exact top-k of the logits in two stages: the best blocks by their maxima, then the best tokens of those blocks.

    The k best tokens lie within the k blocks of largest maximum, so nothing is lost; one pass over the vocabulary for the
    maxima and k * block tokens to sort replace a sort over the vocabulary.
    """

    def __init__(self, vocab_size: int, *, scores_on_request: bool) -> None:
        """For a vocabulary.

        Args:
            vocab_size: tokens.
            scores_on_request: whether log-probabilities cost nothing while nobody wants them (a branch in the graph) or are
                always there (on CUDA, where a branch would have to wait for the host).
        """
        super().__init__()
        self.block = candidate_block(vocab_size)
        self.num_blocks = max_candidates(vocab_size)
        self.scores_on_request = scores_on_request

    def forward(self, logits: Tensor, k: int, log_probs_wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, W, num_blocks * block] -> token ids and log-probabilities, or else logits, [B, W, k], best first."""
        ids = self._best(logits, k)
        if not self.scores_on_request:
            return ids, _log_probs_of(logits, ids)
        if torch.onnx.is_in_onnx_export():
            return ids, torch.cond(log_probs_wanted, _log_probs_of, _logits_of, (logits, ids))
        return ids, _log_probs_of(logits, ids) if log_probs_wanted else _logits_of(logits, ids)

    def _best(self, logits: Tensor, k: int) -> Tensor:
        if self.block == 1:
            return torch.topk(logits, k, dim=2)[1]
        blocks = torch.unflatten(logits, 2, (self.num_blocks, self.block))
        _, block_ids = torch.topk(blocks.amax(dim=3), k, dim=2)  # [B, W, k]
        chosen = torch.gather(blocks, 2, block_ids[..., None].expand(-1, -1, -1, self.block)).flatten(2)
        _, places = torch.topk(chosen, k, dim=2)  # in [0, k * block)
        return torch.gather(block_ids, 2, places // self.block) * self.block + places % self.block


def _log_probs_of(logits: Tensor, ids: Tensor) -> Tensor:
    # As one operator, row by row: a sum over the vocabulary of its own would take another order for a single row.
    return torch.gather(F.log_softmax(logits, dim=2), 2, ids)


def _logits_of(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.gather(logits, 2, ids)


class DecoderStepGraph(nn.Module):
    """One decoder step of every row of a lane."""

    def __init__(
        self,
        model: Transformer,
        linear: LinearFactory = PlainLinear,
        *,
        device: Device = "cpu",
        tokens: nn.Module | None = None,
    ) -> None:
        """Lay out a model's decoder.

        Args:
            model: trained.
            linear: makes the products.
            device: what the graph is for. On a CPU a source costs its own length in cross-attention, and log-probabilities are
                made when somebody wants them; on CUDA neither has been tried.
            tokens: the scaled table of target tokens, where the encoder has it already.
        """
        super().__init__()
        config = model.config
        cross_attention = _CROSS_ATTENTION[device]
        self.keeps_cross_cache = cross_attention.keeps_caches
        self.alignment_layer = config.num_decoder_layers - 1 if config.alignment_layer is None else config.alignment_layer
        self.alignment_heads = config.alignment_heads or config.num_heads
        self.num_heads, self.width_of_keys = config.num_heads, config.num_heads * config.head_dim
        self.embedding = GraphEmbedding(model.decoder.embedding, tokens)
        self.relative_positions = _tabulated(model.decoder.relative_positions)
        self.layers = nn.ModuleList(
            GraphDecoderLayer(_decoder_layer(layer), config, linear, cross_attention(config.num_heads))
            for layer in model.decoder.layers
        )
        self.final_norm = model.decoder.final_norm
        self.candidates = Candidates(config.target_vocab_size, scores_on_request=device == "cpu")
        self.output = linear(*_padded_output(model, self.candidates.block * self.candidates.num_blocks))

    @property
    def keeps_self_cache(self) -> bool:
        """Whether attention returns the self-attention cache beside what appends to it."""
        return all(isinstance(x, GraphDecoderLayer) and x.self_attention.keeps_caches for x in self.layers)

    def forward(
        self,
        target_ids: Tensor,
        positions: Tensor,
        longest: Tensor,
        source_lengths: Tensor,
        candidate_ranks: Tensor,
        log_probs_wanted: Tensor,
        attention_wanted: Tensor,
        self_cache: list[Tensor],
        cross_cache: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
        """One step.

        Args:
            target_ids: [B, W] int64, each row's latest token.
            positions: [B, W] int32, its place in the target; the row's cache holds so many positions before this step.
            longest: int32 scalar, 1 + the largest position.
            source_lengths: [B] int32.
            candidate_ranks: [k] int64, 0 .. k - 1; its length says how many candidates are wanted.
            log_probs_wanted: bool scalar; where it is false, candidates come with their logits instead. For a CPU only.
            attention_wanted: bool scalar; where it is false, ``attention`` says nothing.
            self_cache: 2 * layers of [R, h, C, head_dim]; written in place at each row's position.
            cross_cache: 2 * layers of [B, h, S, head_dim].

        Returns:
            Candidate ids [B, W, k] int64, their log-probabilities [B, W, k] float32 (best first), the logits
            [B, W, padded vocabulary] float32, the attention to the source's tokens [B, W, S] float32 (of the heads that
            ``ModelConfig`` names; 0 beyond a source), the self-attention cache, and the caches that an operator returns though it
            appends nothing to them: that of self-attention where it is in bytes, that of cross-attention in graphs for a CPU.
        """
        x = self.embedding(target_ids, positions)  # [B, W, d_model]
        rows = positions.reshape(-1)
        step = attention.StepLengths(
            positions=rows,
            longest=longest,
            places=attention.cache_places(rows, self.num_heads),
            source=source_lengths,
            last_source=source_lengths - 1,
            longest_source=source_lengths.amax(dim=0),
            no_keys=x.new_zeros(x.shape[0], 0, self.width_of_keys),
            no_own_keys=x.new_zeros(rows.shape[0], 0, self.width_of_keys),
            bias=None if self.relative_positions is None else self.relative_positions.of_rows(rows, longest),
        )
        appended: list[Tensor] = []
        own_kept: list[Tensor] = []
        cross_kept: list[Tensor] = []
        queries: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            at = slice(2 * i, 2 * i + 2)
            x, query, own, cross = layer(x, step, tuple(self_cache[at]), tuple(cross_cache[at]))
            queries.append(query)
            appended += own[:2]
            own_kept += own[2:]
            cross_kept += cross if self.keeps_cross_cache else ()
        at_layer = self.alignment_layer
        aligning = self.layers[at_layer]
        assert isinstance(aligning, GraphDecoderLayer)
        weights = aligning.cross_attention.weights(
            attention_wanted, queries[at_layer], cross_cache[2 * at_layer], step, self.alignment_heads
        )
        logits = self.output(self.final_norm(x)).float()
        ids, log_probs = self.candidates(logits, candidate_ranks.shape[0], log_probs_wanted)
        return ids, log_probs, logits, weights, appended, own_kept + cross_kept


def lay_out(
    model: Transformer, linear: LinearFactory = PlainLinear, *, device: Device = "cpu"
) -> tuple[EncoderGraph, DecoderStepGraph]:
    """Both graphs of a model, in evaluation mode; a table of tokens that the two sides share is one in these, too."""
    encoder = EncoderGraph(model, linear)
    tokens = encoder.embedding.tokens if model.config.share_embeddings else None
    return encoder.eval(), DecoderStepGraph(model, linear, device=device, tokens=tokens).eval()


def _padded_output(model: Transformer, columns: int) -> tuple[Tensor, Tensor]:
    """Output weight and bias, widened to whole blocks; padding and start token are never decoded."""
    weight = model.output.weight.detach()
    vocab_size, d_model = weight.shape
    padded = torch.zeros(columns, d_model, dtype=weight.dtype)
    padded[:vocab_size] = weight
    bias = torch.full((columns,), NEVER, dtype=torch.float32)
    bias[:vocab_size] = 0.0 if model.output.bias is None else model.output.bias.detach().float()
    bias[model.config.never_decoded] = NEVER
    return padded, bias.to(weight.dtype) if weight.dtype is not torch.float16 else bias.clamp(min=-6e4).half()


def _tabulated(positions: RelativePositions | None) -> TabulatedPositions | None:
    return None if positions is None else TabulatedPositions(positions)


def _encoder_layer(module: nn.Module) -> EncoderLayer:
    assert isinstance(module, EncoderLayer)
    return module


def _decoder_layer(module: nn.Module) -> DecoderLayer:
    assert isinstance(module, DecoderLayer)
    return module
