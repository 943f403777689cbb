"""The caches' own operations; in-place writing by the graph is tested with the engine."""

import gc
import weakref

import numpy as np
import pytest

from serving.kv_cache import CacheGeometry, LaneCache
from serving.search import Fork


@pytest.fixture
def cache() -> LaneCache:
    geometry = CacheGeometry(num_tensors=4, num_heads=2, head_dim=8)
    cache = LaneCache(geometry, num_slots=3, width=2, target_capacity=5, source_capacity=7)
    rng = np.random.default_rng(0)
    cache.self_attention[...] = rng.random(cache.self_attention.shape)
    return cache


def encoded(length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((4, 2, length, 8), np.float32)


def test_sizes(cache: LaneCache) -> None:
    assert cache.self_attention.shape == (4, 6, 2, 5, 8)
    assert cache.cross_attention.shape == (4, 3, 2, 7, 8)
    assert cache.nbytes == 4 * (4 * 6 * 2 * 5 * 8 + 4 * 3 * 2 * 7 * 8)


def test_a_source_is_written_without_its_padding(cache: LaneCache) -> None:
    source = encoded(6)
    cache.write_source(1, source, 4)
    assert np.array_equal(cache.cross_attention[:, 1, :, :4], source[:, :, :4])
    assert not cache.cross_attention[:, 1, :, 4:].any()
    assert not cache.cross_attention[:, 0].any()
    assert cache.source_lengths.tolist() == [1, 4, 1]


def test_what_lies_beyond_a_shorter_source_stays_finite(cache: LaneCache) -> None:
    cache.write_source(0, encoded(7), 7)
    cache.write_source(0, encoded(2, seed=2), 2)
    assert np.isfinite(cache.cross_attention).all()


def test_a_fork_copies_its_positions_and_nothing_else(cache: LaneCache) -> None:
    before = cache.self_attention.copy()
    cache.copy_rows([Fork(from_row=0, to_row=1, start=2, stop=4), Fork(from_row=4, to_row=5, start=0, stop=1)])
    expected = before.copy()
    expected[:, 1, :, 2:4] = before[:, 0, :, 2:4]
    expected[:, 5, :, :1] = before[:, 4, :, :1]
    assert np.array_equal(cache.self_attention, expected)


def test_moving_a_source_moves_its_rows_and_its_length(cache: LaneCache) -> None:
    cache.write_source(2, encoded(5), 5)
    before = cache.self_attention.copy()
    cache.move_source(2, 0, 3)
    assert np.array_equal(cache.self_attention[:, 0:2, :, :3], before[:, 4:6, :, :3])
    assert np.array_equal(cache.self_attention[:, 2:], before[:, 2:])
    assert np.array_equal(cache.cross_attention[:, 0, :, :5], encoded(5))
    assert cache.source_lengths.tolist() == [5, 1, 5]


def test_growing_keeps_what_is_used(cache: LaneCache) -> None:
    before = cache.self_attention.copy()
    cache.grow_target(10, 2)
    assert cache.self_attention.shape == (4, 6, 2, 10, 8)
    assert np.array_equal(cache.self_attention[:, :4, :, :5], before[:, :4])
    assert not cache.self_attention[:, 4:].any()
    assert not cache.self_attention[:, :, :, 5:].any()
    assert cache.target_capacity == 10


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_growing_for_longer_sources_keeps_what_is_used(dtype: type[np.generic]) -> None:
    geometry = CacheGeometry(num_tensors=4, num_heads=2, head_dim=8, dtype=dtype)
    cache = LaneCache(geometry, num_slots=3, width=2, target_capacity=5, source_capacity=7)
    rng = np.random.default_rng(0)
    sources = [rng.integers(-127, 128, (4, 2, length, 8)).astype(dtype) for length in (7, 3, 5)]
    for slot, source in enumerate(sources):
        cache.write_source(slot, source, source.shape[2])
    own = cache.self_attention
    cache.grow_source(14, 2)
    assert cache.source_capacity == 14
    assert cache.cross_attention.shape == (4, 3, 2, 14, 8)
    assert cache.cross_attention.dtype == dtype
    for slot, source in enumerate(sources[:2]):
        length = source.shape[2]
        assert np.array_equal(cache.cross_attention[:, slot, :, :length], source)
        assert not cache.cross_attention[:, slot, :, length:].any()
    # Slot 2 was free: nothing of it is copied. Rows and lengths are not the sources' business.
    assert not cache.cross_attention[:, 2].any()
    assert cache.self_attention is own
    assert cache.source_lengths[:2].tolist() == [7, 3]
    long = rng.integers(-127, 128, (4, 2, 14, 8)).astype(dtype)
    cache.write_source(2, long, 14)
    cache.move_source(2, 0, 0)
    assert np.array_equal(cache.cross_attention[:, 0], long)


def test_an_empty_lane_grows_for_its_first_source(cache: LaneCache) -> None:
    cache.grow_source(28, 0)
    assert cache.cross_attention.shape == (4, 3, 2, 28, 8)
    assert not cache.cross_attention.any()


def check_rows(cache: LaneCache, slots: int) -> None:
    """Each row has what its slot has."""
    cross, lengths = cache.sources_by_row(slots)
    for slot in range(slots):
        length = int(cache.source_lengths[slot])
        for row in (2 * slot, 2 * slot + 1):
            assert lengths[row] == length
            assert np.array_equal(cross[:, row, :, :length], cache.cross_attention[:, slot, :, :length])


def test_rows_have_copies_of_their_sources_as_these_are_now(cache: LaneCache) -> None:
    for slot, length in enumerate((3, 7)):
        cache.write_source(slot, encoded(length, seed=slot), length)
    check_rows(cache, 2)
    first, _ = cache.sources_by_row(2)
    assert first.shape == (4, 4, 2, 7, 8)
    cache.write_source(0, encoded(5, seed=5), 5)
    check_rows(cache, 2)
    cache.move_source(1, 0, 0)
    check_rows(cache, 1)
    # What nobody asked for meanwhile is brought up to date when somebody does.
    cache.write_source(1, encoded(2, seed=6), 2)
    check_rows(cache, 1)
    check_rows(cache, 2)
    assert cache.sources_by_row(1)[0] is first
    assert cache.sources_by_row(2)[0] is first


def test_copies_of_sources_take_memory_for_as_many_as_were_asked_for(cache: LaneCache) -> None:
    before = cache.nbytes
    cache.write_source(0, encoded(7), 7)
    check_rows(cache, 1)
    of_a_slot = cache.cross_attention[:, 0].nbytes
    assert cache.nbytes == before + 2 * of_a_slot
    for slot in (1, 2):
        cache.write_source(slot, encoded(4, seed=slot), 4)
    check_rows(cache, 3)
    assert cache.nbytes == before + 6 * of_a_slot
    cache.grow_source(14, 3)
    assert cache.nbytes == before + 4 * 4 * 3 * 2 * 7 * 8
    check_rows(cache, 3)
    assert cache.sources_by_row(3)[0].shape == (4, 6, 2, 14, 8)


def test_rows_of_sources_that_nobody_asked_for_at_first() -> None:
    geometry = CacheGeometry(num_tensors=4, num_heads=2, head_dim=8)
    cache = LaneCache(geometry, num_slots=5, width=2, target_capacity=5, source_capacity=7)
    for slot in range(5):
        cache.write_source(slot, encoded(slot + 2, seed=slot), slot + 2)
    check_rows(cache, 3)
    assert cache.sources_by_row(3)[0].shape[1] == 2 * 4
    check_rows(cache, 4)
    check_rows(cache, 5)
    assert cache.sources_by_row(5)[0].shape[1] == 2 * 5


def test_copies_of_sources_that_are_forgotten_are_made_anew(cache: LaneCache) -> None:
    cache.write_source(0, encoded(3), 3)
    before = cache.nbytes
    check_rows(cache, 1)
    cache.forget_sources_by_row()
    assert cache.nbytes == before
    check_rows(cache, 1)


def test_a_cache_that_nobody_has_is_gone_at_once(cache: LaneCache) -> None:
    """Not when the collector of circles comes by, which knows nothing of the arrays' size."""
    own = LaneCache(cache.geometry, num_slots=3, width=2, target_capacity=5, source_capacity=7)
    own.write_source(0, encoded(3), 3)
    arrays = [weakref.ref(array) for array in (own.cross_attention, own.self_attention, own.sources_by_row(1)[0])]
    gc.disable()
    try:
        del own
        assert [reference() for reference in arrays] == [None, None, None]
    finally:
        gc.enable()


def test_sources_of_one_row_each_are_not_copied() -> None:
    geometry = CacheGeometry(num_tensors=2, num_heads=2, head_dim=8)
    cache = LaneCache(geometry, num_slots=3, width=1, target_capacity=5, source_capacity=7)
    cross, lengths = cache.sources_by_row(2)
    assert cross is cache.cross_attention
    assert lengths is cache.source_lengths
