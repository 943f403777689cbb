"""Stand-ins for the classes that a tool leaves in its pickles, and plain settings out of them.

A checkpoint of fairseq or OpenNMT-py has more than tensors: settings are an ``argparse.Namespace`` or OmegaConf's containers, a
vocabulary is an object of torchtext. To load these classes would be to run their code, and code that a pickle chooses. None is
loaded: beside tensors and plain values ``torch.load(weights_only=True)`` makes only what it is told to, and it is told to make a
``StandIn`` wherever the file says one of a short list of names. Knows how to load so and how to read settings from what was
loaded; does not know which names a tool has (``fairseq_config.py``, ``opennmt_py_vocabulary.py``).

**Why this is safe.** A pickle can do three things with a name that is allowed: call it, make an object of it, and give that
object a state. With a stand-in, each only stores what it was given, in two attributes that nothing here calls, compares or
iterates over before its type was checked. So a name gives a file no power, whatever it means elsewhere (``builtins.getattr``
would be as harmless), and the lists are short so that one that is not on them is told to the user by its name. What is stored may
still be odd: of any type, containing itself, or standing for exponentially many values. Tuples that do, which torch would hash,
are refused before (``pickles.py``). ``plain_settings`` copies the rest with bounds on depth and number; whoever reads
anything else checks its types first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch

# Classes that any tool's settings and counters may need.
COMMON_CLASSES = (
    "argparse.Namespace",
    # NumPy's numbers and arrays.
    *(f"numpy.{module}.multiarray.{function}" for module in ("core", "_core") for function in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
)
NAMESPACE = "argparse.Namespace"
_DICT_CONFIG, _LIST_CONFIG = "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"
OMEGACONF_CLASSES = (
    _DICT_CONFIG,
    _LIST_CONFIG,
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Boolean", "Float", "Integer", "String")),
    # What its metadata say of types.
    *(f"typing.{name}" for name in ("Any", "Dict", "List", "Optional", "Tuple", "Union")),
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple", "type")),
    "_operator.getitem",
)
# Without its function, which is called for what is missing.
_DEFAULT_DICT = "collections.defaultdict"

# Real settings have some hundreds of values, a few levels deep.
_MAX_VALUES = 100_000
_MAX_DEPTH = 16
# OmegaConf's name of a value that is elsewhere, and its mark of one that is not there.
_INTERPOLATION = re.compile(r"\$\{([\w.]+)\}")
_MISSING = "???"


class StandIn:
    """What a pickle has in place of an object: what it was made of, and its state. Does nothing."""

    __slots__ = ("arguments", "state")

    # Of the class or function that it stands for.
    name = ""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Self:
        """An object that holds its arguments."""
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __init__(self, *arguments: Any) -> None:
        """What ``__new__`` stored: the one is called alone where a pickle makes an object, both where it calls the class."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        # Not what it holds, which may be endless.
        return f"<{self.name}>"


def stand_ins(names: Iterable[str]) -> torch.serialization.safe_globals:
    """A context in which ``torch.load(weights_only=True)`` makes stand-ins for objects of these classes, and for no others."""
    pairs: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(_class_for(name), name) for name in names]
    # Items are put into it, which torch does with nothing but dicts.
    return torch.serialization.safe_globals([*pairs, (lambda *arguments: {}, _DEFAULT_DICT)])


def _class_for(name: str) -> type[StandIn]:
    return type("StandIn", (StandIn,), {"__slots__": (), "name": name})


def is_stand_in(value: Any, *names: str) -> bool:
    """Whether a value is a stand-in for one of these classes."""
    return isinstance(value, StandIn) and value.name in names


def attribute(value: StandIn, name: str) -> Any:
    """An attribute of what it stands for, of any type; None when it has none of that name."""
    return value.state.get(name) if isinstance(value.state, dict) else None


def is_empty(value: Any) -> bool:
    """Whether a value is a list or dict of nothing; to ask any value itself may go wrong."""
    return isinstance(value, list | dict) and not value


def plain_settings(stored: Any) -> dict[str, Any] | None:
    """Settings as dicts, lists, tuples, text, numbers and None; None when they are no settings.

    They may be a dict, an ``argparse.Namespace`` or an OmegaConf container, one inside the other. A value of OmegaConf's that
    only names another is that other. Any other object is a stand-in, which equals nothing and says of what class it is.

    Raises:
        ValueError: there are more of them, or they are nested deeper, than settings are.
    """
    settings = _Copy().of(stored, 0)
    if not isinstance(settings, dict):
        return None
    return {name: _resolved(value, settings, 0) for name, value in settings.items()}


class _Copy:
    """Copies values and counts them: an object that is there many times is as many values."""

    def __init__(self) -> None:
        self._count = 0

    def of(self, value: Any, depth: int) -> Any:
        self._count += 1
        if self._count > _MAX_VALUES or depth > _MAX_DEPTH:
            raise ValueError(f"holds settings of more than {_MAX_VALUES} values, or nested in each other")
        if is_stand_in(value, NAMESPACE):
            return self._dict(value.state, depth) if isinstance(value.state, dict) else {}
        if is_stand_in(value, _DICT_CONFIG, _LIST_CONFIG) or _is_node(value):
            # A container's values; they are text where the container is elsewhere, and None where it is none.
            return self.of(attribute(value, "_val" if _is_node(value) else "_content"), depth + 1)
        if isinstance(value, dict):
            return self._dict(value, depth)
        if isinstance(value, list | tuple):
            items = [self.of(item, depth + 1) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        if value is None or type(value) in (bool, int, float, str):
            return value
        return value if isinstance(value, StandIn) else _other(value)

    def _dict(self, values: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        copied = {name: self.of(value, depth + 1) for name, value in values.items() if isinstance(name, str)}
        return {name: value for name, value in copied.items() if value != _MISSING}


def _is_node(value: Any) -> bool:
    return isinstance(value, StandIn) and value.name.startswith("omegaconf.nodes.")


def _other(value: Any) -> StandIn:
    kind = type(value)
    return _class_for(f"{kind.__module__}.{kind.__qualname__}")()


def _resolved(value: Any, root: Mapping[str, Any], depth: int) -> Any:
    """A value without names of others; one that leads nowhere, or round in a circle, stays a name."""
    if isinstance(value, dict):
        return {name: _resolved(inner, root, depth) for name, inner in value.items()}
    if depth < _MAX_DEPTH and isinstance(value, str) and (named := _INTERPOLATION.fullmatch(value)):
        found: Any = root
        for part in named[1].split("."):
            found = found.get(part) if isinstance(found, dict) else None
        # Only plain values: settings inside of settings could grow without end.
        if found is not None and not isinstance(found, dict | list | tuple):
            return _resolved(found, root, depth + 1)
    return value
