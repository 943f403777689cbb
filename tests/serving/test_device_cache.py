"""Caches in a device's memory: how changes compose, on memory that is numpy's, and the whole engine, on the CPU provider."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto

from export.cache_graphs import cache_rows_graph
from export.pipeline import export_bundle
from serving.bundle import Bundle
from serving.config import EngineConfig
from serving.device_cache import DeviceArray, DeviceLaneCache, DeviceSource
from serving.engine import Engine
from serving.errors import BundleError, EngineError, ServerStartError
from serving.kv_cache import CacheGeometry, LaneCache
from serving.manifest import CACHE_ROWS_NAME
from serving.request import DecodingOptions
from serving.runtime import load_graph, open_session
from serving.runtime.device import DeviceModelSession, OrtDeviceMemory
from serving.search import Fork
from tests.serving.test_engine import random_work, translate

GEOMETRY = CacheGeometry(num_tensors=4, num_heads=2, head_dim=8)


@dataclass(frozen=True)
class Block:
    """Host memory that stands for a device's."""

    array: NDArray[np.floating]

    @classmethod
    def device_array(cls, array: NDArray[np.floating]) -> DeviceArray:
        return DeviceArray(array.ctypes.data, array.shape, array.dtype, cls(array))


def contents(array: DeviceArray) -> NDArray[np.floating]:
    """A part of a block, as a view."""
    assert isinstance(array.owner, Block)
    block = array.owner.array
    start = (array.address - block.ctypes.data) // block.itemsize
    return block.reshape(-1)[start : start + int(np.prod(array.shape))].reshape(array.shape)


@dataclass
class NumpyMemory:
    """Remembers every gather, and refuses one that would read what it writes."""

    gathers: list[list[int]] = field(default_factory=list)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        return Block.device_array(np.zeros(shape, dtype))

    def gather(self, sources: Sequence[DeviceArray], rows: NDArray[np.int64], targets: Sequence[DeviceArray]) -> None:
        self.gathers.append(rows.tolist())
        for source, target in zip(sources, targets, strict=True):
            assert not np.shares_memory(contents(source), contents(target))
            contents(target)[...] = contents(source)[rows]


def device_cache(memory: NumpyMemory, *, num_slots: int = 4, width: int = 2) -> DeviceLaneCache:
    return DeviceLaneCache(GEOMETRY, memory, num_slots=num_slots, width=width, target_capacity=4, source_capacity=8)


def fill_rows(cache: DeviceLaneCache, num_sources: int) -> None:
    """Write into every position of every row in use which row it is."""
    for tensor in cache.self_attention(num_sources):
        contents(tensor)[...] = np.arange(len(contents(tensor)))[:, None, None, None]


def rows_of(cache: DeviceLaneCache, num_sources: int) -> list[list[int]]:
    """Of each tensor, which row each row holds; every element of a row says the same."""
    tensors = [contents(tensor) for tensor in cache.self_attention(num_sources)]
    assert all((tensor == tensor[:, :1, :1, :1]).all() for tensor in tensors)
    return [tensor[:, 0, 0, 0].astype(int).tolist() for tensor in tensors]


def batch_of(sources: int, positions: int, seed: int) -> DeviceArray:
    rng = np.random.default_rng(seed)
    return Block.device_array(rng.random((GEOMETRY.num_tensors, sources, 2, positions, 8), np.float32))


def source_in(cache: DeviceLaneCache, slot: int, num_sources: int, length: int) -> NDArray[np.floating]:
    """[tensors, heads, length, head_dim]"""
    return np.stack([contents(tensor)[slot, :, :length] for tensor in cache.cross_attention(num_sources)])


def encoded(batch: DeviceArray, index: int, length: int) -> NDArray[np.floating]:
    return contents(batch)[:, index, :, :length]


def fork(from_row: int, to_row: int) -> Fork:
    return Fork(from_row=from_row, to_row=to_row, start=0, stop=1)


def test_nothing_runs_when_nothing_has_changed() -> None:
    memory = NumpyMemory()
    cache = device_cache(memory)
    cache.settle(4)
    assert memory.gathers == []
    assert cache.turn == (0, 0)


def test_forks_of_several_steps_are_one_gather() -> None:
    memory = NumpyMemory()
    cache = device_cache(memory)
    fill_rows(cache, 4)
    cache.copy_rows([fork(0, 1), fork(5, 4)])
    cache.copy_rows([fork(1, 0)])  # row 1 is row 0 by now, so nothing changes
    cache.settle(4)
    assert memory.gathers == [[0, 0, 2, 3, 5, 5, 6, 7]]
    assert rows_of(cache, 4) == [[0, 0, 2, 3, 5, 5, 6, 7]] * 4


