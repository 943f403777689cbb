"""Classes by the names that other projects' have, to pickle objects of: none of these projects is installed here.

The layouts are theirs: torchtext 0.4 (``Field``, ``Vocab``), OpenNMT-py 1 and 2 (``TextMultiField``), OmegaConf 2 (containers,
nodes and their metadata), fairseq's meters.
"""

from __future__ import annotations

import sys
import types
import typing
from collections import Counter, defaultdict
from functools import partial
from typing import Any

import pytest
import torch


class ToolClasses:
    """Makes classes and functions that can be pickled by any name, as long as a test runs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def make(self, path: str, **attributes: Any) -> Any:
        """An object of the class of this name, with these attributes, in this order."""
        made = self.named(path)()
        vars(made).update(attributes)
        return made

    def named(self, path: str, kind: Any = None) -> Any:
        """The class of this name, or ``kind`` under it."""
        module_name, _, name = path.rpartition(".")
        parts = module_name.split(".")
        for i in range(len(parts)):
            if (parent := ".".join(parts[: i + 1])) not in sys.modules:
                self._patch.setitem(sys.modules, parent, types.ModuleType(parent))
        module = sys.modules[module_name]
        if not hasattr(module, name):
            value = type(name, (), {}) if kind is None else kind
            value.__module__, value.__qualname__, value.__name__ = module_name, name, name
            self._patch.setattr(module, name, value, raising=False)
        return getattr(module, name)

    def vocab(self, tokens: list[str], **attributes: Any) -> Any:
        """torchtext's vocabulary."""
        # Before version 0.4 it was stored with its function.
        stoi = {token: i for i, token in enumerate(tokens)}
        freqs = Counter({token: 10 for token in tokens[4:]})
        return self.make(
            "torchtext.vocab.Vocab",
            **{"freqs": freqs, "itos": tokens, "unk_index": 0, "stoi": stoi, "vectors": None, **attributes},
        )

    def field(self, vocab: Any, **attributes: Any) -> Any:
        """torchtext's field of tokens, as OpenNMT-py makes one."""

        def tokenize(text: str) -> list[str]:
            raise AssertionError("nothing of a pickle is called")

        function = self.named("onmt.inputters.text_dataset._feature_tokenize", tokenize)
        cut = partial(function, layer=0, truncate=None, feat_delim=None)
        stated = {
            "sequential": True,
            "use_vocab": True,
            "init_token": None,
            "eos_token": None,
            "unk_token": "<unk>",
            "fix_length": None,
            "dtype": torch.int64,
            "preprocessing": None,
            "postprocessing": None,
            "lower": False,
            "tokenizer_args": (cut, "en"),
            "tokenize": cut,
            "include_lengths": True,
            "pad_token": "<blank>",
            "vocab": vocab,
        }
        return self.make("torchtext.data.field.Field", **{**stated, **attributes})

    def multi_field(self, name: str, *fields: Any) -> Any:
        """OpenNMT-py's field of tokens and their features."""
        stated: dict[str, Any] = {"preprocessing": None, "postprocessing": None, "is_target": False}
        named = [(name, fields[0]), *((f"{name}_feat_{i}", field) for i, field in enumerate(fields[1:]))]
        return self.make("onmt.inputters.text_dataset.TextMultiField", **stated, fields=named)

    def config(self, value: Any, parent: Any = None, key: Any = None) -> Any:
        """OmegaConf's form of plain values."""
        kinds = {bool: "Boolean", int: "Integer", float: "Float", str: "String"}
        metadata = {"ref_type": typing.Any, "object_type": type(value), "optional": True, "key": key, "flags": {"struct": True}}
        if not isinstance(value, dict | list):
            kind = f"omegaconf.nodes.{kinds.get(type(value), 'Any')}Node"
            its = self.make("omegaconf.base.Metadata", **metadata)
            return self.make(kind, _metadata=its, _parent=parent, _val=value)
        its = self.make(
            "omegaconf.base.ContainerMetadata",
            **metadata,
            resolver_cache=defaultdict(dict),
            key_type=typing.Any,
            element_type=typing.Any,
        )
        path = "omegaconf.dictconfig.DictConfig" if isinstance(value, dict) else "omegaconf.listconfig.ListConfig"
        made = self.make(path, _metadata=its, _parent=parent)
        made._content = (
            {name: self.config(inner, made, name) for name, inner in value.items()}
            if isinstance(value, dict)
            else [self.config(inner, made, i) for i, inner in enumerate(value)]
        )
        return made
