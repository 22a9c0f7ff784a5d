"""The affine calls of a model, and what is known about them before anything is changed.

The evidence comes from one of two graphs: a symbolic trace, or the record of a run on example
inputs. Both say which layers were called, in which order, from inside which modules, and what reads
their outputs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, fx, nn

from bnfx.editing.consumers import describe
from bnfx.editing.draft import Draft, Region, join
from bnfx.graphs.observed import SHAPE
from bnfx.operators.table import (
    Operator,
    affine_module,
    affine_of,
    layer_call,
    operator_of_module,
    product_of,
)


@dataclass(frozen=True)
class AffineCall:
    """One call of an affine layer."""

    #: The call in the graph of the evidence.
    node: fx.Node
    row: Operator
    #: Module path of the layer, seen from the model's root.
    path: str
    #: How many calls of this layer came before.
    index: int
    #: Number of output channels; None where only an example can tell.
    channels: int | None
    #: Name of the weight parameter in the region; None where the weight is computed.
    weight: str | None
    #: Name of the bias parameter; None without one, or where it is computed.
    bias: str | None
    #: Paths of the modules around the call, outermost first, the root ("") left out.
    scopes: tuple[str, ...]
    #: Number of axes of the output, None where no example was run.
    rank: int | None


class Evidence:
    """A graph of what a model does, with its affine calls, in order. Parameters go by identity."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.graph, self.prefix, self.modules = region.graph, region.path, region.modules
        calls: list[AffineCall] = []
        counts: Counter[str] = Counter()
        for node in region.graph.nodes:
            row = affine_of(node, region.modules) or _product(region, node)
            if row is None:
                continue
            form = _module_call if node.op == "call_module" else _function_call
            call = form(region, node, row)
            path = region.name(call.path) or call.weight or node.name
            scopes = self._named(call.scopes)
            calls.append(replace(call, path=path, index=counts[path], scopes=scopes))
            counts[path] += 1
        self.calls = tuple(calls)

    def scopes(self, node: fx.Node) -> tuple[str, ...]:
        """Paths of the modules around a call, outermost first, the root left out."""
        return self._named(self.region.scopes(node))

    def _named(self, scopes: Iterable[str]) -> tuple[str, ...]:
        return (*_ancestors(self.region.path), *(self.region.name(scope) for scope in scopes))

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter of the region."""
        value = self.region.value(name)
        assert isinstance(value, nn.Parameter)
        return value

    @cached_property
    def holders(self) -> Mapping[int, Sequence[tuple[str, nn.Module]]]:
        """The modules that hold a parameter themselves, with their paths."""
        found: defaultdict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
        for path, module in self.modules.items():
            for parameter in module._parameters.values():
                found[id(parameter)].append((path, module))
        return found

    @cached_property
    def names(self) -> Mapping[int, Sequence[str]]:
        """The names of a parameter, more than one if it is tied; those of one module once."""
        found: defaultdict[int, list[str]] = defaultdict(list)
        once = {id(module): path for path, module in reversed([*self.modules.items()])}
        for path, module in self.modules.items():
            if once[id(module)] != path:
                continue
            for name, parameter in module._parameters.items():
                found[id(parameter)].append(join(path, name))
        return found

    @cached_property
    def users(self) -> Mapping[int, Sequence[tuple[fx.Node, fx.Node]]]:
        """The calls that read a parameter, each behind the node that names it."""
        found: defaultdict[int, list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
        for node in self.graph.find_nodes(op="get_attr"):
            found[id(self.region.value(str(node.target)))] += [(node, user) for user in node.users]
        return found

    @cached_property
    def at(self) -> Mapping[fx.Node, AffineCall]:
        """The affine call at a node."""
        return {call.node: call for call in self.calls}

    @cached_property
    def whole(self) -> frozenset[str]:
        """Paths of the modules that the graph calls."""
        return frozenset(str(node.target) for node in self.graph.find_nodes(op="call_module"))


def _ancestors(path: str) -> tuple[str, ...]:
    """Paths of the modules around the module at `path`, outermost first, and itself."""
    parts = path.split(".") if path else []
    return tuple(".".join(parts[: i + 1]) for i in range(len(parts)))


def _product(region: Region, node: fx.Node) -> Operator | None:
    """A matrix product whose second factor is a parameter of rank 2 is a linear layer."""
    row = product_of(node)
    if row is None:
        return None
    weight = _parameter(region, layer_call(node)["weight"])
    stored = region.value(weight) if weight is not None else None
    return row if isinstance(stored, Tensor) and stored.dim() == 2 else None


def _module_call(region: Region, node: fx.Node, row: Operator) -> AffineCall:
    path = str(node.target)
    module = region.modules[path]
    own = {name for name in ("weight", "bias") if module._parameters.get(name) is not None}
    return AffineCall(
        node=node,
        row=row,
        path=path,
        index=0,
        channels=channels_of(row, _weight(module), groups_of(node, row, region.modules)),
        weight=join(path, "weight") if "weight" in own else None,
        bias=join(path, "bias") if "bias" in own else None,
        scopes=tuple(dict.fromkeys((*region.scopes(node), path))),
        rank=None,
    )


def _function_call(region: Region, node: fx.Node, row: Operator) -> AffineCall:
    given, scopes = layer_call(node), region.scopes(node)
    weight, bias = (_parameter(region, given[part]) for part in ("weight", "bias"))
    if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
        bias = None  # of addmm: what is added is a multiple of it
    shape = node.meta.get(SHAPE)
    inner = scopes[-1] if scopes else ""
    return AffineCall(
        node=node,
        row=row,
        path=_path(region, weight, inner),
        index=0,
        channels=_channels(region, node, row, weight or bias, inner),
        weight=weight,
        bias=bias,
        scopes=scopes,
        rank=None if shape is None else len(shape),
    )


def _channels(
    region: Region,
    node: fx.Node,
    row: Operator,
    parameter: str | None,
    inner: str,
) -> int | None:
    """Output channels of a functional call: measured, or read off the weight or the bias."""
    shape = node.meta.get(SHAPE)
    if shape is not None:
        return int(shape[-1 if row.spatial is None else -1 - row.spatial])
    groups = groups_of(node, row, region.modules)
    module = region.modules.get(inner)
    stored = region.value(parameter) if parameter is not None else None
    if stored is None and module is not None and operator_of_module(module) is row:
        stored = _weight(module)  # a subclass that standardises its weight keeps the shape
    if not isinstance(stored, Tensor):
        return None
    return stored.shape[0] if stored.dim() == 1 else channels_of(row, stored, groups)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _parameter(region: Region, value: object) -> str | None:
    """The name of a parameter that a call reads directly."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    name = str(value.target)
    return name if isinstance(region.value(name), nn.Parameter) else None


