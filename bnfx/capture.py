"""Models become graphs here: one kind to train on, one kind to fold.

`module_graph` keeps torch.nn modules as calls, so that `train()` and `eval()` keep their meaning.
`inference_graph` is functional: convolutions, linear layers and BatchNorms are function calls with
their parameters as attributes, whatever classes the model was written with.
Both work on a deep copy, so that the source stays as it is.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from bnfx.errors import CaptureError
from bnfx.ledger import free_name
from bnfx.operators import BATCH_NORM, TRANSPARENT_MODULES

#: node.meta key: the ranks that the BatchNorm module behind a functional call accepts.
RANKS = "bnfx_ranks"
#: node.meta key: module path of the BatchNorm module behind a functional call.
OWNER = "bnfx_owner"

_RANKS: tuple[tuple[type[nn.Module], frozenset[int]], ...] = (
    (nn.BatchNorm1d, frozenset({2, 3})),
    (nn.BatchNorm2d, frozenset({4})),
    (nn.BatchNorm3d, frozenset({5})),
)

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)

_NO_PROXY = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Example:
    """Example inputs of a model: positional arguments and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def example(inputs: Any, kwargs: Mapping[str, Any] | None) -> Example | None:
    """`inputs` as a tuple of positional arguments (a lone tensor is accepted), None without any."""
    if inputs is None and not kwargs:
        return None
    if inputs is None:
        inputs = ()
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, tuple | list):
        raise CaptureError(
            f"example_inputs is a {type(inputs).__name__}; give a tuple of positional arguments "
            "or a lone tensor"
        )
    return Example(tuple(inputs), dict(kwargs or {}))


def clone(model: nn.Module) -> nn.Module:
    """A deep copy; what it shares inside, such as tied weights, it goes on sharing."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {error}. bnfx never changes the model that "
            "it is given; make copy.deepcopy(model) work (torch.nn.utils.weight_norm in its old "
            "form does not: use torch.nn.utils.parametrizations.weight_norm)"
        ) from error


class _Tracer(fx.Tracer):
    """Symbolic tracing with chosen leaves, and with optional arguments at their defaults.

    A proxy is not None and has no truth value, so an optional argument that is traced as a proxy
    takes the wrong branch silently. Only required arguments and those given in the example become
    placeholders; the others keep their default, and are no arguments of the result.
    """

    def __init__(self, opaque: frozenset[str], given: Example | None) -> None:
        super().__init__()
        self.opaque = opaque
        self.given = given
        self.failed: str | None = None

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,  # noqa: FBT001  # the signature is torch.fx's
        concrete_args: Any = None,  # noqa: ARG002  # likewise
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for required and given arguments, values for the rest."""
        assert is_module
        signature = inspect.signature(root_fn)
        names = list(signature.parameters)[1:]
        given: dict[str, Any] = {}
        if self.given is not None:
            bound = signature.bind(self.root, *self.given.args, **self.given.kwargs)
            given = dict(bound.arguments)
        args: list[Any] = [self.root]
        keywords: dict[str, Any] = {}
        for name in names:
            parameter = signature.parameters[name]
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                if given.get(name):
                    raise fx.proxy.TraceError(f"forward takes {parameter}")
                continue
            value = given.get(name, parameter.default)
            traced = value is parameter.empty or (
                name in given and not isinstance(value, _NO_PROXY)
            )
            if traced:
                default = () if parameter.default is parameter.empty else (parameter.default,)
                value = self.create_proxy("placeholder", name, default, {})
            if parameter.kind is parameter.KEYWORD_ONLY:
                keywords[name] = value
            else:
                args.append(value)
        return functools.partial(root_fn, **keywords) if keywords else root_fn, args

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules that could not be traced, or whose hooks would run during tracing, stay whole."""
        return (
            module_qualified_name in self.opaque
            or has_hooks(m)
            or isinstance(m, ByMode)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Remember the innermost module in which tracing failed."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise


class _FunctionalTracer(_Tracer):
    """Goes through the torch.nn modules of the operator table; what is left whole stays a call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.opaque or has_hooks(m):
            return True
        if _is_stock_norm(m):
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
        if not _is_stock_norm(m) or self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        x = args[0] if args else kwargs["input"]
        statistics = (m.running_mean, m.running_var, m.weight, m.bias)
        out: Any = F.batch_norm(x, *statistics, training=False, eps=m.eps)
        out.node.meta[OWNER] = path
        ranks = [ranks for kind, ranks in _RANKS if isinstance(m, kind)]
        out.node.meta[RANKS] = ranks[0] if ranks else frozenset()
        return out


