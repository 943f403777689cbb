from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from export.checkpoint.archives import read_pickle
from export.checkpoint.stand_ins import OMEGACONF_CLASSES, StandIn, attribute, plain_settings
from tests.tool_classes import ToolClasses

CLASSES = ("tool.Known", "tool.function", *OMEGACONF_CLASSES)


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> ToolClasses:
    return ToolClasses(monkeypatch)


def read(path: Path, document: Any, *, as_zip: bool = True) -> dict[str, Any]:
    torch.save(document, path, _use_new_zipfile_serialization=as_zip)
    faults: list[str] = []
    found = read_pickle(path, CLASSES, "write it anew", faults)
    assert faults == []
    return found


def fault_of(path: Path, document: Any = None, *, as_zip: bool = True) -> str:
    if document is not None:
        torch.save(document, path, _use_new_zipfile_serialization=as_zip)
    faults: list[str] = []
    assert read_pickle(path, CLASSES, "write it anew", faults) == {}
    (fault,) = faults
    return fault


def write_opcodes(path: Path, opcodes: bytes) -> None:
    """A file of ``torch.save`` whose pickle is these."""
    torch.save({}, path.with_suffix(".empty"))
    pack_again(path.with_suffix(".empty"), path, opcodes)


def pack_again(stored: Path, packed: Path, opcodes: bytes | None = None, *, compression: int = zipfile.ZIP_STORED) -> None:
    """The same file as an archive that torch has not written, with another pickle if one is given."""
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(packed, "w", compression) as target:
        for info in source.infolist():
            is_pickle = info.filename.endswith("data.pkl")
            target.writestr(info.filename, opcodes if is_pickle and opcodes is not None else source.read(info))


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_objects_become_stand_ins_with_their_state(tmp_path: Path, classes: ToolClasses, as_zip: bool) -> None:
    document = {"object": classes.make("tool.Known", tokens=["a", "b"]), "tensor": torch.ones(2, 3)}
    found = read(tmp_path / "m.pt", document, as_zip=as_zip)
    assert isinstance(found["object"], StandIn)
    assert repr(found["object"]) == "<tool.Known>"
    assert attribute(found["object"], "tokens") == ["a", "b"]
    assert attribute(found["object"], "other") is None
    assert torch.equal(found["tensor"], torch.ones(2, 3))


def test_tensors_of_an_archive_that_was_packed_again(tmp_path: Path) -> None:
    torch.save({"tensor": torch.arange(1000)}, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for info in stored.infolist():
            packed.writestr(info.filename, stored.read(info))
    faults: list[str] = []
    assert torch.equal(read_pickle(tmp_path / "m.pt", (), "", faults)["tensor"], torch.arange(1000))


def test_an_archive_that_unpacks_to_more_than_any_model(tmp_path: Path) -> None:
    torch.save({"tensor": torch.zeros(2**23)}, tmp_path / "stored.pt")
    pack_again(tmp_path / "stored.pt", tmp_path / "m.pt", compression=zipfile.ZIP_DEFLATED)
    assert fault_of(tmp_path / "m.pt").startswith("m.pt: cannot be read: unpacks to 3355")


class Hostile:
    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "posix.system"), (eval, "eval"), (getattr, "getattr"), (torch.load, "torch.serialization.load")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,  # an address would differ between processes
)
def test_a_function_that_is_not_known_is_refused_by_its_name(tmp_path: Path, function: Any, name: str, as_zip: bool) -> None:
    document = {"settings": argparse.Namespace(x=[Hostile(function, ("touch run",))])}
    fault = fault_of(tmp_path / "m.pt", document, as_zip=as_zip)
    assert fault == f"m.pt: needs {name}, which is not loaded since a pickle may run any code; write it anew"


def test_a_class_that_is_not_known_is_refused_by_its_name(tmp_path: Path, classes: ToolClasses) -> None:
    fault = fault_of(tmp_path / "m.pt", {"object": classes.make("tool.Unknown", x=1)})
    assert fault.startswith("m.pt: needs tool.Unknown, which is not loaded")