def _path(region: Region, weight: str | None, inner: str) -> str:
    """The layer's path: the running module if the weight is its own or computed; else the owner."""
    if weight is None:
        return inner
    stored = region.value(weight)
    if inner and any(stored is own for own in region.modules[inner]._parameters.values()):
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
    return int(layer_call(node)["groups"])


def affine_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module, Operator]]:
    """Every affine module of `root` once, whether it is called or not."""
    for path, module in root.named_modules():
        row = affine_module(module)
        if row is not None:
            yield path, module, row


def evidences(draft: Draft) -> list[Evidence]:
    """What is known of the affine calls: of a run in eval mode first, of one in train mode then.

    A later one tells only of layers that no earlier one saw: those called in training alone.
    Without an example it is what the traces of the model, or of its parts, show.
    """
    if draft.seen is None:
        return [Evidence(region) for region in draft.regions]
    found = [Evidence(draft.seen)]
    if draft.whole is not None and not draft.whole.opaque:
        return found  # one graph serves both modes
    training = draft.seen_in_training()
    return found if training is None else [*found, Evidence(training)]


def never_called(
    draft: Draft, found: Sequence[Evidence]
) -> Iterator[tuple[str, Operator, int, str]]:
    """The affine modules that no call came from: path, row, output channels, and why."""
    root = draft.root
    called = {call.path for evidence in found for call in evidence.calls}
    paths = dict(root.named_modules(remove_duplicate=False))
    own = {id(paths[path]) for path in called if path in paths}
    for path, module, row in affine_modules(root):
        if path not in called and id(module) not in own:
            groups = module.groups if row.spatial is not None else 1
            assert isinstance(groups, int)
            channels = channels_of(row, _weight(module), groups)
            yield path, row, channels, _why_unseen(draft, path, found)


def _why_unseen(draft: Draft, path: str, found: Sequence[Evidence]) -> str:
    """Why no affine call came from the layer at `path`."""
    for evidence in found:
        name = join(path, "weight")[len(evidence.prefix) :].removeprefix(".")
        for node in evidence.graph.find_nodes(op="get_attr", target=name):
            if node.users:
                reader = describe(next(iter(node.users)))
                return f"its weight goes into {reader!r}, not a layer call"
    if draft.seen is not None:
        return "the forward did not call it on the example, in eval or in train mode"
    calls = {name for evidence in found for name in evidence.whole}
    outer = [path.rpartition(".")[0]]
    while outer[-1]:
        outer.append(outer[-1].rpartition(".")[0])
    whole = next((p for p in outer if p in calls), None)
    if whole is None and any(evidence.prefix == "" for evidence in found):
        return "the forward never calls it"
    kind = type(draft.root.get_submodule(whole or "")).__name__
    return f"the forward of {kind} around it cannot be traced; pass example_inputs"
