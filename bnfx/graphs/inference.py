"""A graph to fold: convolutions, linear layers and BatchNorms are function calls in it.

Their parameters are attributes at their original names, whatever classes the model was written
with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.traceback import preserve_node_meta
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _pytree as pytree

from bnfx.errors import CaptureError, NotCapturedError
from bnfx.graphs.agreement import alike, bound, outputs, reordered
from bnfx.graphs.baked import bake_modules, bake_weights
from bnfx.graphs.constants import is_torch
from bnfx.graphs.examples import HOOKS, Example, clone, has_hooks, obstacle, skeleton
from bnfx.graphs.export_guards import rewrite_guards
from bnfx.graphs.frames import methods_noted, take_frames
from bnfx.graphs.grad_modes import inline_grad_modes
from bnfx.graphs.naming import OWNER
from bnfx.graphs.norms import holds_norm, is_stock_norm
from bnfx.graphs.observed import undisturbed_random_state
from bnfx.graphs.parameters import constants, erase_dead
from bnfx.graphs.shapes import SEEN
from bnfx.graphs.tracing import RANKS, Tracer, assemble, attributes_kept, trace
from bnfx.operators.calls import argument
from bnfx.operators.table import TRANSPARENT_MODULES, is_batch_norm

_RANKS: tuple[tuple[type[nn.Module], frozenset[int]], ...] = (
    (nn.BatchNorm1d, frozenset({2, 3})),
    (nn.BatchNorm2d, frozenset({4})),
    (nn.BatchNorm3d, frozenset({5})),
)


_CIRCULAR = (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)

#: node.meta key of a module that is kept whole: why torch.export could not help.
NOT_EXPORTED = "bnfx_not_exported"


class _FunctionalTracer(Tracer):
    """Goes through the torch.nn modules of the operator table; what is left whole stays a call."""

    #: A buffer that the forward changes must be read when it runs, not when it is traced.
    proxy_buffer_attributes = True
    _names: dict[int, tuple[str, dict[str, Any]]] | None = None

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """As torch.fx does it, which goes through all names for each tensor that is read."""
        self.read = parameter_proxy_cache
        if self._names is None:
            self._names = _names_of_tensors(self.root)
        if id(attr_val) not in self._names:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        name, owner = self._names[id(attr_val)]
        if owner.get(name.rpartition(".")[2]) is not attr_val:  # the forward has replaced it
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.opaque or has_hooks(m):
            return True
        if is_stock_norm(m):
            return m.training or m.running_mean is None or m.running_var is None
        if type(m) in TRANSPARENT_MODULES:
            return False
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A BatchNorm in eval mode becomes `F.batch_norm`; its check of the rank is remembered."""
        path = self.path_of_module(m)
        stock = type(m) in _CIRCULAR and not has_hooks(m)
        if stock and isinstance(m, _CIRCULAR):  # its own check of the rank cannot be traced
            x = args[0] if args else kwargs["input"]
            return F.pad(x, m.padding, mode="circular")
        if not is_stock_norm(m) or self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        x = args[0] if args else kwargs["input"]
        statistics = (m.running_mean, m.running_var, m.weight, m.bias)
        out: Any = F.batch_norm(x, *statistics, training=False, eps=m.eps)
        out.node.meta[OWNER] = path
        ranks = [ranks for kind, ranks in _RANKS if isinstance(m, kind)]
        out.node.meta[RANKS] = ranks[0] if ranks else frozenset()
        return out


def _names_of_tensors(root: nn.Module) -> dict[int, tuple[str, dict[str, Any]]]:
    """Identity of each parameter and buffer -> its first name, and where its module keeps it."""
    names: dict[int, tuple[str, dict[str, Any]]] = {}
    modules = list(root.named_modules())
    for kind in ("_parameters", "_buffers"):
        for path, module in modules:
            owner = vars(module)[kind]
            for leaf, tensor in owner.items():
                if tensor is not None:
                    names.setdefault(id(tensor), (f"{path}.{leaf}" if path else leaf, owner))
    return names


@dataclass(frozen=True)
class Captured:
    """An inference graph, and the example's values of its placeholders (None without any)."""

    module: fx.GraphModule
    inputs: tuple[Any, ...] | None
    #: Values of other sizes that the graph takes; None where they are to be tried.
    others: tuple[tuple[Any, ...], ...] | None = None

    def copied(self) -> Captured:
        """Another graph to edit, whose parameters share their storage with this one's."""
        module = skeleton(self.module)
        assert isinstance(module, fx.GraphModule)
        return Captured(module, self.inputs, self.others)


