"""Ragged cross-attention in a traced decoder: real operators in place of ``attention.RAGGED_CROSS_ATTENTION``.

Knows the ONNX graph and one operator, GroupQueryAttention: it reads each source's keys and values up to the source's own length,
and lets several query heads share them. The hypotheses of a source are such heads: W hypotheses of h heads are W * h query
heads over h heads of keys. How many query heads there are is an attribute, not an input, so a graph for all widths has a branch
for each; a branch is that operator and the products stay outside. It costs some 30 us a layer where weights went through the
caches before it.

A graph for rows that each have keys and values of their own, copies where they are of one source, needs no branch.

Does not know the model, quantization or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.attention import (
    CONTRIB_DOMAIN,
    GROUP_QUERY_ATTENTION,
    NUM_UNUSED_INPUTS,
    RAGGED_CROSS_ATTENTION,
    RAGGED_DOMAIN,
    quantized_cache_attributes,
)

# Decided first, in this order, because each decision costs time in each layer: greedy search, and the usual beams.
_POPULAR = (1, 4, 5, 2)


def expand_cross_attention(model: ModelProto, *, target_ids: str, head_dim: int, max_width: int) -> None:
    """Replace, in place, each stand-in by branches for the widths 1 to ``max_width``.

    Args:
        model: a traced decoder.
        target_ids: the input [B, W] that tells the width.
        head_dim: width of one head.
        max_width: a wider step fails; at least 2.

    Raises:
        ValueError: max_width is less than 2.
    """
    if max_width < 2:
        raise ValueError(f"max_width must be at least 2, not {max_width}")
    builder = _Builder(target_ids, head_dim, max_width)
    _replace(model, builder.branches, first=builder.shared.nodes)
    model.graph.initializer.extend(builder.shared.constants.values())


def attend_by_row(model: ModelProto) -> None:
    """Replace, in place, each stand-in by the operator: a decoder for width 1 alone."""
    _replace(model, lambda node: _attention(node, 1, node.input[0], node.output))


def _replace(model: ModelProto, replacement: Callable[[NodeProto], NodeProto], first: Sequence[NodeProto] = ()) -> None:
    """Put another node in the place of each stand-in, and some before all nodes."""
    nodes = [
        replacement(node) if (node.domain, node.op_type) == (RAGGED_DOMAIN, RAGGED_CROSS_ATTENTION) else node
        for node in model.graph.node
    ]
    del model.graph.node[:]
    model.graph.node.extend([*first, *nodes])
    kept = [opset for opset in model.opset_import if opset.domain not in (RAGGED_DOMAIN, CONTRIB_DOMAIN)]
    del model.opset_import[:]
    model.opset_import.extend([*kept, helper.make_opsetid(CONTRIB_DOMAIN, 1)])


def _attention(node: NodeProto, width: int, query: str, outputs: Sequence[str]) -> NodeProto:
    """GroupQueryAttention in a stand-in's place, whose query has ``width`` hypotheses within its heads [B, 1, h * W * d]."""
    _, no_keys, key, value, last, longest = node.input[:6]
    scales = _scales(node)
    heads = _num_heads(node)
    attend = helper.make_node(
        GROUP_QUERY_ATTENTION,
        [query, no_keys, no_keys, key, value, last, longest, *([""] * NUM_UNUSED_INPUTS if scales else []), *scales],
        outputs,
        name=f"ragged.{node.output[0]}.w{width}.attend",
        domain=CONTRIB_DOMAIN,
        num_heads=width * heads,
        kv_num_heads=heads,
    )
    attend.attribute.extend(helper.make_attribute(*pair) for pair in quantized_cache_attributes(bool(scales)).items())
    return attend


class _Body:
    """A graph that is being made: its nodes, and constants of its own.

    A branch is handed whatever it reads from outside in every step, one value after another, and so is the branch around it;
    what is its own costs nothing.
    """

    def __init__(self, name: str) -> None:
        """An empty graph."""
        self.name = name
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def constant(self, value: int | list[int]) -> str:
        """The name of an int64 constant."""
        name = f"{self.name}.{value}"
        self.constants.setdefault(name, numpy_helper.from_array(np.array(value, np.int64), name))
        return name

    def compare(self, operator: str, width: int, output: str) -> None:
        """The step's width against this one."""
        self.nodes.append(helper.make_node(operator, ["ragged.width", self.constant(width)], [output]))


