"""The floor of a benchmark: the same network with every BatchNorm simply left out."""

from __future__ import annotations

from pathlib import Path

import onnx

from bnfx.onnx_files.reading import read_onnx


def write_floor(f: Path, folder: Path) -> tuple[Path, int]:
    """Write `f` without its BatchNormalization nodes into `folder`: the file, and how many went.

    What read the result of a BatchNormalization reads its input instead. The outputs are wrong;
    the latency is the least that folding can reach.

    Raises:
        VerificationError: The file cannot be read.
    """
    model = read_onnx(f)
    onnx.load_external_data_for_model(model, str(f.parent))
    count = _drop(model.graph)
    count += sum(_drop_nodes(function.node, {*function.output}) for function in model.functions)
    written = folder / "floor.onnx"
    large = sum(len(t.raw_data) for t in model.graph.initializer) > 1_500_000_000
    onnx.save(model, str(written), save_as_external_data=large, location="floor.data")
    return written, count


def _drop(graph: onnx.GraphProto) -> int:
    count = _drop_nodes(graph.node, {value.name for value in graph.output})
    inner = [a for node in graph.node for a in node.attribute]
    return count + sum(_drop(g) for a in inner for g in (a.g, *a.graphs) if g.node)


def _drop_nodes(nodes: list[onnx.NodeProto], outputs: set[str]) -> int:
    """Of one graph: an output of the graph keeps its name by an Identity."""
    instead: dict[str, str] = {}
    kept = []
    count = 0
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = instead.get(name, name)
        if node.op_type != "BatchNormalization":
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
            continue
        count += 1
        instead[node.output[0]] = node.input[0]
        if node.output[0] in outputs:
            kept.append(onnx.helper.make_node("Identity", [node.input[0]], [node.output[0]]))
    del nodes[:]
    nodes.extend(kept)
    return count