def test_a_chain_of_forks_ends_at_its_first_row() -> None:
    memory = NumpyMemory()
    cache = device_cache(memory, num_slots=1, width=4)
    fill_rows(cache, 1)
    for from_row, to_row in ((2, 3), (3, 1), (1, 0), (1, 2)):
        cache.copy_rows([fork(from_row, to_row)])
    cache.settle(1)
    assert rows_of(cache, 1) == [[2, 2, 2, 2]] * 4


def test_a_source_that_moves_twice_after_a_fork() -> None:
    memory = NumpyMemory()
    cache = device_cache(memory)
    fill_rows(cache, 4)
    cache.copy_rows([fork(7, 6)])
    cache.move_source(3, 2, 1)
    cache.move_source(2, 0, 1)
    cache.settle(2)
    # Only the rows in use are gathered.
    assert memory.gathers[0] == [7, 7, 2, 3]
    assert rows_of(cache, 2) == [[7, 7, 2, 3]] * 4


def test_buffers_take_turns_and_their_addresses_stay() -> None:
    cache = device_cache(NumpyMemory())
    seen = {cache.turn[0]: cache.self_attention(4)[0].address}
    for _ in range(4):
        cache.copy_rows([fork(0, 1)])
        cache.settle(4)
        address = seen.setdefault(cache.turn[0], cache.self_attention(4)[0].address)
        assert address == cache.self_attention(4)[0].address
    assert len(set(seen.values())) == 2


def test_sources_encoded_together_are_written_together() -> None:
    memory = NumpyMemory()
    cache = device_cache(memory)
    first, second = batch_of(3, 5, seed=1), batch_of(1, 11, seed=2)
    for slot, (batch, index, length) in enumerate([(first, 2, 5), (first, 0, 3), (second, 0, 8), (first, 1, 4)]):
        cache.write_source(slot, DeviceSource(batch, index), length)
    cache.settle(4)
    assert len(memory.gathers) == 3
    assert np.array_equal(source_in(cache, 0, 4, 5), encoded(first, 2, 5))
    assert np.array_equal(source_in(cache, 1, 4, 3), encoded(first, 0, 3))
    assert np.array_equal(source_in(cache, 2, 4, 8), encoded(second, 0, 8))
    assert np.array_equal(source_in(cache, 3, 4, 4), encoded(first, 1, 4))
    assert cache.source_lengths.tolist() == [5, 3, 8, 4]
    cache.settle(4)
    assert len(memory.gathers) == 3


def test_beyond_its_length_a_source_repeats_its_last_position() -> None:
    cache = device_cache(NumpyMemory())
    batch = batch_of(1, 3, seed=1)
    contents(batch)[:, :, :, 2:] = np.nan  # padding
    cache.write_source(0, DeviceSource(batch, 0), 2)
    cache.settle(1)
    stored = source_in(cache, 0, 1, 8)
    assert np.array_equal(stored[:, :, 2:], np.repeat(stored[:, :, 1:2], 6, axis=2))
    assert np.isfinite(stored).all()


def test_sources_that_move_before_they_are_written() -> None:
    memory = NumpyMemory()
    cache = device_cache(memory)
    old, new = batch_of(2, 8, seed=1), batch_of(3, 8, seed=2)
    for slot in range(2):
        cache.write_source(slot, DeviceSource(old, slot), 8)
    cache.settle(2)
    memory.gathers.clear()
    for slot in range(2, 4):
        cache.write_source(slot, DeviceSource(new, slot - 2), 5)
    cache.move_source(3, 0, 0)  # slot 0 left: new 1 -> 0
    cache.move_source(2, 1, 0)  # slot 1 left: new 0 -> 1
    cache.write_source(2, DeviceSource(new, 2), 6)
    cache.settle(3)
    assert np.array_equal(source_in(cache, 0, 3, 5), encoded(new, 1, 5))
    assert np.array_equal(source_in(cache, 1, 3, 5), encoded(new, 0, 5))
    assert np.array_equal(source_in(cache, 2, 3, 6), encoded(new, 2, 6))
    assert cache.source_lengths[:3].tolist() == [5, 5, 6]


