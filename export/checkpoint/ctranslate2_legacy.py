"""CTranslate2's models of the first two revisions of its specification: what later ones state, or name otherwise.

Revision 1 names variables as OpenNMT-tf does; CTranslate2 renames them while it loads them, by the same replacements
(``src/models/transformer.cc``, 4.8). Before revision 3 no file says how many heads there are: that follows from the name of the
specification. Does not know what the variables mean (``ctranslate2_weights.py``).
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from export.checkpoint.ctranslate2_binary import ModelBinary

LEGACY_REVISIONS = range(1, 3)
# Specification -> heads; the first files have no specification, and are of a base model.
LEGACY_HEADS = MappingProxyType({"": 8, "TransformerBase": 8, "TransformerBig": 16})

_OPENNMT_TF_REVISION = 1
# Each is replaced where it comes first, in this order.
_NAMES = (
    ("transformer/", ""),
    (":0", ""),
    ("w_embs", "embeddings/weight"),
    ("kernel", "weight"),
    ("LayerNorm", "layer_norm"),
    ("dense", "projection"),
    ("conv1d_", "linear_"),
    ("conv1d", "linear_0"),
)
_ENCODER_NAMES = (("multi_head", "self_attention"),)
_OTHER_NAMES = (("masked_multi_head", "self_attention"), ("multi_head", "attention"))


def renamed(model: ModelBinary) -> ModelBinary:
    """The same model with the names of later revisions.

    Raises:
        ValueError: two variables get the same name.
    """
    if model.spec not in LEGACY_HEADS or model.spec_revision != _OPENNMT_TF_REVISION:
        return model
    names = {name: _later_name(name) for name in model.names}
    if len({*names.values()}) < len(names):
        raise ValueError("two variables are the same one by the names of OpenNMT-tf")
    return replace(
        model,
        variables={names[name]: variable for name, variable in model.variables.items()},
        aliases={names[alias]: names[name] for alias, name in model.aliases.items()},
    )


def _later_name(name: str) -> str:
    for theirs, ours in (*_NAMES, *(_ENCODER_NAMES if "encoder" in name else _OTHER_NAMES)):
        name = name.replace(theirs, ours, 1)
    return name
