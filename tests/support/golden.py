"""Golden text of passes: a network before and after, and what the records say.

A graph is a line for each value. The tensors that it reads follow, with their values where these
are few; behind the graph after, only those that are new or changed. `pytest --update-golden`
writes the files anew: look at the diff, it says what a change does to each pass.
"""

from __future__ import annotations

import copy
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import bnfx
from tests.support.laws import assert_close, assert_same_state

FOLDER = Path(__file__).parent.parent / "passes" / "golden"

#: Values that are printed one by one; of a larger tensor only the shape is.
_FEW = 8
_CONV = "input weight bias stride padding dilation groups"
_TRANSPOSED = "input weight bias stride padding output_padding groups dilation"
#: Operators that are written in C tell no signature.
_SIGNATURES = {
    **{f"conv{n}d": _CONV for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _TRANSPOSED for n in (1, 2, 3)},
    "linear": "input weight bias",
}
_USUAL = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1, "bias": None}
#: What modules say of themselves though it is as always.
_USUAL_TOLD = re.compile(
    r", (momentum=0\.1|affine=True|track_running_stats=True|bias=True|stride=\(1,( 1)*\))"
)


@dataclass(frozen=True)
class Golden:
    """The golden text of one test, and the laws that hold for it.

    Attributes:
        path: The file.
        update: Whether to write it instead.
    """

    path: Path
    update: bool

    def fold(self, model: nn.Module, *inputs: Tensor, given: bool = False, **options: Any) -> None:
        """`fold_bn` of a model; on `inputs` the result computes the same, and the source stays."""
        before = copy.deepcopy(model.state_dict())
        folded = bnfx.fold_bn(model, copy.deepcopy(inputs) if given else None, **options)
        if inputs:
            assert_close(copy.deepcopy(model), folded, [*inputs])
        assert_same_state(model.state_dict(), before)
        self.compare(model, folded, before, fold_records(folded))

    def insert(
        self, model: nn.Module, *inputs: Tensor, given: bool = False, **options: Any
    ) -> None:
        """`insert_bn` of a model; where it puts identities, eval outputs stay."""
        before = copy.deepcopy(model.state_dict())
        options = {"init": "identity", "form": "graph"} | options
        done = bnfx.insert_bn(model, copy.deepcopy(inputs) if given else None, **options)
        if inputs and options["init"] == "identity":
            assert_close(copy.deepcopy(model).eval(), copy.deepcopy(done).eval(), [*inputs])
        assert_same_state(model.state_dict(), before)
        self.compare(model, done, before, insert_records(done))

    def apply(self, edit: Any, model: nn.Module, *inputs: Tensor, given: bool = False) -> None:
        """`apply_pass` of a pass that edits a model to be trained."""
        before = copy.deepcopy(model.state_dict())
        done = bnfx.apply_pass(edit, model, copy.deepcopy(inputs) if given else None)
        assert_same_state(model.state_dict(), before)
        records = [f"{c.path or '(root)'} {c.kind} {c.action}: {c.reason}" for c in done.changes]
        self.compare(model, done.model, before, records)

    def compare(
        self, model: nn.Module, after: nn.Module, known: Mapping[str, Tensor], records: list[str]
    ) -> None:
        """Hold the text against the file."""
        parts = {
            "before": model_lines(model, {}),
            "after": model_lines(after, known),
            "records": records or ["none"],
        }
        text = f"{self.path.stem.replace('_', ' ')}\n"
        for head, lines in parts.items():
            text += f"\n{head}\n" + "".join(f"  {line}".rstrip() + "\n" for line in lines)
        if self.update:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(text, encoding="utf-8")
        written = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        assert text == written, "run pytest --update-golden and look at the diff"


def fold_records(folded: nn.Module) -> list[str]:
    """A line for each BatchNorm, each merge, and each set of channels that left or might."""
    lines = []
    for drop in bnfx.report(folded).to_dict()["dropped"]:
        widths = f"{drop['channels']} -> {drop['left']}"
        lines.append(f"{', '.join(drop['layers'])} {drop['verdict']} {widths}: {drop['reason']}")
    for record in bnfx.report(folded).to_dict()["batch_norms"]:
        into = f" into {', '.join(record['into'])}" if record["into"] else ""
        why = f": {record['reason']}" if record["reason"] else ""
        lines.append(f"{record['path']} {record['verdict']}{into}{why}")
    for merge in bnfx.report(folded).to_dict()["merges"]:
        lines.append(f"{', '.join(merge['layers'])} now {merge['into']}: {merge['reason']}")
    return lines


def insert_records(done: nn.Module) -> list[str]:
    """A line for each call of an affine layer."""
    lines = []
    for record in bnfx.report(done).to_dict()["sites"]:
        new = f" {record['bn_path']}" if record["bn_path"] else ""
        site = f"{record['path'] or '(root)'} {record['kind']} of {record['channels']}"
        lines.append(f"{site} {record['action']}{new}: {record['reason']}")
    return lines


