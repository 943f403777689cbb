"""fp16 on a CUDA device, against fp32 on the CPU. Skipped, with the reason, where there is none.

Half precision may take another token where two are nearly as probable, and its bits depend on the batch. So what is compared to
the last bit is the caches, which only ever copy, and of decoding the first tokens, nearly all of which must be the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from export.cache_graphs import cache_rows_graph
from export.pipeline import export_bundle
from serving.bundle import Bundle
from serving.config import EngineConfig
from serving.device_cache import DeviceArray, DeviceLaneCache, DeviceSource
from serving.engine import Engine
from serving.errors import RequestCancelledError, ServerStartError
from serving.kv_cache import CacheGeometry
from serving.request import DecodingOptions
from serving.runtime import load_graph
from serving.runtime.device import OrtDeviceMemory
from serving.search import Fork
from tests.serving.test_engine import Gate, Waiter, random_work, translate
from tests.support import score_of

pytestmark = pytest.mark.gpu

GEOMETRY = CacheGeometry(num_tensors=4, num_heads=2, head_dim=8, dtype=np.float16)


@pytest.fixture(scope="module")
def memory() -> OrtDeviceMemory:
    """The device's memory; no test runs without."""
    try:
        return OrtDeviceMemory("cuda", load_graph(cache_rows_graph(GEOMETRY.num_tensors, TensorProto.FLOAT16), device="cuda"))
    except ServerStartError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def half_bundle(memory: OrtDeviceMemory, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(tiny_checkpoint, tmp_path_factory.mktemp("cuda") / "fp16", precision="fp16", show_progress=False)


@pytest.fixture
def cuda_engine(half_bundle: Bundle) -> Iterator[Engine]:
    engine = Engine(half_bundle, EngineConfig(device="cuda", max_rows_per_worker=16, encoder_batch_tokens=64))
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
def cpu_engine(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Engine]:
    bundle = export_bundle(tiny_checkpoint, tmp_path / "fp32", show_progress=False)
    engine = Engine(bundle, EngineConfig(threads=1, max_rows_per_worker=16, encoder_batch_tokens=64))
    engine.start()
    yield engine
    engine.close()


def random_array(memory: OrtDeviceMemory, shape: tuple[int, ...], seed: int) -> tuple[DeviceArray, NDArray[np.float16]]:
    values = np.random.default_rng(seed).random(shape).astype(np.float16)
    array = memory.zeros(shape, np.float16)
    memory.upload(array, values)
    return array, values


def on_host(array: DeviceArray) -> NDArray[np.float16]:
    """A part of an array of ``OrtDeviceMemory``, copied to the host."""
    whole = array.owner.numpy()  # type: ignore[attr-defined]  # an OrtValue
    start = (array.address - array.owner.data_ptr()) // whole.itemsize  # type: ignore[attr-defined]  # an OrtValue
    part: NDArray[np.float16] = whole.reshape(-1)[start : start + int(np.prod(array.shape))].reshape(array.shape)
    return part


def test_the_certificate_was_measured_on_the_device(half_bundle: Bundle) -> None:
    comparison = half_bundle.manifest.certificate.comparisons["onnx_fp16"]
    assert comparison.max_abs_logit_difference < 0.05
    assert comparison.token_agreement > 0.95


def test_rows_are_moved_to_the_last_bit(memory: OrtDeviceMemory) -> None:
    source, values = random_array(memory, (5, 24), seed=0)
    sources, targets = [source] * 4, [memory.zeros((6, 24), np.float16) for _ in range(4)]
    rows = np.array([4, 0, 0, 3])
    memory.gather(sources, rows, [target.part(1, 5) for target in targets])
    for target in targets:
        assert np.array_equal(on_host(target)[1:5], values[rows])
        assert not on_host(target)[[0, 5]].any()


def test_the_caches_hold_what_they_should(memory: OrtDeviceMemory) -> None:
    """Sources of two batches, a move, a fork and growth, then read back."""
    cache = DeviceLaneCache(GEOMETRY, memory, num_slots=4, width=2, target_capacity=4, source_capacity=8)
    (first, first_values), (second, second_values) = (random_array(memory, (4, 2, 2, 9, 8), seed) for seed in (1, 2))
    for slot, (batch, index, length) in enumerate([(first, 1, 8), (first, 0, 3), (second, 1, 5)]):
        cache.write_source(slot, DeviceSource(batch, index), length)
    cache.settle(3)
    for i, tensor in enumerate(cache.self_attention(3)):
        rows, _ = random_array(memory, (6, 2 * 4 * 8), seed=10 + i)
        memory.gather([rows] * 4, np.arange(6), [tensor.rows(1)] * 4)
    before = [on_host(tensor) for tensor in cache.self_attention(3)]
    cache.copy_rows([Fork(from_row=5, to_row=4, start=0, stop=4)])
    cache.move_source(2, 0, 4)
    cache.grow_target(8, 2)
    cache.settle(2)
    for i, (own, cross) in enumerate(zip(cache.self_attention(2), cache.cross_attention(2), strict=True)):
        assert np.array_equal(on_host(own)[:, :, :4], before[i][[5, 5, 2, 3]])
        assert not on_host(own)[:, :, 4:].any()
        assert np.array_equal(on_host(cross)[0, :, :5], second_values[i, 1, :, :5])
        assert np.array_equal(on_host(cross)[1, :, :3], first_values[i, 0, :, :3])


def test_first_tokens_are_those_of_fp32_on_the_cpu(cuda_engine: Engine, cpu_engine: Engine) -> None:
    """Beams and lanes of all widths together, so that sources come, fork, move and leave."""
    work = random_work(60, seed=21)
    got = [outcome.hypotheses[0].target_ids[:4] for outcome in translate(cuda_engine, work)]
    expected = [outcome.hypotheses[0].target_ids[:4] for outcome in translate(cpu_engine, work)]
    same = sum(a == b for a, b in zip(got, expected, strict=True))
    assert same >= 0.8 * len(work), f"{same} of {len(work)}"


def test_scores_are_near_those_of_fp32_on_the_cpu(cuda_engine: Engine, cpu_engine: Engine) -> None:
    work = random_work(60, seed=22)
    got = [outcome.hypotheses[0] for outcome in translate(cuda_engine, work)]
    expected = [outcome.hypotheses[0] for outcome in translate(cpu_engine, work)]
    same = [(a, b) for a, b in zip(got, expected, strict=True) if a.target_ids == b.target_ids]
    assert len(same) >= len(work) / 3
    # Without a length penalty a score is a sum over the tokens.
    assert [(a, b) for a, b in same if abs(score_of(a) - score_of(b)) > 0.01 * b.target_tokens] == []


def test_targets_longer_than_the_first_cache(cuda_engine: Engine) -> None:
    options = DecodingOptions(beam_size=3, num_hypotheses=3, min_target_tokens=70, max_target_tokens=100)
    outcomes = translate(cuda_engine, [((5, 6, 7, 3), options), ((9, 8, 3), options)])
    for outcome in outcomes:
        assert [70 <= len(hypothesis.target_ids) <= 100 for hypothesis in outcome.hypotheses] == [True] * 3


def test_a_cancelled_sequence_leaves_at_the_next_step_and_others_go_on(
    cuda_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = DecodingOptions(min_target_tokens=20, max_target_tokens=20)
    gate, waiter = Gate(monkeypatch), Waiter()
    leaving, staying = waiter.sequence((5, 6, 7, 3), options), waiter.sequence((9, 8, 3), options)
    cuda_engine.submit([leaving, staying])
    for _ in range(3):
        gate.wait_for_step()
        gate.let_steps_pass()
    gate.wait_for_step()
    cuda_engine.cancel([leaving])
    gate.let_steps_pass(1000)
    first, second = waiter.next(), waiter.next()
    assert first[0] is leaving
    assert isinstance(first[1].error, RequestCancelledError)
    assert second[0] is staying
    (hypothesis,) = second[1].hypotheses
    assert hypothesis.target_tokens == 20