def test_a_known_name_is_never_what_it_names(tmp_path: Path, classes: ToolClasses, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called, made and given a state, whatever is there by this name."""
    called = []
    monkeypatch.setattr(classes.named("tool.Known"), "__setstate__", lambda self, state: called.append(state), raising=False)
    function = classes.named("tool.function", lambda *arguments: called.append(arguments))
    document = {"object": classes.make("tool.Known", x=1), "result": Hostile(function, ("echo", 1), {"state": 2})}
    found = read(tmp_path / "m.pt", document)
    assert called == []
    assert (found["result"].arguments, found["result"].state) == (("echo", 1), {"state": 2})


@pytest.mark.parametrize(
    "state",
    [None, 5, [1, 2], ({"__class__": 1}, {"x": 2}), {"__class__": dict, "name": "x", 3: 4}],
    ids=["none", "number", "list", "slots", "names"],
)
def test_odd_states_are_only_stored(tmp_path: Path, classes: ToolClasses, state: Any) -> None:
    found = read(tmp_path / "m.pt", {"object": Hostile(classes.named("tool.Known"), (), state)})["object"]
    assert (type(found).__mro__[1], repr(found)) == (StandIn, "<tool.Known>")
    assert attribute(found, "tokens") is None


# In the words of ``pickletools``.
PROTO, STOP, EMPTY_TUPLE, REDUCE, BUILD, NEWOBJ, EMPTY_DICT = b"\x80\x02", b".", b")", b"R", b"b", b"\x81", b"}"
KNOWN, DEFAULT_DICT = b"ctool\nKnown\n", b"ccollections\ndefaultdict\n"


@pytest.mark.parametrize(
    "opcodes",
    [
        # A state for the class itself, for a function, for a plain dict.
        KNOWN + EMPTY_DICT + BUILD,
        DEFAULT_DICT + EMPTY_DICT + BUILD,
        DEFAULT_DICT + EMPTY_TUPLE + REDUCE + EMPTY_DICT + BUILD,
        # A new object of a function, and of an object.
        DEFAULT_DICT + EMPTY_TUPLE + NEWOBJ,
        KNOWN + EMPTY_TUPLE + REDUCE + EMPTY_TUPLE + NEWOBJ,
        # A call of an object; items of one.
        KNOWN + EMPTY_TUPLE + REDUCE + EMPTY_TUPLE + REDUCE,
        KNOWN + EMPTY_TUPLE + REDUCE + b"K\1K\2s",
        KNOWN + EMPTY_TUPLE + REDUCE + b"K\1a",
        # Attributes through a dotted name, as newer protocols have them; an extension's code.
        b"\x8c\4tool\x8c\x0eKnown.__init__\x93",
        b"\x82\1",
        # Nothing on the stack, and an end within.
        REDUCE,
        b"X\xff",
    ],
    ids=ascii,
)
def test_what_no_pickle_of_a_tool_does(tmp_path: Path, opcodes: bytes) -> None:
    write_opcodes(tmp_path / "m.pt", PROTO + opcodes + STOP)
    assert fault_of(tmp_path / "m.pt").startswith("m.pt: cannot be read: ")


def test_a_default_of_a_dict_is_left_out(tmp_path: Path, classes: ToolClasses) -> None:
    write_opcodes(
        tmp_path / "m.pt", PROTO + EMPTY_DICT + b"X\1\0\0\0d" + DEFAULT_DICT + KNOWN + b"\x85R" + b"K\1K\2s" + b"s" + STOP
    )
    faults: list[str] = []
    found = read_pickle(tmp_path / "m.pt", CLASSES, "", faults)["d"]
    assert (type(found), found) == (dict, {1: 2})


def test_absurd_sizes_are_not_believed(tmp_path: Path) -> None:
    """Of a tensor's shape, and of a storage that an archive does not have."""
    torch.save({"a": torch.zeros(4)}, tmp_path / "sound.pt")
    with zipfile.ZipFile(tmp_path / "sound.pt") as archive:
        opcodes = next(archive.read(info) for info in archive.infolist() if info.filename.endswith("data.pkl"))
    # The storage's number of values, and the shape.
    assert opcodes.count(b"K\x04") == 2
    pack_again(tmp_path / "sound.pt", tmp_path / "m.pt", opcodes.replace(b"K\x04", b"J\xff\xff\xff\x7f"))
    assert fault_of(tmp_path / "m.pt").startswith("m.pt: cannot be read: ")


def test_no_name_stays_allowed(tmp_path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    read(tmp_path / "m.pt", {"a": 1})
    assert set(torch.serialization.get_safe_globals()) == set(before)


SETTINGS: dict[str, Any] = {"a": 1, "b": [0.25, None, True], "c": {"d": "text", "e": {}}, "f": None}


def test_settings_in_any_form(tmp_path: Path, classes: ToolClasses) -> None:
    for stored in (SETTINGS, argparse.Namespace(**SETTINGS), classes.config(SETTINGS)):
        assert plain_settings(read(tmp_path / "m.pt", {"x": stored})["x"]) == SETTINGS


def test_settings_in_one_another(tmp_path: Path, classes: ToolClasses) -> None:
    config = classes.config({"inner": None})
    config._content["inner"]._val = argparse.Namespace(layers=6, more=classes.config([1, 2]))
    assert plain_settings(read(tmp_path / "m.pt", {"x": config})["x"]) == {"inner": {"layers": 6, "more": [1, 2]}}


def test_values_that_name_others(tmp_path: Path, classes: ToolClasses) -> None:
    config = {
        "task": {"length": 512, "again": "${model.length}"},
        "model": {"length": "${task.length}", "circle": "${model.circle}", "none": "${task.none}", "all": "${task}"},
        "missing": "???",
    }
    assert plain_settings(read(tmp_path / "m.pt", {"x": classes.config(config)})["x"]) == {
        "task": {"length": 512, "again": 512},
        "model": {"length": 512, "circle": "${model.circle}", "none": "${task.none}", "all": "${task}"},
    }


def test_objects_among_settings_equal_nothing(tmp_path: Path, classes: ToolClasses) -> None:
    stored = argparse.Namespace(known=classes.make("tool.Known", x=1), tensor=torch.ones(2), size=torch.Size([2]), text=b"x")
    settings = plain_settings(read(tmp_path / "m.pt", {"x": stored})["x"])
    assert settings is not None
    assert {name: repr(value) for name, value in settings.items()} == {
        "known": "<tool.Known>",
        "tensor": "<torch.Tensor>",
        "size": "(2,)",
        "text": "<builtins.bytes>",
    }
    assert settings["tensor"] not in (None, False, 0, "")


@pytest.mark.parametrize("stored", [None, 1, "text", [], torch.ones(1)], ids=str)
def test_what_is_no_settings(stored: Any) -> None:
    assert plain_settings(stored) is None


def test_settings_of_a_stand_in_without_a_dict(tmp_path: Path) -> None:
    found = read(tmp_path / "m.pt", {"x": Hostile(argparse.Namespace, (), [1])})
    assert plain_settings(found["x"]) == {}


def endless() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


def exponential() -> Any:
    value: Any = ["laugh"]
    for _ in range(12):
        value = [value] * 10
    return value


def deep() -> Any:
    value: Any = 0
    for _ in range(100):
        value = [value]
    return value


@pytest.mark.parametrize("make", [endless, exponential, deep])
def test_settings_without_end_are_refused(tmp_path: Path, make: Any) -> None:
    found = read(tmp_path / "m.pt", {"x": argparse.Namespace(a=make())})
    with pytest.raises(ValueError, match="holds settings of more than 100000 values, or nested"):
        plain_settings(found["x"])


def doubled(times: int) -> Any:
    value: Any = ()
    for _ in range(times):
        value = (value, value)
    return value


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_tuples_that_stand_for_exponentially_many_values_are_refused(tmp_path: Path, as_zip: bool) -> None:
    """As a key it would be hashed: this one within a moment, one of a few bytes more never."""
    fault = fault_of(tmp_path / "m.pt", {"x": {doubled(14): 1}}, as_zip=as_zip)
    assert fault == "m.pt: cannot be read: has a tuple of more than 10000 values; no model has"


@pytest.mark.parametrize(
    "opcodes",
    [
        # The same of all forms of tuples and names of objects, the last in a list.
        EMPTY_DICT + EMPTY_TUPLE + b"q\x01h\x01h\x01\x87" * 9 + b"K\1s",
        EMPTY_DICT + EMPTY_TUPLE + b"r\1\0\0\0(j\1\0\0\0j\1\0\0\0t\x86" * 14 + b"K\1s",
        EMPTY_DICT + b"(" + EMPTY_TUPLE + b"q\x01h\x01\x86" * 14 + b"K\1u",
        b"]" + EMPTY_TUPLE + b"\x85" * 10_000 + b"a",
    ],
    ids=["three", "marked", "items", "deep"],
)
def test_tuples_of_any_form_are_counted(tmp_path: Path, opcodes: bytes) -> None:
    write_opcodes(tmp_path / "m.pt", PROTO + opcodes + STOP)
    assert fault_of(tmp_path / "m.pt") == "m.pt: cannot be read: has a tuple of more than 10000 values; no model has"


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_tuples_that_a_tool_may_leave(tmp_path: Path, as_zip: bool) -> None:
    document = {"x": {doubled(6): list(range(20_000))}, "y": tuple(range(5000)), "z": [torch.ones(2, 3)] * 5000}
    found = read(tmp_path / "m.pt", document, as_zip=as_zip)
    assert (found["x"], found["y"], len(found["z"])) == (document["x"], document["y"], 5000)


def test_pickles_of_another_protocol(tmp_path: Path) -> None:
    """torch reads some; none of it is a traceback."""
    (tmp_path / "m.pt").write_bytes(pickle.dumps({"x": {1, 2}}, protocol=5))
    assert fault_of(tmp_path / "m.pt").startswith("m.pt: cannot be read: ")
