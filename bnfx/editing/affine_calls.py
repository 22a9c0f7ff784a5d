"""The affine calls of a model, and what is known about them before anything is changed.

The evidence comes from one of two graphs: the symbolic trace of a module (`bnfx.graphs.training`),
or the record of a run on example inputs (`bnfx.graphs.observed`). Both say which layers were
called, in which order, from inside which modules, and what reads their outputs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from bnfx.graphs.observed import SCOPES, SHAPE, Observation
from bnfx.graphs.parameters import attribute
from bnfx.graphs.training import ModuleGraph
from bnfx.operators.calls import arguments
from bnfx.operators.table import Operator, affine_module, affine_of, operator_of_module, product_of


@dataclass(frozen=True)
class AffineCall:
    """One call of an affine layer.

    Attributes:
        node: The call in the graph of the evidence.
        row: What kind of affine layer it is.
        path: Module path of the layer, seen from the model's root.
        index: How many calls of this layer came before.
        channels: Number of output channels; None where only an example can tell.
        weight: Name of the weight parameter; None where the weight is computed.
        bias: Name of the bias parameter; None without one.
        computed_bias: Whether there is a bias that is no parameter.
        scopes: Paths of the modules around the call, outermost first, the root ("") left out.
        rank: Number of axes of the output, None where no example was run.
    """

    node: fx.Node
    row: Operator
    path: str
    index: int
    channels: int | None
    weight: str | None
    bias: str | None
    computed_bias: bool
    scopes: tuple[str, ...]
    rank: int | None


@dataclass(frozen=True)
class Evidence:
    """A graph of what a model does, with its affine calls.

    Attributes:
        root: The module that the names in the graph start from.
        graph: Calls with modules kept whole (traced), or of functions alone (observed).
        prefix: Path of `root` in the whole model, "" for the model itself.
        calls: The affine calls, in order.
        runs: How often the forward of each module ran, by path; empty where nothing was run.
    """

    root: nn.Module
    graph: fx.Graph
    prefix: str
    calls: tuple[AffineCall, ...]
    runs: Mapping[str, int]


@dataclass(frozen=True)
class Readers:
    """Who reads the parameters in a graph; parameters go by identity.

    Attributes:
        holders: Modules that hold a parameter themselves, with their paths.
        names: Names of a parameter, more than one if it is tied.
        users: Calls that read a parameter, with the node that names it.
        calls: The affine call at a node.
        whole: Paths of the modules that the graph calls.
        modules: The modules by path.
    """

    holders: Mapping[int, Sequence[tuple[str, nn.Module]]]
    names: Mapping[int, Sequence[str]]
    users: Mapping[int, Sequence[tuple[fx.Node, fx.Node]]]
    calls: Mapping[fx.Node, AffineCall]
    whole: frozenset[str]
    modules: Mapping[str, nn.Module]

    @staticmethod
    def of(evidence: Evidence) -> Readers:
        """Look through the graph and the modules once."""
        holders: defaultdict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
        names: defaultdict[int, list[str]] = defaultdict(list)
        users: defaultdict[int, list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
        modules = dict(evidence.root.named_modules(remove_duplicate=False))
        for path, module in modules.items():
            for name, parameter in module._parameters.items():
                holders[id(parameter)].append((path, module))
                names[id(parameter)].append(join(path, name))
        for node in evidence.graph.nodes:
            if node.op == "get_attr":
                value = attribute(evidence.root, str(node.target))
                users[id(value)] += [(node, user) for user in node.users]
        calls = {call.node: call for call in evidence.calls}
        whole = {str(n.target) for n in evidence.graph.nodes if n.op == "call_module"}
        return Readers(holders, names, users, calls, frozenset(whole), modules)


def traced(captured: ModuleGraph, prefix: str = "") -> Evidence:
    """Evidence from a symbolic trace of the module at `prefix`."""
    scopes = {node: _traced_scopes(node) for node in captured.graph.nodes}
    return _evidence(captured.root, captured.graph, prefix, scopes, {})


def observed(root: nn.Module, seen: Observation) -> Evidence:
    """Evidence from a run of `root`."""
    scopes = {node: tuple(filter(None, node.meta.get(SCOPES, ()))) for node in seen.graph.nodes}
    return _evidence(root, seen.graph, "", scopes, seen.runs)


def _evidence(
    root: nn.Module,
    graph: fx.Graph,
    prefix: str,
    scopes: Mapping[fx.Node, tuple[str, ...]],
    runs: Mapping[str, int],
) -> Evidence:
    modules = dict(root.named_modules(remove_duplicate=False))
    calls: list[AffineCall] = []
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        row = affine_of(node, modules) or _product(root, node)
        if row is None:
            continue
        if node.op == "call_module":
            call = _module_call(modules, node, row, scopes[node])
        else:
            call = _function_call(root, modules, node, row, scopes[node])
        path = join(prefix, call.path) or call.weight or node.name
        inside = (*_ancestors(prefix), *(join(prefix, scope) for scope in call.scopes))
        calls.append(replace(call, path=path, index=counts[path], scopes=inside))
        counts[path] += 1
    return Evidence(root, graph, prefix, tuple(calls), runs)


def _ancestors(path: str) -> tuple[str, ...]:
    """Paths of the modules around the module at `path`, outermost first, and itself."""
    parts = path.split(".") if path else []
    return tuple(".".join(parts[: i + 1]) for i in range(len(parts)))


def _product(root: nn.Module, node: fx.Node) -> Operator | None:
    """A matrix product whose second factor is a parameter of rank 2 is a linear layer."""
    row = product_of(node)
    if row is None:
        return None
    weight = _parameter(root, arguments(node, row.signature)["weight"])
    stored = attribute(root, weight) if weight is not None else None
    return row if isinstance(stored, Tensor) and stored.dim() == 2 else None


def _module_call(
    modules: Mapping[str, nn.Module], node: fx.Node, row: Operator, scopes: tuple[str, ...]
) -> AffineCall:
    path = str(node.target)
    module = modules[path]
    own = {name for name in ("weight", "bias") if module._parameters.get(name) is not None}
    return AffineCall(
        node=node,
        row=row,
        path=path,
        index=0,
        channels=channels_of(row, _weight(module), groups_of(node, row, modules)),
        weight=f"{path}.weight" if "weight" in own else None,
        bias=f"{path}.bias" if "bias" in own else None,
        computed_bias=module.bias is not None and "bias" not in own,
        scopes=tuple(dict.fromkeys((*scopes, path))),
        rank=None,
    )


def _function_call(
    root: nn.Module,
    modules: Mapping[str, nn.Module],
    node: fx.Node,
    row: Operator,
    scopes: tuple[str, ...],
) -> AffineCall:
    given = arguments(node, row.signature)
    weight, bias = (_parameter(root, given[part]) for part in ("weight", "bias"))
    shape = node.meta.get(SHAPE)
    inner = scopes[-1] if scopes else ""
    return AffineCall(
        node=node,
        row=row,
        path=_path(root, weight, inner),
        index=0,
        channels=_channels(root, modules, node, row, weight or bias, inner),
        weight=weight,
        bias=bias,
        computed_bias=given["bias"] is not None and bias is None,
        scopes=scopes,
        rank=None if shape is None else len(shape),
    )


def _channels(
    root: nn.Module,
    modules: Mapping[str, nn.Module],
    node: fx.Node,
    row: Operator,
    parameter: str | None,
    inner: str,
) -> int | None:
    """Output channels of a functional call: measured, or read off the weight or the bias."""
    shape = node.meta.get(SHAPE)
    if shape is not None:
        return int(shape[-1 if row.spatial is None else -1 - row.spatial])
    groups = groups_of(node, row, modules)
    module = modules.get(inner)
    stored = attribute(root, parameter) if parameter is not None else None
    if stored is None and module is not None and operator_of_module(module) is row:
        stored = _weight(module)  # a subclass that standardises its weight keeps the shape
    if not isinstance(stored, Tensor):
        return None
    return stored.shape[0] if stored.dim() == 1 else channels_of(row, stored, groups)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _parameter(root: nn.Module, value: object) -> str | None:
    """The name of a parameter that a call reads directly."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    name = str(value.target)
    return name if isinstance(attribute(root, name), nn.Parameter) else None


