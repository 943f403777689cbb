from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, SparseTensorProto, TensorProto, helper

from serving.bundle import Bundle, read_bundle
from serving.errors import BundleError
from serving.runtime import ModelSession, open_session
from serving.runtime.external_data import external_data_faults
from tests.changed_bundles import as_older, relisted
from tests.serving.test_bundle import faults_of

LISTED = {"encoder.onnx", "weights.data"}


def tensor(location: str) -> TensorProto:
    outside = TensorProto(name="w", dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value=location)
    outside.external_data.add(key="offset", value="0")
    return outside


def empty_model() -> ModelProto:
    return helper.make_model(helper.make_graph([], "g", [], []))


def as_initializer(location: str) -> ModelProto:
    model = empty_model()
    model.graph.initializer.append(tensor(location))
    return model


def as_constant(location: str) -> ModelProto:
    model = empty_model()
    model.graph.node.append(helper.make_node("Constant", [], ["x"], value=tensor(location)))
    return model


def in_a_branch(location: str) -> ModelProto:
    model = empty_model()
    branch = as_initializer(location).graph
    inner = helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["x"], then_branch=inner, else_branch=inner))
    return model


def in_a_list(location: str) -> ModelProto:
    model = empty_model()
    model.graph.node.append(helper.make_node("Custom", [], ["x"], several=[tensor(location), tensor(location)]))
    return model


def as_sparse_initializer(location: str) -> ModelProto:
    model = empty_model()
    model.graph.sparse_initializer.append(SparseTensorProto(values=tensor(location), indices=tensor("weights.data"), dims=[1]))
    return model


def in_a_function(location: str) -> ModelProto:
    model = empty_model()
    constant = helper.make_node("Constant", [], ["x"], value=tensor(location))
    model.functions.append(helper.make_function("d", "f", [], ["x"], [constant], [helper.make_opsetid("", 18)]))
    return model


def in_training_info(location: str) -> ModelProto:
    model = empty_model()
    model.training_info.add().initialization.initializer.append(tensor(location))
    return model


def behind_another(location: str) -> ModelProto:
    """The place is stated twice; the last one would count."""
    model = as_initializer("weights.data")
    model.graph.initializer[0].external_data.add(key="location", value=location)
    return model


PLACES = [
    as_initializer, as_constant, in_a_branch, in_a_list, as_sparse_initializer, in_a_function, in_training_info, behind_another,
]  # fmt: skip


@pytest.mark.parametrize("make", PLACES)
def test_a_listed_file_is_allowed_and_no_other(tmp_path: Path, make: Callable[[str], ModelProto]) -> None:
    path = tmp_path / "encoder.onnx"
    path.write_bytes(make("weights.data").SerializeToString())
    assert external_data_faults(path, LISTED) == []
    path.write_bytes(make("other.data").SerializeToString())
    assert external_data_faults(path, LISTED) == [
        "encoder.onnx: takes tensors from 'other.data', which is not among the bundle's files; nothing else is read"
    ]


@pytest.mark.parametrize(
    "location",
    ["../weights.data", "/etc/hostname", "./weights.data", "sub/weights.data", "", "*/_ORT_MEM_ADDR_/*", "weights.data\0"],
)
def test_a_place_that_is_no_listed_name_is_refused(tmp_path: Path, location: str) -> None:
    path = tmp_path / "encoder.onnx"
    path.write_bytes(as_initializer(location).SerializeToString())
    assert external_data_faults(path, LISTED) == [
        f"encoder.onnx: takes tensors from {location!r}, which is not among the bundle's files; nothing else is read"
    ]


def test_every_place_is_told_once(tmp_path: Path) -> None:
    model = as_initializer("b")
    model.graph.initializer.extend([tensor("a"), tensor("b")])
    path = tmp_path / "encoder.onnx"
    path.write_bytes(model.SerializeToString())
    assert [fault.split("'")[1] for fault in external_data_faults(path, LISTED)] == ["a", "b"]


@pytest.mark.parametrize("contents", [b"not a graph", as_initializer("w").SerializeToString()[:-3]], ids=["text", "cut"])
def test_what_is_no_graph_is_refused(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "encoder.onnx"
    path.write_bytes(contents)
    (fault,) = external_data_faults(path, LISTED)
    assert fault.startswith("encoder.onnx: is no ONNX model: ")


def test_a_graph_that_is_missing(tmp_path: Path) -> None:
    (fault,) = external_data_faults(tmp_path / "encoder.onnx", LISTED)
    assert "No such file" in fault


@pytest.fixture
def directory(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_bundle.directory, tmp_path / "bundle"))


def move_weights(directory: Path, location: str) -> None:
    """Let the encoder look for its weights there."""
    model = onnx.load(directory / "encoder.onnx", load_external_data=False)
    for initializer in model.graph.initializer:
        for entry in initializer.external_data:
            if entry.key == "location":
                entry.value = location
    (directory / "encoder.onnx").write_bytes(model.SerializeToString())


def encoded(session: ModelSession) -> NDArray[np.float32]:
    (source,) = session.encode(np.array([[5, 9, 11, 3]]), np.array([4], np.int32))
    return np.array(source)


def test_weights_are_found_where_the_bundle_is_now(directory: Path, tiny_bundle: Bundle) -> None:
    assert np.array_equal(encoded(open_session(read_bundle(directory))), encoded(open_session(tiny_bundle)))


def test_graphs_of_an_older_version_have_their_weights_in_them(directory: Path, tiny_bundle: Bundle) -> None:
    older = as_older(directory)
    assert older.manifest.files.keys() == tiny_bundle.manifest.files.keys() - {"weights.data", "lone_decoder.onnx"}
    assert np.array_equal(encoded(open_session(older)), encoded(open_session(tiny_bundle)))


@pytest.mark.parametrize("location", ["../weights.data", "/etc/hostname", "copy.data"])
def test_a_graph_with_weights_elsewhere_is_not_loaded(directory: Path, location: str) -> None:
    for place in (directory / "copy.data", directory.parent / "weights.data"):
        shutil.copyfile(directory / "weights.data", place)
    move_weights(directory, location)
    with pytest.raises(BundleError) as caught:
        open_session(relisted(directory))
    assert caught.value.faults == (
        f"encoder.onnx: takes tensors from {location!r}, which is not among the bundle's files; nothing else is read",
    )


def test_weights_behind_a_link_are_not_read(directory: Path) -> None:
    shutil.move(directory / "weights.data", directory.parent / "weights.data")
    (directory / "weights.data").symlink_to("../weights.data")
    assert faults_of(directory) == ("weights.data: is a symbolic link; none is followed",)


def test_weights_that_were_cut_changed_or_lost(directory: Path) -> None:
    path = directory / "weights.data"
    contents = path.read_bytes()
    path.write_bytes(contents[:-1])
    assert faults_of(directory) == (f"weights.data: has {len(contents) - 1} bytes instead of {len(contents)}",)
    path.write_bytes(bytes(len(contents)))
    assert faults_of(directory) == ("weights.data: its contents have changed (SHA-256 differs)",)
    path.unlink()
    assert faults_of(directory) == ("weights.data: is missing",)


def test_weights_that_the_manifest_says_are_shorter_than_the_graphs_need(directory: Path) -> None:
    path = directory / "weights.data"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(BundleError, match="a graph cannot be loaded"):
        open_session(relisted(directory))