def test_a_new_source_takes_the_slot_that_another_moves_out_of() -> None:
    cache = device_cache(NumpyMemory())
    old, new = batch_of(3, 8, seed=1), batch_of(1, 8, seed=2)
    for slot in range(3):
        cache.write_source(slot, DeviceSource(old, slot), 8)
    cache.settle(3)
    fill_rows(cache, 3)
    cache.move_source(2, 0, 1)
    cache.write_source(2, DeviceSource(new, 0), 7)
    cache.settle(3)
    assert np.array_equal(source_in(cache, 0, 3, 8), encoded(old, 2, 8))
    assert np.array_equal(source_in(cache, 1, 3, 8), encoded(old, 1, 8))
    assert np.array_equal(source_in(cache, 2, 3, 7), encoded(new, 0, 7))
    assert rows_of(cache, 3)[0][:4] == [4, 5, 2, 3]


def test_a_source_that_leaves_before_it_is_written_is_forgotten() -> None:
    memory = NumpyMemory()
    cache = device_cache(memory)
    batch = batch_of(2, 8, seed=1)
    cache.write_source(0, DeviceSource(batch, 0), 8)
    cache.write_source(1, DeviceSource(batch, 1), 8)
    cache.settle(1)  # the lane dropped the last slot
    cache.settle(2)
    assert len(memory.gathers) == 1
    assert not source_in(cache, 1, 2, 8).any()


def test_what_was_noted_of_a_source_that_left_costs_its_successor_nothing() -> None:
    memory = NumpyMemory()
    cache = device_cache(memory)
    batch = batch_of(4, 8, seed=1)
    for slot in range(3):
        cache.write_source(slot, DeviceSource(batch, slot), 8)
    cache.settle(3)
    memory.gathers.clear()
    cache.copy_rows([fork(4, 5)])
    cache.move_source(2, 1, 1)  # slot 1 left; then the one that moved there left too, as the last
    cache.write_source(1, DeviceSource(batch, 3), 8)
    cache.settle(2)
    assert len(memory.gathers) == 1
    assert np.array_equal(source_in(cache, 1, 2, 8), encoded(batch, 3, 8))


def test_a_source_takes_the_place_of_one_that_was_never_written() -> None:
    cache = device_cache(NumpyMemory())
    old, new = batch_of(2, 8, seed=1), batch_of(1, 8, seed=2)
    for slot in range(2):
        cache.write_source(slot, DeviceSource(old, slot), 8)
    cache.settle(2)
    cache.write_source(2, DeviceSource(new, 0), 8)
    cache.move_source(2, 0, 0)  # slot 0 left
    cache.move_source(1, 0, 1)  # and so did the new one
    cache.settle(1)
    assert np.array_equal(source_in(cache, 0, 1, 8), encoded(old, 1, 8))


def test_growing_carries_out_what_was_noted_of_the_rows() -> None:
    memory = NumpyMemory()
    cache = device_cache(memory)
    fill_rows(cache, 4)
    cache.copy_rows([fork(1, 0)])
    cache.move_source(3, 1, 1)
    cache.grow_target(8, 3)
    cache.copy_rows([fork(4, 5)])
    cache.settle(3)
    tensors = [contents(tensor) for tensor in cache.self_attention(3)]
    assert cache.target_capacity == 8
    for tensor in tensors:
        assert tensor.shape == (6, 2, 8, 8)
        assert tensor[:, 0, 0, 0].tolist() == [1, 1, 6, 7, 4, 4]
        assert (tensor[:, :, :4] == tensor[:, :1, :1, :1]).all()
        assert not tensor[:, :, 4:].any()


def test_growing_for_longer_sources_carries_out_what_was_noted_of_them() -> None:
    memory = NumpyMemory()
    cache = device_cache(memory)
    old, new, long = batch_of(3, 8, seed=1), batch_of(1, 8, seed=2), batch_of(2, 13, seed=3)
    for slot, length in enumerate((8, 5, 6)):
        cache.write_source(slot, DeviceSource(old, slot), length)
    cache.settle(3)
    fill_rows(cache, 3)
    cache.move_source(2, 0, 1)  # slot 0 left
    cache.write_source(2, DeviceSource(new, 0), 7)  # not in the cache yet, and neither is the next
    cache.grow_source(16, 3)
    cache.write_source(3, DeviceSource(long, 1), 13)
    cache.settle(4)
    assert cache.source_capacity == 16
    assert cache.source_lengths.tolist() == [6, 5, 7, 13]
    assert np.array_equal(source_in(cache, 0, 4, 6), encoded(old, 2, 6))
    assert np.array_equal(source_in(cache, 1, 4, 5), encoded(old, 1, 5))
    assert np.array_equal(source_in(cache, 2, 4, 7), encoded(new, 0, 7))
    assert np.array_equal(source_in(cache, 3, 4, 13), encoded(long, 1, 13))
    for tensor in cache.cross_attention(4):
        assert contents(tensor).shape == (4, 2, 16, 8)
        assert np.isfinite(contents(tensor)).all()
    assert rows_of(cache, 3)[0][:4] == [4, 5, 2, 3]


