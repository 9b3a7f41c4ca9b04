"""Fuses self-attention in exported ONNX graphs into kernels of onnxruntime.

The products of queries, keys and values with their softmax become MultiHeadAttention, which works on tiles that fit
into the cache (FlashAttention), and rotary positions become RotaryEmbedding; the transposes around them go. Both
operators are of the domain com.microsoft, so such graphs run in onnxruntime only. Attention of another form, such as
with a mask or a bias, stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

DOMAIN = "com.microsoft"
FIRST = "first_position"
"""Name of the constant 0, the position of the first frame."""
HEADS_TO_FRONT = [2, 0, 3, 1, 4]
"""Axes of (B, F, 3, H, C) as (3, B, H, F, C)."""


@dataclass(frozen=True)
class _Graph:
    """Nodes by what they make and by what they read, constants, and shapes with 0 for a size that varies."""

    made: Mapping[str, Any]
    read: Mapping[str, list[Any]]
    constants: Mapping[str, Any]
    shapes: Mapping[str, list[int]]

    @classmethod
    def of(cls, graph: Any) -> _Graph:
        """Returns the indexes of a GraphProto."""
        from onnx import numpy_helper

        read: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                read.setdefault(name, []).append(node)
        return cls(
            {name: node for node in graph.node for name in node.output},
            read,
            {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) <= 1},
            {one.name: [dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in graph.value_info},
        )

    def maker(self, name: str, *kinds: str) -> Any:
        """Returns the node that makes a tensor. Raises LookupError unless it is of one of these types."""
        node = self.made[name]
        if node.op_type not in kinds:
            raise LookupError(name)
        return node

    def reader(self, name: str, kind: str) -> Any:
        """Returns the only node that reads a tensor. Raises LookupError where there are others, or of another type."""
        readers = self.read[name]
        if len(readers) != 1 or readers[0].op_type != kind:
            raise LookupError(name)
        return readers[0]


@dataclass(frozen=True)
class _Part:
    """Queries, keys or values.  packed: (B, F, 3·H·C) they are a third of.  place: which.  rotary: cosines, sines."""

    packed: str
    place: int
    heads: int
    rotary: tuple[str, str] | None = None


def fuse_attention(model: Any) -> int:
    """Replaces each self-attention that it knows; returns how many.

    Args:
        model: the ModelProto of `auricle export --to onnx`, modified in place.
    """
    from onnx import NodeProto, helper, numpy_helper

    graph = model.graph
    index, replaced = _Graph.of(graph), dict[str, list[Any]]()
    for node in graph.node:
        if node.op_type == "Softmax":
            try:
                output, nodes = _fused(index, node, f"attention_{len(replaced)}")
            except (LookupError, ValueError):
                continue
            replaced[output] = nodes
    if not replaced:
        return 0
    nodes = [one for node in graph.node for one in replaced.get(node.output[0], [node])]
    needed, kept = {output.name for output in graph.output}, list[bytes]()
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node.SerializeToString())
    del graph.node[:]
    graph.node.extend(NodeProto.FromString(node) for node in reversed(kept))
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), FIRST))
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return len(replaced)


def _fused(graph: _Graph, softmax: Any, name: str) -> tuple[str, list[Any]]:
    """Returns the output of the attention around a softmax, (B, F, H·C), and the nodes that make it.

    Raises:
        LookupError, ValueError: it has another form.
    """
    from onnx import helper

    scores = graph.maker(softmax.input[0], "MatMul")
    mixed = graph.reader(softmax.output[0], "MatMul")
    merged = graph.reader(graph.reader(mixed.output[0], "Transpose").output[0], "Reshape")
    (query, scale), (key, other) = (_scaled(graph, name) for name in scores.input)
    while (node := graph.maker(key, "Reshape", "Transpose", "Squeeze", "Concat")).op_type in ("Reshape", "Transpose"):
        key = node.input[0]
    parts = [_part(graph, name) for name in (query, key, mixed.input[1])]
    packed, heads, rotary = parts[0].packed, parts[0].heads, parts[0].rotary
    wanted = [_Part(packed, place, heads, rotary if place < 2 else None) for place in range(3)]
    if parts != wanted:
        raise ValueError(name)
    split = [f"{name}_{part}" for part in ("queries", "keys", "values")]
    nodes, given = [helper.make_node("Split", [packed], split, f"{name}_split", axis=2, num_outputs=3)], list(split)
    for place in range(2 if rotary else 0):
        given[place] = f"{split[place]}_rotated"
        nodes.append(
            helper.make_node(
                "RotaryEmbedding", [split[place], FIRST, *(rotary or ())], [given[place]], f"{split[place]}_rotation",
                domain=DOMAIN, num_heads=heads,
            )
        )  # fmt: skip
    settings = {"num_heads": heads, "scale": scale * other}
    nodes.append(helper.make_node("MultiHeadAttention", given, [merged.output[0]], name, domain=DOMAIN, **settings))
    return merged.output[0], nodes


def _scaled(graph: _Graph, name: str) -> tuple[str, float]:
    """Returns the factors of a product of a tensor and a constant."""
    node = graph.maker(name, "Mul")
    return node.input[0], float(graph.constants[node.input[1]].item())


def _part(graph: _Graph, name: str) -> _Part:
    """Returns where queries, keys or values, (B, H, F, C), come from."""
    node = graph.maker(name, "Squeeze", "Concat")
    if node.op_type == "Squeeze":
        chosen = graph.maker(node.input[0], "Slice")
        turned = graph.maker(chosen.input[0], "Transpose")
        order = next(list(one.ints) for one in turned.attribute if one.name == "perm")
        three, _, heads, _, width = graph.shapes[turned.output[0]]
        if order != HEADS_TO_FRONT or three != 3 or not heads or width % 8:
            raise ValueError(name)
        packed = graph.maker(turned.input[0], "Reshape").input[0]
        return _Part(packed, int(graph.constants[chosen.input[1]].item()), heads)
    left, right = (graph.maker(half, kind) for half, kind in zip(node.input, ("Sub", "Add"), strict=True))
    (first, cosines), (second, sines) = (graph.maker(one, "Mul").input for one in left.input)
    crossed = [tuple(graph.maker(one, "Mul").input) for one in right.input]
    halves = graph.maker(first, "Split")
    if crossed != [(second, cosines), (first, sines)] or list(halves.output) != [first, second]:
        raise ValueError(name)
    whole = _part(graph, halves.input[0])
    return _Part(whole.packed, whole.place, whole.heads, (cosines, sines))