def _is_stock_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether this is BatchNorm as torch computes it; in eval mode SyncBatchNorm is the same."""
    stock = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return isinstance(module, _BatchNorm) and type(module).forward in stock


def has_hooks(module: nn.Module) -> bool:
    """Whether code of the user runs around this module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _trace(
    kind: type[_Tracer], model: nn.Module, opaque: frozenset[str], given: Example | None
) -> tuple[fx.Graph, frozenset[str]]:
    """Trace `model`; submodules in which that fails stay whole. The graph, and their paths."""
    while True:
        tracer = kind(opaque, given)
        try:
            graph = tracer.trace(model)
        except Exception as error:  # a user's forward on proxies raises anything
            if tracer.failed is None or tracer.failed in opaque:
                raise CaptureError(
                    f"the forward of {type(model).__name__} cannot be traced symbolically: {error}"
                ) from error
            opaque |= {tracer.failed}
            continue
        for node in graph.nodes:
            node.type = None  # annotations are strings at times, which no pickle can import
        graph._tracer_cls = None  # unpickling would make a tracer of this class
        return graph, opaque


@dataclass(frozen=True)
class ModuleGraph:
    """A graph that trains: `graph` over the modules of `root`, a private copy of the source.

    Attributes:
        opaque: Paths of modules kept whole, because their forward could not be traced or does
            something else in train mode than in eval mode.
    """

    root: nn.Module
    graph: fx.Graph
    opaque: frozenset[str]


def module_graph(model: nn.Module, given: Example | None) -> ModuleGraph:
    """Trace a copy of `model` so that it can still be trained.

    The forward is traced in train mode and in eval mode. Where the two differ in a constant (as in
    `F.dropout(x, p, self.training)`), the graph reads `training` when it runs; where they differ in
    structure, the module in question stays whole.

    Raises:
        CaptureError: The root's own forward cannot be traced, or depends on the mode in structure.
    """
    root = clone(model)
    flags = [(module, module.training) for module in root.modules()]
    opaque: frozenset[str] = frozenset()
    try:
        while True:
            root.train()
            graph, opaque = _trace(_Tracer, root, opaque, given)
            root.eval()
            in_eval, grown = _trace(_Tracer, root, opaque, given)
            if grown != opaque:
                opaque = grown
                continue
            culprit = _merge_modes(root, graph, in_eval)
            if culprit is None:
                return ModuleGraph(root, graph, opaque)
            if culprit == "":
                raise CaptureError(
                    f"the forward of {type(model).__name__} does different things in train mode "
                    "and in eval mode, so that no single graph can be both"
                )
            opaque |= {culprit}
    finally:
        for module, flag in flags:
            module.training = flag


class ByMode(nn.Module):
    """A constant that an operator takes: one value in train mode, another in eval mode."""

    def __init__(self, in_train: Any, in_eval: Any) -> None:
        super().__init__()
        self.in_train = in_train
        self.in_eval = in_eval

    def forward(self) -> Any:
        """The value for the present mode."""
        return self.in_train if self.training else self.in_eval


def _merge_modes(root: nn.Module, train: fx.Graph, evaluation: fx.Graph) -> str | None:
    """Make `train` serve both modes. The path of the module that forbids it; None if it worked."""
    pairs = list(zip(train.nodes, evaluation.nodes, strict=False))
    twin = dict(pairs)
    constants: list[tuple[fx.Node, list[Any], list[Any], Any]] = []
    for ours, theirs in pairs:
        mine, spec = pytree.tree_flatten((ours.args, ours.kwargs))
        other, other_spec = pytree.tree_flatten((theirs.args, theirs.kwargs))
        if (ours.op, ours.target) != (theirs.op, theirs.target) or spec != other_spec:
            return _owner(ours)
        if not all(_matches(a, b, twin) for a, b in zip(mine, other, strict=True)):
            return _owner(ours)
        if any(not _same(a, b) for a, b in zip(mine, other, strict=True)):
            constants.append((ours, mine, other, spec))
    if len(train.nodes) != len(evaluation.nodes):
        longer = max((train, evaluation), key=lambda graph: len(graph.nodes))
        return _owner(list(longer.nodes)[len(pairs)])
    for node, mine, other, spec in constants:
        _choose_at_run_time(root, node, mine, other, spec)
    return None


def _matches(a: Any, b: Any, twin: dict[fx.Node, fx.Node]) -> bool:
    """Whether two arguments are the same value of their graphs, or are constants both."""
    if isinstance(a, fx.Node):
        return twin.get(a) is b
    return not isinstance(b, fx.Node)


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, fx.Node) or (type(a) is type(b) and bool(a == b))


def _choose_at_run_time(
    root: nn.Module, node: fx.Node, mine: list[Any], other: list[Any], spec: Any
) -> None:
    leaves = list(mine)
    for i, (a, b) in enumerate(zip(mine, other, strict=True)):
        if _same(a, b):
            continue
        name = free_name(root, f"mode_of_{node.name}")
        root.add_module(name, ByMode(a, b))
        with node.graph.inserting_before(node):
            leaves[i] = node.graph.call_module(name)
    node.args, node.kwargs = pytree.tree_unflatten(leaves, spec)