def test_an_empty_lane_grows_for_its_first_source() -> None:
    memory = NumpyMemory()
    cache = device_cache(memory)
    batch = batch_of(1, 20, seed=1)
    cache.grow_source(32, 0)
    assert memory.gathers == []
    cache.write_source(0, DeviceSource(batch, 0), 20)
    cache.settle(1)
    assert np.array_equal(source_in(cache, 0, 1, 20), encoded(batch, 0, 20))


def test_sources_grow_twice() -> None:
    cache = device_cache(NumpyMemory())
    batch = batch_of(2, 8, seed=1)
    for slot in range(2):
        cache.write_source(slot, DeviceSource(batch, slot), 8)
    cache.settle(2)
    cache.grow_source(16, 2)
    cache.grow_source(64, 2)
    cache.settle(2)
    for slot in range(2):
        assert np.array_equal(source_in(cache, slot, 2, 8), encoded(batch, slot, 8))
        assert not source_in(cache, slot, 2, 64)[:, :, 8:].any()


def test_bytes_are_of_both_buffers() -> None:
    cache = device_cache(NumpyMemory())
    row_bytes, source_bytes = 4 * 2 * 4 * 8 * 4, 4 * 2 * 8 * 8 * 4
    assert cache.nbytes == 2 * (row_bytes * (8 + 1) + source_bytes * (4 + 1))


