"""The parts of the training recipe that are written by hand, against plain PyTorch and plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from examples.multi30k.data import EOS_ID, PAD_ID, epoch_batches, make_batch
from examples.multi30k.fast_cpu import FastDropout, OutputLoss, replace_dropout
from examples.multi30k.recipe import Recipe


def test_the_blockwise_loss_and_its_gradients_are_those_of_cross_entropy() -> None:
    torch.manual_seed(0)
    states = torch.randn(600, 32, requires_grad=True)
    weight = torch.randn(50, 32, requires_grad=True)
    next_ids = torch.randint(0, 50, (600,))
    smoothed, plain = OutputLoss.apply(states, weight, next_ids, 0.1)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    (3 * smoothed).backward()
    got = states.grad, weight.grad
    states.grad = weight.grad = None
    logits = states @ weight.T
    expected = F.cross_entropy(logits, next_ids, label_smoothing=0.1)
    (3 * expected).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    # The products run in bfloat16.
    torch.testing.assert_close(smoothed, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(plain, F.cross_entropy(logits, next_ids), rtol=1e-2, atol=1e-2)
    for mine, theirs in zip(got, (states.grad, weight.grad), strict=True):
        assert mine is not None
        assert theirs is not None
        assert F.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) > 0.999
        assert mine.norm() == pytest.approx(theirs.norm().item(), rel=1e-2)


def test_dropout_keeps_the_mean_and_drops_its_rate() -> None:
    dropout = FastDropout(0.25, np.random.Generator(np.random.SFC64(0)))
    dropped = dropout(torch.ones(200_000))
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.005)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(dropout.eval()(torch.ones(3)), torch.ones(3))


def test_every_dropout_is_replaced() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
    replace_dropout(module, np.random.default_rng(0))
    assert not [m for m in module.modules() if isinstance(m, nn.Dropout)]
    assert len([m for m in module.modules() if isinstance(m, FastDropout)]) == 2


def test_the_schedule_is_the_papers() -> None:
    recipe = Recipe(warmup_steps=100, learning_rate_factor=2.0)
    for step in (1, 50, 100, 101, 5000):
        expected = 2.0 * 64**-0.5 * min(step**-0.5, step * 100**-1.5)
        assert recipe.learning_rate(step, 64) == pytest.approx(expected)
    assert math.isclose(max(recipe.learning_rate(s, 64) for s in range(1, 500)), recipe.learning_rate(100, 64))


def test_a_batch_has_its_markers_and_its_padding() -> None:
    batch = make_batch([([7, 8], [9]), ([7], [10, 11])])
    assert batch.source_ids.tolist() == [[7, 8, EOS_ID], [7, EOS_ID, PAD_ID]]
    assert batch.source_lengths.tolist() == [3, 2]
    assert batch.target_ids.tolist() == [[2, 9, PAD_ID], [2, 10, 11]]
    assert batch.next_ids.tolist() == [[9, EOS_ID, PAD_ID], [10, 11, EOS_ID]]


def test_an_epoch_has_every_pair_once_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    pairs = [([4] * int(a), [5 + i]) for i, a in enumerate(rng.integers(1, 30, 200))]
    batches = list(epoch_batches(pairs, 100, np.random.default_rng(1)))
    seen = [ids[0] for batch in batches for ids in batch.next_ids.tolist()]
    assert sorted(seen) == [5 + i for i in range(200)]
    assert all(batch.source_ids.numel() <= 100 for batch in batches)
    again = list(epoch_batches(pairs, 100, np.random.default_rng(1)))
    assert all(torch.equal(a.source_ids, b.source_ids) for a, b in zip(batches, again, strict=True))