class _Builder:
    """Makes the branches, and what they share."""

    def __init__(self, target_ids: str, head_dim: int, max_width: int) -> None:
        self._head_dim = head_dim
        self._popular = [width for width in _POPULAR if width < max_width]
        self._others = [width for width in range(1, max_width + 1) if width not in self._popular]
        self.shared = _Body("ragged.width")
        self.shared.nodes = [
            helper.make_node("Shape", [target_ids], ["ragged.width_1d"], start=1, end=2),
            helper.make_node("Squeeze", ["ragged.width_1d"], ["ragged.width"]),
        ]
        # The others are compared in the branches, where it comes to that: greedy search and the usual beams do without.
        for width in self._popular:
            self.shared.compare("Equal", width, f"ragged.is.{width}")

    def branches(self, node: NodeProto) -> NodeProto:
        """What stands for one stand-in: the popular widths one after another, then the others by halving."""
        assert self._popular, "a comparison would have to be beside the node"
        return self._decision(node, _Body(f"ragged.{node.output[0]}"), list(node.output), self._popular, self._others)

    def _decision(self, node: NodeProto, body: _Body, outputs: list[str], popular: list[int], others: list[int]) -> NodeProto:
        """Choose between two widths at least; the comparison that it may take is added to ``body``, where it is to be."""
        if popular:
            condition = f"ragged.is.{popular[0]}"
            then, otherwise = self._choice(node, body.name, popular[:1], []), self._choice(node, body.name, popular[1:], others)
        else:
            low, high = others[: len(others) // 2], others[len(others) // 2 :]
            condition = f"{body.name}.up_to.{low[-1]}"
            body.compare("LessOrEqual", low[-1], condition)
            then, otherwise = self._choice(node, body.name, [], low), self._choice(node, body.name, [], high)
        return helper.make_node("If", [condition], outputs, name=body.name, then_branch=then, else_branch=otherwise)

    def _choice(self, node: NodeProto, name: str, popular: list[int], others: list[int]) -> GraphProto:
        """A graph for these widths."""
        widths = [*popular, *others]
        if len(widths) == 1:
            return self._leaf(node, widths[0])
        body = _Body(f"{name}.{len(popular)}_{others[0]}_{others[-1]}")
        outputs = [f"{body.name}.{i}" for i in range(3)]
        body.nodes.append(self._decision(node, body, outputs, popular, others))
        return self._graph(node, body, outputs)

    def _leaf(self, node: NodeProto, width: int) -> GraphProto:
        """The operator for one width; hypotheses move from beside the heads [B, W, h, d] to within them [B, h, W, d]."""
        body = _Body(f"ragged.{node.output[0]}.w{width}")
        name, query = body.name, node.input[0]
        outputs = [f"{name}.{i}" for i in range(3)]
        if width == 1:
            body.nodes.append(_attention(node, 1, query, outputs))
            return self._graph(node, body, outputs)
        d, w, heads = self._head_dim, width, _num_heads(node)
        grouped_query, grouped = f"{name}.query", f"{name}.grouped"
        body.nodes += self._swap(body, query, grouped_query, f"{name}.in", [0, w, heads, d], [0, 1, heads * w * d])
        body.nodes.append(_attention(node, w, grouped_query, [grouped, *outputs[1:]]))
        body.nodes += self._swap(body, grouped, outputs[0], f"{name}.out", [0, heads, w, d], [0, w, heads * d])
        return self._graph(node, body, outputs)

    @staticmethod
    def _swap(body: _Body, source: str, target: str, name: str, split: list[int], merged: list[int]) -> list[NodeProto]:
        """Exchange the two middle axes of ``split``; 0 keeps the first."""
        return [
            helper.make_node("Reshape", [source, body.constant(split)], [f"{name}.split"]),
            helper.make_node("Transpose", [f"{name}.split"], [f"{name}.swapped"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"{name}.swapped", body.constant(merged)], [target]),
        ]

    @staticmethod
    def _graph(node: NodeProto, body: _Body, outputs: list[str]) -> GraphProto:
        cache_type = TensorProto.INT8 if _scales(node) else TensorProto.FLOAT
        types = (TensorProto.FLOAT, cache_type, cache_type)
        return helper.make_graph(
            body.nodes,
            body.name,
            [],
            [helper.make_tensor_value_info(output, kind, None) for output, kind in zip(outputs, types, strict=True)],
            list(body.constants.values()),
        )


def _num_heads(node: NodeProto) -> int:
    heads: int = next(attribute.i for attribute in node.attribute if attribute.name == "num_heads")
    return heads


def _scales(node: NodeProto) -> list[str]:
    """Of int8 caches; none of floating-point ones."""
    return list(node.input[6:])
