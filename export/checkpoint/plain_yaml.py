"""YAML as Marian writes it: one mapping of text to text, or to lists of text.

Knows how to read it without believing a hostile file's aliases and depth; does not know what is in it.
"""

from __future__ import annotations

import yaml

_MAX_DEPTH = 8


def read_yaml(contents: bytes) -> dict[str, str | list[str] | None]:
    """A YAML mapping of text to text, or to a list of text; deeper values become None.

    Values stay text: a vocabulary has tokens like ``yes`` and ``1.5``, which YAML takes for something else. Read as events, so
    that aliases and depth of a hostile file cost nothing.

    Raises:
        ValueError: it is no such mapping.
    """
    found: dict[str, str | list[str] | None] = {}
    key: str | None = None
    items: list[str] | None = None
    # Of the values inside the mapping: 0 at its keys and plain values.
    depth = -1
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        for event in yaml.parse(contents, Loader=loader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("has aliases, which are not supported")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth == 0 and not isinstance(event, yaml.MappingStartEvent):
                    raise ValueError("is no YAML mapping")
                if depth > 0 and key is None:
                    raise ValueError("has a key that is no text")
                # To read on takes a time that grows with the square of the depth.
                if depth > _MAX_DEPTH:
                    raise ValueError("is nested too deeply")
                items = [] if depth == 1 and isinstance(event, yaml.SequenceStartEvent) else None
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
                if depth == 0:
                    assert key is not None
                    found[key], key, items = items, None, None
            elif isinstance(event, yaml.ScalarEvent):
                if depth < 0:
                    raise ValueError("is no YAML mapping")
                if depth == 1 and items is not None:
                    items.append(event.value)
                elif depth == 0 and key is None:
                    key = event.value
                    if key in found:
                        raise ValueError(f"has {key!r} twice")
                elif depth == 0:
                    assert key is not None
                    found[key] = "" if event.implicit[0] and event.value in ("~", "null") else event.value
                    key = None
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())}") from error
    return found
