"""The layers of a torch graph, with what flows through them on one input, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bnfx.graphs.naming import norm_path, owner_of
from bnfx.numbers import UNIT
from bnfx.operators.calls import arguments, base_name, call_name
from bnfx.operators.table import Operator, affine_of, is_batch_norm, layer_call, operator_of
from bnfx.verification.layers import Geometry, Kind, Layer, samples

_WIDE = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}
#: How often a weight that is computed is computed again with other roundings.
_TRIALS = 4


class Widened(TorchFunctionMode):
    """Whatever asks for a narrower floating dtype gets float64, so that no rounding creeps in."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # the signature is torch's
        """Run `func` with narrow dtypes replaced."""
        name = getattr(func, "__name__", "")
        if name in ("cfloat", "chalf") and len(args) == 1:
            return args[0].cdouble()
        if name in ("float", "half", "bfloat16") and len(args) == 1:
            return func(*args) if args[0].is_complex() else args[0].double()
        wide = tuple(_wide(arg) for arg in args)
        return func(*wide, **{k: _wide(v) for k, v in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def in_doubles(module: fx.GraphModule) -> fx.GraphModule:
    """The graph itself in float64, and so what its operators ask for by dtype.

    The exporter notes the dtype of each value that a forward casts; nothing reads these notes.
    """
    for node in [*module.graph.nodes]:
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
            continue
        # A region of autocast casts float32 alone, and its dtype is one that the device has for it.
        if node.target is not torch.ops.higher_order.wrap_with_autocast:
            node.args, node.kwargs = map_aggregate((node.args, node.kwargs), _wide)
    module.recompile()
    return module.double()


@dataclass(frozen=True)
class Constant:
    """A constant that an operator other than a layer reads."""

    #: Its name in the reference.
    name: str
    #: In float64, or as it is where it is not floating.
    value: Tensor
    #: Whether it is a parameter of the source as it is.
    untouched: bool
    #: Whether it lies in a part that is kept whole and evaluates BatchNorms, or casts: bnfx changes
    #: nothing there, an exporter may.
    hidden: bool = False


@dataclass(frozen=True)
class Traced:
    """What one run of a graph showed."""

    #: The layers in the order in which they ran.
    layers: tuple[Layer, ...]
    #: Other constants that operators on data read, in order, each once.
    constants: tuple[Constant, ...]
    #: Key of a value -> a sample of it, for the inputs and outputs of layers.
    flow: Mapping[str, Tensor] = field(default_factory=dict)


def trace_layers(
    graph: fx.GraphModule, args: tuple[Any, ...], changed: frozenset[str] = frozenset()
) -> Traced:
    """Run an inference graph on one input and list its layers.

    Args:
        graph: In float64; every argument is a placeholder.
        args: In the order of the placeholders, in float64.
        changed: Names of parameters that folding changed.
    """
    recorder = _Recorder(graph, changed)
    with torch.no_grad(), Widened():
        recorder.run(*args)
    return Traced(tuple(recorder.layers), tuple(recorder.constants.values()), recorder.flow)


class _Recorder(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, changed: frozenset[str]) -> None:
        super().__init__(graph)
        self.changed = changed
        self.layers: list[Layer] = []
        self.constants: dict[str, Constant] = {}
        self.flow: dict[str, Tensor] = {}
        self.fixed: set[fx.Node] = set()
        #: A value that an operator handed on -> the value that it was given.
        self.same: dict[str, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run, and remember a layer, or the constants that a node on data reads."""
        inputs = n.all_input_nodes
        if n.op == "get_attr" or (
            n.op in ("call_function", "call_method")
            and inputs
            and all(node in self.fixed for node in inputs)
        ):
            self.fixed.add(n)
            return super().run_node(n)
        layer = self._layer(n)
        held = self._input(layer, n)
        given = self.env.get(inputs[0]) if inputs else None
        before = given._version if isinstance(given, Tensor) else 0
        result = super().run_node(n)
        handed = isinstance(given, Tensor) and given._version == before and _alike(given, result)
        if handed or base_name(call_name(n)) == "clone":
            self.same[n.name] = self.same.get(inputs[0].name, inputs[0].name)
        if layer is not None and isinstance(result, Tensor) and held is not None:
            self.flow[layer.x], self.flow[layer.y] = held, samples(result)
            self.layers.append(replace(layer, rank=result.dim()))
        else:
            self._remember_constants(n)
        return result

    def _input(self, layer: Layer | None, n: fx.Node) -> Tensor | None:
        """A sample of the layer's input, taken before an operator can work in place."""
        if layer is None:
            return None
        first = n.args[0] if n.args else n.kwargs.get("input")
        value = self.env.get(first) if isinstance(first, fx.Node) else None
        return samples(value) if isinstance(value, Tensor) else None

    def _layer(self, n: fx.Node) -> Layer | None:
        if n.op != "call_function":
            return None
        row = affine_of(n)
        if row is not None:
            return self._affine(n, row)
        if is_batch_norm(n):
            call = arguments(n)
            return self._norm(n, call, "batch_norm", norm_path(n))
        if call_name(n) == "layer_norm" and operator_of(n) is not None:
            return self._norm(n, arguments(n), "layer_norm", "")
        return None

    def _affine(self, n: fx.Node, row: Operator) -> Layer | None:
        call = layer_call(n)
        parts, names = self._parts(call, {"weight": "weight", "bias": "bias"})
        if "weight" not in parts:
            return None
        kind: Kind = "linear"
        geometry = None
        if row.spatial is not None:
            kind = "conv_transpose" if row.transposed else "conv"
            geometry = _geometry(call, row, parts["weight"])
        return self._made(n, kind, parts, names, call, geometry=geometry)

    def _norm(self, n: fx.Node, call: dict[str, Any], kind: Kind, path: str) -> Layer | None:
        wanted = {"weight": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        if kind == "layer_norm":
            wanted = {"weight": "weight", "bias": "bias"}
        parts, names = self._parts(call, wanted)
        if "weight" not in parts:
            like = parts.get("mean")
            if like is None:
                return None
            parts["weight"] = torch.ones_like(like)
        return self._made(n, kind, parts, names, call, path=path)

    def _parts(
        self, call: dict[str, Any], wanted: Mapping[str, str]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        parts, names = {}, {}
        for part, argument in wanted.items():
            node = call.get(argument)
            if not isinstance(node, fx.Node):
                continue
            value = self.env.get(node)
            if isinstance(value, Tensor):
                parts[part] = value.detach().double().cpu()
                names[part] = str(node.target if node.op == "get_attr" else node.name)
        return parts, names

    def _condition(self, n: fx.Node) -> float:
        """How many roundings come of one in each step that computes a weight, at least 1."""
        if n.op == "get_attr" or n not in self.fixed:
            return 1.0
        exact, generator = self.env[n], torch.Generator().manual_seed(0)
        unit = UNIT["fp32"] * float(exact.abs().max())
        moved = [self._shaken(n, {}, generator) - exact for _ in range(_TRIALS)]
        return max(1.0, *(float(change.abs().max()) / unit for change in moved)) if unit else 1.0

    def _shaken(self, n: fx.Node, known: dict[fx.Node, Any], generator: torch.Generator) -> Any:
        """A fixed value with a rounding of single precision put into each step towards it."""

        def rounded(value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value
            noise = 2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1
            return value * (1 + noise.to(value) * UNIT["fp32"])

        for source in (node for node in n.all_input_nodes if node not in known):
            known[source] = self._shaken(source, known, generator)
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), known.__getitem__)
        result = getattr(self, n.op)(n.target, args, kwargs)
        return pytree.tree_map_only(Tensor, rounded, result)

    def _made(
        self,
        n: fx.Node,
        kind: Kind,
        parts: dict[str, Tensor],
        names: dict[str, str],
        call: dict[str, Any],
        *,
        geometry: Geometry | None = None,
        path: str = "",
    ) -> Layer:
        sources = {
            part: call[part] for part in ("weight", "bias") if isinstance(call.get(part), fx.Node)
        }
        stored = {part for part, node in sources.items() if node.op == "get_attr"}
        first = call.get("input")
        return Layer(
            kind=kind,
            name=path or owner_of(names.get("weight", n.name)),
            parts=parts,
            names=names,
            geometry=geometry,
            eps=float(call["eps"]) if kind in ("batch_norm", "layer_norm") else 0.0,
            axes=parts["weight"].dim(),
            training=call.get("training") is True,
            x=f"{n.name}.x",
            y=n.name,
            source=self.same.get(first.name, first.name) if isinstance(first, fx.Node) else "",
            untouched=frozenset(part for part in stored if names[part] not in self.changed),
            conditions={part: self._condition(node) for part, node in sources.items()},
        )

    def _remember_constants(self, n: fx.Node) -> None:
        if n.op == "call_module":
            inner = self.module.get_submodule(str(n.target))
            hidden = any(isinstance(module, _BatchNorm) for module in inner.modules())
            for name, value in inner.state_dict().items():
                self._remember(f"{n.target}.{name}", value, stored=True, hidden=hidden)
        # An operator that runs a graph of its own (a region of autocast) may round what it reads.
        hidden = isinstance(n.target, HigherOrderOperator)
        for node in n.all_input_nodes:
            if node in self.fixed and n.op != "output":
                stored = node.op == "get_attr"
                value, name = self.env.get(node), str(node.target) if stored else node.name
                if isinstance(value, Tensor):
                    self._remember(name, value, stored=stored, hidden=hidden)

    def _remember(self, name: str, value: Tensor, *, stored: bool, hidden: bool = False) -> None:
        if value.is_complex():  # files hold the parts apart
            for part, numbers in (("real", value.real), ("imaginary", value.imag)):
                self._remember(f"{name} ({part} part)", numbers, stored=False, hidden=hidden)
            return
        wide = value.detach().cpu()
        wide = wide.double() if wide.is_floating_point() else wide
        untouched = stored and name not in self.changed
        self.constants.setdefault(name, Constant(name, wide, untouched, hidden))


def _alike(given: Tensor, result: Any) -> bool:
    """Whether it is what was given: dropout in eval mode, a cast to the dtype that is there."""
    if not isinstance(result, Tensor) or result.shape != given.shape:
        return False
    return result.data_ptr() == given.data_ptr() and result.stride() == given.stride()


def _geometry(call: dict[str, Any], row: Operator, weight: Tensor) -> Geometry:
    rank = row.spatial or 0
    stride, dilation = (_each(call.get(name, 1), rank) for name in ("stride", "dilation"))
    padding = call.get("padding", 0)
    kernel = tuple(weight.shape[2:])
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        begin = tuple(n // 2 for n in total)
        end = tuple(n - b for n, b in zip(total, begin, strict=True))
    else:
        begin = end = _each(0 if padding == "valid" else padding, rank)
    added = _each(call.get("output_padding", 0), rank) if row.transposed else ()
    return Geometry(stride, begin, end, dilation, int(call["groups"]), added)


def _each(value: Any, rank: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return tuple(int(v) for v in (values * rank if len(values) == 1 else values))
