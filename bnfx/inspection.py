"""What an ONNX file holds, whoever wrote it: every BatchNormalization, and the rest in numbers."""

from __future__ import annotations

import ast
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from rich.console import RenderableType

from bnfx.onnx_files.reading import (
    VERSION,
    Located,
    describe_type,
    external_location,
    graphs_of,
    located_nodes,
    metadata_of,
    opset_of,
    read_onnx,
)
from bnfx.reports.document import Headline
from bnfx.reports.report import Report, table

_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class BatchNormNode:
    """A BatchNormalization node of a file."""

    #: Its name in the file.
    node: str
    #: "graph", a path through subgraphs such as "graph/if_1/then_branch", or a function.
    where: str
    #: Module path of the source, by the name of the running mean or by what torch's exporter wrote
    #: down; "" where neither tells.
    module: str
    #: None where its scale is not a constant of known size.
    channels: int | None
    epsilon: float
    #: Whether it normalises with batch statistics.
    training_mode: bool
    #: Names of the value that it normalises, and of its result.
    input: str
    output: str


@dataclass(frozen=True)
class ExternalFile:
    """A file of weights beside the graph."""

    #: As the graph writes it.
    location: str
    #: Number of initialisers in it.
    tensors: int
    #: Bytes of the file; None if it is missing.
    size: int | None
    #: Bytes that the graph reads up to.
    needed: int


@dataclass(frozen=True)
class InspectReport(Report):
    """What a file holds."""

    heading = "BatchNorms"
    path: str
    #: Bytes, external data not counted.
    size: int
    #: Who wrote it, in its own words.
    producer: str
    #: Version of bnfx that the file says it was written by; "" if it says nothing.
    by_bnfx: str
    #: Version of the ONNX format.
    ir_version: int
    #: Version of the standard operator set.
    opset: int
    #: Domain -> version of every operator set.
    opsets: Mapping[str, int]
    #: Name -> "dtype[shape]".
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    #: Operator type -> number of nodes, functions and subgraphs included.
    operators: Mapping[str, int]
    #: Every BatchNormalization, in order.
    batch_norms: tuple[BatchNormNode, ...]
    #: Number of stored weights, those of subgraphs included, and of their elements.
    initializers: int
    parameters: int
    #: Files of weights beside the graph.
    external_data: tuple[ExternalFile, ...]
    #: Names of the model's own functions.
    functions: tuple[str, ...]
    metadata: Mapping[str, str]

    def headline(self) -> Headline:
        """How many BatchNormalization nodes there are."""
        facts = (
            ("opset", str(self.opset)),
            ("nodes", str(sum(self.operators.values()))),
            ("elements in weights", f"{self.parameters:,}"),
            ("written by", f"bnfx {self.by_bnfx}" if self.by_bnfx else self.producer or "-"),
        )
        count = len(self.batch_norms) or "no"
        verdict = (
            f"{self.path} holds {count} BatchNormalization {'node' if count == 1 else 'nodes'}."
        )
        return Headline(f"bnfx: ONNX file {self.path}", "neutral", verdict, facts)

    def __rich__(self) -> RenderableType:
        rows = [
            (
                *(bn.node or bn.output, bn.module or "-", bn.where, bn.channels or "?"),
                *(f"{bn.epsilon:.3g}", "training" if bn.training_mode else "inference"),
            )
            for bn in self.batch_norms
        ]
        author = f"bnfx {self.by_bnfx}" if self.by_bnfx else self.producer or "unknown"
        values = [f"{name}: {kind}" for name, kind in self.inputs.items()]
        results = [f"{name}: {kind}" for name, kind in self.outputs.items()]
        title = (
            f"{self.path}: written by {author}, opset {self.opset}, "
            f"{sum(self.operators.values())} nodes, {self.initializers} initialisers with "
            f"{self.parameters:,} elements\n"
            f"in  {', '.join(values)}\nout {', '.join(results)}"
        )
        title += "".join(
            f"\nexternal data {file.location}: "
            + ("missing" if file.size is None else f"{file.size:,} bytes")
            for file in self.external_data
        )
        columns = ("BatchNormalization", "module", "in", "channels", "epsilon", "mode")
        return table(title, columns if rows else (), rows)


def inspect_onnx(f: str | os.PathLike[str]) -> InspectReport:
    """List every BatchNormalization of an ONNX file, and what else is in it. Weights stay unread.

    Args:
        f: An ONNX file, written by anyone.

    Raises:
        VerificationError: There is no such file, or it holds no readable ONNX graph.
    """
    path = Path(f)
    model = read_onnx(path)
    nodes = list(located_nodes(model))
    graphs = [graph for graph, _ in graphs_of(model)]
    tensors = {tensor.name: tensor for graph in graphs for tensor in graph.initializer}
    stored = [tensor for graph in graphs for tensor in graph.initializer]
    initial = {tensor.name for tensor in model.graph.initializer}
    metadata = metadata_of(model)
    return InspectReport(
        path=str(path),
        size=path.stat().st_size,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        by_bnfx=metadata.get(VERSION, ""),
        ir_version=model.ir_version,
        opset=opset_of(model),
        opsets={e.domain or "ai.onnx": e.version for e in model.opset_import},
        inputs={v.name: describe_type(v) for v in model.graph.input if v.name not in initial},
        outputs={v.name: describe_type(v) for v in model.graph.output},
        operators=dict(sorted(Counter(found.node.op_type for found in nodes).items())),
        batch_norms=tuple(
            _batch_norm(found, tensors)
            for found in nodes
            if found.node.op_type == "BatchNormalization"
        ),
        initializers=len(stored),
        parameters=sum(math.prod(tensor.dims) for tensor in stored),
        external_data=_external_files(stored, path),
        functions=tuple(f"{e.domain}:{e.name}" for e in model.functions),
        metadata=metadata,
    )


def module_path(node: onnx.NodeProto) -> str:
    """Module path that torch's exporter wrote on a node; "" if it did not."""
    scopes = metadata_of(node).get(_SCOPES, "")
    try:
        names = ast.literal_eval(scopes) if scopes else []
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ""
    return next((name for name in reversed(names[:-1]) if name), "")


def _batch_norm(found: Located, tensors: Mapping[str, onnx.TensorProto]) -> BatchNormNode:
    node = found.node
    settings = {attribute.name: attribute for attribute in node.attribute}
    scale = tensors.get(node.input[1]) if len(node.input) > 1 else None
    return BatchNormNode(
        node=node.name,
        where=found.where,
        module=_owner(node) or module_path(node),
        channels=math.prod(scale.dims) if scale is not None else None,
        epsilon=settings["epsilon"].f if "epsilon" in settings else 1e-5,
        training_mode="training_mode" in settings and settings["training_mode"].i != 0,
        input=node.input[0] if node.input else "",
        output=node.output[0] if node.output else "",
    )


def _owner(node: onnx.NodeProto) -> str:
    """The module by the name of its running mean, which exporters keep; "" if it does not fit."""
    name = node.input[3] if len(node.input) > 3 else ""
    return name.removesuffix(".running_mean") if name.endswith(".running_mean") else ""


def _external_files(tensors: list[onnx.TensorProto], path: Path) -> tuple[ExternalFile, ...]:
    needed: dict[str, int] = {}
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location, offset, length = external_location(tensor)
        end = offset + (length or 0)
        needed[location] = max(needed.get(location, 0), end)
        counts[location] += 1
    return tuple(
        ExternalFile(location, counts[location], _size(path.parent / location), end)
        for location, end in needed.items()
    )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