def test_random_changes_equal_those_of_the_cache_in_host_memory() -> None:
    """Sources come, fork, leave and move at random, with steps that append; both caches then hold the same."""
    rng = random.Random(7)
    memory = NumpyMemory()
    device = device_cache(memory, num_slots=5, width=3)
    host = LaneCache(GEOMETRY, num_slots=5, width=3, target_capacity=4, source_capacity=8)
    lengths: list[int] = []  # decoded positions of each slot
    value = 0.0
    for step in range(300):
        for _ in range(rng.randint(0, 2)):
            if len(lengths) < 5:
                # Longer ones as it goes on, so that both caches have to grow for them.
                batch, length = batch_of(2, 30, seed=step), rng.randint(1, 8 + step // 15)
                while length > host.source_capacity:
                    for cache in (device, host):
                        cache.grow_source(2 * cache.source_capacity, len(lengths))
                device.write_source(len(lengths), DeviceSource(batch, 1), length)
                host.write_source(len(lengths), encoded(batch, 1, 30), length)
                lengths.append(0)
        for slot in sorted(rng.sample(range(len(lengths)), min(len(lengths), rng.choice([0, 0, 1, 2]))), reverse=True):
            last = len(lengths) - 1
            if slot != last:
                device.move_source(last, slot, lengths[last])
                host.move_source(last, slot, lengths[last])
                lengths[slot] = lengths[last]
            lengths.pop()
        if not lengths:
            continue
        if max(lengths) == host.target_capacity:
            for cache in (device, host):
                cache.grow_target(2 * host.target_capacity if cache is host else 2 * device.target_capacity, len(lengths))
        device.settle(len(lengths))
        for row in range(3 * len(lengths)):
            value += 1
            for i, tensor in enumerate(device.self_attention(len(lengths))):
                contents(tensor)[row, :, lengths[row // 3]] = value
                host.self_attention[i, row, :, lengths[row // 3]] = value
        lengths = [length + 1 for length in lengths]
        for slot, length in enumerate(lengths):
            assert device.source_lengths[slot] == host.source_lengths[slot]
            for i, (own, cross) in enumerate(
                zip(device.self_attention(len(lengths)), device.cross_attention(len(lengths)), strict=True)
            ):
                rows = slice(3 * slot, 3 * slot + 3)
                assert np.array_equal(contents(own)[rows, :, :length], host.self_attention[i, rows, :, :length])
                n = int(host.source_lengths[slot])
                assert np.array_equal(contents(cross)[slot, :, :n], host.cross_attention[i, slot, :, :n])
        forks = []
        for slot in range(len(lengths)):
            to_beam, from_beam = rng.sample(range(3), 2)
            forks.append(Fork(from_row=3 * slot + from_beam, to_row=3 * slot + to_beam, start=0, stop=lengths[slot]))
        device.copy_rows(forks)
        host.copy_rows(forks)
    assert host.target_capacity > 4
    assert device.source_capacity == host.source_capacity == 32


# From here on ONNX Runtime, with the CPU as the device.


def test_the_runtimes_memory_uploads_and_gathers() -> None:
    memory = OrtDeviceMemory("cpu", load_graph(cache_rows_graph(2, TensorProto.FLOAT)))
    sources = [memory.zeros((3, 2, 4), np.float32) for _ in range(2)]
    targets = [memory.zeros((2, 2, 4), np.float32) for _ in range(2)]
    values = [np.random.default_rng(i).random((3, 2, 4), np.float32) for i in range(2)]
    for source, value in zip(sources, values, strict=True):
        memory.upload(source, value)
    memory.gather([s.rows(1) for s in sources], np.array([2, 0]), [t.rows(1) for t in targets])
    for target, value in zip(targets, values, strict=True):
        assert np.array_equal(target.owner.numpy(), value[[2, 0]])  # type: ignore[attr-defined]  # an OrtValue


def test_a_failing_gather_is_an_engine_error() -> None:
    memory = OrtDeviceMemory("cpu", load_graph(cache_rows_graph(1, TensorProto.FLOAT)))
    source, target = memory.zeros((3, 4), np.float32), memory.zeros((1, 4), np.float32)
    with pytest.raises(EngineError, match="a graph failed"):
        memory.gather([source], np.array([3]), [target])


@pytest.fixture(scope="module")
def fp32_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of fp32, which runs on a CPU, with the graph that only bundles of fp16 have."""
    bundle = export_bundle(tiny_checkpoint, tmp_path_factory.mktemp("device") / "fp32", show_progress=False)
    tensors = 2 * bundle.manifest.architecture.num_decoder_layers
    bundle.cache_rows_path.write_bytes(cache_rows_graph(tensors, TensorProto.FLOAT))
    return bundle


@pytest.fixture
def device_engine(fp32_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr("serving.engine.open_session", lambda *_, **__: DeviceModelSession(fp32_bundle, device="cpu"))
    engine = Engine(fp32_bundle, EngineConfig(threads=1, max_rows_per_worker=16, encoder_batch_tokens=64))
    engine.start()
    yield engine
    engine.close()


def test_the_engine_answers_the_same_to_the_last_bit(device_engine: Engine, fp32_bundle: Bundle) -> None:
    work = [*random_work(40, seed=11), ((5, 6, 7, 3), DecodingOptions(beam_size=3, min_target_tokens=70, max_target_tokens=100))]
    got = [outcome.hypotheses for outcome in translate(device_engine, work)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.engine.open_session", open_session)
        engine = Engine(fp32_bundle, EngineConfig(threads=1, max_rows_per_worker=16, encoder_batch_tokens=64))
    engine.start()
    expected = [outcome.hypotheses for outcome in translate(engine, work)]
    engine.close()
    assert got == expected
    assert all(got)


def with_precision(bundle: Bundle, precision: str) -> Bundle:
    manifest = bundle.manifest.model_copy(update={"precision": precision})
    return replace(bundle, manifest=manifest)


@pytest.mark.parametrize(
    ("device", "precision", "remedy"),
    [
        ("cuda", "int8", "--precision fp16 "),
        ("cuda", "fp32", "--precision fp16 "),
        ("cpu", "fp16", "--precision int8 or --precision fp32 "),
    ],
)
def test_a_precision_that_a_device_cannot_run_is_refused(fp32_bundle: Bundle, device: str, precision: str, remedy: str) -> None:
    with pytest.raises(ServerStartError, match=f"device {device} cannot run a bundle of {precision}; export .* with {remedy}"):
        open_session(with_precision(fp32_bundle, precision), device=device)


def test_a_runtime_without_the_device_says_what_to_install(fp32_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ServerStartError, match="offers CPUExecutionProvider; CUDA needs the extra `gpu`"):
        open_session(with_precision(fp32_bundle, "fp16"), device="cuda")


def test_a_runtime_that_falls_back_to_the_cpu_is_refused(fp32_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.InferenceSession.get_providers", lambda _: [])
    with pytest.raises(ServerStartError, match="could not use it and fell back"):
        DeviceModelSession(fp32_bundle, device="cpu")


def test_a_graph_of_rows_that_cannot_be_loaded_is_the_bundles_fault(fp32_bundle: Bundle, tmp_path: Path) -> None:
    directory = tmp_path / "broken"
    shutil.copytree(fp32_bundle.directory, directory)
    (directory / CACHE_ROWS_NAME).write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"cache_rows\.onnx: is no ONNX model"):
        DeviceModelSession(replace(fp32_bundle, directory=directory), device="cpu")