def model_lines(model: nn.Module, known: Mapping[str, Tensor]) -> list[str]:
    """A model as text, without the tensors that are as they are in `known`."""
    graph = _graph_of(model)
    if graph is None:
        return [*_outline(model, known)]
    return [*_graph_lines(model, graph), *_state_lines(model, graph, known)]


def _state_lines(model: nn.Module, graph: fx.Graph, known: Mapping[str, Tensor]) -> Iterator[str]:
    names = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    read = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if (name in names or name.rpartition(".")[0] in names)
        and not name.endswith("num_batches_tracked")
        and (name not in known or not _same(tensor, known[name]))
    }
    width = max(map(len, read), default=0)
    for name, tensor in read.items():
        yield f"{name:{width}} {_tensor(tensor)}"


def _graph_of(model: nn.Module) -> fx.Graph | None:
    if isinstance(model, fx.GraphModule):
        return model.graph
    try:
        return fx.Tracer().trace(model)
    except Exception:  # noqa: BLE001  # given proxies, a forward raises anything
        return None


def _outline(model: nn.Module, known: Mapping[str, Tensor]) -> Iterator[str]:
    """The forward of what cannot be traced, and its modules."""
    source = getattr(model, "source", "") or inspect.getsource(type(model).forward)
    yield from textwrap.dedent(source).rstrip().splitlines()
    graphs = {p: m for p, m in model.named_modules() if isinstance(m, fx.GraphModule)}
    for path, module in model.named_modules():
        if path in graphs:
            own = {k.removeprefix(f"{path}."): v for k, v in known.items()}
            yield f"{path} is a {type(module).__name__} of its own:"
            yield from (f"  {line}" for line in model_lines(module, own))
        elif path and not any(path.startswith(f"{inner}.") for inner in graphs):
            yield f"{path} is {_module(module)}"


def _graph_lines(root: nn.Module, graph: fx.Graph) -> Iterator[str]:
    names: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "placeholder"):
            names[node] = str(node.target)
        elif node.op == "output":
            yield f"return {_value(node.args[0], names)}"
        else:
            call = _call(root, node, names)
            names[node] = f"v{sum(n.op.startswith('call') for n in names) + 1}"
            yield f"{names[node]} = {call}"


def _call(root: nn.Module, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """The call as code, without arguments that are as always."""
    name = str(node.target)
    if node.op == "call_function":
        name = getattr(node.target, "__name__", name).removesuffix(".default")
    usual = _signature(node, name)
    given = dict(zip([*usual, *range(len(node.args))], node.args, strict=False)) | node.kwargs
    texts: list[str] = []
    for key, value in given.items():
        plain = isinstance(key, int) or [*usual][len(texts) : len(texts) + 1] == [key]
        if key not in usual or not _is_usual(value, usual[key]):
            texts.append(_value(value, names) if plain else f"{key}={_value(value, names)}")
    if node.op == "call_method":
        return f"{texts[0]}.{name}({', '.join(texts[1:])})"
    told = f"  # {_module(root.get_submodule(name))}" if node.op == "call_module" else ""
    return f"{name}({', '.join(texts)}){told}"


def _signature(node: fx.Node, name: str) -> Mapping[Any, Any]:
    """Names of the arguments with their defaults, as far as they are told."""
    if node.op != "call_function":
        return {}
    if name in _SIGNATURES:
        return {key: _USUAL.get(key, inspect.Parameter.empty) for key in _SIGNATURES[name].split()}
    try:
        parameters = inspect.signature(node.target).parameters  # type: ignore[arg-type]  # a function
    except (TypeError, ValueError):
        return {}
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    parts = [p for p in parameters.values() if p.kind not in kinds]
    return {p.name: p.default for p in parts} if len(parts) == len(parameters) else {}


def _is_usual(value: object, usual: object) -> bool:
    parts = value if isinstance(value, tuple | list) and value else [value]
    return all(type(part) is type(usual) and part == usual for part in parts)


def _value(value: object, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, tuple | list):
        inside = ", ".join(_value(part, names) for part in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_value(v, names)}" for k, v in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _module(module: nn.Module) -> str:
    told = _USUAL_TOLD.sub("", module.extra_repr())
    hooks = " with hooks" if module._forward_hooks or module._forward_pre_hooks else ""
    mode = " in train mode" if module.training and "Norm" in type(module).__name__ else ""
    return f"{type(module).__name__}({told}){hooks}{mode}"


def _tensor(value: Tensor) -> str:
    shape = f"({', '.join(map(str, value.shape))})"
    kind = "" if value.dtype is torch.float64 else f" {str(value.dtype).removeprefix('torch.')}"
    if value.is_meta or value.numel() > _FEW:
        return shape + kind
    numbers = value.detach().flatten().tolist()
    return f"{shape}{kind} = {' '.join(f'{x:.7g}' for x in numbers)}"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.is_meta or torch.equal(a, b))
