"""Relative positions as T5 has them (Raffel et al., 2020, 2.1): scores of self-attention have a bias by how far a key is away.

Knows how distances fall into buckets, and what stands for them in a graph: a table with a column for each offset. Does not know
attention, layers or caches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def bucket_of(offsets: Tensor, *, num_buckets: int, furthest: int, bidirectional: bool) -> Tensor:
    """The bucket of each offset.

    Half of a side's buckets are for one distance each, 0 and up; the other half grow as the logarithm does, up to ``furthest``,
    and the last is for all that is as far or further. Of two sides, keys behind the query have the second half of all buckets;
    of one, they are never seen, and have the bucket of the query itself.

    Args:
        offsets: int64, the key's position less the query's.
        num_buckets: of all, a multiple of 4.
        furthest: the distance from which on all are alike, more than half of ``num_buckets``.
        bidirectional: whether queries see keys behind them.
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    distances = offsets.abs() if bidirectional else (-offsets).clamp(min=0)
    exact = side // 2
    # In single precision, as models were trained: at a bucket's border the last bit decides.
    growth = torch.log(distances.clamp(min=1).float() / exact) / math.log(furthest / exact)
    far = exact + (growth * (side - exact)).long()
    buckets = torch.where(distances < exact, distances, far.clamp(max=side - 1))
    return buckets + side * (offsets > 0) if bidirectional else buckets


class RelativePositions(nn.Module):
    """The biases of self-attention, of one layer or of all layers of a stack."""

    def __init__(self, *, num_heads: int, num_buckets: int, furthest: int, bidirectional: bool) -> None:
        """See ``bucket_of``."""
        super().__init__()
        self.buckets = nn.Embedding(num_buckets, num_heads)
        self.furthest = furthest
        self.bidirectional = bidirectional

    def table(self) -> Tensor:
        """[heads, 2 * furthest + 1]: the bias of every offset from -furthest to furthest; further ones are like these."""
        offsets = torch.arange(-self.furthest, self.furthest + 1, device=self.buckets.weight.device)
        buckets = bucket_of(
            offsets,
            num_buckets=self.buckets.num_embeddings,
            furthest=self.furthest,
            bidirectional=self.bidirectional,
        )
        biases: Tensor = self.buckets(buckets)
        return biases.T

    def forward(self, length: int) -> Tensor:
        """Of every query and key of one sequence: [1, heads, length, length]."""
        at = torch.arange(length, device=self.buckets.weight.device)
        return _biases(self.table(), at, at, self.furthest)[None]


class TabulatedPositions(nn.Module):
    """The same for a graph."""

    rows: Tensor

    def __init__(self, positions: RelativePositions) -> None:
        """Of trained biases."""
        super().__init__()
        self.furthest = positions.furthest
        self.register_buffer("rows", positions.table().detach().contiguous())

    def forward(self, length: int) -> Tensor:
        """Of every query and key of sources: [1, heads, length, length]."""
        at = torch.arange(length, device=self.rows.device)
        return _biases(self.rows, at, at, self.furthest)[None]

    def of_rows(self, positions: Tensor, longest: Tensor) -> Tensor:
        """Of one query of each row, at its own position, and every key of the longest row.

        Args:
            positions: [R] int32.
            longest: int32 scalar, keys.

        Returns:
            [R, heads, 1, longest]; keys behind a row's position have a bias that nobody looks at.
        """
        keys = torch.arange(longest.item(), device=positions.device)
        return _biases(self.rows, positions, keys, self.furthest).transpose(0, 1)[:, :, None]


def _biases(table: Tensor, queries: Tensor, keys: Tensor, furthest: int) -> Tensor:
    """Positions of queries [Q] and keys [K] -> [heads, Q, K]."""
    offsets = (keys - queries[:, None]).clamp(-furthest, furthest) + furthest
    return torch.unflatten(torch.index_select(table, 1, offsets.flatten()), 1, offsets.shape)