def _path(root: nn.Module, weight: str | None, inner: str) -> str:
    """The layer's path: the running module if the weight is its own or computed; else the owner."""
    if weight is None:
        return inner
    stored = attribute(root, weight)
    if inner and any(stored is own for own in root.get_submodule(inner)._parameters.values()):
        return inner
    return weight.rpartition(".")[0]


def channels_of(row: Operator, weight: Tensor, groups: int) -> int:
    """Output channels of an affine layer: axis 0 of its weight, axis 1 where `row.transposed`."""
    return weight.shape[1] * groups if row.transposed else weight.shape[0]


def groups_of(node: fx.Node, row: Operator, modules: Mapping[str, nn.Module]) -> int:
    """Groups of a convolution; 1 for every other affine call."""
    if row.spatial is None:
        return 1
    if node.op == "call_module":
        groups = modules[str(node.target)].groups
        assert isinstance(groups, int)
        return groups
    return int(arguments(node, row.signature)["groups"])


def join(prefix: str, path: str) -> str:
    """`path` below `prefix`; either may be empty."""
    return ".".join(filter(None, (prefix, path)))


def _traced_scopes(node: fx.Node) -> tuple[str, ...]:
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(filter(None, (str(path) for path, _ in stack.values())))


def affine_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module, Operator]]:
    """Every affine module of `root` once, whether it is called or not."""
    for path, module in root.named_modules():
        row = affine_module(module)
        if row is not None:
            yield path, module, row