def _owner(node: fx.Node) -> str:
    """Path of the module whose forward made `node`; "" for the root."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def inference_graph(model: nn.Module, given: Example | None) -> fx.GraphModule:
    """A functional graph of a copy of `model` in its present mode.

    Without example inputs, and with them where that gives the same outputs, by symbolic tracing;
    otherwise by `torch.export.export(strict=False)` with dynamic shapes.

    Raises:
        CaptureError: Neither way works; the message holds both causes.
    """
    root = clone(model)
    try:
        graph, _ = _trace(_FunctionalTracer, root, frozenset(), given)
    except CaptureError as error:
        if given is None:
            raise CaptureError(
                f"{error}. Pass example_inputs, so that torch.export can capture the model"
            ) from error
        return _exported(root, given, str(error))
    traced = assemble(root, graph)
    if given is not None and not _agree(root, traced, given):
        return _exported(root, given, "the traced graph and the model disagree on the example")
    return traced


def assemble(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """`graph` with what it reads of `root`, in the mode and with the outer hooks of `root`."""
    graph.lint()
    module = fx.GraphModule(root, graph, class_name=type(root).__name__)
    theirs = dict(root.named_modules(remove_duplicate=False))
    for path, made in module.named_modules(remove_duplicate=False):
        made.training = theirs[path].training
    for hooks in _HOOKS:
        getattr(module, hooks).update(getattr(root, hooks))
    return module


def _agree(root: nn.Module, traced: fx.GraphModule, given: Example) -> bool:
    """Whether model and graph give bit-equal outputs on the example (in train mode: not asked)."""
    if any(module.training for module in root.modules()):
        return True
    signature = inspect.signature(root.forward).bind(*given.args, **given.kwargs)
    names = {str(node.target) for node in traced.graph.nodes if node.op == "placeholder"}
    tensors = {k: v for k, v in signature.arguments.items() if k in names}
    with torch.no_grad():
        truth = pytree.tree_leaves(
            clone(root)(*copy.deepcopy(given.args), **copy.deepcopy(given.kwargs))
        )
        try:
            ours = pytree.tree_leaves(clone(traced)(**copy.deepcopy(tensors)))
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
    return len(ours) == len(truth) and all(
        torch.equal(a, b) or bool(torch.allclose(a, b, equal_nan=True))
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else type(a) is type(b)
        for a, b in zip(ours, truth, strict=True)
    )


def _exported(root: nn.Module, given: Example, cause: str) -> fx.GraphModule:
    errors = [f"symbolic tracing: {cause}"]
    dynamic = pytree.tree_map(
        lambda leaf: (
            dict.fromkeys(range(leaf.dim()), torch.export.Dim.AUTO)
            if isinstance(leaf, Tensor)
            else None
        ),
        (given.args, dict(given.kwargs)),
    )
    signature = inspect.signature(root.forward)
    try:
        names = list(signature.bind(*given.args, **given.kwargs).arguments)
    except TypeError as error:
        raise CaptureError(
            f"the example does not fit {type(root).__name__}.forward: {error}"
        ) from error
    shapes = dict(zip(names, [*dynamic[0], *dynamic[1].values()], strict=False))
    for dynamic_shapes in (shapes, None):
        try:
            program = torch.export.export(
                root, given.args, dict(given.kwargs), dynamic_shapes=dynamic_shapes, strict=False
            )
        except Exception as error:  # noqa: BLE001  # the exporter and the user's forward raise anything
            errors.append(f"torch.export: {str(error).partition(chr(10))[0]}")
            continue
        captured = program.module()
        assert isinstance(captured, fx.GraphModule)
        # The exporter's own hooks look at its class; its guards are a node and stay.
        captured._forward_pre_hooks.clear()
        captured._forward_pre_hooks_with_kwargs.clear()
        return captured
    raise CaptureError(f"{type(root).__name__} cannot be captured. " + "; ".join(errors))


def batch_norm_path(node: fx.Node) -> str:
    """Name of a BatchNorm evaluation: its module, or the owner of its running mean, or the node."""
    if OWNER in node.meta:
        return str(node.meta[OWNER])
    mean = node.all_input_nodes and _running_mean(node)
    if isinstance(mean, fx.Node) and mean.op == "get_attr":
        return owner_of(str(mean.target))
    return node.name


def _running_mean(node: fx.Node) -> Any:
    signature = BATCH_NORM[node.target]  # type: ignore[index]  # callers pass BatchNorm calls
    named = dict(zip(signature, node.args, strict=False)) | dict(node.kwargs)
    return named.get("running_mean")


def owner_of(name: str) -> str:
    """Path of the module that holds a parameter; the parameter's own name at the root."""
    return name.rpartition(".")[0] or name