def inference_graph(model: nn.Module, given: Example | None, *, exporting: bool = True) -> Captured:
    """A functional graph of a copy of `model` in its present mode.

    Without example inputs, and with them where that gives the same outputs, by symbolic tracing;
    otherwise by `torch.export.export(strict=False)` with dynamic shapes, if `exporting`.

    Raises:
        CaptureError: Neither way works; the message holds both causes.
    """
    captured = _captured(model, given, exporting=exporting)
    bake_weights(captured.module)
    return captured


def _captured(model: nn.Module, given: Example | None, *, exporting: bool) -> Captured:
    spread = isinstance(model, nn.parallel.DistributedDataParallel)
    if said := obstacle(model, wrappers=spread):
        raise CaptureError(said)
    root, export = bake_modules(skeleton(model)), _exported if exporting else _not_exported
    try:
        with methods_noted(root):
            graph, _ = trace(_FunctionalTracer, root, frozenset(), given)
    except CaptureError as error:
        if given is None:
            raise CaptureError(
                f"{error}. Pass example_inputs, so that torch.export can capture the model"
            ) from error
        # Tracing may have left proxies in attributes that the forward assigns.
        return export(bake_modules(skeleton(model)), given, str(error))
    _restore_ranks(root, graph)
    traced = assemble(root, graph)
    if given is not None and not _agree(root, traced, given):
        return export(root, given, "the traced graph and the model disagree on the example")
    if given is None:
        return Captured(traced, None)
    if _hides_layers(traced):
        try:
            return export(root, given, "a part of the model that holds layers stays whole")
        except CaptureError as error:  # then they stay, inside the modules that could not be traced
            for node in traced.graph.nodes:
                if node.op == "call_module":
                    node.meta[NOT_EXPORTED] = str(error).rpartition("; ")[2]
    _observe(root, traced, given)
    return Captured(traced, tuple(bound(root, traced.graph, given).values()))


