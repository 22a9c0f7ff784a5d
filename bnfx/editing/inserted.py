"""The module that insertion returns: a graph that still knows the model it was made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfx.graphs.durable import DurableGraph
from bnfx.graphs.examples import take_hooks


@dataclass(frozen=True)
class Origin:
    """Where an inserted BatchNorm came from, in names that start from the graph's root.

    Attributes:
        layer: Path of the affine layer, "" for the root itself.
        bias: Name of the bias that beta replaced; None where there was none, or where it stays.
        norm: Path of the BatchNorm.
    """

    layer: str
    bias: str | None
    norm: str


class InsertedGraph(DurableGraph):
    """A graph with inserted BatchNorms.

    It loads checkpoints of the model from before the insertion: where a `state_dict` has a layer
    but not the BatchNorm behind it, the layer's old bias becomes beta, and the BatchNorm an
    identity (mean 0, var 1, gamma sqrt(1 + eps)).
    """

    _bnfx_origins: tuple[Origin, ...] = ()

    @staticmethod
    def build(
        root: nn.Module, graph: fx.Graph, origins: Sequence[Origin], like: nn.Module | None = None
    ) -> InsertedGraph:
        """`graph` with what it reads of `root`, in the mode and with the outer hooks of `root`.

        Args:
            root: The module that the graph was traced from.
            graph: The graph, with the BatchNorms of `origins`.
            origins: The BatchNorms that were inserted.
            like: A layer whose plain attributes, such as `in_features`, the result has as well.
        """
        _mention_everything(root, graph)
        graph.lint()
        module = InsertedGraph(root, graph, class_name=type(root).__name__)
        module._bnfx_origins = tuple(origins)
        _resemble(module, root)
        if like is not None:
            _take_absent(module, like)
            for name, value in vars(like).items():
                if not name.startswith("_") and name not in module.__dict__:
                    setattr(module, name, value)
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As any module; an error of a BatchNorm that is inside says behind which layer it is."""
        try:
            return super().__call__(*args, **kwargs)
        except ValueError as error:
            _name_the_layer(self, error)
            raise

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        _translate(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _mention_everything(root: nn.Module, graph: fx.Graph) -> None:
    """Read every parameter and buffer of `root`: what a graph reads survives copy and pickle."""
    covered = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for name in root.state_dict(keep_vars=True):
        inside = any(name.startswith(f"{path}.") for path in covered)
        if name in covered or inside or name.endswith("_extra_state"):
            continue
        with graph.inserting_before(first):
            graph.get_attr(name)


def _resemble(made: nn.Module, source: nn.Module) -> None:
    """Give `made` the modes, the outer hooks and the names of `source`.

    A module under several names is one module, and names come in one order: torch.fx makes modules
    anew along the names that a graph reads.
    """
    theirs = dict(source.named_modules(remove_duplicate=False))
    ours = dict(made.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    for path, module in theirs.items():
        if path in ours:
            ours[path].training = module.training
        original = first.setdefault(id(module), path)
        if original != path and original in ours:
            parent, _, leaf = path.rpartition(".")
            if parent in ours:
                ours[parent]._modules[leaf] = ours[original]
    for path, module in made.named_modules():
        order = list(theirs[path]._modules) if path in theirs else []
        children = dict(module._modules)
        module._modules.clear()
        module._modules.update({name: children[name] for name in order if name in children})
        module._modules.update(children)
    take_hooks(made, source)


def _name_the_layer(module: InsertedGraph, error: ValueError) -> None:
    """Note on an error the inserted BatchNorm that raised it: that of a batch too small, mostly."""
    norms = {id(module.get_submodule(o.norm)): o for o in reversed(module._bnfx_origins)}
    trace = error.__traceback__
    while trace is not None:
        origin = norms.get(id(trace.tb_frame.f_locals.get("self")))
        if origin is not None:
            layer = origin.layer or type(module).__name__
            error.add_note(
                f"raised by the BatchNorm that bnfx put behind {layer!r} ({origin.norm!r}); in "
                "train mode it needs more than one value per channel: give larger batches, exclude "
                "the layer, or call eval()"
            )
            return
        trace = trace.tb_next


def _take_absent(made: nn.Module, source: nn.Module) -> None:
    """A parameter that is None, such as a bias that is gone, stays an attribute."""
    for name, parameter in source._parameters.items():
        if parameter is None and name not in made._parameters:
            made.register_parameter(name, None)


def _translate(module: InsertedGraph, state_dict: dict[str, Any], prefix: str) -> None:
    """Turn a checkpoint from before the insertion into one of `module`."""
    spent: set[str] = set()
    given = list(state_dict)
    for origin in module._bnfx_origins:
        norm = module.get_submodule(origin.norm)
        own, layer = f"{prefix}{origin.norm}.", f"{prefix}{origin.layer}"
        known = any(key == layer or key.startswith(f"{layer}.") for key in given)
        if origin.layer == "":
            known = any(key.startswith(prefix) for key in given)
        if not isinstance(norm, _BatchNorm) or not known:
            continue
        if any(key.startswith(own) for key in given):
            continue
        bias = None if origin.bias is None else state_dict.get(f"{prefix}{origin.bias}")
        for name, value in _identity(norm, bias).items():
            state_dict[own + name] = value
        spent.add(f"{prefix}{origin.bias}")
    for key in spent & state_dict.keys():
        del state_dict[key]


def _identity(norm: _BatchNorm, bias: Tensor | None) -> dict[str, Tensor]:
    """The state of a BatchNorm that only adds `bias`."""
    state = {name: torch.zeros_like(value) for name, value in norm.state_dict().items()}
    state["running_var"].fill_(1)
    state["weight"].fill_(math.sqrt(1 + norm.eps))
    if bias is not None:
        state["bias"].copy_(bias)
    return state