def _restore_ranks(root: nn.Module, graph: fx.Graph) -> None:
    """BatchNorms of a graph that was folded accept the ranks that their classes accepted."""
    known: dict[str, set[frozenset[int]]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            mean = argument(node, 1, "running_mean")
            if RANKS in node.meta and isinstance(mean, fx.Node) and mean.op == "get_attr":
                name = f"{path}.{mean.target}" if path else str(mean.target)
                known.setdefault(name, set()).add(node.meta[RANKS])
    for node in graph.nodes:
        if not is_batch_norm(node) or RANKS in node.meta:
            continue
        mean = argument(node, 1, "running_mean")
        ranks = known.get(str(mean.target), set()) if isinstance(mean, fx.Node) else set()
        if len(ranks) == 1:
            node.meta[RANKS] = next(iter(ranks))


def _hides_layers(traced: fx.GraphModule) -> bool:
    """Whether a module that is called as a whole evaluates a BatchNorm that might be folded.

    Or a layer that others might be folded into.
    """
    others = any(is_batch_norm(node) for node in traced.graph.nodes)
    for node in traced.graph.nodes:
        if node.op != "call_module":
            continue
        whole = traced.get_submodule(str(node.target))
        inside = list(whole.modules())
        if any(has_hooks(module) for module in inside):
            continue
        if any(
            not m.training and m.running_mean is not None
            if isinstance(m, _BatchNorm | _InstanceNorm)
            else holds_norm(m)
            for m in inside
        ):
            return True
        own = not type(whole).__module__.startswith("torch.nn.")
        if others and own and any(isinstance(m, _ConvNd | nn.Linear) for m in inside):
            return True
    return False


def _observe(root: nn.Module, traced: fx.GraphModule, given: Example) -> None:
    """Note what modules that are kept whole return on the example: their shapes are not derived."""
    if not any(node.op == "call_module" for node in traced.graph.nodes):
        return
    seen: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if n.op == "call_module":
                seen[n.name] = pytree.tree_map(
                    lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, out
                )
            return out

    inputs = bound(root, traced.graph, given.copied()).values()
    with torch.no_grad(), undisturbed_random_state(root):
        Recorder(_runnable(traced, traced)).run(*inputs)
    for node in traced.graph.nodes:
        if node.name in seen:
            node.meta[SEEN] = seen[node.name]


def _runnable(model: nn.Module, traced: fx.GraphModule) -> Any:
    """A copy to run, whose run leaves `model` as it is; it shares weights that nothing writes.

    Where code that the graph does not show may write them, hooks say, nothing is shared.
    """
    hidden = any(has_hooks(module) for module in model.modules()) or any(
        node.op == "call_function"
        and (isinstance(node.target, torch._ops.OpOverloadPacket) or not is_torch(node.target))
        for node in traced.graph.nodes
    )
    if hidden:
        return clone(model)
    known = constants(traced)
    return skeleton(model, [t for name, t in known.tensors.items() if name not in known.written])


def _agree(root: nn.Module, traced: fx.GraphModule, given: Example) -> bool:
    """Whether model and graph give equal outputs on the example (in train mode: not asked)."""
    if any(module.training for module in root.modules()):
        return True
    truth = outputs(_runnable(root, traced), given)
    try:
        ours = outputs(_runnable(traced, traced), Example((), bound(root, traced.graph, given)))
    except CaptureError:
        return False
    return alike(ours, truth, reordered)


def _two_of_each(given: Example) -> Example:
    """The example with a batch of 2 where it has one of 1."""
    args, kwargs = pytree.tree_map(
        lambda leaf: (
            leaf.repeat(2, *[1] * (leaf.dim() - 1))
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == 1
            else leaf
        ),
        (given.args, dict(given.kwargs)),
    )
    return Example(args, kwargs)


def _sizes_left_open(root: nn.Module, given: Example, axes: slice) -> dict[str, Any]:
    """For each argument, which of its `axes` the exporter may leave open: as many as it can.

    What a forward takes as `*args` or `**kwargs` is one argument that holds several.
    """
    try:
        arguments = inspect.signature(root.forward).bind(*given.args, **given.kwargs).arguments
    except (TypeError, ValueError) as error:  # the latter from a forward that is no Python
        raise CaptureError(
            f"the example does not fit {type(root).__name__}.forward: {error}"
        ) from error
    sizes: dict[str, Any] = pytree.tree_map(
        lambda leaf: (
            dict.fromkeys(range(leaf.dim())[axes], torch.export.Dim.AUTO)
            if isinstance(leaf, Tensor)
            else None
        ),
        arguments,
    )
    return sizes


def _restore_modes(root: nn.Module, captured: fx.GraphModule) -> None:
    """The exporter's result says that it trains, whatever the mode of what it was made from."""
    theirs = dict(root.named_modules(remove_duplicate=False))
    for path, module in captured.named_modules(remove_duplicate=False):
        module.training = theirs.get(path, root).training


def _exported(root: nn.Module, given: Example, cause: str) -> Captured:
    errors = [f"symbolic tracing: {cause}"]
    everywhere = _sizes_left_open(root, given, slice(None))
    batch = _sizes_left_open(root, given, slice(1))
    wide = _two_of_each(given)  # the exporter takes an axis of size 1 for one that stays so
    for example, sizes in ((wide, everywhere), (given, everywhere), (wide, batch), (given, None)):
        try:
            captured = exported(root, example, sizes)
            if example is wide:
                outputs(clone(captured.module), given)
        except Exception as error:  # noqa: BLE001  # the exporter and the user's forward raise anything
            errors.append(f"torch.export: {str(error).strip().partition(chr(10))[0]}")
            if _depends_on_data(error):  # with any sizes
                break
            continue
        return captured
    outputs(clone(root), given)  # the model itself may not run on the example, which says more
    raise NotCapturedError(
        f"{type(root).__name__} cannot be captured. " + "; ".join(dict.fromkeys(errors))
    )


def _not_exported(root: nn.Module, _given: Example, cause: str) -> Captured:
    raise NotCapturedError(
        f"{type(root).__name__} cannot be captured. symbolic tracing: {cause}; it asks for values "
        "of tensors, which torch.export does not allow"
    )


def _depends_on_data(error: BaseException | None) -> bool:
    """Whether the forward asks for values of tensors, to decide on its way or on a size."""
    while error is not None:
        if isinstance(error, GuardOnDataDependentSymNode):
            return True
        error = error.__cause__ or error.__context__
    return False


def exported(root: nn.Module, example: Example, sizes: Any = None) -> Captured:
    """What `torch.export.export` makes of it, in which no module is left whole.

    Raises:
        Exception: Anything that the exporter and the forward of `root` raise.
    """
    mine = example.copied()  # what the exporter notes on tensors would hold in the next call too
    with attributes_kept(root), methods_noted(root), preserve_node_meta():
        program = torch.export.export(
            root, mine.args, dict(mine.kwargs), dynamic_shapes=sizes, strict=False
        )
    captured = program.module()
    assert isinstance(captured, fx.GraphModule)
    # The exporter's own hooks look at its class, and no pickle takes them; those for modules
    # as inputs are for nothing here. Its guards are a node and stay.
    for hooks in HOOKS:
        getattr(captured, hooks).clear()
    captured.graph._tracer_cls = None  # unpickling would make one without its arguments
    rewrite_guards(captured)
    take_frames(captured.graph)
    inline_grad_modes(captured)
    _restore_modes(root, captured)
    # It names all state; what no operator reads (num_batches_tracked) is none of this graph.
    erase_dead(captured.graph, [n for n in captured.graph.nodes if n.op == "get_attr"])
    assert program.example_inputs is not None
    return Captured(captured, tuple(pytree.tree_leaves(program.example_inputs)))
